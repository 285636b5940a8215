"""``dataset.zcache``: what of a dataset is cached, whichever way it was opened and whatever was done to it since."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import xzcache


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = xr.Dataset(
        {"t": (("time", "x"), np.random.default_rng(0).random((8, 4))), "n": ("x", np.arange(4) + 1)},
        {"time": np.arange("2000-01-01", "2000-01-09", dtype="M8[D]").astype("M8[ns]"), "x": np.arange(4.0) + 1},
    )
    made["t"].encoding = {"chunks": (2, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.to_zarr(tmp_path / "x.zarr", zarr_format=2)
        made.to_zarr(tmp_path / "x.zarr", group="g", mode="a", zarr_format=2)
    return tmp_path / "x.zarr"


@pytest.mark.parametrize("chunks", [None, {}, {"time": 4}])
@pytest.mark.parametrize("group", [None, "g"])
def test_the_part_of_each_variable_that_is_cached(source: Path, tmp_path: Path, group: str | None, chunks: Any) -> None:
    dataset = xzcache.open_zarr(source, group=group, chunks=chunks, cache_store=tmp_path / "cache")
    # indexes are read when a dataset is opened
    assert dataset.zcache.cached_fraction() == {"t": 0.0, "n": 0.0, "time": 1.0, "x": 1.0}
    part = dataset.isel(time=slice(0, 4))
    part["t"].mean().compute()
    assert part.zcache.cached_fraction()["t"] == 0.5
    again = xzcache.open_zarr(source, group=group, chunks=chunks, cache_store=tmp_path / "cache")
    again["t"].isel(time=0).to_dataset(name="t").compute()
    assert again.zcache.cached_fraction() == {"t": 0.5, "n": 0.0, "time": 1.0, "x": 1.0}
    assert again.zcache.stats()["hits"] > 0
    assert again.zcache.info() == xzcache.info(tmp_path / "cache")
    assert "50%" in repr(again.zcache)
    assert "50%" in again.zcache._repr_html_()


def test_of_several_sources(tmp_path: Path) -> None:
    for year in (2000, 2001):
        made = xr.Dataset({"t": ("time", np.arange(4.0) + 1)}, {"time": np.arange(4) + year * 10})
        made["t"].encoding = {"chunks": (2,)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.to_zarr(tmp_path / f"{year}.zarr")
    dataset = xzcache.open_mfdataset([tmp_path / "2000.zarr", tmp_path / "2001.zarr"], cache_store=tmp_path / "cache")
    dataset["t"].isel(time=0).compute()
    fractions = dataset.zcache.cached_fraction()
    assert fractions["t"] == 0.25
    assert dataset.zcache.stats()["misses"] > 0
    dataset["t"].compute()
    assert dataset.zcache.cached_fraction()["t"] == 1.0


@pytest.mark.parametrize("chunks", [None, {}])
def test_the_part_is_known_without_cached_documents(source: Path, tmp_path: Path, chunks: Any) -> None:
    dataset = xzcache.open_zarr(source, chunks=chunks, cache_store=tmp_path / "cache")
    dataset["t"].isel(time=slice(0, 4)).compute()
    for file in (tmp_path / "cache").rglob(".z*"):
        if file.is_file():
            file.unlink()
    assert {array.name: array.total for array in xzcache.ls(tmp_path / "x.zarr", tmp_path / "cache")}["t"] is None
    fractions = dataset.zcache.cached_fraction()
    assert (fractions["t"], fractions["n"], fractions["time"]) == (0.5, 0.0, None)


def test_a_part_that_cannot_be_told(source: Path, tmp_path: Path) -> None:
    dataset = xzcache.open_zarr(source, cache_store=tmp_path / "cache")
    dataset["t"].compute()
    xzcache.cleanup_resources()
    for file in (tmp_path / "cache").rglob("index*"):
        file.write_bytes(b"no index" * 1000) if file.is_file() else None
    assert dataset.zcache.cached_fraction()["t"] is None


def test_a_dataset_that_is_read_past_any_cache() -> None:
    import xzcache.xarray

    dataset = xr.Dataset({"t": ("x", np.arange(4))})
    with pytest.raises(ValueError, match="engine='zcache'"):
        dataset.zcache.cached_fraction()
    assert "engine='zcache'" in repr(dataset.zcache)
    assert xzcache.xarray.ZcacheAccessor(dataset)._repr_html_() is None


def test_which_chunks_of_a_variable_are_cached(source: Path, tmp_path: Path) -> None:
    dataset = xzcache.open_zarr(source, cache_store=tmp_path / "cache")
    dataset["t"].isel(time=slice(2, 5)).compute()
    assert dataset.zcache.chunks("t").tolist() == [[0], [2], [2], [0]]
    # an index is in memory
    assert dataset.zcache.chunks("time").tolist() == [2]
    with pytest.raises(ValueError, match="name='u' is no variable"):
        dataset.zcache.chunks("u")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = dataset.zcache.map("t")
    axes.figure.canvas.draw()
    assert axes.get_title() == "t: 50% of the chunks are cached"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["not cached", "cached"]
    assert dataset.zcache.map("time", ax=axes) is axes


def test_parts_of_shards_and_absent_chunks_on_a_map(tmp_path: Path) -> None:
    values = np.zeros(32)
    values[:16] = 1
    # a store that does not say when it was changed, and costs a request
    source = zarr.storage.WrapperStore(zarr.storage.MemoryStore())
    group = zarr.create_group(source)
    group.create_array("t", data=values, chunks=(2,), shards=(8,), dimension_names=["x"])
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", read_only=True)
    dataset = xr.open_zarr(store, consolidated=False)
    dataset["t"][:2].compute()
    dataset["t"][24:26].compute()
    states = dataset.zcache.chunks("t").tolist()
    assert states[0] in (1, 2)
    assert states[1:] == [0, 0, 3]
