"""The codec pipeline: what is cached is decoded by it, in parts and whole, and nothing is different but the time."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from sources import CountingStore, memory_source, neighbours
from zarr.storage import LocalStore

import xzcache

pipeline = pytest.importorskip("xzcache.pipeline", reason="this Zarr has no FusedCodecPipeline", exc_type=ImportError)

OURS = "xzcache.pipeline.CachePipeline"
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_selections_show_the_truth_and_ask_once(layout: str, cache_kind: str, tmp_path: Path) -> None:
    source, values = made(layout)
    cache = tmp_path / "cache" if cache_kind == "directory" else zarr.storage.MemoryStore()
    array = opened(xzcache.CacheStore(source, cache_store=cache))
    assert type(array.async_array.codec_pipeline) is pipeline.CachePipeline
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


def pipelines_of(ds: xr.Dataset) -> set[str]:
    """The pipelines of the arrays behind a dataset."""
    kinds = set()
    for variable in ds.variables.values():
        inner = variable._data
        while not isinstance(inner, zarr.Array):
            inner = getattr(inner, "array", None) if hasattr(inner, "array") else getattr(inner, "_array", None)
            if inner is None:
                break
        else:
            kinds.add(type(inner.async_array.codec_pipeline).__name__)
    return kinds


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
        xzcache.open_mfdataset([dataset], cache_store=cache, **options).map(lambda x: x),
    ):
        assert pipelines_of(ds) <= {kind}
        np.testing.assert_array_equal(ds.t, np.arange(12.0).reshape(3, 4))
    assert pipelines_of(xr.open_dataset(dataset, engine="zcache", cache_store=cache, **options)) == {kind}
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


def test_what_is_chosen_by_many_at_once_is_set_back_by_the_last() -> None:
    before = zarr.config.get("codec_pipeline.path")
    inside, leave = threading.Barrier(3), threading.Event()

    def choose(first: bool) -> str:
        with pipeline.chosen():
            inside.wait(30)
            if first:
                # the one who set it may be the first to go
                return str(zarr.config.get("codec_pipeline.path"))
            leave.wait(30)
            return str(zarr.config.get("codec_pipeline.path"))

    with ThreadPoolExecutor(2) as pool:
        first, last = pool.submit(choose, True), pool.submit(choose, False)
        inside.wait(30)
        assert first.result(30) == OURS
        leave.set()
        assert last.result(30) == OURS
    assert zarr.config.get("codec_pipeline.path") == before


def test_nonsense_names_itself(dataset: Path) -> None:
    with pytest.raises(TypeError, match="pipeline='fast' is not accepted: give True or False"):
        xr.open_zarr(dataset, engine="zcache", pipeline="fast")
