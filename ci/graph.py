"""What a Dask graph of 10,000 chunks costs through the cache, beside the same one without: bytes, and time to schedule.

Run it in an environment that has the package: ``python ci/graph.py``. Times are medians of turns that alternate,
because a machine is never the same for long.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import dask.base
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from distributed.protocol.serialize import serialize_bytelist

import xzcache

CHUNKS, TURNS = 10_000, 16


def ways(place: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Make an array without the cache, and with it."""

    def bare(cached: bool) -> Any:
        source = zarr.storage.LocalStore(place, read_only=True)
        store = xzcache.CacheStore(source) if cached else source
        return dask.array.from_zarr(zarr.open_group(store, mode="r")["t"])  # type: ignore[no-untyped-call]

    def opened(engine: str) -> Any:
        return xr.open_dataset(place, engine=engine, chunks={}, consolidated=False)["t"].data

    return {
        "xarray": (lambda: opened("zarr"), lambda: opened("zcache")),
        "dask.array.from_zarr": (lambda: bare(False), lambda: bare(True)),
    }


def size(array: Any) -> int:
    """Bytes of an optimized graph as it is sent to a scheduler."""
    (optimized,) = dask.base.optimize(array)  # type: ignore[no-untyped-call]
    return sum(map(len, serialize_bytelist(optimized.__dask_graph__(), on_error="raise")))


def seconds_to_schedule(client: Client, scheduler: Any, array: Any) -> float:
    """From handing a graph in until the scheduler knows all of its tasks; there are no workers."""
    began = time.perf_counter()
    future = client.compute(array)  # type: ignore[no-untyped-call]
    while len(scheduler.tasks) < CHUNKS:
        time.sleep(0.001)
    seconds = time.perf_counter() - began
    del future
    while scheduler.tasks:
        time.sleep(0.001)
    return seconds


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="xzcache-graph-") as name,
        xzcache.config.set(directory=f"{name}/cache", min_free=0),
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as cluster,  # type: ignore[no-untyped-call]
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        place = str(Path(name) / "x.zarr")
        zarr.create_group(place).create_array("t", shape=(CHUNKS,), chunks=(1,), dtype="f8", dimension_names=["x"])
        for what, (without, through) in ways(place).items():
            sizes = [size(make().mean()) for make in (without, through)]
            print(f"{what}: {sizes[0]:,} B without the cache, {sizes[1] - sizes[0]:+,} B through it")
            # the one without comes twice: what it differs from itself by is what cannot be measured here
            makers = {"without": without, "without, again": without, "through it": through}
            seconds: dict[str, list[float]] = {how: [] for how in makers}
            for turn in range(TURNS):
                # whoever comes first in a turn comes last in the next
                for place_in_turn, how in enumerate(sorted(makers, reverse=bool(turn % 2))):
                    # another constant: what the scheduler knows already it need not schedule
                    array = makers[how]() + (len(makers) * turn + place_in_turn)
                    gc.collect()
                    seconds[how].append(seconds_to_schedule(client, cluster.scheduler, array.sum()))
            for how, times in seconds.items():
                low, median, high = min(times), statistics.median(times), max(times)
                ratios = statistics.quantiles(time / base for time, base in zip(times, seconds["without"], strict=True))
                print(f"    scheduled {how} in {median:.2f} s ({low:.2f} to {high:.2f}), {_range(ratios)} of without")


def _range(quartiles: list[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
