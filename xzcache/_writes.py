"""Keeping the cache true when its source is written: through us, or behind our back as its metadata shows."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final, TypeVar

from xzcache import _documents as documents
from xzcache import _files as files
from xzcache._errors import CacheFault
from xzcache._keys import META, Entry, namespace_of, range_directory, relative_path
from xzcache._publisher import Ticket, current_ticket, namespace_slot, slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from xzcache._index import Index
    from xzcache._keeper import Keeper
    from xzcache._membership import Membership
    from xzcache._publisher import Publisher
    from xzcache._reader import Reader
    from xzcache._schema import Dying
    from xzcache._space import Space

_BATCH: Final = 128

T = TypeVar("T")


class Writes:
    """Makes what is no longer true invisible to every process.

    A write has two ends. `begin` makes the old value invisible before the source changes, so that a process that dies
    in between leaves nothing false; `end` does so again, for what was filled meanwhile, and stores the new value if
    nobody else was writing the key. Each end counts the write, so that no fill that began before it publishes after it.

    Notes
    -----
    Where the index cannot be used, files are unlinked by their paths; where even that fails, this process reads
    nothing more of that source from the cache.
    """

    def __init__(self, keeper: Keeper, space: Space, publisher: Publisher, reader: Reader) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._space = space
        self._publisher = publisher
        self._reader = reader

    # -- one key

    def begin(self, key: str, since: Ticket | None = None) -> Ticket | None:
        """Before the source is written: forget the key, and take note of the writes so far.

        None where that could not be done properly, or where somebody wrote the key after the ticket `since` was taken.
        """
        return self._surely(key, lambda: self._forget(key, since), lambda: self._unlink_key(key))

    def end(self, key: str, begun: Ticket | None, value: files.Data | None = None) -> None:
        """After the source was written: forget what was filled meanwhile, and store the new value."""
        ticket = self._surely(key, lambda: self._forget(key, begun), lambda: self._unlink_key(key))
        if value is not None and ticket is not None:
            self._publisher.publish(Entry(key), value, ticket)

    def _forget(self, key: str, begun: Ticket | None = None) -> Ticket | None:
        """Count a write and remove the key; the ticket to publish with, None where others write at the same time."""
        with self._books.section() as (member, index):
            undisturbed = begun is None or begun == current_ticket(member, key)
            member.writes.bump(slot(key))
            index.drop_absent(key)
            ticket = current_ticket(member, key)
            dying = self._space.condemn(member, index, index.of_key(key))
        self._space.release(dying)
        return ticket if undisturbed else None

    # -- everything beneath a prefix

    def drop(self, prefix: str) -> None:
        """Forget all entries whose key begins with ``prefix + "/"``, and the arrays there.

        Called before and after the source deletes them.
        """
        self._surely(f"{prefix}/", lambda: self._drop(prefix), lambda: self._unlink_beneath(prefix))

    def _drop(self, prefix: str, *, counted: bool = False) -> None:
        with self._books.section() as (member, index):
            if not counted:
                member.writes.bump(namespace_slot(f"{prefix}/"))
            index.drop_nodes(prefix)
            index.drop_absent_beneath(prefix)
            dying = self._condemn_batch(member, index, prefix)
        self._release_all(prefix, dying)

    def _condemn_batch(self, member: Membership, index: Index, prefix: str) -> list[Dying]:
        return self._space.condemn(member, index, index.beneath(prefix, _BATCH))

    def _release_all(self, prefix: str, dying: list[Dying]) -> None:
        self._space.release(dying)
        while len(dying) == _BATCH:
            with self._books.section() as (member, index):
                dying = self._condemn_batch(member, index, prefix)
            self._space.release(dying)

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
            self._reader.distrusted.difference_update(affected)
            return valid

        # other processes find out for themselves, so nothing is unlinked for this one's sake
        return self._surely(f"{namespace}/{key}", act, lambda: self._reader.distrusted.update(affected))

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

    def _surely(self, key: str, action: Callable[[], T], by_hand: Callable[[], None]) -> T | None:
        """Do something that must not be left undone."""
        done, failed = [], object()

        def act() -> object:
            done.append(action())
            return None

        if self._keeper.attempt(act, failed) is not failed:
            return done[-1]
        if self._reader.distrusts_all:
            # the directory is not of our making: nothing in it is read, and nothing touched
            return None
        try:
            by_hand()
        except (CacheFault, OSError) as error:
            self._keeper.trouble(error)
            self._reader.distrusted.add(namespace_of(key))
        return None

    def _bump_by_hand(self, key: str, of: Callable[[str], int]) -> None:
        # not under the guard: two bumps may become one, which is still a change
        if (member := self._books.current) is not None:
            member.writes.bump(of(key))

    def _unlink_key(self, key: str) -> None:
        self._bump_by_hand(key, slot)
        for odd in (False, True):
            files.discard_ours(f"{self._books.root}/{relative_path(Entry(key), odd=odd)}")
        _remove_tree(f"{self._books.root}/{range_directory(key)}")

    def _unlink_beneath(self, prefix: str) -> None:
        self._bump_by_hand(f"{prefix}/", namespace_slot)
        for path in files.walk(f"{self._books.root}/{prefix}"):
            files.discard_ours(path)
        for place in ("odd", "ranges"):
            for path in files.walk(f"{self._books.root}/{META}/{place}"):
                stamp = files.read_stamp(path)
                if stamp is None or stamp.key.startswith(f"{prefix}/"):
                    files.discard(path)


def _remove_tree(directory: str) -> None:
    if os.path.isdir(directory):
        shutil.rmtree(directory)


def _join(namespace: str, path: str) -> str:
    return f"{namespace}/{path}" if path else namespace
