"""Several entries that are published together: each for itself, and all within the bound."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE, audit

import xzcache
from xzcache import files as _files
from xzcache.directory import _publish as publishing
from xzcache.directory._directory import CacheDirectory
from xzcache.directory._publish import PendingEntry
from xzcache.directory._space import Space
from xzcache.directory._writebehind import WriteBehind
from xzcache.index._sql import Index
from xzcache.model.entry import END, Entry

SIZE = 10_000
BOUND = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[CacheDirectory]:
    store = xzcache.LockedLocalStore(tmp_path, max_size=BOUND)
    directory = store.directory
    assert directory.prepare()
    yield directory
    directory.close()
    audit(directory.root)


def parcel(directory: CacheDirectory, key: str, start: int = 0, stop: int = END, **options: Any) -> PendingEntry:
    entry = Entry(key, start, stop)
    return PendingEntry(entry, memoryview(os.urandom(SIZE)), directory.fetch_locks.write_version(entry.key), **options)


def read(directory: CacheDirectory, entry: Entry) -> bytes | None:
    found = directory.reader.open_entry(entry)
    data = None if found is None else directory.reader.read(found, 0, found.size)
    return None if data is None else bytes(data)


def stored(directory: CacheDirectory, parcels: Sequence[PendingEntry]) -> list[bool]:
    """Publish parcels together; which of them were stored, and that no other is there."""
    directory.publisher.publish_all(parcels)
    for one in parcels:
        assert not one.is_stored or read(directory, one.entry) == bytes(one.data)
    return [one.is_stored for one in parcels]


def test_one_transaction_for_all(directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored(directory, [parcel(directory, "a/first")]) == [True]
    commits = []
    commit = Index.commit
    monkeypatch.setattr(Index, "commit", lambda self: commits.append(self.connection.in_transaction) or commit(self))
    assert stored(directory, [parcel(directory, f"a/c/{number}") for number in range(20)]) == [True] * 20
    # one for the lease, one for the entries
    assert sum(commits) <= 2


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_written_harms_no_other(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    batch = [parcel(directory, f"a/c/{number}") for number in range(5)]
    write = _files.write

    def failing(path: str, data: Any, stamp: Any) -> None:
        if data is batch[2].data:
            raise OSError(code, os.strerror(code))
        write(path, data, stamp)

    monkeypatch.setattr(_files, "write", failing)
    directory.publisher.publish_all(batch)
    assert [one.is_stored for one in batch] == [True, True, False, True, True]
    # a full disk is no trouble; but something leaves for the next one
    assert directory.barrier.faults == (code == errno.EIO)
    there = [read(directory, one.entry) == bytes(one.data) for one in batch]
    assert sum(there) == (4 if code == errno.EIO else 3)


def test_a_file_that_cannot_get_its_name_harms_no_other(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = parcel(directory, "a/c/2")
    assert stored(directory, [old]) == [True]
    batch = [parcel(directory, f"a/c/{number}") for number in range(5)]
    move = _files.move

    def failing(source: str, target: str) -> None:
        if target.endswith("a/c/2"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(source, target)

    monkeypatch.setattr(_files, "move", failing)
    assert stored(directory, batch) == [True, True, False, True, True]
    assert read(directory, old.entry) is None


def test_what_takes_the_place_of_another_of_them_is_stored_all_the_same(directory: CacheDirectory) -> None:
    assert stored(directory, [parcel(directory, key) for key in ("a/b", "a/b/c", "a/d/e", "a/d")]) == [True] * 4


def test_what_is_written_meanwhile_is_not_stored(directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [parcel(directory, f"a/c/{number}") for number in range(4)]
    directory.writes.invalidate("a/c/0", None)
    begun = directory.writes.begin_write(["a/c/1"])
    write = _files.write

    def overtaken(path: str, data: Any, stamp: Any) -> None:
        write(path, data, stamp)
        if data is batch[2].data:
            directory.writes.invalidate("a/c/2", None)

    monkeypatch.setattr(_files, "write", overtaken)
    assert stored(directory, batch) == [False, False, False, True]
    directory.writes.end_writes([(write, None) for write in begun])


def test_what_somebody_writes_without_the_guard_leaves_again(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [parcel(directory, f"a/c/{number}") for number in range(4)]
    move = _files.move

    def overtaken(source: str, target: str) -> None:
        move(source, target)
        if target.endswith("a/c/1") and (member := directory.session.current) is not None:
            member.writes.lose()

    monkeypatch.setattr(_files, "move", overtaken)
    # it may have been a write to any key
    assert stored(directory, batch) == [False] * 4
    assert [read(directory, one.entry) for one in batch] == [None] * 4
    again = [parcel(directory, f"a/c/{number}") for number in range(4)]
    monkeypatch.setattr(_files, "move", move)
    assert stored(directory, again) == [True] * 4


def test_parts_of_two_states_that_come_together_are_not_stored_side_by_side(directory: CacheDirectory) -> None:
    batch = [
        parcel(directory, "a/c/0", 0, SIZE, validator="old"),
        parcel(directory, "a/c/0", SIZE, 2 * SIZE, validator="new"),
        parcel(directory, "a/c/0", 2 * SIZE, 3 * SIZE, validator="old"),
        parcel(directory, "a/c/1", 0, SIZE, validator="new"),
    ]
    assert stored(directory, batch) == [True, False, True, True]


def test_more_than_there_is_room_for_is_stored_as_far_as_it_goes(directory: CacheDirectory) -> None:
    batch = [parcel(directory, f"a/c/{number}") for number in range(150)]
    batch[70].data = memoryview(bytes(BOUND + 1))
    directory.publisher.publish_all(batch)
    assert not batch[70].is_stored
    assert sum(one.is_stored for one in batch) == 149
    # the last ones are there
    assert all(read(directory, one.entry) == bytes(one.data) for one in batch[-50:])


def test_no_batch_is_leased_for_that_exceeds_the_bound(
    directory: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = []
    take = Space.take
    monkeypatch.setattr(Space, "take", lambda self, member, size: leases.append(size) or take(self, member, size))
    batch = [parcel(directory, f"a/c/{number}") for number in range(150)]
    directory.publisher.publish_all(batch)
    assert leases == [150 * SIZE] + [SIZE] * 150


# -- what gathers while somebody is busy


class Recorder:
    """Stands for a publisher, and takes its time."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun = threading.Event()
        self.let = threading.Semaphore(0)
        self.error: Exception | None = None
        self.interrupt = False

    def __call__(self, batch: Sequence[PendingEntry]) -> None:
        self.batches.append([one.entry.key for one in batch])
        self.begun.set()
        if self.interrupt:
            raise KeyboardInterrupt
        assert self.let.acquire(timeout=30)
        if self.error is not None:
            raise self.error


async def given(
    background: WriteBehind, keys: Sequence[str], size: int = 1, done: Callable[[], None] | None = None
) -> None:
    for key in keys:
        background.publish(PendingEntry(Entry(key), memoryview(bytes(size)), None, done=done))
    await asyncio.sleep(0)


async def test_what_gathers_is_published_together_and_in_order() -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    done: list[str] = []
    await given(background, ["a", "b"])
    assert await asyncio.to_thread(recorder.begun.wait, PATIENCE)
    await given(background, ["c", "d"], done=lambda: done.append("parcel"))
    background.add(lambda: done.append("work"))
    await given(background, ["e", "f", "e"])
    recorder.let.release(10)
    background.wait()
    assert recorder.batches == [["a", "b"], ["c", "d"], ["e", "f"], ["e"]]
    assert done == ["parcel", "parcel", "work"]


async def test_a_batch_is_bounded() -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    recorder.let.release(1000)
    await given(background, [f"small {number}" for number in range(2 * publishing.MOST)])
    await given(background, ["large 0", "large 1", "large 2"], size=publishing.MOST_BYTES // 2)
    await given(background, ["larger"], size=2 * publishing.MOST_BYTES)
    background.wait()
    assert max(map(len, recorder.batches)) <= publishing.MOST
    assert ["larger"] in recorder.batches
    assert not any({"large 0", "large 1", "large 2"} <= set(batch) for batch in recorder.batches)
    assert sum(map(len, recorder.batches)) == 2 * publishing.MOST + 4


async def test_everybody_is_told_whatever_happens() -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    recorder.error = RuntimeError("a publisher never raises, and if it did")
    told: list[None] = []

    def tell() -> None:
        told.append(None)
        raise ValueError("and nor does this")

    recorder.let.release(10)
    await given(background, ["a", "b", "c"], done=tell)
    await background.drain_if_last()
    background.wait()
    assert len(told) == 3
    recorder.error = None
    await given(background, ["d"])
    background.wait()
    assert recorder.batches[-1] == ["d"]


async def test_what_was_left_by_a_loop_that_stopped_is_stored() -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    recorder.let.release(10)

    def in_a_loop_that_stops_at_once() -> None:
        loop = asyncio.new_event_loop()
        loop.call_soon(lambda: (background.publish(PendingEntry(Entry("a"), b"", None)), loop.stop()))
        loop.run_forever()
        loop.close()

    await asyncio.to_thread(in_a_loop_that_stops_at_once)
    background.wait()
    assert recorder.batches == [["a"]]


async def test_a_caller_who_is_alone_waits_for_what_is_stored() -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    background.begin_fetch()
    await given(background, ["a", "b"])
    waiting = asyncio.ensure_future(background.drain_if_last())
    # it is being stored, and cannot end before it may
    assert await asyncio.to_thread(recorder.begun.wait, PATIENCE)
    assert not waiting.done()
    recorder.let.release(10)
    await waiting
    assert recorder.batches == [["a", "b"]]
    background.end_fetch()


async def test_where_no_thread_can_be_had_it_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    recorder.let.release(1000)
    monkeypatch.setattr("xzcache.directory._writebehind.try_in_order", lambda function: False)
    await given(background, [f"{number}" for number in range(3 * publishing.MOST)])
    background.wait()
    assert [len(batch) for batch in recorder.batches] == [publishing.MOST] * 3


async def test_who_is_interrupted_leaves_the_rest_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    background = WriteBehind(recorder)
    recorder.let.release(1000)
    monkeypatch.setattr("xzcache.directory._writebehind.try_in_order", lambda function: False)
    for key in ("a", "b", "a"):
        background._add(PendingEntry(Entry(key), b"", None), 0)
    recorder.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    recorder.interrupt = False
    background.begin_fetch()
    await asyncio.wait_for(background.drain_if_last(), 10)
    assert recorder.batches == [["a", "b"], ["a"]]
