"""What a worker makes of what the scheduler tells it, with a clock of its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from xzcache.dask import _affinity, _told
from xzcache.dask._telling import Writes
from xzcache.dask._told import Told


class Scheduler:
    """Tells one worker of two nodes, and of stale paths."""

    def __init__(self) -> None:
        self.version = 0
        self.stale: list[tuple[str, bool]] = []

    async def xzcache_peers(self, **_: Any) -> dict[str, Any]:
        self.version += 1
        members = {"tcp://one": ("one", 10), "tcp://two": ("two", 1000)}
        return {"cluster": "c", "version": self.version, "nodes": members, "stale": self.stale}


def told_by(scheduler: Scheduler) -> Told:
    worker: Any = SimpleNamespace(address="tcp://one", scheduler=scheduler, rpc=lambda address: None)
    directory: Any = SimpleNamespace(writes=SimpleNamespace(distrust=lambda path: None))
    gauge: Any = SimpleNamespace(read=lambda: SimpleNamespace(node="one", bound=10))
    return Told(worker, directory, gauge)


def look(told: Told, scheduler: Scheduler, *stale: tuple[str, bool]) -> None:
    scheduler.stale = list(stale)

    async def once() -> None:
        await told.look()
        await asyncio.gather(*told._greetings)

    asyncio.run(once())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0, wall=1000.0)
    clock.monotonic, clock.time = lambda: clock.now, lambda: clock.wall
    monkeypatch.setattr(_told, "time", clock)
    return clock


def test_what_was_told_before_the_machine_slept_is_not_believed_after_it(clock: SimpleNamespace) -> None:
    told = told_by(scheduler := Scheduler())
    look(told, scheduler)
    clock.now, clock.wall = 9.0, 1009.0
    assert told.is_valid
    # only one of the clocks goes on
    clock.wall = 1011.0
    assert not told.is_valid
    look(told, scheduler)
    assert told.is_valid
    clock.now, clock.wall = 20.0, 1012.0
    assert not told.is_valid


def test_what_was_confirmed_before_a_write_is_not_believed_after_it_though_the_clock_was_set_back(
    clock: SimpleNamespace,
) -> None:
    told = told_by(scheduler := Scheduler())
    look(told, scheduler, ("", False))
    before = told.stale_since("source/a/c/0")
    clock.now, clock.wall = 10.0, 900.0
    look(told, scheduler, ("source/a", False))
    assert told.stale_since("source/a/c/0") != before
    assert told.stale_since("source/b/c/0") == before


def test_threads_that_ask_at_the_same_time_ask_the_same_node(monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_by(scheduler := Scheduler())
    look(told, scheduler)
    reached, gate, numbered = threading.Event(), threading.Event(), _affinity._hash

    def slow(name: str) -> int:
        if name in ("one", "two"):
            reached.set()
            gate.wait()
        return numbered(name)

    monkeypatch.setattr(_affinity, "_hash", slow)
    with ThreadPoolExecutor(1) as thread:
        try:
            first = thread.submit(told.owns, "c/0")
            first.add_done_callback(lambda _: reached.set())
            reached.wait()
            second = told.owns("c/0")
        finally:
            gate.set()
    assert second == first.result()


def test_a_worker_leaves_though_a_look_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_told, "LEASE", 0.1)
    told = told_by(Scheduler())

    async def leave() -> None:
        # as a look does that waits for a disk
        async with told._looking, asyncio.timeout(30) as patience:
            with pytest.raises(TimeoutError):
                await told.leave()
        assert not patience.expired()

    asyncio.run(leave())


def test_a_write_goes_on_though_the_loop_of_the_worker_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def made() -> Writes:
        worker: Any = SimpleNamespace(address="tcp://one", scheduler=Scheduler())
        return Writes(worker)

    writes = asyncio.run(made())
    # as if it were closed just after it was looked at
    monkeypatch.setattr(writes._loop, "is_closed", lambda: False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend: Any = SimpleNamespace(namespace="n")
        writes.end(asyncio.run(writes.begin(backend, ["a/c/0"])))
        writes.learn(["n/a/", "n/a/c/0"])
        gc.collect()
    # as of coroutines that nothing awaits
    assert [each for each in said if each.category is RuntimeWarning] == []
