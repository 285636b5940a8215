"""Who fetches, among the processes of a machine, and what was written since one began."""

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
    """What the write counters said when a fill began: it may publish only while they still say so."""

    process: int
    generation: int
    counts: tuple[int, ...]

    def digest(self) -> int:
        """A number for the index, by which any process recognizes an equal ticket."""
        told = ",".join(map(str, (self.process, self.generation, *self.counts)))
        return int.from_bytes(blake2b(told.encode(), digest_size=8).digest(), "little", signed=True)


def current_version(process: Registration, key: str) -> WriteVersion:
    """What the write counters say now."""
    return WriteVersions(process).of(key)


class WriteVersions:
    """Tickets of several keys at one moment: a counter that they have in common is read once.

    Parameters
    ----------
    member : Membership
    """

    def __init__(self, process: Registration) -> None:
        self._process = process
        self._lost = process.writes.lost()
        self._counts: dict[int, int] = {}

    def of(self, key: str) -> WriteVersion:
        """What the write counters of a key say, each as it was when it was first asked for here."""
        counts = self._counts
        counters = counters_of(key, data=not is_document(key))
        for counter in counters:
            if counter not in counts:
                counts[counter] = self._process.writes.read(counter)
        return WriteVersion(
            self._process.number, self._process.generation, (self._lost, *[counts[counter] for counter in counters])
        )


class FetchLocks:
    """Finds the one process that fetches something for a cache directory. Never waits.

    Parameters
    ----------
    keeper : Keeper
    """

    def __init__(self, barrier: FaultBarrier) -> None:
        self._barrier = barrier
        self._session = barrier.session

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """Try to become the one process that fetches an entry.

        Returns
        -------
        callable or None
            What gives the lead up again; None while another process has it. Never waits.
        """
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
        """Try to become the one process that fetches some bytes of an object.

        Returns
        -------
        callable or (int, int)
            What gives the claim up again; or a part of the span that another process has. Never waits.
        """
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
        """Take note of the writes so far, before a fetch begins. Never waits."""
        process = self._session.current
        if process is None:
            return None
        try:
            counters = counters_of(entry.key, data=not is_document(entry.key))
            return WriteVersion(process.number, process.generation, process.writes.before(counters))
        except OSError as error:
            self._barrier.record_fault(error)
            return None
