"""Train on random crops of an array in S3: several epochs, several worker processes, one cache.

The workers are started as PyTorch's ``DataLoader`` does it, by fork and by spawn; each opens the array itself and reads
its share of the crops. The cache holds a sixth of the array, and each policy is tried in a cache of its own.
Everything is made here and thrown away at the end. Run it with ``python examples/training.py``.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr
from _s3 import S3Server, s3_server
from rich.console import Console
from rich.table import Table

import xzcache

EPOCHS, CROPS, WORKERS = 4, 48, 2
SHAPE, CHUNK, CROP = (40, 256, 256), (1, 64, 64), (1, 64, 64)

Policy = Literal["adaptive", "lru", "none"]
Results: TypeAlias = "multiprocessing.Queue[tuple[int, float, int, int]]"
"""For each epoch and worker: the epoch, the sum of the crops, hits and misses."""


class Crops:
    """A dataset of random crops, as one writes it for PyTorch. It is pickled for a worker that is spawned."""

    def __init__(self, options: dict[str, Any], cache: Path, max_size: int, policy: Policy) -> None:
        self.store = xzcache.CacheStore(
            "s3://images/scans.zarr",
            storage_options=options,
            cache_store=cache,
            max_size=max_size,
            policy=policy,
            read_only=True,
            # obstore cannot be used in a process that was forked after obstore was used; fsspec can
            upstream="fsspec",
        )
        self.array: zarr.Array[Any] | None = None  # each worker opens it for itself

    def __len__(self) -> int:
        return CROPS

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        if self.array is None:
            self.array = zarr.open_array(self.store, mode="r")
        # the crop of an index is the same in each epoch; the order is not
        corner = [
            int(place) for place in np.random.default_rng(index).integers(0, np.subtract(SHAPE, CROP), endpoint=True)
        ]
        crop = self.array[tuple(slice(start, start + size) for start, size in zip(corner, CROP, strict=True))]
        return np.asarray(crop, "f4")


def work(dataset: Crops, share: int, results: Results, start: Barrier) -> None:
    """Read a share of each epoch; what a worker of a loader with ``persistent_workers=True`` does."""
    hits = misses = 0
    for epoch in range(EPOCHS):
        start.wait(60)
        order = np.random.default_rng(epoch).permutation(len(dataset)).tolist()
        total = sum(float(dataset[index].sum()) for index in order[share::WORKERS])
        stats = dataset.store.cache_stats()
        results.put((epoch, total, stats["hits"] - hits, stats["misses"] - misses))
        hits, misses = stats["hits"], stats["misses"]


def train(dataset: Crops, context: ForkContext | SpawnContext) -> tuple[list[float], list[float]]:
    """Run all epochs: their sums, and their hit ratios."""
    results: Results = context.Queue()
    start = context.Barrier(WORKERS)
    workers = [context.Process(target=work, args=(dataset, share, results, start)) for share in range(WORKERS)]
    for worker in workers:
        worker.start()
    done = sorted(results.get(timeout=60) for _ in range(EPOCHS * WORKERS))
    for worker in workers:
        worker.join()
    sums, ratios = [], []
    for _, group in itertools.groupby(done, key=lambda row: row[0]):
        totals, hits, misses = (sum(column) for column in list(zip(*group, strict=True))[1:])
        sums.append(totals)
        ratios.append(hits / (hits + misses))
    return sums, ratios


def write_array(s3: S3Server) -> int:
    """Write noise that does not compress to the bucket; the bytes of its chunks."""
    array = zarr.create_array(
        s3.store("images", "scans.zarr"), shape=SHAPE, chunks=CHUNK, dtype="f4", compressors=None, fill_value=0
    )
    array[:] = np.random.default_rng(0).random(SHAPE, "f4")
    return int(np.prod(SHAPE)) * 4


def main() -> None:
    table = Table("workers", "policy", *map(str, range(1, EPOCHS + 1)), title="Hit ratio of each epoch")
    sums: set[float] = set()
    with tempfile.TemporaryDirectory(prefix="xzcache-training-") as name:
        folder = Path(name)
        (folder / "buckets" / "images").mkdir(parents=True)
        with s3_server(folder / "buckets", latency=0.001) as s3:
            size = write_array(s3)
            options = {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint}
            kinds: list[tuple[Literal["fork", "spawn"], Policy]] = [
                ("fork", "lru"), ("fork", "adaptive"), ("fork", "none"), ("spawn", "adaptive"),
            ]  # fmt: skip
            for start, policy in kinds:
                dataset = Crops(options, folder / f"{start}-{policy}", size // 6, policy)
                fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
                totals, ratios = train(dataset, fork if start == "fork" else spawn)
                sums |= {round(total, 1) for total in totals}
                table.add_row(start, policy, *(f"{ratio:.2f}" for ratio in ratios))
                used = xzcache.info(folder / f"{start}-{policy}").used
                assert used <= size // 6, (used, size)
    assert len(sums) == 1, "each epoch reads the same crops, in another order"
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
