"""A cache in any Zarr store: the bound, the order of eviction, ranges, and what a cache store does that fails."""

from __future__ import annotations

from typing import Any

import pytest
from sources import CountingStore, buffer, memory_source, read
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

import xzcache

SIZE = 100


async def source_of(*keys: str) -> CountingStore:
    source = CountingStore(memory_source())
    for key in keys:
        await source.set(key, buffer(key.encode().ljust(SIZE, b".")))
    return source


def over(source: CountingStore, cache: Any, **settings: Any) -> xzcache.CacheStore:
    return xzcache.CacheStore(source, cache_store=cache, **{"revalidate": False, **settings})


async def test_the_least_recently_used_leave_first() -> None:
    source = await source_of("a", "b", "c", "d")
    store = over(source, MemoryStore(), max_size=3 * SIZE)
    for key in ("a", "b", "c", "a", "d", "a", "c"):
        await read(store, key)
    assert [source.count("get", key) for key in "abcd"] == [1, 1, 1, 1]
    await read(store, "b")
    assert source.count("get", "b") == 2
    assert store.cache_info()["total_size"] <= 3 * SIZE


async def test_a_range_is_served_from_the_whole() -> None:
    source = await source_of("a")
    store = over(source, MemoryStore())
    whole = await read(store, "a")
    assert await read(store, "a", RangeByteRequest(10, 20)) == whole[10:20]
    assert source.count("get", "a") == 1


async def test_what_is_larger_than_the_bound_passes_through() -> None:
    source = await source_of("a")
    store = over(source, MemoryStore(), max_size=SIZE - 1)
    for _ in range(2):
        assert len(await read(store, "a")) == SIZE
    assert (store.cache_info()["cached_keys"], source.count("get", "a")) == (0, 2)


class Failing(MemoryStore):
    """A store in which nothing can be written."""

    async def set(self, *args: Any, **options: Any) -> None:
        raise OSError("no")


async def test_a_cache_store_that_fails_fails_no_read() -> None:
    source = await source_of("a")
    store = over(source, Failing())
    for _ in range(2):
        assert len(await read(store, "a")) == SIZE
    assert store.cache_info()["total_size"] == 0


@pytest.mark.parametrize("forget", ["delete", "clear_cache"])
async def test_what_is_forgotten_is_fetched_again(forget: str) -> None:
    source = await source_of("a")
    store = over(source, MemoryStore())
    await read(store, "a")
    if forget == "delete":
        await store.delete("a")
        await source.set("a", buffer(b"new"))
        assert await read(store, "a") == b"new"
    else:
        await store.clear_cache()
        assert len(await read(store, "a")) == SIZE
    assert source.count("get", "a") == 2
