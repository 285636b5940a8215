"""Caches of a thousand to a million entries: what opening, reading, storing, evicting and asking cost in each.

Each cache is made of files of 64 bytes that bear the cache's own stamps; the index is then made from them, as it is
where it was lost. All caches are measured in one process, in turns.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil
from _measure import Samples, alternate
from _report import Report, arguments
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

import xzcache
from xzcache import files
from xzcache.directory._directory import CacheDirectory
from xzcache.model.entry import Entry

SIZES = [1_000, 100_000, 1_000_000]
FULL = [1_000, 10_000, 100_000, 1_000_000]
NAMESPACE = "source"
VALUE = bytes(range(64))
BOUND = 1 << 40
IN_A_DIRECTORY = 1000
LOOKUPS, INSERTS, EVICTIONS = 1000, 128, 128


def key_of(number: int) -> str:
    return f"array/c/{number // IN_A_DIRECTORY}/{number % IN_A_DIRECTORY}"


class Cache:
    """A cache of so many entries."""

    def __init__(self, root: Path, entries: int) -> None:
        self.root = root
        self.entries = entries
        self.store = xzcache.CacheStore(
            MemoryStore(), cache_store=root, namespace=NAMESPACE, max_size=BOUND, revalidate=False
        )
        self.directory: CacheDirectory = self.store._cache.directory  # type: ignore[attr-defined]
        self.keys = [key_of(number) for number in random.Random(0).sample(range(entries // 2, entries), LOOKUPS // 2)]
        self.keys += self.keys
        self._new = count()

    @property
    def excess(self) -> int:
        return self.directory.totals().entries - self.entries

    def reopen(self) -> None:
        """Leave the directory and join it again, as another process would: no process has it open twice."""
        self.directory.close()
        assert self.directory.prepare()

    def look_up(self) -> None:
        async def read() -> None:
            prototype = default_buffer_prototype()
            for key in self.keys:
                await self.store.get(key, prototype)

        sync(read())

    def insert(self, number: int = INSERTS) -> None:
        publisher, fetch_locks = self.directory.publisher, self.directory.fetch_locks
        for _ in range(number):
            entry = Entry(f"{NAMESPACE}/new/c/{next(self._new)}")
            assert publisher.publish(entry, VALUE, fetch_locks.write_version(entry.key))

    def evict(self, number: int = EVICTIONS) -> None:
        assert self.directory.space.evict(number * len(VALUE)) == number * len(VALUE)

    def ask(self) -> None:
        assert self.store.cache_info()["total_size"]


def make(root: Path, entries: int) -> None:
    """Write the files of a cache without an index."""
    root.mkdir(mode=0o700, parents=True)
    for number in range(entries):
        entry = Entry(f"{NAMESPACE}/{key_of(number)}")
        files.write(f"{root}/{entry.key}", VALUE, files.stamp_of(entry, VALUE))


def roomy_memory() -> str | None:
    """A file system in memory, where there is room: what a disk's own takes for a file differs by more than we do."""
    room = "/dev/shm"
    enough = 8 << 30
    if os.path.isdir(room) and min(shutil.disk_usage(room).free, psutil.virtual_memory().available) > 2 * enough:
        return room
    return None


@contextmanager
def probing(cache: Cache, what: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process that reads from, or stores in, a cache for so long, and tells the pauses it sees."""
    command = [sys.executable, __file__, "--probe", what, str(seconds), str(cache.root), str(cache.entries)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def probe(what: str, seconds: str, root: str, entries: str) -> None:
    """The other process."""
    me = psutil.Process()
    cache = Cache(Path(root), int(entries))
    before = me.memory_full_info().uss
    cache._new = count(os.getpid() << 20)
    cache.look_up()
    print("ready", flush=True)
    taken: list[float] = []
    end = time.perf_counter() + float(seconds)
    prototype = default_buffer_prototype()

    async def read_on() -> None:
        while (begin := time.perf_counter()) < end:
            await cache.store.get(cache.keys[len(taken) % LOOKUPS], prototype)
            taken.append(time.perf_counter() - begin)

    if what == "hits":
        sync(read_on())
    elif what == "inserts":
        while (begin := time.perf_counter()) < end:
            cache.insert(1)
            taken.append(time.perf_counter() - begin)
    else:
        for _ in range(10):
            cache.look_up()
            cache.insert()
            cache.evict()
            cache.ask()
        taken.append(0.0)
    taken.sort()
    print(taken[len(taken) * 999 // 1000], taken[-1], me.memory_full_info().uss - before)


def result(process: subprocess.Popen[str]) -> tuple[float, float, int]:
    assert process.stdout is not None
    tail, longest, memory = process.stdout.readline().split()
    return float(tail), float(longest), int(memory)


def compare(caches: dict[str, Cache]) -> dict[str, dict[str, Samples]]:
    def leave_as_it_was(name: str) -> None:
        if (excess := caches[name].excess) > 0:
            caches[name].evict(excess)
        elif excess < 0:
            caches[name].insert(-excess)

    acts: dict[str, tuple[str, int]] = {
        "close and open": ("reopen", 1),
        "look up": ("look_up", LOOKUPS),
        "insert": ("insert", INSERTS),
        "evict": ("evict", EVICTIONS),
        "cache_info()": ("ask", 1),
    }
    compared = {}
    for act, (method, calls) in acts.items():
        contestants: dict[str, Callable[[], object]] = {name: getattr(c, method) for name, c in caches.items()}
        compared[act] = alternate(
            contestants, calls=calls, warm_up=3, least=15, most=60, budget=8, before=leave_as_it_was
        )
    return compared


def pauses(cache: Cache) -> list[tuple[str, str, str]]:
    rows = []
    for what in ("hits", "inserts"):
        for evicting in (False, True):
            with probing(cache, what, 4.0) as process:
                end = time.perf_counter() + 4.0
                while evicting and time.perf_counter() < end:
                    cache.evict()
                tail, longest, _ = result(process)
            label = f"{what}, {'while another process evicts without pause' if evicting else 'alone'}"
            rows.append((label, f"{tail * 1e3:.2f}", f"{longest * 1e3:.2f}"))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scratch", type=Path, help="where the caches are made, and found again if they are there")
    parser.add_argument("--probe", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe is not None:
        probe(*options.probe)
        return
    scratch = options.scratch or Path(tempfile.mkdtemp(dir=roomy_memory()))
    try:
        with Report("scale", options.out) as report:
            measure(report, scratch, FULL if options.full else SIZES)
    finally:
        if options.scratch is None:
            shutil.rmtree(scratch)


def measure(report: Report, scratch: Path, sizes: list[int]) -> None:
    caches, made = {}, []
    for entries in sizes:
        root = scratch / str(entries)
        begin = time.perf_counter()
        if not root.exists():
            make(root, entries)
        written = time.perf_counter()
        cache = caches[f"{entries:.0e}".replace("e+0", "e")] = Cache(root, entries)
        cache.ask()
        made.append((f"{entries:,}", f"{written - begin:.1f}", f"{time.perf_counter() - written:.1f}"))
        cache.evict(max(0, cache.excess))
    report.table("The caches", ["entries", "writing the files, s", "making the index of them, s"], made)
    compared = compare(caches)
    first = next(iter(caches))
    rows = []
    for act, taken in compared.items():
        times = [f"{samples.median * 1e6:.1f}" for samples in taken.values()]
        rows.append((act, *times, *(str(s.over(taken[first])) for n, s in taken.items() if n != first)))
    columns = ["microseconds each", *caches, *(f"{name} / {first}" for name in caches if name != first)]
    report.table("Side by side", columns, rows)
    series: dict[str, dict[float, float]] = {
        act: {caches[name].entries: s.median / taken[first].median for name, s in taken.items()}
        for act, taken in compared.items()
    }
    report.lines(
        "entries",
        "What each costs, as a multiple of what it costs in the smallest cache",
        series,
        "entries in the cache",
        f"multiple of {first}",
        logarithmic=(True, False),
    )
    memory = []
    for name, cache in caches.items():
        with probing(cache, "memory", 0) as process:
            memory.append((name, f"{result(process)[2] / 1e6:.1f}"))
        cache.evict(max(0, cache.excess))
    report.table(
        "Memory of a process that works with the cache, beyond what importing takes", ["entries", "MB"], memory
    )
    largest = list(caches.values())[-1]
    columns = ["what waits", "99.9 %, ms", "longest, ms"]
    report.table(f"Pauses, {largest.entries:,} entries", columns, pauses(largest))


if __name__ == "__main__":
    main()
