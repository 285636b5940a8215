"""What `CacheStore` serves, keeps, counts and forgets, over both kinds of cache store."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from clocks import Clock
from sources import (
    CountingStore,
    again,
    buffer,
    cached,
    fill,
    local_source,
    memory_source,
    neighbours,
    read,
    read_now,
    write_now,
)
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, cpu, default_buffer_prototype
from zarr.experimental.cache_store import CacheStore as ZarrCacheStore
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xzcache
from xzcache.directory import _registry as registry

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")


# -- helpers


def kept(store: xzcache.CacheStore) -> set[str]:
    """Keys that the cache holds whole, as its own store or its files show."""
    if isinstance(store._cache, xzcache.LockedLocalStore):
        root = store._cache.root / store.namespace
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    cache = store._cache
    while not isinstance(cache, MemoryStore):
        cache = cache._store
    return set(cache._store_dict)


def forget_process(store: xzcache.CacheStore) -> None:
    """Let a cache directory be opened as if by a process that starts now."""
    root = os.path.realpath(store._cache.root)
    registry._directories.pop(root).close()


def restarted(store: xzcache.CacheStore, source: Store | None = None, **options: Any) -> xzcache.CacheStore:
    """A `CacheStore` over the same cache, as a process would have it that starts now."""
    cache: Any = store._cache
    if isinstance(cache, xzcache.LockedLocalStore):
        forget_process(store)
        cache = cache.root
    else:
        # the contents without the books
        cache = MemoryStore(dict(cache._store_dict))
    return xzcache.CacheStore(source or store._store, cache_store=cache, **options)


async def numbered(source: Store, count: int, size: int) -> list[str]:
    keys = [f"c/{i}" for i in range(count)]
    for i, key in enumerate(keys):
        await source.set(key, buffer(bytes([i]) * size))
    return keys


# -- hits, misses, and what is told of them


async def test_the_second_read_is_a_hit(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, a__c__0=b"12345")
    store = cached(cache_kind, source, tmp_path)
    assert [await read(store, "a/c/0") for _ in range(3)] == [b"12345"] * 3
    assert source.count("get", "a/c/0") == source.reads == 1
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"], stats["total_requests"]) == (2, 1, 3)
    assert stats["hit_rate"] == pytest.approx(2 / 3)
    assert (stats["bytes_from_cache"], stats["bytes_from_source"]) == (10, 5)
    assert stats["seconds_from_cache"] > 0
    assert stats["seconds_from_source"] > 0
    assert stats["cache_errors"] == stats["evictions"] == 0


async def test_info_and_stats_have_the_names_of_zarrs_own(cache_kind: str, tmp_path: Path) -> None:
    zarrs = ZarrCacheStore(MemoryStore(), cache_store=MemoryStore())
    store = cached(cache_kind, memory_source(), tmp_path, max_size=500, max_age_seconds=60)
    assert set(store.cache_info()) >= set(zarrs.cache_info())
    assert set(store.cache_stats()) >= set(zarrs.cache_stats())
    assert store.cache_stats()["hit_rate"] == 0.0
    info = store.cache_info()
    assert info["max_size"] == 500
    assert info["max_age_seconds"] == 60
    assert info["cache_set_data"] is True
    assert info["cache_store_type"] == {"directory": "LockedLocalStore", "memory": "MemoryStore"}[cache_kind]
    assert info["cache_directory"] == {"directory": str(tmp_path / "cache"), "memory": None}[cache_kind]


async def test_sizes_and_keys_are_of_this_source_and_of_all(tmp_path: Path) -> None:
    first, second = memory_source(), memory_source()
    await fill(first, a=b"123", b=b"45")
    await fill(second, a=b"6")
    one, other = cached("directory", first, tmp_path), cached("directory", second, tmp_path)
    for store, key in [(one, "a"), (one, "b"), (other, "a")]:
        await read(store, key)
    info = one.cache_info()
    assert (info["current_size"], info["tracked_keys"], info["cached_keys"]) == (5, 2, 2)
    assert (info["total_size"], info["total_keys"]) == (6, 3)
    assert (other.cache_info()["current_size"], other.cache_info()["cached_keys"]) == (1, 1)


async def test_the_namespace_opens_as_an_ordinary_store(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_array(source, name="x", data=np.arange(6), chunks=(2,))
    store = cached("directory", source, tmp_path)
    assert zarr.open_array(store, path="x", mode="r")[:].tolist() == list(range(6))
    plain = LocalStore(tmp_path / "cache" / store.namespace, read_only=True)
    assert zarr.open_array(plain, path="x", mode="r")[:].tolist() == list(range(6))


async def test_a_missing_key_is_none_and_costs_the_cache_nothing() -> None:
    cache, source = memory_source(), memory_source()
    store = xzcache.CacheStore(source, cache_store=cache)
    assert [await read(store, "nothing") for _ in range(10)] == [None] * 10
    assert cache.count("delete") == cache.count("set") == 0
    assert store.cache_info()["cached_keys"] == 0


async def test_cache_set_data_false_keeps_what_is_read_only(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path, cache_set_data=False)
    await store.set("k", buffer(b"written"))
    assert kept(store) == set()
    assert await read(store, "k") == b"written"
    assert kept(store) == {"k"}
    await store.set("k", buffer(b"new"))
    assert (kept(store), store.cache_info()["current_size"]) == (set(), 0)


async def test_what_is_written_is_served_without_a_read(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    await store.set("k", buffer(b"written"))
    assert await read(store, "k") == b"written"
    assert source.reads == 0


async def test_with_read_only_shares_the_cache_and_the_counters(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"1")
    store = cached(cache_kind, source, tmp_path)
    await read(store, "k")
    reader = store.with_read_only(True)
    assert await read(reader, "k") == b"1"
    assert source.reads == 1
    assert reader.cache_stats() == store.cache_stats()
    assert reader.read_only
    assert not store.read_only
    with pytest.raises(ValueError, match="read-only"):
        await reader.set("k", buffer(b"2"))
    writer = reader.with_read_only(False)
    await writer.set("k", buffer(b"2"))
    assert await read(reader, "k") == b"2"


# -- byte ranges

RANGES = [
    (RangeByteRequest(2, 5), b"234"),
    (RangeByteRequest(7, 99), b"789"),
    (OffsetByteRequest(6), b"6789"),
    (OffsetByteRequest(10), b""),
    (SuffixByteRequest(3), b"789"),
    (SuffixByteRequest(99), b"0123456789"),
    (RangeByteRequest(4, 4), b""),
]


@pytest.mark.parametrize(("part", "expected"), RANGES)
async def test_a_range_is_cached(part: Any, expected: bytes, cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"0123456789")
    store = cached(cache_kind, source, tmp_path)
    assert [await read(store, "k", part) for _ in range(3)] == [expected] * 3
    assert source.reads == 1
    assert kept(store) == set()


@pytest.mark.parametrize(("part", "expected"), RANGES)
async def test_a_range_of_a_whole_entry_is_served_from_it(
    part: Any, expected: bytes, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    await fill(source, k=b"0123456789")
    store = cached(cache_kind, source, tmp_path)
    await read(store, "k")
    assert await read(store, "k", part) == expected
    assert source.reads == 1
    assert store.cache_info()["cached_keys"] == 1


async def test_ranges_count_towards_the_bound(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=bytes(1000))
    store = cached(cache_kind, source, tmp_path, max_size=1000)
    for start in range(0, 900, 20):
        assert await read(store, "k", RangeByteRequest(start, start + 100)) == bytes(100)
        assert store.cache_info()["total_size"] <= 1000
    assert store.cache_stats()["evictions"] > 0


async def test_ranges_of_a_large_object_take_bounded_memory_without_a_bound() -> None:
    source = memory_source()
    size = 40 << 20
    await fill(source, k=bytes(size))
    store = xzcache.CacheStore(source, cache_store=MemoryStore(), max_size=None)
    for start in range(10):
        await read(store, "k", OffsetByteRequest(start))
    assert store.cache_info()["current_size"] <= 256 << 20


async def test_ranges_outlive_the_process_that_read_them(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"0123456789")
    store = cached("directory", source, tmp_path)
    await read(store, "k", RangeByteRequest(2, 5))
    source.forget()
    assert await read(restarted(store), "k", RangeByteRequest(2, 5)) == b"234"
    assert source.reads == 0


async def test_a_write_forgets_the_ranges_too(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, memory_source(), tmp_path, cache_set_data=False)
    await fill(store, k=b"0123456789")
    assert await read(store, "k", RangeByteRequest(2, 5)) == b"234"
    await store.set("k", buffer(b"abcdefghij"))
    assert await read(store, "k", RangeByteRequest(2, 5)) == b"cde"
    await store.delete("k")
    assert await read(store, "k", RangeByteRequest(2, 5)) is None
    assert store.cache_info()["current_size"] == 0


async def test_a_range_that_makes_no_sense_is_the_sources_to_answer(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"0123456789")
    store = cached(cache_kind, source, tmp_path)
    odd = RangeByteRequest(5, 2)
    assert await read(store, "k", odd) == await read(source, "k", odd)
    assert store.cache_info()["cached_keys"] == 0


async def test_inner_chunks_of_shards_are_read_once(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    data = np.arange(64).reshape(8, 8)
    await asyncio.to_thread(zarr.create_array, source, name="x", data=data, chunks=(2, 2), shards=(8, 8))
    array = await asyncio.to_thread(zarr.open_array, cached(cache_kind, source, tmp_path), path="x", mode="r")

    def inner() -> Any:
        return array[2:4, 2:4].tolist()

    assert await asyncio.to_thread(inner) == data[2:4, 2:4].tolist()
    source.forget()
    for _ in range(5):
        assert await asyncio.to_thread(inner) == data[2:4, 2:4].tolist()
    assert source.reads == 0


async def test_a_buffer_handed_out_is_nobody_elses(cache_kind: str, tmp_path: Path) -> None:
    class Mine(cpu.Buffer):
        pass

    source = local_source(tmp_path)
    await fill(source, k=b"0123456789")
    store = cached(cache_kind, source, tmp_path)
    for part in (None, RangeByteRequest(1, 4)):
        plain = [await store.get("k", default_buffer_prototype(), part) for _ in range(3)]
        for value in plain:
            assert value is not None
            array = value.as_numpy_array()
            if array.flags.writeable:
                array[:] = 0
        assert await read(store, "k", part) == (b"0123456789" if part is None else b"123")
        # whatever was asked for first, each gets the kind of buffer that it asks for
        mine = await store.get("k", BufferPrototype(buffer=Mine, nd_buffer=cpu.NDBuffer), part)
        assert type(mine) is Mine
    assert await read(source, "k") == b"0123456789"


async def test_exists_and_getsize_ask_the_source_by_its_own_cheap_means(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"12345")
    store = cached(cache_kind, source, tmp_path)
    assert await store.exists("k")
    assert await store.getsize("k") == 5
    assert not await store.exists("nothing")
    with pytest.raises(FileNotFoundError):
        await store.getsize("nothing")
    assert source.reads == 0
    assert (source.count("exists"), source.count("getsize")) == (2, 2)


# -- age


@pytest.mark.parametrize("part", [None, RangeByteRequest(2, 5)])
async def test_an_entry_expires(part: Any, cache_kind: str, tmp_path: Path, clock: Clock) -> None:
    source = memory_source()
    await fill(source, k=b"0123456789")
    store = cached(cache_kind, source, tmp_path, max_age_seconds=10)
    await read(store, "k", part)
    clock.move(9, store)
    await read(store, "k", part)
    assert source.reads == 1
    await source._store.set("k", buffer(b"abcdefghij"))
    clock.move(2, store)
    assert await read(store, "k", part) == (b"abcdefghij" if part is None else b"cde")
    # and what replaced it is as good as new
    clock.move(9, store)
    await read(store, "k", part)
    assert source.reads == 2


async def test_an_expired_entry_does_not_exist(cache_kind: str, tmp_path: Path, clock: Clock) -> None:
    source = memory_source()
    await fill(source, k=b"1")
    store = cached(cache_kind, source, tmp_path, max_age_seconds=10)
    await read(store, "k")
    await source._store.delete("k")
    assert await store.exists("k")
    clock.move(11, store)
    assert not await store.exists("k")
    assert await read(store, "k") is None


async def test_age_is_kept_over_a_restart(tmp_path: Path, clock: Clock) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"1")
    store = cached("directory", source, tmp_path, max_age_seconds=100)
    await read(store, "k")
    clock.move(90, store)
    store = restarted(store, max_age_seconds=100)
    source.forget()
    await read(store, "k")
    assert source.reads == 0
    clock.move(20, store)
    await read(restarted(store, max_age_seconds=100), "k")
    assert source.reads == 1


async def test_no_age_is_no_age_that_an_entry_of_unknown_age_has(clock: Clock) -> None:
    source = memory_source()
    await fill(source, k=b"new")
    old = MemoryStore({"k": buffer(b"old")})
    store = xzcache.CacheStore(source, cache_store=old, max_age_seconds=10**9)
    assert await read(store, "k") == b"new"


async def test_a_wall_clock_that_was_set_back_makes_nothing_immortal(
    cache_kind: str, tmp_path: Path, clock: Clock
) -> None:
    source = memory_source()
    await fill(source, k=b"1")
    store = cached(cache_kind, source, tmp_path, max_age_seconds=10)
    await read(store, "k")
    clock.wall = -1e6
    source.forget()
    await read(store, "k")
    assert source.reads == 1


async def test_age_zero_serves_nothing(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"1")
    store = cached(cache_kind, source, tmp_path, max_age_seconds=0)
    for _ in range(3):
        await read(store, "k")
    assert source.reads == 3


# -- the bound


async def test_a_value_larger_than_the_bound_passes_through(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, large=bytes(101), exact=bytes(100), small=b"1")
    store = cached(cache_kind, source, tmp_path, max_size=100)
    await read(store, "small")
    assert await read(store, "large") == await read(store, "large") == bytes(101)
    assert source.count("get", "large") == 2
    assert kept(store) == {"small"}
    await store.set("written", buffer(bytes(101)))
    assert await read(store, "written") == bytes(101)
    assert kept(store) == {"small"}
    assert await read(store, "exact") == bytes(100)
    assert kept(store) == {"exact"}
    assert store.cache_info()["current_size"] == 100


async def test_replacing_an_entry_by_one_too_large_gives_its_space_back(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, memory_source(), tmp_path, max_size=100)
    await store.set("k", buffer(bytes(50)))
    await store.set("k", buffer(bytes(1000)))
    assert await read(store, "k") == bytes(1000)
    assert (store.cache_info()["current_size"], kept(store)) == (0, set())


async def test_deleting_gives_the_space_back(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, memory_source(), tmp_path, max_size=1000)
    for i in range(20):
        await store.set(f"c/{i}", buffer(bytes(150)))
        await store.delete(f"c/{i}")
    assert (store.cache_info()["current_size"], store.cache_info()["cached_keys"]) == (0, 0)
    for i in range(6):
        await store.set(f"c/{i}", buffer(bytes(150)))
    assert len(kept(store)) == 6
    assert store.cache_info()["current_size"] == 900
    assert store.cache_stats()["evictions"] == 0


async def test_many_writers_at_once_never_exceed_the_bound() -> None:
    class Scales(WrapperStore[MemoryStore]):
        heaviest = 0

        async def set(self, key: str, value: Buffer) -> None:
            await self._store.set(key, value)
            self.heaviest = max(self.heaviest, sum(map(len, self._store._store_dict.values())))
            await asyncio.sleep(0)

    scales = Scales(MemoryStore())
    store = xzcache.CacheStore(memory_source(), cache_store=scales, max_size=1000)
    await asyncio.gather(*(store.set(f"c/{i}", buffer(bytes(100))) for i in range(50)))
    assert 0 < scales.heaviest <= 1000
    assert store.cache_info()["current_size"] == sum(map(len, scales._store._store_dict.values()))


async def test_the_least_recently_used_leave_first(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    keys = await numbered(source, 30, 100)
    store = cached(cache_kind, source, tmp_path, max_size=1000)
    for key in keys[:10]:
        await read(store, key)
    assert kept(store) == set(keys[:10])
    order = keys[:10]
    for key in [keys[0], keys[5], keys[2]]:
        assert await read(store, key) is not None
        order.remove(key)
        order.append(key)
    for key in keys[10:]:
        await read(store, key)
        order.append(key)
        left = kept(store)
        # those that are left are the latest ones, with none missing among them
        assert left == set(order[-len(left) :])
        assert 9 <= len(left) <= 10


async def test_order_and_account_are_kept_over_a_restart(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    keys = await numbered(source, 16, 100)
    store = cached("directory", source, tmp_path, max_size=1000)
    for key in keys[:10]:
        await read(store, key)
    await read(store, keys[0])
    before = store.cache_info()
    store = restarted(store)
    assert store.cache_info() == before
    assert store.max_size == 1000
    order = [*keys[1:10], keys[0]]
    for key in keys[10:]:
        await read(store, key)
        order.append(key)
        left = kept(store)
        assert left == set(order[-len(left) :])
        assert 9 <= len(left) <= 10


async def test_what_another_process_reads_and_uses_counts(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    keys = await numbered(source, 12, 100)
    store = cached("directory", source, tmp_path, max_size=1000)
    for key in keys[:5]:
        await asyncio.to_thread(neighbours.run, read_now, store, key)
    assert store.cache_info()["current_size"] == 500
    assert kept(store) == set(keys[:5])
    source.forget()
    for key in keys[:5]:
        await read(store, key)
    assert source.reads == 0
    for key in keys[5:]:
        await read(store, key)
        assert store.cache_info()["total_size"] <= 1000
    assert kept(store) <= set(keys[2:])


async def test_a_smaller_bound_evicts_the_oldest(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    keys = await numbered(source, 10, 100)
    store = cached("directory", source, tmp_path, max_size=1000)
    for key in keys:
        await read(store, key)
    smaller = cached("directory", source, tmp_path, max_size="500 B")
    await read(smaller, keys[9])
    assert kept(smaller) == set(keys[5:])
    assert smaller.cache_info()["total_size"] == 500
    assert smaller.cache_info()["max_size"] == 500
    assert restarted(smaller).max_size == 500


async def test_an_inherited_memory_store_is_counted_as_it_is_used() -> None:
    source = memory_source()
    keys = await numbered(source, 20, 100)
    store = xzcache.CacheStore(source, cache_store=MemoryStore(), max_size=1000)
    for key in keys[:10]:
        await read(store, key)
    store = restarted(store, max_size=1000)
    source.forget()
    for key in keys[:10]:
        await read(store, key)
    assert source.reads == 0
    assert store.cache_info()["current_size"] == 1000
    for key in keys[10:]:
        await read(store, key)
    assert len(kept(store)) <= 10
    assert store.cache_info()["current_size"] == 100 * len(kept(store))


async def test_a_crowd_over_a_small_cache_gets_what_the_source_has(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    keys = await numbered(source, 20, 100)
    store = cached(cache_kind, source, tmp_path, max_size=1000)

    async def wander(seed: int) -> None:
        for step in range(30):
            i = (seed * 7 + step * step) % 20
            assert await read(store, keys[i]) == bytes([i]) * 100

    await asyncio.gather(*(wander(seed) for seed in range(16)))
    assert store.cache_info()["total_size"] <= 1000
    assert store.cache_stats()["evictions"] > 0
    assert store.cache_stats()["cache_errors"] == 0


async def test_a_slow_eviction_holds_up_nobody_who_does_not_need_it() -> None:
    source, cache = memory_source(), memory_source()
    keys = await numbered(source, 3, 100)
    store = xzcache.CacheStore(source, cache_store=cache, max_size=200)
    await read(store, keys[0])
    await read(store, keys[1])
    gate = cache.hold("delete", keys[0], after=False)
    evicting = asyncio.create_task(read(store, keys[2]))
    await gate.arrived()
    assert await read(store, keys[1]) == bytes([1]) * 100
    assert not evicting.done()
    cache.let_go("delete", keys[0])
    assert await evicting == bytes([2]) * 100
    assert kept(store) == {keys[1], keys[2]}


# -- sources never mix


async def test_two_sources_over_one_directory_never_mix(tmp_path: Path) -> None:
    first, second = local_source(tmp_path, "one"), local_source(tmp_path, "other")
    await fill(first, a__c__0=b"1111")
    await fill(second, a__c__0=b"2222")
    one, other = cached("directory", first, tmp_path), cached("directory", second, tmp_path)
    for _ in range(2):
        assert await read(one, "a/c/0") == b"1111"
        assert await read(other, "a/c/0") == b"2222"
    assert one.namespace != other.namespace
    await one.clear_cache()
    assert (kept(one), kept(other)) == (set(), {"a/c/0"})
    await one.clear()
    assert await read(other, "a/c/0") == b"2222"
    assert second.reads == 1


async def test_two_memory_stores_over_one_directory_never_mix(tmp_path: Path) -> None:
    for value in (b"1111", b"2222"):
        source = memory_source()
        await fill(source, k=value)
        # the first one may be gone, and the second take its place in memory
        assert await read(cached("directory", source, tmp_path), "k") == value


async def test_two_sources_over_one_store_are_refused() -> None:
    cache = MemoryStore()
    first = memory_source()
    await fill(first, k=b"1")
    store = xzcache.CacheStore(first, cache_store=cache)
    await read(store, "k")
    with pytest.raises(ValueError, match=r"cache_store=MemoryStore caches .* already"):
        xzcache.CacheStore(memory_source(), cache_store=cache)
    assert await read(xzcache.CacheStore(first, cache_store=cache), "k") == b"1"
    assert first.reads == 1


async def test_two_sources_of_one_namespace_are_one(tmp_path: Path) -> None:
    first, second = memory_source(), memory_source()
    await fill(first, k=b"same")
    await fill(second, k=b"same")
    one = cached("directory", first, tmp_path, namespace="mine")
    other = cached("directory", second, tmp_path, namespace="mine")
    assert await read(one, "k") == await read(other, "k") == b"same"
    assert (first.reads, second.reads) == (1, 0)
    assert (tmp_path / "cache" / "mine" / "k").read_bytes() == b"same"


async def test_two_snapshots_of_an_icechunk_repository_never_mix(tmp_path: Path) -> None:
    def commit(values: list[int]) -> str:
        session = repository.writable_session("main")
        zarr.create_array(session.store, name="x", data=np.array(values), chunks=(2,), overwrite=True)
        return session.commit("a change")

    def values(snapshot: str) -> list[int]:
        source = repository.readonly_session(snapshot_id=snapshot).store
        return zarr.open_array(cached("directory", source, tmp_path), path="x", mode="r")[:].tolist()

    repository = await asyncio.to_thread(
        icechunk.Repository.create, icechunk.local_filesystem_storage(str(tmp_path / "repository"))
    )
    old = await asyncio.to_thread(commit, [0, 1, 2, 3])
    assert await asyncio.to_thread(values, old) == [0, 1, 2, 3]
    new = await asyncio.to_thread(commit, [-1, -1, -1, -1])
    for snapshot, expected in [(new, [-1] * 4), (old, [0, 1, 2, 3]), (new, [-1] * 4)]:
        assert await asyncio.to_thread(values, snapshot) == expected


async def test_stores_with_different_caches_or_settings_are_not_equal(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    stores = [
        xzcache.CacheStore(source, cache_store=tmp_path / "one"),
        xzcache.CacheStore(source, cache_store=tmp_path / "two"),
        xzcache.CacheStore(source, cache_store=tmp_path / "two", max_age_seconds=5),
        xzcache.CacheStore(source, cache_store=MemoryStore()),
        xzcache.CacheStore(local_source(tmp_path, "other"), cache_store=tmp_path / "one"),
        source,
    ]
    for i, one in enumerate(stores[:-1]):
        assert [one == other for other in stores] == [i == j for j in range(len(stores))]
    assert stores[0] == xzcache.CacheStore(source, cache_store=tmp_path / "one")


# -- keys that are no paths

AWKWARD = ["../evil", "../../evil", "/abs", "a//b", "a/../b", ".", "x" * 300, "a/" + "y" * 256, "é/ü", ".xzcache/guard"]


@pytest.mark.parametrize("key", AWKWARD)
async def test_a_key_that_is_no_path_stays_inside_and_fails_no_read(key: str, tmp_path: Path) -> None:
    source = memory_source()
    await source.set(key, buffer(b"value"))
    store = cached("directory", source, tmp_path / "deep" / "down")
    assert await read(store, key) == await read(store, key) == b"value"
    assert source.reads == 1
    assert store.cache_info()["cached_keys"] == 1
    assert store.cache_stats()["cache_errors"] == 0
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "deep" / "down" / "cache" not in p.parents]
    assert outside == []
    await store.delete(key)
    assert await read(store, key) is None


@pytest.mark.parametrize("order", [["a", "a/b"], ["a/b", "a"]])
async def test_a_key_beside_keys_beneath_it(order: list[str], tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, a=b"file", a__b=b"beneath")
    store = cached("directory", source, tmp_path)
    for _ in range(2):
        for key in order:
            assert await read(store, key) == {"a": b"file", "a/b": b"beneath"}[key]
    assert source.reads == 2
    assert store.cache_info()["cached_keys"] == 2


# -- trouble

TROUBLES = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ESTALE]


def trouble(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
@pytest.mark.parametrize("methods", ["set", "get", "delete delete_dir", "get set delete delete_dir"])
async def test_a_cache_store_in_trouble_fails_no_read(
    methods: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = memory_source(), memory_source()
    keys = await numbered(source, 6, 100)
    store = xzcache.CacheStore(source, cache_store=cache, max_size=300)
    for key in keys[:3]:
        await read(store, key)
    cache.errors.update(dict.fromkeys(methods.split(), trouble(number)))
    for _ in range(2):
        for i, key in enumerate(keys):
            assert await read(store, key) == bytes([i]) * 100
    assert store.cache_stats()["cache_errors"] > 0
    # apart from a bound this small
    assert len([r for r in caplog.records if r.name.startswith("xzcache.")]) == 1
    # a write is the source's affair; what the cache could not forget it does not serve
    await store.set(keys[0], buffer(b"new"))
    cache.errors.clear()
    assert await read(store, keys[0]) == b"new"
    assert store.cache_info()["current_size"] <= 300


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["write", "open_file", "read", "move", "discard"])
async def test_a_directory_in_trouble_fails_no_read(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise trouble(number)

    source = memory_source()
    keys = await numbered(source, 12, 100)
    store = cached("directory", source, tmp_path, max_size=1000)
    for key in keys[:8]:
        await read(store, key)
    with monkeypatch.context() as patched:
        module = "files._lookup" if function in ("open_file", "read") else "files"
        patched.setattr(f"xzcache.{module}.{function}", fail)
        for i, key in enumerate(keys):
            assert await read(store, key) == bytes([i]) * 100
        await store.set(keys[0], buffer(b"new"))
        assert await read(store, keys[0]) == b"new"
    for _ in range(2):
        assert await read(store, keys[0]) == b"new"
        for i, key in enumerate(keys[1:], 1):
            assert await read(store, key) == bytes([i]) * 100
    assert store.cache_info()["total_size"] <= 1000


async def test_a_read_only_cache_store_fails_no_read() -> None:
    source = memory_source()
    await fill(source, held=b"held", missed=b"missed")
    cache = MemoryStore({"held": buffer(b"held")}, read_only=True)
    store = xzcache.CacheStore(source, cache_store=cache)
    assert await read(store, "held") == b"held"
    assert await read(store, "missed") == b"missed"
    assert await read(store, "nothing") is None
    assert source.count("get", "held") == 0


@pytest.mark.parametrize(
    "damaged", [bytes(range(10)), bytes(100), bytes(range(100)) + b"x", b""], ids=["cut", "zeroed", "grown", "emptied"]
)
async def test_a_file_that_is_not_what_was_stored_is_fetched_again(damaged: bytes, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=bytes(range(100)))
    store = cached("directory", source, tmp_path)
    await read(store, "k")
    (tmp_path / "cache" / store.namespace / "k").write_bytes(damaged)
    assert await read(store, "k") == bytes(range(100))
    assert source.reads == 2
    # one that sees the file for the first time notices as well
    (tmp_path / "cache" / store.namespace / "k").write_bytes(damaged)
    assert await read(restarted(store), "k") == bytes(range(100))
    assert source.reads == 3


@pytest.mark.parametrize("error", [ConnectionError("down"), PermissionError(errno.EACCES, "no"), KeyError("k")])
async def test_an_exception_of_the_source_is_passed_on_as_it_is(
    error: Exception, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    await fill(source, k=b"0123456789", seen=b"seen", **{"zarr.json": b"{}"})
    store = cached(cache_kind, source, tmp_path)
    await read(store, "seen")
    source.errors["get"] = error
    for key, part in [("k", None), ("k", RangeByteRequest(1, 2)), ("zarr.json", None)]:
        with pytest.raises(type(error)) as raised:
            await read(store, key, part)
        assert raised.value is error
    assert await read(store, "seen") == b"seen"
    source.errors.clear()
    # and is not remembered
    assert await read(store, "k") == b"0123456789"
    assert await read(store, "k", RangeByteRequest(1, 2)) == b"1"
    assert await read(store, "zarr.json") == b"{}"


async def test_a_failed_write_leaves_nothing_in_the_cache(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"old")
    store = cached(cache_kind, source, tmp_path)
    await read(store, "k")
    source.errors["set"] = ConnectionError("down")
    with pytest.raises(ConnectionError):
        await store.set("k", buffer(b"new"))
    assert kept(store) == set()
    assert await read(store, "k") == b"old"


async def test_what_is_cached_is_read_while_the_source_is_down(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await asyncio.to_thread(zarr.create_array, source, name="x", data=np.arange(64), chunks=(8,), shards=(32,))
    store = cached(cache_kind, source, tmp_path)

    def values(store: Store) -> list[int]:
        return zarr.open_array(store, path="x", mode="r", zarr_format=3)[8:24].tolist()

    assert await asyncio.to_thread(values, store) == list(range(8, 24))
    for name in ("get", "get_ranges", "get_partial_values", "exists"):
        source.errors[name] = ConnectionError("down")
    assert await asyncio.to_thread(values, store) == list(range(8, 24))
    assert await asyncio.to_thread(values, again(store, revalidate=False)) == list(range(8, 24))


# -- clearing


async def test_clearing_the_cache_leaves_the_source_and_foreign_files(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"1", a__c__0=b"2")
    store = cached("directory", source, tmp_path)
    await read(store, "k")
    await read(store, "a/c/0", RangeByteRequest(0, 1))
    foreign = [tmp_path / "cache" / "notes.txt", tmp_path / "cache" / store.namespace / "notes.txt"]
    for path in foreign:
        path.write_text("the user's")
    await store.clear_cache()
    info = store.cache_info()
    assert (info["current_size"], info["tracked_keys"], info["cached_keys"], info["total_size"]) == (0, 0, 0, 0)
    assert [path.read_text() for path in foreign] == ["the user's"] * 2
    source.forget()
    assert await read(store, "k") == b"1"
    assert source.reads == 1


async def test_clearing_a_memory_cache(tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, k=b"1")
    store = cached("memory", source, tmp_path)
    await read(store, "k")
    await store.clear_cache()
    assert kept(store) == set()
    assert store.cache_info()["current_size"] == store.cache_info()["tracked_keys"] == 0
    assert await read(store, "k") == b"1"
    assert source.reads == 2


async def test_foreign_files_are_neither_counted_nor_evicted(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    keys = await numbered(source, 20, 100)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.pdf").write_bytes(bytes(5000))
    store = cached("directory", source, tmp_path, max_size=1000)
    for key in keys:
        await read(store, key)
    assert len(kept(store)) >= 9
    assert (tmp_path / "cache" / "thesis.pdf").stat().st_size == 5000


# -- freshness of documents


def write_array(source: Store, values: list[int], version: int = 3, **options: Any) -> None:
    group = zarr.open_group(source, mode="a", zarr_format=version)
    group.create_array("x", data=np.array(values), chunks=(2,), overwrite=True, **options)


def append(source: Store, values: list[int]) -> None:
    zarr.open_array(source, path="x", mode="a").append(np.array(values))


def values_of(store: Store, path: str = "x") -> list[int]:
    # of the one format: Zarr would look for documents of both, and those that are not there are not cached
    return zarr.open_array(store, path=path, mode="r", zarr_format=format_of(store))[:].tolist()


def format_of(store: Store) -> int:
    while not isinstance(store, MemoryStore):
        store = store._store
    return 2 if ".zgroup" in store._store_dict else 3


async def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Zarr's synchronous functions, from a test that has a loop."""
    return await asyncio.to_thread(function, *arguments, **options)


@pytest.fixture(params=[2, 3])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_an_append_by_somebody_else_is_seen_at_the_next_open(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2], version)
    store = cached(cache_kind, source, tmp_path)
    assert values_of(store) == [0, 1, 2]
    append(source, [3, 4])
    # the last chunk was half full, and its object was written anew
    assert values_of(store) == [0, 1, 2]
    assert values_of(again(store)) == [0, 1, 2, 3, 4]


def test_a_document_that_was_evicted_takes_its_old_chunks_with_it(
    cache_kind: str, tmp_path: Path, version: int
) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2], version)
    store = cached(cache_kind, source, tmp_path, max_size=10_000)
    name = {2: "x/.zarray", 3: "x/zarr.json"}[version]
    assert values_of(store) == [0, 1, 2]
    chunks = {key for key in kept(store) if not key.endswith((".json", ".zarray", ".zattrs"))}
    append(source, [3, 4])
    # the documents are the least recently used, once the chunks were read again
    for key in [*chunks, "large"]:
        if key == "large":
            write_now(source, key, bytes(9_900 - sum(len(read_now(store, chunk) or b"") for chunk in chunks)))
        read_now(store, key)
    assert name not in kept(store)
    assert chunks & kept(store)
    assert values_of(store) == [0, 1, 2, 3, 4]


def test_documents_are_asked_for_once_an_open(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    store = cached(cache_kind, source, tmp_path)
    name = {2: ".zarray", 3: "zarr.json"}[version]
    values_of(store)
    source.forget()
    values_of(store)
    assert source.reads == 0
    values_of(again(store))
    assert source.count("get", f"x/{name}") == 1
    assert {key for method, key in source.calls if method == "get"} <= {f"x/{name}", "x/.zattrs"}


def test_revalidate_false_never_asks(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3])
    store = cached(cache_kind, source, tmp_path, revalidate=False)
    values_of(store)
    source.forget()
    append(source._store, [4])
    assert values_of(again(store, revalidate=False)) == [0, 1, 2, 3]
    assert source.reads == 0


async def test_revalidate_true_asks_at_each_read(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, a__c__0=b"one", **{"a__zarr.json": b"{}"})
    store = cached(cache_kind, source, tmp_path, revalidate=True)
    assert await read(store, "a/c/0") == b"one"
    # same documents, other chunk: nothing but asking could tell
    await source._store.set("a/c/0", buffer(b"two"))
    for _ in range(2):
        source.forget()
        assert await read(store, "a/c/0") == b"two"
        assert await read(store, "a/c/0", RangeByteRequest(1, 3)) == b"wo"
        assert source.calls
    await source._store.delete("a/c/0")
    assert await read(store, "a/c/0") is None
    assert await read(store, "a/c/0", RangeByteRequest(1, 3)) is None
    # and so does everybody who does not ask
    assert await read(again(store), "a/c/0") is None


async def test_revalidate_after_some_seconds(cache_kind: str, tmp_path: Path, clock: Clock) -> None:
    source = memory_source()
    await fill(source, **{"zarr.json": b"{}"}, c=b"chunk")
    store = cached(cache_kind, source, tmp_path, revalidate=10)
    await read(store, "zarr.json")
    await read(store, "c")
    source.forget()
    clock.move(9, store)
    await read(store, "zarr.json")
    assert source.reads == 0
    await source._store.set("zarr.json", buffer(b'{"new": 1}'))
    clock.move(2, store)
    assert await read(store, "zarr.json") == b'{"new": 1}'
    await read(store, "zarr.json")
    await read(store, "c")
    assert [key for _, key in source.calls] == ["zarr.json"]


async def test_revalidate_seconds_hold_over_a_restart(tmp_path: Path, clock: Clock) -> None:
    source = local_source(tmp_path)
    await fill(source, **{"zarr.json": b"{}"})
    store = cached("directory", source, tmp_path, revalidate=100)
    await read(store, "zarr.json")
    source.forget()
    clock.move(50, store)
    await read(restarted(store, revalidate=100), "zarr.json")
    assert source.reads <= 1


def test_a_changed_array_loses_its_chunks_and_no_other_does(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    zarr.open_group(source, mode="a").create_array("y", data=np.arange(4), chunks=(2,))
    store = cached(cache_kind, source, tmp_path)
    values_of(store), values_of(store, "y")
    # what is written has other chunks, so that old ones beside new ones would show
    write_array(source, [9, 8, 7, 6], version, fill_value=5)
    fresh = again(store)
    source.forget()
    assert values_of(fresh) == [9, 8, 7, 6]
    assert values_of(fresh, "y") == [0, 1, 2, 3]
    prefix = {2: "", 3: "c/"}[version]
    assert source.count("get", f"x/{prefix}0") == source.count("get", f"x/{prefix}1") == 1
    assert source.count("get", f"y/{prefix}0") == 0
    # the store that was open all the time does not serve the old ones, either
    assert values_of(store) == [9, 8, 7, 6]


def test_changed_attributes_of_a_group_leave_what_is_beneath(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    store = cached(cache_kind, source, tmp_path)
    zarr.open_group(store, mode="r")
    values_of(store)
    zarr.open_group(source, mode="a").attrs["title"] = "new"
    fresh = again(store)
    source.forget()
    assert zarr.open_group(fresh, mode="r").attrs["title"] == "new"
    assert values_of(fresh) == [0, 1, 2, 3]
    prefix = {2: "", 3: "c/"}[version]
    assert source.count("get", f"x/{prefix}0") == 0


def open_consolidated(store: Store) -> dict[str, list[int]]:
    group = zarr.open_consolidated(store)
    return {name: array[:].tolist() for name, array in group.arrays()}


def test_consolidated_documents_are_compared_node_by_node(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    for name in ("y", "z"):
        zarr.open_group(source, mode="a").create_array(name, data=np.arange(4), chunks=(2,))
    zarr.consolidate_metadata(source)
    store = cached(cache_kind, source, tmp_path)
    assert open_consolidated(store) == {name: [0, 1, 2, 3] for name in "xyz"}
    write_array(source, [9, 8, 7, 6], version, fill_value=5)
    del zarr.open_group(source, mode="a")["z"]
    zarr.consolidate_metadata(source)
    fresh = again(store)
    source.forget()
    assert open_consolidated(fresh) == {"x": [9, 8, 7, 6], "y": [0, 1, 2, 3]}
    prefix = {2: "", 3: "c/"}[version]
    assert source.count("get", f"x/{prefix}0") == 1
    assert source.count("get", f"y/{prefix}0") == 0
    # the array that is gone has left nothing for one of its name
    assert not [key for key in kept(fresh) if key.startswith("z/")]


def test_opening_either_way_looks_like_no_change(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    zarr.consolidate_metadata(source)
    store = cached(cache_kind, source, tmp_path)
    assert open_consolidated(store) == {"x": [0, 1, 2, 3]}
    source.forget()
    assert values_of(again(store)) == [0, 1, 2, 3]
    assert open_consolidated(again(store)) == {"x": [0, 1, 2, 3]}
    prefix = {2: "", 3: "c/"}[version]
    assert source.count("get", f"x/{prefix}0") == source.count("get", f"x/{prefix}1") == 0


def test_a_deleted_array_is_gone_and_so_are_its_chunks(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    write_array(source, [0, 1, 2, 3], version)
    store = cached(cache_kind, source, tmp_path)
    values_of(store)
    del zarr.open_group(source, mode="a")["x"]
    fresh = again(store)
    assert "x" not in zarr.open_group(fresh, mode="r")
    assert not [key for key in kept(fresh) if key.startswith("x/")]
    # an array of its name with the same document: nothing of the first one's comes up again
    write_array(source, [0, 1, 2, 3], version)
    zarr.open_array(source, path="x", mode="a")[:] = [5, 6, 7, 8]
    assert values_of(again(store)) == [5, 6, 7, 8]


def test_a_writers_own_changes_drop_nothing_of_its_own(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    write_array(store, [0, 1, 2, 3])
    append(store, [4, 5])
    source.forget()
    assert values_of(again(store)) == [0, 1, 2, 3, 4, 5]
    assert not [key for _, key in source.calls if key.startswith("x/c/")]


async def test_a_document_that_is_no_json_fails_no_read(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    documents = [b"", b"\xff\xfe", b"[1, 2]", b'{"node_type": 5, "consolidated_metadata": 7}', json.dumps(3).encode()]
    for document in documents:
        await fill(source, **{"zarr.json": document, ".zmetadata": document})
        store = (
            cached(cache_kind, source, tmp_path) if cache_kind == "memory" else cached("directory", source, tmp_path)
        )
        assert await read(store, "zarr.json") == document
        assert await read(store, ".zmetadata") == document


# -- writes through the cache, as Zarr makes them


def test_an_overwritten_array_has_no_old_chunks(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    write_array(store, [1, 2, 3, 4], version)
    assert values_of(store) == [1, 2, 3, 4]
    group = zarr.open_group(store, mode="a")
    group.create_array("x", shape=4, dtype="i8", chunks=(2,), overwrite=True)
    assert values_of(store) == values_of(source) == [0, 0, 0, 0]


def test_a_member_deleted_from_its_group_is_gone(cache_kind: str, tmp_path: Path, version: int) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    write_array(store, [1, 2, 3, 4], version)
    group = zarr.open_group(store, mode="a")
    assert "x" in group
    del group["x"]
    assert "x" not in group
    assert not [key for key in kept(store) if key.startswith("x/")]


async def test_a_cleared_store_can_be_opened_for_new_data(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    await call(write_array, store, [1, 2, 3, 4])
    await store.clear()
    assert kept(store) == set()
    await call(zarr.open_group, store, mode="a")
    assert await source.exists("zarr.json")


async def test_what_was_deleted_behind_our_back_can_be_set_if_it_does_not_exist(
    cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    store = cached(cache_kind, source, tmp_path)
    await store.set("k", buffer(b"old"))
    await source._store.delete("k")
    await store.set_if_not_exists("k", buffer(b"new"))
    assert await read(store, "k") == await read(source, "k") == b"new"


# -- the default cache, and what else is given


async def test_without_any_argument_the_default_cache_is_used(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"1")
    with xzcache.config.set(directory=str(tmp_path / "default")):
        store = xzcache.CacheStore(source)
        assert await read(store, "k") == b"1"
        assert store.cache_info()["cache_directory"] == str(tmp_path / "default")
        assert store.max_size == 10 << 30
    assert kept(store) == {"k"}
    assert (tmp_path / "default").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", [str, Path, LocalStore, xzcache.LockedLocalStore])
async def test_a_path_and_a_plain_local_store_are_shared_directories(
    kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"1")
    store = xzcache.CacheStore(source, cache_store=kind(tmp_path / "cache"))
    await read(store, "k")
    assert store.cache_info()["cache_store_type"] == "LockedLocalStore"
    assert (tmp_path / "cache" / ".xzcache").is_dir()
    assert await call(neighbours.run, read_now, store, "k") == b"1"


@pytest.mark.parametrize("kind", [str, Path, lambda path: path.as_uri(), LocalStore])
async def test_a_source_may_be_a_path_a_url_or_a_store(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    await fill(LocalStore(tmp_path / "source"), k=b"1")
    stores = [xzcache.CacheStore(given, cache_store=tmp_path / "cache") for given in (kind(tmp_path / "source"),) * 2]
    assert [await read(store, "k") for store in stores] == [b"1", b"1"]
    # however it is given, it is the same source
    assert (
        stores[0].namespace
        == xzcache.CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache").namespace
    )


async def test_settings_come_from_the_configuration(cache_kind: str, tmp_path: Path) -> None:
    with xzcache.config.set(max_age_seconds=7, revalidate=False, cache_set_data=False):
        store = cached(cache_kind, memory_source(), tmp_path)
    assert (store.max_age_seconds, store.revalidate, store.cache_set_data) == (7, False, False)
    assert cached(cache_kind, store._store, tmp_path, max_age_seconds=8).max_age_seconds == 8


async def test_a_write_in_another_process_is_seen(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"old")
    store = cached("directory", source, tmp_path)
    assert await read(store, "k") == b"old"
    await call(neighbours.run, write_now, store, "k", b"new")
    assert await read(store, "k") == b"new"


async def test_a_text_of_the_store_says_what_it_is(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"12345")
    store = cached(cache_kind, source, tmp_path, max_size=1000)
    await read(store, "k")
    for part in ("CacheStore(", str(tmp_path / "source"), "cache_store="):
        assert part in repr(store)
    assert str(tmp_path / "source") in str(store)


async def test_a_cache_over_a_cache_reads_the_source_once(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, k=b"1")
    inner = xzcache.CacheStore(source, cache_store=tmp_path / "inner")
    outer = xzcache.CacheStore(inner, cache_store=MemoryStore())
    assert [await read(outer, "k") for _ in range(3)] == [b"1"] * 3
    assert source.reads == 1
    assert inner.cache_stats()["total_requests"] == 1


async def test_a_counting_source_counts() -> None:
    # what all the counts above rely on
    source = CountingStore(MemoryStore())
    await fill(source, k=b"1")
    assert await read(source, "k") == b"1"
    assert source.calls == [("set", "k"), ("get", "k")]
    assert source.reads == 1
