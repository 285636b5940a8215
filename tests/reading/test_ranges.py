"""Byte ranges and shards: cached like whole objects, asked for as Zarr itself would, and never the wrong bytes."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sources
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import Team, audit, barrier
from servers import S3Server, nobody, obstores_words, s3_server, tidy
from sources import (
    again,
    between,
    buffer,
    by_ranges,
    cached,
    local_source,
    memory_source,
    neighbours,
    read,
    read_now,
    write_now,
)
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, MemoryStore

import xzcache
from xzcache.model.entry import END, Entry
from xzcache.model.metadata import is_document
from xzcache.model.spans import IntervalSet, Span

__all__ = ["nobody", "tidy"]

# of the tests before, which older versions of pytest-asyncio leave to the garbage collector, and Hypothesis calls that
loops_of_others = pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES += ["zarr.core.codec_pipeline.FusedCodecPipeline", "xzcache.pipeline.CachePipeline"]
DATA = bytes(random.Random(0).randbytes(5000))
KEY = "a/c/0"


class Asked(NamedTuple):
    requests: int
    bytes: int
    distinct: int
    """Bytes of which each counts once, however often it was sent."""


class Tallying(LocalStore):
    """A store that notes its answers to requests for chunks in a file that all processes add to."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return self._recorded(key, byte_range, await super().get(key, prototype, byte_range))

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        return self._recorded(key, options.get("byte_range"), super().get_sync(key, **options))

    def _recorded(self, key: str, byte_range: ByteRequest | None, value: Buffer | None) -> Buffer | None:
        if not is_document(key):
            size = 0 if value is None else len(value)
            first = getattr(byte_range, "start", getattr(byte_range, "offset", 0))
            if isinstance(byte_range, SuffixByteRequest) and value is not None:
                first = os.path.getsize(self.root / key) - size
            with open(f"{self.root}.log", "ab") as log:
                log.write(f"{first} {size} {key}\n".encode())
        return value

    def asked(self) -> Asked:
        """What was asked for since this was last called."""
        log = Path(f"{self.root}.log")
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        of: dict[str, list[Span]] = {}
        for line in lines:
            first, size, key = line.split(" ", 2)
            of.setdefault(key, []).append((int(first), int(first) + int(size)))
        sizes = [last - first for spans in of.values() for first, last in spans]
        distinct = sum(last - first for spans in of.values() for first, last in IntervalSet(spans).spans)
        return Asked(len(lines), sum(sizes), distinct)


def age(source: Tallying) -> None:
    """Let files be as old as most are: what was written just now has no state that can be told from the next."""
    for place in Path(source.root).rglob("*"):
        os.utime(place, (1e9, 1e9))


async def ranges(store: Store, wanted: Sequence[ByteRequest | None], key: str = KEY, **limits: int) -> list[bytes]:
    return await sources.ranges(store, wanted, key, **limits)


def checked(store: xzcache.CacheStore) -> None:
    """Leave the cache, and compare its index with its files."""
    directory = store._reads.backend.directory
    directory.close()
    neighbours.run(leave, directory.root)
    audit(directory.root)


def leave(root: str) -> None:
    # stores that only the garbage collector finds use the directory still, and join it again
    gc.collect()
    xzcache.LockedLocalStore(root).directory.close()


async def opened(kind: str, tmp_path: Path, **options: Any) -> tuple[Any, xzcache.CacheStore]:
    source = memory_source()
    await source._store.set(KEY, buffer(DATA))
    return source, cached(kind, source, tmp_path, **options)


# -- ranges by themselves


async def test_a_range_within_a_cached_one_is_not_asked_for(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    assert await read(store, KEY, RangeByteRequest(100, 500)) == DATA[100:500]
    assert await read(store, KEY, SuffixByteRequest(80)) == DATA[-80:]
    source.forget()
    assert await read(store, KEY, RangeByteRequest(200, 300)) == DATA[200:300]
    assert await read(store, KEY, SuffixByteRequest(30)) == DATA[-30:]
    assert source.reads == 0


async def test_a_whole_entry_serves_any_range(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    await read(store, KEY)
    source.forget()
    for wanted, expected in [
        (RangeByteRequest(1, 9), DATA[1:9]),
        (OffsetByteRequest(4990), DATA[4990:]),
        (SuffixByteRequest(3), DATA[-3:]),
        (RangeByteRequest(4990, 9000), DATA[4990:]),
    ]:
        assert await read(store, KEY, wanted) == expected
    assert source.reads == 0


@by_ranges
async def test_a_whole_object_takes_the_place_of_its_pieces(tmp_path: Path) -> None:
    """What is missing alone is asked for, nothing is stored twice, and who reads ranges goes on."""
    source = Tallying(tmp_path / "source")
    data = random.Random(1).randbytes(300_000)
    await source.set(KEY, buffer(data))
    os.utime(tmp_path / "source" / KEY, (1e9, 1e9))
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    await ranges(store, between((20_000, 120_000), (180_000, 200_000)), max_gap_bytes=0)
    assert source.asked().bytes == 120_000
    assert await read(store, KEY) == data
    # the last byte that is there tells where the object ends
    assert source.asked() == (3, 300_000 - 120_000 + 1, 300_000 - 120_000 + 1)
    assert store.cache_info()["current_size"] == 300_000
    assert store.cache_info()["cached_keys"] == 1
    assert await ranges(store, between((5, 60), (119_000, 121_000))) == [data[5:60], data[119_000:121_000]]
    assert source.asked().requests == 0
    checked(store)


@by_ranges
async def test_pieces_of_another_state_are_no_part_of_the_whole(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    before, after = (random.Random(number).randbytes(300_000) for number in (1, 2))
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    for data, at in ((before, 1e9), (after, 1e9 + 5)):
        await source.set(KEY, buffer(data))
        os.utime(tmp_path / "source" / KEY, (at, at))
        if data is before:
            await ranges(store, between((20_000, 120_000)))
    assert await read(store, KEY) == after
    assert await ranges(store, between((20_000, 120_000))) == [after[20_000:120_000]]
    checked(store)


@by_ranges
@pytest.mark.parametrize("fits", [True, False])
async def test_an_object_that_is_read_in_many_pieces_is_promoted(fits: bool, tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    data = random.Random(1).randbytes(300_000)
    await source.set(KEY, buffer(data))
    age(source)
    with xzcache.config.set(promote_above="50 kB"):
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", max_size="1 MB" if fits else "200 kB")
    spans = [(at, at + 20_000) for at in range(0, 300_000, 25_000)]
    for span in spans:
        assert await ranges(store, between(span)) == [data[slice(*span)]]
    # the third is above, and two requests for what the first two lack; an object that cannot stay is promoted once
    assert source.asked().requests == (4 if fits else len(spans) + 1)
    checked(store)


@by_ranges
async def test_a_failure_to_fetch_the_whole_comes_as_one_of_ranges(tmp_path: Path) -> None:
    """In a group, as `Store.get_ranges` has it, with the source's own exception."""
    source = memory_source()
    await source._store.set(KEY, buffer(DATA))
    with xzcache.config.set(promote_above=0):
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    source.errors["get"] = OSError("the line is down")
    with pytest.raises(BaseExceptionGroup) as caught:
        await ranges(store, between((0, 10)))
    assert caught.group_contains(OSError, match="the line is down")


@by_ranges
async def test_an_absent_object_is_not_promoted(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    with xzcache.config.set(promote_above=0):
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    with pytest.raises(BaseExceptionGroup) as caught:
        await ranges(store, between((0, 10)))
    assert caught.group_contains(FileNotFoundError)


@by_ranges
async def test_overlapping_ranges_are_stored_once(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    await source.set(KEY, buffer(DATA))
    age(source)
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    for pair in [(0, 100), (50, 150), (120, 300), (0, 300), (20, 280)]:
        assert await ranges(store, between(pair)) == [DATA[slice(*pair)]]
    assert store.cache_info()["current_size"] == 300
    assert source.asked().requests == 3
    checked(store)


@by_ranges
@loops_of_others
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["directory", "memory"]),
    calls=st.lists(
        st.lists(
            st.one_of(
                st.tuples(st.integers(0, 5200), st.integers(0, 900)).map(lambda p: RangeByteRequest(p[0], p[0] + p[1])),
                st.integers(1, 6000).map(SuffixByteRequest),
                st.integers(0, 5000).map(OffsetByteRequest),
                st.none(),
            ),
            max_size=5,
        ),
        max_size=5,
    ),
    limits=st.fixed_dictionaries({"max_gap_bytes": st.integers(0, 400), "max_coalesced_bytes": st.integers(1, 2000)}),
    bound=st.sampled_from([None, 700, 4000]),
)
def test_ranges_are_those_of_the_source(
    kind: str, calls: list[list[ByteRequest | None]], limits: dict[str, int], bound: int | None, tmp_path_factory: Any
) -> None:
    async def compare() -> None:
        source, store = await opened(kind, tmp_path_factory.mktemp("x"), max_size=bound)
        for wanted in calls:
            assert await ranges(store, wanted, **limits) == await ranges(source._store, wanted, **limits)
            if bound is not None:
                assert store.cache_info()["total_size"] <= bound

    asyncio.run(compare())


@by_ranges
async def test_a_range_twice_in_a_call_and_ranges_of_nothing(cache_kind: str, tmp_path: Path) -> None:
    _, store = await opened(cache_kind, tmp_path)
    wanted = between((5, 9), (5, 9), (7, 7), (5000, 5001), (0, 1))
    assert await ranges(store, wanted) == [DATA[5:9], DATA[5:9], b"", b"", DATA[:1]]


@by_ranges
async def test_an_absent_object_is_as_with_zarr(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    for each in (store, source):
        with pytest.raises(BaseExceptionGroup) as raised:
            await ranges(each, between((0, 5), (100, 200)), key="a/c/9")
        assert raised.value.split(FileNotFoundError)[1] is None


@by_ranges
async def test_a_failure_of_the_source_is_its_own_and_holds_nobody_up(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    source.errors["get_ranges"] = source.errors["get"] = error = ConnectionError("down")
    with pytest.raises(BaseExceptionGroup) as raised:
        await ranges(store, between((0, 5), (100, 200)))
    assert error in raised.value.exceptions
    source.errors.clear()
    assert await ranges(store, between((0, 5), (100, 200))) == [DATA[:5], DATA[100:200]]


@by_ranges
async def test_who_is_cancelled_holds_nobody_up(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    wanted = between((0, 5), (100, 200))
    gate = source.hold("get", KEY, after=False)
    leader = asyncio.create_task(ranges(store, wanted[:1]))
    await gate.arrived()
    follower = asyncio.create_task(ranges(store, wanted))
    while source.count("get") + source.count("get_ranges") < 2:
        await asyncio.sleep(0)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    source.let_go("get", KEY)
    assert await asyncio.wait_for(follower, 20) == [DATA[:5], DATA[100:200]]


@by_ranges
async def test_many_tasks_ask_once(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    wanted = between((0, 50), (3000, 3100))
    found = await asyncio.gather(*(ranges(store, wanted, max_gap_bytes=0) for _ in range(16)))
    assert found == [[DATA[:50], DATA[3000:3100]]] * 16
    assert source.count("get_ranges") == 1


async def test_a_write_drops_every_piece(cache_kind: str, tmp_path: Path) -> None:
    _, store = await opened(cache_kind, tmp_path, cache_set_data=False)
    for pair in [(0, 100), (200, 300)]:
        await read(store, KEY, RangeByteRequest(*pair))
    new = DATA[::-1]
    await store.set(KEY, buffer(new))
    for pair in [(0, 100), (10, 20), (200, 300), (210, 220)]:
        assert await read(store, KEY, RangeByteRequest(*pair)) == new[slice(*pair)]


@by_ranges
async def test_damaged_and_truncated_pieces_are_fetched_again(tmp_path: Path) -> None:
    source, store = await opened("directory", tmp_path)
    wanted = between((0, 50), (3000, 3100))
    await ranges(store, wanted, max_gap_bytes=0)
    first, second = sorted(p for p in (tmp_path / "cache/.xzcache/ranges").rglob("*_*") if p.is_file())
    first.write_bytes(bytes(first.stat().st_size))
    second.write_bytes(second.read_bytes()[:-1])
    source.forget()
    assert await ranges(store, wanted, max_gap_bytes=0) == [DATA[:50], DATA[3000:3100]]
    assert source.reads == 1
    # and it is mended
    source.forget()
    assert await ranges(store, wanted, max_gap_bytes=0) == [DATA[:50], DATA[3000:3100]]
    assert source.reads == 0


# -- shards


LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"compressors": None},
    "zstd": {"compressors": ZstdCodec()},
    "blosc": {"compressors": BloscCodec()},
    "crc32c": {"compressors": Crc32cCodec()},
    "index first": {"compressors": ZstdCodec(), "index": "start"},
}


def make(store: Store, values: np.ndarray[Any, Any], layout: str, *, chunk: int = 16, shard: int = 64) -> None:
    options = {**LAYOUTS[layout], "shards": (shard, shard)}
    if (index := options.pop("index", None)) is not None:
        options["shards"] = {"shape": (shard, shard), "index_location": index}
    zarr.create_array(
        store,
        name="a",
        overwrite=True,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, chunk),
        fill_value=0,
        **options,
    )[:] = values


def some(side: int = 256) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).random((side, side), dtype="f4")
    values[:40, 70:] = 0  # chunks that are not there, and a shard
    return values


def array(store: Store, path: str) -> zarr.Array[Any]:
    with zarr.config.set({"codec_pipeline.path": path}):
        return zarr.open_array(store, path="a", mode="r")


BOXES = [(slice(0, 20), slice(0, 20)), (slice(10, 100), slice(0, 64)), (slice(100, 200), slice(50, 250))]


def show(source: Tallying, cache: Path, pipeline: str, boxes: Iterable[Any]) -> list[bytes]:
    store = xzcache.CacheStore(source, cache_store=cache)
    return [array(store, pipeline)[box].tobytes() for box in boxes]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_is_read_in_no_more_requests_than_without_and_then_never(
    layout: str, pipeline: str, tmp_path: Path
) -> None:
    values = some()
    source = Tallying(tmp_path / "source")
    make(source, values, layout)
    age(source)
    cache = tmp_path / "cache"
    for box in BOXES:
        plain = array(source, pipeline)
        source.asked()
        plain[box]
        without = source.asked()
        assert without.requests
        assert show(source, cache, pipeline, [box]) == [values[box].tobytes()]
        through = source.asked()
        assert through.requests <= without.requests
        assert through.bytes <= without.bytes
    # whatever overlaps with what was read
    inside = [(slice(12, 90), slice(3, 50)), (slice(150, 151), slice(60, 240)), (3, slice(0, 20)), *BOXES]
    expected = [values[box].tobytes() for box in inside]
    assert show(source, cache, pipeline, inside) == expected
    assert neighbours.run(show, source, cache, pipeline, inside) == expected
    assert source.asked().requests == 0


def test_format_2_and_its_ranges(tmp_path: Path) -> None:
    values = some(64)
    source = Tallying(tmp_path / "source")
    zarr.create_array(source, name="a", shape=values.shape, dtype="f4", chunks=(16, 16), zarr_format=2)[:] = values
    for _ in range(2):
        assert show(source, tmp_path / "cache", PIPELINES[0], [(slice(3, 40), slice(0, 64))]) == [
            values[3:40].tobytes()
        ]
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    source.asked()
    assert asyncio.run(read(store, "a/0.0", RangeByteRequest(0, 16))) == asyncio.run(
        read(source, "a/0.0", RangeByteRequest(0, 16))
    )
    assert source.asked().requests == 1  # by ourselves


def boxes_of(
    link: Any, source: Tallying, cache: str, seed: int, side: int, largest: int, count: int
) -> list[tuple[int, ...]]:
    """Read random boxes at the same time as others; the boxes."""
    draw = random.Random(seed)
    store = xzcache.CacheStore(source, cache_store=cache, max_size=None)
    values = array(store, PIPELINES[0])
    barrier(link)
    boxes = []
    for _ in range(count):
        row, column = draw.randrange(side), draw.randrange(side)
        box = (
            row,
            min(side, row + draw.randrange(1, largest)),
            column,
            min(side, column + draw.randrange(1, largest)),
        )
        found = values[box[0] : box[1], box[2] : box[3]]
        rows = np.arange(box[0], box[1], dtype="u4")[:, None] * np.uint32(side)
        np.testing.assert_array_equal(found, rows + np.arange(box[2], box[3], dtype="u4"))
        boxes.append(box)
    return boxes


@by_ranges
@pytest.mark.parametrize(
    ("largest", "most"),
    # a whole object of a local source has no validator, so parts with one are not joined with it but read again
    [(0.4, 1.0), (2.0, 1.2)],
    ids=["in parts", "in parts and whole"],
)
def test_four_processes_read_random_boxes(largest: float, most: float, tmp_path: Path) -> None:
    """Of shards that all of them read at the same time: every value right, and no byte fetched twice without need."""
    side, chunk, shard = 2048, 128, 512
    source = Tallying(tmp_path / "source")
    make(source, np.arange(side * side, dtype="u4").reshape(side, side), "raw", chunk=chunk, shard=shard)
    age(source)
    with Team() as team:
        for seed in range(4):
            team.start(boxes_of, source, str(tmp_path / "cache"), seed, side, int(shard * largest), 60)
        source.asked()
        team.go()
        boxes = [box for found in team.results() for box in found]
    through = source.asked()
    plain = array(source, PIPELINES[0])
    for top, bottom, left, right in boxes:
        plain[top:bottom, left:right]
    without = source.asked()
    print(f"{through.bytes / through.distinct:.3f} of what was asked for at all, {through.bytes / without.bytes:.3f}")
    assert through.bytes <= most * through.distinct
    assert through.distinct <= without.distinct


class Held(Tallying):
    """Answers no request for a chunk before it is let go."""

    gate: asyncio.Event
    held = 0

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if not is_document(key):
            self.held += 1
            await self.gate.wait()
        return await super().get(key, prototype, byte_range)


LONG = bytes(random.Random(1).randbytes(200_000))
READERS: dict[str, sources.Part] = {
    "whole": None,
    "parts": between((10_000, 60_000), (100_000, 150_000)),
    "other parts": between((50_000, 110_000), (199_000, 199_500)),
    "range": RangeByteRequest(20_000, 120_000),
    "rest": OffsetByteRequest(90_000),
}


@by_ranges
@pytest.mark.parametrize("order", [*READERS, "backwards"])
async def test_readers_of_parts_and_of_the_whole_request_no_byte_twice(
    order: str, cache_kind: str, tmp_path: Path
) -> None:
    source = Held(tmp_path / "source")
    await source.set(KEY, buffer(LONG))
    age(source)
    store = cached(cache_kind, source, tmp_path)
    source.gate = asyncio.Event()
    source.gate.set()
    # the directory is open from here on
    await read(store, "a/c/1")
    source.gate.clear()
    source.held = 0
    source.asked()
    names = [*reversed(READERS)] if order == "backwards" else sorted(READERS, key=lambda name: name != order)
    tasks = {}
    for name in names:
        part = READERS[name]
        wanted = ranges(store, part, max_gap_bytes=0) if isinstance(part, list) else read(store, KEY, part)
        tasks[name] = asyncio.create_task(wanted)
        for _ in range(200):
            await asyncio.sleep(0)
        # the later ones find the first one waiting
        assert source.held > 0
    source.gate.set()
    found = {name: await task for name, task in tasks.items()}
    assert found["whole"] == LONG
    assert found["range"] == LONG[20_000:120_000]
    assert found["rest"] == LONG[90_000:]
    for name in ("parts", "other parts"):
        assert found[name] == [LONG[part.start : part.end] for part in READERS[name]]  # type: ignore[union-attr]
    asked = source.asked()
    assert asked.distinct == len(LONG)
    # of the last known byte, the rest is asked for with it, as a request beyond the end is an error
    assert asked.bytes <= asked.distinct + 2
    for name, part in READERS.items():
        again = await (ranges(store, part) if isinstance(part, list) else read(store, KEY, part))
        assert again == found[name]
    assert source.asked().requests == 0


class Written(sources.CountingStore):
    """Its object is written while it is read, by way of a cache, so many times at most."""

    writer: Store
    times = 1_000
    written = 0

    async def write(self) -> None:
        if self.written < self.times:
            self.written += 1
            await self.writer.set(KEY, buffer(str(self.written % 10).encode() * 5000))


class WrittenBetween(Written):
    """After the first range of several is answered."""

    async def get_ranges(self, key: str, byte_ranges: Any, **options: Any) -> Any:
        self._note("get_ranges", key)
        for at, byte_range in enumerate(byte_ranges):
            if at == 1:
                await self.write()
            yield [(at, await self._store.get(key, options["prototype"], byte_range))]


@by_ranges
@pytest.mark.parametrize("times", [1, 100])
async def test_ranges_of_an_object_that_is_written_between_them_are_of_one_state(
    times: int, cache_kind: str, tmp_path: Path
) -> None:
    """The source has no validators: that it was written is known by the cache alone."""
    source = WrittenBetween(MemoryStore())
    await source.set(KEY, buffer(b"0" * 5000))
    store = cached(cache_kind, source, tmp_path)
    source.writer, source.times = again(store), times
    for _ in range(3):
        found = await ranges(store, between((0, 10), (2000, 2010), (4000, 4010)), max_gap_bytes=0)
        assert len(set(b"".join(found))) == 1
    assert source.written > 0


@by_ranges
async def test_a_range_over_cached_pieces_requests_only_the_rest(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    await source.set(KEY, buffer(LONG))
    age(source)
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    await ranges(store, between((10_000, 60_000), (100_000, 150_000)), max_gap_bytes=0)
    source.asked()
    assert await read(store, KEY, RangeByteRequest(20_000, 120_000)) == LONG[20_000:120_000]
    assert source.asked().bytes == 40_000


class HeldApart(sources.CountingStore):
    """Holds back the second request for several ranges."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.second = sources.Gate(after=False)

    async def get_ranges(self, key: str, byte_ranges: Any, **options: Any) -> Any:
        if self.count("get_ranges"):
            await self.second.pass_through()
        async for group in super().get_ranges(key, byte_ranges, **options):
            yield group


@by_ranges
async def test_ranges_beyond_the_end_that_another_fetch_gives_meanwhile(cache_kind: str, tmp_path: Path) -> None:
    source = HeldApart(MemoryStore())
    await source.set(KEY, buffer(b"1"))
    store = cached(cache_kind, source, tmp_path)
    gate = source.hold("get", KEY)
    first = asyncio.create_task(read(store, KEY, RangeByteRequest(0, 100)))
    await gate.arrived()
    # two answers that are too short, one of which does not show where its ranges end
    wanted = between((50, 60), (200, 210), (205, 230), (400, 410))
    other = asyncio.create_task(ranges(store, wanted, max_gap_bytes=0))
    await source.second.arrived()
    source.let_go("get", KEY)
    assert await first == b"1"
    for _ in range(200):
        # the other reader learns where the object ends
        await asyncio.sleep(0)
    source.second.open()
    assert await other == [b""] * 4


class WrittenEachTime(Written):
    """After each request."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        await self.write()
        return value


@by_ranges
async def test_ranges_of_an_object_that_is_always_written_are_read_in_one_request_at_last(
    cache_kind: str, tmp_path: Path
) -> None:
    source = WrittenEachTime(MemoryStore())
    await source.set(KEY, buffer(b"0" * 5000))
    store = cached(cache_kind, source, tmp_path)
    source.writer = again(store)
    wanted = [*between((0, 10), (2000, 2010)), SuffixByteRequest(10), OffsetByteRequest(4990)]
    found = await ranges(store, wanted)
    assert [len(data) for data in found] == [10, 10, 10, 10]
    assert len(set(b"".join(found))) == 1


class WrittenAtSecondLook(sources.CountingStore):
    """A cache store that is asked for the same object twice; in between, the object is written."""

    async def write(self) -> None:
        """Write the object, by way of the cache."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if self.count("get", key) == 1:
            await self.write()
        return await super().get(key, prototype, byte_range)


@by_ranges
async def test_ranges_found_before_a_write_are_not_joined_with_later_ones(tmp_path: Path) -> None:
    source = MemoryStore()
    await source.set(KEY, buffer(b"0" * 5000))
    cache = WrittenAtSecondLook(MemoryStore())
    store = xzcache.CacheStore(source, cache_store=cache, cache_set_data=False)
    await read(store, KEY)
    cache.forget()
    cache.write = lambda: store.set(KEY, buffer(b"1" * 5000))  # type: ignore[method-assign]
    found = await ranges(store, between((0, 10), (2000, 2010)))
    assert found == [b"1" * 10] * 2


class Asking(Tallying):
    """Tells of each request for a chunk, and waits for an answer."""

    link: Any

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if not is_document(key):
            self.link.send("asked")
            assert self.link.recv() == "go"
        return await super().get(key, prototype, byte_range)


def fetch_whole(link: Any, root: str, cache: str) -> int:
    source = Asking(root)
    source.link = link
    return len(read_now(xzcache.CacheStore(source, cache_store=cache, namespace="n"), KEY) or b"")


@by_ranges
async def test_a_reader_knows_the_state_of_what_another_process_fetched_for_its_leader(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    await source.set(KEY, buffer(LONG))
    age(source)
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")
    await ranges(store, between((0, 20_000)))
    source.asked()
    with Team() as team:
        child = team.start(fetch_whole, str(source.root), str(tmp_path / "cache"))
        child.hear("asked")
        leader = asyncio.create_task(read(store, KEY, RangeByteRequest(50_000, 60_000)))
        for _ in range(200):
            await asyncio.sleep(0)
        other = asyncio.create_task(ranges(store, between((0, 10), (50_010, 50_020))))
        for _ in range(200):
            await asyncio.sleep(0)
        child.send("go")
        assert await leader == LONG[50_000:60_000]
        assert await other == [LONG[:10], LONG[50_010:50_020]]
        assert child.result() == len(LONG)
    assert source.asked().requests == 1


# -- what is not there


def sparse(source: Tallying, chunks: int, present: int) -> np.ndarray[Any, Any]:
    values = np.zeros((chunks, 4), "f4")
    values[:: chunks // present] = 1
    zarr.create_array(source, name="a", shape=values.shape, dtype="f4", chunks=(1, 4), fill_value=0)[:] = values
    return values


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_absent_chunks_are_asked_for_once(pipeline: str, tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    values = sparse(source, 400, 4)
    source.asked()
    assert show(source, tmp_path / "cache", pipeline, [...]) == [values.tobytes()]
    assert source.asked().requests == 400
    assert show(source, tmp_path / "cache", pipeline, [...]) == [values.tobytes()]
    assert neighbours.run(show, source, tmp_path / "cache", pipeline, [...]) == [values.tobytes()]
    assert source.asked().requests == 0
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    # the chunks that are there, and the document
    assert store.cache_info()["cached_keys"] == 5
    checked(store)


def put(source: Tallying, cache: Path, key: str, data: bytes) -> None:
    asyncio.run(xzcache.CacheStore(source, cache_store=cache).set(key, buffer(data)))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_a_write_ends_an_absence(elsewhere: bool, tmp_path: Path) -> None:
    source, cache = Tallying(tmp_path / "source"), tmp_path / "cache"
    values = sparse(source, 20, 2)
    show(source, cache, PIPELINES[0], [...])
    chunk = asyncio.run(read(source, "a/c/0/0")) or b""
    (neighbours.run if elsewhere else lambda f, *args: f(*args))(put, source, cache, "a/c/5/0", chunk)
    values[5] = 1
    assert show(source, cache, PIPELINES[0], [...]) == [values.tobytes()]


PARTS = [None, RangeByteRequest(1, 3), pytest.param(between((1, 2), (2, 3)), marks=by_ranges)]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize("part", PARTS, ids=["whole", "range", "ranges"])
async def test_an_absence_that_was_asked_for_before_a_write_does_not_outlive_it(
    part: Any, elsewhere: bool, tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    store = cached("directory", source, tmp_path)
    gate = source.hold("get", KEY)
    reading = asyncio.create_task(read(store, KEY, part))
    await gate.arrived()
    if elsewhere:
        await asyncio.to_thread(neighbours.run, write_now, store, KEY, b"there")
    else:
        await store.set(KEY, buffer(b"there"))
    # whoever asks from now on does not get what the earlier reader waits for
    asking = asyncio.create_task(read(store, KEY, part))
    source.let_go("get", KEY)
    assert await reading is None
    for found in (await asking, await read(store, KEY, part), await asyncio.to_thread(look_there, store, part)):
        assert found == (b"there" if part is None else b"he")


def look_there(store: xzcache.CacheStore, part: Any) -> bytes | None:
    found: bytes | None = neighbours.run(read_now, store, KEY, part)
    return found


@pytest.mark.parametrize("part", PARTS, ids=["whole", "range", "ranges"])
async def test_an_absence_that_was_found_during_a_write_does_not_outlive_it(
    part: Any, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source() if cache_kind == "memory" else local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path)
    gate = source.hold("set", KEY, after=False)
    writing = asyncio.create_task(store.set(KEY, buffer(b"there")))
    await gate.arrived()
    assert await read(store, KEY, part) is None
    source.let_go("set", KEY)
    await writing
    source.forget()
    assert await read(store, KEY, part) == (b"there" if part is None else b"he")
    if cache_kind == "directory":
        assert await asyncio.to_thread(look_there, store, part) == (b"there" if part is None else b"he")


@pytest.mark.parametrize("part", PARTS, ids=["whole", "range", "ranges"])
async def test_what_is_deleted_elsewhere_while_it_is_fetched_is_absent_then(part: Any, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source._store.set(KEY, buffer(b"there"))
    store = cached("directory", source, tmp_path)
    gate = source.hold("get", KEY)
    reading = asyncio.create_task(read(store, KEY, part))
    await gate.arrived()
    await asyncio.to_thread(neighbours.run, remove_now, store)
    source.let_go("get", KEY)
    assert await reading == (b"there" if part is None else b"he")
    assert await read(store, KEY, part) is None
    # and is there again as soon as it is written
    await asyncio.to_thread(neighbours.run, write_now, store, KEY, b"again")
    assert await read(store, KEY, part) == (b"again" if part is None else b"ga")


def remove_now(store: xzcache.CacheStore) -> None:
    asyncio.run(store.delete(KEY))


async def test_absences_have_an_age_and_are_of_chunks_only(
    cache_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store = await opened(cache_kind, tmp_path, missing_max_age_seconds=30)
    for key, times in [("a/c/7", 1), ("a/notes.txt", 3)]:
        source.forget()
        for _ in range(3):
            assert await read(store, key) is None
        assert source.count("get", key) == times
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 31)
    source.forget()
    assert await read(store, "a/c/7") is None
    assert source.count("get", "a/c/7") == 1


async def test_zero_remembers_no_absence(cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path, missing_max_age_seconds=0)
    for _ in range(3):
        assert await read(store, "a/c/7") is None
    assert source.count("get", "a/c/7") == 3


def test_what_is_at_hand_is_asked_again(tmp_path: Path) -> None:
    source = MemoryStore()
    store = xzcache.CacheStore(source, cache_store=tmp_path)
    assert asyncio.run(read(store, KEY)) is None
    asyncio.run(source.set(KEY, buffer(b"there")))
    assert asyncio.run(read(store, KEY)) == b"there"


# -- a source that tells states apart


BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, tidy: None) -> Any:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / BUCKET).mkdir()
    with s3_server(directory) as server:
        yield server


def through(s3: S3Server, cache: Path, **options: Any) -> xzcache.CacheStore:
    url, words = f"s3://{BUCKET}/x.zarr", obstores_words(s3)
    return xzcache.CacheStore(url, cache_store=cache, storage_options=words, upstream="obstore", **options)


@by_ranges
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("layout", ["raw", "index first"])
def test_a_real_server_is_asked_no_more_than_without(s3: S3Server, layout: str, tmp_path: Path) -> None:
    values = some(128)
    writer = s3.store(BUCKET, "x.zarr")
    make(writer, values, layout)
    box = (slice(5, 60), slice(20, 90))
    plain = array(s3.store(BUCKET, "x.zarr"), PIPELINES[0])
    s3.reset()
    plain[box]
    without = s3.counts()
    assert without.requests
    for requests, size in [(without.requests, without.bytes), (0, 0)]:
        opened = array(through(s3, tmp_path), PIPELINES[0])
        s3.reset()
        np.testing.assert_array_equal(opened[box], values[box])
        assert s3.counts().requests <= requests
        assert s3.counts().bytes <= size


@by_ranges
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_shard_that_was_replaced_never_gives_wrong_values(s3: S3Server, pipeline: str, tmp_path: Path) -> None:
    """The index that is cached is that of the old shard; what is not cached would come from the new one."""
    writer = s3.store(BUCKET, "x.zarr")
    values = some(64)
    make(writer, values, "zstd")
    reader = array(through(s3, tmp_path), pipeline)
    np.testing.assert_array_equal(reader[:16, :16], values[:16, :16])
    new = values[::-1].copy()
    # the document stays as it is
    zarr.open_array(writer, path="a", mode="r+")[:] = new
    try:
        found = reader[40:, 40:]
    except (OSError, BaseExceptionGroup) as error:
        replaced = error if isinstance(error, OSError) else error.subgroup(OSError).exceptions[0]
        assert replaced.errno == errno.ESTALE
        assert not pipeline.startswith("xzcache")
        found = reader[40:, 40:]
    np.testing.assert_array_equal(found, new[40:, 40:])
    np.testing.assert_array_equal(reader[:], new)


@pytest.mark.parametrize(
    ("first", "second"), [((0, 50), (100, 150)), ((0, END), (100, 150)), ((100, 150), (0, END)), ((-20, END), (5, 9))]
)
async def test_parts_of_two_states_are_not_stored_side_by_side(
    first: tuple[int, int], second: tuple[int, int], cache_kind: str, tmp_path: Path
) -> None:
    """Of two fetches that began when nothing was there, one may have met a later state of the object."""
    _, store = await opened(cache_kind, tmp_path)
    backend = store._reads.backend
    await backend.prepare()
    one, other = (Entry(backend.prefix + KEY, *part) for part in (first, second))
    version = backend.write_version(KEY)

    async def publish(entry: Entry, data: bytes, validator: str) -> bool:
        await backend.publish(entry, data, version, validator)
        await backend.stored(KEY)
        pieces = backend.parts(KEY).pieces.by_size()
        return entry in pieces if not entry.is_whole else await backend.get(entry, "infinity") == data

    assert await publish(one, b"old", "etag old")
    assert not await publish(other, b"new", "etag new")
    assert backend.parts(KEY).states == {"etag old"}
    assert await publish(other, b"old", "etag old")


# -- a model


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "read", "write", "clear"]),
        st.integers(0, 1),
        *(st.tuples(st.integers(0, 40), st.integers(1, 24)) for _ in range(2)),
    ),
    max_size=8,
)


def act(source: Any, cache: Path, options: Any, step: Any, number: int) -> bytes | None:
    what, _, (top, height), (left, width) = step
    store = xzcache.CacheStore(source, cache_store=cache, **options)
    if what == "clear":
        asyncio.run(store.clear_cache())
        return None
    box = slice(top, top + height), slice(left, left + width)
    opened = zarr.open_array(store, path="a", mode="r" if what == "read" else "r+")
    if what == "read":
        return np.asarray(opened[box]).tobytes()
    opened[box] = number
    return None


@loops_of_others
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    chunk=st.sampled_from([2, 4, 8]),
    per=st.sampled_from([1, 2, 3]),
    bound=st.sampled_from([None, 2000, 20_000]),
    steps=STEPS,
)
def test_two_processes_read_and_write_shards_as_if_there_were_no_cache(
    layout: str,
    shape: Any,
    chunk: int,
    per: int,
    bound: int | None,
    steps: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    here = tmp_path_factory.mktemp("model")
    source = LocalStore(here / "source")
    truth = np.arange(shape[0] * shape[1], dtype="f4").reshape(shape) % 3
    make(source, truth, layout, chunk=chunk, shard=chunk * per)
    options = {"max_size": bound, "missing_max_age_seconds": 60}
    for number, step in enumerate(steps):
        what, where, (top, height), (left, width) = step
        call = neighbours.run if where else lambda f, *args: f(*args)
        found = call(act, source, here / "cache", options, step, number)
        box = slice(top, top + height), slice(left, left + width)
        if what == "write":
            truth[box] = number
        elif what == "read":
            assert found == truth[box].tobytes()
    if (here / "cache").exists():
        checked(xzcache.CacheStore(source, cache_store=here / "cache", **options))


def test_rectilinear_grids(tmp_path: Path) -> None:
    source = Tallying(tmp_path / "source")
    try:
        with zarr.config.set({"array.rectilinear_chunks": True}):
            made = zarr.create_array(source, name="a", shape=(30,), chunks=[[7, 3, 20]], dtype="i4")
            made[:] = np.arange(30)
            for _ in range(2):
                assert show(source, tmp_path / "cache", PIPELINES[0], [slice(5, 25)]) == [
                    np.arange(5, 25, dtype="i4").tobytes()
                ]
    except (TypeError, ValueError, KeyError) as error:
        pytest.skip(f"this Zarr has no rectilinear grids: {error}")
    assert source.asked().requests <= 3
