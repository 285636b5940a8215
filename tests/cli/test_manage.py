"""`xzcache.info`, `ls`, `clear`, `resize` and `check` in Python: scripts, running event loops, notebooks, forks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clocks import Clock
from pages import Page
from processes import Team, barrier
from zarr.storage import LocalStore, MemoryStore

import xzcache

SIZE = 1000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of one array, which this process still has open."""
    array = zarr.create_array(
        LocalStore(tmp_path / "x.zarr"), name="a", shape=4 * SIZE, chunks=SIZE, dtype="u1", compressors=None
    )
    array[:] = np.arange(4 * SIZE) % 251 + 1
    read(tmp_path)
    return tmp_path / "cache"


def opened(tmp_path: Path) -> xzcache.CacheStore:
    return xzcache.CacheStore(tmp_path / "x.zarr", cache_store=tmp_path / "cache", read_only=True)


def read(tmp_path: Path) -> None:
    zarr.open_array(opened(tmp_path), path="a", mode="r", zarr_format=3)[:]


async def test_in_a_running_event_loop(cache: Path, tmp_path: Path) -> None:
    assert xzcache.info(cache).entries == 5
    assert [source.entries for source in xzcache.ls(directory=cache)] == [5]
    assert xzcache.ls("x.zarr", cache)[0].fraction == 1.0
    assert xzcache.check(cache).ok
    assert xzcache.resize("1 GB", cache).max_size == 10**9
    assert xzcache.clear(directory=cache).entries == 5
    assert xzcache.info(cache).entries == 0
    # reads of this process see it
    store = opened(tmp_path)
    await asyncio.to_thread(zarr.open_array(store, path="a", mode="r", zarr_format=3).__getitem__, slice(None))
    assert store.cache_stats()["misses"] == 5
    assert xzcache.info(cache).entries == 5


def test_by_the_store_itself(cache: Path, tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert xzcache.ls(store)[0].cached == 4
    assert xzcache.clear(store, dry_run=True).entries == 5
    assert xzcache.clear(store).entries == 5
    with pytest.raises(LookupError):
        xzcache.ls(store)
    in_memory = xzcache.CacheStore(LocalStore(tmp_path / "x.zarr"), cache_store=MemoryStore())
    with pytest.raises(TypeError, match="MemoryStore"):
        xzcache.ls(in_memory)


@pytest.mark.parametrize("age", [timedelta(0), 0, 0.0, "0s", "0 days"])
def test_ages(cache: Path, age: Any) -> None:
    assert xzcache.clear(older_than=age, directory=cache, dry_run=True).entries == 5


@pytest.mark.parametrize("age", ["7", "d", "", -1, "1 fortnight", True, float("nan"), float("inf"), [1]])
def test_ages_that_make_no_sense(cache: Path, age: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="older_than="):
        xzcache.clear(older_than=age, directory=cache)
    assert xzcache.info(cache).entries == 5


def test_a_use_that_is_not_written_down_yet(cache: Path, clock: Clock, tmp_path: Path) -> None:
    """Of this process: what it has just read again is not old."""
    xzcache.info(cache)
    clock.wall += 2000
    assert xzcache.clear(older_than="1000s", directory=cache, dry_run=True).entries == 5
    read(tmp_path)
    assert xzcache.clear(older_than="1000s", directory=cache).entries == 0


def test_displays(cache: Path) -> None:
    shown: list[Any] = [xzcache.info(cache), xzcache.ls(directory=cache), xzcache.ls("x.zarr", cache)]
    shown += [xzcache.clear(directory=cache, dry_run=True), xzcache.resize("1 GB", cache), xzcache.info(cache / "no")]
    for each in shown:
        assert repr(each)
        assert not repr(each).startswith("<")
        Page(each._repr_html_())
        json.dumps(each.as_dict())


def test_keys_at_the_top_of_a_store(tmp_path: Path) -> None:
    """A `LockedLocalStore` that is used as a store: clearing one group of keys is not clearing all."""
    store = xzcache.LockedLocalStore(tmp_path / "cache")
    group = zarr.create_group(store)
    group.create_array("a", shape=4, dtype="i4")[:] = 1
    names = {source.namespace: source.entries for source in xzcache.ls(directory=tmp_path / "cache")}
    assert names == {"": 1, "a": 2}
    assert xzcache.clear("(top)", directory=tmp_path / "cache").entries == 1
    assert xzcache.info(tmp_path / "cache").entries == 2


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_it_looks(cache: Path) -> None:
    """The child's copy of the lock's descriptor must not keep the cache locked."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            xzcache.ls(directory=cache)

    thread = threading.Thread(target=look)
    thread.start()
    children = []
    try:
        for _ in range(20):
            if (child := os.fork()) == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    finally:
        stop.set()
        thread.join()
        try:
            # waits for the lock for 5 seconds at most
            resized = xzcache.resize("2 GB", cache)
        finally:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
    assert resized.max_size == 2 * 10**9


def _hold(link: Any, root: str) -> None:
    store = xzcache.LockedLocalStore(root)
    store.directory.prepare()
    barrier(link)
    with store.directory.session.guarded():
        link.send("held")
        link.recv()


def test_a_process_that_is_stopped_with_the_lock(cache: Path) -> None:
    with Team() as team:
        child = team.start(_hold, str(cache))
        team.go()
        child.hear("held")
        found = xzcache.info(cache)
        assert (found.state, found.ok) == ("busy", False)
        with pytest.raises(xzcache.CacheUnavailable, match="lock"):
            xzcache.ls("x.zarr", cache)
        child.send("go on")
    assert xzcache.info(cache).ok
