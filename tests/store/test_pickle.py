"""Pickles carry settings and not state, tokens say what the source is, and a fork shares nothing that it must not."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from dask.base import tokenize
from sources import (
    CountingStore,
    buffer,
    cached,
    fill,
    local_source,
    neighbours,
    read,
    read_now,
    write_now,
)
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

import xzcache

SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_size": "1 GB", "max_age_seconds": 60},
    {"revalidate": False, "cache_set_data": False, "read_only": True},
]


def copy_of(store: Any) -> Any:
    return pickle.loads(pickle.dumps(store))


async def test_a_pickle_is_small_after_much_was_read(cache_kind: str, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    large = 25_000_000
    for i in range(4):
        await source.set(f"c/{i}", buffer(bytes(large)))
    store = cached(cache_kind, source, tmp_path)
    fresh = len(pickle.dumps(store))
    for i in range(4):
        assert len(await read(store, f"c/{i}") or b"") == large
    await read(store, "zarr.json")
    await read(store, "c/9", RangeByteRequest(0, 10))
    after = pickle.dumps(store)
    assert len(after) == fresh < 2000
    if cache_kind == "directory":
        os.remove(tmp_path / "source" / "c" / "1")
        assert len(await read(pickle.loads(after), "c/1") or b"") == large


async def test_a_pickle_is_small_after_ranges_were_read(cache_kind: str, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    await source.set("k", buffer(bytes(10_000_000)))
    store = cached(cache_kind, source, tmp_path)
    await read(store, "k", RangeByteRequest(0, 9_000_000))
    assert store.cache_info()["current_size"] == 9_000_000
    assert len(pickle.dumps(store)) < 2000


@pytest.mark.parametrize("options", SETTINGS)
def test_a_copy_is_equal_and_has_the_settings(options: dict[str, Any], cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, LocalStore(tmp_path / "source"), tmp_path, **options)
    copy = copy_of(store)
    assert copy == store
    for name in ("max_size", "max_age_seconds", "revalidate", "cache_set_data", "read_only", "namespace"):
        assert getattr(copy, name) == getattr(store, name)
    assert copy.cache_stats()["total_requests"] == 0


def test_a_copy_shares_the_directory(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    store = cached("directory", source, tmp_path)
    write_now(source, "k", b"1")
    assert read_now(store, "k") == b"1"
    copy = copy_of(store)
    assert read_now(copy, "k") == b"1"
    assert copy._store.reads == 0
    assert copy.cache_info() == store.cache_info()


def test_a_copy_does_not_ask_again(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_array(source, name="x", data=np.arange(4), chunks=(2,))
    store = cached(cache_kind, source, tmp_path)
    opened = zarr.open_array(store, path="x", mode="r", zarr_format=3)
    assert opened[:].tolist() == [0, 1, 2, 3]
    copy = copy_of(opened)
    counted = copy.store_path.store._store
    assert copy[:].tolist() == [0, 1, 2, 3]
    assert zarr.open_array(copy.store_path.store, path="x", mode="r", zarr_format=3)[:].tolist() == [0, 1, 2, 3]
    # a cache in memory goes with its process; there a copy has everything to fetch
    keys = {key for method, key in counted.calls if method == "get"}
    assert keys == (set() if cache_kind == "directory" else {"x/c/0", "x/c/1", "x/zarr.json"})


def test_a_copy_of_a_store_without_a_lasting_name_is_another_source(tmp_path: Path) -> None:
    source = MemoryStore()
    store = cached("directory", source, tmp_path)
    write_now(store, "k", b"original")
    copy = copy_of(store)
    write_now(copy, "k", b"copy")
    # the contents went with the pickle, so that the two differ from now on
    assert read_now(store, "k") == b"original"
    assert read_now(copy, "k") == b"copy"


def test_a_copy_in_another_process_uses_the_default_cache_there(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    write_now(source, "k", b"1")
    with xzcache.config.set(directory=str(tmp_path / "here")):
        store = xzcache.CacheStore(source)
    assert read_now(store, "k") == b"1"
    there = neighbours.run(read_and_tell, store, str(tmp_path / "there"))
    assert there == (b"1", str(tmp_path / "there"), 1)
    assert store.cache_info()["cache_directory"] == str(tmp_path / "here")


def read_and_tell(store: xzcache.CacheStore, directory: str) -> tuple[bytes | None, str, int]:
    with xzcache.config.set(directory=directory):
        copy = copy_of(store)
        return read_now(copy, "k"), copy.cache_info()["cache_directory"], copy._store.reads


def test_a_locked_local_store_is_pickled_by_its_root_and_settings(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache", max_size=1000, min_free=0, read_only=False)
    write_now(store, "k", bytes(500))
    assert len(pickle.dumps(store)) < 1000
    copy = copy_of(store)
    assert copy == store
    assert (copy.max_size, copy.min_free, copy.read_only) == (1000, 0, False)
    assert neighbours.run(read_now, store, "k") == bytes(500)


# -- tokens


def test_equal_sources_have_equal_tokens(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    write_now(source, "k", b"1")
    stores = [
        cached("directory", source, tmp_path),
        cached("directory", LocalStore(tmp_path / "source"), tmp_path, max_size=1000, max_age_seconds=1),
        cached("directory", str(tmp_path / "source"), tmp_path, revalidate=False, read_only=True),
        cached("memory", source, tmp_path, cache_set_data=False),
    ]
    tokens = {tokenize(store) for store in stores}
    assert len(tokens) == 1
    for store in stores:
        read_now(store, "k")
    assert {tokenize(store) for store in stores} == tokens
    assert {tokenize(copy_of(store)) for store in stores} == tokens
    assert neighbours.run(tokenize, stores[0]) in tokens


def test_different_sources_have_different_tokens(tmp_path: Path) -> None:
    stores: list[Any] = [LocalStore(tmp_path / "one"), LocalStore(tmp_path / "two"), MemoryStore(), MemoryStore()]
    caches = [cached("directory", store, tmp_path) for store in stores]
    assert len({tokenize(store) for store in caches}) == 4
    named = cached("directory", stores[0], tmp_path, namespace="another")
    assert tokenize(named) not in {tokenize(store) for store in caches}


def test_the_same_array_opened_twice_has_one_token(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    zarr.create_array(source, name="x", data=np.arange(4), chunks=(2,))

    def token(**options: Any) -> str:
        array = zarr.open_array(cached("directory", source, tmp_path, **options), path="x", mode="r")
        return tokenize(array.store_path.store, array.path)

    assert token() == token(max_age_seconds=5)


# -- other processes


def work(store: xzcache.CacheStore) -> None:
    """Reads, writes and evicts."""
    assert read_now(store, "k") == b"1"
    for i in range(30):
        write_now(store, f"c/{i}", bytes(100))
    assert read_now(store, "c/29") == bytes(100)
    assert read_now(store, "nothing") is None


def audit(store: xzcache.CacheStore) -> None:
    """What the books say is what is there."""
    root = store._cache.root
    entries = [p for p in root.rglob("*") if p.is_file() and ".xzcache" not in p.parts]
    info = store.cache_info()
    assert info["total_keys"] == len(entries)
    assert info["total_size"] == sum(p.stat().st_size for p in entries) <= 2000
    assert not list((root / ".xzcache" / "trash").iterdir())
    assert not [p for p in (root / ".xzcache" / "tmp").rglob("*") if p.is_file()]


def test_a_spawned_process_works(tmp_path: Path) -> None:
    store = cached("directory", local_source(tmp_path), tmp_path, max_size=2000)
    write_now(store, "k", b"1")
    process = multiprocessing.get_context("spawn").Process(target=work, args=(store,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    work(store)
    audit(store)


def fork(function: Callable[[], None]) -> int:
    """Run a function in a forked child, which then ends as forked workers do; returns its pid."""
    with warnings.catch_warnings():
        # this process has threads, as every process that uses Zarr
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def reap(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_works_and_harms_nobody(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, local_source(tmp_path), tmp_path, max_size=2000)
    write_now(store, "k", b"1")
    work(store)
    for _ in range(2):
        reap(fork(lambda: work(store)))
        # the parent goes on with the locks and the lease that it had
        work(store)
    if cache_kind == "directory":
        audit(store)


def test_parent_and_child_share_the_bound(tmp_path: Path) -> None:
    store = cached("directory", local_source(tmp_path), tmp_path, max_size=2000)
    write_now(store, "k", b"1")
    child = fork(lambda: [work(store) for _ in range(5)] and None)
    for _ in range(5):
        work(store)
        assert store.cache_info()["total_size"] <= 2000
    reap(child)
    audit(store)


def test_a_child_sees_what_the_parent_writes_and_the_other_way_round(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    store = cached("directory", source, tmp_path)
    write_now(store, "k", b"parent")

    def child() -> None:
        assert read_now(store, "k") == b"parent"
        write_now(store, "k", b"child")

    reap(fork(child))
    assert read_now(store, "k") == b"child"


def test_a_fork_while_a_fetch_is_under_way(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    write_now(source, "k", b"1")
    write_now(source, "warm", b"1")
    store = cached(cache_kind, source, tmp_path)
    read_now(store, "warm")

    def child() -> None:
        # the parent's fetch will never land here
        source._gates.clear()
        assert read_now(store, "warm") == b"1"
        if cache_kind == "memory":
            assert read_now(store, "k") == b"1"

    async def parent() -> None:
        gate = source.hold("get", "k")
        reading = asyncio.create_task(read(store, "k"))
        await gate.arrived()
        await asyncio.to_thread(reap, fork(child))
        source.let_go("get", "k")
        assert await reading == b"1"

    asyncio.run(parent())
    assert read_now(store, "k") == b"1"
    assert source.count("get", "k") == 1


def test_a_child_that_ends_as_python_does_gives_only_its_own_back(tmp_path: Path) -> None:
    """A forked child runs its exit handlers; the parent's lease and owner stay."""
    script = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore")
from sources import read_now, write_now
from zarr.storage import LocalStore
import xzcache
store = xzcache.CacheStore(LocalStore(sys.argv[1]), cache_store=sys.argv[2], max_size=2000)
write_now(store, "k", b"1")
pid = os.fork()
if not pid:
    assert read_now(store, "k") == b"1"
    write_now(store, "child", bytes(100))
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
for i in range(30):
    write_now(store, f"c/{i}", bytes(100))
assert read_now(store, "c/29") == bytes(100)
assert store.cache_stats()["cache_errors"] == 0
print(store.cache_info()["total_size"])
"""
    here = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "source"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": here},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 1500 <= int(done.stdout) <= 2000


async def test_a_copy_has_a_source_of_its_own(tmp_path: Path) -> None:
    source = CountingStore(LocalStore(tmp_path / "source"))
    await fill(source, k=b"1")
    copy = copy_of(cached("directory", source, tmp_path))
    assert await read(copy, "k") == b"1"
    assert copy._store.reads == 1


@pytest.mark.parametrize(
    "name",
    [
        "_config Unset",
        "_identity Identity",
        "_sources WebStore",
        "dask CacheDashboard",
        "dask CachePlugin",
        "local LockedLocalStore",
        "local _restore",
        "pipeline _restored",
        "store CacheStore",
        "store _restore",
    ],
)
def test_what_pickles_of_version_0_1_0_name_is_there(name: str) -> None:
    module, _, attribute = name.partition(" ")
    found = pickle.loads(f"cxzcache.{module}\n{attribute}\n.".encode())
    assert found.__name__ == attribute
