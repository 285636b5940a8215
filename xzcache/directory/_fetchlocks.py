"""Fetch locks between the processes of a machine, and write versions."""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache.index import counters_of
from xzcache.model import Entry, is_document, lock_offset, nothing, placed, unplaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache.directory._faults import FaultBarrier
    from xzcache.index import Registration
    from xzcache.model import Span


_LOCKABLE: Final = 1 << 40
"""The bytes of one object that have locks of their own."""


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

    @property
    def are_current(self) -> bool:
        """Whether no process without the guard has written since; under the guard."""
        # the counters are read anew when the totals have changed
        return self._process.writes.current()[1] is self._counts

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

    def acquire(self, key: str, span: Span, *, exactly: bool = True) -> Callable[[], None] | Span:
        """Try to lock a span of an object; returns a function to release it, or a part that another process holds.

        A suffix, whose begin is unknown, is locked by a byte of its own.
        """
        process = self._session.current
        # this process has not joined yet: then it fetches without a lock, which may cost a second fetch
        if process is None:
            return nothing
        try:
            # the lock of a suffix and that of the same bytes by position differ, because the size is not known yet
            if span[0] < 0:
                offset = Entry(key, *span).lock_offset()
                return partial(process.keys.unlock, offset) if process.keys.try_lock(offset) else span
            number, span = lock_offset(key), placed(span)
            if (taken := process.keys.try_lock_span(number, span, exactly=exactly)) is None:
                return partial(process.keys.unlock_span, number, span)
            # bytes beyond this have no locks of their own, so the whole rest may be taken
            return unplaced((taken[0], span[1])) if taken[1] >= _LOCKABLE else taken
        except OSError as error:
            # without a lock, two processes may fetch the same bytes, but never store wrong ones
            self._barrier.record_fault(error)
            return nothing

    def write_version(self, key: str) -> WriteVersion | None:
        """The write version of a key before a fetch, perhaps slightly old. Never waits."""
        process = self._session.current
        if process is None:
            return None
        try:
            return current_version(process, key)
        except OSError as error:
            self._barrier.record_fault(error)
            return None
