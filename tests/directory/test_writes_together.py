"""Writes that wait for the lock of the index at the same time share its transactions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore

import xzcache
from xzcache._threads import Together
from xzcache.directory._invalidation import Begun, Deletion, Writes
from xzcache.index import IndexSession

PATIENCE = 30


class Gated:
    """A function of several items, whose first call waits for the gate."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begun, self.gate = threading.Event(), threading.Event()

    def __call__(self, items: list[str]) -> list[str]:
        self.calls.append(items)
        if len(self.calls) == 1:
            self.begun.set()
            assert self.gate.wait(PATIENCE)
        if "bad" in items:
            raise ValueError("bad")
        return [item.upper() for item in items]


def test_what_comes_during_a_call_is_done_by_the_next_one() -> None:
    function = Gated()
    together = Together(function, lambda item: item[0], 4)
    first = together.submit(["a"])
    assert function.begun.wait(PATIENCE)
    more = [together.submit(items) for items in (["b", "c"], ["d"], ["b2"], ["e"], [], ["f", "g", "h"], ["i"])]
    function.gate.set()
    assert first.result(PATIENCE) == ["A"]
    assert [future.result(PATIENCE) for future in more] == [
        ["B", "C"],
        ["D"],
        ["B2"],
        ["E"],
        [],
        ["F", "G", "H"],
        ["I"],
    ]
    # no two items of one name, no more than four, and always in their order
    assert function.calls == [["a"], ["b", "c", "d"], ["b2", "e"], ["f", "g", "h", "i"]]
    assert together.submit(["z"]).result(PATIENCE) == ["Z"]


def test_an_error_is_that_of_its_call_only() -> None:
    function = Gated()
    together = Together(function, str, 2)
    first = together.submit(["a"])
    assert function.begun.wait(PATIENCE)
    futures = [together.submit([item]) for item in ("bad", "b", "c")]
    function.gate.set()
    assert first.result(PATIENCE) == ["A"]
    for future in futures[:2]:
        with pytest.raises(ValueError, match="bad"):
            future.result(PATIENCE)
    assert futures[2].result(PATIENCE) == ["C"]


def test_what_is_queued_cannot_be_cancelled() -> None:
    function = Gated()
    together = Together(function, str, 8)
    first = together.submit(["a"])
    assert function.begun.wait(PATIENCE)
    second = together.submit(["b"])
    assert not first.cancel()
    assert not second.cancel()
    function.gate.set()
    assert (first.result(PATIENCE), second.result(PATIENCE)) == (["A"], ["B"])
    assert together.submit(["c"]).result(PATIENCE) == ["C"]


def test_a_call_that_hangs_keeps_no_other_waiting() -> None:
    function = Gated()
    together = Together(function, str, 8)
    first = together.submit(["a"])
    assert function.begun.wait(PATIENCE)
    other = together.submit(["b"])
    together.hurry()
    assert other.result(PATIENCE) == ["B"]
    assert not first.done()
    function.gate.set()
    assert first.result(PATIENCE) == ["A"]


def test_writes_that_wait_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = Writes._begin

    def counted(writes: Writes, keys: Sequence[str]) -> list[Begun]:
        begun.append(len(keys))
        return begin(writes, keys)

    source = MemoryStore()
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")
    value, prototype = cpu.Buffer.from_bytes(b"x" * 100), default_buffer_prototype()

    async def write() -> None:
        await store.set("a/c/first", value)
        monkeypatch.setattr(Writes, "_begin", counted)
        waiting = store._cache.directory.begun_writes._queue  # type: ignore[union-attr]
        guarded = IndexSession(str(tmp_path / "cache"), 30.0, lambda: None).guarded()
        with guarded:
            writes = [asyncio.ensure_future(store.set(f"a/c/{number}", value)) for number in range(20)]
            # one call waits for the lock, and all others for that call
            while not begun or begun[0] + len(waiting) < 20:
                await asyncio.sleep(0.001)
        await asyncio.gather(*writes)
        for number in range(20):
            found = await store.get(f"a/c/{number}", prototype)
            assert found is not None
            assert found.to_bytes() == value.to_bytes()

    asyncio.run(write())
    assert sum(begun) == 20
    assert len(begun) <= 2
    assert store.cache_stats()["misses"] == 0
    assert len(source._store_dict) == 21


def test_deletions_that_wait_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    begin = Writes.begin_deletes

    def counted(writes: Writes, wanted: Sequence[tuple[str, bool]]) -> list[Deletion]:
        begun.append(len(wanted))
        return begin(writes, wanted)

    monkeypatch.setattr(Writes, "begin_deletes", counted)
    source = MemoryStore()
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")
    value, prototype = cpu.Buffer.from_bytes(b"x" * 100), default_buffer_prototype()

    async def write_and_delete() -> None:
        for number in range(14):
            await store.set(f"a/c/{number}", value)
            # as a file store does, a deletion takes what lies beneath as well
            await store.set(f"a/c/{number}/beneath", value)
        waiting = store._cache.directory.begun_deletes._queue  # type: ignore[union-attr]
        guarded = IndexSession(str(tmp_path / "cache"), 30.0, lambda: None).guarded()
        with guarded:
            deletions = [asyncio.ensure_future(store.delete(f"a/c/{number}")) for number in range(12)]
            while not begun or begun[0] + len(waiting) < 12:
                await asyncio.sleep(0.001)
        await asyncio.gather(*deletions)
        found = [await store.get(f"a/c/{number}", prototype) for number in range(14)]
        assert [number for number, value in enumerate(found) if value is not None] == [12, 13]

    asyncio.run(write_and_delete())
    assert sum(begun) == 12
    assert len(begun) <= 2
    assert store.cache_stats()["misses"] == 12


@pytest.mark.parametrize("most", [1, 2, 100])
def test_deletions_of_one_transaction_may_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A key may lie beneath a prefix that is deleted with it, in as many sections as it takes: no byte counts twice."""
    store = xzcache.LockedLocalStore(tmp_path, max_size="1 MB")
    for key in ("n/a/b/c", "n/a/b/d", "n/a/e", "n/other"):
        store.set_sync(key, cpu.Buffer.from_bytes(b"x" * 100))
    directory = store._directory
    monkeypatch.setattr(directory.space.pace, "count", most)
    drops = directory.writes.begin_deletes([("n/a", True), ("n/a/b", True), ("n/a/b/c", True)])
    assert not (tmp_path / "n" / "a").exists()
    with directory.session.section() as (_, index):
        written = index.tables.writings()
    assert written.keys == {"n/a", "n/a/b", "n/a/b/c"}
    assert set(written.prefixes) == {"n/a/", "n/a/b/", "n/a/b/c/"}
    directory.writes.end_deletes(drops)
    with directory.session.section() as (_, index):
        written, totals = index.tables.writings(), index.totals()
    assert (written.keys, written.prefixes) == (set(), [])
    assert (totals.entries, totals.size, totals.tombstones) == (1, 100, 0)
    # no file was looked for twice
    assert directory.reader.quarantine.suspected == []
    assert store.check().findings == ()


def test_deletions_that_a_dead_process_left_take_many_short_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    drop = Writes._drop_now

    def counted(writes: Writes, prefixes: Sequence[str], *args: Any, **options: Any) -> None:
        dropped.append(len(prefixes))
        drop(writes, prefixes, *args, **options)

    monkeypatch.setattr(Writes, "_drop_now", counted)
    directory = xzcache.LockedLocalStore(tmp_path)._directory
    assert directory.prepare()
    directory.writes.adopt([f"n/a/{number}/" for number in range(300)])
    directory.pending.retry_pending()
    assert not directory.pending.has_pending
    assert sum(dropped) == 300
    assert max(dropped) <= 64
