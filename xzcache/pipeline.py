"""A codec pipeline for arrays that are read through a cache: what is cached is read and decoded without an event loop.

``zarr.config.set({"codec_pipeline.path": "xzcache.pipeline.CachePipeline"})`` chooses it for the arrays that are opened
from then on; the engine ``"zcache"`` does so for its own. It needs a Zarr that has the `FusedCodecPipeline`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

import zarr
from zarr.abc.codec import GetResult
from zarr.core.chunk_utils import ChunkTransform
from zarr.core.codec_pipeline import FusedCodecPipeline, _resolve_max_workers
from zarr.registry import register_pipeline
from zarr.storage import StorePath

from xzcache import _pool as pool
from xzcache._errors import Replaced
from xzcache._readthrough import NotCached
from xzcache._straight import place_of, stores_values
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec, Codec
    from zarr.abc.store import ByteRequest
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer

    from xzcache._readthrough import ReadThrough

_SMALL: Final = 256 << 10
"""Decoded bytes of a chunk up to which another thread takes longer to wake than the decoding takes."""

Item = tuple[Any, Any, Any, Any, bool]


@dataclass(eq=False, slots=True)
class _Cached:
    """Reads one key from the cache alone, as a codec asks for it."""

    reads: ReadThrough
    key: str
    patient: bool
    """Whether the disk may be waited for."""
    hits: list[tuple[int, float]] = field(default_factory=list)

    def get_sync(self, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if self.patient:
            return self.reads.cached(self.key, prototype, byte_range, self._count)
        value = self.reads.at_once(self.key, prototype, self._count) if byte_range is None else None
        if value is None:
            raise NotCached
        return value

    def _count(self, size: int, seconds: float) -> None:
        self.hits.append((size, seconds))

    def tell(self) -> None:
        """Count the hits, once it is certain that they were not in vain."""
        for size, seconds in self.hits:
            self.reads.reading.stats.hit(size, seconds)


class CachePipeline(FusedCodecPipeline):
    """Zarr's `FusedCodecPipeline`, which splits what is read through a `CacheStore` in two.

    What is cached is read and decoded synchronously, in this package's threads; what is missing is fetched
    asynchronously, all at once. A missing chunk is never waited for in a thread: the source may need that very thread.
    Arrays of other stores are read as Zarr reads them. A shard that was replaced at the source while it was read in
    parts is read again, once.

    Notes
    -----
    Pickles as its codecs, in few objects: a graph refers to each of them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.array_array_codecs, self.array_bytes_codec, self.bytes_bytes_codecs, self.batch_size)

    async def read(self, batch_info: Iterable[Item], out: NDBuffer, drop_axes: tuple[int, ...] = ()) -> tuple[Any, ...]:
        """Read a batch of chunks into `out`; as in Zarr."""
        batch = list(batch_info)
        reads = _reads_of(batch)
        if reads is None or self.sync_transform is None:
            return await super().read(batch, out, drop_axes)
        results = await self._cached(reads, batch, out, drop_axes)
        missing = [place for place, result in enumerate(results) if result is None]
        if missing:
            rest = [batch[place] for place in missing]
            try:
                fetched = await super().read(rest, out, drop_axes)
            except BaseException as error:
                if not _is_replaced(error):
                    raise
                fetched = await super().read(rest, out, drop_axes)
            for place, result in zip(missing, fetched, strict=True):
                results[place] = result
        return tuple(results)

    async def _cached(
        self, reads: ReadThrough, batch: list[Item], out: NDBuffer, drop_axes: tuple[int, ...]
    ) -> list[Any]:
        """The results of what is cached; None for the rest."""
        size = _decoded_size(batch[0][1])
        if len(batch) == 1 and size <= _SMALL:
            results = self._read_cached(reads, batch, out, drop_axes, patient=False)
            if results[0] is not None:
                return results
        workers = min(_resolve_max_workers(), len(batch)) if size > _SMALL else 1
        shares = [batch[number::workers] for number in range(workers)]
        results = [None] * len(batch)
        futures = [pool.submit(self._read_cached, reads, share, out, drop_axes, patient=True) for share in shares]
        for number, future in enumerate(futures):
            share: list[Any] = await pool.outcome(future)
            results[number::workers] = share
        return results

    def _read_cached(
        self, reads: ReadThrough, batch: Sequence[Item], out: NDBuffer, drop_axes: tuple[int, ...], *, patient: bool
    ) -> list[Any]:
        results: list[Any] = []
        straight = stores_values((*self.array_array_codecs, self.array_bytes_codec, *self.bytes_bytes_codecs))
        for byte_getter, spec, chunk_selection, out_selection, is_complete in batch:
            place = place_of(spec, chunk_selection, out, out_selection) if straight else None
            if place is not None and reads.into(byte_getter.path, place, patient=patient):
                results.append(GetResult(status="present"))
                continue
            cached = _Cached(reads, byte_getter.path, patient)
            try:
                item: Any = cached, spec, chunk_selection, out_selection, is_complete
                results += self.read_sync([item], out, drop_axes)
            except NotCached:
                results.append(None)
            else:
                cached.tell()
        return results


def _restored(
    first: tuple[ArrayArrayCodec, ...], middle: ArrayBytesCodec, last: tuple[BytesBytesCodec, ...], batch_size: int
) -> CachePipeline:
    codecs: tuple[Codec, ...] = (*first, middle, *last)
    try:
        transform = ChunkTransform(codecs=codecs)
    except TypeError:
        # one of them can only be awaited
        transform = None
    return CachePipeline(codecs, first, middle, last, transform, batch_size)


def _reads_of(batch: Sequence[Item]) -> ReadThrough | None:
    """What reads the chunks of a batch, if that is a cache."""
    if not batch or not isinstance(batch[0][0], StorePath):
        return None
    store = batch[0][0].store
    return store._reads if isinstance(store, CacheStore) else None


def _decoded_size(spec: ArraySpec) -> int:
    return prod(spec.shape) * int(getattr(spec.dtype, "item_size", None) or 1)


def _is_replaced(error: BaseException) -> bool:
    return isinstance(error, Replaced) or (
        isinstance(error, BaseExceptionGroup) and error.subgroup(Replaced) is not None
    )


register_pipeline(CachePipeline)

_PATH: Final = "codec_pipeline.path"
_OURS: Final = f"{CachePipeline.__module__}.{CachePipeline.__qualname__}"
_ZARRS: Final = "zarr.core.codec_pipeline."
_lock = threading.Lock()
_users: list[Any] = []


@contextmanager
def chosen() -> Iterator[None]:
    """Have Zarr's arrays that are opened meanwhile use this pipeline, unless the user chose another one than Zarr's.

    The configuration belongs to all threads: the first one to come sets it, and the last one to go sets it back.
    """
    with _lock:
        if not _users and not str(zarr.config.get(_PATH)).startswith(_ZARRS):
            setting = None
        else:
            setting = _users[0] if _users else zarr.config.set({_PATH: _OURS})
            _users.append(setting)
    try:
        yield
    finally:
        if setting is not None:
            with _lock:
                _users.pop()
                if not _users:
                    setting.__exit__(None, None, None)
