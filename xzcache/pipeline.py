"""A codec pipeline for arrays in a cache: reads and decodes cached chunks without an event loop.

It is a default of Zarr's configuration once xzcache is imported: arrays over a `CacheStore` are read with it, and
arrays over other stores get exactly the pipeline that Zarr would give them. A pipeline that the user configures stays.
``xzcache.config.set(pipeline=False)`` switches it off for arrays that are opened later.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np
import zarr
from zarr.abc import codec
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec, CodecPipeline
from zarr.codecs import BytesCodec
from zarr.core import codec_pipeline as zarrs
from zarr.core.array import create_codec_pipeline
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_pipeline
from zarr.storage import StorePath

from xzcache import _threads as pool
from xzcache._config import UNSET, chosen, parse_flag
from xzcache.model import Replaced, report_bug
from xzcache.reading import SMALL, NotCached, decoded_size
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from zarr.abc.codec import Codec
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer
    from zarr.core.metadata import ArrayMetadata

    from xzcache.reading import ReadThrough


# -- The raw layout: chunks whose bytes are the values, which can be read into the result without a copy.

_KINDS = frozenset("biufc")
"""Kinds of data types with a fixed number of bytes for each value and no references."""


def is_raw_layout(codecs: tuple[Codec, ...]) -> bool:
    """Whether an array is stored as its values lie in memory: uncompressed, and in the byte order of this machine."""
    if len(codecs) != 1 or type(codecs[0]) is not BytesCodec:
        return False
    endian: Any = codecs[0].endian
    return endian is None or getattr(endian, "value", endian) == sys.byteorder


def output_slice(
    spec: ArraySpec, chunk_selection: Any, out: NDBuffer, out_selection: Any
) -> np.ndarray[Any, Any] | None:
    """The slice of a result that the bytes of a chunk fill as they are.

    None if the chunk is not used whole and in order.
    """
    values: Any = out.as_ndarray_like()
    if type(values) is not np.ndarray or not (_is_plain(chunk_selection) and _is_plain(out_selection)):
        return None
    dtype: np.dtype[Any] = values.dtype
    if dtype.kind not in _KINDS or not dtype.isnative or spec.dtype.to_native_dtype() != dtype:
        return None
    place: Any = values[out_selection]
    # with steps of one and as many values as the chunk has, the selection is the whole chunk in order
    if type(place) is not np.ndarray or place.size != prod(spec.shape) or not place.flags.c_contiguous:
        return None
    return place.reshape(-1).view(np.uint8)


def _is_plain(selection: Any) -> bool:
    parts = selection if isinstance(selection, tuple) else (selection,)
    return all(
        isinstance(part, int) or (type(part) is slice and part.step in (None, 1) and (part.start or 0) >= 0)
        for part in parts
    )


# -- The pipeline itself.

logger = logging.getLogger("xzcache.pipeline")

_RETURNS_RESULTS: Final = hasattr(codec, "GetResult")
"""Whether this Zarr expects a result for each chunk that was read."""


def _default_of_zarr() -> type[Any]:
    """The pipeline that this Zarr uses where nobody has configured one."""
    try:
        path = zarr.config.defaults[0]["codec_pipeline"]["path"]
        module, _, name = path.rpartition(".")
        found: type[Any] = getattr(sys.modules[module], name)
    except (AttributeError, IndexError, KeyError, TypeError):
        return BatchedCodecPipeline
    return found


Item = tuple[Any, Any, Any, Any, bool]
Decode = Callable[[list[Item], "NDBuffer", tuple[int, ...]], Any]


@dataclass(eq=False, slots=True)
class _Cached:
    """Reads one key from the cache alone, with the interface that a codec needs."""

    reads: ReadThrough
    key: str
    patient: bool
    """Whether the disk may be waited for."""
    hits: list[tuple[int, float]] = field(default_factory=list)

    def readinto_nowait(self, place: np.ndarray[Any, Any]) -> bool:
        """Whether the bytes of the chunk lie in `place` now."""
        try:
            return self.reads.readinto_nowait(self.key, place, patient=self.patient)
        except Exception as error:
            raise _failed(error) from error

    def get_sync(self, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of the chunk, or a range of them; None if the chunk is known to be missing."""
        try:
            if self.patient:
                return self.reads.get_blocking(self.key, prototype, byte_range, self._count)
            value = self.reads.get_nowait(self.key, prototype, byte_range, self._count)
        except NotCached:
            raise
        except Exception as error:
            raise _failed(error) from error
        if value is None:
            raise NotCached
        return value

    def _count(self, size: int, seconds: float) -> None:
        self.hits.append((size, seconds))

    def count_hits(self) -> None:
        """Count the hits, after the chunk was decoded: otherwise the inner pipeline reads and counts it."""
        for size, seconds in self.hits:
            self.reads.reading.stats.hit(size, seconds)


def _failed(error: Exception) -> NotCached:
    """Turn a failure of the cache into a miss."""
    if not report_bug(error, "reading a cached chunk"):
        logger.debug("a cached chunk could not be read", exc_info=error)
    return NotCached()


class CachePipeline(CodecPipeline):
    """A codec pipeline that reads cached chunks of a `CacheStore`, and passes all other work to another pipeline.

    A cached chunk is read and decoded synchronously, in this package's threads. The inner pipeline handles missing
    chunks, arrays of other stores, all writes, and cached chunks that cannot be read or decoded here. Threads never
    wait for a missing chunk, because the source may need the same thread. A shard that was replaced at the source while
    it was read in parts is read again, once.

    Parameters
    ----------
    inner : CodecPipeline
        The inner pipeline. Its attributes are attributes of this pipeline too.

    Attributes
    ----------
    behind : type of CodecPipeline
        The class of the inner pipeline when Zarr creates this pipeline from codecs: Zarr's default. A subclass may set
        another one.

    Notes
    -----
    A Zarr without the `FusedCodecPipeline` cannot decode synchronously: only uncompressed chunks are then read here.
    """

    behind: ClassVar[type[Any]] = _default_of_zarr()

    def __init__(self, inner: CodecPipeline) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            # not initialized yet, as during a copy
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        inner = self.inner
        if type(self) is CachePipeline and type(inner) is BatchedCodecPipeline:
            # few objects: a graph refers to each of them
            return _restored, (
                inner.array_array_codecs,
                inner.array_bytes_codec,
                inner.bytes_bytes_codecs,
                inner.batch_size,
            )
        return type(self), (inner,)

    def __eq__(self, other: object) -> bool:
        return self.inner == other.inner if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), self.inner))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    # -- as the pipeline behind it

    @classmethod
    def from_codecs(cls, codecs: Iterable[Codec], **options: Any) -> CodecPipeline:  # type: ignore[override]
        """The pipeline behind, alone: for arrays of other stores, and for what lies in a shard."""
        made: CodecPipeline = cls.behind.from_codecs(codecs, **options)
        return made

    @classmethod
    def from_array_metadata_and_store(  # type: ignore[override]
        cls, array_metadata: ArrayMetadata, store: Store
    ) -> CodecPipeline:
        """This pipeline for an array of a `CacheStore`, and the pipeline behind for all other arrays."""
        made: CodecPipeline
        try:
            made = cls.behind.from_array_metadata_and_store(array_metadata=array_metadata, store=store)
        except NotImplementedError:
            # as Zarr does it
            made = create_codec_pipeline(array_metadata)
        return cls(made) if isinstance(store, CacheStore) and chosen("pipeline", UNSET, parse_flag) else made

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        return type(self)(self.inner.evolve_from_array_spec(array_spec))

    def __iter__(self) -> Iterator[Codec]:
        inner: Any = self.inner
        return iter(inner)

    @property
    def supports_partial_decode(self) -> bool:
        return self.inner.supports_partial_decode

    @property
    def supports_partial_encode(self) -> bool:
        return self.inner.supports_partial_encode

    def validate(self, **array: Any) -> None:
        self.inner.validate(**array)

    def compute_encoded_size(self, byte_length: int, array_spec: ArraySpec) -> int:
        return self.inner.compute_encoded_size(byte_length, array_spec)

    async def decode(self, chunk_bytes_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]) -> Any:
        return await self.inner.decode(chunk_bytes_and_specs)

    async def encode(self, chunk_arrays_and_specs: Iterable[tuple[NDBuffer | None, ArraySpec]]) -> Any:
        return await self.inner.encode(chunk_arrays_and_specs)

    async def write(self, batch_info: Iterable[Item], value: NDBuffer, drop_axes: tuple[int, ...] = ()) -> None:
        await self.inner.write(batch_info, value, drop_axes)

    # -- cached chunks

    async def read(self, batch_info: Iterable[Item], out: NDBuffer, drop_axes: tuple[int, ...] = ()) -> Any:
        """Read a batch of chunks into `out`; as in Zarr."""
        batch = list(batch_info)
        reads = _reads_of(batch)
        if reads is None:
            return await self.inner.read(batch, out, drop_axes)
        results = await self._cached(reads, batch, out, drop_axes)
        missing = [place for place, result in enumerate(results) if result is None]
        if missing:
            rest = [batch[place] for place in missing]
            try:
                fetched: Any = await self.inner.read(rest, out, drop_axes)
            except BaseException as error:
                # read again once: this time all parts are of the new object
                if not _is_replaced(error):
                    raise
                fetched = await self.inner.read(rest, out, drop_axes)
            for place, result in zip(missing, fetched or (), strict=_RETURNS_RESULTS):
                results[place] = result
        return tuple(results) if _RETURNS_RESULTS else None

    @cached_property
    def _is_raw(self) -> bool:
        """Whether chunks are stored as their values lie in memory."""
        return is_raw_layout(_codecs_of(self.inner))

    @cached_property
    def _decode(self) -> Decode | None:
        """Reads and decodes chunks synchronously; None where this Zarr, or a codec, cannot."""
        return _synchronous(_codecs_of(self.inner))

    async def _cached(
        self, reads: ReadThrough, batch: list[Item], out: NDBuffer, drop_axes: tuple[int, ...]
    ) -> list[Any]:
        """The results of cached chunks; None for the others."""
        if self._decode is None and not self._is_raw:
            return [None] * len(batch)
        size = decoded_size(batch[0][1])
        # here on the event loop: a thread takes longer to wake than such a chunk takes to decode
        if len(batch) == 1 and size <= SMALL:
            results = self._read_cached(reads, batch, out, drop_axes, patient=False)
            if results[0] is not None:
                return results
        workers = min(_most_workers(), len(batch)) if size > SMALL else 1
        shares = [batch[number::workers] for number in range(workers)]
        results = [None] * len(batch)
        read = partial(self._read_cached, reads, out=out, drop_axes=drop_axes, patient=True)
        # in a context of its own, by which Dask knows whose task reads
        futures = [pool.submit(copy_context().run, read, share) for share in shares]
        for number, future in enumerate(futures):
            share: list[Any] = await pool.outcome(future)
            results[number::workers] = share
        return results

    def _read_cached(
        self, reads: ReadThrough, batch: Sequence[Item], out: NDBuffer, drop_axes: tuple[int, ...], *, patient: bool
    ) -> list[Any]:
        results: list[Any] = []
        for item in batch:
            try:
                results.append(self._read_one(reads, item, out, drop_axes, patient=patient))
            except NotCached:
                results.append(None)
            except Exception:
                # a chunk that cannot be decoded is read again by the inner pipeline, which raises the error
                results.append(None)
        return results

    def _read_one(
        self, reads: ReadThrough, item: Item, out: NDBuffer, drop_axes: tuple[int, ...], *, patient: bool
    ) -> Any:
        byte_getter, spec, chunk_selection, out_selection, is_complete = item
        cached = _Cached(reads, byte_getter.path, patient)
        place = output_slice(spec, chunk_selection, out, out_selection) if self._is_raw else None
        if place is not None and cached.readinto_nowait(place):
            return {"status": "present"}
        if self._decode is None:
            raise NotCached
        (result,) = self._decode([(cached, spec, chunk_selection, out_selection, is_complete)], out, drop_axes)
        cached.count_hits()
        return result


def _restored(
    first: tuple[ArrayArrayCodec, ...], middle: ArrayBytesCodec, last: tuple[BytesBytesCodec, ...], batch_size: int
) -> CachePipeline:
    return CachePipeline(BatchedCodecPipeline(first, middle, last, batch_size))


def _codecs_of(pipeline: Any) -> tuple[Codec, ...]:
    """The codecs of a pipeline, in order; none if it cannot be iterated."""
    try:
        return tuple(pipeline)
    except TypeError:
        return ()


def _synchronous(codecs: tuple[Codec, ...]) -> Decode | None:
    """The function that reads and decodes chunks synchronously, as in Zarr's `FusedCodecPipeline`; None without one."""
    try:
        from zarr.core.chunk_utils import ChunkTransform
        from zarr.core.codec_pipeline import FusedCodecPipeline

        # not `from_codecs`, which warns of some codecs: the pipeline behind has done so
        fused = FusedCodecPipeline(
            codecs=codecs,
            array_array_codecs=tuple(each for each in codecs if isinstance(each, ArrayArrayCodec)),
            array_bytes_codec=next(each for each in codecs if isinstance(each, ArrayBytesCodec)),
            bytes_bytes_codecs=tuple(each for each in codecs if isinstance(each, BytesBytesCodec)),
            sync_transform=ChunkTransform(codecs=codecs),
            batch_size=1,
        )
    except (ImportError, TypeError, StopIteration):
        # this Zarr has no such pipeline, or a codec can only be awaited, or there are none
        return None
    return fused.read_sync


def _reads_of(batch: Sequence[Item]) -> ReadThrough | None:
    """The reads of the cache that holds the chunks of a batch, if any."""
    if not batch or not isinstance(batch[0][0], StorePath):
        return None
    store = batch[0][0].store
    return store._reads if isinstance(store, CacheStore) else None


def _most_workers() -> int:
    """The number of threads in which Zarr's configuration lets chunks be decoded."""
    configured = zarr.config.get("codec_pipeline.max_workers", None)
    return max(1, configured) if isinstance(configured, int) else os.cpu_count() or 1


def _is_replaced(error: BaseException) -> bool:
    return isinstance(error, Replaced) or (
        isinstance(error, BaseExceptionGroup) and error.subgroup(Replaced) is not None
    )


register_pipeline(CachePipeline)
# a default, which gives way to what the user has configured, and not a setting
zarr.config.update_defaults({"codec_pipeline": {"path": f"{CachePipeline.__module__}.{CachePipeline.__qualname__}"}})


def take(array: zarr.Array[Any]) -> None:
    """Give an array the pipeline that is behind this one, alone."""
    holder = array.async_array
    if isinstance(holder.codec_pipeline, CachePipeline):
        # the array is a frozen dataclass of Zarr, which has no other way to change its pipeline
        object.__setattr__(holder, "codec_pipeline", holder.codec_pipeline.inner)


def give(array: zarr.Array[Any]) -> None:
    """Set this pipeline on an array of a `CacheStore`, unless the user has chosen another one.

    Arrays that Zarr derives from this one's metadata use the configured pipeline again, which is right but slower.
    """
    holder = array.async_array
    configured = holder.codec_pipeline
    if type(configured).__module__ == zarrs.__name__:
        # the array is frozen, and Zarr has no other way but its configuration, which belongs to all threads
        object.__setattr__(holder, "codec_pipeline", CachePipeline(configured))
