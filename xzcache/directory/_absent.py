"""The negative cache: missing chunks, as index rows without files, so that a sparse array is not requested twice."""

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


# records in memory, of all arrays together; rows of a larger array are looked up one by one
_REMEMBERED: Final = 65536
# rows of one section, for which other processes wait
_PAGE: Final = 1024
_MOST_ROWS: Final = 1 << 18
# records between two counts of the rows: counting scans the whole table
_COUNT_EVERY: Final = 1 << 14
_LONG_SECONDS: Final = 0.005
_REST: Final = 10
"""After a slow query, the index is not asked for this many times its duration: an unknown chunk only costs a request.
"""


class _Missing(NamedTuple):
    """When a key was found missing (seconds since the epoch), and the write version at that time."""

    at: float
    version: WriteVersion


class NegativeCache:
    """The chunks that are known to be missing at the sources of one cache directory. Safe for threads.

    This process remembers a limited number of them, each while its write version is current. A counter for each array
    shows that other processes have recorded more. Then all records of the array are read at once; of an array with too
    many, single records are read.
    """

    def __init__(self, barrier: FaultBarrier) -> None:
        self._barrier = barrier
        self._session = barrier.session
        self._recorded: dict[str, _Missing] = {}
        # the counter value up to which all records of an array are known here, and this process's own later values
        self._read_at: dict[str, int] = {}
        self._own: dict[str, set[int]] = {}
        self._rest_until = 0.0
        self._lock = threading.Lock()
        # threads that ask for chunks of one array wait for a single query, which answers all of them
        self._looking = threading.Lock()
        self._pending: dict[str, _Missing] = {}
        self._uncounted = _COUNT_EVERY

    def knows(self, key: str, max_age: Age) -> bool | None:
        """Whether a key is known to be missing, without the index; None if the index must be asked. Never waits."""
        record = self._recorded.get(key)
        if record is not None:
            if record.version == self._current_version(key):
                # a record that is too old for one store may be fresh for another
                return is_fresh(record.at, max_age)
            # the key was written since, so the source may have it now
            self._recorded.pop(key, None)
            return False
        array = _array_of(key)
        # no process has recorded more of this array than is known here
        if self._count(array) <= self._read_at.get(array, 0) or time.monotonic() < self._rest_until:
            return False
        return None

    def look(self, key: str, max_age: Age) -> bool:
        """Whether a key is recorded as missing by any process."""
        with self._looking:
            # another thread may have asked meanwhile
            if (known := self.knows(key, max_age)) is not None:
                return known
            begun = time.monotonic()
            found = self._barrier.try_or(lambda: self._look(key, max_age), False)
            if (took := time.monotonic() - begun) > _LONG_SECONDS:
                self._rest_until = begun + (1 + _REST) * took
            return found

    def _look(self, key: str, max_age: Age) -> bool:
        array = _array_of(key)
        # before the rows are read: a record that comes in between is counted, and then read by the next look
        count = self._count(array)
        rows = self._rows(array)
        if (process := self._session.current) is not None:
            # after the rows: a write since then has another version, even if the index missed it
            versions = WriteVersions(process)
            for name, (at, digest) in rows.items():
                if (version := versions.of(name)).digest() == digest:
                    self._remember(name, _Missing(at, version))
        if len(rows) >= _REMEMBERED:
            with self._session.section() as (process, index):
                record = index.tables.absent_since(key, current_version(process, key).digest())
            return record is not None and is_fresh(record, max_age)
        with self._lock:
            # clearing costs one query for each array; to keep them all would let the memory
            # grow with the number of arrays
            if len(self._read_at) > _REMEMBERED:
                self._read_at.clear()
                self._own.clear()
            self._advance(array, count)
        return bool(self.knows(key, max_age))

    def _advance(self, array: str, count: int) -> None:
        """Mark all values up to a count as known, and this process's own values that follow it."""
        count = max(count, self._read_at.get(array, 0))
        own = self._own.setdefault(array, set())
        # values that this process added itself: their records are in memory already
        while count + 1 in own:
            count += 1
        self._own[array] = {number for number in own if number > count}
        self._read_at[array] = count

    def _rows(self, array: str) -> dict[str, tuple[float, int]]:
        """The records of an array: time and version; the guard is released between pages."""
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
        record = _Missing(time.time(), version)
        self._remember(key, record)
        with self._lock:
            first = not self._pending
            self._pending[key] = record
        return first

    def flush(self) -> None:
        """Write the new records to the index."""
        with self._lock:
            pending, self._pending = self._pending, {}
        if pending:
            self._barrier.try_or(lambda: self._flush(pending), None)

    def _flush(self, pending: dict[str, _Missing]) -> None:
        with self._session.section() as (process, index):
            arrays = set()
            for key, record in pending.items():
                # under the guard, so that no write falls between this comparison and the row
                if record.version == current_version(process, key) and not index.tables.is_written(key):
                    index.tables.set_absent(key, record.at, record.version.digest())
                    arrays.add(_array_of(key))
            for array in arrays:
                with self._lock:
                    # before the increment: this process's own records need no query
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
        # without the counter the chunk is taken for unknown, which costs a request
        with suppress(OSError):
            return 0 if process is None else process.writes.read(missing_counter(array))
        return 0

    def _current_version(self, key: str) -> WriteVersion | None:
        process = self._session.current
        # without a version no record is current: the chunk is asked for
        with suppress(OSError):
            return None if process is None else current_version(process, key)
        return None

    def _remember(self, key: str, record: _Missing) -> None:
        while len(self._recorded) >= _REMEMBERED:
            # another thread may be doing the same
            with suppress(KeyError, StopIteration, RuntimeError):
                del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = record


def _array_of(key: str) -> str:
    return arrays_of(key)[-1]
