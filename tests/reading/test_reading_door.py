"""Reading through the door, with a cache that only the tests have: it knows a cache by the contract alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from clocks import Clock
from memory_cache import MemoryCache
from sources import CountingStore, between, buffer, by_ranges, fill, memory_source
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from xzcache import reading as room
from xzcache.reading import Freshness, NotCached, RangeReads, Reading, ReadThrough, Stats, WriteThrough

KEY = "x/c/0"
FOREVER: Any = "infinity"


def over(source: Store, freshness: Freshness | None = None, *, stats: Stats | None = None) -> ReadThrough:
    settings: Any = {"max_age": FOREVER, "missing_max_age": FOREVER, "timeout": 10}
    return ReadThrough(Reading(source, MemoryCache(), freshness or Freshness("open"), stats or Stats(), **settings))


async def read(reads: ReadThrough, key: str = KEY, part: Any = None) -> bytes | None:
    value = await reads.get(key, default_buffer_prototype(), part)
    return None if value is None else value.to_bytes()


async def of_one_chunk() -> CountingStore:
    source = memory_source()
    await fill(source, x__c__0=b"0123456789", **{"zarr.json": b"{}"})
    source.forget()
    return source


async def test_a_miss_a_hit_and_what_is_counted() -> None:
    source, stats = await of_one_chunk(), Stats()
    reads = over(source, stats=stats)
    prototype = default_buffer_prototype()
    with pytest.raises(NotCached):
        reads.get_blocking(KEY, prototype, None, stats.hit)
    assert reads.get_nowait(KEY, prototype) is None
    assert [await read(reads) for _ in range(3)] == [b"0123456789"] * 3
    counted = stats.as_dict()
    assert (counted["hits"], counted["misses"], source.reads) == (2, 1, 1)
    assert await reads.cached_size(KEY) == 10
    assert await read(reads, "x/c/1") is None
    assert await reads.is_known_missing("x/c/1")


async def test_documents_are_asked_for_by_the_policy(clock: Clock) -> None:
    for policy, expected in ((True, 4), (False, 1), ("open", 1), (100, 2)):
        source = await of_one_chunk()
        reads = over(source, Freshness(policy))
        for seconds in (0, 60, 60, 30):
            clock.steady += seconds
            assert await read(reads, "zarr.json") == b"{}"
        assert source.reads == expected, policy


async def test_a_copy_inherits_what_its_original_has_seen() -> None:
    source = await of_one_chunk()
    original = Freshness("open")
    reads = over(source, original)
    await read(reads, "zarr.json")
    seen = room.Seen(original.seen().packed)
    assert seen.state("zarr.json") is not None
    assert seen.state("x/zarr.json") is None
    copy = Freshness("open", inherited=seen)
    assert copy.vouches("zarr.json", b"{}")
    assert not Freshness("open", inherited=seen).vouches("zarr.json", b"{} ")


def test_what_is_read_by_nobody_of_zarr_is_read_for_no_write() -> None:
    assert room.is_read_for_a_write() is False


async def test_reads_ranges_and_writes_through_a_cache_of_the_tests() -> None:
    source = memory_source()
    await fill(source, x__c__0=b"0123456789", **{"zarr.json": b"{}"})
    source.forget()
    backend, freshness, prototype = MemoryCache(), Freshness(False), default_buffer_prototype()
    reading = Reading(
        source, backend, freshness, Stats(), max_age=FOREVER, missing_max_age=FOREVER, timeout=10, writable=True
    )
    reads, writes = ReadThrough(reading), WriteThrough(backend, freshness, passes=False)

    async def read(part: Any = None, key: str = KEY) -> bytes | None:
        value = await reads.get(key, prototype, part)
        return None if value is None else value.to_bytes()

    asked = set()
    for _ in range(2):
        assert await asyncio.gather(*(read(SuffixByteRequest(3)) for _ in range(5))) == [b"789"] * 5
        assert await read(RangeByteRequest(2, 4)) == b"23"
        assert await read(key="zarr.json") == b"{}"
        assert await read(key="x/c/1") is None
        asked.add(source.reads)
    # one more to find that the object is still the one of which another part is cached
    assert asked == {5}
    assert await asyncio.gather(*(read() for _ in range(5))) == [b"0123456789"] * 5
    assert await asyncio.gather(read(), read(RangeByteRequest(0, 1))) == [b"0123456789", b"0"]
    assert source.reads == 6
    value = buffer(b"9876543210")
    await writes.value(KEY, value, lambda: source.set(KEY, value), keep=True)
    assert await read(RangeByteRequest(2, 4)) == b"76"
    await writes.deletion(KEY, lambda: source.delete(KEY))
    assert await read() is None


@by_ranges
async def test_many_ranges_through_a_cache_of_the_tests() -> None:
    source = memory_source()
    await fill(source, x__c__0=b"0123456789")
    source.forget()
    reading = Reading(
        source, MemoryCache(), Freshness(False), Stats(), max_age=FOREVER, missing_max_age=FOREVER, timeout=10
    )
    ranges = RangeReads(ReadThrough(reading))
    limits = {"max_concurrency": 10, "max_gap_bytes": 0, "max_coalesced_bytes": 100}

    async def read(*pairs: tuple[int, int]) -> dict[int, bytes]:
        found = {}
        async for group in ranges.get(KEY, between(*pairs), default_buffer_prototype(), **limits):
            found.update({place: value.to_bytes() for place, value in group if value is not None})
        return found

    for _ in range(2):
        assert await read((1, 3), (5, 8)) == {0: b"12", 1: b"567"}
    assert await read((1, 2), (6, 8)) == {0: b"1", 1: b"67"}
    assert source.count("get_ranges") == 1
