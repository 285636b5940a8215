"""Keeping the cache true when its source is written behind its back: as far as metadata documents show it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from xzcache._config import is_fresh
from xzcache.directory._fetchlocks import Ticket, current_ticket
from xzcache.files import beneath
from xzcache.index import data_slot, prefix_slot
from xzcache.model import Entry, metadata

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from xzcache._config import Age
    from xzcache.directory._faults import Keeper
    from xzcache.directory._invalidation import Doubts, Writes


_NEVER: Final = b"never"


class Arrays:
    """What is known of the arrays of sources: under which documents their entries were filled.

    Parameters
    ----------
    keeper : Keeper
    writes : Writes
    doubts : Doubts
    """

    def __init__(self, keeper: Keeper, writes: Writes, doubts: Doubts) -> None:
        self._keeper = keeper
        self._books = keeper.books
        self._writes = writes
        self._doubts = doubts
        self._settled: dict[tuple[str, str, bytes], bytes | None] = {}

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
        described = metadata.describe(key, document)

        def act() -> Ticket | None:
            return self._compare(namespace, key, document, ticket, described)

        # other processes find out for themselves, so nothing is unlinked for this one's sake
        return self._doubts.surely(_affected(namespace, key, described), act, None, lambda: (act(), True)[1])

    def compare_later(self, namespace: str, key: str, document: bytes | None) -> None:
        """As `compare`, when the disk is well again; until then nothing is served of what the document describes."""
        described = metadata.describe(key, document)
        self._doubts.pend_latest(
            f"{namespace}/{key}",
            _affected(namespace, key, described),
            lambda: (self._compare(namespace, key, document, None, described), True)[1],
        )

    def _compare(
        self, namespace: str, key: str, document: bytes | None, ticket: Ticket | None, described: metadata.Description
    ) -> Ticket | None:
        changed, valid = self._changed(namespace, key, document, ticket, described)
        for path in changed:
            self._drop_array(namespace, path, described)
        self._set_seen(f"{namespace}/{key}", metadata.state_of(document))
        return valid

    def is_absent(self, namespace: str, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a document, of a node that it does have.

        A node of which nothing is cached may have been made since.
        """
        return self._keeper.attempt(lambda: self._is_absent(namespace, key, max_age), False)

    def _is_absent(self, namespace: str, key: str, max_age: Age) -> bool:
        full = f"{namespace}/{key}"
        with self._books.section() as (member, index):
            noted = index.notes.absent_since(full, current_ticket(member, full).digest())
            return (noted is not None and is_fresh(noted, max_age)) and any(
                index.find(Entry(f"{namespace}/{sibling}")) for sibling in metadata.siblings(key)
            )

    def note(self, namespace: str, key: str, document: bytes) -> None:
        """Remember the arrays of a document that was written through the cache: what is beneath them is still true."""
        described = metadata.describe(key, document)
        if told := described.arrays | described.attributes:
            self._keeper.attempt(lambda: self._set_nodes(namespace, told), None)
            state = metadata.state_of(document)
            self._keeper.attempt(lambda: self._set_seen(f"{namespace}/{key}", state), None)

    def doubtful(self, namespace: str, seen: Mapping[str, bytes]) -> list[str]:
        """Documents whose state, as somebody elsewhere has seen it, may not be the one that entries here are of.

        Where nothing is cached that a document describes, its state is noted, and nothing is in doubt.

        Parameters
        ----------
        namespace : str
        seen : mapping of str to bytes
            The beginnings of states; empty where somebody had no room to tell.
        """
        # where nobody can tell, all of them
        return self._keeper.attempt(lambda: self._doubtful(namespace, seen), list(seen))

    def _doubtful(self, namespace: str, seen: Mapping[str, bytes]) -> list[str]:
        doubtful = []
        with self._books.section() as (member, index):
            for key, state in seen.items():
                full = f"{namespace}/{key}"
                known = index.notes.seen(full)
                if known is None and not index.has_data_beneath(full.rpartition("/")[0]):
                    if state:
                        index.notes.set_seen(full, state)
                        member.writes.bump(data_slot(full.rpartition("/")[0]))
                elif not (state and known is not None and known.startswith(state[: len(known)])):
                    settled = self._settled.get((namespace, key, state), _NEVER)
                    if settled != known:
                        doubtful.append(key)
        return doubtful

    def settled(self, namespace: str, seen: Mapping[str, bytes], asked: Collection[str]) -> None:
        """Remember, in this process, of which documents the source was asked in doubt, until they change here."""
        if asked:
            self._keeper.attempt(lambda: self._remember(namespace, {key: seen[key] for key in asked}), None)

    def _remember(self, namespace: str, seen: Mapping[str, bytes]) -> None:
        with self._books.section() as (_, index):
            for key, state in seen.items():
                self._settled[namespace, key, state] = index.notes.seen(f"{namespace}/{key}")

    def _set_seen(self, document: str, state: bytes) -> None:
        with self._books.section() as (_, index):
            index.notes.set_seen(document, state)

    def _set_nodes(self, namespace: str, arrays: dict[str, bytes]) -> None:
        with self._books.section() as (_, index):
            for path, digest in arrays.items():
                index.notes.set_node(_join(namespace, path), digest)

    def _changed(
        self, namespace: str, key: str, document: bytes | None, ticket: Ticket | None, described: metadata.Description
    ) -> tuple[list[str], Ticket | None]:
        """Paths of the arrays that are not as they were, and a ticket that their drop leaves valid.

        Arrays that nothing is cached of are noted right away.
        """

        def nodes(path: str) -> list[str]:
            return [node.partition("/")[2] for node in index.notes.nodes_beneath(_join(namespace, path))]

        full, absent = f"{namespace}/{key}", document is None
        with self._books.section() as (member, index):
            changed, noted = [], []
            seen = index.notes.seen(full)
            before = seen or (b"cached" if index.find(Entry(full)) is not None else None)
            # what a copy of a store told of a state is its beginning
            gone = absent and before is not None and not metadata.state_of(None).startswith(before)
            # what there is was filled under this very document, by copies of a store that had seen it
            agreed = bool(seen) and metadata.state_of(document).startswith(seen or b"")
            for path in metadata.changed_arrays(
                key, described, lambda path: index.notes.node(_join(namespace, path)), nodes, gone=gone
            ):
                node = _join(namespace, path)
                unknown = index.notes.node(node) is None and path in described.arrays
                if unknown and (agreed or not index.has_data_beneath(node)):
                    index.notes.set_node(node, described.arrays[path])
                    if not agreed:
                        # what is being fetched may be of an older state
                        noted.append(path)
                else:
                    changed.append(path)
            valid = ticket is not None and ticket == current_ticket(member, full)
            if not absent:
                index.notes.drop_absent([full])
            for attributes, digest in described.attributes.items():
                index.notes.set_node(_join(namespace, attributes), digest)
            for path in changed:
                member.writes.bump(prefix_slot(_join(namespace, path)))
            for path in noted:
                member.writes.bump(data_slot(_join(namespace, path)))
            now = current_ticket(member, full)
            if valid and absent:
                index.notes.set_absent(full, time.time(), now.digest())
            return changed, now if valid else None

    def _drop_array(self, namespace: str, path: str, described: metadata.Description) -> None:
        known = self._known(namespace, path)
        # the drop was counted when the change was found
        self._writes.drop_now(_join(namespace, path), counted=True)
        told = {node: digest for node, digest in described.arrays.items() if node == path}
        told |= {node: digest for node, digest in described.attributes.items() if node.rpartition("/")[0] == path}
        if told:
            # one document tells of the array, another of its attributes: what this one does not tell is as it was
            self._set_nodes(namespace, known | told)

    def _known(self, namespace: str, path: str) -> dict[str, bytes]:
        with self._books.section() as (_, index):
            nodes = {node: index.notes.node(_join(namespace, node)) for node in metadata.of_array(path)}
        return {node: digest for node, digest in nodes.items() if digest is not None}


def _affected(namespace: str, key: str, described: metadata.Description) -> set[str]:
    """What a document may show to have changed."""
    return {beneath(_join(namespace, path)) for path in described.arrays or (key.rpartition("/")[0],)}


def _join(namespace: str, path: str) -> str:
    return f"{namespace}/{path}" if path else namespace
