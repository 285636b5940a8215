"""Detect changes that another program made at the source, as far as metadata documents show them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from xzcache._config import is_fresh
from xzcache.directory._fetchlocks import WriteVersion, current_version
from xzcache.files import beneath
from xzcache.index import data_counter
from xzcache.model import Entry, metadata

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from xzcache._config import Age
    from xzcache.directory._faults import FaultBarrier
    from xzcache.directory._invalidation import Writes
    from xzcache.directory._pending import PendingInvalidations


# differs from each recorded state, and from None, which stands for no state
_NEVER: Final = b"never"


class MetadataTracker:
    """The metadata fingerprints of the arrays under which entries were cached."""

    def __init__(self, barrier: FaultBarrier, writes: Writes, pending: PendingInvalidations) -> None:
        self._barrier = barrier
        self._session = barrier.session
        self._writes = writes
        self._pending = pending
        # with the state in the index at that time: once another process records a
        # different one, the confirmation is void
        self._confirmed: dict[tuple[str, str, bytes], bytes | None] = {}

    def apply_document(
        self, namespace: str, key: str, document: bytes | None, version: WriteVersion | None
    ) -> WriteVersion | None:
        """Invalidate the arrays that a metadata document shows to have changed.

        `document` is None if the source has none. `version` was read before the document was fetched. Returns the
        version to publish the document with, or None if it was written meanwhile.
        """
        described = metadata.describe(key, document)

        def act() -> WriteVersion | None:
            return self._apply_document(namespace, key, document, version, described)

        # other processes detect the change themselves, so nothing is unlinked without the index
        return self._pending.must_invalidate(_affected(namespace, key, described), act, None, lambda: (act(), True)[1])

    def apply_document_later(self, namespace: str, key: str, document: bytes | None) -> None:
        """Apply a document once the disk is healthy; until then, serve nothing of the arrays that it describes."""
        described = metadata.describe(key, document)
        self._pending.defer_latest(
            f"{namespace}/{key}",
            _affected(namespace, key, described),
            lambda: (self._apply_document(namespace, key, document, None, described), True)[1],
        )

    def _apply_document(
        self,
        namespace: str,
        key: str,
        document: bytes | None,
        version: WriteVersion | None,
        described: metadata.Description,
    ) -> WriteVersion | None:
        changed, valid = self._changed(namespace, key, document, version, described)
        for path in changed:
            self._drop_array(namespace, path, described)
        self._set_seen(f"{namespace}/{key}", metadata.fingerprint(document))
        return valid

    def is_document_missing(self, namespace: str, key: str, max_age: Age) -> bool:
        """Whether a document is known to be missing from a node that has other documents.

        A node without cached documents may have been created since.
        """
        return self._barrier.try_or(lambda: self._is_document_missing(namespace, key, max_age), False)

    def _is_document_missing(self, namespace: str, key: str, max_age: Age) -> bool:
        full = f"{namespace}/{key}"
        with self._session.section() as (process, index):
            recorded = index.tables.absent_since(full, current_version(process, full).digest())
            return (recorded is not None and is_fresh(recorded, max_age)) and any(
                index.find(Entry(f"{namespace}/{sibling}")) for sibling in metadata.siblings(key)
            )

    def record_document(self, namespace: str, key: str, document: bytes) -> None:
        """Record the arrays of a document that was written through the cache; their entries stay valid."""
        described = metadata.describe(key, document)
        if digests := described.arrays | described.attributes:
            self._barrier.try_or(lambda: self._set_nodes(namespace, digests), None)
            state = metadata.fingerprint(document)
            self._barrier.try_or(lambda: self._set_seen(f"{namespace}/{key}", state), None)

    def unconfirmed(self, namespace: str, seen: Mapping[str, bytes]) -> list[str]:
        """Documents whose state elsewhere may differ from the state under which entries were cached here.

        If no entry depends on a document, its state is recorded. `seen` maps documents to the first bytes of their
        states; an empty value stands for an unknown state.
        """
        # if the index cannot be used, all documents are unconfirmed
        return self._barrier.try_or(lambda: self._unconfirmed(namespace, seen), list(seen))

    def _unconfirmed(self, namespace: str, seen: Mapping[str, bytes]) -> list[str]:
        unconfirmed = []
        with self._session.section() as (process, index):
            for key, state in seen.items():
                full = f"{namespace}/{key}"
                known = index.tables.seen(full)
                # nothing was cached under another state yet, so this one can be recorded without a request
                if known is None and not index.has_data_beneath(full.rpartition("/")[0]):
                    if state:
                        index.tables.set_seen(full, state)
                        # results of fetches under way may be of the state before this one
                        process.writes.increment(data_counter(full.rpartition("/")[0]))
                elif not (state and known is not None and known.startswith(state[: len(known)])):
                    # a copy of a store carries only the first bytes of a state, so only these are compared
                    confirmed = self._confirmed.get((namespace, key, state), _NEVER)
                    if confirmed != known:
                        unconfirmed.append(key)
        return unconfirmed

    def confirm(self, namespace: str, seen: Mapping[str, bytes], asked: Collection[str]) -> None:
        """Record, in this process, that unconfirmed documents were revalidated; valid until they change here."""
        if asked:
            self._barrier.try_or(lambda: self._remember(namespace, {key: seen[key] for key in asked}), None)

    def _remember(self, namespace: str, seen: Mapping[str, bytes]) -> None:
        with self._session.section() as (_, index):
            for key, state in seen.items():
                self._confirmed[namespace, key, state] = index.tables.seen(f"{namespace}/{key}")

    def _set_seen(self, document: str, state: bytes) -> None:
        with self._session.section() as (_, index):
            index.tables.set_seen(document, state)

    def _set_nodes(self, namespace: str, arrays: dict[str, bytes]) -> None:
        with self._session.section() as (_, index):
            for path, digest in arrays.items():
                index.tables.set_node(_join(namespace, path), digest)

    def _changed(
        self,
        namespace: str,
        key: str,
        document: bytes | None,
        version: WriteVersion | None,
        described: metadata.Description,
    ) -> tuple[list[str], WriteVersion | None]:
        """The paths of the changed arrays, and the version that stays valid after they are dropped.

        Arrays without cached entries are recorded at once.
        """

        def nodes(path: str) -> list[str]:
            return [node.partition("/")[2] for node in index.tables.nodes_beneath(_join(namespace, path))]

        full, absent = f"{namespace}/{key}", document is None
        with self._session.section() as (process, index):
            changed, recorded = [], []
            seen = index.tables.seen(full)
            # `b"cached"`, which no fingerprint begins with, stands for the unknown state of a cached document
            before = seen or (b"cached" if index.find(Entry(full)) is not None else None)
            # a state that a copy of a store recorded is only the first bytes
            gone = absent and before is not None and not metadata.fingerprint(None).startswith(before)
            # the entries were cached under this document, by copies of a store that had seen it
            agreed = bool(seen) and metadata.fingerprint(document).startswith(seen or b"")
            for path in metadata.changed_arrays(
                key, described, lambda path: index.tables.node(_join(namespace, path)), nodes, gone=gone
            ):
                node = _join(namespace, path)
                unknown = index.tables.node(node) is None and path in described.arrays
                if unknown and (agreed or not index.has_data_beneath(node)):
                    index.tables.set_node(node, described.arrays[path])
                    if not agreed:
                        # fetches under way may be of an older state
                        recorded.append(path)
                else:
                    changed.append(path)
            # read before the counters below are raised by this change itself
            valid = version is not None and version == current_version(process, full)
            if not absent:
                index.tables.drop_absent([full])
            for attributes, digest in described.attributes.items():
                index.tables.set_node(_join(namespace, attributes), digest)
            # counted here, in the section that found the change; the entries are deleted afterwards, in batches
            for path in changed:
                process.writes.increment_beneath(_join(namespace, path))
            for path in recorded:
                process.writes.increment(data_counter(_join(namespace, path)))
            now = current_version(process, full)
            # with the version after the change, so that the record stays valid until the next write
            if valid and absent:
                index.tables.set_absent(full, time.time(), now.digest())
            return changed, now if valid else None

    def _drop_array(self, namespace: str, path: str, described: metadata.Description) -> None:
        known = self._known(namespace, path)
        # the drop was counted when the change was found
        of_path = metadata.of_array(path)
        state = b"".join((described.arrays | described.attributes).get(node, b"") for node in of_path)
        self._writes.drop_now(_join(namespace, path), counted=True, state=state)
        digests = {node: digest for node, digest in described.arrays.items() if node == path}
        digests |= {node: digest for node, digest in described.attributes.items() if node.rpartition("/")[0] == path}
        if digests:
            # an array and its attributes have separate documents: keep the fingerprint that this one does not hold
            self._set_nodes(namespace, known | digests)

    def _known(self, namespace: str, path: str) -> dict[str, bytes]:
        with self._session.section() as (_, index):
            nodes = {node: index.tables.node(_join(namespace, node)) for node in metadata.of_array(path)}
        return {node: digest for node, digest in nodes.items() if digest is not None}


def _affected(namespace: str, key: str, described: metadata.Description) -> set[str]:
    """The names that a document may invalidate."""
    return {beneath(_join(namespace, path)) for path in described.arrays or (key.rpartition("/")[0],)}


def _join(namespace: str, path: str) -> str:
    return f"{namespace}/{path}" if path else namespace
