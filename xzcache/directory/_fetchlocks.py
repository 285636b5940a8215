"""Who fetches, among the processes of a machine, and what was written since one began."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from xzcache.index import all_slots
from xzcache.model import Entry, is_document

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache.directory._faults import Keeper
    from xzcache.index import Membership
    from xzcache.model import Span


class Ticket(NamedTuple):
    """What the write counters said when a fill began: it may publish only while they still say so."""

    member: int
    generation: int
    counts: tuple[int, ...]

    def digest(self) -> int:
        """A number for the index, by which any process recognizes an equal ticket."""
        told = ",".join(map(str, (self.member, self.generation, *self.counts)))
        return int.from_bytes(blake2b(told.encode(), digest_size=8).digest(), "little", signed=True)


def current_ticket(member: Membership, key: str) -> Ticket:
    """What the write counters say now."""
    return Tickets(member).of(key)


class Tickets:
    """Tickets of several keys at one moment: a counter that they have in common is read once.

    Parameters
    ----------
    member : Membership
    """

    def __init__(self, member: Membership) -> None:
        self._member = member
        self._lost = member.writes.lost()
        self._counts: dict[int, int] = {}

    def of(self, key: str) -> Ticket:
        """What the write counters of a key say, each as it was when it was first asked for here."""
        counts = self._counts
        slots = all_slots(key, data=not is_document(key))
        for slot in slots:
            if slot not in counts:
                counts[slot] = self._member.writes.read(slot)
        return Ticket(self._member.number, self._member.generation, (self._lost, *[counts[slot] for slot in slots]))


class Leaders:
    """Finds the one process that fetches something for a cache directory. Never waits.

    Parameters
    ----------
    keeper : Keeper
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._books = keeper.books

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """Try to become the one process that fetches an entry.

        Returns
        -------
        callable or None
            What gives the lead up again; None while another process has it. Never waits.
        """
        member = self._books.current
        if member is None:
            return lambda: None
        offset = entry.lock_offset()
        try:
            if not member.keys.try_lock(offset):
                return None
        except OSError as error:
            # a lock is only there to save a fetch
            self._keeper.trouble(error)
            return lambda: None
        return lambda: member.keys.unlock(offset)

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """Try to become the one process that fetches some bytes of an object.

        Returns
        -------
        callable or (int, int)
            What gives the claim up again; or a part of the span that another process has. Never waits.
        """
        member = self._books.current
        if member is None:
            return lambda: None
        number = Entry(key).lock_offset()
        try:
            if (taken := member.keys.try_lock_span(number, span)) is not None:
                return taken
        except OSError as error:
            self._keeper.trouble(error)
            return lambda: None
        return lambda: member.keys.unlock_span(number, span)

    def ticket(self, entry: Entry) -> Ticket | None:
        """Take note of the writes so far, before a fetch begins. Never waits."""
        member = self._books.current
        if member is None:
            return None
        try:
            slots = all_slots(entry.key, data=not is_document(entry.key))
            return Ticket(member.number, member.generation, member.writes.before(slots))
        except OSError as error:
            self._keeper.trouble(error)
            return None
