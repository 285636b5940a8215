"""Keeping the cache true when its source is written through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache._keys import Entry, prefix_slot, write_slot
from xzcache._leaders import Ticket, current_ticket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xzcache._doubts import Doubts
    from xzcache._files import Data
    from xzcache._index import Index
    from xzcache._membership import Membership
    from xzcache._publisher import Publisher
    from xzcache._schema import Dying
    from xzcache._space import Space

_BATCH: Final = 128

T = TypeVar("T")


class Begun(NamedTuple):
    """A write that has begun: what the counters said then, and the row that says so in the index."""

    key: str
    ticket: Ticket | None = None
    row: int = 0
    owner: int = 0


class Writes:
    """Makes what is no longer true invisible to every process.

    A write has two ends. `begin` makes the old value invisible before the source changes, and says in the index that
    the key is being written: until `end`, nobody stores anything for it, and if this process dies before, the next one
    forgets the key. `end` stores the new value if nobody else was writing the key. Each end counts the write, so that
    no fill that began before it publishes after it.

    Notes
    -----
    Where the index cannot be used, files are unlinked by their paths; where even that fails, this process reads
    nothing more of that key's source from the cache until it could be made up for.
    """

    def __init__(self, doubts: Doubts, space: Space, publisher: Publisher) -> None:
        self._surely = doubts.surely
        self._unlink_keys = doubts.unlink_keys
        self._unlink_beneath = doubts.unlink_beneath
        self._books = space.books
        self._space = space
        self._publisher = publisher

    # -- keys

    def begin(self, keys: Sequence[str]) -> list[Begun]:
        """Before the source is written: forget the keys, and say that they are being written."""
        return [begun for batch in _batches(keys) for begun in self._begin(batch)]

    def _begin(self, keys: Sequence[str]) -> list[Begun]:
        def act() -> list[Begun]:
            with self._books.section() as (member, index):
                begun = []
                for key in keys:
                    ticket = self._count(member, index, key)
                    row = index.notes.add_writing(key, member.owner, beneath=False)
                    begun.append(Begun(key, ticket, row, member.owner))
                dying = self._condemn_keys(member, index, keys)
            self._space.release(dying)
            return begun

        return self._surely(keys, act, lambda: self._unlink_keys(keys)) or [Begun(key) for key in keys]

    def end(self, writes: Sequence[Begun], values: Sequence[Data | None]) -> None:
        """After the source was written: forget what was filled meanwhile, and store the new values."""
        tickets = [ticket for batch in _batches(writes) for ticket in self._end(batch)]
        for write, ticket, value in zip(writes, tickets, values, strict=True):
            if value is not None and ticket is not None:
                self._publisher.publish(Entry(write.key), value, ticket)

    def _end(self, writes: Sequence[Begun]) -> list[Ticket | None]:
        keys = [write.key for write in writes]

        def act() -> list[Ticket | None]:
            tickets: list[Ticket | None] = []
            with self._books.section() as (member, index):
                for write in writes:
                    # a write whose beginning could not be told may have met others that nobody knows of
                    alone = write.ticket is not None and write.ticket == current_ticket(member, write.key)
                    ticket = self._count(member, index, write.key)
                    tickets.append(ticket if alone else None)
                    index.notes.drop_writing(write.row, write.owner)
                dying = self._condemn_keys(member, index, keys)
            self._space.release(dying)
            return tickets

        return self._surely(keys, act, lambda: self._unlink_keys(keys)) or [None] * len(writes)

    def forget(self, key: str, since: Ticket | None) -> Ticket | None:
        """Forget a key whose value turned out to be another; a ticket to store that, None if it was written since."""

        def act() -> Ticket | None:
            with self._books.section() as (member, index):
                alone = since is not None and since == current_ticket(member, key)
                ticket = self._count(member, index, key)
                dying = self._condemn_keys(member, index, [key])
            self._space.release(dying)
            return ticket if alone else None

        return self._surely([key], act, lambda: self._unlink_keys([key]))

    @staticmethod
    def _count(member: Membership, index: Index, key: str) -> Ticket:
        """Count a write; returns what the counters say now."""
        member.writes.bump(write_slot(key))
        index.notes.drop_absent([key])
        return current_ticket(member, key)

    def _condemn_keys(self, member: Membership, index: Index, keys: Sequence[str]) -> list[Dying]:
        return self._space.condemn(member, index, [row for key in keys for row in index.of_key(key)])

    # -- everything beneath a prefix

    def begin_drop(self, prefix: str) -> Begun:
        """Before everything beneath a prefix is deleted at the source: forget it, and say that it is being written."""

        def act() -> Begun:
            with self._books.section() as (member, index):
                row = index.notes.add_writing(prefix, member.owner, beneath=True)
                begun = Begun(prefix, None, row, member.owner)
            self.drop_now(prefix)
            return begun

        return self._surely([f"{prefix}/"], act, lambda: self._unlink_beneath(prefix)) or Begun(prefix)

    def end_drop(self, begun: Begun) -> None:
        """After everything beneath a prefix was deleted at the source."""

        def act() -> None:
            self.drop_now(begun.key)
            with self._books.section() as (_, index):
                index.notes.drop_writing(begun.row, begun.owner)

        self._surely([f"{begun.key}/"], act, lambda: self._unlink_beneath(begun.key))

    def drop(self, prefix: str) -> None:
        """Forget all entries whose key begins with ``prefix + "/"``, and the arrays there."""
        self._surely([f"{prefix}/"], lambda: self.drop_now(prefix), lambda: self._unlink_beneath(prefix))

    def drop_now(self, prefix: str, *, counted: bool = False) -> None:
        """As `drop`, where trouble is the caller's; `counted` if the counter of writes was raised already."""
        with self._books.section() as (member, index):
            if not counted:
                member.writes.bump(prefix_slot(prefix))
            index.notes.drop_nodes(prefix, documents=not counted)
            index.notes.drop_absent_beneath(prefix)
        while True:
            with self._books.section() as (member, index):
                dying = self._space.condemn(member, index, index.beneath(prefix, _BATCH))
            self._space.release(dying)
            if not dying:
                return


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
