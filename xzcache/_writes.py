"""Keeping the cache true when its source is written: through us, or behind our back as its metadata shows."""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from xzcache import _documents as documents
from xzcache import _files as files
from xzcache._keys import META, Entry, namespace_of, namespace_slot, range_directory, relative_path, write_slot
from xzcache._publisher import Ticket, current_ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from xzcache._index import Index
    from xzcache._keeper import Keeper
    from xzcache._membership import Membership
    from xzcache._publisher import Publisher
    from xzcache._reader import Reader
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

    def __init__(self, keeper: Keeper, space: Space, publisher: Publisher, reader: Reader) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._space = space
        self._publisher = publisher
        self._reader = reader
        self._owed: list[tuple[set[str], Callable[[], object]]] = []

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
                    row = index.add_writing(key, member.owner, beneath=False)
                    begun.append(Begun(key, ticket, row, member.owner))
                dying = self._condemn_keys(member, index, keys)
            self._space.release(dying)
            return begun

        return self._surely(keys, act, lambda: self._unlink_keys(keys)) or [Begun(key) for key in keys]

    def end(self, writes: Sequence[Begun], values: Sequence[files.Data | None]) -> None:
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
                    index.drop_writing(write.row, write.owner)
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
        index.drop_absent(key)
        return current_ticket(member, key)

    def _condemn_keys(self, member: Membership, index: Index, keys: Sequence[str]) -> list[Dying]:
        return self._space.condemn(member, index, [row for key in keys for row in index.of_key(key)])

    # -- everything beneath a prefix

    def begin_drop(self, prefix: str) -> Begun:
        """Before everything beneath a prefix is deleted at the source: forget it, and say that it is being written."""

        def act() -> Begun:
            with self._books.section() as (member, index):
                row = index.add_writing(prefix, member.owner, beneath=True)
                begun = Begun(prefix, None, row, member.owner)
            self._drop(prefix)
            return begun

        return self._surely([f"{prefix}/"], act, lambda: self._unlink_beneath(prefix)) or Begun(prefix)

    def end_drop(self, begun: Begun) -> None:
        """After everything beneath a prefix was deleted at the source."""

        def act() -> None:
            self._drop(begun.key)
            with self._books.section() as (_, index):
                index.drop_writing(begun.row, begun.owner)

        self._surely([f"{begun.key}/"], act, lambda: self._unlink_beneath(begun.key))

    def drop(self, prefix: str) -> None:
        """Forget all entries whose key begins with ``prefix + "/"``, and the arrays there."""
        self._surely([f"{prefix}/"], lambda: self._drop(prefix), lambda: self._unlink_beneath(prefix))

    def _drop(self, prefix: str, *, counted: bool = False) -> None:
        with self._books.section() as (member, index):
            if not counted:
                member.writes.bump(namespace_slot(f"{prefix}/"))
            index.drop_nodes(prefix)
            index.drop_absent_beneath(prefix)
        while True:
            with self._books.section() as (member, index):
                dying = self._space.condemn(member, index, index.beneath(prefix, _BATCH))
            self._space.release(dying)
            if not dying:
                return

    # -- metadata documents

    def compare(self, namespace: str, key: str, document: bytes | None, ticket: Ticket | None) -> Ticket | None:
        """Drop what is beneath every array that a document of the source shows to have changed.

        Parameters
        ----------
        namespace : str
        key : str
            The document's key in its source.
        document : bytes or None
            As the source has it now; None where it has none.
        ticket : Ticket or None
            From before the document was fetched.

        Returns
        -------
        Ticket or None
            What to publish the document with; None if it was written meanwhile.
        """
        described = documents.describe(key, document)
        affected = {_join(namespace, path) for path in described.arrays or (key.rpartition("/")[0],)}

        def act() -> Ticket | None:
            changed, valid = self._changed(namespace, key, described, ticket, absent=document is None)
            for path in changed:
                self._drop_array(namespace, path, described.arrays.get(path))
            return valid

        # other processes find out for themselves, so nothing is unlinked for this one's sake
        return self._surely(affected, act, None)

    def is_absent(self, namespace: str, key: str) -> bool:
        """Whether the source is known not to have a document, of a node that it does have.

        A node of which nothing is cached may have been made since.
        """
        return self._keeper.attempt(lambda: self._is_absent(namespace, key), False)

    def _is_absent(self, namespace: str, key: str) -> bool:
        with self._books.section() as (_, index):
            return index.is_absent(f"{namespace}/{key}") and any(
                index.find(Entry(f"{namespace}/{sibling}")) for sibling in documents.siblings(key)
            )

    def note(self, namespace: str, key: str, document: bytes) -> None:
        """Remember the arrays of a document that was written through the cache: what is beneath them is still true."""
        described = documents.describe(key, document)
        if described.arrays:
            self._keeper.attempt(lambda: self._set_nodes(namespace, described.arrays), None)

    def _set_nodes(self, namespace: str, arrays: dict[str, bytes]) -> None:
        with self._books.section() as (_, index):
            for path, digest in arrays.items():
                index.set_node(_join(namespace, path), digest)

    def _changed(
        self, namespace: str, key: str, described: documents.Description, ticket: Ticket | None, *, absent: bool
    ) -> tuple[list[str], Ticket | None]:
        """Paths of the arrays that are not as they were, and a ticket that their drop leaves valid.

        Arrays that nothing is cached of are noted right away.
        """

        def beneath(path: str) -> list[str]:
            return [node.partition("/")[2] for node in index.nodes_beneath(_join(namespace, path))]

        full = f"{namespace}/{key}"
        with self._books.section() as (member, index):
            changed = []
            for path in documents.changed_arrays(
                key, described, lambda path: index.node(_join(namespace, path)), beneath
            ):
                node = _join(namespace, path)
                if index.node(node) is None and not index.has_data_beneath(node):
                    index.set_node(node, described.arrays[path])
                else:
                    changed.append(path)
            valid = ticket is not None and ticket == current_ticket(member, full)
            if valid and absent:
                index.set_absent(full)
            elif not absent:
                index.drop_absent(full)
            if changed:
                member.writes.bump(namespace_slot(full))
            return changed, current_ticket(member, full) if valid else None

    def _drop_array(self, namespace: str, path: str, digest: bytes | None) -> None:
        # the drop was counted when the change was found
        self._drop(_join(namespace, path), counted=True)
        if digest is not None:
            self._set_nodes(namespace, {path: digest})

    # -- when the index is of no use

    def _surely(self, about: Collection[str], action: Callable[[], T], by_hand: Callable[[], None] | None) -> T | None:
        """Do something that must not be left undone: by the index, else by hand, else later and in doubt until then.

        Parameters
        ----------
        about : collection of str
            The keys, or the paths of nodes, that are in doubt if it fails.
        action, by_hand : callable
            What to do, and how without the index.
        """
        done: list[T] = []
        if self._keeper.attempt(lambda: _into(done, action), False):
            self.make_up()
            return done[-1]
        if self._reader.distrusts_all:
            # the directory is not of our making: nothing in it is read, and nothing touched
            return None
        try:
            if by_hand is not None:
                by_hand()
                return None
        except Exception as error:
            self._keeper.trouble(error)
        doubts = set(about) if by_hand is None else {namespace_of(key) for key in about}
        self._reader.distrusted.update(doubts)
        self._owed.append((doubts, action))
        return None

    @property
    def owes(self) -> bool:
        """Whether something is in doubt that could be made up for."""
        return bool(self._owed)

    def make_up(self) -> None:
        """Do what could not be done before."""
        owed, self._owed = self._owed, []
        for number, (doubts, action) in enumerate(owed):
            if not self._keeper.attempt(partial(_into, [], action), False):
                self._owed += owed[number:]
                return
            self._reader.distrusted.difference_update(doubts)

    def _bump_by_hand(self, number: int) -> None:
        # not under the guard: two bumps may become one, which is still a change
        if (member := self._books.current) is not None:
            member.writes.bump(number)

    def _unlink_keys(self, keys: Sequence[str]) -> None:
        for key in keys:
            # counted first: whoever publishes meanwhile looks at the counters after he has given a file its name
            self._bump_by_hand(write_slot(key))
            for odd in (False, True):
                files.discard_ours(f"{self._books.root}/{relative_path(Entry(key), odd=odd)}")
            ranges = f"{self._books.root}/{range_directory(key)}"
            if os.path.isdir(ranges):
                shutil.rmtree(ranges)

    def _unlink_beneath(self, prefix: str) -> None:
        self._bump_by_hand(namespace_slot(f"{prefix}/"))
        for path in files.walk(f"{self._books.root}/{prefix}"):
            files.discard_ours(path)
        for place in ("odd", "ranges"):
            for path in files.walk(f"{self._books.root}/{META}/{place}"):
                stamp = files.read_stamp(path)
                if stamp is None or stamp.key.startswith(f"{prefix}/"):
                    files.discard(path)


def _into(results: list[T], action: Callable[[], T]) -> bool:
    results.append(action())
    return True


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


def _join(namespace: str, path: str) -> str:
    return f"{namespace}/{path}" if path else namespace
