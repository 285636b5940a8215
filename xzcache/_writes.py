"""Keeping the cache true when its source is written through it."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache import _files as files
from xzcache._keys import Entry, is_plain, namespace_of, prefix_slot, write_slot
from xzcache._leaders import Ticket, current_ticket
from xzcache._quarantine import beneath
from xzcache._space import Doubtful

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xzcache._doubts import Doubts
    from xzcache._files import Data
    from xzcache._index import Index
    from xzcache._membership import Membership
    from xzcache._publisher import Publisher
    from xzcache._schema import Dying, Row
    from xzcache._space import Space

_BATCH: Final = 128

T = TypeVar("T")


class Begun(NamedTuple):
    """A write that has begun: the row that says so in the index, and what the counters said then.

    Without a ticket, the index could not be told, or may not have been.
    """

    key: str
    row: int
    ticket: Ticket | None = None


class Drop(NamedTuple):
    """A deletion that has begun: of everything beneath a key, and perhaps of the key itself."""

    beneath: Begun
    itself: Begun | None

    @property
    def keys(self) -> list[str]:
        return [] if self.itself is None else [self.itself.key]

    @property
    def writes(self) -> list[Begun]:
        return [self.beneath] if self.itself is None else [self.beneath, self.itself]


class Writes:
    """Makes what is no longer true invisible to every process.

    A write has two ends. `begin` makes the old value invisible before the source changes, and says in the index that
    the key is being written: until `end`, nobody stores anything for it, and if this process dies before, the next one
    forgets the key. `end` stores the new value if nobody else was writing the key. Each end counts the write, so that
    no fill that began before it publishes after it.

    Notes
    -----
    Where the index cannot be used, files are unlinked by their paths; where even that fails, this process serves
    nothing of that key from the cache until its files are seen to be gone.
    """

    def __init__(self, doubts: Doubts, space: Space, publisher: Publisher) -> None:
        self._doubts = doubts
        self._books = space.books
        self._space = space
        self._publisher = publisher

    # -- keys

    def begin(self, keys: Sequence[str]) -> list[Begun]:
        """Before the source is written: forget the keys, and say that they are being written."""
        return [begun for batch in _batches(keys) for begun in self._begin(batch)]

    def _begin(self, keys: Sequence[str]) -> list[Begun]:
        doubts = Doubtful()
        begun = [self._started(key) for key in keys]

        def act() -> list[Begun]:
            with self._books.section() as (member, index):
                self._note(keys, member)
                tickets = [self._count(member, index, key) for key in keys]
                for write in begun:
                    index.notes.add_writing(write.row, write.key, member.owner, beneath=False)
                dying = self._condemn_keys(member, index, keys, doubts)
            # the bytes are given back when the write ends
            self._release(dying, soon=True)
            return [write._replace(ticket=ticket) for write, ticket in zip(begun, tickets, strict=True)]

        return self._surely(keys, act, doubts) or begun

    def _started(self, key: str) -> Begun:
        # no number is drawn twice, so that a row is never taken for that of another write
        begun = Begun(key, secrets.randbits(62))
        self._books.writing.add(begun.row)
        return begun

    def _surely(
        self, keys: Sequence[str], act: Callable[[], T], doubts: Doubtful, ended: Sequence[Begun] = ()
    ) -> T | None:
        """Do something about some keys, and see to those of which a file may be left.

        Where that is done by hand, it is done again by the index later, which is told then which writes have ended.
        """
        self._note(keys)
        done = self._doubts.surely(
            keys,
            act,
            lambda: self._doubts.unlink_keys(keys),
            lambda: self.forget_now(keys, Doubtful(), ended),
        )
        self._see_to(doubts)
        return done

    def _note(self, keys: Sequence[str], member: Membership | None = None) -> None:
        """Say that the namespaces of some keys are being written: the power may go before the entries are gone.

        Where that cannot be said, what is cached is right for as long as the machine runs.
        """
        for namespace in set(map(namespace_of, keys)):
            try:
                (self._books if member is None else member).note_written(namespace)
            except Exception as error:
                self._doubts.tell(error)

    def _release(self, dying: list[Dying], *, soon: bool = False) -> None:
        """Unlink what is out of sight; what cannot be settled now is settled later, and fails no write."""
        try:
            self._space.release(dying, soon=soon)
        except Exception as error:
            self._doubts.tell(error)

    def _see_to(self, doubts: Doubtful) -> None:
        """Serve nothing of the keys of which a file may be left."""
        self._doubts.suspect(doubts.missing)
        if left := list(doubts.left):
            if doubts.error is not None:
                self._doubts.tell(doubts.error)
            self._doubts.pend(left, lambda: self.forget_now(left, Doubtful()))

    def forget_now(self, keys: Sequence[str], doubts: Doubtful, ended: Sequence[Begun] = ()) -> bool:
        """Forget keys, where trouble is the caller's; whether all their files are seen to be gone."""
        for batch in _batches(keys):
            with self._books.section() as (member, index):
                for key in batch:
                    self._count(member, index, key)
                index.notes.drop_writings(write.row for write in ended)
                dying = self._condemn_keys(member, index, batch, doubts)
            self._release(dying)
        return not doubts.left

    def adopt(self, names: Sequence[str]) -> None:
        """See to what other processes have left: serve nothing of it until its files are seen to be gone."""
        self._doubts.adopt(names, self._again)

    def make_up_for_return(self) -> None:
        """Forget what was written while the directory that is there now was away."""
        names = self._doubts.has_returned()
        if names and not self._again(names):
            self._doubts.pend(names, lambda: self._again(names))
        self._doubts.forget_returned()

    def _again(self, names: Sequence[str]) -> bool:
        doubts = Doubtful()
        self.forget_now([name for name in names if not name.endswith("/")], doubts)
        for name in names:
            if name.endswith("/"):
                self._drop_now(name.rstrip("/"), doubts)
        return not doubts.left

    def end(self, writes: Sequence[Begun], values: Sequence[Data | None]) -> None:
        """After the source was written: forget what was filled meanwhile, and store the new values."""
        tickets = [ticket for batch in _batches(writes) for ticket in self._end(batch)]
        for write, ticket, value in zip(writes, tickets, values, strict=True):
            if value is not None and ticket is not None:
                self._publisher.publish(Entry(write.key), value, ticket)

    def _end(self, writes: Sequence[Begun]) -> list[Ticket | None]:
        keys = [write.key for write in writes]
        doubts = Doubtful()

        def act() -> list[Ticket | None]:
            tickets: list[Ticket | None] = []
            with self._books.section() as (member, index):
                for write in writes:
                    # a write whose beginning could not be told may have met others that nobody knows of
                    alone = write.ticket is not None and write.ticket == current_ticket(member, write.key)
                    ticket = self._count(member, index, write.key)
                    tickets.append(ticket if alone else None)
                index.notes.drop_writings(write.row for write in writes)
                dying = self._condemn_keys(member, index, keys, doubts)
            self._release(dying)
            return tickets

        try:
            return self._surely(keys, act, doubts, writes) or [None] * len(writes)
        finally:
            # a row that is left is nobody's from here on: the next recovery forgets its key
            self._books.writing.difference_update(write.row for write in writes)

    def forget(self, key: str, since: Ticket | None) -> Ticket | None:
        """Forget a key whose value turned out to be another; a ticket to store that, None if it was written since."""
        doubts = Doubtful()

        def act() -> Ticket | None:
            with self._books.section() as (member, index):
                alone = since is not None and since == current_ticket(member, key)
                ticket = self._count(member, index, key)
                dying = self._condemn_keys(member, index, [key], doubts)
            self._release(dying)
            return ticket if alone else None

        return self._surely([key], act, doubts)

    def remove(self, key: str) -> None:
        """Remove a key that has no source, and that may have been written as well as not.

        Raises
        ------
        OSError
            It may still be there.
        """
        doubts = Doubtful()
        self._note([key])
        self._doubts.strictly(lambda: self.forget_now([key], doubts), lambda: self._doubts.unlink_keys([key]))
        if doubts.error is not None:
            raise doubts.error

    def remove_beneath(self, prefix: str) -> None:
        """As `remove`, of everything beneath a prefix."""
        doubts = Doubtful()
        self._note([f"{prefix}/"] if prefix else [""])
        self._doubts.strictly(lambda: self._drop_now(prefix, doubts), lambda: self._doubts.unlink_beneath(prefix))
        if doubts.error is not None:
            raise doubts.error

    @staticmethod
    def _count(member: Membership, index: Index, key: str) -> Ticket:
        """Count a write; returns what the counters say now."""
        member.writes.bump(write_slot(key))
        index.notes.drop_absent([key])
        return current_ticket(member, key)

    def _condemn_keys(
        self, member: Membership, index: Index, keys: Sequence[str], doubts: Doubtful, others: Sequence[Row] = ()
    ) -> list[Dying]:
        """Take keys, and other entries, out of the index and out of sight; within a section, which is committed."""
        rows = [*(row for key in keys for row in index.of_key(key)), *others]
        dying = self._space.condemn(member, index, rows, doubts)
        for key in keys:
            if key not in doubts.left:
                self._space.clear_paths(index, key, doubts)
        return dying

    # -- everything beneath a prefix

    def begin_drop(self, prefix: str, *, itself: bool = False) -> Drop:
        """Before all beneath a prefix is deleted at the source: forget it, and say that it is being written.

        Parameters
        ----------
        prefix : str
        itself : bool
            Whether the prefix is a key as well, which is deleted with what is beneath it.
        """
        drop = Drop(self._started(prefix), self._started(prefix) if itself else None)
        self._surely_drop(prefix, drop, begins=True)
        return drop

    def end_drop(self, drop: Drop) -> None:
        """After it was deleted at the source."""
        try:
            self._surely_drop(drop.beneath.key, drop)
        finally:
            self._books.writing.difference_update(write.row for write in drop.writes)

    def _surely_drop(self, prefix: str, drop: Drop | None = None, *, begins: bool = False) -> None:
        self._note([f"{prefix}/"] if prefix else [""])
        keys = [] if drop is None else drop.keys
        ended = None if begins else drop

        def act() -> None:
            doubts = Doubtful()
            self._drop_now(prefix, doubts, keys=keys, begun=drop if begins else None, ended=ended)
            self._see_to(doubts)

        def by_hand() -> None:
            if keys:
                self._doubts.unlink_keys(keys)
            self._doubts.unlink_beneath(prefix)

        def again() -> bool:
            return self._drop_now(prefix, Doubtful(), keys=keys, ended=ended)

        self._doubts.surely([beneath(prefix), *keys], act, by_hand, again)

    def drop(self, prefix: str) -> None:
        """Forget all entries whose key begins with ``prefix + "/"``, and the arrays there."""
        self._surely_drop(prefix)

    def drop_now(self, prefix: str, *, counted: bool = False) -> None:
        """As `drop`, where trouble is the caller's; `counted` if the counter of writes was raised already."""
        doubts = Doubtful()
        self._drop_now(prefix, doubts, counted=counted)
        self._see_to(doubts)

    def _drop_now(
        self,
        prefix: str,
        doubts: Doubtful,
        *,
        counted: bool = False,
        keys: Sequence[str] = (),
        begun: Drop | None = None,
        ended: Drop | None = None,
    ) -> bool:
        """As `drop_now`, of some keys as well; whether all files are seen to be gone."""
        with self._books.section() as (member, index):
            if begun is not None:
                self._note([f"{prefix}/"], member)
                for write in begun.writes:
                    index.notes.add_writing(write.row, write.key, member.owner, beneath=write is begun.beneath)
            for key in keys:
                self._count(member, index, key)
            if not counted:
                member.writes.bump(prefix_slot(prefix))
            index.notes.drop_nodes(prefix, documents=not counted)
            index.notes.drop_absent_beneath(prefix)
            tombstones = {item.entry.key for item in index.left_dying() if _is_beneath(item.entry.key, prefix)}
            rows = index.beneath(prefix, _BATCH)
            is_last = len(rows) < _BATCH
            if ended is not None and is_last:
                index.notes.drop_writings(write.row for write in ended.writes)
            dying = self._condemn_keys(member, index, keys, doubts, rows)
        self._release(dying, soon=begun is not None)
        while not is_last:
            with self._books.section() as (member, index):
                rows = index.beneath(prefix, _BATCH)
                is_last = len(rows) < _BATCH
                if ended is not None and is_last:
                    index.notes.drop_writings(write.row for write in ended.writes)
                dying = self._space.condemn(member, index, rows, doubts)
            self._release(dying, soon=begun is not None)
        self._drop_orphans(prefix, tombstones, doubts)
        return not doubts.left

    def _drop_orphans(self, prefix: str, tombstones: set[str], doubts: Doubtful) -> None:
        """Drop files of ours beneath a prefix that have no row: what an earlier failure, or a crash, has left."""
        keys = set(tombstones)
        try:
            if not prefix or is_plain(prefix):
                for path in files.walk(files.inside(self._books.root, f"{prefix}/").rstrip("/")):
                    keys.add(os.path.relpath(path, self._books.root).replace(os.sep, "/"))
        except OSError as error:
            doubts.note(beneath(prefix), error)
        for batch in _batches(sorted(keys - doubts.left)):
            with self._books.section() as (_, index):
                for key in batch:
                    # what has a row by now was stored after the drop
                    if not index.knows(key):
                        self._space.clear_paths(index, key, doubts)


def _is_beneath(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
