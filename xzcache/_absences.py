"""Chunks that a source does not have: an index row each and no file, so that a sparse array is not asked for twice."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache._documents import arrays_of
from xzcache._keys import absence_slot
from xzcache._leaders import Ticket, current_ticket

if TYPE_CHECKING:
    from xzcache._config import Age
    from xzcache._keeper import Keeper

_REMEMBERED: Final = 65536
_PAGE: Final = 4096
_MOST_ROWS: Final = 1 << 18
_COUNT_EVERY: Final = 1 << 14


class _Noted(NamedTuple):
    """When a key was found to be absent (seconds since the epoch), and what the write counters said then."""

    at: float
    ticket: Ticket


class Absences:
    """What the sources of one cache directory are known not to have. Safe for threads.

    Parameters
    ----------
    keeper : Keeper

    Notes
    -----
    This process remembers a bounded number of them, each for as long as the counters of writes say that nobody has
    written the key or anything above it. Whether anybody has noted more of an array another counter says; then all that
    is noted of it is read at once, and of an array with more than can be remembered, key by key.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._noted: dict[str, _Noted] = {}
        self._read_at: dict[str, int] = {}
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._pending: dict[str, _Noted] = {}
        self._uncounted = _COUNT_EVERY

    def knows(self, key: str, max_age: Age) -> bool | None:
        """Whether a key is absent, without a look at the index; None where that is needed. Never waits."""
        noted = self._noted.get(key)
        if noted is not None:
            if _is_fresh(noted.at, max_age) and noted.ticket == self._ticket(key):
                return True
            self._noted.pop(key, None)
            return False
        array = _array_of(key)
        return False if self._count(array) == self._read_at.get(array, 0) else None

    def look(self, key: str, max_age: Age) -> bool:
        """Whether a key is absent, as anybody has noted."""
        with self._looking:
            # another thread may have looked meanwhile
            if (known := self.knows(key, max_age)) is not None:
                return known
            return self._keeper.attempt(lambda: self._look(key, max_age), False)

    def _look(self, key: str, max_age: Age) -> bool:
        array = _array_of(key)
        count = self._count(array)
        # tickets are older than the rows that they are remembered with
        tickets = {name: self._ticket(name) for name in self._rows(array)}
        rows = self._rows(array)
        for name, at in rows.items():
            if (ticket := tickets.get(name)) is not None:
                self._remember(name, _Noted(at, ticket))
        if len(rows) >= _REMEMBERED:
            with self._books.section() as (_, index):
                noted = index.notes.absent_since(key)
            return noted is not None and _is_fresh(noted, max_age)
        self._read_at[array] = count
        if len(self._read_at) > _REMEMBERED:
            self._read_at.clear()
        return bool(self.knows(key, max_age))

    def _rows(self, array: str) -> dict[str, float]:
        """What is noted of an array; the guard is let go of now and then."""
        rows: dict[str, float] = {}
        last = ""
        while len(rows) < _REMEMBERED:
            with self._books.section() as (_, index):
                page = index.notes.absent_beneath(array, last, _PAGE)
            rows.update(page)
            if len(page) < _PAGE:
                break
            last = page[-1][0]
        return rows

    def note(self, key: str, ticket: Ticket) -> bool:
        """Remember that the source has no such key; whether `flush` is to be called."""
        noted = _Noted(time.time(), ticket)
        self._remember(key, noted)
        with self._lock:
            first = not self._pending
            self._pending[key] = noted
        return first

    def flush(self) -> None:
        """Tell the index of what was noted."""
        with self._lock:
            pending, self._pending = self._pending, {}
        if pending:
            self._keeper.attempt(lambda: self._flush(pending), None)

    def _flush(self, pending: dict[str, _Noted]) -> None:
        with self._books.section() as (member, index):
            arrays = set()
            for key, noted in pending.items():
                if noted.ticket == current_ticket(member, key) and not index.notes.is_written(key):
                    index.notes.set_absent(key, noted.at)
                    arrays.add(_array_of(key))
            for array in arrays:
                count = member.writes.bump(absence_slot(array))
                if self._read_at.get(array, 0) == count - 1:
                    # nobody else's notes are news
                    self._read_at[array] = count
            self._uncounted += len(pending)
            if self._uncounted >= _COUNT_EVERY:
                self._uncounted = 0
                index.notes.keep_absent(_MOST_ROWS)

    def _count(self, array: str) -> int:
        member = self._books.current
        with suppress(OSError):
            return 0 if member is None else member.writes.read(absence_slot(array))
        return 0

    def _ticket(self, key: str) -> Ticket | None:
        member = self._books.current
        with suppress(OSError):
            return None if member is None else current_ticket(member, key)
        return None

    def _remember(self, key: str, noted: _Noted) -> None:
        while len(self._noted) >= _REMEMBERED:
            # another thread may be doing the same
            with suppress(KeyError, StopIteration, RuntimeError):
                del self._noted[next(iter(self._noted))]
        self._noted[key] = noted


def _array_of(key: str) -> str:
    return arrays_of(key)[-1]


def _is_fresh(at: float, max_age: Age) -> bool:
    return max_age == "infinity" or 0 <= time.time() - at < max_age
