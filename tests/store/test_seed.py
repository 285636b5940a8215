"""Code that was written for `zarr.experimental.cache_store.CacheStore` runs unchanged; only the import differs."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.storage
from zarr.experimental.cache_store import CacheStore as ZarrCacheStore
from zarr.storage import LocalStore, MemoryStore

from xzcache import CacheStore

# Zarr took it away again.
GONE = {"key_insert_times"}
INFO = [
    "cache_store_type",
    "max_age_seconds",
    "max_size",
    "current_size",
    "tracked_keys",
    "cached_keys",
    "cache_set_data",
]


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "data.zarr")


def wrapped(where: str) -> tuple[LocalStore, MemoryStore, CacheStore, Any]:
    """A local source, a cache in memory, and an array written through the two."""
    source_store = LocalStore(where)
    cache_store = zarr.storage.MemoryStore()
    cached_store = CacheStore(store=source_store, cache_store=cache_store, max_size=256 * 1024 * 1024)
    array = zarr.zeros((100, 100), chunks=(10, 10), dtype="f8", store=cached_store, mode="w")
    array[:] = np.random.default_rng(1).random((100, 100))
    return source_store, cache_store, cached_store, array


def test_writing_an_array_through_the_cache(where: str) -> None:
    source_store, cache_store, cached_store, array = wrapped(where)
    assert cached_store.max_size == 256 * 1024 * 1024
    keys = {path.relative_to(where).as_posix() for path in Path(where).rglob("*") if path.is_file()}
    assert len(keys) == 101
    # the cache holds the source's keys as they are
    assert set(cache_store._store_dict) == keys
    assert np.array_equal(zarr.open(source_store, mode="r")[:], array[:])


def test_reading_again_and_again(where: str) -> None:
    *_, cached_store, array = wrapped(where)
    before = cached_store.cache_stats()
    for _ in range(10):
        whole = array[:]
    plain = zarr.open(where, mode="r")
    assert np.array_equal(whole, plain[:])
    stats = cached_store.cache_stats()
    assert stats["misses"] == before["misses"]
    assert stats["hits"] == before["hits"] + 10 * 100


@pytest.mark.parametrize(
    "options",
    [
        {"max_size": 256 * 1024 * 1024},
        {"max_size": None},
        {"max_age_seconds": 3600},
        {"max_age_seconds": "infinity"},
        {"cache_set_data": True},
        {"cache_set_data": False},
    ],
    ids=str,
)
def test_each_option(options: dict[str, Any], where: str) -> None:
    # one cache store after the other over the same two stores, as in a notebook
    source_store, cache_store, _, array = wrapped(where)
    cache = CacheStore(store=source_store, cache_store=cache_store, **options)
    ((name, value),) = options.items()
    assert getattr(cache, name) == value
    assert cache.cache_info()[name] == value
    assert np.array_equal(zarr.open_array(cache, mode="r")[:], array[:])


def test_without_options(where: str) -> None:
    cache = CacheStore(store=LocalStore(where), cache_store=MemoryStore())
    theirs = ZarrCacheStore(store=LocalStore(where), cache_store=MemoryStore())
    for name in ("max_size", "max_age_seconds", "cache_set_data"):
        assert getattr(cache, name) == getattr(theirs, name)
        assert cache.cache_info()[name] == theirs.cache_info()[name]


def test_info_and_stats(where: str) -> None:
    *_, cached_store, array = wrapped(where)
    for _ in range(2):
        array[0:50, 0:50]
    info = cached_store.cache_info()
    assert [info[name] for name in INFO[:3]] == ["MemoryStore", "infinity", 256 * 1024 * 1024]
    assert info["current_size"] > 0
    assert info["tracked_keys"] == info["cached_keys"] == 101
    assert info["cache_set_data"] is True
    stats = cached_store.cache_stats()
    assert stats["total_requests"] == stats["hits"] + stats["misses"]
    assert 0 < stats["hit_rate"] <= 1


def test_clearing(where: str) -> None:
    _, cache_store, cached_store, array = wrapped(where)
    asyncio.run(cached_store.clear_cache())
    info = cached_store.cache_info()
    assert info["tracked_keys"] == 0
    assert info["current_size"] == 0
    assert not cache_store._store_dict
    assert np.array_equal(array[:], zarr.open(where, mode="r")[:])


def test_a_local_source_and_a_cache_in_memory(where: str) -> None:
    store = CacheStore(store=LocalStore(where), cache_store=MemoryStore(), max_size=128 * 1024 * 1024)
    zarr.create_array(store, name="x", data=np.arange(10))
    assert zarr.open_array(where, path="x", mode="r")[:].tolist() == list(range(10))
    assert store.cache_info()["cache_store_type"] == "MemoryStore"


def test_a_source_in_memory_and_a_persistent_cache(where: str) -> None:
    memory_store = MemoryStore()
    store = CacheStore(store=memory_store, cache_store=LocalStore(where), max_size=256 * 1024 * 1024)
    zarr.create_array(store, name="x", data=np.arange(10))
    assert zarr.open_array(memory_store, path="x", mode="r")[:].tolist() == list(range(10))
    assert store.cache_info()["current_size"] > 0
    assert any(path.is_file() for path in Path(where).rglob("x/c/*"))


def test_a_first_and_a_second_access(where: str) -> None:
    *_, cached_store, _ = wrapped(where)
    asyncio.run(cached_store.clear_cache())
    array = zarr.open_array(cached_store, mode="r", zarr_format=3)
    first = cached_store.cache_stats()["misses"]
    data = array[20:30, 20:30]
    assert cached_store.cache_stats()["misses"] == first + 1
    again = array[20:30, 20:30]
    assert cached_store.cache_stats()["misses"] == first + 1
    assert np.array_equal(data, again)
    info = cached_store.cache_info()
    assert info["cached_keys"] > 0
    assert info["current_size"] > 0


def test_every_argument_of_zarrs_own_is_taken(where: str) -> None:
    theirs = inspect.signature(ZarrCacheStore.__init__).parameters
    ours = inspect.signature(CacheStore.__init__).parameters
    for name in set(theirs) - GONE:
        assert ours[name].kind == theirs[name].kind, name


def test_every_public_name_of_zarrs_own_is_there() -> None:
    theirs = ZarrCacheStore(MemoryStore(), cache_store=MemoryStore())
    ours = CacheStore(MemoryStore(), cache_store=MemoryStore())
    # what its base, the wrapper, adds for stores that need no loop
    synchronous = {"get_sync", "set_sync", "delete_sync"}
    names = {name for name in dir(theirs) if not name.startswith("_")} - synchronous - GONE
    assert not {name for name in names if not hasattr(ours, name)}


def test_a_cache_store_that_cannot_delete_is_refused_in_the_same_words() -> None:
    class Archive(MemoryStore):
        supports_deletes = False

    for kind in (CacheStore, ZarrCacheStore):
        with pytest.raises(ValueError, match=r"does not support deletes.*must support deletes"):
            kind(MemoryStore(), cache_store=Archive())
