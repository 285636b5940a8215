"""The memory of a process that reads far more than its cache holds, and of one call for very many byte ranges."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from _report import Report, arguments
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

import xzcache

MB = 1 << 20
GOAL = 20
"""MB by which the resident memory may grow."""
PARTS = 10
AT_ONCE = 16
RANGES, RANGE = 10_000, 1000


class Sparse(dict[str, Any]):
    """Every chunk there can be, all the same one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = cpu.Buffer.from_bytes(bytes(size))

    def __missing__(self, key: str) -> cpu.Buffer:
        return self.value


def resident() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / MB


def read_much(root: Path, total: int, bound: int, size: int) -> list[float]:
    """Read that many bytes through a cache of that bound; the resident memory in MB after each tenth."""
    store = xzcache.CacheStore(MemoryStore(Sparse(size)), cache_store=root, max_size=bound)
    count = total // size // PARTS

    async def read(part: int) -> None:
        prototype = default_buffer_prototype()
        for begin in range(part * count, (part + 1) * count, AT_ONCE):
            keys = range(begin, min(begin + AT_ONCE, (part + 1) * count))
            await asyncio.gather(*(store.get(f"a/c/{key}", prototype) for key in keys))

    taken = []
    for part in range(PARTS):
        sync(read(part))
        taken.append(resident())
    assert store.cache_info()["current_size"] <= bound
    return taken


def read_ranges(root: Path, *, again: bool) -> tuple[float, float]:
    """One call for many byte ranges of an object; the bytes asked for, and the growth of the peak, in MB."""
    source = MemoryStore(Sparse(RANGES * RANGE * 4))
    store = xzcache.CacheStore(source, cache_store=root)
    wanted = [RangeByteRequest(n * RANGE * 4, n * RANGE * 4 + RANGE) for n in range(RANGES)]

    async def read() -> int:
        size = 0
        async for batch in store.get_ranges("a/c/0", wanted, prototype=default_buffer_prototype()):
            size += sum(len(buffer) for _, buffer in batch if buffer is not None)
        return size

    if again:
        sync(read())
        store.cache_info()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident()
    size = sync(read())
    assert size == RANGES * RANGE
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return size / MB, int(line.split()[1]) / 1024 - before


def apart(*what: str) -> list[float]:
    """Run one measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--apart", *what], check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--total", type=float, default=4, help="GB that are read; 100 with --full")
    parser.add_argument("--size", type=int, default=256 << 10, help="bytes of an object")
    parser.add_argument("--apart", nargs="+", help="for the benchmark itself: what this process measures")
    options = parser.parse_args()
    if options.apart:
        kind, root, *numbers = options.apart
        taken = (
            read_much(Path(root), *map(int, numbers))
            if kind == "much"
            else list(read_ranges(Path(root), again=kind == "again"))
        )
        print(*taken)
        return
    total = int(100e9 if options.full else options.total * 1e9)
    rows = []
    with Report("memory", options.out) as report, tempfile.TemporaryDirectory() as scratch:
        taken = apart("much", os.path.join(scratch, "much"), str(total), str(total // 10), str(options.size))
        # by then the cache is full, and what a process needs once is there
        grown = max(taken[2:]) - taken[1]
        rows.append(
            (f"{total / 1e9:g} GB through {total / 1e10:g} GB: grown since two tenths", f"{grown:.1f}", str(GOAL))
        )
        rows.append((f"{total / 1e9:g} GB through {total / 1e10:g} GB: at the end", f"{taken[-1]:.0f}", ""))
        for kind, label in (("once", "from the source"), ("again", "from the cache")):
            size, peak = apart(kind, os.path.join(scratch, kind))
            rows.append((f"{RANGES:,} ranges, {size:.1f} MB in all, {label}: the peak grows by", f"{peak:.1f}", ""))
        report.table("Resident memory", ["what", "MB", "goal"], rows)
        parts = {float(n + 1) * 10: value for n, value in enumerate(taken)}
        report.lines("much", "Resident memory while reading", {"xzcache": parts}, "% read", "MB")


if __name__ == "__main__":
    main()
