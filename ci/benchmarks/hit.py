"""The time that a hit spends in the cache, against opening, reading and closing the same files by hand."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _contestants import outside
from _measure import alternate
from _report import Report, arguments
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.experimental.cache_store import CacheStore as TheirCacheStore
from zarr.storage import LocalStore

import xzcache

SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
MORE_SIZES = {"4 MiB": 4 << 20}
TOTAL = 64 << 20
MOST = 512
BARE, LOCAL = "open, read, close", "LocalStore: await get"


class Contest:
    """Keys of a source, in our cache and in Zarr's, and ways to read them all once."""

    def __init__(self, source: Path, keys: list[str], root: Path) -> None:
        self.keys = keys
        self.values = [(source / key).read_bytes() for key in keys]
        self.paths = [str(source / key) for key in keys]
        self.source = LocalStore(source, read_only=True)
        self.theirs = TheirCacheStore(self.source, cache_store=LocalStore(root / "theirs"))
        self.ours = xzcache.CacheStore(self.source, cache_store=root / "ours", revalidate=False)
        sync(self._fill())

    async def _fill(self) -> None:
        for store in (self.theirs, self.ours):
            for key in self.keys:
                await store.get(key, default_buffer_prototype())
            found = [await store.get(key, default_buffer_prototype()) for key in self.keys]
            assert [one and one.to_bytes() for one in found] == self.values
        self.ours.cache_info()  # waits until all is stored

    def bare(self) -> None:
        for path, value in zip(self.paths, self.values, strict=True):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.read(fd, len(value))
            os.close(fd)

    def awaited(self, store: Store) -> Callable[[], None]:
        """One key after the other, on a running loop."""

        async def read() -> None:
            prototype = default_buffer_prototype()
            for key in self.keys:
                await store.get(key, prototype)

        return lambda: sync(read())

    def at_once(self, store: Store) -> Callable[[], None]:
        """By the synchronous way that Zarr's fused pipeline takes where a store has it."""

        def read() -> None:
            prototype = default_buffer_prototype()
            get = store.get_sync  # type: ignore[attr-defined]  # of a protocol of Zarr's that is not public yet
            for key in self.keys:
                get(key, prototype=prototype)

        return read

    def contestants(self) -> dict[str, Callable[[], object]]:
        ways: dict[str, Callable[[], object]] = {BARE: self.bare}
        stores: dict[str, Store] = {"LocalStore": self.source, "Zarr CacheStore": self.theirs, "xzcache": self.ours}
        ways |= {f"{name}: await get": self.awaited(store) for name, store in stores.items()}
        # Zarr's own cache would be read past it
        able = {name: stores[name] for name in ("LocalStore", "xzcache") if hasattr(stores[name], "get_sync")}
        return ways | {f"{name}: get_sync": self.at_once(store) for name, store in able.items()}


def of_size(size: int, root: Path) -> Contest:
    """Keys that all have one size."""
    source = root / "source"
    keys = [f"a/c/{number}" for number in range(max(8, min(MOST, TOTAL // size)))]
    for key in keys:
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        (source / key).write_bytes(os.urandom(size))
    return Contest(source, keys, root)


def main() -> None:
    options = arguments(__doc__, can_be_outside=True, can_count_cpu=True).parse_args()
    sizes = SIZES | (MORE_SIZES if options.full else {})
    rows, groups = [], {}
    with Report("hit", options.out) as report, tempfile.TemporaryDirectory() as scratch:
        if options.clock is time.process_time:
            report.say("CPU time of the process, all threads")
        contests: dict[str, Callable[[], Contest]] = {
            label: partial(of_size, size, Path(scratch) / str(size)) for label, size in sizes.items()
        }
        if options.outside:
            found = outside(options.outside)
            contests = {options.outside.name: lambda: Contest(found.path, found.objects()[:MOST], Path(scratch))}
        for label, prepare in contests.items():
            contest = prepare()
            taken = alternate(contest.contestants(), calls=len(contest.keys), warm_up=2, budget=8, clock=options.clock)
            for name, samples in taken.items():
                spread = " to ".join(f"{quartile * 1e6:.1f}" for quartile in samples.quartiles)
                compared = (str(samples.over(taken[other])) for other in (BARE, LOCAL))
                rows.append((f"{label}, {name}", f"{samples.median * 1e6:.1f}", spread, *compared))
            groups[label] = {name: samples.median * 1e6 for name, samples in taken.items()}
        columns = ["size, way", "microseconds", "quartiles", f"over {BARE}", f"over {LOCAL}"]
        report.table("One hit", columns, rows)
        report.bars("sizes", "One hit, one after the other", groups, "microseconds")


if __name__ == "__main__":
    main()
