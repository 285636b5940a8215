"""Fetch locks between the processes of a machine, and write versions."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from xzcache.index import counters_of
from xzcache.model import Entry, is_document

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache.directory._faults import FaultBarrier
    from xzcache.index import Registration
    from xzcache.model import Span


class WriteVersion(NamedTuple):
    """The write counters of a key before a fetch: the result may be published only while they are unchanged."""

    process: int
    generation: int
    counts: tuple[int, ...]

    def digest(self) -> int:
        """A number by which any process recognizes an equal version in the index."""
        text = ",".join(map(str, (self.process, self.generation, *self.counts)))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def current_version(process: Registration, key: str) -> WriteVersion:
    """The current write version of a key."""
    counters = counters_of(key, data=not is_document(key))
    return WriteVersion(process.number, process.generation, process.writes.before(counters))


class WriteVersions:
    """The write versions of several keys at one moment: one read of the totals, and of each counter after a write."""

    def __init__(self, process: Registration) -> None:
        self._process = process
        self._lost, self._counts = process.writes.current()

    def of(self, key: str) -> WriteVersion:
        """The write version of a key, with counters read at their first use."""
        process = self._process
        values = process.writes.values(counters_of(key, data=not is_document(key)), self._counts)
        return WriteVersion(process.number, process.generation, (self._lost, *values))


class FetchLocks:
    """Fetch locks: only one process fetches an entry or a span. Never waits."""

    def __init__(self, barrier: FaultBarrier) -> None:
        self._barrier = barrier
        self._session = barrier.session

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """Try to take the fetch lock of an entry; returns the function that releases it, or None if it is taken."""
        process = self._session.current
        if process is None:
            return lambda: None
        offset = entry.lock_offset()
        try:
            if not process.keys.try_lock(offset):
                return None
        except OSError as error:
            # a lock is only there to save a fetch
            self._barrier.record_fault(error)
            return lambda: None
        return lambda: process.keys.unlock(offset)

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """Try to lock a span of an object; returns a function to release it, or a part that another process holds."""
        process = self._session.current
        if process is None:
            return lambda: None
        number = Entry(key).lock_offset()
        try:
            if (taken := process.keys.try_lock_span(number, span)) is not None:
                return taken
        except OSError as error:
            self._barrier.record_fault(error)
            return lambda: None
        return lambda: process.keys.unlock_span(number, span)

    def write_version(self, entry: Entry) -> WriteVersion | None:
        """The write version of an entry before a fetch, perhaps slightly old. Never waits."""
        process = self._session.current
        if process is None:
            return None
        try:
            counters = counters_of(entry.key, data=not is_document(entry.key))
            return WriteVersion(process.number, process.generation, process.writes.before(counters))
        except OSError as error:
            self._barrier.record_fault(error)
            return None
