"""The codec pipeline: what is cached is decoded by it, in parts and whole, and nothing is different but the time."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from sources import CountingStore, memory_source, neighbours, pipelines_of
from zarr.codecs import BytesCodec, TransposeCodec
from zarr.core.sync import sync
from zarr.storage import LocalStore

import xzcache
from xzcache import pipeline
from xzcache.directory._namespace import SharedBackend

OURS = "xzcache.pipeline.CachePipeline"
ZARRS = "zarr.core.codec_pipeline.BatchedCodecPipeline"
SHAPE = (37, 50)
LAYOUTS: dict[str, dict[str, Any]] = {
    "raw": {"chunks": (8, 16), "compressors": None},
    "zstd": {"chunks": (8, 16)},
    "sharded": {"chunks": (4, 8), "shards": (16, 16)},
    "index-first": {
        "chunks": (4, 8),
        "shards": {"shape": (16, 16), "index_location": "start"},
    },
    "format-2": {"chunks": (8, 16), "zarr_format": 2},
}
SELECTIONS: list[Any] = [
    (slice(None), slice(None)),
    (slice(3, 30), slice(7, 9)),
    (5, slice(None)),
    (slice(None, None, 3), slice(10, 40, 2)),
]


def made(layout: str) -> tuple[CountingStore, np.ndarray[Any, Any]]:
    """A source with an array of which some chunks are missing, and its values."""
    source = memory_source()
    array = zarr.create_array(source, name="a", shape=SHAPE, dtype="f4", fill_value=-1, **LAYOUTS[layout])
    values = np.full(SHAPE, -1, "f4")
    values[:24, 17:] = np.arange(24 * 33).reshape(24, 33)
    array[:24, 17:] = values[:24, 17:]
    source.calls.clear()
    return source, values


def opened(store: Any, path: str = OURS) -> zarr.Array[Any]:
    with zarr.config.set({"codec_pipeline.path": path}):
        return zarr.open_array(store, path="a", mode="r")


@pytest.mark.parametrize("path", [OURS, ZARRS], ids=["ours", "zarrs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_selections_show_the_truth_and_ask_once(layout: str, path: str, cache_kind: str, tmp_path: Path) -> None:
    source, values = made(layout)
    cache = tmp_path / "cache" if cache_kind == "directory" else zarr.storage.MemoryStore()
    array = opened(xzcache.CacheStore(source, cache_store=cache), path)
    assert (type(array.async_array.codec_pipeline) is pipeline.CachePipeline) == (path == OURS)
    for selection in SELECTIONS:
        np.testing.assert_array_equal(array[selection], values[selection])
    source.calls.clear()
    for selection in SELECTIONS:
        np.testing.assert_array_equal(array[selection], values[selection])
    assert not source.calls


def test_a_fetch_needs_no_thread_that_waits_for_it(tmp_path: Path) -> None:
    """Many readers at once of what is not cached, from a source that needs Zarr's few threads: nobody hangs."""
    zarr.create_array(LocalStore(tmp_path / "source"), name="a", shape=(400, 16), chunks=(1, 16), dtype="i4")[:] = 7
    array = opened(xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache"))
    with ThreadPoolExecutor(16) as readers:
        parts = list(readers.map(lambda row: int(array[row : row + 25].sum()), range(0, 400, 25)))
    assert parts == [7 * 25 * 16] * 16


def test_half_of_it_cached(tmp_path: Path) -> None:
    source, values = made("zstd")
    store = xzcache.CacheStore(source, cache_store=tmp_path)
    opened(store)[:16]
    source.calls.clear()
    np.testing.assert_array_equal(opened(store)[:], values)
    asked = [key for call, key in source.calls if call == "get" and "/c/" in key]
    assert sorted(asked) == sorted({f"a/c/{row}/{column}" for row in (2, 3, 4) for column in range(4)})


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_a_hit_that_was_in_vain_is_not_counted(told: bool, tmp_path: Path) -> None:
    """A shard of which a part is cached is read again where the rest is missing."""
    source, values = made("sharded")
    files = LocalStore(tmp_path / "source")
    for key, value in source._store._store_dict.items():
        sync(files.set(key, value))
        # a file that is old enough tells its state, unlike a store in memory
        os.utime(tmp_path / "source" / key, (1, 1))
    store = xzcache.CacheStore(files if told else source, cache_store=tmp_path / "cache")
    array = opened(store)
    np.testing.assert_array_equal(array[16:20, 32:40], values[16:20, 32:40])
    store.cache_info()
    before = store.cache_stats()
    np.testing.assert_array_equal(array[16:24, 32:40], values[16:24, 32:40])
    after = store.cache_stats()
    # where nothing tells the state of the shard, the chunk that was there is asked for again, together with the other
    asked_again = after["misses"] - before["misses"]
    assert asked_again in ((1,) if told else (1, 2))
    # the index of the shard, and perhaps the chunk that was there
    assert after["hits"] + after["misses"] == before["hits"] + before["misses"] + 3
    np.testing.assert_array_equal(array[16:24, 32:40], values[16:24, 32:40])
    assert store.cache_stats()["misses"] == after["misses"]


# -- chunks that are read straight into the result


RAW: dict[str, dict[str, Any]] = {
    "rows": {"shape": (7, 12), "chunks": (1, 12)},
    "blocks": {"shape": (7, 12), "chunks": (2, 5)},
    "bands": {"shape": (7, 12), "chunks": (3, 12)},
    "one": {"shape": (7, 12), "chunks": (7, 12)},
    "cubes": {"shape": (4, 3, 6), "chunks": (1, 3, 2)},
    "scalar": {"shape": (), "chunks": ()},
    "big-endian": {"shape": (7, 12), "chunks": (1, 12), "serializer": BytesCodec(endian="big")},
    "columns": {"shape": (7, 12), "chunks": (7, 1), "config": {"order": "F"}},
    "transposed": {"shape": (7, 12), "chunks": (1, 12), "filters": TransposeCodec(order=(1, 0))},
    "booleans": {"shape": (7, 12), "chunks": (1, 12), "dtype": "bool"},
    "dates": {"shape": (7, 12), "chunks": (1, 12), "dtype": "datetime64[s]"},
    "format-2": {"shape": (7, 12), "chunks": (1, 12), "zarr_format": 2},
    "others-way-round": {"shape": (7, 12), "chunks": (1, 12), "zarr_format": 2, "dtype": ">i4"},
}
READS: dict[str, Callable[[Any], Any]] = {
    "all": lambda array: array[...],
    "a row": lambda array: array[-1] if array.ndim else array[()],
    "part": lambda array: array[1:5, 3:11] if array.ndim else array[()],
    "each": lambda array: [array[number] for number in range(array.shape[0])] if array.ndim else array[()],
    "steps": lambda array: array[::2, ::3] if array.ndim else array[()],
    "scattered": lambda array: array.oindex[[3, 1], :] if isinstance(array, zarr.Array) and array.ndim == 2 else 0,
}


@pytest.mark.parametrize("layout", RAW)
def test_raw_chunks_however_they_lie(layout: str, tmp_path: Path) -> None:
    source = memory_source()
    options = {"dtype": "i4", "compressors": None} | RAW[layout]
    values = np.arange(np.prod(options["shape"], dtype=int)).reshape(options["shape"]).astype(options["dtype"])
    zarr.create_array(source, name="a", **options)[...] = values
    for _ in range(2):
        array = opened(xzcache.CacheStore(source, cache_store=tmp_path))
        for name, read in READS.items():
            for _ in range(2):
                expected = values[[3, 1]] if name == "scattered" and values.ndim == 2 else read(values)
                np.testing.assert_array_equal(read(array), expected)


def read_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[bool]]:
    """An array of rows that has been read twice, its values, and a record of what is read straight from then on."""
    source = memory_source()
    values = np.arange(200_000, dtype="i4").reshape(2, 100_000)
    options: dict[str, Any] = {"dtype": "i4", "compressors": None, "chunks": (1, 100_000)}
    zarr.create_array(source, name="a", shape=values.shape, **options)[:] = values
    store = xzcache.CacheStore(source, cache_store=tmp_path)
    array = opened(store)
    for _ in range(2):
        assert (array[:] == values).all()
        store.cache_info()
    straight: list[bool] = []
    into = SharedBackend.get_nowait

    def watched(*args: Any, **options: Any) -> Any:
        found = into(*args, **options)
        if options.get("place") is not None:
            straight.append(found is not None)
        return found

    monkeypatch.setattr(SharedBackend, "get_nowait", watched)
    return array, values, straight


def test_whole_chunks_are_read_straight_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, values, straight = read_rows(tmp_path, monkeypatch)
    before = array.store.cache_stats()
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[1], values[1])
    assert straight == [True] * 3
    after = array.store.cache_stats()
    assert after["hits"] == before["hits"] + 3
    assert after["bytes_from_cache"] == before["bytes_from_cache"] + 3 * 400_000


@pytest.mark.parametrize("how", ["shorter", "longer", "other", "gone"])
def test_a_file_that_somebody_changed_is_not_read_straight(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, values, straight = read_rows(tmp_path, monkeypatch)
    (path,) = (path for path in tmp_path.rglob("c/0/0") if path.is_file())
    if how == "shorter":
        os.truncate(path, 1000)
    elif how == "longer":
        os.truncate(path, 400_001)
    elif how == "other":
        path.write_bytes(bytes(400_000))
    else:
        path.unlink()
    np.testing.assert_array_equal(array[:], values)
    assert sorted(straight) == [False, True]


def test_a_read_that_comes_up_short_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, values, straight = read_rows(tmp_path, monkeypatch)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *rest: preadv(fd, [buffers[0][:1000]], *rest))
    np.testing.assert_array_equal(array[:], values)
    # what came up short was read to its end
    assert straight == [True, True]


def test_arrays_of_other_stores_are_read_as_ever() -> None:
    source, values = made("zstd")
    np.testing.assert_array_equal(opened(source)[:], values)


def test_a_damaged_entry_is_fetched_again(tmp_path: Path) -> None:
    source, values = made("raw")
    cache = tmp_path / "cache"
    opened(xzcache.CacheStore(source, cache_store=cache))[:]
    entries = [path for path in cache.rglob("c/*/*") if path.is_file()]
    for path in entries:
        path.write_bytes(bytes(path.stat().st_size))
    assert entries
    np.testing.assert_array_equal(opened(xzcache.CacheStore(source, cache_store=cache))[:], values)


def read_pickled(array: bytes) -> tuple[str, float]:
    array_ = pickle.loads(array)
    return type(array_.async_array.codec_pipeline).__qualname__, float(array_[:].sum())


def test_it_survives_pickling_to_another_process(tmp_path: Path) -> None:
    zarr.create_array(LocalStore(tmp_path / "source"), name="a", shape=64, chunks=8, dtype="i4")[:] = 3
    array = opened(xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache"))
    assert neighbours.run(read_pickled, pickle.dumps(array)) == ("CachePipeline", 192.0)


# -- the engine


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    xr.Dataset({"t": (("y", "x"), np.arange(12.0).reshape(3, 4))}).to_zarr(tmp_path / "data.zarr")
    return tmp_path / "data.zarr"


@pytest.mark.parametrize(
    ("options", "kind"), [({}, "CachePipeline"), ({"pipeline": False}, "BatchedCodecPipeline")], ids=["", "off"]
)
def test_the_engine_chooses_it(dataset: Path, tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    before = zarr.config.get("codec_pipeline.path")
    cache = tmp_path / "cache"
    for ds in (
        xr.open_zarr(dataset, engine="zcache", chunks=None, cache_store=cache, **options),
        xr.open_dataset(dataset, engine="zcache", cache_store=cache, **options),
        xr.open_zarr(dataset, engine="zcache", cache_store=cache, **options),
        xr.open_dataset(dataset, engine="zcache", cache_store=cache, chunks={}, **options),
        xr.open_dataset(dataset, engine="zcache", cache_store=cache, cache_members=False, **options),
        xr.open_datatree(dataset, engine="zcache", cache_store=cache, **options).to_dataset(),
        xr.open_datatree(dataset, engine="zcache", cache_store=cache, chunks={}, **options).to_dataset(),
        xr.open_groups(dataset, engine="zcache", cache_store=cache, **options)["/"],
        xzcache.open_mfdataset([dataset], cache_store=cache, **options).map(lambda x: x),
        xzcache.open_mfdataset([dataset], cache_store=cache, preprocess=lambda x: x[["t"]], **options),
        xzcache.open_mfdataset([dataset], cache_store=cache, parallel=True, **options),
    ):
        assert pipelines_of(ds) == {kind}
        np.testing.assert_array_equal(ds.t, np.arange(12.0).reshape(3, 4))
    assert zarr.config.get("codec_pipeline.path") == before


def test_the_users_own_choice_stands(dataset: Path, tmp_path: Path) -> None:
    class Own(zarr.core.codec_pipeline.BatchedCodecPipeline):
        pass

    zarr.registry.register_pipeline(Own)
    own = f"{Own.__module__}.{Own.__qualname__}"
    with zarr.config.set({"codec_pipeline.path": own}):
        ds = xr.open_dataset(dataset, engine="zcache", cache_store=tmp_path / "cache")
        assert pipelines_of(ds) == {"Own"}
        assert zarr.config.get("codec_pipeline.path") == own


def test_nonsense_names_itself(dataset: Path) -> None:
    with pytest.raises(TypeError, match="pipeline='fast' is not accepted: give True or False"):
        xr.open_zarr(dataset, engine="zcache", pipeline="fast")
