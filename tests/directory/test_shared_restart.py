"""What a new process finds of the old ones: the account, the ages, the recency, the bound."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import Dataset, Made, Team, audit, frozen, index_path, made, run, stored, usage, version_of, visit
from zarr.core.buffer import default_buffer_prototype

import xzcache
from xzcache.directory._invalidation import Writes
from xzcache.directory._space import Space

MIB = 1 << 20


def read_all(link: Connection, data: Dataset, options: dict[str, Any]) -> dict[str, Any]:
    """Read an array; what the cache says of itself then."""
    store = data.store(**options)
    data.read(**options)
    return store.cache_info()


def on_disk(root: str) -> tuple[int, int]:
    sizes = [item.stat().st_size for item in stored(root)]
    return len(sizes), sum(sizes)


# -- the account, and what a warm read costs


def test_a_new_process_finds_the_account(tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    old = run(read_all, data, {})
    assert (old["total_keys"], old["total_size"]) == on_disk(data.root)
    assert old["cached_keys"] == data.chunks + 1
    new = run(about, data.root)
    assert (new["entries"], new["size"]) == (old["total_keys"], old["total_size"])
    assert audit(data.root) == data.chunks + 1


def about(link: Connection, root: str) -> dict[str, Any]:
    directory = xzcache.LockedLocalStore(root).directory
    assert directory.prepare()
    return directory.totals()._asdict()


@pytest.mark.parametrize("revalidate", ["open", False])
def test_a_warm_read_asks_the_source_for_no_chunk(tmp_path: Path, revalidate: Any) -> None:
    data = Dataset(tmp_path)
    run(read_all, data, {})
    assert set(data.chunk_requests().values()) == {1}
    data.forget_requests()
    run(read_all, data, {"revalidate": revalidate})
    keys = [request.key for request in data.requests()]
    # the document is asked for by each store that is opened, unless that is not wanted
    assert keys == ([] if revalidate is False else ["zarr.json"])
    audit(data.root)


def test_what_is_cached_can_be_read_without_the_source(tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    run(read_all, data, {})
    shutil.rmtree(data.place)
    os.mkdir(data.place)
    run(read_all, data, {"revalidate": False})
    audit(data.root)


def delete_while_another_sets(link: Connection, root: str) -> None:
    """Delete a directory; when the index has dropped it, and the files are looked for, another process sets a key."""
    store = xzcache.LockedLocalStore(root)
    drop = Writes.remove_beneath

    def dropped(self: Writes, prefix: str) -> None:
        drop(self, prefix)
        link.send("dropped")
        assert link.recv() == "set"

    Writes.remove_beneath = dropped  # type: ignore[method-assign]  # so that a race can be an event
    asyncio.run(store.delete_dir("a"))


def set_key(link: Connection | None, root: str, key: str) -> None:
    value = default_buffer_prototype().buffer.from_bytes(made(key, 0, 1000))
    xzcache.LockedLocalStore(root).set_sync(key, value)


def test_the_account_is_true_after_a_set_during_a_delete(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(set_key, root, "a/old")
    with Team() as team:
        child = team.start(delete_while_another_sets, root)
        child.hear("dropped")
        run(set_key, root, "a/new")
        child.send("set")
        child.result()
    audit(root)
    assert not Path(root, "a/old").exists()


def fail_to_settle(link: Connection, root: str) -> None:
    """Delete a key, with the guard held by somebody else just when the space is to be given back; end in good order."""
    set_key(None, root, "k")
    store = xzcache.LockedLocalStore(root)
    settle = Space.free_tombstones

    def late(self: Space, dying: list) -> None:
        Space.free_tombstones = settle  # type: ignore[method-assign]  # once is enough
        with open(f"{root}/.xzcache/lock", "r+b") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            settle(self, dying)

    Space.free_tombstones = late  # type: ignore[method-assign]  # a failure at a step
    store.delete_sync("k")
    assert store.directory.barrier.faults == 1


def test_space_that_could_not_be_given_back_is_given_back_later(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(fail_to_settle, root, settings={"lock_timeout": 0.1})
    visit(root)
    assert audit(root) == 0


# -- ages


def test_ages_survive(tmp_path: Path) -> None:
    data = Dataset(tmp_path)
    run(read_all, data, {})
    aged = data.keys()[::3]
    hour_ago = time.time() - 3600
    for item in stored(data.root):
        if item.path.endswith(tuple(f"/{key}" for key in aged)):
            os.utime(item.path, (hour_ago, hour_ago))
    data.forget_requests()
    run(read_all, data, {"max_age_seconds": 7200})
    assert not data.chunk_requests()
    run(read_all, data, {"max_age_seconds": 1800})
    assert data.chunk_requests() == dict.fromkeys(aged, 1)
    # they are young again, for the next process as well
    run(read_all, data, {"max_age_seconds": 1800})
    assert data.chunk_requests() == dict.fromkeys(aged, 1)
    audit(data.root)


# -- recency


SIZE = 64 << 10
KEYS = {f"k{number:02}": SIZE for number in range(20)}


def read_keys(
    link: Connection | None, root: str, keys: list[str], options: dict[str, Any], *, ask: bool = True
) -> dict[str, Any]:
    """Read keys one after the other, and check them; what the cache says then, if it is to be asked."""
    store = xzcache.CacheStore(Made(KEYS), cache_store=root, namespace="made", **options)

    async def read() -> None:
        for key in keys:
            value = await store.get(key, default_buffer_prototype())
            assert value is not None
            assert len(value) == SIZE
            version_of(key, value.to_bytes(), SIZE)

    asyncio.run(read())
    return store.cache_stats() | (store.cache_info() if ask else {})


def cached(root: str) -> set[str]:
    return {item.name for item in stored(root)}


def test_the_order_of_use_survives(tmp_path: Path) -> None:
    root = str(tmp_path)
    keys = list(KEYS)
    bound = 10 * SIZE + SIZE // 2
    filled = keys[:9]
    run(read_keys, root, filled, {"max_size": bound})
    assert cached(root) == set(filled)
    # the last hits of a process count, although it ends right after them, and was not asked for anything
    hit = run(read_keys, root, filled[:3], {}, ask=False)
    assert (hit["hits"], hit["misses"]) == (3, 0)
    fresh = keys[10:14]
    run(read_keys, root, fresh, {})
    gone = set(filled) - cached(root)
    oldest_first = filled[3:] + filled[:3]
    assert len(gone) >= 3
    assert gone == set(oldest_first[: len(gone)])
    assert set(fresh) <= cached(root)
    audit(root)


# -- the bound


def test_a_directory_remembers_its_bound(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert run(read_keys, root, list(KEYS)[:2], {"max_size": 5 * SIZE})["max_size"] == 5 * SIZE
    for _ in range(2):
        info = run(read_keys, root, list(KEYS), {})
        assert info["max_size"] == 5 * SIZE
        assert info["evictions"] > 0
        assert usage(root).size <= 5 * SIZE
    audit(root)


def test_a_directory_remembers_its_bound_without_its_index(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(read_keys, root, list(KEYS)[:2], {"max_size": 5 * SIZE})
    Path(index_path(root)).write_bytes(os.urandom(8192))
    assert run(read_keys, root, list(KEYS), {})["max_size"] == 5 * SIZE
    assert usage(root).size <= 5 * SIZE
    audit(root)


def stay(link: Connection, root: str, options: dict[str, Any]) -> None:
    """A process that stays, and reads what it is told to; an empty list ends it.

    One store stays open: without any the process would leave the directory, and its next store ask for the bound anew.
    """
    stores = []
    while keys := link.recv():
        stores = stores or [xzcache.CacheStore(Made(KEYS), cache_store=root, namespace="made", **options)]
        link.send(read_keys(None, root, keys, options))


def test_shrinking_in_one_process_evicts_for_all(tmp_path: Path) -> None:
    root = str(tmp_path)
    keys = list(KEYS)
    with Team() as team:
        old = team.start(stay, root, {})
        new = team.start(stay, root, {"max_size": 4 * SIZE})
        run(read_keys, root, keys[:10], {"max_size": 20 * SIZE})
        old.send(keys[:10])
        assert old.hear()["misses"] == 0
        new.send(keys[9:10])
        assert new.hear()["max_size"] == 4 * SIZE
        assert usage(root).size <= 4 * SIZE
        left = cached(root)
        assert left
        assert left <= set(keys[6:10])
        # whoever was there before reads what is right, and keeps to the new bound
        old.send(keys)
        report = old.hear()
        assert report["max_size"] == 4 * SIZE
        assert report["misses"] >= 16
        assert usage(root).size <= 4 * SIZE
        for child in team:
            child.send([])
        team.results()
    audit(root)


def test_shrinking_reaches_what_a_process_was_promised(tmp_path: Path) -> None:
    """A process may write what it leased: not if the bound has been lowered since."""
    root = str(tmp_path)
    keys = list(KEYS)
    with Team() as team:
        # under a large bound, processes lease megabytes in advance
        old = team.start(stay, root, {"max_size": 1 << 30})
        old.send(keys[:1])
        old.hear()
        new = team.start(stay, root, {"max_size": 4 * SIZE})
        new.send(keys[1:2])
        assert new.hear()["max_size"] == 4 * SIZE
        for child, part in ((old, keys[2:10]), (new, keys[10:]), (old, keys)):
            for key in part:
                child.send([key])
                child.hear()
                # the other process may be publishing: a walk would see what leaves, and what comes in its place
                with frozen(team):
                    assert usage(root).size <= 4 * SIZE
        # and what nobody may write any more is free for others: the cache caches
        new.send([keys[5], keys[5]])
        assert new.hear()["hits"] > 0
        for child in team:
            child.send([])
        team.results()
    audit(root)


def test_growing_in_one_process_is_growth_for_all(tmp_path: Path) -> None:
    root = str(tmp_path)
    keys = list(KEYS)
    with Team() as team:
        old = team.start(stay, root, {})
        run(read_keys, root, keys[:4], {"max_size": 5 * SIZE})
        old.send(keys[4:8])
        assert old.hear()["max_size"] == 5 * SIZE
        assert len(cached(root)) <= 5
        run(read_keys, root, keys[:1], {"max_size": MIB + 5 * SIZE})
        old.send(keys)
        assert old.hear()["max_size"] == MIB + 5 * SIZE
        assert len(cached(root)) == len(keys)
        old.send([])
        team.results()
    visit(root)
    assert audit(root) == len(keys)
