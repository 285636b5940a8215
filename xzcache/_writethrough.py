"""Writing through a cache: the source is written between two looks at the cache, so that neither is ever ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xzcache._documents import is_document
from xzcache._readthrough import contents, whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from zarr.core.buffer import Buffer

    from xzcache._anystore import StoreBackend
    from xzcache._readthrough import Freshness
    from xzcache._shared import SharedBackend


class WriteThrough:
    """Writes to one source through one backend.

    Parameters
    ----------
    backend : SharedBackend or StoreBackend
    freshness : Freshness
    max_size : int or None
        The bound of a backend that is not bounded by itself, in bytes.

    Notes
    -----
    Whatever a write raises, what is cached of the key is forgotten: nobody knows how far the source got.
    """

    def __init__(self, backend: SharedBackend | StoreBackend, freshness: Freshness, max_size: int | None) -> None:
        self._backend = backend
        self._freshness = freshness
        self._max_size = max_size

    async def values(
        self,
        pairs: list[tuple[str, Buffer]],
        write: Callable[[], Awaitable[None]],
        *,
        keep: bool,
        certain: bool = True,
    ) -> None:
        """Write values to the source.

        Parameters
        ----------
        pairs : list of (str, Buffer)
        write : callable
            What writes them.
        keep : bool
            Whether to store them in the cache, unless somebody else wrote them at the same time.
        certain : bool
            Whether the source has these values once `write` returns.
        """
        begun = [await self._begin(key) for key, _ in pairs]
        done = False
        try:
            await write()
            done = True
        finally:
            for (key, value), ticket in zip(pairs, begun, strict=True):
                if self._is_cacheable(key):
                    data = contents(value) if keep and done and ticket is not None else None
                    await self._backend.end(key, ticket, data, self._max_size)
                    if done and certain and is_document(key):
                        await self._backend.note(key, value.to_bytes())
                        self._freshness.note(key)

    async def deletion(self, key: str, delete: Callable[[], Awaitable[None]]) -> None:
        """Delete a key, and what a store of files deletes with it: everything beneath."""
        begun = await self._begin(key)
        try:
            await delete()
        finally:
            if self._is_cacheable(key):
                await self._backend.end(key, begun, None, None)
                await self._backend.drop(key)

    async def deletion_beneath(self, prefix: str, delete: Callable[[], Awaitable[None]]) -> None:
        """Delete everything beneath a prefix."""
        prefix = prefix.rstrip("/")
        await self._backend.drop(prefix)
        try:
            await delete()
        finally:
            await self._backend.drop(prefix)

    def _is_cacheable(self, key: str) -> bool:
        return self._backend.entry(key, *whole()) is not None

    async def _begin(self, key: str) -> Any:
        return await self._backend.begin(key) if self._is_cacheable(key) else None
