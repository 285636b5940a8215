"""When the source is asked again, and that nothing older than it is shown to who asks."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from clocks import Clock
from obstore.store import LocalStore as ObstoreLocalStore
from processes import Request, Source
from servers import S3Server, nobody, s3_server, serving, tidy, web_server, words
from sources import CountingStore, again, buffer, cached, local_source, neighbours, read, read_now, write_now
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore, MemoryStore, ObjectStore

import xzcache

__all__ = ["nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BUCKET = "bucket"
OLD = 1000.0
"""Seconds after which a time of modification tells states apart."""

formats = pytest.mark.parametrize("zarr_format", [3, 2])
consolidation = pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "single"])
kinds = pytest.mark.parametrize("kind", ["obstore", "s3fs", "local"])

_names = (f"data-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / BUCKET).mkdir()
    with s3_server(directory) as server:
        yield server


class Place(NamedTuple):
    """A source as it is written, and as it is read: what is opened, and with which options."""

    writer: Store
    given: Any
    options: dict[str, Any]


def place(kind: str, s3: S3Server, tmp_path: Path) -> Place:
    """A new source."""
    name = next(_names)
    if kind == "local":
        return Place(LocalStore(tmp_path / name), LocalStore(tmp_path / name), {})
    writer = s3.store(BUCKET, name)
    if kind == "obstore":
        return Place(writer, s3.store(BUCKET, name, read_only=True), {})
    return Place(writer, f"s3://{BUCKET}/{name}", {"upstream": "fsspec", "storage_options": words(s3)})


def asked(s3: S3Server) -> dict[str, Counter[int]]:
    """What answers there were, by the last part of the keys."""
    found: dict[str, Counter[int]] = {}
    for tally in s3.counts().tallies:
        found.setdefault(tally.path.rpartition("/")[2], Counter())[tally.status] += tally.requests
    return found


# -- the next opening shows what there is


def dataset(days: int, first: float = 0) -> xr.Dataset:
    """One whose last chunk is half filled, as a rule."""
    values = np.arange(days * 2, dtype="f4").reshape(days, 2) + first
    return xr.Dataset({"t": (("day", "x"), values, {"units": "K"})}, coords={"day": np.arange(days)})


def to_zarr(ds: xr.Dataset, writer: Store, zarr_format: Any, consolidated: bool, **options: Any) -> None:
    if options.get("mode") == "w":
        options.setdefault("encoding", {"t": {"chunks": (3, 2)}, "day": {"chunks": (3,)}})
    ds.to_zarr(writer, zarr_format=zarr_format, consolidated=consolidated, **options)


def consolidate(writer: Store, zarr_format: Any, consolidated: bool) -> None:
    if consolidated:
        zarr.consolidate_metadata(writer, zarr_format=zarr_format)


def made(*where: Any) -> None:
    to_zarr(dataset(5), *where, mode="w")


def rewritten(*where: Any) -> None:
    to_zarr(dataset(4, 100), *where, mode="w")


def appended(*where: Any) -> None:
    to_zarr(dataset(3, 200).assign_coords(day=[4, 5, 6]), *where, append_dim="day")


def given_a_variable(*where: Any) -> None:
    to_zarr(dataset(7)[["t"]].rename(t="wind"), *where, mode="a")


def given_attributes(*where: Any) -> None:
    group = zarr.open_group(where[0], mode="a", use_consolidated=False)
    group.attrs["title"] = "with a title"
    group["t"].attrs["units"] = "degC"
    consolidate(*where)


def packed(*where: Any, scale: float = 0.5) -> None:
    encoding = {"t": {"dtype": "i2", "_FillValue": -1, "scale_factor": scale, "chunks": (3, 2)}}
    to_zarr(dataset(5, 10 * scale), *where, mode="w", encoding=encoding)


def rescaled(*where: Any) -> None:
    packed(*where, scale=0.25)


def bereft_of_a_variable(*where: Any) -> None:
    sync(where[0].delete_dir("day"))
    consolidate(*where)


def deleted(*where: Any) -> None:
    sync(where[0].clear())


def made_again(*where: Any) -> None:
    to_zarr(dataset(5, 300), *where, mode="w")


STORY = [
    *(made, rewritten, appended, given_a_variable, given_attributes, made, deleted, made_again),
    *(packed, rescaled, bereft_of_a_variable, deleted),
]


def shown(where: Place, cache: Any, **options: Any) -> xr.Dataset | None:
    """What an opening that begins now shows, through the cache; None where there is nothing."""
    try:
        opened = xr.open_zarr(
            where.given, engine="zcache", cache_store=cache, chunks=None, **{**where.options, **options}
        )
        return opened.load()
    except FileNotFoundError:
        return None


def truth(writer: Store, consolidated: bool) -> xr.Dataset | None:
    """What the source itself shows, once it shows the same twice: under load the server answers a PUT too early."""
    before: Any = writer  # like no answer
    for _ in range(10):
        try:
            now = xr.open_zarr(writer, chunks=None, consolidated=consolidated).load()
        except FileNotFoundError:
            now = None
        except (RuntimeError, ZarrUserWarning):
            # half an object does not decode, and an array without its document is none
            continue
        if before is not writer and same(before, now):
            return now
        before = now
    raise AssertionError("the source shows something else each time")


def same(one: xr.Dataset | None, other: xr.Dataset | None) -> bool:
    return one.identical(other) if one is not None and other is not None else one is other


def follow(where: Place, zarr_format: int, consolidated: bool, cache: Path) -> None:
    """Change a source in one way after another, and open it after each, here and in a process that goes on."""
    given = Place(None, *where[1:])  # type: ignore[arg-type]  # the other process only reads
    before = None
    for change in STORY:
        change(where.writer, zarr_format, consolidated)
        now = truth(where.writer, consolidated)
        assert not same(before, now), f"{change.__name__} changes nothing"
        here = shown(where, cache, consolidated=consolidated)
        assert same(here, now), f"{change.__name__}: {here}"
        there = neighbours.run(partial(shown, consolidated=consolidated), given, cache)
        assert same(there, now), f"{change.__name__}, in another process: {there}"
        before = now


# each two of the three together
@pytest.mark.parametrize(
    ("kind", "consolidated", "zarr_format"),
    [
        *(("obstore", True, 3), ("obstore", False, 2), ("s3fs", True, 2), ("s3fs", False, 3)),
        *(("local", True, 3), ("local", False, 2)),
    ],
)
def test_each_opening_shows_the_truth(
    s3: S3Server, kind: str, consolidated: bool, zarr_format: int, tmp_path: Path
) -> None:
    follow(place(kind, s3, tmp_path), zarr_format, consolidated, tmp_path / "cache")


@formats
@consolidation
def test_each_opening_of_a_web_server_shows_the_truth(consolidated: bool, zarr_format: int, tmp_path: Path) -> None:
    (tmp_path / "web" / "data").mkdir(parents=True)
    with web_server(tmp_path / "web") as web:
        where = Place(LocalStore(tmp_path / "web" / "data"), f"{web.url}/data", {})
        follow(where, zarr_format, consolidated, tmp_path / "cache")


ORDERS = [list(order) for order in itertools.product([".zarray", ".zattrs"], repeat=4)]


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
async def test_attributes_that_change_again_and_again(order: list[str], cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source.set("x/.zarray", buffer(b'{"zarr_format": 2}'))
    store = cached(cache_kind, source, tmp_path)
    for version, first in enumerate(order):
        await source._store.set("x/.zattrs", buffer(b'{"version": %d}' % version))
        await source._store.set("x/0", buffer(b"%d" % version))
        store = again(store)
        # they are asked for at once, and answered in any order
        for key in sorted({".zarray", ".zattrs"}, key=lambda key: key != first):
            await read(store, f"x/{key}")
        assert await read(store, "x/0") == b"%d" % version


@formats
@consolidation
def test_a_cache_store_that_outlives_its_books(zarr_format: int, consolidated: bool, tmp_path: Path) -> None:
    if not consolidated:
        pytest.skip("known: what is deleted and made again alike is not told from what was there, without its books")
    source = LocalStore(tmp_path / "source")
    cache = MemoryStore()
    for change in STORY:
        change(source, zarr_format, consolidated)
        # the bytes that an earlier one holds, and nothing else
        cache = MemoryStore(dict(cache._store_dict))
        found = shown(Place(source, source, {}), cache, consolidated=consolidated)
        assert same(found, truth(source, consolidated)), f"{change.__name__}: {found}"


@formats
def test_a_store_that_is_open_sees_no_change_and_a_new_one_does(zarr_format: Any, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    where = Place(source, source, {})
    made(source, zarr_format, True)
    store = cached("directory", source, tmp_path)
    before = zarr.open_group(store, mode="r")
    appended(source, zarr_format, True)
    assert zarr.open_group(store, mode="r")["t"].shape == before["t"].shape
    assert same(shown(where, tmp_path / "cache"), truth(source, True))


@formats
def test_what_is_never_asked_again_stays_as_it_was(zarr_format: Any, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    where = Place(source, source, {})
    made(source, zarr_format, True)
    before = shown(where, tmp_path / "cache")
    deleted(source)
    assert same(shown(where, tmp_path / "cache", revalidate=False), before)
    offline = Place(source, CountingStore(source), {"namespace": cached("directory", source, tmp_path).namespace})
    assert same(shown(offline, tmp_path / "cache", revalidate=False), before)
    assert offline.given.reads == 0


# -- formats


async def test_an_opening_of_any_format_asks_for_one_document(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_group(source)
    store = cached(cache_kind, source, tmp_path)
    for expected in ({"zarr.json", ".zgroup", ".zattrs", ".zmetadata"}, {"zarr.json"}):
        source.forget()
        store = xzcache.CacheStore(source, cache_store=store._cache)
        await zarr.api.asynchronous.open_group(store, mode="r")
        assert {key for _, key in source.calls if key} == expected


async def test_documents_that_are_read_together_are_judged_together_however_late_one_goes_on(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_group(source)
    await zarr.api.asynchronous.open_group(cached("directory", source, tmp_path), mode="r")
    # the next reads have to wait for the cache to be opened
    xzcache.cleanup_resources()
    source.forget()
    store = cached("directory", source, tmp_path, read_only=True)
    is_read = asyncio.Event()
    late = [asyncio.create_task(Late(read(store, key), is_read).run()) for key in (".zgroup", ".zattrs", ".zmetadata")]
    assert await read(store, "zarr.json")
    is_read.set()
    assert await asyncio.gather(*late) == [None, None, None]
    assert {key for _, key in source.calls if key} == {"zarr.json"}
    # what is read by itself is asked for
    await read(store, ".zgroup")
    assert {key for _, key in source.calls if key} == {"zarr.json", ".zgroup"}


async def test_each_document_that_is_read_together_with_others_is_counted_once(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_group(source)
    keys = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
    first = cached("memory", source, tmp_path)
    await zarr.api.asynchronous.open_group(first, mode="r")
    store = again(first, read_only=True)
    gate = source.hold("get", "zarr.json")
    reading = [asyncio.create_task(read(store, key)) for key in keys]
    await gate.arrived()
    # the reads of the others wait for that request, which decides about them
    for _ in range(50):
        await asyncio.sleep(0)
    source.let_go("get", "zarr.json")
    assert (await asyncio.gather(*reading))[1:] == [None, None, None]
    # this source cannot confirm a document, so it is read anew
    assert (store.cache_stats()["hits"], store.cache_stats()["misses"]) == (3, 1)


class Late:
    """A coroutine that goes on late from where it waits first, as on a busy machine."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], due: asyncio.Event) -> None:
        self.coroutine = coroutine
        self.due = due

    async def run(self) -> Any:
        return await self

    def __await__(self) -> Generator[Any, Any, Any]:
        awaited = self.coroutine.send(None)
        yield from self.due.wait().__await__()
        yield awaited
        return (yield from self.coroutine.__await__())


@kinds
def test_a_hierarchy_of_the_other_format_in_its_place(s3: S3Server, kind: str, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)
    for zarr_format in (3, 2, 3, 2):
        made(where.writer, zarr_format, False)
        for _ in range(2):
            store = xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", **where.options)
            group = zarr.open_group(store, mode="r")
            assert group.metadata.zarr_format == zarr_format
            np.testing.assert_array_equal(group["t"][:], dataset(5)["t"])
        deleted(where.writer)


@kinds
def test_format_2_beside_format_3(s3: S3Server, kind: str, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)

    def opened() -> xzcache.CacheStore:
        return xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", **where.options)

    zarr.create_array(where.writer, name="x", data=np.arange(4))
    for _ in range(2):
        assert zarr.open_array(opened(), path="x", mode="r").metadata.zarr_format == 3
    with pytest.raises(FileNotFoundError):
        zarr.open_array(opened(), path="x", mode="r", zarr_format=2)
    zarr.create_array(where.writer, name="x", data=np.arange(5), zarr_format=2)
    for first in (None, 3, 2):
        store = opened()
        assert zarr.open_array(store, path="x", mode="r", zarr_format=first).shape == (5 if first == 2 else 4,)
        assert zarr.open_array(store, path="x", mode="r", zarr_format=2)[:].tolist() == [0, 1, 2, 3, 4]


# -- who asks each time


@kinds
def test_who_asks_each_time_sees_each_chunk_change(s3: S3Server, kind: str, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)
    array = zarr.create_array(where.writer, shape=(6,), chunks=(2,), dtype="i4", fill_value=-1)
    array[:] = 0
    store = xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", revalidate=True, **where.options)
    reader = zarr.open_array(store, mode="r")
    for value in range(1, 4):
        array[2:5] = value
        assert reader[:].tolist() == array[:].tolist()
        assert neighbours.run(whole, reader) == array[:].tolist()
    sync(where.writer.delete("c/1"))
    assert reader[:].tolist() == [0, 0, -1, -1, 3, 0]
    assert neighbours.run(whole, reader) == [0, 0, -1, -1, 3, 0]


def whole(array: zarr.Array[Any]) -> Any:
    return array[...].tolist()


@pytest.mark.parametrize("kind", ["obstore", "s3fs"])
def test_what_is_unchanged_is_not_sent_again(s3: S3Server, kind: str, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)
    array = zarr.create_array(where.writer, data=np.arange(6), chunks=(2,))
    store = xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", revalidate=True, **where.options)
    reader = zarr.open_array(store, mode="r", zarr_format=3)
    for turn in range(3):
        before = store.cache_stats()["bytes_from_source"]
        s3.reset()
        assert whole(reader) == [0, 1, 2, 3, 4, 5]
        answers = asked(s3)
        assert answers.keys() == {"0", "1", "2"}
        if turn:
            assert s3.counts().bytes == s3.counts().objects == 0
            assert store.cache_stats()["bytes_from_source"] == before
            expected = {304: 1} if kind == "obstore" else {200: 1}
            assert all(count == expected for count in answers.values())
    array[3] = 7
    s3.reset()
    assert whole(reader) == [0, 1, 2, 7, 4, 5]
    assert s3.counts().objects == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that were read from local stores."""
    keys: list[str] = []
    get = LocalStore.get

    async def noted(self: LocalStore, key: str, *args: Any, **named: Any) -> Any:
        keys.append(key)
        return await get(self, key, *args, **named)

    monkeypatch.setattr(LocalStore, "get", noted)
    return keys


def grow_old(root: Path, seconds: float = OLD) -> None:
    for path in root.rglob("*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_a_file_that_is_old_and_unchanged_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    root = tmp_path / "source"
    array = zarr.create_array(LocalStore(root), data=np.arange(6), chunks=(2,))
    store = xzcache.CacheStore(LocalStore(root), cache_store=tmp_path / "cache", revalidate=True)
    reader = zarr.open_array(store, mode="r", zarr_format=3)

    def read_again(expected: list[int]) -> list[str]:
        reads.clear()
        assert whole(reader) == expected
        return sorted(key for key in reads if key.startswith("c/"))

    every = ["c/0", "c/1", "c/2"]
    # files that are younger than a minute could change again within a tick of the clock
    assert [read_again([0, 1, 2, 3, 4, 5]) for _ in range(2)] == [every] * 2
    grow_old(root)
    assert [read_again([0, 1, 2, 3, 4, 5]) for _ in range(3)] == [every, [], []]
    array[3] = 7
    assert [read_again([0, 1, 2, 7, 4, 5]) for _ in range(2)] == [["c/1"]] * 2
    grow_old(root, OLD / 2)
    assert [read_again([0, 1, 2, 7, 4, 5]) for _ in range(2)] == [every, []]


@pytest.mark.parametrize("kind", ["zarr", "obstore"])
@pytest.mark.parametrize("in_place", [True, False])
def test_fresh_times_of_files_are_not_trusted(kind: str, in_place: bool, tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    source: Store = LocalStore(root) if kind == "zarr" else ObjectStore(ObstoreLocalStore(root))
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", revalidate=True)
    tick = time.time_ns()
    for value in (b"1", b"2", b"3"):
        path = root / ("k" if in_place else "new")
        path.write_bytes(value)
        # within one tick of the clock
        os.utime(path, ns=(tick, tick))
        path.rename(root / "k")
        assert read_now(store, "k") == read_now(store, "k") == value


@kinds
def test_a_file_that_is_replaced_by_an_older_one(s3: S3Server, kind: str, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)
    store = xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", revalidate=True, **where.options)
    for age, value in ((OLD, b"1"), (2 * OLD, b"2"), (OLD / 2, b"3"), (OLD, b"1")):
        write_now(where.writer, "k", value)
        if kind == "local":
            os.utime(where.writer.root / "k", (time.time() - age,) * 2)
        assert [sync(read(store, "k")) for _ in range(2)] == [value] * 2


# -- who asks after some time


async def test_metadata_are_asked_for_after_so_many_seconds(cache_kind: str, clock: Clock, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source._store.set("x/zarr.json", buffer(b'{"node_type": "array", "n": 1}'))
    await source._store.set("x/c/0", buffer(b"1"))
    store = cached(cache_kind, source, tmp_path, revalidate=100)
    values = {b'{"node_type": "array", "n": 1}': b"1", b'{"node_type": "array", "n": 2}': b"2"}
    for passes, asks in ((0, 1), (99, 0), (2, 1), (50, 0), (49, 0), (2, 1)):
        clock.steady += passes
        source.forget()
        document = await read(store, "x/zarr.json")
        assert document is not None
        assert await read(store, "x/c/0") == values[document]
        assert source.count("get", "x/zarr.json") == asks
        if clock.steady == 101:
            await source._store.set("x/zarr.json", buffer(b'{"node_type": "array", "n": 2}'))
            await source._store.set("x/c/0", buffer(b"2"))
    assert document == b'{"node_type": "array", "n": 2}'


@kinds
def test_what_became_too_old_is_asked_for_again(s3: S3Server, kind: str, clock: Clock, tmp_path: Path) -> None:
    where = place(kind, s3, tmp_path)
    array = zarr.create_array(where.writer, data=np.arange(6), chunks=(2,))
    store = xzcache.CacheStore(where.given, cache_store=tmp_path / "cache", max_age_seconds=60, **where.options)
    reader = zarr.open_array(store, mode="r", zarr_format=3)
    for value in (1, 2, 3):
        before = whole(reader)
        array[2] = value
        clock.move(59, store)
        assert whole(reader) == before
        clock.move(2, store)
        assert whole(reader) == array[:].tolist() != before


async def test_what_became_too_old_and_is_unchanged_is_not_sent_again(
    s3: S3Server, cache_kind: str, clock: Clock, tmp_path: Path
) -> None:
    where = place("obstore", s3, tmp_path)
    for key in ("zarr.json", "c/0"):
        await where.writer.set(key, buffer(b"{}"))
    store = cached(cache_kind, where.given, tmp_path, max_age_seconds=60)

    async def answers() -> dict[str, Counter[int]]:
        s3.reset()
        assert await read(store, "zarr.json") == await read(store, "c/0") == b"{}"
        assert set(asked(s3)) <= {"zarr.json", "0"}
        return asked(s3)

    first = await answers()
    assert first == {"zarr.json": {200: 1}, "0": {200: 1}}
    before = store.cache_stats()["bytes_from_source"]
    for _ in range(2):
        clock.move(61, store)
        assert await answers() == {"zarr.json": {304: 1}, "0": {304: 1}}
        # its age began anew
        clock.move(59, store)
        assert await answers() == {}
    assert store.cache_stats()["bytes_from_source"] == before
    assert store.cache_stats()["misses"] == 2


async def test_parts_of_what_is_too_old_are_asked_for_once(cache_kind: str, clock: Clock, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source.set("k", buffer(b"0123456789"))
    store = cached(cache_kind, source, tmp_path, max_age_seconds=60)
    assert await read(store, "k") == b"0123456789"
    clock.move(61, store)
    await source._store.set("k", buffer(b"abcdefghij"))
    source.forget()
    for _ in range(3):
        assert await read(store, "k", RangeByteRequest(2, 5)) == b"cde"
    assert source.reads == 1
    assert await read(store, "k") == b"abcdefghij"
    assert await read(store, "k", RangeByteRequest(4, 6)) == b"ef"
    assert source.reads == 2


# -- what can never change


@pytest.mark.parametrize("revalidate", ["open", True, 0])
def test_a_snapshot_of_icechunk_is_never_asked_again(revalidate: Any, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(place)))
    options = {"cache_store": tmp_path / "cache", "revalidate": revalidate}
    snapshots = []
    for days, first in ((5, 0), (5, 100), (6, 200)):
        expected = dataset(days, first)
        session = repository.writable_session("main")
        expected.to_zarr(session.store, mode="w", consolidated=False)
        session.commit("a day")
        snapshots.append((repository.readonly_session("main").store, expected))
        for store, expected in snapshots:
            opened = xr.open_zarr(store, engine="zcache", consolidated=False, chunks=None, **options)
            xr.testing.assert_identical(opened.load(), expected)
    place.rename(tmp_path / "elsewhere")
    for store, expected in snapshots:
        # without a look at what there is, which would not be cached
        group = zarr.open_group(xzcache.CacheStore(store, **options), mode="r", zarr_format=3)
        for name in ("t", "day"):
            np.testing.assert_array_equal(group[name][...], expected[name])
        assert group.store_path.store.cache_stats()["misses"] == 0


# -- the web


class Web(SimpleHTTPRequestHandler):
    """Serves files, and notes what was sent: method, key and status."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    etag: Callable[[bytes, os.stat_result], str] | None
    head: int | None = None
    sent: list[tuple[str, str, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.answer(404, {}, b"")
            return
        data, status = path.read_bytes(), path.stat()
        headers = {"Last-Modified": self.date_time_string(status.st_mtime)}
        if (tell := type(self).etag) is not None:
            headers["ETag"] = tell(data, status)
            known = self.headers.get("If-None-Match")
            unchanged = known == "*" or (known is not None and known == headers["ETag"])
        else:
            since = self.headers.get("If-Modified-Since")
            unchanged = since is not None and int(status.st_mtime) <= self.seconds(since)
        self.answer(304 if unchanged else 200, headers, b"" if unchanged else data)

    def do_HEAD(self) -> None:
        if self.head is not None:
            self.answer(self.head, {}, b"")
        else:
            self.do_GET()

    @staticmethod
    def seconds(date: str) -> float:
        from email.utils import parsedate_to_datetime

        return parsedate_to_datetime(date).timestamp()

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.sent.append((self.command, self.path.lstrip("/"), status))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


ETAGS: dict[str, Callable[[bytes, os.stat_result], str] | None] = {
    "none": None,
    "content": lambda data, status: f'"{_digest(data)}"',
    "weak": lambda data, status: f'W/"{_digest(data)}"',
    # as the most common server makes them
    "time": lambda data, status: f'"{int(status.st_mtime):x}-{status.st_size:x}"',
    "weak time": lambda data, status: f'W/"{int(status.st_mtime):x}-{status.st_size:x}"',
    "any": lambda data, status: "*",
    "no quotes": lambda data, status: _digest(data),
    "empty": lambda data, status: '""' if data < b"5" else f'"{_digest(data)}"',
    "long": lambda data, status: f'"{_digest(data) * 100}"',
}


class Served(NamedTuple):
    url: str
    root: Path
    sent: list[tuple[str, str, int]]

    def put(self, key: str, value: bytes, age: float) -> None:
        (self.root / key).write_bytes(value)
        os.utime(self.root / key, (time.time() - age,) * 2)

    def bodies(self) -> int:
        """How often a value was sent."""
        return sum(method == "GET" and status == 200 for method, _, status in self.sent)


@pytest.fixture
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A web server, with ETags of the kind that the test says, or else without."""
    how = {"etag": "none", **getattr(request, "param", {})}
    root = tmp_path / "web"
    root.mkdir()
    told: dict[str, Any] = {"etag": ETAGS[how["etag"]], "head": how.get("head"), "sent": []}
    if told["etag"] is not None:
        told["etag"] = staticmethod(told["etag"])
    with serving(partial(type("Handler", (Web,), told), directory=str(root))) as url:
        yield Served(url, root, told["sent"])


servers = pytest.mark.parametrize("web", [{"etag": etag} for etag in ETAGS], indirect=True, ids=list(ETAGS))

FRESH, HALF = 1.0, OLD / 2
CHANGES = [(FRESH, b"1"), (FRESH, b"2"), (OLD, b"3"), (2 * OLD, b"4"), (HALF, b"5"), (FRESH, b"6"), (FRESH, b"7")]
"""Ages in seconds, and values of one size."""


@servers
def test_the_web_never_gives_a_wrong_byte_to_who_asks_each_time(web: Served, tmp_path: Path) -> None:
    store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=True)
    for age, value in CHANGES:
        web.put("k", value, age)
        assert [read_now(store, "k") for _ in range(3)] == [value] * 3
    (web.root / "k").unlink()
    assert read_now(store, "k") is None


def test_what_the_source_confirmed_is_counted(tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    (root / "k").write_bytes(b"1")
    grow_old(root)
    with web_server(root) as web:
        store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=True)
        assert [read_now(store, "k") for _ in range(3)] == [b"1"] * 3
        stats = store.cache_stats()
        assert (stats["misses"], stats["hits"], stats["revalidated"]) == (1, 2, 2)
        unasked = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=False)
        assert read_now(unasked, "k") == b"1"
        assert (unasked.cache_stats()["hits"], unasked.cache_stats()["revalidated"]) == (1, 0)


@servers
def test_the_web_never_gives_an_old_document_to_who_opens(web: Served, tmp_path: Path) -> None:
    for age, value in CHANGES:
        web.put("zarr.json", value, age)
        for _ in range(2):
            assert read_now(xzcache.CacheStore(web.url, cache_store=tmp_path / "cache"), "zarr.json") == value
    (web.root / "zarr.json").unlink()
    assert read_now(xzcache.CacheStore(web.url, cache_store=tmp_path / "cache"), "zarr.json") is None


@servers
def test_the_web_does_not_send_again_what_is_old_and_unchanged(
    web: Served, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    web.put("k", b"1", OLD)
    store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=True)
    for _ in range(3):
        assert read_now(store, "k") == b"1"
    # an ETag that is too long to be kept is none
    assert web.bodies() == 1 or "long" in request.node.callspec.id
    assert all(method == "HEAD" or status in (200, 304) for method, _, status in web.sent)


@pytest.mark.parametrize("web", [{"etag": "weak"}], indirect=True)
def test_weak_etags_tell_that_something_changed(web: Served, tmp_path: Path) -> None:
    store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=True)
    then = time.time() - OLD
    for value in (b"1", b"2"):
        web.put("k", value, OLD)
        # as it is where times are all set to the same one
        os.utime(web.root / "k", (then, then))
        assert [read_now(store, "k") for _ in range(2)] == [value] * 2


@pytest.mark.parametrize(
    "web", [{"head": status} for status in (404, 403, 405, 501)], indirect=True, ids=["404", "403", "405", "501"]
)
def test_a_server_that_answers_no_head(web: Served, tmp_path: Path) -> None:
    store = xzcache.CacheStore(web.url, cache_store=tmp_path / "cache", revalidate=True)
    for age, value in ((OLD, b"1"), (HALF, b"2")):
        web.put("k", value, age)
        assert [read_now(store, "k") for _ in range(2)] == [value] * 2


# -- copies


class Hierarchy:
    """A source in a directory that notes what each process asks of it."""

    def __init__(self, path: Path) -> None:
        self.root, self.log = str(path / "source"), str(path / "requests")
        self.writer = LocalStore(self.root)

    def source(self) -> Source:
        return Source(LocalStore(self.root), self.log)

    def opened(self, **options: Any) -> xzcache.CacheStore:
        return xzcache.CacheStore(self.source(), **options)

    def empty(self) -> None:
        sync(self.writer.clear())

    def requests(self, pid: int | None = None) -> list[Request]:
        """Since the last time, of one process or of all."""
        try:
            lines = Path(self.log).read_text().splitlines()
        except FileNotFoundError:
            return []
        os.unlink(self.log)
        found = [Request.parse(line) for line in lines]
        return [request for request in found if pid in (None, request.pid)]


@pytest.fixture
def hierarchy(tmp_path: Path) -> Hierarchy:
    return Hierarchy(tmp_path)


def documents(requests: list[Request]) -> list[str]:
    return sorted(request.key for request in requests if not request.is_chunk)


def chunks(requests: list[Request]) -> list[str]:
    return sorted(request.key for request in requests if request.is_chunk)


def on_machine(directory: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function where the cache is in a directory of that machine's."""
    with xzcache.config.set(directory=str(directory)):
        return function(*args)


def elsewhere(directory: Path, function: Callable[..., Any], *args: Any) -> Any:
    """The same in another process."""
    return neighbours.run(on_machine, directory, function, *args)


def values_of(pickled: list[bytes]) -> list[Any]:
    """What copies of arrays read, all at once."""
    copies = [pickle.loads(each) for each in pickled]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(whole, copies))


def opened_arrays(hierarchy: Hierarchy, zarr_format: Any, consolidated: bool, *names: str) -> list[Any]:
    group = zarr.open_group(hierarchy.opened(), mode="r", zarr_format=zarr_format, use_consolidated=consolidated)
    return [group[name] for name in names]


def pickles(hierarchy: Hierarchy, zarr_format: Any, consolidated: bool, *names: str) -> list[bytes]:
    return [pickle.dumps(array) for array in opened_arrays(hierarchy, zarr_format, consolidated, *names)]


def values_there(hierarchy: Hierarchy, zarr_format: Any, consolidated: bool, *names: str) -> list[Any]:
    """What an opening shows."""
    return [whole(array) for array in opened_arrays(hierarchy, zarr_format, consolidated, *names)]


def put_array(writer: Store, name: str, size: int, first: int, zarr_format: Any = 3, **options: Any) -> list[int]:
    """An array of chunks of three; its values."""
    data = np.arange(first, first + size)
    zarr.create_array(writer, name=name, data=data, chunks=(3,), zarr_format=zarr_format, overwrite=True, **options)
    return data.tolist()


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """Where two machines have their caches."""
    return tmp_path / "machine a", tmp_path / "machine b"


@formats
@consolidation
def test_a_copy_does_not_ask_for_the_documents_that_its_original_asked_for(
    hierarchy: Hierarchy, machines: tuple[Path, Path], zarr_format: int, consolidated: bool
) -> None:
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    expected = put_array(hierarchy.writer, "x", 5, 0, zarr_format)
    consolidate(hierarchy.writer, zarr_format, consolidated)
    a, _ = machines
    (array,) = on_machine(a, opened_arrays, hierarchy, zarr_format, consolidated, "x")
    assert documents(hierarchy.requests())
    copy = pickle.dumps(array)
    assert elsewhere(a, values_of, [copy] * 2) == [expected] * 2
    assert documents(requests := hierarchy.requests()) == []
    assert len(chunks(requests)) == 2
    # nor does a store that opens the array again
    store = pickle.dumps(array.store_path.store)
    assert elsewhere(a, open_copy, store, "x", zarr_format) == expected
    assert consolidated or hierarchy.requests() == []
    # one that was never used has to
    fresh = on_machine(a, lambda: pickle.dumps(hierarchy.opened()))
    assert elsewhere(a, open_copy, fresh, "x", zarr_format) == expected
    assert documents(hierarchy.requests())


def open_copy(pickled: bytes, name: str, zarr_format: Any) -> Any:
    return whole(zarr.open_array(pickle.loads(pickled), path=name, mode="r", zarr_format=zarr_format))


async def test_the_length_of_a_pickle_does_not_tell_what_was_read(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path)
    lengths = {len(pickle.dumps(store))}
    for number in range(500):
        path = f"group {number}/array"
        await source._store.set(f"{path}/zarr.json", buffer(b'{"node_type": "array"}'))
        for name in ("zarr.json", ".zarray", "c/0"):
            await read(store, f"{path}/{name}")
        if number in (0, 1, 5, 20, 100):
            lengths.add(len(pickle.dumps(store)))
    lengths.add(len(pickle.dumps(store)))
    assert len(lengths) == 1
    assert lengths.pop() < 2000
    copy = pickle.loads(pickle.dumps(store))
    before = len(pickle.dumps(copy))
    await read(copy, "another/zarr.json")
    assert len(pickle.dumps(copy)) == before < 2000


def test_a_copy_that_asks_each_time(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    store = cached("directory", source, tmp_path, revalidate=True)
    write_now(source, "zarr.json", b"{}")
    assert read_now(store, "zarr.json") == b"{}"
    copy = pickle.loads(pickle.dumps(store))
    write_now(source, "zarr.json", b'{"a": 1}')
    assert read_now(copy, "zarr.json") == b'{"a": 1}'


# -- several machines


@formats
@consolidation
def test_another_machine_is_told_of_a_change(
    hierarchy: Hierarchy, machines: tuple[Path, Path], zarr_format: int, consolidated: bool
) -> None:
    a, b = machines
    how = (hierarchy, zarr_format, consolidated, "x", "y")
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    before = [put_array(hierarchy.writer, name, 5, 0, zarr_format) for name in ("x", "y")]
    consolidate(hierarchy.writer, zarr_format, consolidated)
    assert elsewhere(b, values_there, *how) == before
    # the chunk that was half filled is another one now
    zarr.open_array(hierarchy.writer, path="x", mode="a", zarr_format=zarr_format).append([95, 96])
    consolidate(hierarchy.writer, zarr_format, consolidated)
    now = [[*before[0], 95, 96], before[1]]
    x, y = on_machine(a, pickles, *how)
    hierarchy.requests()
    assert elsewhere(b, values_of, [x, y] * 4) == now * 4
    requests = hierarchy.requests()
    assert max(Counter(documents(requests)).values()) == 1
    assert Counter(request.key for request in requests if request.is_chunk).most_common(1)[0][1] == 1
    # of what did not change nothing is fetched again
    assert not [key for key in chunks(requests) if key.startswith("y/")]
    # what one process of a machine found out, the others need not
    assert elsewhere(b, values_of, [x, y]) == on_machine(b, values_of, [x, y]) == now
    assert hierarchy.requests() == []


@formats
@pytest.mark.parametrize("there", [True, False], ids=["consolidated", "single"])
@pytest.mark.parametrize("here", [True, False], ids=["consolidated", "single"])
def test_another_machine_is_told_of_other_attributes(
    hierarchy: Hierarchy, machines: tuple[Path, Path], here: bool, there: bool, zarr_format: int
) -> None:
    a, b = machines
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    for version in (1, 2, 3):
        # a scale, as it were: with another one, what is packed alike is something else
        now = put_array(hierarchy.writer, "x", 5, version, zarr_format, attributes={"version": version})
        zarr.consolidate_metadata(hierarchy.writer, zarr_format=zarr_format)
        if version == 1:
            assert on_machine(b, values_there, hierarchy, zarr_format, there, "x") == [now]
        assert on_machine(b, values_of, on_machine(a, pickles, hierarchy, zarr_format, here, "x")) == [now]


@pytest.mark.parametrize("revalidate", ["open", 0, 1, 60, True])
def test_whatever_the_policy_another_machine_is_told(
    hierarchy: Hierarchy, machines: tuple[Path, Path], revalidate: Any
) -> None:
    a, b = machines

    def copy() -> bytes:
        store = hierarchy.opened(revalidate=revalidate)
        return pickle.dumps(zarr.open_array(store, path="x", mode="r", zarr_format=3))

    for size in (4, 5, 4):
        now = put_array(hierarchy.writer, "x", size, size)
        assert on_machine(b, values_of, [on_machine(a, copy)]) == [now]


@formats
@consolidation
def test_another_machine_that_knows_as_much_asks_for_nothing(
    hierarchy: Hierarchy, machines: tuple[Path, Path], zarr_format: int, consolidated: bool
) -> None:
    a, b = machines
    how = (hierarchy, zarr_format, consolidated, "x")
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    expected = put_array(hierarchy.writer, "x", 5, 0, zarr_format)
    consolidate(hierarchy.writer, zarr_format, consolidated)
    copies = on_machine(a, pickles, *how) * 3
    hierarchy.requests()
    # where nothing is cached there is nothing to doubt
    assert elsewhere(b, values_of, copies) == [expected] * 3
    assert documents(requests := hierarchy.requests()) == []
    assert len(chunks(requests)) == 2
    for _ in range(2):
        assert elsewhere(b, values_of, copies) == [expected] * 3
        assert hierarchy.requests() == []
    assert elsewhere(b, values_there, *how) == [expected]
    assert chunks(hierarchy.requests()) == []
    assert elsewhere(b, values_of, on_machine(a, pickles, *how)) == [expected]
    assert chunks(hierarchy.requests()) == []


def any_node(hierarchy: Hierarchy, *names: str) -> list[bytes]:
    """As `pickles`, by who knows neither the format nor whether there is a group."""
    group = zarr.open(hierarchy.opened(), mode="r")
    return [pickle.dumps(group[name]) for name in names]


WAYS: dict[str, Callable[[Hierarchy, Any], list[bytes]]] = {
    "consolidated": lambda hierarchy, zarr_format: pickles(hierarchy, zarr_format, True, "x"),
    "single": lambda hierarchy, zarr_format: pickles(hierarchy, zarr_format, False, "x"),
    "any": lambda hierarchy, zarr_format: any_node(hierarchy, "x"),
    "path": lambda hierarchy, zarr_format: [
        pickle.dumps(zarr.open_array(hierarchy.opened(), path="x", mode="r", zarr_format=zarr_format))
    ],
}


@formats
@pytest.mark.parametrize("there", WAYS)
@pytest.mark.parametrize("here", WAYS)
def test_what_is_unchanged_stays(
    hierarchy: Hierarchy, machines: tuple[Path, Path], here: str, there: str, zarr_format: int
) -> None:
    a, b = machines
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    expected = put_array(hierarchy.writer, "x", 5, 0, zarr_format)
    zarr.consolidate_metadata(hierarchy.writer, zarr_format=zarr_format)
    copies = on_machine(a, WAYS[here], hierarchy, zarr_format)
    for pickled in (on_machine(b, WAYS[there], hierarchy, zarr_format), copies):
        assert on_machine(b, values_of, pickled) == [expected]
    found = Counter(chunks(hierarchy.requests()))
    assert found.total() == len(found) == 2
    assert elsewhere(b, values_of, copies) == [expected]
    assert chunks(hierarchy.requests()) == []


def test_a_copy_that_knows_less_changes_nothing(hierarchy: Hierarchy, machines: tuple[Path, Path]) -> None:
    a, b = machines
    zarr.create_group(hierarchy.writer)
    put_array(hierarchy.writer, "x", 5, 0)
    old = on_machine(a, pickles, hierarchy, 3, False, "x")
    now = put_array(hierarchy.writer, "x", 5, 100, attributes={"version": 2})
    assert on_machine(b, values_there, hierarchy, 3, False, "x") == [now]
    hierarchy.requests()
    for _ in range(2):
        assert elsewhere(b, values_of, old * 3) == [now] * 3
    requests = hierarchy.requests()
    assert chunks(requests) == []
    assert max(Counter(documents(requests)).values()) == 1
    assert elsewhere(b, values_of, on_machine(a, pickles, hierarchy, 3, False, "x")) == [now]
    assert chunks(hierarchy.requests()) == []


@formats
@consolidation
def test_metadata_that_go_back_to_an_earlier_state(
    hierarchy: Hierarchy, machines: tuple[Path, Path], zarr_format: int, consolidated: bool
) -> None:
    a, b = machines
    zarr.create_group(hierarchy.writer, zarr_format=zarr_format)
    for turn in range(5):
        now = put_array(hierarchy.writer, "x", 4 + turn % 2, 10 * turn, zarr_format)
        consolidate(hierarchy.writer, zarr_format, consolidated)
        copies = on_machine(a, pickles, hierarchy, zarr_format, consolidated, "x")
        assert elsewhere(b, values_of, copies) == [now]
        assert on_machine(b, values_of, copies) == [now]


@pytest.mark.parametrize("root", ["first", "last"])
def test_more_arrays_than_a_copy_has_room_for(hierarchy: Hierarchy, machines: tuple[Path, Path], root: str) -> None:
    a, b = machines
    names = [f"x{number}" for number in range(90)]

    def put(first: int) -> list[list[int]]:
        zarr.create_group(hierarchy.writer, overwrite=True)
        return [put_array(hierarchy.writer, name, 1 + first, first) for name in names]

    def opened() -> list[bytes]:
        store = hierarchy.opened()
        if root == "first":
            zarr.open_group(store, mode="r", zarr_format=3)
        arrays = [zarr.open_array(store, path=name, mode="r", zarr_format=3) for name in names]
        if root == "last":
            zarr.open_group(store, mode="r", zarr_format=3)
        return [pickle.dumps(array) for array in arrays]

    for first in (1, 2):
        expected = put(first)
        copies = on_machine(a, opened)
        hierarchy.requests()
        assert on_machine(b, values_of, copies) == expected
        assert max(Counter(documents(hierarchy.requests())).values(), default=0) <= 1
    assert on_machine(b, values_of, copies) == expected
    assert hierarchy.requests() == []


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "2 .": ("x", {"zarr_format": 2}),
    "2 /": ("x", {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}),
    "2 c": ("q/c", {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}),
    "2 -c": ("x-c", {"zarr_format": 2}),
    "3 .": ("x", {"chunk_key_encoding": {"name": "default", "separator": "."}}),
    "3 /": ("c", {}),
}


@pytest.mark.parametrize("name", ODD)
def test_more_documents_than_a_copy_has_room_for_and_odd_chunk_keys(
    hierarchy: Hierarchy, machines: tuple[Path, Path], name: str
) -> None:
    a, b = machines
    path, options = ODD[name]
    zarr_format = options.get("zarr_format", 3)

    def opened() -> bytes:
        store = hierarchy.opened()
        array = zarr.open_array(store, path=path, mode="r", zarr_format=zarr_format)
        for number in range(100):
            assert read_now(store, f"g{number}/zarr.json") is None
        return pickle.dumps(array)

    for size in (4, 5):
        data = np.full((size, 2), size)
        zarr.create_array(hierarchy.writer, name=path, data=data, chunks=(2, 2), overwrite=True, **options)
        assert on_machine(b, values_of, [on_machine(a, opened)]) == [data.tolist()]


@formats
def test_attributes_of_groups_on_another_machine(
    hierarchy: Hierarchy, machines: tuple[Path, Path], zarr_format: Any
) -> None:
    a, b = machines

    def copy() -> bytes:
        store = hierarchy.opened()
        group = zarr.open_group(store, mode="r", zarr_format=zarr_format, use_consolidated=False)
        assert dict(group["x"].attrs) == dict(group.attrs)
        return pickle.dumps(store)

    for version in (1, 2):
        zarr.create_group(hierarchy.writer, zarr_format=zarr_format, attributes={"v": version}, overwrite=True)
        put_array(hierarchy.writer, "x", 4, version, zarr_format, attributes={"v": version})
        copies = on_machine(a, copy)
        for place in (elsewhere, on_machine):
            assert place(b, attributes_of, copies, zarr_format) == [{"v": version}] * 2


def attributes_of(pickled: bytes, zarr_format: Any) -> list[dict[str, Any]]:
    group = zarr.open_group(pickle.loads(pickled), mode="r", zarr_format=zarr_format, use_consolidated=False)
    return [dict(group.attrs), dict(group["x"].attrs)]


def test_sizes_on_another_machine(hierarchy: Hierarchy, machines: tuple[Path, Path]) -> None:
    a, b = machines

    def copy() -> bytes:
        return pickle.dumps(zarr.open_array(hierarchy.opened(), mode="r", zarr_format=3))

    for size in (3, 7):
        zarr.create_array(hierarchy.writer, data=np.arange(size), chunks=(size,), compressors=None, overwrite=True)
        assert on_machine(b, size_of, on_machine(a, copy)) == 8 * size
        assert on_machine(b, values_of, [on_machine(a, copy)]) == [list(range(size))]


def size_of(pickled: bytes) -> int:
    return asyncio.run(pickle.loads(pickled).store_path.store.getsize("c/0"))


@pytest.mark.parametrize("second", ["copy", "opened"])
@pytest.mark.parametrize("first", ["copy", "opened", "neither"])
async def test_a_fetch_that_began_before_a_change_does_not_outlive_it(
    first: str, second: str, machines: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = machines
    source = LocalStore(tmp_path / "source")

    async def put(version: int) -> None:
        await source.set("x/zarr.json", buffer(b'{"node_type": "array", "version": %d}' % version))
        await source.set("x/c/0", buffer(b"%d" % version))

    async def store_on_b(how: str) -> xzcache.CacheStore:
        """One that has seen the document, or a copy of one that has."""
        with xzcache.config.set(directory=str(a if how == "copy" else b)):
            store = xzcache.CacheStore(CountingStore(source))
        if how != "neither":
            await read(store, "x/zarr.json")
        with xzcache.config.set(directory=str(b)):
            return pickle.loads(pickle.dumps(store)) if how == "copy" else store

    await put(1)
    early = await store_on_b(first)
    early._store.hold("get", "x/c/0")
    reading = asyncio.create_task(read(early, "x/c/0"))
    await early._store._gates["get", "x/c/0"].arrived()
    await put(2)
    late = await store_on_b(second)
    asking = asyncio.create_task(read(late, "x/c/0"))
    # it may wait for the other one, as long as it does not take what that brings
    await asyncio.wait([asking], timeout=0.1)
    early._store.let_go("get", "x/c/0")
    assert await reading == b"1"
    assert await asking == b"2"
    assert await read(late, "x/c/0") == b"2"


def test_another_machine_through_a_real_server(s3: S3Server, machines: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = machines
    where = place("obstore", s3, tmp_path)

    def copies() -> list[bytes]:
        return [pickle.dumps(xr.open_zarr(where.given, engine="zcache", chunks={}))] * 3

    for change in (made, appended):
        change(where.writer, 3, True)
        pickled, now = on_machine(a, copies), truth(where.writer, True)
        s3.reset()
        assert all(same(found, now) for found in elsewhere(b, loaded, pickled))
        answers = [(tally.path, tally.requests) for tally in s3.counts().tallies]
        assert all(requests == 1 for _, requests in answers)
        # where nothing was cached, there was nothing to be in doubt about
        assert ("zarr.json" in asked(s3)) == (change is appended)


def loaded(pickled: list[bytes]) -> list[xr.Dataset]:
    return [pickle.loads(each).load() for each in pickled]
