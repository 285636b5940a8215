"""A source store that counts what reaches it, can hold it back and can fail; and a second process that uses stores."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import cloudpickle
import pytest
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xzcache

by_ranges = pytest.mark.skipif(not hasattr(Store, "get_ranges"), reason="this Zarr reads shards by `get`")
PATIENCE = 30.0
"""Seconds after which something that should have happened counts as never happening."""


def buffer(data: bytes) -> Buffer:
    return cpu.Buffer.from_bytes(data)


Part = ByteRequest | Sequence[ByteRequest | None] | None
"""What is wanted of an object: one range of it, several that are asked for together, or all of it."""


def between(*pairs: tuple[int, int]) -> list[RangeByteRequest]:
    return [RangeByteRequest(*pair) for pair in pairs]


async def read(store: Store, key: str, part: Part = None) -> bytes | None:
    """A value, a range of one, or ranges one after the other; None where there is no such object."""
    if isinstance(part, Sequence):
        try:
            return b"".join(await ranges(store, part, key))
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
        if isinstance(failure, FileNotFoundError):
            return None
        # raised while the group is handled, it would lead back to itself, and could not be pickled
        raise failure
    value = await store.get(key, default_buffer_prototype(), part)
    return None if value is None else value.to_bytes()


async def ranges(store: Store, wanted: Sequence[ByteRequest | None], key: str, **limits: int) -> list[bytes]:
    found: dict[int, bytes] = {}
    async for group in store.get_ranges(key, wanted, prototype=default_buffer_prototype(), **limits):
        found.update({place: value.to_bytes() for place, value in group})
    return [found[place] for place in range(len(wanted))]


def read_now(store: Store, key: str, part: Part = None) -> bytes | None:
    """`read` from where no event loop runs, another process included."""
    return asyncio.run(read(store, key, part))


def write_now(store: Store, key: str, data: bytes) -> None:
    asyncio.run(store.set(key, buffer(data)))


async def fill(store: Store, **objects: bytes) -> None:
    """Store objects; ``a__b`` stands for the key ``a/b``."""
    for key, data in objects.items():
        await store.set(key.replace("__", "/"), buffer(data))


class Gate:
    """Holds calls back: they arrive, and go on when it is opened."""

    def __init__(self, *, after: bool) -> None:
        self.after = after
        self._arrived: Future[None] = Future()
        self._opened: Future[None] = Future()

    async def arrived(self) -> None:
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._arrived)), PATIENCE)

    def wait_arrived(self) -> None:
        self._arrived.result(PATIENCE)

    def open(self) -> None:
        self._opened.set_result(None)

    async def pass_through(self) -> None:
        if not self._arrived.done():
            self._arrived.set_result(None)
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._opened)), PATIENCE)


class CountingStore(WrapperStore[Store]):
    """A store that notes each call that reaches it, by method and key.

    Safe for threads and event loops; a pickled copy counts from zero and holds nothing back.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls: list[tuple[str, str]] = []
        self.errors: dict[str, BaseException] = {}
        self._gates: dict[tuple[str, str], Gate] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._store,)

    def _with_store(self, store: Store) -> Self:
        copy = type(self)(store)
        copy.calls, copy.errors, copy._gates = self.calls, self.errors, self._gates
        return copy

    def with_read_only(self, read_only: bool = False) -> Self:
        return self._with_store(self._store.with_read_only(read_only))

    # -- for tests

    def count(self, method: str | None = None, key: str | None = None) -> int:
        """How many calls there were, of a method and a key or of all."""
        return sum(method in (None, m) and key in (None, k) for m, k in list(self.calls))

    @property
    def reads(self) -> int:
        """How many calls fetched something."""
        return sum(m in ("get", "get_partial_values", "get_ranges", "get_sync", "_get_many") for m, _ in self.calls)

    def forget(self) -> None:
        self.calls.clear()

    def hold(self, method: str, key: str, *, after: bool = True) -> Gate:
        """Hold back calls of a method with a key, before or after the store beneath did its part."""
        gate = self._gates[method, key] = Gate(after=after)
        return gate

    def let_go(self, method: str, key: str) -> None:
        """Open a gate, and hold no later call back."""
        self._gates.pop((method, key)).open()

    # -- the store

    def _note(self, method: str, key: str = "") -> None:
        self.calls.append((method, key))
        error = self.errors.get(method)
        if error is not None:
            raise error

    async def _through(self, method: str, key: str, act: Callable[[], Any]) -> Any:
        self._note(method, key)
        gate = self._gates.get((method, key))
        if gate is not None and not gate.after:
            await gate.pass_through()
        result = await act()
        if gate is not None and gate.after:
            await gate.pass_through()
        return result

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        return await self._through("get", key, lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        wanted = list(key_ranges)
        return await self._through("get_partial_values", "", lambda: self._store.get_partial_values(prototype, wanted))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        self._note("_get_many")
        async for found in self._store._get_many(requests):
            yield found

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], **options: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        if ("get_ranges", key) in self._gates:

            async def everything() -> list[Sequence[tuple[int, Buffer | None]]]:
                return [group async for group in self._store.get_ranges(key, byte_ranges, **options)]

            for group in await self._through("get_ranges", key, everything):
                yield group
            return
        self._note("get_ranges", key)
        async for group in self._store.get_ranges(key, byte_ranges, **options):
            yield group

    async def exists(self, key: str) -> bool:
        return await self._through("exists", key, lambda: self._store.exists(key))

    async def getsize(self, key: str) -> int:
        return await self._through("getsize", key, lambda: self._store.getsize(key))

    async def getsize_prefix(self, prefix: str) -> int:
        return await self._through("getsize_prefix", prefix, lambda: self._store.getsize_prefix(prefix))

    async def set(self, key: str, value: Buffer) -> None:
        await self._through("set", key, lambda: self._store.set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._through("set_if_not_exists", key, lambda: self._store.set_if_not_exists(key, value))

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        pairs = list(values)
        await self._through("_set_many", "", lambda: self._store._set_many(pairs))

    async def delete(self, key: str) -> None:
        await self._through("delete", key, lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._through("delete_dir", prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        await self._through("clear", "", self._store.clear)

    async def is_empty(self, prefix: str) -> bool:
        return await self._through("is_empty", prefix, lambda: self._store.is_empty(prefix))

    def list(self) -> AsyncIterator[str]:
        self._note("list")
        return self._store.list()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        self._note("list_prefix", prefix)
        return self._store.list_prefix(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        self._note("list_dir", prefix)
        return self._store.list_dir(prefix)

    async def _ensure_open(self) -> None:
        self._note("_ensure_open")
        await self._store._ensure_open()

    def close(self) -> None:
        self._note("close")
        self._store.close()

    @property
    def supports_writes(self) -> bool:
        self._note("supports_writes")
        return self._store.supports_writes

    @property
    def supports_deletes(self) -> bool:
        self._note("supports_deletes")
        return self._store.supports_deletes

    @property
    def supports_listing(self) -> bool:
        self._note("supports_listing")
        return self._store.supports_listing

    @property
    def supports_consolidated_metadata(self) -> bool:
        self._note("supports_consolidated_metadata")
        return self._store.supports_consolidated_metadata

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        self._note("get_sync", key)
        return self._store.get_sync(key, **options)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._note("set_sync", key)
        self._store.set_sync(key, value)

    def delete_sync(self, key: str) -> None:
        self._note("delete_sync", key)
        self._store.delete_sync(key)


def local_source(tmp_path: Path, name: str = "source") -> CountingStore:
    """A counted source that other processes can read as well."""
    return CountingStore(LocalStore(tmp_path / name))


def memory_source() -> CountingStore:
    return CountingStore(MemoryStore())


def cached(kind: str, source: Store, tmp_path: Path, **options: Any) -> xzcache.CacheStore:
    """A `CacheStore` over either kind of cache store, bounded the same."""
    cache: Any = tmp_path / "cache" if kind == "directory" else MemoryStore()
    return xzcache.CacheStore(source, cache_store=cache, **options)


def again(store: xzcache.CacheStore, source: Store | None = None, **options: Any) -> xzcache.CacheStore:
    """Another `CacheStore` over the cache of one, newly opened."""
    return xzcache.CacheStore(source or store._store, cache_store=store._cache, **options)


def pipelines_of(what: Any) -> set[str]:
    """The names of the codec pipelines of all arrays behind a dataset, those in Dask's graph included."""
    kinds = set()

    class Watching(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
        def persistent_id(self, item: Any) -> None:
            if isinstance(item, zarr.AsyncArray):
                kinds.add(type(item.codec_pipeline).__name__)

    Watching(io.BytesIO()).dump(what)
    return kinds


class _Neighbours:
    """Other processes of this machine, started afresh (not forked) when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function there and wait for its result."""
        future = self.start(function, *arguments)
        try:
            return future.result(2 * PATIENCE)
        except BrokenProcessPool as error:
            raise AssertionError(f"the neighbour died: {self._process}") from error

    def start(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            try:
                future = self._pool.submit(function, *arguments)
            except BrokenProcessPool as error:
                raise AssertionError(f"the neighbour has died: {self._process}") from error
            # kept, as a pool that is broken forgets with which exit code
            (self._process,) = self._pool._processes.values()
            return future

    def shut_down(self) -> None:
        """End them; they are started anew when they are needed again."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None


neighbours = _Neighbours()
