"""What is simple where no other process shares a cache: nobody to wait for, and notes that one table holds."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from xzcache._flights import Claims, Flights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from xzcache._config import Age
    from xzcache._keys import Entry
    from xzcache._nodes import Nodes
    from xzcache._spans import Span


class Alone:
    """The part of a backend that is about other processes, and about what the source does not have."""

    is_open = True
    _nodes: Nodes

    def __init__(self) -> None:
        self.flights: Flights[memoryview | None] = Flights()
        self.claims = Claims()
        self.evictions = self.troubles = 0
        # keys that are being written, and prefixes that end with a slash
        self._written: Counter[str] = Counter()

    async def prepare(self) -> None:
        """Nothing has to be opened."""

    def at_once(self, key: str, max_age: Age) -> memoryview | None:
        """What the store that caches has to be asked for is never to be had at once."""
        return None

    def into(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """Nor into bytes that somebody has."""
        return False

    def find_now(self, entry: Entry, max_age: Age) -> memoryview | None:
        """Nor by a thread, which is not the one of that store's event loop."""
        return None

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """No other process shares these books."""
        return lambda: None

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """As `lead`, of some bytes of an object."""
        return lambda: None

    def _write_begins(self, *written: str) -> None:
        self._written.update(written)

    def _write_ends(self, *written: str) -> None:
        self._written -= Counter(written)

    def _is_being_written(self, key: str) -> bool:
        return bool(self._written) and any(
            key == written or (written.endswith("/") and key.startswith(written)) for written in list(self._written)
        )

    async def doubtful(self, seen: Mapping[str, bytes]) -> list[str]:
        """No other process shares these books, so there is nothing that it could not know of."""
        return []

    async def settled(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """There were no doubts."""

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """While somebody fetches what is not cached."""
        return nullcontext()

    async def is_absent(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a document of a node that it has."""
        return self._nodes.is_absent(key, max_age)

    def lacks_now(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a chunk."""
        return self._nodes.lacks(key, max_age)

    async def lacks(self, key: str, max_age: Age) -> bool:
        """As `lacks_now`."""
        return self._nodes.lacks(key, max_age)

    async def note_lack(self, key: str, ticket: Any) -> None:
        """Remember that the source does not have a chunk."""
        self._nodes.note_lack(key, ticket)

    async def note(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""
        self._nodes.note(key, document)
