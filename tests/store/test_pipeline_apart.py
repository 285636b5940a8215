"""The codec pipeline reads cached chunks and nothing else: all else is the configured pipeline's, as if alone."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import obstore.store
import pytest
import xarray as xr
import zarr
from sources import PATIENCE, memory_source, neighbours, pipelines_of
from zarr.abc.codec import CodecPipeline
from zarr.abc.store import Store
from zarr.api.asynchronous import create_array
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.storage import LocalStore, MemoryStore, ObjectStore

import xzcache
from xzcache.pipeline import CachePipeline

OURS = "xzcache.pipeline.CachePipeline"
ZARRS = "zarr.core.codec_pipeline.BatchedCodecPipeline"
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (2,), "compressors": None},
    "zstd": {"chunks": (2,)},
    "sharded": {"chunks": (2,), "shards": (4,)},
    "format-2": {"chunks": (2,), "zarr_format": 2},
}


def opened(store: Store, path: str = OURS) -> zarr.Array[Any]:
    with zarr.config.set({"codec_pipeline.path": path}):
        return zarr.open_array(store, path="a", mode="r+" if not store.read_only else "r")


# -- what is written


STORES: dict[str, Callable[[Path], Store]] = {
    "another-store": lambda place: ObjectStore(obstore.store.MemoryStore()),
    "memory": lambda place: MemoryStore(),
    "cache-over-obstore": lambda place: xzcache.CacheStore(
        ObjectStore(obstore.store.MemoryStore()), cache_store=place / "cache"
    ),
    "cache-over-directory": lambda place: xzcache.CacheStore(place / "source", cache_store=place / "cache"),
    "cache-in-memory": lambda place: xzcache.CacheStore(memory_source(), cache_store=MemoryStore()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", STORES)
def test_what_is_written_is_what_zarrs_pipeline_writes(kind: str, layout: str, tmp_path: Path) -> None:
    """Also where an array is made smaller, written and made larger: what was outside meanwhile is kept in a shard."""
    found = {}
    for path in (ZARRS, OURS):
        store = STORES[kind](tmp_path / path)
        options = {"dtype": "i2", "fill_value": 0} | LAYOUTS[layout]
        zarr.create_array(store, name="a", shape=(4,), **options)
        array = opened(store, path)
        seen = []
        array[:] = [1, 2, 3, 4]
        seen.append(array[:].tolist())
        array.resize((2,))
        array[:] = [9, 9]
        seen.append(array[:].tolist())
        array.resize((4,))
        seen.append(array[:].tolist())
        array[1:3] = 5
        array.append(np.asarray([6, 7, 8], "i2"))
        seen.append(array[:].tolist())
        array[::2] = 0
        seen += [array[:].tolist(), array.oindex[[3, 0]].tolist(), array.vindex[[1, 4]].tolist()]
        found[path] = seen
    assert found[OURS] == found[ZARRS]


# -- everything but reading


def test_each_member_of_a_pipeline_is_passed_on() -> None:
    """A member that a newer Zarr adds to pipelines has to be thought of: inherited, it would pass the inner one by."""
    members = {name for name in vars(CodecPipeline) if not name.startswith("_")}
    assert members <= {name for name in vars(CachePipeline) if not name.startswith("_")}


def test_it_is_what_is_behind_it() -> None:
    source = xzcache.CacheStore(memory_source(), cache_store=MemoryStore())
    zarr.create_array(source, name="a", shape=(4,), dtype="i4", chunks=(2,), filters=None, compressors=ZstdCodec())
    plain: Any = opened(source, ZARRS).async_array.codec_pipeline
    ours: Any = opened(source).async_array.codec_pipeline
    assert ours.inner == plain
    assert tuple(ours) == tuple(plain)
    for name in (
        "array_array_codecs",
        "array_bytes_codec",
        "bytes_bytes_codecs",
        "batch_size",
        "supports_partial_decode",
        "supports_partial_encode",
    ):
        assert getattr(ours, name) == getattr(plain, name)
    with pytest.raises(AttributeError):
        _ = ours.no_such_thing
    again: Any = opened(source).async_array.codec_pipeline
    assert (ours == again, hash(ours)) == (True, hash(again))
    assert ours != plain
    assert repr(plain) in repr(ours)
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert CachePipeline.from_codecs([BytesCodec()], batch_size=3).batch_size == 3


@pytest.mark.parametrize("chosen", [None, ZARRS, OURS])
def test_arrays_of_other_stores_have_the_pipeline_of_zarr(chosen: str | None, tmp_path: Path) -> None:
    expected = {False: BatchedCodecPipeline, True: BatchedCodecPipeline if chosen == ZARRS else CachePipeline}
    with zarr.config.set({"codec_pipeline.path": chosen} if chosen else {}):
        for name, layout in LAYOUTS.items():
            plain = LocalStore(tmp_path / f"{name}-{chosen}")
            zarr.create_array(plain, name="a", shape=(4,), dtype="i2", **layout)[:] = [1, 2, 3, 4]
            through = xzcache.CacheStore(plain, cache_store=tmp_path / "cache")
            for is_cached, store in enumerate((plain, through)):
                array = zarr.open_array(store, path="a")
                assert type(array.async_array.codec_pipeline) is expected[bool(is_cached)]
                assert type(zarr.open_group(store)["a"].async_array.codec_pipeline) is expected[bool(is_cached)]
                array.resize((3,))
                array.append(np.asarray([5], "i2"))
                assert array[:].tolist()[-2:] == [3, 5]


def test_it_is_a_default_that_can_be_switched_off(tmp_path: Path) -> None:
    """A process that imports xzcache reads with it, unless its configuration or Zarr's says something else."""
    zarr.create_array(LocalStore(tmp_path / "source"), name="a", shape=(4,), dtype="i2")[:] = [1, 2, 3, 4]
    code = """
import sys, zarr, xzcache
store = xzcache.CacheStore(sys.argv[1], cache_store=sys.argv[2])
print(type(zarr.open_array(store, path="a", mode="r").async_array.codec_pipeline).__name__)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "cache")]
    for environment, expected in (
        ({}, "CachePipeline"),
        ({"XZCACHE_PIPELINE": "false"}, "BatchedCodecPipeline"),
        ({"ZARR_CODEC_PIPELINE__PATH": OURS}, "CachePipeline"),
    ):
        done = subprocess.run(arguments, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_another_pipeline_may_be_behind_it() -> None:
    class Own(BatchedCodecPipeline):
        pass

    class Mine(CachePipeline):
        behind = Own

    zarr.registry.register_pipeline(Mine)
    source = memory_source()
    zarr.create_array(source, name="a", shape=(4,), dtype="i4", chunks=(2,))
    path = f"{Mine.__module__}.{Mine.__qualname__}"
    array = opened(xzcache.CacheStore(source, cache_store=MemoryStore()), path)
    found: Any = array.async_array.codec_pipeline
    assert (type(found), type(found.inner)) == (Mine, Own)
    array[:] = [1, 2, 3, 4]
    assert array[:].tolist() == [1, 2, 3, 4]


def test_pickles_of_earlier_versions_are_read() -> None:
    """They name a function and the codecs."""
    codecs: Any = ((), BytesCodec(), (ZstdCodec(),), 1)
    old = b"cxzcache.pipeline\n_restored\n" + pickle.dumps(codecs, protocol=2)[2:-1] + b"R."
    assert pickle.loads(old) == CachePipeline(CachePipeline.from_codecs([BytesCodec(), ZstdCodec()], batch_size=1))


# -- arrays of other threads


class Slow(LocalStore):
    """Lets nobody read before somebody else has done something; and says when it is asked."""

    asked = threading.Event()
    go = threading.Event()

    async def get(self, *args: Any, **options: Any) -> Any:
        self.asked.set()
        assert await asyncio.to_thread(self.go.wait, PATIENCE)
        return await super().get(*args, **options)


def made_meanwhile() -> tuple[str, str, list[int]]:
    """An array that is made on an event loop of its own, by a program that has nothing to do with xzcache."""

    async def make() -> Any:
        store = ObjectStore(obstore.store.MemoryStore())
        return await create_array(store, shape=(4,), chunks=(2,), shards=(4,), dtype="i2", fill_value=0)

    made = asyncio.run(make())
    array = zarr.Array(made)
    array[:] = [1, 2, 3, 4]
    array.resize((2,))
    array[:] = 9
    array.resize((4,))
    return type(made.codec_pipeline).__name__, str(zarr.config.get("codec_pipeline.path")), array[:].tolist()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    xr.Dataset({"t": (("y", "x"), np.arange(12.0).reshape(3, 4))}).to_zarr(tmp_path / "data.zarr")
    return tmp_path / "data.zarr"


@pytest.mark.parametrize("how", ["open_zarr", "open_dataset", "open_datatree", "open_mfdataset"])
def test_what_others_make_while_the_engine_opens_is_theirs(how: str, dataset: Path, tmp_path: Path) -> None:
    ways: dict[str, Callable[..., Any]] = {
        "open_zarr": lambda store, **options: xr.open_zarr(store, engine="zcache", **options),
        "open_dataset": lambda store, **options: xr.open_dataset(store, engine="zcache", **options),
        "open_datatree": lambda store, **options: xr.open_datatree(store, engine="zcache", **options).to_dataset(),
        "open_mfdataset": lambda store, **options: xzcache.open_mfdataset([store], **options),
    }
    Slow.asked.clear()
    Slow.go.clear()
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(ways[how], Slow(dataset, read_only=True), cache_store=tmp_path / "cache")
        try:
            assert Slow.asked.wait(PATIENCE)
            assert made_meanwhile() == ("BatchedCodecPipeline", OURS, [9, 9, 3, 4])
        finally:
            Slow.go.set()
        ds = opening.result(PATIENCE)
    assert pipelines_of(ds) == {"CachePipeline"}
    np.testing.assert_array_equal(ds.t, np.arange(12.0).reshape(3, 4))


def test_many_threads_that_open_and_many_that_do_not(dataset: Path, tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def open_it() -> set[tuple[str, float]]:
        start.wait(PATIENCE)
        found = set()
        for _ in range(5):
            ds = xr.open_zarr(dataset, engine="zcache", cache_store=tmp_path / "cache", chunks=None)
            (kind,) = pipelines_of(ds)
            found.add((kind, float(ds.t.sum())))
        return found

    def make_it() -> set[tuple[str, float]]:
        start.wait(PATIENCE)
        found = set()
        for _ in range(30):
            array = zarr.create_array(MemoryStore(), shape=(4,), dtype="i4")
            array[:] = 2
            again = zarr.open_array(array.store)
            found.add((type(again.async_array.codec_pipeline).__name__, float(again[:].sum())))
        return found

    with ThreadPoolExecutor(8) as threads:
        tasks = [threads.submit(open_it if number % 2 else make_it) for number in range(8)]
        made, ours = (set().union(*(task.result(PATIENCE) for task in tasks[odd::2])) for odd in (0, 1))
    assert made == {("BatchedCodecPipeline", 8.0)}
    assert ours == {("CachePipeline", 66.0)}


# -- the arrays that the engine opens


def read_there(pickled: bytes) -> tuple[set[str], float]:
    ds = pickle.loads(pickled)
    return pipelines_of(ds), float(ds.t.sum())


@pytest.mark.parametrize("chunks", [None, {}])
def test_a_worker_gets_them_as_they_are(chunks: Any, dataset: Path, tmp_path: Path) -> None:
    ds = xr.open_zarr(dataset, engine="zcache", cache_store=tmp_path / "cache", chunks=chunks)
    assert neighbours.run(read_there, pickle.dumps(ds)) == ({"CachePipeline"}, 66.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_made_of_them_reads_the_same(layout: str, tmp_path: Path) -> None:
    source = memory_source()
    zarr.create_array(source, name="a", shape=(8,), dtype="i4", **LAYOUTS[layout])[:] = np.arange(8)
    array = opened(xzcache.CacheStore(source, cache_store=tmp_path))
    for _ in range(2):
        assert array[:].tolist() == list(range(8))
        if hasattr(array, "with_config"):
            # older ones have no such thing
            assert array.with_config({"order": "F"})[:].tolist() == list(range(8))
        assert array.update_attributes({"one": 1})[2:].tolist() == list(range(2, 8))
    array.resize((5,))
    assert array[:].tolist() == list(range(5))


# -- what goes wrong


def broken(place: Path, layout: str) -> None:
    """An array whose first chunk is not what its codecs expect."""
    zarr.create_array(LocalStore(place), name="a", shape=(8,), dtype="i4", **LAYOUTS[layout])[:] = np.arange(8)
    path = min(path for path in place.rglob("*") if path.is_file() and path.name == "0")
    path.write_bytes(b"junk" * 3)


def said(array: zarr.Array[Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as raised:  # noqa: PT011  # whatever the codec raises
        _ = array[:]
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chunk_that_cannot_be_decoded_is_the_codecs_own_error(layout: str, tmp_path: Path) -> None:
    broken(tmp_path / "source", layout)
    plain = said(opened(LocalStore(tmp_path / "source", read_only=True), ZARRS))
    store = xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache", read_only=True)
    array = opened(store)
    for _ in range(3):
        assert said(array) == plain
        store.cache_info()
    assert array[-2:].tolist() == [6, 7] or layout == "sharded"


READER = f"""
import sys
import zarr
import xzcache
source, cache = sys.argv[1:]
store = xzcache.CacheStore(source, cache_store=cache, read_only=True)
with zarr.config.set({{"codec_pipeline.path": "{OURS}"}}):
    array = zarr.open_array(store, path="a", mode="r")
for _ in range(3):
    assert (array[:] == 7).all()
    store.cache_info()
print("ready", flush=True)
sys.stdin.readline()
print("right" if (array[:] == 7).all() and (array[1] == 7).all() else "wrong", flush=True)
"""


@pytest.mark.skipif(which("strace") is None, reason="no strace to make a system call fail with")
@pytest.mark.parametrize("error", ["EIO", "EOPNOTSUPP", "EINVAL", "ENOMEM"])
def test_a_cached_file_that_cannot_be_read_is_no_error(error: str, tmp_path: Path) -> None:
    """Where its bytes were to be read straight into the result."""
    options: dict[str, Any] = {"dtype": "i4", "compressors": None, "chunks": (1, 100_000)}
    zarr.create_array(LocalStore(tmp_path / "source"), name="a", shape=(2, 100_000), **options)[:] = 7
    words = [sys.executable, "-c", READER, str(tmp_path / "source"), str(tmp_path / "cache")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        cached = [path for path in (tmp_path / "cache").rglob("c/*/0") if path.is_file()]
        assert len(cached) == 2
        trace = ["strace", "-f", "-p", str(reader.pid), "-e", f"inject=preadv2:error={error}"]
        for path in cached:
            trace += ["-P", str(path)]
        with subprocess.Popen(trace, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            while "attached" not in (line := tracer.stderr.readline()):
                assert line, "strace has ended"
            answer, _ = reader.communicate("\n", timeout=PATIENCE)
            told = tracer.stderr.read()
    assert f"= -1 {error}" in told
    assert answer == "right\n"
