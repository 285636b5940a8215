"""The time that a hit spends in the cache, against opening, reading and closing the same files by hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from _measure import alternate
from _report import Report, arguments
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.experimental.cache_store import CacheStore as TheirCacheStore
from zarr.storage import LocalStore

import xzcache

SIZES = {"4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
MORE_SIZES = {"256 KiB": 256 << 10, "4 MiB": 4 << 20}
TOTAL = 64 << 20
MOST = 512
BARE = "open, read, close"


class Contest:
    """Keys of one size in a source, in our cache and in Zarr's, and ways to read them all once."""

    def __init__(self, root: Path, size: int) -> None:
        self.keys = [f"a/c/{number}" for number in range(max(8, min(MOST, TOTAL // size)))]
        self.size = size
        self.root = root / "source"
        self.paths = [str(self.root / key) for key in self.keys]
        value = cpu.Buffer.from_bytes(os.urandom(size))
        self.source = LocalStore(self.root)
        self.theirs = TheirCacheStore(LocalStore(self.root), cache_store=LocalStore(root / "theirs"))
        self.ours = xzcache.CacheStore(LocalStore(self.root), cache_store=root / "ours", revalidate=False)
        sync(self._fill(value))

    async def _fill(self, value: Buffer) -> None:
        for key in self.keys:
            await self.source.set(key, value)
        for store in (self.theirs, self.ours):
            for key in self.keys:
                await store.get(key, default_buffer_prototype())
            found = [await store.get(key, default_buffer_prototype()) for key in self.keys]
            assert all(one is not None and one.to_bytes() == value.to_bytes() for one in found)
        self.ours.cache_info()  # waits until all is stored

    def bare(self) -> None:
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.read(fd, self.size)
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
        stores = {"LocalStore": self.source, "Zarr CacheStore": self.theirs, "xzcache": self.ours}
        ways |= {f"{name}: await get": self.awaited(store) for name, store in stores.items()}
        able = {name: store for name, store in stores.items() if getattr(store, "_supports_sync_io", False)}
        return ways | {f"{name}: get_sync": self.at_once(store) for name, store in able.items()}


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = SIZES | (MORE_SIZES if options.full else {})
    rows, groups = [], {}
    with Report("hit", options.out) as report, tempfile.TemporaryDirectory() as scratch:
        for label, size in sorted(sizes.items(), key=lambda item: item[1]):
            contest = Contest(Path(scratch) / str(size), size)
            taken = alternate(contest.contestants(), calls=len(contest.keys), warm_up=2, budget=8)
            for name, samples in taken.items():
                spread = " to ".join(f"{quartile * 1e6:.1f}" for quartile in samples.quartiles)
                rows.append((f"{label}, {name}", f"{samples.median * 1e6:.1f}", spread, str(samples.over(taken[BARE]))))
            groups[label] = {name: samples.median * 1e6 for name, samples in taken.items()}
        report.table("One hit", ["size, way", "microseconds", "quartiles", f"over {BARE}"], rows)
        report.bars("sizes", "One hit, one after the other", groups, "microseconds")


if __name__ == "__main__":
    main()
