"""What there is little to do about where no other process shares a cache."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from xzcache._keys import Entry


class Alone:
    """The part of a backend that is about others."""

    is_open = True

    async def prepare(self) -> None:
        """Nothing has to be opened."""

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """No other process shares these books."""
        return lambda: None

    async def doubtful(self, seen: Mapping[str, bytes]) -> list[str]:
        """No other process shares these books, so there is nothing that it could not know of."""
        return []

    async def settled(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """There were no doubts."""

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """While somebody fetches what is not cached."""
        return nullcontext()
