"""Within a process, however many tasks, threads and event loops want an object, the source is asked once."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sources import (
    PATIENCE,
    CountingStore,
    again,
    between,
    buffer,
    by_ranges,
    cached,
    fill,
    local_source,
    ranges,
    read,
    read_now,
)
from zarr.abc.store import RangeByteRequest, Store
from zarr.storage import MemoryStore, WrapperStore

import xzcache

KEY = "x/c/0"
CROWD = 32
PARTS = pytest.mark.parametrize(
    ("key", "part", "expected"),
    [
        (KEY, None, b"0123456789"),
        (KEY, RangeByteRequest(2, 5), b"234"),
        pytest.param(KEY, between((2, 5), (7, 9)), b"23478", marks=by_ranges),
        ("zarr.json", None, b"{}"),
        ("nothing", None, None),
        pytest.param("x/c/9", between((2, 5), (7, 9)), None, marks=by_ranges),
    ],
    ids=["chunk", "range", "ranges", "document", "missing", "missing ranges"],
)
OF_A_CHUNK = pytest.mark.parametrize(
    ("part", "expected"),
    [(None, b"0123456789"), pytest.param(between((2, 5), (7, 9)), b"23478", marks=by_ranges)],
    ids=["whole", "ranges"],
)


def source_of(tmp_path: Path) -> CountingStore:
    source = local_source(tmp_path)
    asyncio.run(prepare(source))
    return source


async def prepare(source: CountingStore) -> None:
    await fill(source, x__c__0=b"0123456789", **{"zarr.json": b"{}"})
    source.forget()


async def opened(cache_kind: str, tmp_path: Path, **options: Any) -> tuple[CountingStore, xzcache.CacheStore]:
    """A store that has nothing to prepare any more, so that whoever reads is at once where a fetch is shared."""
    source = local_source(tmp_path)
    await prepare(source)
    await fill(source, warm=b"1")
    store = cached(cache_kind, source, tmp_path, **options)
    await read(store, "warm")
    source.forget()
    return source, store


async def settle() -> None:
    """Let every task run until it waits for something that another one has to do."""
    for _ in range(50):
        await asyncio.sleep(0)


class Crowd:
    """Threads that begin together; each has what its function returned or raised."""

    def __init__(self, function: Callable[[], Any], size: int) -> None:
        self._barrier = threading.Barrier(size)
        self.results: list[Any] = []
        self._function = function
        self._threads = [threading.Thread(target=self._run) for _ in range(size)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        self._barrier.wait(PATIENCE)
        try:
            self.results.append(self._function())
        except Exception as error:
            self.results.append(error)

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads)
        return self.results


@PARTS
async def test_many_tasks(key: str, part: Any, expected: bytes | None, cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    gate = source.hold("get", key)
    tasks = [asyncio.create_task(read(store, key, part)) for _ in range(CROWD)]
    await gate.arrived()
    await settle()
    source.let_go("get", key)
    assert await asyncio.gather(*tasks) == [expected] * CROWD
    assert source.count("get", key) == source.reads == 1
    stats = store.cache_stats()
    each = len(part) if isinstance(part, list) else 1
    assert (stats["hits"], stats["misses"]) == ((CROWD - 1) * each, 1 + each)


@PARTS
def test_many_threads_with_a_loop_each(
    key: str, part: Any, expected: bytes | None, cache_kind: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path)
    # a store that may write would ask for the document again, for who comes late
    store = cached(cache_kind, source, tmp_path, read_only=True)
    gate = source.hold("get", key)
    crowd = Crowd(lambda: read_now(store, key, part), CROWD)
    gate.wait_arrived()
    source.let_go("get", key)
    assert crowd.join() == [expected] * CROWD
    # what is not there is not kept: who comes late asks again
    assert source.reads == 1 or expected is None


@OF_A_CHUNK
def test_two_event_loops(part: Any, expected: bytes, cache_kind: str, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    store = cached(cache_kind, source, tmp_path)

    async def crowd() -> list[bytes | None]:
        return await asyncio.gather(*(read(store, KEY, part) for _ in range(CROWD // 2)))

    gate = source.hold("get", KEY)
    loops = Crowd(lambda: asyncio.run(crowd()), 2)
    gate.wait_arrived()
    source.let_go("get", KEY)
    assert loops.join() == [[expected] * (CROWD // 2)] * 2
    assert source.reads == 1
    # and a third one, when both are closed
    assert asyncio.run(crowd()) == [expected] * (CROWD // 2)
    assert source.reads == 1


@OF_A_CHUNK
async def test_different_stores_over_one_cache_share_a_fetch(
    part: Any, expected: bytes, cache_kind: str, tmp_path: Path
) -> None:
    source, store = await opened(cache_kind, tmp_path)
    stores = [store, again(store), store.with_read_only(True)]
    gate = source.hold("get", KEY)
    tasks = [asyncio.create_task(read(one, KEY, part)) for one in stores]
    await gate.arrived()
    await settle()
    source.let_go("get", KEY)
    assert await asyncio.gather(*tasks) == [expected] * 3
    assert source.reads == 1


async def test_different_objects_are_fetched_at_the_same_time(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await fill(source, a=b"a", b=b"b")
    store = cached(cache_kind, source, tmp_path)
    gates = [source.hold("get", key) for key in "ab"]
    tasks = [asyncio.create_task(read(store, key)) for key in "ab"]
    for gate in gates:
        await gate.arrived()
    for key in "ba":
        source.let_go("get", key)
    assert await asyncio.gather(*tasks) == [b"a", b"b"]


@PARTS
async def test_a_cancelled_leader_hands_over(
    key: str, part: Any, expected: bytes | None, cache_kind: str, tmp_path: Path
) -> None:
    # by a store that may write, a document is asked for again once the request is on its way
    source, store = await opened(cache_kind, tmp_path, read_only=True)
    first = source.hold("get", key)
    leader = asyncio.create_task(read(store, key, part))
    await first.arrived()
    waiters = [asyncio.create_task(read(store, key, part)) for _ in range(CROWD)]
    await settle()
    second = source.hold("get", key)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    # one of them, and only one, goes on
    await second.arrived()
    await settle()
    source.let_go("get", key)
    assert await asyncio.gather(*waiters) == [expected] * CROWD
    assert source.count("get", key) == 2
    assert source.reads == 2


@OF_A_CHUNK
async def test_a_cancelled_waiter_disturbs_nobody(part: Any, expected: bytes, cache_kind: str, tmp_path: Path) -> None:
    source, store = await opened(cache_kind, tmp_path)
    gate = source.hold("get", KEY)
    tasks = [asyncio.create_task(read(store, KEY, part)) for _ in range(4)]
    await gate.arrived()
    await settle()
    tasks[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[2]
    source.let_go("get", KEY)
    assert await asyncio.gather(tasks[0], tasks[1], tasks[3]) == [expected] * 3
    assert source.reads == 1


@OF_A_CHUNK
def test_a_leader_whose_loop_is_closed_hands_over(part: Any, expected: bytes, cache_kind: str, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    store = cached(cache_kind, source, tmp_path)

    async def give_up() -> None:
        gate = source.hold("get", KEY)
        leader = asyncio.create_task(read(store, KEY, part))
        await gate.arrived()
        assert not leader.done()
        source._gates.clear()

    # `asyncio.run` cancels what is left
    asyncio.run(give_up())
    assert read_now(store, KEY, part) == expected
    assert source.reads == 2


@pytest.mark.parametrize("key", [KEY, "zarr.json"])
def test_a_read_whose_loop_is_closed_without_a_cancellation_ends_quietly(
    key: str, cache_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    store = cached(cache_kind, source, tmp_path)
    trouble: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: trouble.append(raised.exc_value))
    gate = source.hold("get", key)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: None)
    task = loop.create_task(read(store, key))
    loop.run_until_complete(gate.arrived())
    assert not task.done()
    loop.close()
    source._gates.clear()
    del task, loop, gate
    gc.collect()
    assert trouble == []
    assert read_now(store, key) == (b"{}" if key == "zarr.json" else b"0123456789")


# a timeout of the source is not taken for a leader that is too slow
@pytest.mark.parametrize("error", [ConnectionError("down"), TimeoutError("of the source")], ids=repr)
@PARTS
async def test_the_leaders_exception_reaches_all_and_is_not_kept(
    key: str, part: Any, expected: bytes | None, error: Exception, cache_kind: str, tmp_path: Path
) -> None:
    source, store = await opened(cache_kind, tmp_path)
    gate = source.hold("get", key, after=False)
    tasks = [asyncio.create_task(read(store, key, part)) for _ in range(CROWD)]
    await gate.arrived()
    await settle()
    inner = CountingStore(source._store)
    inner.errors["get"] = error
    source._store, working = inner, source._store
    source.let_go("get", key)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(outcome is error for outcome in outcomes)
    assert source.reads == 1
    source._store = working
    assert await read(store, key, part) == expected


class Failing(WrapperStore[Store]):
    """A source whose exceptions refer to nothing of the test."""

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        raise ConnectionError("down")

    async def get_ranges(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        raise ConnectionError("down")
        yield


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (KEY, None),
        (KEY, RangeByteRequest(2, 5)),
        pytest.param(KEY, between((2, 5), (7, 9)), marks=by_ranges),
        ("zarr.json", None),
    ],
)
def test_a_failed_read_does_not_keep_its_store(key: str, part: Any, cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, Failing(MemoryStore()), tmp_path)
    failed = 0

    async def try_to_read(store: Store) -> None:
        nonlocal failed
        try:
            await (ranges(store, part, key) if isinstance(part, list) else read(store, key, part))
        except (ConnectionError, BaseExceptionGroup):
            failed += 1

    async def several(store: Store) -> None:
        await asyncio.gather(*(try_to_read(store) for _ in range(3)))

    gc.collect()
    gc.disable()
    try:
        asyncio.run(several(store))
        left = weakref.ref(store)
        del store
        assert failed == 3
        assert left() is None
    finally:
        gc.enable()


@OF_A_CHUNK
def test_an_exception_in_one_thread_reaches_the_others(
    part: Any, expected: bytes, cache_kind: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path)
    store = cached(cache_kind, source, tmp_path)
    source.errors["get"] = ConnectionError("down")
    outcomes = Crowd(lambda: read_now(store, KEY, part), CROWD).join()
    assert all(outcome is source.errors["get"] for outcome in outcomes)
    del source.errors["get"]
    assert read_now(store, KEY, part) == expected


def test_no_loop_is_kept(cache_kind: str, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    store = cached(cache_kind, source, tmp_path, max_size=100)

    async def crowd(turn: int) -> None:
        # misses, evictions and writes, with much contention
        keys = [f"c/{turn % 2}/{i % 5}" for i in range(CROWD)]
        await asyncio.gather(*(store.set(key, buffer(bytes(30))) for key in keys[:10]))
        assert await asyncio.gather(*(read(store, key) for key in keys)) == [bytes(30)] * CROWD

    for turn in range(4):
        asyncio.run(crowd(turn))
    outcomes = Crowd(lambda: asyncio.run(crowd(0)), 3).join()
    assert outcomes == [None] * 3


@OF_A_CHUNK
async def test_a_store_is_pickled_while_it_is_fought_over(
    part: Any, expected: bytes, cache_kind: str, tmp_path: Path
) -> None:
    source, store = await opened(cache_kind, tmp_path)
    gate = source.hold("get", KEY)
    tasks = [asyncio.create_task(read(store, KEY, part)) for _ in range(CROWD)]
    await gate.arrived()
    await settle()
    during = pickle.dumps(store)
    source.let_go("get", KEY)
    await asyncio.gather(*tasks)
    for data in (during, pickle.dumps(store)):
        copy = pickle.loads(data)
        assert copy == store
        assert await read(copy, KEY, part) == expected
