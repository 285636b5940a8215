"""What a policy costs: misses of a full cache, each of which lets an entry leave, and hits, side by side.

Each cache holds a hundred thousand small entries that came through it, and as many ghosts as it keeps. The source is in
memory, so that the time of a miss is the cache's.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Final, Literal

from _by_hand import Files
from _measure import alternate
from _report import Report, arguments
from rich.progress import track
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

import xzcache
from xzcache.directory._directory import CacheDirectory

ENTRIES: Final = 100_000
BYTES: Final = 2000
AT_ONCE: Final = 32
NAMESPACE: Final = "source"
POLICIES: Final[tuple[Literal["lru", "adaptive"], ...]] = ("lru", "adaptive")
CALLS: Final = 2048
HITS_OF_A_MISS: Final = 3
GHOSTS: Final = 16
"""For each entry, at the most."""
_PROTOTYPE: Final = default_buffer_prototype()


class Everything(dict[str, Buffer]):
    """Any key that is asked for, always with the same bytes."""

    def __missing__(self, key: str) -> Buffer:
        return _VALUE


_VALUE: Final = _PROTOTYPE.buffer.from_bytes(bytes(BYTES))


class ByHand:
    """As many files by hand, one of which goes for each that comes."""

    def __init__(self, root: Path, entries: int) -> None:
        self._files, self._new = Files(root), count()
        self._data = _VALUE.as_numpy_array()
        self._files.index.execute("BEGIN")
        for number in range(entries):
            (root / f"data/old{number}").touch()
            self._files.add(f"data/old{number}", self._data)
        self._files.index.execute("COMMIT")

    def put(self, number: int = CALLS) -> None:
        """Store one after another."""
        for _ in range(number):
            self._files.put(f"data/{next(self._new)}", self._data, evict=True)


class Cache:
    """A full cache of one policy."""

    def __init__(self, root: Path, policy: Literal["lru", "adaptive"], entries: int) -> None:
        bound = entries * BYTES
        source = MemoryStore(Everything())
        self.store = xzcache.CacheStore(
            source, cache_store=root, namespace=NAMESPACE, max_size=bound, revalidate=False, policy=policy
        )
        self.plain = xzcache.LockedLocalStore(root, max_size=bound, policy=policy)
        self.directory: CacheDirectory = self.store._cache.directory  # type: ignore[attr-defined]
        self._random, self._new = Random(0), count()

    def _read(self, keys: Sequence[str]) -> None:
        async def read() -> None:
            for begin in range(0, len(keys), AT_ONCE):
                await asyncio.gather(*(self.store.get(key, _PROTOTYPE) for key in keys[begin : begin + AT_ONCE]))

        sync(read())
        self.directory.write_behind.wait()

    def miss(self, number: int = CALLS) -> None:
        """Read what is not here, and wait until it is stored."""
        self._read([f"data/c/{next(self._new)}" for _ in range(number)])

    def put(self, number: int = CALLS) -> None:
        """Store one after another, without a source."""
        for _ in range(number):
            self.plain.set_sync(f"{NAMESPACE}/data/c/{next(self._new)}", _VALUE)

    def hit(self) -> None:
        self._read(self.chosen)

    def mix(self) -> None:
        """A miss for every few hits."""
        self.hit()
        self.miss(len(self.chosen) // HITS_OF_A_MISS)

    def choose(self) -> None:
        """Some of those that are here, for the next hits."""
        with self.directory.session.section() as (_, index):
            here = [row.entry.key for row in index.rows()]
        keys = [key.removeprefix(f"{NAMESPACE}/") for key in here if key.startswith(f"{NAMESPACE}/")]
        self.chosen = self._random.sample(keys, CALLS)

    def fill(self, entries: int) -> None:
        for _ in track(range(0, entries, CALLS), self.directory.recency.policy.name):
            self.miss()
        with self.directory.session.section() as (_, index):
            index.connection.execute(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
                "INSERT OR IGNORE INTO ghost SELECT random() >> 1 & (1 << 62) - 1, i % ?, 0 FROM n",
                (GHOSTS * entries if self.directory.recency.policy.name == "adaptive" else 0, entries),
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--entries", type=int, default=ENTRIES)
    parser.add_argument("--budget", type=float, default=30, help="seconds for each comparison")
    options = parser.parse_args()
    with Report("eviction", options.out) as report, tempfile.TemporaryDirectory() as scratch:
        caches: dict[str, Cache] = {
            policy: Cache(Path(scratch) / policy, policy, options.entries) for policy in POLICIES
        }
        by_hand = ByHand(Path(scratch) / "by hand", options.entries)
        for cache in caches.values():
            cache.fill(options.entries * 5 // 4)
        rows = []
        for act, calls in {"miss": CALLS, "put": CALLS, "hit": CALLS, "mix": CALLS * 4 // 3}.items():
            contestants = {policy: partial(getattr(cache, act)) for policy, cache in caches.items()}
            if act == "put":
                contestants["by hand"] = partial(by_hand.put)
            taken = alternate(
                contestants,
                calls=calls,
                least=9,
                most=60,
                budget=options.budget,
                before=lambda n: caches[n].choose() if n in caches else None,
            )
            lru, adaptive = (taken[policy] for policy in POLICIES)
            times = [f"{taken[name].median * 1e6:.0f}" if name in taken else "-" for name in (*POLICIES, "by hand")]
            rows.append((act, *times, str(adaptive.over(lru))))
        columns = ["microseconds each", *POLICIES, "by hand", "adaptive / lru"]
        report.table(f"{options.entries} entries of {BYTES} bytes", columns, rows)


if __name__ == "__main__":
    main()
