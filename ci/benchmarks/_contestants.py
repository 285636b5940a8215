"""Who is compared: ways to read one array, with caches in a directory of their own each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diskcache
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.core import codec_pipeline
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.experimental.cache_store import CacheStore as TheirCacheStore
from zarr.storage import FsspecStore, LocalStore, WrapperStore

import xzcache

SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20, "16 MiB": 16 << 20}
CODECS: dict[str, Any] = {"none": None, "zstd": ZstdCodec(), "blosc": BloscCodec(cname="lz4", shuffle="shuffle")}
OURS = "xzcache"
COPY = "LocalStore, a copy"
THEIRS = "Zarr CacheStore"
SOURCE = "the source (local)"
UNCHOSEN = "as opened"
"""The codec pipeline of an array whose user chose none: with xzcache imported, its own, for stores of its own."""
BATCHED = "Batched"


class Kind(NamedTuple):
    """What an array is like: how large a chunk is, decoded, and how it is encoded."""

    chunk: str
    codec: str

    def __str__(self) -> str:
        return f"{self.chunk}, {self.codec}"


def field(chunks: int, chunk: int) -> np.ndarray[Any, Any]:
    """Something like weather: smooth, with noise in its lower digits. A row is a chunk of so many bytes."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(chunks, chunk // 4)).astype("f4")
    # multiples of 1/64, as data that was packed once
    return (np.round(np.cumsum(steps, axis=1) * 16) / 64 + 273).astype("f4")


def make(store: Store, kind: Kind, count: int, **options: Any) -> np.ndarray[Any, Any]:
    """Write an array, and return what is in it."""
    data = field(count, SIZES[kind.chunk])
    options.setdefault("chunks", (1, data.shape[1]))
    array = zarr.create_array(
        store, shape=data.shape, dtype="f4", compressors=CODECS[kind.codec], overwrite=True, **options
    )
    array[:] = data
    return data


def stores(source: Path, scratch: Path, *, only: frozenset[str] | None = None) -> dict[str, Store]:
    """Ways to read what is at a path; `fill` has to be called before what is cached is read."""
    ways: dict[str, Callable[[], Store]] = {
        SOURCE: lambda: LocalStore(source, read_only=True),
        COPY: lambda: _copy(source, scratch / "copy"),
        THEIRS: lambda: TheirCacheStore(LocalStore(source), cache_store=LocalStore(scratch / "theirs")),
        "fsspec filecache": lambda: _fsspec("filecache", source, scratch),
        "fsspec simplecache": lambda: _fsspec("simplecache", source, scratch),
        "diskcache": lambda: Diskcache(LocalStore(source), scratch / "diskcache"),
        OURS: lambda: xzcache.CacheStore(LocalStore(source), cache_store=scratch / "ours"),
    }
    return {name: make() for name, make in ways.items() if only is None or name in only}


def _copy(source: Path, target: Path) -> Store:
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return LocalStore(target, read_only=True)


def _fsspec(protocol: str, source: Path, scratch: Path) -> Store:
    options = {protocol: {"cache_storage": os.fspath(scratch / protocol)}}
    return FsspecStore.from_url(f"{protocol}::file://{source}", storage_options=options, read_only=True)


class Diskcache(WrapperStore[Store]):
    """The least that makes a cache of python-diskcache: whole objects, looked up where they are asked for."""

    def __init__(self, store: Store, directory: Path | diskcache.Cache) -> None:
        super().__init__(store)
        is_path = isinstance(directory, Path)
        self.cache: Any = diskcache.Cache(os.fspath(directory), size_limit=1 << 40) if is_path else directory

    def _with_store(self, store: Store) -> Diskcache:
        return type(self)(store, self.cache)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        data = self.cache.get(key) if byte_range is None else None
        if data is not None:
            return prototype.buffer.from_bytes(data)
        value = await super().get(key, prototype, byte_range)
        if value is not None and byte_range is None:
            self.cache.set(key, value.to_bytes())
        return value


def fill(contestants: Mapping[str, Store], data: np.ndarray[Any, Any]) -> None:
    """Read everything through every store, until it is all cached and right."""
    for name, store in contestants.items():
        # fsspec's caches fail when they are filled by several threads
        with zarr.config.set({"async.concurrency": 1}):
            np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], data)
        if name == OURS:
            assert isinstance(store, xzcache.CacheStore)
            store.cache_info()  # waits until all is stored
        np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], data)


def pipelines() -> dict[str, str | None]:
    """The codec pipelines under short names: none chosen, and Zarr's two."""
    found = {UNCHOSEN: None, BATCHED: "zarr.core.codec_pipeline.BatchedCodecPipeline"}
    if hasattr(codec_pipeline, "FusedCodecPipeline"):
        found["Fused"] = "zarr.core.codec_pipeline.FusedCodecPipeline"
    return found


@contextmanager
def using(pipeline: str) -> Iterator[None]:
    """Arrays that are opened in the block decode with a pipeline."""
    path = pipelines()[pipeline]
    with zarr.config.set({} if path is None else {"codec_pipeline.path": path}):
        yield


class Outside(NamedTuple):
    """Zarr data of the user's own, in a directory."""

    path: Path
    arrays: tuple[str, ...]
    """The paths of the arrays; empty for the one at the root."""

    def read(self, opened: Mapping[str, Any]) -> list[Any]:
        """All arrays, whole."""
        return [opened[name][...] for name in self.arrays]

    def open(self, store: Store) -> dict[str, Any]:
        return {name: zarr.open_array(store, path=name, mode="r") for name in self.arrays}

    def objects(self) -> list[str]:
        """The keys of all chunks and shards."""
        files = (path for path in sorted(self.path.rglob("*")) if path.is_file())
        return [path.relative_to(self.path).as_posix() for path in files if path.name not in DOCUMENTS]


DOCUMENTS = frozenset({"zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"})


def outside(path: Path) -> Outside:
    """The arrays in a directory. Raises `SystemExit` if there is none."""
    try:
        node = zarr.open(LocalStore(path, read_only=True), mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--outside {path}: no Zarr array or group is there: {error}") from error
    if isinstance(node, zarr.Array):
        return Outside(path, ("",))
    found = Outside(path, tuple(sorted(name for name, member in node.members(None) if isinstance(member, zarr.Array))))
    if not found.arrays:
        raise SystemExit(f"--outside {path}: the group has no arrays")
    return found
