"""Paths on this machine: what Zarr and xarray find under a name, the cache finds under the same one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore

import xzcache

NAMES = [
    "run_3.zarr",
    "run#3.zarr",
    "run?3.zarr",
    "run;3.zarr",
    "run%203.zarr",
    "run%233.zarr",
    "a b#c?d",
    "a:b#c.zarr",
]
SPELLINGS: dict[str, Callable[[Path], str | Path]] = {
    "text": str,
    "path": lambda path: path,
    "relative text": lambda path: path.name,
    "relative path": lambda path: Path(path.name),
    "home": lambda path: f"~/{path.name}",
    "URL of a file": lambda path: f"file://{path}",
}
named = pytest.mark.parametrize("name", NAMES)
spelled = pytest.mark.parametrize("spelling", SPELLINGS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XZCACHE_DIRECTORY", str(tmp_path / "cache"))
    return home


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (OSError, ImportError):
        # of old, Zarr has no word for URLs of files
        return "nothing"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset in each place that a library may take for the one that is meant, each with a value of its own."""
    root = tmp_path_factory.mktemp("filled")
    cut = {name.split(sign)[0] for name in NAMES for sign in "#?;%"}
    for number, name in enumerate(sorted({*NAMES, *cut, "run 3.zarr"})):
        data = xr.Dataset({"v": ("x", np.full(4, number))})
        data.to_zarr(LocalStore(root / name), zarr_format=3, consolidated=False)
    return root


@pytest.fixture
def places(filled: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(filled)
    monkeypatch.setenv("HOME", str(filled))
    return filled


@spelled
def test_a_store_reads_where_zarr_does(places: Path, spelling: str) -> None:
    for name in NAMES:
        given = SPELLINGS[spelling](places / name)
        # Zarr takes a tilde as it is
        text = os.path.expanduser(given) if isinstance(given, str) else given
        expected = outcome(lambda text=text: int(zarr.open_group(text, mode="r")["v"][0]))
        if expected != "nothing":
            store = xzcache.CacheStore(given, read_only=True)
            assert int(zarr.open_group(store, mode="r")["v"][0]) == expected
            assert store.path is not None
            assert int(zarr.open_group(LocalStore(store.path), mode="r")["v"][0]) == expected


DOORS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "xr.open_zarr": (
        lambda path: xr.open_zarr(path, consolidated=False),
        lambda path: xr.open_zarr(path, engine="zcache", consolidated=False),
    ),
    "xr.open_dataset": (
        lambda path: xr.open_dataset(path, engine="zarr", consolidated=False),
        lambda path: xr.open_dataset(path, engine="zcache", consolidated=False),
    ),
    "xzcache.open_zarr": (
        lambda path: xr.open_zarr(path, consolidated=False),
        lambda path: xzcache.open_zarr(path, consolidated=False),
    ),
    "xzcache.open_mfdataset": (
        lambda path: xr.open_mfdataset([path], engine="zarr", consolidated=False),
        lambda path: xzcache.open_mfdataset([path], consolidated=False),
    ),
}


@pytest.mark.parametrize("door", DOORS)
@spelled
def test_the_engine_reads_where_xarray_does(places: Path, spelling: str, door: str) -> None:
    plain, cached = DOORS[door]
    for name in NAMES:
        given = SPELLINGS[spelling](places / name)
        expected = outcome(lambda given=given: int(plain(given)["v"][0]))
        if expected != "nothing":
            assert int(cached(given)["v"][0]) == expected


@spelled
@named
def test_what_xarray_wrote_is_found(home: Path, name: str, spelling: str) -> None:
    given = SPELLINGS[spelling](home / name)
    try:
        xr.Dataset({"v": ("x", [1, 2])}).to_zarr(given, zarr_format=3, consolidated=False)
    except ImportError:
        return  # of old, Zarr has no word for URLs of files
    for door in DOORS.values():
        assert door[1](given)["v"].values.tolist() == [1, 2]
    made = {path.name for path in home.iterdir()}
    xr.open_dataset(given, engine="zcache", mode="r+", consolidated=False)
    assert {path.name for path in home.iterdir()} == made


@named
def test_a_cache_lies_where_it_is_said_to(home: Path, name: str) -> None:
    source = zarr.storage.MemoryStore()
    zarr.create_array(source, name="a", data=np.arange(4))
    for given in (str(home / name), home / name, f"~/{name}"):
        store = xzcache.CacheStore(source, cache_store=given)
        assert store.cache_info()["cache_directory"] == str(home / name)
    assert zarr.open_array(store, path="a", mode="r")[:].tolist() == [0, 1, 2, 3]
    assert [path.name for path in home.iterdir()] == [name]
