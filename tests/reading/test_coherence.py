"""After a write returned, nobody reads the old value nor does the cache hold it, whatever was under way meanwhile."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
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
    memory_source,
    neighbours,
    read,
    read_now,
    write_now,
)
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xzcache

Write = Callable[[xzcache.CacheStore], Awaitable[None]]

KEY = "x/c/0"

WRITES: dict[str, tuple[Write, bytes | None]] = {
    "set": (lambda store: store.set(KEY, buffer(b"new")), b"new"),
    "_set_many": (lambda store: store._set_many([("other", buffer(b"")), (KEY, buffer(b"new"))]), b"new"),
    "set_if_not_exists": (lambda store: store.set_if_not_exists(KEY, buffer(b"new")), b"new"),
    "delete": (lambda store: store.delete(KEY), None),
    "delete_dir": (lambda store: store.delete_dir("x"), None),
    "clear": (lambda store: store.clear(), None),
}
CALLS = {"_set_many": ("set", KEY), "delete_dir": ("delete_dir", "x"), "clear": ("clear", "")}
"""The calls of the source, where they are not those of the write with the key."""
ALL = pytest.mark.parametrize("name", sorted(WRITES))
PARTS = pytest.mark.parametrize(
    ("part", "size"),
    [(None, 3), (RangeByteRequest(0, 2), 2), pytest.param(between((0, 1), (1, 2)), 2, marks=by_ranges)],
    ids=["whole", "range", "ranges"],
)
"""What is read of a value, which is its first so many bytes."""
PARTS_THERE = [RangeByteRequest(0, 2), None]
if hasattr(Store, "get_ranges"):
    PARTS_THERE = [between((0, 1), (1, 2)), *PARTS_THERE]
KEEP = pytest.mark.parametrize("keep", [True, False], ids=["keep", "drop"])


async def prepare(source: CountingStore, name: str) -> tuple[Write, bytes | None]:
    """An old value at the source; a write, and what is there after it."""
    await fill(source, x__c__0=b"old")
    source.forget()
    return WRITES[name]


async def prevent(source: CountingStore, name: str) -> None:
    """Somebody else deletes the key, so that `set_if_not_exists` has something to do."""
    if name == "set_if_not_exists":
        await source._store.delete(KEY)


def first(size: int, expected: bytes | None) -> bytes | None:
    return None if expected is None else expected[:size]


async def check(store: xzcache.CacheStore, expected: bytes | None, *, at: str = KEY) -> None:
    """What is read now, by this store and by others, is the new value; and so is what the cache holds."""
    source = store._store
    if hasattr(Store, "get_ranges"):
        assert await read(store, at, between((0, 1), (1, 2))) == first(2, expected)
    assert await read(store, at, RangeByteRequest(0, 2)) == first(2, expected)
    assert await read(store, at) == expected
    assert await read(again(store, revalidate=False), at) == expected
    offline = CountingStore(source._store)
    offline.errors["get"] = LookupError("the cache does not hold it")
    try:
        held = await read(again(store, offline, namespace=store.namespace, revalidate=False), at)
    except LookupError:
        return
    assert held == expected


@ALL
@KEEP
@PARTS
async def test_a_fill_that_began_before_a_write_does_not_outlive_it(
    name: str, keep: bool, part: Any, size: int, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    write, expected = await prepare(source, name)
    store = cached(cache_kind, source, tmp_path, cache_set_data=keep)
    source.hold("get", KEY)
    reading = asyncio.create_task(read(store, KEY, part))
    await source._gates["get", KEY].arrived()
    await prevent(source, name)
    await write(store)
    # whoever asks from now on does not get what the earlier reader waits for
    asking = asyncio.create_task(read(store, KEY, part))
    source.let_go("get", KEY)
    assert await reading == b"old"[:size]
    assert await asking == first(size, expected)
    await check(store, expected)


@ALL
@KEEP
@PARTS
async def test_a_fill_that_began_during_a_write_does_not_outlive_it(
    name: str, keep: bool, part: Any, size: int, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    write, expected = await prepare(source, name)
    store = cached(cache_kind, source, tmp_path, cache_set_data=keep)
    await prevent(source, name)
    # the source has not been told yet: readers get the old value, and must not keep it
    at = CALLS.get(name, (name, KEY))
    gate = source.hold(*at, after=False)
    writing = asyncio.ensure_future(write(store))
    await gate.arrived()
    assert await read(store, KEY, part) == (None if name == "set_if_not_exists" else b"old"[:size])
    source.let_go(*at)
    await writing
    await check(store, expected)


@by_ranges
@pytest.mark.parametrize("wanted", [between((0, 6)), between((0, 6), (4, 5), (2, 4))], ids=["one", "several"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_range_is_never_of_two_states(wanted: Any, where: str, tmp_path: Path) -> None:
    """Part of it is cached, and the object is written while the rest is asked for."""
    source = local_source(tmp_path)
    await fill(source, x__c__0=b"oldold")
    store = cached("directory", source, tmp_path)
    assert await read(store, KEY, between((0, 3))) == b"old"
    gate = source.hold("get", KEY, after=False)
    reading = asyncio.create_task(read(store, KEY, wanted))
    await gate.arrived()
    if where == "elsewhere":
        await asyncio.to_thread(neighbours.run, write_now, store, KEY, b"newnew")
    else:
        await store.set(KEY, buffer(b"newnew"))
    source.let_go("get", KEY)
    found = await reading
    assert found is not None
    assert found[:6] in (b"oldold", b"newnew")
    await check(store, b"newnew")


@ALL
@PARTS
async def test_a_fill_that_ends_before_a_write_does(
    name: str, part: Any, size: int, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    write, expected = await prepare(source, name)
    store = cached(cache_kind, source, tmp_path)
    reading = source.hold("get", KEY)
    fetching = asyncio.create_task(read(store, KEY, part))
    await reading.arrived()
    await prevent(source, name)
    at = CALLS.get(name, (name, KEY))
    writing = source.hold(*at, after=True)
    task = asyncio.ensure_future(write(store))
    await writing.arrived()
    source.let_go("get", KEY)
    assert await fetching == b"old"[:size]
    source.let_go(*at)
    await task
    await check(store, expected)


@ALL
@PARTS
async def test_a_write_through_one_store_is_seen_by_all_others(
    name: str, part: Any, size: int, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    write, expected = await prepare(source, name)
    store = cached(cache_kind, source, tmp_path)
    others = [again(store), again(store, revalidate=False), store.with_read_only(True)]
    for other in others:
        assert await read(other, KEY, part) == b"old"[:size]
    await prevent(source, name)
    await write(store)
    assert [await read(other, KEY, part) for other in others] == [first(size, expected)] * 3


async def test_a_write_that_failed_half_way_leaves_no_old_value(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, x__c__0=b"old")
    store = cached(cache_kind, source, tmp_path)
    assert await read(store, KEY) == b"old"
    gate = source.hold("set", KEY)
    writing = asyncio.create_task(store.set(KEY, buffer(b"new")))
    await gate.arrived()
    # the source has it, whatever becomes of the call
    writing.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await check(store, b"new")


class InThreads(WrapperStore[Store]):
    """Writes in a thread, as `LocalStore` does: the thread goes on after its task was cancelled."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.begun, self.gate, self.ended = threading.Event(), threading.Event(), threading.Event()

    async def _later(self, write: Coroutine[Any, Any, None]) -> None:
        def act() -> None:
            self.begun.set()
            assert self.gate.wait(PATIENCE)
            asyncio.run(write)
            self.ended.set()

        await asyncio.to_thread(act)

    async def set(self, key: str, value: Buffer) -> None:
        if not isinstance(value, Buffer):
            raise TypeError(f"{value} is no buffer")
        await self._later(self._store.set(key, value))

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        # as most stores: if one fails, the others go on
        await Store._set_many(self, values)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        await self._later(self._store.set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        await self._later(self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._later(self._store.delete_dir(prefix))

    async def clear(self) -> None:
        await self._later(self._store.clear())


@pytest.mark.parametrize("name", ["set", "delete", "delete_dir", "clear"])
async def test_a_cancelled_write_that_goes_on_at_the_source_leaves_no_old_value(
    name: str, cache_kind: str, tmp_path: Path
) -> None:
    beneath = memory_source()
    write, expected = await prepare(beneath, name)
    source = InThreads(beneath)
    store = cached(cache_kind, source, tmp_path)
    writing = asyncio.ensure_future(write(store))
    assert await asyncio.to_thread(source.begun.wait, PATIENCE)
    writing.cancel()
    # who reads meanwhile must not keep the old value, which the source still has
    for _ in range(50):
        assert await read(store, KEY) == b"old"
    source.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await asyncio.to_thread(source.ended.wait, PATIENCE)
    assert await read(store, KEY) == await read(beneath, KEY) == expected


class GivesUp(WrapperStore[Store]):
    """Cancels its own work after it has written, as a client may whose connection is closed."""

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, value)
        raise asyncio.CancelledError

    async def delete(self, key: str) -> None:
        await self._store.delete(key)
        raise asyncio.CancelledError


@pytest.mark.parametrize("name", ["set", "delete"])
async def test_a_write_that_the_source_itself_cancels_has_ended(name: str, cache_kind: str, tmp_path: Path) -> None:
    """Its state is unknown, as after any other failure; the key is cached again from then on."""
    beneath = memory_source()
    write, _ = await prepare(beneath, name)
    store = cached(cache_kind, GivesUp(beneath), tmp_path, missing_max_age_seconds="infinity")
    with pytest.raises(asyncio.CancelledError):
        await write(store)
    expected = await read(beneath, KEY)
    misses = store.cache_stats()["misses"]
    for _ in range(3):
        assert await read(store, KEY) == expected
    assert store.cache_stats()["misses"] == misses + 1


@pytest.mark.parametrize("first_to_return", ["one", "two"])
async def test_two_writers_of_one_key(first_to_return: str, cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, x__c__0=b"old")
    store, other = (one := cached(cache_kind, source, tmp_path)), again(one)
    gates = {"one": source.hold("set", KEY)}
    tasks = {"one": asyncio.create_task(store.set(KEY, buffer(b"one")))}
    await gates["one"].arrived()
    gates["two"] = source.hold("set", KEY)
    tasks["two"] = asyncio.create_task(other.set(KEY, buffer(b"two")))
    await gates["two"].arrived()
    # the source has "two" now, and "one" may return later
    source._gates.clear()
    for name in (first_to_return, "two" if first_to_return == "one" else "one"):
        gates[name].open()
        await tasks[name]
    assert await read(source._store, KEY) == b"two"
    await check(store, b"two")


async def test_writes_reach_the_source_in_the_order_in_which_they_were_begun(cache_kind: str, tmp_path: Path) -> None:
    """A store in memory keeps this order; Zarr writes a document again before its last write has ended."""
    source = MemoryStore()
    store = cached(cache_kind, source, tmp_path)
    for turn in range(60):
        key = ("x/zarr.json", KEY)[turn % 2]
        last = buffer(b"%d" % turn)
        steps: list[Awaitable[None]] = [store.set(key, buffer(b"first")), store.delete(key)]
        steps += [store.set(key, buffer(b"second")), store.delete_dir("x"), store.set(key, last)]
        cancelled = asyncio.ensure_future(steps[turn % 2])
        await asyncio.wait([cancelled], timeout=0)
        cancelled.cancel()
        await asyncio.gather(cancelled, *steps[: turn % 2], *steps[turn % 2 + 1 :], return_exceptions=True)
        for one in (source, store):
            found = await one.get(key, default_buffer_prototype())
            assert found is not None
            assert found.to_bytes() == last.to_bytes()


async def test_a_write_that_fails_beside_one_that_goes_on(cache_kind: str, tmp_path: Path) -> None:
    beneath = memory_source()
    await prepare(beneath, "set")
    source = InThreads(beneath)
    store = cached(cache_kind, source, tmp_path)
    not_a_buffer: Any = None
    with pytest.raises(TypeError):
        await store._set_many([(KEY, buffer(b"new")), ("x/c/1", not_a_buffer)])
    assert await asyncio.to_thread(source.begun.wait, PATIENCE)
    # who reads meanwhile must not keep the old value, which the source still has
    for _ in range(50):
        assert await read(store, KEY) == b"old"
    source.gate.set()
    assert await asyncio.to_thread(source.ended.wait, PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while await read(store, KEY) != b"new":
            await asyncio.sleep(0)


async def test_a_write_of_another_event_loop_does_not_change_the_order() -> None:
    source, cache = MemoryStore(), memory_source()
    store = xzcache.CacheStore(source, cache_store=cache)
    gate = cache.hold("delete", KEY)
    writes = [asyncio.ensure_future(store.set(KEY, buffer(b"first")))]
    await gate.arrived()
    cache._gates.clear()
    await asyncio.to_thread(write_now, store, KEY, b"elsewhere")
    writes.append(asyncio.ensure_future(store.set(KEY, buffer(b"second"))))
    # longer than it takes, if it does not wait for the first one
    for _ in range(100):
        await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(*writes)
    assert await read(source, KEY) == b"second"


async def test_a_writer_and_a_deleter_of_one_key(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, x__c__0=b"old")
    store, other = (one := cached(cache_kind, source, tmp_path)), again(one)
    written = source.hold("set", KEY)
    writing = asyncio.create_task(store.set(KEY, buffer(b"new")))
    await written.arrived()
    await other.delete_dir("x")
    source.let_go("set", KEY)
    await writing
    assert await read(source._store, KEY) is None
    await check(store, None)


def test_an_overwritten_array_while_it_is_read(cache_kind: str, tmp_path: Path) -> None:
    async def overwrite(store: xzcache.CacheStore, source: CountingStore) -> None:
        gate = source.hold("get", KEY)
        reading = asyncio.create_task(read(store, KEY))
        await gate.arrived()
        await asyncio.to_thread(create, store, overwrite=True)
        source.let_go("get", KEY)
        assert await reading is not None

    def create(store: Any, **options: Any) -> zarr.Array[Any]:
        return zarr.create_array(store, name="x", shape=4, chunks=4, dtype="i4", **options)

    source = memory_source()
    create(source)[:] = [1, 2, 3, 4]
    store = cached(cache_kind, source, tmp_path)
    asyncio.run(overwrite(store, source))
    assert zarr.open_array(store, path="x", mode="r")[:].tolist() == [0, 0, 0, 0]
    assert zarr.open_array(again(store), path="x", mode="r")[:].tolist() == [0, 0, 0, 0]


async def test_a_document_that_was_asked_for_before_it_was_written(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, **{"x__zarr.json": b'{"old": 1}'})
    store = cached(cache_kind, source, tmp_path)
    gate = source.hold("get", "x/zarr.json")
    asking = asyncio.create_task(read(store, "x/zarr.json"))
    await gate.arrived()
    await store.set("x/zarr.json", buffer(b'{"new": 1}'))
    source.let_go("get", "x/zarr.json")
    assert await asking == b'{"old": 1}'
    await check(store, b'{"new": 1}', at="x/zarr.json")


@PARTS
async def test_a_changed_document_keeps_a_running_fill_out(
    part: Any, size: int, cache_kind: str, tmp_path: Path
) -> None:
    source = memory_source()
    old = b'{"node_type": "array", "shape": [1]}'
    await fill(source, x__c__0=b"old", x__c__1=b"old", **{"x__zarr.json": old})
    store = cached(cache_kind, source, tmp_path)
    await read(store, "x/zarr.json")
    await read(store, "x/c/1")
    gate = source.hold("get", KEY)
    reading = asyncio.create_task(read(store, KEY, part))
    await gate.arrived()
    await source._store.set("x/zarr.json", buffer(b'{"node_type": "array", "shape": [2]}'))
    await source._store.set(KEY, buffer(b"new"))
    await read(again(store), "x/zarr.json")
    source.let_go("get", KEY)
    assert await reading == b"old"[:size]
    await check(store, b"new")


# -- seen from another process


def do(store: xzcache.CacheStore, name: str) -> None:
    asyncio.run(as_coroutine(WRITES[name][0], store))


async def as_coroutine(write: Write, store: xzcache.CacheStore) -> None:
    await write(store)


@ALL
@PARTS
async def test_a_write_in_another_process_keeps_a_running_fill_out(
    name: str, part: Any, size: int, tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    _, expected = await prepare(source, name)
    store = cached("directory", source, tmp_path)
    gate = source.hold("get", KEY)
    reading = asyncio.create_task(read(store, KEY, part))
    await gate.arrived()
    await prevent(source, name)
    await asyncio.to_thread(neighbours.run, do, store, name)
    source.let_go("get", KEY)
    assert await reading == b"old"[:size]
    await check(store, expected)
    assert await asyncio.to_thread(neighbours.run, read_now, store, KEY) == expected


@ALL
@PARTS
async def test_a_write_here_is_seen_in_another_process(name: str, part: Any, size: int, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    write, expected = await prepare(source, name)
    store = cached("directory", source, tmp_path)
    assert await asyncio.to_thread(neighbours.run, read_now, store, KEY, part) == b"old"[:size]
    await prevent(source, name)
    await write(store)
    assert await asyncio.to_thread(neighbours.run, read_now, store, KEY, part) == first(size, expected)


class Fatal(CountingStore):
    """A source that does as it is told, and ends the process before it can say so."""

    async def _through(self, method: str, key: str, act: Callable[[], Any]) -> Any:
        result = await super()._through(method, key, act)
        if method in WRITES and key != "other":
            os._exit(7)
        return result


@ALL
async def test_a_writer_that_dies_half_way_leaves_no_old_value(name: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    _, expected = await prepare(source, name)
    store = cached("directory", source, tmp_path, namespace="shared")
    for part in PARTS_THERE:
        assert await read(store, KEY, part) == (b"old" if part is None else b"ol")
    await prevent(source, name)
    writer = cached("directory", Fatal(source._store), tmp_path, namespace="shared")
    process = multiprocessing.get_context("spawn").Process(target=do, args=(writer, name))
    process.start()
    await asyncio.to_thread(process.join, PATIENCE)
    assert process.exitcode == 7
    # the source has it, and the dead process had nobody to tell
    await check(store, expected)


class Pipes(WrapperStore[LocalStore]):
    """A source that holds each `get` back in whatever process it is, by a pair of named pipes."""

    def __init__(self, store: LocalStore, pipes: Path) -> None:
        super().__init__(store)
        self.pipes = pipes

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipes, (self._store, self.pipes)

    @classmethod
    def over(cls, source: LocalStore, pipes: Path) -> Pipes:
        for name in ("arrived", "go"):
            os.mkfifo(pipes / name)
        return cls(source, pipes)

    async def get(self, key: str, prototype: BufferPrototype | None = None, byte_range: Any = None) -> Buffer | None:
        value = await self._store.get(key, prototype or default_buffer_prototype(), byte_range)
        (self.pipes / "arrived").write_text("here")
        (self.pipes / "go").read_text()
        return value


@ALL
@PARTS
async def test_a_write_here_keeps_out_a_fill_that_runs_in_another_process(
    name: str, part: Any, size: int, tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    write, expected = await prepare(source, name)
    store = cached("directory", source, tmp_path, namespace="shared")
    held = cached("directory", Pipes.over(source._store, tmp_path), tmp_path, namespace="shared")
    reading = neighbours.start(read_now, held, KEY, part)
    await asyncio.to_thread((tmp_path / "arrived").read_text)
    await prevent(source, name)
    await write(store)
    await asyncio.to_thread((tmp_path / "go").write_text, "on")
    assert await asyncio.wrap_future(reading) == b"old"[:size]
    await check(store, expected)


def append(store: xzcache.CacheStore, values: list[int]) -> None:
    zarr.open_array(store, path="x", mode="a").append(np.array(values, dtype="i4"))


def values(store: xzcache.CacheStore) -> list[int]:
    return zarr.open_array(store, path="x", mode="r")[:].tolist()


def test_an_append_in_another_process_is_seen_by_an_array_that_is_opened_again(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_array(source, name="x", data=np.array([0, 1, 2], dtype="i4"), chunks=(2,))
    store = cached("directory", source, tmp_path)
    assert values(store) == [0, 1, 2]
    neighbours.run(append, store, [3, 4])
    # it went through the cache, so that even this store need not be opened anew
    assert values(store) == [0, 1, 2, 3, 4]


def test_a_source_found_changed_by_one_process_is_changed_for_all(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    zarr.create_array(source, name="x", data=np.array([0, 1, 2], dtype="i4"), chunks=(2,))
    store = cached("directory", source, tmp_path)
    assert values(store) == neighbours.run(values, store) == [0, 1, 2]
    # behind the back of every cache
    zarr.open_array(source._store, path="x", mode="a").append(np.array([3, 4], dtype="i4"))
    fresh = again(store)
    assert values(fresh) == [0, 1, 2, 3, 4]
    assert neighbours.run(values, fresh) == [0, 1, 2, 3, 4]


def test_writers_in_two_processes_and_readers_agree_in_the_end(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    store = cached("directory", source, tmp_path)
    for turn in range(6):
        write_now(store, KEY, b"here %d" % turn)
        assert neighbours.run(read_now, store, KEY) == b"here %d" % turn
        neighbours.run(write_now, store, KEY, b"there %d" % turn)
        assert read_now(store, KEY) == b"there %d" % turn


def test_the_old_value_is_nowhere_on_disk(tmp_path: Path) -> None:
    store = cached("directory", LocalStore(tmp_path / "source"), tmp_path)
    for data in (b"first value", b"second value"):
        write_now(store, KEY, data)
    found = [p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sum(b"second value" in data for data in found) == 1
    assert not any(b"first value" in data for data in found)


def test_a_generic_cache_store_holds_the_new_value_only() -> None:
    cache = MemoryStore()
    store = xzcache.CacheStore(MemoryStore(), cache_store=cache)
    for data in (b"first value", b"second value"):
        write_now(store, KEY, data)
    assert {key: value.to_bytes() for key, value in cache._store_dict.items()} == {KEY: b"second value"}


@by_ranges
async def test_a_range_of_two_answers_is_of_one_state(
    cache_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a write is under way, one answer may be from before it and one from after it."""
    source = local_source(tmp_path) if cache_kind == "directory" else memory_source()
    await fill(source, x__c__0=b"oldold", warm=b"1")
    store = cached(cache_kind, source, tmp_path)
    await read(store, "warm")
    before = source.hold("set", KEY, after=False)
    writing = asyncio.create_task(store.set(KEY, buffer(b"newnew")))
    await before.arrived()
    early = source.hold("get", KEY, after=True)
    a_part = asyncio.create_task(read(store, KEY, between((0, 3))))
    await early.arrived()
    late = source.hold("get", KEY, after=False)
    all_of_it = asyncio.create_task(read(store, KEY, between((0, 6))))
    await late.arrived()
    ended, may_end, end = asyncio.Event(), asyncio.Event(), store._reads.backend.end_write

    async def held(*args: Any) -> None:
        ended.set()
        await may_end.wait()
        await end(*args)

    monkeypatch.setattr(store._reads.backend, "end_write", held)
    before.open()
    await asyncio.wait_for(ended.wait(), PATIENCE)
    early.open()
    source.let_go("get", KEY)
    assert await a_part == b"old"
    assert await all_of_it == b"newnew"
    may_end.set()
    await writing
    assert await read(store, KEY, between((0, 6))) == b"newnew"
