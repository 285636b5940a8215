"""Many processes on one large cache: inserts beside an evictor, then readers and writers at once.

The cache has a million entries with their files; its rows are written by hand, which takes seconds. The floor is the
same number of processes that read and write files without a cache: on few cores, most of a long wait is the wait for a
core. The time under the guard is that of the thread's processor as well, which such waits do not lengthen.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

import numpy as np
from _report import Report, arguments
from scale import BOUND, NAMESPACE, VALUE, key_of, roomy_memory
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import xzcache
from xzcache import files
from xzcache.directory._directory import CacheDirectory
from xzcache.index._locks import Guard
from xzcache.model.entry import Entry

ENTRIES: Final = 1_000_000
READERS, WRITERS = 16, 4
AT_ONCE: Final = 8
"""Hits that a reader asks for at once."""
MISSES: Final = 0.02
"""The part of the reads that finds nothing in the cache."""
TICK: Final = 0.01
GOAL_OF_INSERT, GOAL_UNDER_GUARD = 10, 5
_PROTOTYPE: Final = default_buffer_prototype()
_VALUE: Final = _PROTOTYPE.buffer.from_bytes(VALUE)


class Everything(dict[str, Any]):
    """Any key that is asked for, always with the same bytes."""

    def __missing__(self, key: str) -> Any:
        return _VALUE


def make(root: Path, entries: int) -> None:
    """Write the files of a cache, and their rows."""
    opened(root, BOUND).directory.close()
    (path,) = (root / ".xzcache").glob("index-*.db")
    with sqlite3.connect(path, isolation_level=None) as index:
        index.execute("PRAGMA synchronous=OFF")
        index.execute("PRAGMA cache_size=-400000")
        index.execute("BEGIN")
        index.execute("INSERT INTO ns(name) VALUES(?)", (NAMESPACE,))
        (number,) = index.execute("SELECT id FROM ns").fetchone()
        index.executemany(
            "INSERT INTO entry(ns, key, start, stop, odd, size, crc, used, rank, owner, seq, tick, gap) "
            "VALUES(?, ?, 0, -1, 0, ?, ?, ?, ?, 0, 0, ?, 0)",
            _rows(root, number, entries),
        )
        index.execute("COMMIT")
    index.close()


def _rows(root: Path, number: int, entries: int) -> Iterator[tuple[Any, ...]]:
    now = time.time_ns()
    for place in range(entries):
        entry = Entry(f"{NAMESPACE}/{key_of(place)}")
        stamp = files.stamp_of(entry, VALUE)
        files.write(f"{root}/{entry.key}", VALUE, stamp)
        used = now - (entries - place) * 1_000_000
        yield number, entry.key, len(VALUE), stamp.crc, used, used, place + 1


class Opened:
    """The cache in this process."""

    def __init__(self, root: Path, bound: int, policy: Literal["lru", "adaptive"]) -> None:
        self.store = xzcache.CacheStore(
            MemoryStore(Everything()),
            cache_store=root,
            namespace=NAMESPACE,
            max_size=bound,
            revalidate=False,
            policy=policy,
        )
        self.directory: CacheDirectory = self.store._cache.directory  # type: ignore[attr-defined]
        assert self.directory.prepare()


def opened(root: Path, bound: int, policy: Literal["lru", "adaptive"] = "adaptive") -> Opened:
    return Opened(root, bound, policy)


# -- who holds the guard for how long


class Watch:
    """Times each wait for the guard and each time under it, by the function that asked for it.

    Python's garbage collector may run at any time, under the guard as well: what it takes there is told apart.
    """

    def __init__(self) -> None:
        self.holds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self.waits: list[float] = []
        self.on_loops = 0
        self.collected: list[float] = []
        collecting: dict[str, float] = {}
        acquire, leave = Guard._acquire, Guard.__exit__
        began: dict[Guard, tuple[str, float, float]] = {}

        def timed_acquire(guard: Guard, patience: float | None) -> None:
            self.on_loops += asyncio._get_running_loop() is not None
            begin = time.perf_counter()
            acquire(guard, patience)
            now = time.perf_counter()
            self.waits.append(now - begin)
            began[guard] = _caller(sys._getframe(1)), now, time.thread_time()

        def timed_leave(guard: Guard, *error: Any) -> None:
            leave(guard, *error)
            name, wall, processor = began.pop(guard)
            self.holds[name].append((time.perf_counter() - wall, time.thread_time() - processor))

        def collect(phase: str, _: Any) -> None:
            if phase == "start":
                collecting["began"] = time.thread_time()
            elif began:
                self.collected.append(time.thread_time() - collecting["began"])

        Guard._acquire, Guard.__exit__ = timed_acquire, timed_leave  # type: ignore[method-assign, assignment]
        gc.callbacks.append(collect)

    def told(self) -> dict[str, Any]:
        return {"holds": self.holds, "waits": self.waits, "on_loops": self.on_loops, "collected": self.collected}


def _caller(frame: FrameType | None) -> str:
    """The function of the cache that has opened the section."""
    while frame is not None:
        path = frame.f_code.co_filename
        if "contextlib" not in path and not path.endswith(("_session.py", "_locks.py", "crowd.py")):
            return f"{frame.f_code.co_name} in {Path(path).stem.removeprefix('_')}"
        frame = frame.f_back
    return "other"


# -- what a process does; each prints what it has measured


def insert(cache: Opened, end: float) -> dict[str, Any]:
    publisher, fetch_locks = cache.directory.publisher, cache.directory.fetch_locks
    taken = []
    new = count(os.getpid() << 20)
    while (begin := time.perf_counter()) < end:
        entry = Entry(f"{NAMESPACE}/new/c/{next(new)}")
        assert publisher.publish(entry, VALUE, fetch_locks.write_version(entry.key))
        taken.append(time.perf_counter() - begin)
    return {"taken": taken}


def evict(cache: Opened, end: float) -> dict[str, Any]:
    freed = 0
    while time.perf_counter() < end:
        freed += cache.directory.space.evict(128 * len(VALUE)) // len(VALUE)
    return {"taken": [], "evicted": freed}


Act = Callable[[int], Any]


async def act_on(act: Act, at_once: int, end: float) -> dict[str, Any]:
    """Do something again and again, several at once, while a task measures how late the loop comes."""
    taken: list[float] = []
    late: list[float] = []

    async def tick() -> None:
        while (begin := time.perf_counter()) < end:
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - begin - TICK)

    async def one(number: int) -> None:
        begin = time.perf_counter()
        await act(number)
        taken.append(time.perf_counter() - begin)

    ticker = asyncio.create_task(tick())
    numbers = count()
    while time.perf_counter() < end:
        await asyncio.gather(*(one(next(numbers)) for _ in range(at_once)))
        await asyncio.sleep(0)
    await ticker
    return {"taken": taken, "late": late}


def reader(cache: Opened, entries: int) -> Act:
    draw = random.Random(os.getpid())

    async def read(number: int) -> None:
        is_new = draw.random() < MISSES
        key = f"new/c/{os.getpid()}-{number}" if is_new else key_of(draw.randrange(entries))
        assert await cache.store.get(key, _PROTOTYPE) is not None

    return read


def writer(cache: Opened) -> Act:
    return lambda number: cache.store.set(f"written/c/{os.getpid()}-{number}", _VALUE)


def plain_reader(root: Path, entries: int) -> Act:
    """What a hit does at the least: open, read and close a file."""
    draw = random.Random(os.getpid())

    async def read(number: int) -> None:
        try:
            with open(root / NAMESPACE / key_of(draw.randrange(entries)), "rb", buffering=0) as file:
                file.read()
        except FileNotFoundError:
            pass

    return read


def plain_writer(root: Path) -> Act:
    """A file that is written beside its place, and renamed."""
    folder = Path(tempfile.mkdtemp(dir=root.parent))

    async def write(number: int) -> None:
        temporary = folder / "new"
        temporary.write_bytes(VALUE)
        temporary.rename(folder / str(number % 1000))

    return write


def part(what: str, root: str, entries: int, bound: int, seconds: float, policy: Literal["lru", "adaptive"]) -> None:
    """The other process."""
    place = Path(root)
    if what.startswith("plain"):
        act = plain_reader(place, entries) if what == "plain reader" else plain_writer(place)
        print("ready", flush=True)
        sys.stdin.readline()
        found = asyncio.run(act_on(act, AT_ONCE if what == "plain reader" else 1, time.perf_counter() + seconds))
    else:
        watch = Watch()
        cache = opened(place, bound, policy)
        print("ready", flush=True)
        sys.stdin.readline()
        end = time.perf_counter() + seconds
        if what == "insert":
            found = insert(cache, end)
        elif what == "evict":
            found = evict(cache, end)
        elif what == "reader":
            found = asyncio.run(act_on(reader(cache, entries), AT_ONCE, end))
        else:
            found = asyncio.run(act_on(writer(cache), 1, end))
        found |= watch.told()
    print(json.dumps(found), flush=True)


@contextmanager
def processes(options: argparse.Namespace, root: Path, what: Sequence[str], bound: int) -> Iterator[list[Any]]:
    """Run some processes at once; yields what each has measured, in a list that is filled when the block begins."""
    common = [str(root), str(options.entries), str(bound), str(options.seconds), options.policy]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--part", name, *common],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in what
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield [json.loads(process.stdout.readline()) for process in started if process.stdout is not None]
    finally:
        for process in started:
            process.kill()
            process.communicate()


# -- the tables


def spread(values: Sequence[float]) -> list[str]:
    """The median, the 99th percentile and the largest value, in ms."""
    if not len(values):
        return ["", "", ""]
    return [f"{value * 1e3:.2f}" for value in (*np.percentile(values, [50, 99]), max(values))]


def joined(found: Sequence[Any], name: str) -> list[float]:
    return [value for each in found for value in each.get(name, [])]


def show_guard(report: Report, title: str, found: Sequence[Any]) -> None:
    """The longest times under the guard."""
    holds: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in found:
        for name, values in each.get("holds", {}).items():
            holds[name] += [(wall, processor) for wall, processor in values]
    rows = []
    for name, values in sorted(holds.items(), key=lambda item: -max(processor for _, processor in item[1])):
        wall, processor = zip(*values, strict=True)
        rows.append((name, str(len(values)), *spread(wall), *spread(processor)[1:]))
    every = [value for values in holds.values() for value in values]
    walls, processors = zip(*every, strict=True)
    rows.append(("all", str(len(every)), *spread(walls), *spread(processors)[1:]))
    names = ["under the guard, ms", "times", "median", "99 %", "longest", "99 % of the processor", "longest"]
    report.table(title, names, rows)
    collected = joined(found, "collected")
    report.say(
        f"The guard was taken {len(every)} times, on an event loop {sum(each.get('on_loops', 0) for each in found)} "
        f"times. Longest wait for it: {max(joined(found, 'waits')) * 1e3:.1f} ms. Meanwhile the garbage collector ran "
        f"{len(collected)} times, for {max(collected, default=0) * 1e3:.1f} ms of the processor at most."
    )


def beside_an_evictor(report: Report, options: argparse.Namespace, root: Path) -> None:
    rows = []
    for what in (["insert"], ["insert", "evict"]):
        with processes(options, root, what, BOUND) as found:
            beside = "beside a process that evicts without pause" if len(what) > 1 else "alone"
            taken = found[0]["taken"]
            rows.append((f"insert, {beside}", str(len(taken)), *spread(taken), str(GOAL_OF_INSERT)))
        if len(what) > 1:
            evicted = found[1]["evicted"]
    report.table(f"{options.entries:,} entries", ["ms", "inserts", "median", "99 %", "longest", "goal"], rows)
    report.say(f"{evicted} entries were evicted in {options.seconds:g} s.")
    show_guard(report, "Inserts beside an evictor", found)


def crowd(report: Report, options: argparse.Namespace, root: Path) -> None:
    with processes(options, root, ["insert"], BOUND):
        pass
    # the cache is full from here on: whoever writes evicts
    bound = opened(root, BOUND).directory.totals().size
    rows = []
    for kind, prefix in (("files without a cache", "plain "), ("xzcache", "")):
        what = [f"{prefix}reader"] * options.readers + [f"{prefix}writer"] * options.writers
        with processes(options, root, what, bound) as found:
            readers, writers = found[: options.readers], found[options.readers :]
            for name, some in (("read", readers), ("write", writers)):
                taken, late = joined(some, "taken"), joined(some, "late")
                rate = f"{len(taken) / options.seconds:,.0f}"
                rows.append((f"{name}, {kind}", rate, *spread(taken), *spread(late)[1:]))
    columns = ["ms", "a second", "median", "99 %", "longest", "loop stalls: 99 %", "longest"]
    title = f"{options.readers} readers and {options.writers} writers, {options.entries:,} entries"
    report.table(title, columns, rows)
    show_guard(report, title, found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--writers", type=int, default=WRITERS)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--policy", default="adaptive", choices=["lru", "adaptive"])
    parser.add_argument("--scratch", type=Path, help="where the cache is made, and found again if it is there")
    parser.add_argument("--part", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        what, root, entries, bound, seconds, policy = options.part
        part(what, root, int(entries), int(bound), float(seconds), policy)
        return
    scratch = options.scratch or Path(tempfile.mkdtemp(dir=roomy_memory()))
    try:
        with Report("crowd", options.out) as report:
            root = scratch / f"crowd-{options.entries}"
            if not root.exists():
                root.mkdir(mode=0o700, parents=True)
                begin = time.perf_counter()
                make(root, options.entries)
                report.say(f"Making the cache: {time.perf_counter() - begin:.0f} s.")
            beside_an_evictor(report, options, root)
            crowd(report, options, root)
    finally:
        if options.scratch is None:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
