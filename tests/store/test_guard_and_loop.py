"""No event loop waits for the guard, whatever is asked of a store while another process holds it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import xzcache
from xzcache.directory import _directory
from xzcache.directory._directory import CacheDirectory

PROTOTYPE = default_buffer_prototype()
VALUE = PROTOTYPE.buffer.from_bytes(bytes(range(200)))
TIMEOUT = 30.0

Act = Callable[[xzcache.CacheStore], Coroutine[Any, Any, Any]]


async def listed(store: xzcache.CacheStore) -> list[str]:
    return [key async for key in store.list_prefix("a/")]


ACTS: dict[str, Act] = {
    "hit": lambda store: store.get("a/c/0", PROTOTYPE),
    "miss": lambda store: store.get("a/c/7", PROTOTYPE),
    "range": lambda store: store.get("a/c/8", PROTOTYPE, RangeByteRequest(5, 20)),
    "missing": lambda store: store.get("a/c/none", PROTOTYPE),
    "document": lambda store: store.get("a/zarr.json", PROTOTYPE),
    "exists": lambda store: store.exists("a/c/1"),
    "size": lambda store: store.getsize("a/c/1"),
    "list": listed,
    "set": lambda store: store.set("a/c/2", VALUE),
    "delete": lambda store: store.delete("a/c/3"),
    "delete_dir": lambda store: store.delete_dir("b"),
    "clear": lambda store: store.clear(),
}


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_loop_goes_on_while_another_process_holds_the_guard(tmp_path: Path, act: Act, *, joined: bool) -> None:
    source = {f"{name}/c/{number}": VALUE for name in "ab" for number in range(10)}
    with xzcache.config.set({"lock_timeout": TIMEOUT}):
        store = xzcache.CacheStore(MemoryStore(source), cache_store=tmp_path, namespace="n")

        async def warm() -> None:
            for number in range(3):
                await store.get(f"a/c/{number}", PROTOTYPE)

        asyncio.run(warm())
        if not joined:
            xzcache.cleanup_resources()
        guard = os.open(tmp_path / ".xzcache" / "lock", os.O_RDWR)

        async def beside() -> float:
            task = asyncio.create_task(act(store))
            began = time.monotonic()
            for _ in range(50):
                await asyncio.sleep(0.001)
            took = time.monotonic() - began
            # only this loop ends the wait
            fcntl.flock(guard, fcntl.LOCK_UN)
            await task
            return took

        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            assert asyncio.run(beside()) < TIMEOUT / 2
        finally:
            os.close(guard)


def test_a_process_that_joins_waits_longer_for_others_than_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: queue.Queue[bool] = queue.Queue()

    def hangs(directory: CacheDirectory, waited: bool = True) -> bool:
        answer = real(directory, waited)
        waits.put(answer)
        return answer

    real = CacheDirectory._hangs
    monkeypatch.setattr(CacheDirectory, "_hangs", hangs)
    monkeypatch.setattr(_directory, "LONG", 0.05)
    with xzcache.config.set({"lock_timeout": TIMEOUT}):
        store = xzcache.CacheStore(MemoryStore({"a/c/0": VALUE}), cache_store=tmp_path, namespace="n")

    async def read() -> None:
        task = asyncio.create_task(store.get("a/c/0", PROTOTYPE))
        # it has waited for too long, if it was for the disk, again and again
        for _ in range(3):
            while not await asyncio.to_thread(waits.get, timeout=TIMEOUT):
                pass
        assert not task.done()
        fcntl.flock(guard, fcntl.LOCK_UN)
        await task

    (tmp_path / ".xzcache").mkdir(mode=0o700)
    guard = os.open(tmp_path / ".xzcache" / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        asyncio.run(read())
    finally:
        os.close(guard)
    assert store.cache_info()["cached_keys"] == 1
    assert store.cache_stats()["cache_errors"] == 0
