"""A cache in any Zarr store through the door: the bound, and a store that fails. The rest is the contract of caches."""

from __future__ import annotations

from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from xzcache.anystore import StoreBackend
from xzcache.model import Entry

FOREVER: Any = "infinity"


class Failing(MemoryStore):
    """Has no room, when it is told so."""

    is_full = False

    async def set(self, key: str, value: Buffer, byte_range: Any = None) -> None:
        if self.is_full:
            raise OSError("no room")
        await super().set(key, value)


async def put(cache: StoreBackend, key: str, size: int = 100) -> list[None]:
    """Store an entry; how often its publisher was called back."""
    done: list[None] = []
    async with cache.fetching():
        await cache.publish(Entry(key), b"." * size, cache.write_version(key), "etag", lambda: done.append(None))
    await cache.stored(key)
    return done


async def kept(cache: StoreBackend, *keys: str) -> list[bool]:
    return [await cache.get(Entry(key), FOREVER) is not None for key in keys]


async def test_what_was_not_used_for_the_longest_time_leaves_for_what_comes() -> None:
    store = MemoryStore()
    cache = StoreBackend(store, "source", max_size=300)
    for key in "abc":
        await put(cache, key)
    assert await kept(cache, "a") == [True]
    await put(cache, "d")
    assert await kept(cache, *"abcd") == [True, False, True, True]
    assert len(store._store_dict) == 3
    assert cache.evictions == 1
    await put(cache, "e", 301)
    assert await kept(cache, *"acde") == [True, True, True, False]


async def test_a_store_that_takes_nothing_fails_no_publisher() -> None:
    cache = StoreBackend(store := Failing(), "source")
    await put(cache, "a")
    store.is_full = True
    assert await put(cache, "b") == [None]
    assert await kept(cache, "a", "b") == [True, False]
    assert cache.faults > 0
    store.is_full = False
    await put(cache, "b")
    assert await kept(cache, "b") == [True]


async def test_what_another_object_has_stored_is_found_unless_its_age_matters() -> None:
    store = MemoryStore()
    await put(StoreBackend(store, "source"), "a")
    other = StoreBackend(store, "source")
    assert await other.get(Entry("a"), 1000) is None
    assert await kept(other, "a") == [True]
