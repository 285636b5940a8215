"""Reading through a cache, as Zarr's stores are read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from zarr.core.buffer import default_buffer_prototype

from xzcache._freshness import is_read_for_a_write
from xzcache._sourceview import SourceView

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._ranges import RangeReads
    from xzcache._readthrough import ReadThrough


class ReadableView(SourceView):
    """A view of a source that is asked for nothing that is cached."""

    _reads: ReadThrough
    _ranges: RangeReads

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of a key, or a byte range of it; None where the source has none."""
        prototype = prototype or default_buffer_prototype()
        anew = False if self.read_only else is_read_for_a_write()
        if anew is False and byte_range is None and (value := self._reads.at_once(key, prototype)) is not None:
            return value
        return await self._reads.get(key, prototype, byte_range, anew=anew)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several keys and byte ranges, each as `get`."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_concurrency: int = 10,
        max_gap_bytes: int = 1 << 20,
        max_coalesced_bytes: int = 16 << 20,
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Many byte ranges of a value: what is cached, then what is missing, in as few requests as Zarr makes.

        Parameters
        ----------
        key : str
        byte_ranges : sequence of ByteRequest or None
        prototype : BufferPrototype
        max_concurrency : int
            Requests to the source at a time.
        max_gap_bytes, max_coalesced_bytes : int
            Bytes that may lie between two ranges that are asked for as one, and of such a one.

        Raises
        ------
        BaseExceptionGroup
            Of exceptions of the source, or of `FileNotFoundError` where it has no such key; or of `OSError` with
            ``errno.ESTALE`` where the object was replaced while parts of it were read.
        """
        async for group in self._ranges.get(
            key,
            byte_ranges,
            prototype,
            max_concurrency=max_concurrency,
            max_gap_bytes=max_gap_bytes,
            max_coalesced_bytes=max_coalesced_bytes,
        ):
            yield group

    async def exists(self, key: str) -> bool:
        """Whether a key has a value: as the cache knows, or else by the source's own means."""
        if await self._reads.cached_size(key) is not None:
            return True
        return not await self._reads.is_known_absent(key) and await self._store.exists(key)

    async def getsize(self, key: str) -> int:
        """The size of a value, in bytes: as the cache knows it, or else by the source's own means."""
        size = await self._reads.cached_size(key)
        if size is None and await self._reads.is_known_absent(key):
            raise FileNotFoundError(key)
        return await self._store.getsize(key) if size is None else size
