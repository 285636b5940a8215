"""Zarr's `FusedCodecPipeline` over a cache: it reads synchronously what is cached, and nothing waits in its threads."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import obstore.store
import pytest
import zarr
from processes import Child
from sources import PATIENCE, buffer, memory_source
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, ObjectStore, WrapperStore

import xzcache

if not hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    pytest.skip("this Zarr has no such pipeline", allow_module_level=True)

FUSED = "zarr.core.codec_pipeline.FusedCodecPipeline"
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (8, 16), "compressors": None},
    "zstd": {"chunks": (8, 16)},
    "format-2": {"chunks": (8, 16), "zarr_format": 2},
    "sharded": {"chunks": (4, 8), "shards": (8, 16)},
}
SELECTIONS: list[Any] = [np.s_[:, :], np.s_[3:30, 7:9], np.s_[5, :], np.s_[::3, 10:40:2]]


class Watched(xzcache.CacheStore):
    """A cache that records how it is called; `disturb` is called between Zarr's question and its reads."""

    calls: list[str]
    disturb: Callable[[], None] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self.calls = []
        super().__init__(*args, **options)

    @property
    def _supports_sync_io(self) -> bool:
        answer = super()._supports_sync_io
        if self.disturb is not None:
            self.disturb()
        return answer

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        self.calls.append("get_sync")
        return super().get_sync(key, **options)

    async def get(self, key: str, *args: Any, **options: Any) -> Buffer | None:
        if not key.endswith(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")):
            self.calls.append("get")
        return await super().get(key, *args, **options)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.calls.append("set_sync")
        super().set_sync(key, value)

    def delete_sync(self, key: str) -> None:
        self.calls.append("delete_sync")
        super().delete_sync(key)


def opened(store: Store, mode: Any = "r") -> Any:
    with zarr.config.set({"codec_pipeline.path": FUSED}):
        array = zarr.open_array(store, path="a", mode=mode)
    assert type(array.async_array.codec_pipeline).__name__ == "FusedCodecPipeline"
    return array


def rows(source: Store, count: int = 16) -> np.ndarray[Any, Any]:
    """Write an array of which each chunk is a row, and return its values."""
    values = np.arange(count * 32, dtype="i4").reshape(count, 32)
    zarr.create_array(source, name="a", shape=values.shape, chunks=(1, 32), dtype="i4")[:] = values
    return values


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("a/c/*/*") if path.is_file()]


# -- what is cached


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read_only", [True, False])
def test_what_is_cached_is_read_synchronously(layout: str, read_only: bool, tmp_path: Path) -> None:
    """Also where chunks are missing at the source; but not parts of shards."""
    source = memory_source()
    values = np.full((37, 50), -1, "f4")
    values[:24, 17:] = np.arange(24 * 33).reshape(24, 33)
    zarr.create_array(source, name="a", shape=values.shape, dtype="f4", fill_value=-1, **LAYOUTS[layout])[:] = values
    store = Watched(source, cache_store=tmp_path, read_only=read_only, missing_max_age_seconds=600)
    array = opened(store, "r" if store.read_only else "r+")
    for _ in range(2):
        np.testing.assert_array_equal(array[:], values)
        store.cache_info()
    source.forget()
    store.calls.clear()
    before = store.cache_stats()
    for selection in SELECTIONS:
        np.testing.assert_array_equal(array[selection], values[selection])
    assert source.calls == []
    after = store.cache_stats()
    if layout == "sharded":
        assert "get_sync" not in store.calls
    else:
        assert set(store.calls) == {"get_sync"}
        # misses are those that a missing chunk has never been
        assert after["hits"] - before["hits"] == len(store.calls)
    assert after["misses"] == before["misses"]


def test_files_that_this_process_has_not_verified_are_read_synchronously_as_well(tmp_path: Path) -> None:
    """As by each new process; a damaged one is read past the cache, and is fetched and stored by the next read."""
    source = memory_source()
    values = rows(source)
    store = Watched(source, cache_store=tmp_path, read_only=True)
    array = opened(store)
    np.testing.assert_array_equal(array[:], values)
    store.cache_info()
    for path in entries(tmp_path):
        os.utime(path)
    damaged = min(entries(tmp_path))
    data = bytearray(damaged.read_bytes())
    data[7] ^= 1
    damaged.write_bytes(data)
    for expected, requests in (("get_sync", 1), ("get", 1), ("get_sync", 0)):
        store.calls.clear()
        source.forget()
        np.testing.assert_array_equal(array[:], values)
        assert set(store.calls) == {expected}
        assert len(source.calls) == requests
        store.cache_info()


@pytest.mark.parametrize(("size", "way"), [(1 << 10, "get"), (1 << 20, "get_sync")])
def test_a_thread_is_woken_for_one_chunk_only_if_it_is_large(size: int, way: str, tmp_path: Path) -> None:
    source = memory_source()
    values = np.arange(2 * size, dtype="u1").reshape(2, size)
    zarr.create_array(source, name="a", shape=values.shape, chunks=(1, size), dtype="u1")[:] = values
    store = Watched(source, cache_store=tmp_path, read_only=True)
    array = opened(store)
    np.testing.assert_array_equal(array[:], values)
    store.cache_info()
    store.calls.clear()
    np.testing.assert_array_equal(array[1], values[1])
    assert store.calls == [way]


def test_a_cache_in_memory_is_read_as_ever() -> None:
    source = memory_source()
    values = rows(source)
    store = Watched(source, cache_store=MemoryStore())
    for _ in range(3):
        np.testing.assert_array_equal(opened(store)[:], values)
    assert "get_sync" not in store.calls


def test_a_source_that_is_always_asked_is_asked_each_time(tmp_path: Path) -> None:
    source = memory_source()
    values = rows(source)
    store = Watched(source, cache_store=tmp_path, revalidate=True)
    array = opened(store)
    for _ in range(3):
        source.forget()
        np.testing.assert_array_equal(array[:], values)
        assert source.reads >= len(values)


def test_an_entry_that_is_too_old_is_not_read(tmp_path: Path) -> None:
    source = memory_source()
    values = rows(source)
    store = Watched(source, cache_store=tmp_path, max_age_seconds=0)
    array = opened(store)
    for _ in range(3):
        source.forget()
        np.testing.assert_array_equal(array[:], values)
        assert source.reads >= len(values)


def test_what_another_store_has_written_is_seen(tmp_path: Path) -> None:
    rows(LocalStore(tmp_path / "source"))
    array = opened(xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache"))
    other: Any = zarr.open_array(xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache"), path="a")
    for number in range(3):
        for _ in range(2):
            array[:]
        other[3] = number
        assert array[:][3].tolist() == [number] * 32


def write_rows(link: Connection, root: Path) -> None:
    """In another process: write rows 8 to 15 until told to stop, each with one number, and see each write at once."""
    array = opened(xzcache.CacheStore(root / "source", cache_store=root / "cache"), "r+")
    link.send("ready")
    number = 0
    while not link.poll():
        number += 1
        row = 8 + number % 8
        array[row] = number
        assert array[row : row + 2][0].tolist() == [number] * 32
    link.recv()


@pytest.mark.slow
@pytest.mark.parametrize("max_size", ["200 kB", "1 MB"])
def test_no_reader_sees_what_was_before_a_write(max_size: str, tmp_path: Path) -> None:
    """Readers of many rows, beside writers of this process and another one, also where entries are evicted."""
    values = rows(LocalStore(tmp_path / "source"), 128)
    values[:16] = 0
    array: Any = zarr.open_array(LocalStore(tmp_path / "source"), path="a")
    array[:16] = 0
    settings: dict[str, Any] = {"cache_store": tmp_path / "cache", "max_size": max_size}
    store = Watched(tmp_path / "source", read_only=True, **settings)
    array, mine = opened(store), opened(xzcache.CacheStore(tmp_path / "source", **settings), "r+")
    other = Child(write_rows, tmp_path)
    other.hear("ready")
    written = np.zeros(8, "i4")
    is_done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 81):
                mine[number % 8] = written[number % 8] = number
        finally:
            is_done.set()

    def read(seed: int) -> None:
        starts = np.random.default_rng(seed)
        while not is_done.is_set():
            start = int(starts.integers(0, 128 - 8))
            before = written.copy()
            for row, found in enumerate(array[start : start + 8], start):
                if row < 16:
                    assert len(set(found.tolist())) == 1
                    assert row >= 8 or found[0] >= before[row]
                else:
                    np.testing.assert_array_equal(found, values[row])

    with ThreadPoolExecutor(5) as threads:
        for future in [threads.submit(write), *(threads.submit(read, seed) for seed in range(4))]:
            future.result()
    other.send(None)
    other.result()
    assert "get_sync" in store.calls


# -- what is not


class Meeting(WrapperStore[Store]):
    """A source whose reads of chunks all wait until some of them have arrived."""

    def __init__(self, store: Store, count: int) -> None:
        super().__init__(store)
        self.missing = count
        self.met = asyncio.Event()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if "/c/" in key:
            self.missing -= 1
            if self.missing <= 0:
                self.met.set()
            await asyncio.wait_for(self.met.wait(), PATIENCE)
        return await self._store.get(key, prototype or default_buffer_prototype(), byte_range)

    def get_sync(self, key: str, **options: Any) -> Buffer | None:
        raise AssertionError("one after the other")


def test_missing_chunks_are_fetched_all_at_once(tmp_path: Path) -> None:
    """However few threads decode, and whatever else of the batch is cached."""
    source = MemoryStore()
    values = rows(source)
    meeting = Meeting(source, 4)
    store = xzcache.CacheStore(meeting, cache_store=tmp_path, namespace="meeting")
    with zarr.config.set({"codec_pipeline.max_workers": 1, "async.concurrency": 16}):
        array = opened(store)
        np.testing.assert_array_equal(array[:4], values[:4])
        np.testing.assert_array_equal(array[:4], values[:4])
        meeting.missing, meeting.met = 12, asyncio.Event()
        np.testing.assert_array_equal(array[:], values)


def test_many_readers_of_what_is_not_cached_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Of a source that needs Zarr's few threads."""
    values = rows(LocalStore(tmp_path / "source"), 400)
    array = opened(xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache"))
    with ThreadPoolExecutor(16) as readers:
        parts = list(readers.map(lambda row: array[row : row + 25], range(0, 400, 25), timeout=PATIENCE))
    np.testing.assert_array_equal(np.concatenate(parts), values)


SOURCES: dict[str, Callable[[Path], Store]] = {
    "directory": lambda place: LocalStore(place / "source"),
    "memory": lambda place: MemoryStore(),
    "obstore": lambda place: ObjectStore(obstore.store.MemoryStore()),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_entries_that_are_evicted_before_they_are_read_are_read_past_the_cache(kind: str, tmp_path: Path) -> None:
    """By more readers than Zarr has threads, of which the source of a directory would need one each."""
    source = SOURCES[kind](tmp_path)
    values = rows(source, 400)
    store = Watched(source, cache_store=tmp_path / "cache", read_only=True)
    array = opened(store, "r" if store.read_only else "r+")
    for _ in range(2):
        np.testing.assert_array_equal(array[:], values)
        store.cache_info()
    store.calls.clear()
    asked: list[object] = []
    all_asked = threading.Event()

    def evict() -> None:
        # on Zarr's loop, which goes on to read when it returns
        asked.append(None)
        if len(asked) == 16:
            for path in entries(tmp_path / "cache"):
                path.unlink()
            all_asked.set()

    store.disturb = evict
    blocked = store.get_sync

    def wait_and_read(key: str, **options: Any) -> Buffer | None:
        assert all_asked.wait(PATIENCE)
        return blocked(key, **options)

    store.get_sync = wait_and_read  # type: ignore[method-assign]
    before = store.cache_stats()
    with ThreadPoolExecutor(16) as readers:
        parts = list(readers.map(lambda row: array[row : row + 25], range(0, 400, 25), timeout=PATIENCE))
    np.testing.assert_array_equal(np.concatenate(parts), values)
    assert store.calls == ["get_sync"] * 400
    assert store.cache_stats()["misses"] == before["misses"] + 400


def test_an_error_of_the_source_is_raised_there_as_ever(tmp_path: Path) -> None:
    source = memory_source()
    values = rows(source)
    store = Watched(source, cache_store=tmp_path, read_only=True)
    array = opened(store)
    for _ in range(2):
        np.testing.assert_array_equal(array[:], values)
        store.cache_info()

    def evict() -> None:
        for path in entries(tmp_path):
            path.unlink()
        source.errors["get_sync"] = PermissionError("no")

    store.disturb = evict
    with pytest.raises(PermissionError, match="no"):
        array[:]


# -- what is written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_synchronously(layout: str, tmp_path: Path) -> None:
    source: Any = memory_source()
    options: dict[str, Any] = {"shape": (37, 50), "dtype": "f4", "fill_value": 0}
    zarr.create_array(source, name="a", **options, **LAYOUTS[layout])
    store = Watched(source, cache_store=tmp_path)
    array = opened(store, "r+")
    expected = np.zeros((37, 50), "f4")
    for number, selection in enumerate(SELECTIONS):
        store.calls.clear()
        array[selection] = number
        assert not {"get_sync", "set_sync", "delete_sync"} & set(store.calls)
        expected[selection] = number
        np.testing.assert_array_equal(array[:], expected)
        np.testing.assert_array_equal(array[:], expected)
    array[:] = 0
    assert not [key for key in source._store._store_dict if "c/" in key]


def test_a_part_of_a_chunk_is_written_into_what_the_source_has_now(tmp_path: Path) -> None:
    """Also where the array was read synchronously before."""
    rows(LocalStore(tmp_path / "source"))
    store = Watched(tmp_path / "source", cache_store=tmp_path / "cache")
    array = opened(store, "r+")
    for _ in range(3):
        array[:]
    assert "get_sync" in store.calls
    zarr.open_array(LocalStore(tmp_path / "source"), path="a")[2] = 7
    array[2, :3] = 5
    found: Any = zarr.open_array(LocalStore(tmp_path / "source"), path="a")
    assert found[2].tolist() == [5] * 3 + [7] * 29


# -- called by itself


def test_it_can_be_called_by_itself(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    store = xzcache.CacheStore(source, cache_store=tmp_path if cache_kind == "directory" else MemoryStore())
    assert store.get_sync("a/c/0") is None
    store.set_sync("a/c/0", buffer(b"value"))
    for _ in range(2):
        found = store.get_sync("a/c/0")
        assert found is not None
        assert found.to_bytes() == b"value"
    part = store.get_sync("a/c/0", byte_range=zarr.abc.store.RangeByteRequest(1, 3))
    assert part is not None
    assert part.to_bytes() == b"al"
    store.delete_sync("a/c/0")
    assert store.get_sync("a/c/0") is None
    assert not store._supports_sync_io


DEFAULT = """
import zarr
for settings in (zarr.config.defaults[0], zarr.config.config):
    settings["codec_pipeline"]["path"] = "zarr.core.codec_pipeline.FusedCodecPipeline"
import xzcache
store = xzcache.CacheStore(zarr.storage.MemoryStore(), cache_store=zarr.storage.MemoryStore())
array = zarr.create_array(store, name="a", shape=4, dtype="i4")
array[:] = 3
pipeline = array.async_array.codec_pipeline
assert type(pipeline).__name__ == "CachePipeline" and type(pipeline.inner).__name__ == "FusedCodecPipeline", pipeline
assert array[:].tolist() == [3] * 4
"""


def test_where_it_is_the_default_it_is_behind_our_own() -> None:
    subprocess.run([sys.executable, "-c", DEFAULT], check=True, timeout=PATIENCE)
