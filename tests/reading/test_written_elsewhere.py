"""What a write through the cache is based on comes from the source, whatever another machine has written meanwhile.

Two cache directories stand for two machines.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from servers import S3Server, nobody, s3_server, tidy, words
from sources import CountingStore, buffer, by_ranges, local_source, neighbours, ranges, read
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.sync import sync
from zarr.storage import LocalStore, WrapperStore

import xzcache

__all__ = ["nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BUCKET = "bucket"
PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES += ["zarr.core.codec_pipeline.FusedCodecPipeline", "xzcache.pipeline.CachePipeline"]

formats = pytest.mark.parametrize("zarr_format", [3, 2])
pipelines = pytest.mark.parametrize("pipeline", PIPELINES, ids=[name.rpartition(".")[2] for name in PIPELINES])
kinds = pytest.mark.parametrize("kind", ["local", "obstore", "s3fs"])
layouts = pytest.mark.parametrize("layout", [{}, {"shards": (8,)}, {"zarr_format": 2}], ids=["v3", "sharded", "v2"])


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / BUCKET).mkdir()
    with s3_server(directory) as server:
        yield server


class Machines(NamedTuple):
    """Two machines that read and write one source."""

    source: Store
    """As it is read and written without a cache."""
    here: xzcache.CacheStore
    there: xzcache.CacheStore


def machines(kind: str, s3: S3Server, tmp_path: Path, **options: Any) -> Machines:
    name = tmp_path.name
    given: Any = LocalStore(tmp_path / "source")
    source = given
    if kind != "local":
        source = given = s3.store(BUCKET, name)
    if kind == "s3fs":
        given = f"s3://{BUCKET}/{name}"
        options |= {"upstream": "fsspec", "storage_options": words(s3)}
    here, there = (xzcache.CacheStore(given, cache_store=tmp_path / place, **options) for place in ("here", "there"))
    return Machines(source, here, there)


def answers(s3: S3Server) -> dict[str, Counter[int]]:
    """What was answered since the last look, by the last two parts of the keys."""
    found: dict[str, Counter[int]] = {}
    for tally in s3.counts().tallies:
        found.setdefault(tally.path.split("/", 2)[-1], Counter())[tally.status] += tally.requests
    s3.reset()
    return found


def values(store: Store, path: str = "x") -> list[int]:
    return list(zarr.open_array(store, path=path, mode="r")[:].tolist())


# -- metadata documents


@kinds
@layouts
@pytest.mark.parametrize("other", ["machine", "writer without a cache"])
def test_an_append_is_made_to_what_another_machine_has_appended(
    s3: S3Server, kind: str, layout: dict[str, Any], other: str, tmp_path: Path
) -> None:
    source, here, there = machines(kind, s3, tmp_path)
    if other != "machine":
        there = source  # type: ignore[assignment]
    chunks = (4,)
    zarr.create_array(source, name="x", data=np.full(4, 1, "i4"), chunks=chunks, **layout)
    for _ in range(2):
        # cached, and opened again by the same store
        assert zarr.open_array(here, path="x")[:].tolist() == [1] * 4
    zarr.open_array(there, path="x").append(np.full(4, 2, "i4"))
    zarr.open_array(here, path="x").append(np.full(2, 3, "i4"))
    expected = [1] * 4 + [2] * 4 + [3] * 2
    assert values(source) == expected
    zarr.open_array(there, path="x").append(np.full(3, 4, "i4"))
    zarr.open_array(here, path="x").append(np.full(3, 5, "i4"))
    assert values(source) == values(here) == expected + [4] * 3 + [5] * 3


@formats
@pytest.mark.parametrize("consolidated", [True, False])
def test_xarray_appends_to_what_another_machine_has_appended(
    s3: S3Server, zarr_format: Any, consolidated: bool, tmp_path: Path
) -> None:
    def day(number: int) -> xr.Dataset:
        return xr.Dataset({"t": (("day", "x"), np.full((1, 2), number, "f4"))}, coords={"day": [number]})

    source, here, there = machines("obstore", s3, tmp_path)
    options: dict[str, Any] = {"zarr_format": zarr_format, "consolidated": consolidated}
    day(0).to_zarr(source, mode="w", encoding={"t": {"chunks": (2, 2)}, "day": {"chunks": (2,)}}, **options)
    for number in range(1, 7):
        # the last chunk is half filled each second time
        machine = (here, there)[number % 2]
        assert xr.open_zarr(machine, consolidated=consolidated, chunks=None).sizes["day"] >= 1
        day(number).to_zarr(machine, append_dim="day", **options)
    shown = xr.open_zarr(source, consolidated=consolidated, chunks=None).load()
    assert shown["day"].values.tolist() == list(range(7))
    assert shown["t"].values[:, 0].tolist() == list(range(7))


def test_attributes_are_added_to_those_that_another_machine_has_set(s3: S3Server, tmp_path: Path) -> None:
    source, here, there = machines("local", s3, tmp_path)
    zarr.create_group(source, attributes={"first": 1})
    assert dict(zarr.open_group(here).attrs) == {"first": 1}
    zarr.open_group(there).attrs["second"] = 2
    zarr.open_group(here).attrs["third"] = 3
    assert dict(zarr.open_group(source).attrs) == {"first": 1, "second": 2, "third": 3}


@formats
def test_a_node_that_another_machine_has_made_is_not_made_anew(s3: S3Server, zarr_format: Any, tmp_path: Path) -> None:
    source, here, there = machines("obstore", s3, tmp_path)
    zarr.create_group(source, zarr_format=zarr_format)
    for _ in range(2):
        assert "x" not in zarr.open_group(here, zarr_format=zarr_format)
    zarr.create_array(there, name="x", data=np.arange(4), zarr_format=zarr_format)
    group = zarr.open_group(here, zarr_format=zarr_format)
    assert "x" in group
    assert group.require_array("x", shape=(4,), dtype="i8")[:].tolist() == [0, 1, 2, 3]
    assert values(source) == [0, 1, 2, 3]


def test_each_opening_of_a_store_that_writes_asks_whether_its_document_has_changed(
    s3: S3Server, tmp_path: Path
) -> None:
    source, here, _ = machines("obstore", s3, tmp_path)
    zarr.create_array(source, name="x", data=np.arange(4), chunks=(4,))
    assert zarr.open_array(here, path="x", zarr_format=3)[:].tolist() == [0, 1, 2, 3]
    s3.reset()
    for _ in range(3):
        assert zarr.open_array(here, path="x", zarr_format=3)[:].tolist() == [0, 1, 2, 3]
        # the document is not sent again, and chunks are not asked for
        assert answers(s3) == {"x/zarr.json": {304: 1}}
    for _ in range(3):
        # who only reads is told of what was asked for already
        assert zarr.open_array(here, path="x", mode="r", zarr_format=3)[:].tolist() == [0, 1, 2, 3]
    assert answers(s3) == {}


@pytest.mark.parametrize("read_only", ["given", "copy", "source"])
def test_a_store_that_only_reads_asks_once(read_only: str, s3: S3Server, tmp_path: Path) -> None:
    zarr.create_array(s3.store(BUCKET, tmp_path.name), name="x", data=np.arange(4), chunks=(4,))
    source = s3.store(BUCKET, tmp_path.name, read_only=read_only == "source")
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", read_only=read_only == "given")
    if read_only == "copy":
        store = store.with_read_only(True)
    s3.reset()
    for _ in range(3):
        assert zarr.open_array(store, path="x", mode="r", zarr_format=3)[:].tolist() == [0, 1, 2, 3]
    assert answers(s3) == {"x/zarr.json": {200: 1}, "x/c/0": {200: 1}}


async def test_absence_of_a_document_is_asked_for_again(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else zarr.storage.MemoryStore()
    store = xzcache.CacheStore(source, cache_store=cache)
    await source.set("zarr.json", buffer(b"{}"))
    assert await read(store, "zarr.json") == b"{}"
    assert await read(store, "zarr.json", RangeByteRequest(0, 1)) == b"{"
    for key in ("zarr.json", ".zattrs"):
        assert await read(store, ".zattrs") is None
        assert not await store.exists(".zattrs")
        await source.set(".zattrs", buffer(key.encode()))
        assert await store.exists(".zattrs")
        assert await store.getsize(".zattrs") == len(key)
        assert await read(store, ".zattrs") == key.encode()
        assert await read(store, ".zattrs", RangeByteRequest(0, 2)) == key.encode()[:2]
        parts = await store.get_partial_values(zarr.core.buffer.default_buffer_prototype(), [(".zattrs", None)])
        assert [part.to_bytes() for part in parts if part is not None] == [key.encode()]
        await source.delete(".zattrs")


def append_there(store: xzcache.CacheStore, number: int) -> None:
    zarr.open_array(store, path="x").append(np.full(2, number, "i4"))


@pytest.mark.parametrize("cache_set_data", [True, False])
def test_an_unpickled_copy_appends_to_what_another_machine_has_appended(
    cache_set_data: bool, s3: S3Server, tmp_path: Path
) -> None:
    source, here, there = machines("local", s3, tmp_path, cache_set_data=cache_set_data)
    zarr.create_array(source, name="x", data=np.full(4, 1, "i4"), chunks=(4,))
    assert values(here) == [1] * 4
    copy = pickle.loads(pickle.dumps(here))
    append_there(there, 2)
    append_there(copy, 3)
    append_there(there, 4)
    neighbours.run(append_there, here, 5)
    append_there(copy, 6)
    assert values(source) == [1] * 4 + [2] * 2 + [3] * 2 + [4] * 2 + [5] * 2 + [6] * 2


def test_a_request_that_is_under_way_is_not_the_base_of_a_write(tmp_path: Path) -> None:
    async def opened(store: Store) -> Any:
        return await zarr.api.asynchronous.open_array(store=store, path="x", zarr_format=3)

    async def story() -> list[int]:
        source = local_source(tmp_path)
        made = await zarr.api.asynchronous.create_array(source._store, name="x", data=np.ones(4, "i4"), chunks=(4,))
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
        await opened(store)
        gate = source.hold("get", "x/zarr.json")
        early = asyncio.ensure_future(opened(store))
        await gate.arrived()
        await made.append(np.full(4, 2, "i4"))
        # this one knows of the append, and begins while an answer from before is on its way
        late = asyncio.ensure_future(opened(store))
        while source.count("get", "x/zarr.json") < 3 and not late.done():
            await asyncio.sleep(0)
        source.let_go("get", "x/zarr.json")
        await early
        await (await late).append(np.full(2, 3, "i4"))
        return list((await (await opened(source._store)).getitem(...)).tolist())

    assert asyncio.run(story()) == [1] * 4 + [2] * 4 + [3] * 2


# -- chunks that are changed in part


def partly(array: Any) -> None:
    array[0:2] = 8


def by_mask(array: Any) -> None:
    array.vindex[np.array([True] * 2 + [False] * 6)] = 8


def by_coordinates(array: Any) -> None:
    array.oindex[[0, 1]] = 8


@pipelines
@layouts
@pytest.mark.parametrize("change", [partly, by_mask, by_coordinates])
def test_a_chunk_is_changed_in_part_as_another_machine_has_left_it(
    pipeline: str, layout: dict[str, Any], change: Callable[[Any], None], s3: S3Server, tmp_path: Path
) -> None:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        source, here, there = machines("local", s3, tmp_path)
        zarr.create_array(source, name="x", data=np.full(8, 1, "i4"), chunks=(4,), **layout)
        mine, theirs = (zarr.open_array(store, path="x") for store in (here, there))
        for number in (2, 3):
            # both machines have it in their caches
            assert mine[:].tolist() == mine[:].tolist()
            assert theirs[:].tolist() == theirs[:].tolist()
            theirs[2:4] = number
            change(mine)
            assert values(source) == mine[:].tolist() == [8] * 2 + [number] * 2 + [1] * 4


@pipelines
@layouts
def test_a_chunk_that_was_not_there_is_changed_as_another_machine_has_made_it(
    pipeline: str, layout: dict[str, Any], s3: S3Server, tmp_path: Path
) -> None:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        source, here, there = machines("local", s3, tmp_path, missing_max_age_seconds="infinity")
        zarr.create_array(source, name="x", shape=(8,), dtype="i4", fill_value=0, chunks=(4,), **layout)
        mine = zarr.open_array(here, path="x")
        assert mine[:].tolist() == mine[:].tolist() == [0] * 8
        zarr.open_array(there, path="x")[2:4] = 5
        mine[0:2] = 8
        assert values(source) == [8] * 2 + [5] * 2 + [0] * 4


@pytest.mark.parametrize("revalidate", ["open", 1000, False])
def test_only_a_chunk_that_is_changed_in_part_is_asked_for(revalidate: Any, s3: S3Server, tmp_path: Path) -> None:
    source, here, _ = machines("obstore", s3, tmp_path, revalidate=revalidate)
    zarr.create_array(source, name="x", data=np.arange(12), chunks=(4,))
    array = zarr.open_array(here, path="x", zarr_format=3)
    assert array[:].tolist() == list(range(12))
    s3.reset()
    for _ in range(3):
        # a store that may write, and does not, answers from the cache
        assert array[:].tolist() == list(range(12))
        assert sync(read(here, "x/c/1")) is not None
    assert answers(s3) == {}
    array[5:7] = -1
    # it was not sent again; what is overwritten was not asked for
    found = answers(s3)
    assert found["x/c/1"].pop(304) == 1
    assert set(found) == {"x/c/1"}
    assert sum(found["x/c/1"].values()) == 1
    array[8:12] = -2
    assert sum(answers(s3)["x/c/2"].values()) == 1


class Passing(WrapperStore[Store]):
    """A store of a user's own around a cache."""


def test_a_cache_that_a_users_own_store_lies_over(s3: S3Server, tmp_path: Path) -> None:
    source, here, there = machines("local", s3, tmp_path)
    zarr.create_array(source, name="x", data=np.full(4, 1, "i4"), chunks=(4,))
    array = zarr.open_array(Passing(here), path="x")
    assert array[:].tolist() == [1] * 4
    zarr.open_array(there, path="x")[2:] = 2
    array[:1] = 3
    assert values(source) == [3, 1, 2, 2]


def test_a_cache_over_a_cache(s3: S3Server, tmp_path: Path) -> None:
    source, here, there = machines("local", s3, tmp_path)
    outer = xzcache.CacheStore(here, cache_store=tmp_path / "outer")
    zarr.create_array(source, name="x", data=np.full(4, 1, "i4"), chunks=(4,))
    array = zarr.open_array(outer, path="x")
    assert array[:].tolist() == [1] * 4
    zarr.open_array(there, path="x")[2:] = 2
    array[:1] = 3
    assert values(source) == [3, 1, 2, 2]
    zarr.open_array(there, path="x").append(np.full(2, 4, "i4"))
    zarr.open_array(outer, path="x").append(np.full(2, 5, "i4"))
    assert values(source) == [3, 1, 2, 2, 4, 4, 5, 5]


def write_region(store: xzcache.CacheStore, start: int, number: int) -> None:
    ds = xr.Dataset({"t": ("x", np.full(2, number, "i4"))})
    ds.to_zarr(store, region={"x": slice(start, start + 2)}, consolidated=False)


def test_two_machines_write_two_halves_of_a_chunk(s3: S3Server, tmp_path: Path) -> None:
    source, here, there = machines("local", s3, tmp_path)
    xr.Dataset({"t": ("x", np.zeros(4, "i4"))}).to_zarr(source, consolidated=False, encoding={"t": {"chunks": (4,)}})
    for store in (here, there):
        assert xr.open_zarr(store, consolidated=False, chunks=None)["t"].values.tolist() == [0] * 4
    for number in (1, 2):
        write_region(there, 0, number)
        # by a worker, which gets a copy
        neighbours.run(write_region, here, 2, -number)
        assert values(source, "t") == [number] * 2 + [-number] * 2


# -- a session of Icechunk that can be written


@pytest.fixture
def repository() -> Any:
    return icechunk.Repository.create(icechunk.in_memory_storage())


def committed(repository: Any, first: int) -> None:
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="x", data=np.arange(first, first + 8), chunks=(4,), overwrite=True)
    shards = {"name": "s", "chunks": (2,), "shards": (4,)}
    zarr.create_array(session.store, data=np.arange(first, first + 8), overwrite=True, **shards)  # type: ignore[arg-type]
    session.commit("a commit")


def both(store: Store) -> list[list[int]]:
    """All of two arrays, and parts of one, which Zarr reads by ranges."""
    found = [values(store, path) for path in ("x", "s")]
    assert zarr.open_array(store, path="s", mode="r")[1:3].tolist() == found[1][1:3]
    return found


def each(first: int) -> list[list[int]]:
    return [list(range(first, first + 8))] * 2


OVER: dict[str, Callable[[Store, Path], xzcache.CacheStore]] = {
    "store": lambda store, tmp_path: xzcache.CacheStore(store, cache_store=tmp_path / "cache"),
    "named": lambda store, tmp_path: xzcache.CacheStore(store, cache_store=tmp_path / "cache", namespace="mine"),
    "wrapped": lambda store, tmp_path: xzcache.CacheStore(CountingStore(store), cache_store=tmp_path / "cache"),
    "memory": lambda store, tmp_path: xzcache.CacheStore(store, cache_store=zarr.storage.MemoryStore()),
    "cached": lambda store, tmp_path: xzcache.CacheStore(
        xzcache.CacheStore(store, cache_store=tmp_path / "inner"), cache_store=tmp_path / "cache"
    ),
    "read-only": lambda store, tmp_path: xzcache.CacheStore(store, cache_store=tmp_path / "cache", read_only=True),
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("revalidate", ["open", False])
def test_what_a_session_has_discarded_is_not_served(
    repository: Any, over: str, revalidate: Any, tmp_path: Path
) -> None:
    committed(repository, 0)
    session = repository.writable_session("main")
    with xzcache.config.set(revalidate=revalidate):
        store = OVER[over](session.store, tmp_path)
    assert both(store) == both(store) == each(0)
    for first in (10, 20):
        writer = session.store if store.read_only else store
        for path in ("x", "s"):
            zarr.open_array(writer, path=path, mode="r+")[:] = np.arange(first, first + 8)
        assert both(store) == each(first)
        session.discard_changes()
        assert both(store) == each(0)
    committed(repository, 30)
    # what another session has committed is not this one's
    assert both(store) == each(0)
    # there is nothing of it in the cache
    assert store.cache_info()["cached_keys"] == 0


def test_a_session_after_rebase_and_commit(repository: Any, tmp_path: Path) -> None:
    committed(repository, 0)
    session = repository.writable_session("main")
    store = xzcache.CacheStore(session.store, cache_store=tmp_path / "cache")
    assert both(store) == each(0)
    zarr.open_array(store, path="x", mode="r+")[:] = 5
    other = repository.writable_session("main")
    zarr.open_array(other.store, path="s", mode="r+")[:] = 6
    other.commit("another")
    session.rebase(icechunk.ConflictDetector())
    assert both(store) == [[5] * 8, [6] * 8]
    session.commit("this")
    assert both(store) == [[5] * 8, [6] * 8]
    snapshot = xzcache.CacheStore(repository.readonly_session("main").store, cache_store=tmp_path / "cache")
    assert both(snapshot) == both(snapshot) == [[5] * 8, [6] * 8]
    assert snapshot.cache_stats()["hits"] > 0


@by_ranges
async def test_ranges_of_a_session_are_read_together(tmp_path: Path) -> None:
    repository = await icechunk.Repository.create_async(icechunk.in_memory_storage())
    session = await repository.writable_session_async("main")
    await session.store.set("zarr.json", buffer(b'{"zarr_format": 3, "node_type": "group"}'))
    counted = CountingStore(session.store)
    store = xzcache.CacheStore(counted, cache_store=tmp_path / "cache")
    wanted = [RangeByteRequest(1, 4), RangeByteRequest(2, 6)]
    whole = await read(store, "zarr.json") or b""
    counted.forget()
    assert await ranges(store, wanted, "zarr.json") == [whole[1:4], whole[2:6]]
    assert counted.count("get_ranges", "zarr.json") == counted.reads == 1
