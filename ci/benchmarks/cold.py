"""Reading an array for the first time, from a real S3 server that lets every request wait: what a cache adds to it.

The server and its delay are processes of their own. Of a sharded array every second chunk is read, so that shards are
read in parts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from _by_hand import Files, Keeping
from _contestants import SIZES, Kind, make, outside
from _measure import Samples, alternate
from _report import Report, arguments
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

import xzcache

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from _s3 import S3Server, s3_server

CHUNKS = 128
KIND = Kind("64 KiB", "zstd")
STRAIGHT, S3FS, FLOOR, OURS = "obstore", "s3fs", "a cache by hand over obstore", "xzcache over obstore"


class Case(NamedTuple):
    milliseconds: int
    concurrency: int
    sharded: bool
    outside: bool = False

    def __str__(self) -> str:
        sharded = ", parts of shards" if self.sharded else ""
        return f"{self.milliseconds} ms, {self.concurrency} at once{sharded}"

    @property
    def prefix(self) -> str:
        return "outside" if self.outside else "sharded" if self.sharded else "plain"


FULL = [Case(ms, n, sharded) for ms in (0, 20, 100) for n in (10, 32) for sharded in (False, True)]
DEFAULT = [Case(0, 10, False), Case(20, 10, False), Case(20, 10, True), Case(20, 32, False), Case(100, 10, False)]
DEFAULT += [Case(100, 32, False)]


def through_s3fs(server: S3Server, prefix: str) -> Store:
    options = {
        "key": server.access_key,
        "secret": server.secret_key,
        "client_kwargs": {"endpoint_url": server.endpoint, "region_name": "us-east-1"},
    }
    return FsspecStore.from_url(f"s3://bucket/{prefix}", storage_options=options, read_only=True)


class Expected(NamedTuple):
    """The columns of each array that are read, by the path of the array."""

    arrays: dict[str, Any]

    def check(self, store: Store, *, whole: bool) -> None:
        """Read the arrays; compare all that was read, or only the last value."""
        for path, right in self.arrays.items():
            array: Any = zarr.open_array(store, path=path, mode="r")
            data = array[:, : right.shape[1]] if right.ndim > 1 else array[...]
            if whole:
                np.testing.assert_array_equal(data, right)
            else:
                np.testing.assert_equal(data[(-1,) * right.ndim], right[(-1,) * right.ndim])


def prepare(buckets: Path) -> dict[str, Expected]:
    """Write both arrays where the server finds them, and say what a read of them gives."""
    plain = make(LocalStore(buckets / "bucket" / "plain"), KIND, CHUNKS)
    # a shard is a row of four chunks
    width = SIZES[KIND.chunk] // 4
    parts = {"chunks": (1, width // 4), "shards": (1, width)}
    sharded = make(LocalStore(buckets / "bucket" / "sharded"), KIND, CHUNKS, **parts)
    return {"plain": Expected({"": plain}), "sharded": Expected({"": sharded[:, : width // 2]})}


def prepare_outside(buckets: Path, path: Path) -> dict[str, Expected]:
    """Copy the user's data to where the server finds it."""
    found = outside(path)
    shutil.copytree(path, buckets / "bucket" / "outside")
    arrays = found.read(found.open(LocalStore(path, read_only=True)))
    return {"outside": Expected(dict(zip(found.arrays, arrays, strict=True)))}


class Cold:
    """Ways to read one array; each turn has a cache of its own.

    A file system may take long to create files where others were deleted a moment ago.
    """

    def __init__(self, server: S3Server, case: Case, expected: Expected, cache: Path) -> None:
        self.case, self.expected = case, expected
        straight = server.store("bucket", case.prefix, read_only=True)
        self.stores: dict[str, Store] = {STRAIGHT: straight, S3FS: through_s3fs(server, case.prefix)}
        self._caches = (cache / str(number) for number in itertools.count())
        # by hand, no parts of objects are kept
        for name in (OURS,) if case.sharded else (FLOOR, OURS):
            self.forget(name)

    def forget(self, name: str) -> None:
        """A store over a cache that is empty, and in use."""
        if name == FLOOR:
            self.stores[FLOOR] = Keeping(self.stores[STRAIGHT], Files(Path(next(self._caches))))
        elif name == OURS:
            self.ours = xzcache.CacheStore(self.stores[STRAIGHT], cache_store=next(self._caches))
            sync(self.ours.clear_cache())

    def read(self, name: str) -> None:
        self.expected.check(self.ours if name == OURS else self.stores[name], whole=False)

    def measure(self, budget: float) -> dict[str, Samples]:
        contestants = {name: partial(self.read, name) for name in (*self.stores, OURS)}
        with zarr.config.set({"async.concurrency": self.case.concurrency}):
            return alternate(contestants, budget=budget, least=5, most=40, before=self.forget)

    def check(self) -> None:
        """What was cached is right, and all of it."""
        source_requests = self.ours.cache_stats()["misses"]
        self.expected.check(self.ours, whole=True)
        assert self.ours.cache_stats()["misses"] == source_requests


def main() -> None:
    parser = arguments(__doc__, can_be_outside=True)
    parser.add_argument("--budget", type=float, default=12, help="seconds for each comparison, if that is enough")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    groups: dict[str, dict[str, float]] = {}
    with Report("cold", options.out) as report, tempfile.TemporaryDirectory() as scratch:
        buckets = Path(scratch) / "buckets"
        cases = FULL if options.full else DEFAULT
        if options.outside:
            expected = prepare_outside(buckets, options.outside)
            cases = [case._replace(outside=True) for case in cases if not case.sharded]
        else:
            expected = prepare(buckets)
        for case in cases:
            cache = Path(scratch) / f"cache-{len(rows)}"
            with s3_server(os.fspath(buckets), latency=case.milliseconds / 1e3) as server:
                cold = Cold(server, case, expected[case.prefix], cache)
                taken = cold.measure(options.budget)
                cold.check()
            for name, samples in taken.items():
                spread = " to ".join(f"{quartile * 1e3:.0f}" for quartile in samples.quartiles)
                ratio = samples.over(taken[STRAIGHT])
                rounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
                rows.append((f"{case}: {name}", f"{samples.median * 1e3:.0f}", spread, str(ratio), rounds))
            groups[str(case)] = {name: samples.median * 1e3 for name, samples in taken.items()}
        columns = ["latency, requests: through", "ms", "quartiles", f"over {STRAIGHT}", "quartiles of the rounds"]
        title = options.outside.name if options.outside else f"{CHUNKS} chunks of {KIND}"
        report.table(f"{title}, read for the first time", columns, rows)
        report.bars("latency", f"{title}, read for the first time", groups, "milliseconds")


if __name__ == "__main__":
    main()
