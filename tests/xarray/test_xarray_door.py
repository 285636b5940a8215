"""xarray's ways in through the door: a dataset by each of them, from the source once and then from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from xzcache import xarray as room

WAYS: dict[str, Callable[..., xr.Dataset]] = {
    "open_zarr": room.open_zarr,
    "open_mfdataset": lambda place, **options: room.open_mfdataset(f"{str(place)[:-6]}?.zarr", **options),
    "engine": room.ZcacheBackendEntrypoint().open_dataset,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = xr.Dataset({"t": ("x", np.arange(1.0, 9.0))}, {"x": np.arange(8) + 1})
    made.to_zarr(tmp_path / "a.zarr", zarr_format=2, encoding={"t": {"chunks": (4,)}})
    return tmp_path / "a.zarr"


@pytest.mark.parametrize("way", WAYS)
def test_each_way_in_shows_the_dataset_and_fills_the_cache(way: str, source: Path, tmp_path: Path) -> None:
    for hits in (0, 2):
        with WAYS[way](str(source), cache_store=tmp_path / "cache") as opened:
            assert opened["t"].values.tolist() == np.arange(1.0, 9.0).tolist()
            assert room.ZcacheAccessor(opened).cached_fraction()["t"] == 1.0
            assert room.ZcacheAccessor(opened).stats()["hits"] >= hits


def test_a_cache_is_asked_for_by_its_name_only(source: Path) -> None:
    assert not room.ZcacheBackendEntrypoint().guess_can_open(str(source))


@pytest.mark.parametrize("options", [{"storage_options": {"anon": True}}, {"max_sise": "1 GB"}])
def test_what_makes_no_sense_is_refused(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        room.open_zarr(str(source), cache_store=tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()
