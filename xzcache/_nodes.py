"""What a cache whose books are kept in one process knows of the arrays of its source."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from xzcache import _documents as documents
from xzcache._config import is_fresh
from xzcache._keys import Entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xzcache._config import Age
    from xzcache._ledger import Ledger, Ticket

_REMEMBERED: Final = 65536


class Nodes:
    """The documents under which entries were filled, and those that the source does not have.

    Parameters
    ----------
    ledger : Ledger
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._digests: dict[str, bytes] = {}
        self._absent: dict[str, float] = {}
        self._lacked: dict[str, tuple[float, Ticket]] = {}

    async def compare(
        self, key: str, document: bytes | None, ticket: Ticket | None, drop: Callable[[str], Awaitable[None]]
    ) -> Ticket | None:
        """Drop what a metadata document of the source shows to have changed; the ticket to publish it with."""

        def known_beneath(path: str) -> list[str]:
            return [node for node in self._digests if node.startswith(f"{path}/" if path else "")]

        expected = ticket
        described = documents.describe(key, document)
        gone = document is None and Entry(key) in self._ledger
        for path in documents.changed_arrays(key, described, self._digests.get, known_beneath, gone=gone):
            # what an earlier process left in the store is not in these books
            # our own drop is not somebody else's write
            expected = None if expected is None else (expected[0], expected[1] + 1)
            names = documents.of_array(path)
            kept = {node: self._digests[node] for node in names if node in self._digests}
            await drop(path)
            if any(node in described.arrays | described.attributes for node in names):
                # one document tells of the array, another of its attributes
                self._digests.update(kept)
        if expected is None or expected != self._ledger.ticket(key):
            return None
        self._digests.update(described.arrays | described.attributes)
        if document is None:
            self._absent[key] = time.time()
        return expected

    def is_absent(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a document of a node that it has."""
        noted = self._absent.get(key)
        return (
            noted is not None
            and is_fresh(noted, max_age)
            and any(Entry(sibling) in self._ledger for sibling in documents.siblings(key))
        )

    def lacks(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a chunk."""
        at, ticket = self._lacked.get(key, (0.0, None))
        return ticket == self._ledger.ticket(key) and is_fresh(at, max_age)

    def note_lack(self, key: str, ticket: Ticket) -> None:
        """Remember that the source does not have a chunk, until it is written."""
        if len(self._lacked) >= _REMEMBERED:
            self._lacked.clear()
        self._lacked[key] = time.time(), ticket

    def note(self, key: str, document: bytes) -> None:
        """Remember the arrays of a document that was written through the cache."""
        described = documents.describe(key, document)
        self._digests.update(described.arrays | described.attributes)

    def forget_absence(self, key: str) -> None:
        self._absent.pop(key, None)

    def forget(self, prefix: str) -> None:
        """Forget what is at a path and beneath it; everything for an empty one."""
        for node in [n for n in self._digests if not prefix or n == prefix or n.startswith(f"{prefix}/")]:
            del self._digests[node]
        self._absent = {k: at for k, at in self._absent.items() if prefix and not k.startswith(f"{prefix}/")}
