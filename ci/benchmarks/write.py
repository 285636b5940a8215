"""Writing through the cache, against writing to the source alone: an array, its regions by several processes, deleting.

Every contestant writes the same chunks to a source of its own. With `cache_set_data`, which is the default, the cache
stores what was written as well.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from _contestants import SIZES, field
from _measure import alternate
from _report import Report, arguments
from zarr.abc.store import Store
from zarr.core.buffer import cpu
from zarr.core.sync import sync
from zarr.storage import LocalStore

import xzcache

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from _s3 import S3Server, s3_server

CHUNKS, FULL = 400, 2000
CHUNK = SIZES["64 KiB"]
PROCESSES = 4
ALONE, THROUGH, UNSTORED = "the source alone", "xzcache", "xzcache, cache_set_data=False"


def through(source: Store, root: Path) -> dict[str, Store]:
    """The ways to write to a source."""
    return {
        ALONE: source,
        THROUGH: xzcache.CacheStore(source, cache_store=root / "cache"),
        UNSTORED: xzcache.CacheStore(source, cache_store=root / "unstored", cache_set_data=False),
    }


def dataset(chunks: int) -> xr.Dataset:
    return xr.Dataset({"field": (("y", "x"), field(chunks, CHUNK))})


def write(data: xr.Dataset, store: Store) -> None:
    """The whole of a dataset, a row a chunk, as a user does."""
    encoding = {"field": {"chunks": (1, data.sizes["x"]), "compressors": None}}
    data.to_zarr(store, mode="w", consolidated=False, encoding=encoding)


def write_regions(data: xr.Dataset, store: Store) -> None:
    """One process for each part of the rows; the array is there."""
    parts = np.array_split(np.arange(data.sizes["y"]), PROCESSES)
    spawning = multiprocessing.get_context("spawn")
    processes = [
        spawning.Process(target=write_region, args=(data.isel(y=slice(int(p[0]), int(p[-1]) + 1)), store, int(p[0])))
        for p in parts
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def write_region(part: xr.Dataset, store: Store, begin: int) -> None:
    part.to_zarr(store, region={"y": slice(begin, begin + part.sizes["y"]), "x": slice(None)}, consolidated=False)


def delete(keys: list[str], store: Store) -> None:
    async def each() -> None:
        for key in keys:
            await store.delete(key)

    sync(each())


def put(keys: list[str], store: Store) -> None:
    value = cpu.Buffer.from_bytes(os.urandom(CHUNK))

    async def each() -> None:
        for key in keys:
            await store.set(key, value)

    sync(each())


class Contest:
    """Sources of one kind, one for each contestant, and what is written to them."""

    def __init__(self, chunks: int, make: Callable[[str], Store], root: Path) -> None:
        self.data = dataset(chunks)
        self.keys = [f"raw/c/{number}" for number in range(min(chunks, 200))]
        self.stores = {
            name: through(make(str(n)), root / str(n))[name] for n, name in enumerate((ALONE, THROUGH, UNSTORED))
        }
        for store in self.stores.values():
            write(self.data, store)

    def before(self, act: Callable[[Store], object]) -> Callable[[str], object]:
        """For the contestant of a name."""
        return lambda name: act(self.stores[name])

    def check(self) -> None:
        """What was written is there, by way of the cache and past it."""
        for store in self.stores.values():
            source = store._store if isinstance(store, xzcache.CacheStore) else store
            for one in (store, source):
                array: Any = zarr.open_array(one, path="field", mode="r")
                np.testing.assert_array_equal(array[:], self.data["field"].values)

    def works(self) -> dict[str, tuple[Callable[[Store], object], int, Callable[[Store], object] | None]]:
        """Each kind of work, the chunks of it, and what has to be done before."""
        rows = self.data.sizes["y"]
        return {
            "to_zarr": (partial(write, self.data), rows, None),
            f"regions, {PROCESSES} processes": (partial(write_regions, self.data), rows, None),
            "set, one after the other": (partial(put, self.keys), len(self.keys), None),
            "delete, one after the other": (partial(delete, self.keys), len(self.keys), partial(put, self.keys)),
        }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=12, help="seconds for each comparison, if that is enough")
    options = parser.parse_args()
    chunks = FULL if options.full else CHUNKS
    rows: list[tuple[str, ...]] = []
    with Report("write", options.out) as report, tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        (Path(scratch) / "buckets" / "bucket").mkdir(parents=True)
        server: S3Server = stack.enter_context(s3_server(os.fspath(Path(scratch) / "buckets")))
        sources: dict[str, Callable[[str], Store]] = {
            "local": lambda name: LocalStore(Path(scratch) / "sources" / name),
            "S3": lambda name: server.store("bucket", name),
        }
        for kind, make in sources.items():
            contest = Contest(chunks, make, Path(scratch) / kind)
            for label, (work, calls, before) in contest.works().items():
                taken = alternate(
                    {name: partial(work, store) for name, store in contest.stores.items()},
                    calls=calls,
                    budget=options.budget,
                    before=None if before is None else contest.before(before),
                )
                for name, samples in taken.items():
                    ratio = samples.over(taken[ALONE])
                    spread = f"{ratio.low:.2f} to {ratio.high:.2f}"
                    rows.append((f"{kind}, {label}: {name}", f"{samples.median * 1e6:.0f}", str(ratio), spread))
            contest.check()
        columns = ["source, work: through", "microseconds a chunk", f"over {ALONE}", "quartiles of the rounds"]
        report.table(f"{chunks} chunks of 64 KiB", columns, rows)


if __name__ == "__main__":
    main()
