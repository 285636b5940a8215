"""Chunks that a source does not have: an index row each and no file, so that a sparse array is not asked for twice."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache._config import is_fresh
from xzcache.directory._fetchlocks import WriteVersion, WriteVersions, current_version
from xzcache.index import missing_counter
from xzcache.model import arrays_of

if TYPE_CHECKING:
    from xzcache._config import Age
    from xzcache.directory._faults import FaultBarrier


_REMEMBERED: Final = 65536
_PAGE: Final = 4096
_MOST_ROWS: Final = 1 << 18
_COUNT_EVERY: Final = 1 << 14
_LONG_SECONDS: Final = 0.005
_REST: Final = 10
"""After a look that took long, nobody looks again for so many times as long: not to know only costs a request."""


class _Missing(NamedTuple):
    """When a key was found to be absent (seconds since the epoch), and what the write counters said then."""

    at: float
    version: WriteVersion


class NegativeCache:
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

    def __init__(self, barrier: FaultBarrier) -> None:
        self._barrier = barrier
        self._session = barrier.session
        self._recorded: dict[str, _Missing] = {}
        # the counter up to which all that is noted of an array is known here, and the counts above that are our own
        self._read_at: dict[str, int] = {}
        self._own: dict[str, set[int]] = {}
        self._rest_until = 0.0
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._pending: dict[str, _Missing] = {}
        self._uncounted = _COUNT_EVERY

    def knows(self, key: str, max_age: Age) -> bool | None:
        """Whether a key is absent, without a look at the index; None where that is needed. Never waits."""
        noted = self._recorded.get(key)
        if noted is not None:
            if noted.version == self._current_version(key):
                # what is too old for one store may not be so for another
                return is_fresh(noted.at, max_age)
            self._recorded.pop(key, None)
            return False
        array = _array_of(key)
        if self._count(array) <= self._read_at.get(array, 0) or time.monotonic() < self._rest_until:
            return False
        return None

    def look(self, key: str, max_age: Age) -> bool:
        """Whether a key is absent, as anybody has noted."""
        with self._looking:
            # another thread may have looked meanwhile
            if (known := self.knows(key, max_age)) is not None:
                return known
            begun = time.monotonic()
            found = self._barrier.try_or(lambda: self._look(key, max_age), False)
            if (took := time.monotonic() - begun) > _LONG_SECONDS:
                self._rest_until = begun + (1 + _REST) * took
            return found

    def _look(self, key: str, max_age: Age) -> bool:
        array = _array_of(key)
        count = self._count(array)
        rows = self._rows(array)
        if (process := self._session.current) is not None:
            # after the rows: what was written since, also where the index could not be told, has another ticket
            versions = WriteVersions(process)
            for name, (at, digest) in rows.items():
                if (version := versions.of(name)).digest() == digest:
                    self._remember(name, _Missing(at, version))
        if len(rows) >= _REMEMBERED:
            with self._session.section() as (process, index):
                noted = index.tables.absent_since(key, current_version(process, key).digest())
            return noted is not None and is_fresh(noted, max_age)
        with self._lock:
            if len(self._read_at) > _REMEMBERED:
                self._read_at.clear()
                self._own.clear()
            self._advance(array, count)
        return bool(self.knows(key, max_age))

    def _advance(self, array: str, count: int) -> None:
        """All up to a count is known, and what follows it as far as that is our own."""
        count = max(count, self._read_at.get(array, 0))
        own = self._own.setdefault(array, set())
        while count + 1 in own:
            count += 1
        self._own[array] = {number for number in own if number > count}
        self._read_at[array] = count

    def _rows(self, array: str) -> dict[str, tuple[float, int]]:
        """What is noted of an array: when, and under which ticket; the guard is let go of now and then."""
        rows: dict[str, tuple[float, int]] = {}
        last = ""
        while len(rows) < _REMEMBERED:
            with self._session.section() as (_, index):
                page = index.tables.absent_beneath(array, last, _PAGE)
            rows.update({name: (at, digest) for name, at, digest in page})
            if len(page) < _PAGE:
                break
            last = page[-1][0]
        return rows

    def record_missing(self, key: str, version: WriteVersion) -> bool:
        """Remember that the source has no such key; whether `flush` is to be called."""
        noted = _Missing(time.time(), version)
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
            self._barrier.try_or(lambda: self._flush(pending), None)

    def _flush(self, pending: dict[str, _Missing]) -> None:
        with self._session.section() as (process, index):
            arrays = set()
            for key, noted in pending.items():
                if noted.version == current_version(process, key) and not index.tables.is_written(key):
                    index.tables.set_absent(key, noted.at, noted.version.digest())
                    arrays.add(_array_of(key))
            for array in arrays:
                with self._lock:
                    # known before it shows: our own notes are no news to us
                    count = process.writes.read(missing_counter(array))
                    self._own.setdefault(array, set()).add(count + 1)
                    self._advance(array, self._read_at.get(array, 0))
                process.writes.increment(missing_counter(array))
            self._uncounted += len(pending)
            if self._uncounted >= _COUNT_EVERY:
                self._uncounted = 0
                index.tables.keep_absent(_MOST_ROWS)

    def _count(self, array: str) -> int:
        process = self._session.current
        with suppress(OSError):
            return 0 if process is None else process.writes.read(missing_counter(array))
        return 0

    def _current_version(self, key: str) -> WriteVersion | None:
        process = self._session.current
        with suppress(OSError):
            return None if process is None else current_version(process, key)
        return None

    def _remember(self, key: str, noted: _Missing) -> None:
        while len(self._recorded) >= _REMEMBERED:
            # another thread may be doing the same
            with suppress(KeyError, StopIteration, RuntimeError):
                del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = noted


def _array_of(key: str) -> str:
    return arrays_of(key)[-1]
