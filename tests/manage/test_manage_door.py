"""Management through the door: what each function says of a cache, of none, and of what makes no sense."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from sources import fill, local_source, read
from zarr.storage import LocalStore

import xzcache
from xzcache import manage


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    array = zarr.create_array(LocalStore(tmp_path / "x.zarr"), name="a", shape=4, chunks=2, dtype="i4")
    array[:] = np.arange(4) + 1
    store = xzcache.CacheStore(tmp_path / "x.zarr", cache_store=tmp_path / "cache", read_only=True)
    zarr.open_array(store, path="a", mode="r", zarr_format=3)[:]
    return tmp_path / "cache"


def test_a_cache_is_seen_sized_checked_and_cleared(cache: Path) -> None:
    found = manage.info(cache)
    assert (found.state, found.ok, found.entries) == ("ok", True, 3)
    assert found.node == str(uuid.UUID(found.node))
    (source,) = manage.ls(directory=cache)
    assert source.entries == 3
    assert [(array.name, array.total) for array in manage.ls("x.zarr", cache)] == [("a", 2)]
    assert manage.resize("2 MB", cache).max_size == manage.info(cache).max_size == 2_000_000
    assert manage.check(cache).ok
    assert manage.clear("x.zarr", directory=cache, dry_run=True).entries == 3
    assert manage.clear(older_than="1d", directory=cache).entries == 0
    assert manage.clear(directory=cache).entries == 3
    assert manage.info(cache).entries == 0


@pytest.mark.parametrize("source", [None, "n"])
async def test_what_is_fetched_while_the_cache_is_cleared_is_not_stored(tmp_path: Path, source: str | None) -> None:
    origin = local_source(tmp_path)
    store = xzcache.CacheStore(origin, cache_store=tmp_path / "cache", namespace="n", revalidate=False)
    await fill(origin, a__c__0=b"old", a__c__1=b"old")
    await read(store, "a/c/1")
    gate = origin.hold("get", "a/c/0")
    reading = asyncio.create_task(read(store, "a/c/0"))
    await gate.arrived()
    await fill(origin, a__c__0=b"new")
    await asyncio.to_thread(manage.clear, source, directory=tmp_path / "cache")
    origin.let_go("get", "a/c/0")
    assert await reading == b"old"
    assert [await read(store, "a/c/0") for _ in range(3)] == [b"new"] * 3


def test_what_is_not_there_is_not_made(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert (manage.info(nowhere).state, manage.info(nowhere).ok) == ("absent", True)
    assert list(manage.ls(directory=nowhere)) == []
    assert manage.clear(directory=nowhere).entries == 0
    assert manage.check(nowhere).ok
    assert not nowhere.exists()


def test_a_source_that_is_not_cached_is_named(cache: Path) -> None:
    with pytest.raises(manage.UnknownSource, match="other"):
        manage.ls("other", cache)


@pytest.mark.parametrize(("age", "seconds"), [("7d", 604_800), ("1.5 hours", 5400), (timedelta(minutes=1), 60), (0, 0)])
def test_ages(age: Any, seconds: float) -> None:
    assert manage.parse_since("older_than", age) == seconds
