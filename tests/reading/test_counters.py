"""Counters of reads: each read is counted once, whichever way it takes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sources import buffer, by_ranges, memory_source
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

import xzcache
from xzcache.reading import Stats

PROTOTYPE = default_buffer_prototype()
DATA = bytes(range(256)) * 20
KEY = "a/c/0"


def test_hits_of_several_threads_are_all_counted_while_the_counters_are_read() -> None:
    whole = Stats()
    stores = [Stats(whole), Stats(whole)]
    ready = threading.Barrier(5)

    def use(number: int) -> None:
        ready.wait(60)
        for _ in range(2000):
            stores[number % 2].hit(3, 0.5)
            stores[number % 2].miss(1, 0.25)

    with ThreadPoolExecutor(4) as threads:
        using = [threads.submit(use, number) for number in range(4)]
        ready.wait(60)
        seen = [0]
        while not all(each.done() for each in using):
            seen.append(whole.as_dict()["hits"])
        for each in using:
            each.result()
    assert seen == sorted(seen)
    for stats, count in ((stores[0], 4000), (stores[1], 4000), (whole, 8000)):
        counts = stats.as_dict()
        assert (counts["hits"], counts["misses"], counts["hit_rate"]) == (count, count, 0.5)
        assert (counts["bytes_from_cache"], counts["bytes_from_source"]) == (3 * count, count)
        assert (counts["seconds_from_cache"], counts["seconds_from_source"]) == (count * 0.5, count * 0.25)


async def ranges(store: xzcache.CacheStore, *wanted: tuple[int, int]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    requests = [RangeByteRequest(*span) for span in wanted]
    async for group in store.get_ranges(KEY, requests, prototype=PROTOTYPE, max_gap_bytes=0):
        assert isinstance(group, Sequence)
        found |= {place: value.to_bytes() for place, value in group if value is not None}
    return found


@by_ranges
async def test_byte_ranges_are_counted_once_each_whether_or_not_others_are_missing(tmp_path: Path) -> None:
    source = memory_source()
    await source.set(KEY, buffer(DATA))
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", revalidate=False)
    await ranges(store, (0, 10), (1000, 1010))
    store.cache_info()
    for _ in range(3):
        before = store.cache_stats()
        assert await ranges(store, (2, 8), (1000, 1010), (1000, 1003)) == {
            0: DATA[2:8],
            1: DATA[1000:1010],
            2: DATA[1000:1003],
        }
        after = store.cache_stats()
        assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (3, 0)
        assert after["bytes_from_cache"] - before["bytes_from_cache"] == 19
    before = store.cache_stats()
    assert len(await ranges(store, (0, 10), (3000, 3010))) == 2
    after = store.cache_stats()
    # a cached range of a state that cannot be told is requested again, together with the missing one
    assert (after["total_requests"] - before["total_requests"], after["misses"] - before["misses"]) == (2, 2)
    assert await ranges(store) == {}


async def test_a_byte_range_is_a_hit_of_the_piece_or_of_the_whole_object_that_holds_it(tmp_path: Path) -> None:
    source = memory_source()
    await source.set(KEY, buffer(DATA))
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", revalidate=False)
    cases: list[tuple[ByteRequest | None, list[tuple[ByteRequest | None, bytes]]]] = [
        (RangeByteRequest(10, 90), [(RangeByteRequest(20, 30), DATA[20:30]), (RangeByteRequest(10, 90), DATA[10:90])]),
        (SuffixByteRequest(20), [(SuffixByteRequest(20), DATA[-20:]), (SuffixByteRequest(7), DATA[-7:])]),
        (None, [(None, DATA), (RangeByteRequest(20, 30), DATA[20:30]), (SuffixByteRequest(7), DATA[-7:])]),
    ]
    for fetched, hits in cases:
        await store.get(KEY, PROTOTYPE, fetched)
        store.cache_info()
        for part, expected in hits * 3:
            before = store.cache_stats()
            value = await store.get(KEY, PROTOTYPE, part)
            assert value is not None
            assert value.to_bytes() == expected
            after = store.cache_stats()
            assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (1, 0)
            assert after["bytes_from_cache"] - before["bytes_from_cache"] == len(expected)
