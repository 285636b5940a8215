"""Whose bound it is: a named cache has that of the latest request, the default cache is raised but not lowered."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from sources import cached, fill, read_now
from zarr.storage import LocalStore, MemoryStore

import xzcache

CHUNK = 100_000
CHUNKS = 8


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that were logged since the last call."""

    def take() -> list[str]:
        found = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return take


@pytest.fixture
def default(tmp_path: Path) -> Iterator[Path]:
    """The default cache, new."""
    with xzcache.config.set(directory=str(tmp_path / "default")):
        yield tmp_path / "default"


def make(path: Path) -> Path:
    array = zarr.create_array(
        LocalStore(path), name="a", shape=CHUNK * CHUNKS, chunks=CHUNK, dtype="u1", compressors=None, fill_value=0
    )
    array[:] = np.random.default_rng(0).integers(1, 255, CHUNK * CHUNKS, dtype="u1")
    return path


def read(store: Any) -> None:
    zarr.open_array(store, path="a", mode="r", zarr_format=3)[:]


# -- the default cache


def test_one_dataset_does_not_shrink_the_cache_of_all(
    tmp_path: Path, default: Path, warned: Callable[[], list[str]]
) -> None:
    first, second = make(tmp_path / "1.zarr"), make(tmp_path / "2.zarr")
    read(xzcache.CacheStore(first, max_size="5 MB"))
    used = xzcache.info(default).used
    assert used > CHUNK * CHUNKS
    assert warned() == []
    store = xzcache.CacheStore(second, max_size="2 MB")
    read(store)
    (line,) = warned()
    assert "2 MB" in line
    assert "5 MB" in line
    assert "xzcache resize 2MB" in line
    now = xzcache.info(default)
    assert (now.max_size, now.used) == (5_000_000, 2 * used)
    # it shows the bound that there is
    assert store.max_size == store.cache_info()["max_size"] == 5_000_000
    # copies ask for the same, and say nothing more
    for copy in (store.with_read_only(True), pickle.loads(pickle.dumps(store))):
        read(copy)
        assert xzcache.info(default).max_size == 5_000_000
    assert warned() == []


def test_by_xarray(tmp_path: Path, default: Path, warned: Callable[[], list[str]]) -> None:
    for name in ("1.zarr", "2.zarr"):
        xr.Dataset({"a": ("x", np.random.default_rng(0).random(200_000))}).to_zarr(tmp_path / name, consolidated=False)
    xr.open_zarr(tmp_path / "1.zarr", engine="zcache", consolidated=False, max_size="1 GB").load()  # type: ignore[call-arg]
    used = xzcache.info(default).used
    xr.open_zarr(tmp_path / "2.zarr", engine="zcache", consolidated=False, max_size="1.2 MB").load()  # type: ignore[call-arg]
    assert xzcache.info(default).used > used
    assert len(warned()) == 1


def test_a_larger_bound_is_applied(tmp_path: Path, default: Path, warned: Callable[[], list[str]]) -> None:
    source = make(tmp_path / "1.zarr")
    for asked, bound in [("2 MB", 2_000_000), ("3 MB", 3_000_000), (None, None), ("4 MB", None)]:
        read(xzcache.CacheStore(source, max_size=asked))
        assert xzcache.info(default).max_size == bound
    assert len(warned()) == 1


def test_the_larger_of_two_that_wait_to_be_applied(
    tmp_path: Path, default: Path, warned: Callable[[], list[str]]
) -> None:
    source = make(tmp_path / "1.zarr")
    stores = [xzcache.CacheStore(source, max_size=size) for size in ("5 MB", "2 MB", "3 MB")]
    assert not default.exists()
    read(stores[1])
    assert xzcache.info(default).max_size == 5_000_000
    assert len(warned()) == 2


def test_a_default_cache_that_is_named_or_configured(
    tmp_path: Path, default: Path, warned: Callable[[], list[str]]
) -> None:
    """The user names the cache, and so its bound."""
    source = make(tmp_path / "1.zarr")
    read(xzcache.CacheStore(source, max_size="5 MB"))
    read(xzcache.CacheStore(source, max_size="2 MB"))
    assert len(warned()) == 1
    read(xzcache.CacheStore(source, cache_store=default, max_size="2 MB"))
    assert xzcache.info(default).max_size == 2_000_000
    with xzcache.config.set(max_size="1 MB"):
        read(xzcache.CacheStore(source))
    assert xzcache.info(default).max_size == 1_000_000
    assert xzcache.resize("3 MB").max_size == 3_000_000
    assert xzcache.info(default).max_size == 3_000_000


# -- a named cache


def test_a_lowered_bound_says_what_it_evicts(tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    source, cache = make(tmp_path / "1.zarr"), tmp_path / "cache"
    store = xzcache.CacheStore(source, cache_store=cache, max_size="5 MB")
    read(store)
    read(xzcache.CacheStore(source, cache_store=cache, max_size="4 MB"))
    # nothing had to leave
    assert warned() == []
    xzcache.LockedLocalStore(cache, max_size=300_000)
    warned()
    for _ in range(2):
        # opening an array makes a copy of the store, which is no request
        read(store)
    (line,) = warned()
    assert "300 kB" in line
    assert "4 MB" in line
    assert "evicted" in line
    now = xzcache.info(cache)
    assert now.max_size == 300_000
    assert now.used <= 300_000


@pytest.mark.parametrize("size", ["12", "901 kB", 902_000])
@pytest.mark.parametrize("kind", ["directory", "memory", "default"])
def test_a_bound_that_holds_hardly_a_chunk(
    tmp_path: Path, default: Path, kind: str, size: Any, warned: Callable[[], list[str]]
) -> None:
    size = f"{size}{len(kind)}" if size == "12" else size
    source = LocalStore(tmp_path / "x")
    for _ in range(3):
        if kind == "default":
            xzcache.CacheStore(source, max_size=size)
        else:
            cached(kind, source, tmp_path, max_size=size)
    lines = warned()
    # once in a process
    assert len(lines) <= 1
    if isinstance(size, str) and size.isdecimal():
        assert "without a unit" in lines[0]
        assert repr(size) in lines[0]
    xzcache.CacheStore(source, cache_store=MemoryStore(), max_size="1 MB")
    assert warned() == []


# -- clearing one store


def test_clear_cache_says_that_it_was_not_awaited(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, LocalStore(make(tmp_path / "1.zarr")), tmp_path)
    read(store)
    coroutines = [store.clear_cache()]
    assert asyncio.iscoroutine(coroutines[0])
    with pytest.warns(RuntimeWarning, match="await store.clear_cache"):
        coroutines.clear()
    assert store.cache_info()["cached_keys"] == CHUNKS + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.clear_cache().close()
        asyncio.run(store.clear_cache())
    assert store.cache_info()["cached_keys"] == 0
    if hasattr(inspect, "markcoroutinefunction"):
        assert inspect.iscoroutinefunction(store.clear_cache)


async def test_clear_without_and_within_an_event_loop(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, LocalStore(make(tmp_path / "1.zarr")), tmp_path)
    ways: list[Callable[[], Any]] = [store.clear_cache_sync, lambda: xzcache.clear(store)]
    for way in ways:
        for call in (way, lambda way=way: asyncio.to_thread(way)):
            await asyncio.to_thread(read, store)
            assert store.cache_info()["cached_keys"] == CHUNKS + 1
            done = call()
            if inspect.isawaitable(done):
                await done
            assert store.cache_info()["cached_keys"] == 0
    await asyncio.gather(store.clear_cache(), asyncio.create_task(store.clear_cache()))
    await asyncio.wait_for(store.clear_cache(), 10)


def test_a_bound_that_is_smaller_than_an_object_is_logged_once(
    cache_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = MemoryStore()
    asyncio.run(fill(source, a=bytes(3_000_000), b=bytes(3_000_000), c=b"small"))
    store = cached(cache_kind, source, tmp_path, max_size="2 MB")
    for key in "abc":
        read_now(store, key)
    store.cache_info()
    told = [record.message for record in caplog.records if "larger than max_size" in record.message]
    assert len(told) == 1
    assert told[0].startswith("an object of 3 MB is larger than max_size=2 MB of the cache")
