"""See what xzcache saves: two statistics of a dataset in S3, computed on a Dask cluster, with and without it.

Everything is made here and thrown away at the end: a real S3 server, some 200 MB of weather in it, the cluster and
the cache. Run it with ``python examples/quickstart.py``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr
from _s3 import Counts, S3Server, s3_server
from distributed import Client, LocalCluster
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from zarr.abc.store import Store

import xzcache

# --------------------------------------------------------------------------------------------------------------
# What you would write yourself. The cache is one line; no other line knows of it.


def open_dataset(remote: Store, cache: Path | None) -> xr.Dataset:
    """Open the dataset, through a cache on this machine's disk if there is to be one."""
    if cache is not None:
        remote = xzcache.CacheStore(remote, cache_store=cache, max_size="2 GB")
    return xr.open_zarr(remote, consolidated=False, chunks={})


def mean_daily_range(ds: xr.Dataset) -> xr.Dataset:
    """Map how far apart the highest and the lowest value of a day are, in the mean of all days."""
    days = ds.coarsen(time=24)
    return (days.max() - days.min()).mean("time")


def spread_of_daily_maxima(ds: xr.Dataset) -> xr.Dataset:
    """Measure how much the daily maximum varies from day to day, in latitude bands of 30 degrees."""
    return ds.coarsen(time=24).max().std("time").coarsen(lat=30).mean().mean("lon")


# --------------------------------------------------------------------------------------------------------------
# The rest sets the scene and reports.

STATISTICS = {"mean daily range": mean_daily_range, "spread of daily maxima": spread_of_daily_maxima}
BUCKET, DATASET, WARM_UP = "climate", "surface.zarr", "warm-up.zarr"
MEGABYTES_PER_DAY = 8.3  # as stored, compressed

Array = npt.NDArray[np.float32]
Field = Callable[[Array, Array, Array, Array], Array]


def temperature(hour: Array, lat: Array, lon: Array, noise: Array) -> Array:
    """Warm at the equator and in the afternoon, with a wave that travels east; kelvin, to 1/1024."""
    day = np.cos(2 * np.pi * (hour / 24 + lon / 360 - 0.6))
    wave = np.sin(np.radians(4 * lon - 3 * hour)) * np.cos(np.radians(lat))
    return np.round((255 + 45 * np.cos(np.radians(lat)) + 5 * day + 4 * wave + 0.7 * noise) * 1024) / 1024


def precipitation(hour: Array, lat: Array, lon: Array, noise: Array) -> Array:
    """Rain where the wave and the noise are high together, most of it in the tropics; millimetres."""
    wave = np.sin(np.radians(4 * lon - 3 * hour + 60)) * np.cos(np.radians(lat))
    return np.maximum(0, 1.5 * wave + 0.5 * noise + 0.5)


def make_dataset(days: int) -> xr.Dataset:
    """Build hourly weather on a 1 degree grid, lazily: each chunk is a day and a quarter of the globe."""
    lat, lon = (np.arange(start, stop, dtype=np.float32) + 0.5 for start, stop in ((-90, 90), (0, 360)))

    def chunk(field: Field, seed: int, block_id: tuple[int, int, int]) -> Array:
        day, north, east = block_id
        hour = np.arange(24 * day, 24 * (day + 1), dtype=np.float32)
        noise = np.random.default_rng([seed, *block_id]).standard_normal((24, 90, 180), dtype=np.float32)
        axes = hour[:, None, None], lat[90 * north :][:90, None], lon[180 * east :][:180]
        return field(*axes, noise).astype(np.float32)

    def variable(
        field: Field, seed: int, units: str, standard_name: str, long_name: str
    ) -> tuple[tuple[str, ...], da.Array, dict[str, str]]:
        data = da.map_blocks(
            partial(chunk, field, seed), chunks=((24,) * days, (90, 90), (180, 180)), dtype=np.float32
        )
        attributes = {"units": units, "standard_name": standard_name, "long_name": long_name}
        return ("time", "lat", "lon"), data, attributes

    time = np.datetime64("2026-01-01", "ns") + np.arange(24 * days) * np.timedelta64(1, "h")
    return xr.Dataset(
        {
            "t2m": variable(temperature, 1, "K", "air_temperature", "Temperature at 2 metres"),
            "tp": variable(precipitation, 2, "kg m-2", "precipitation_amount", "Precipitation of the hour"),
        },
        coords={
            "time": ("time", time, {"standard_name": "time"}),
            "lat": ("lat", lat, {"units": "degrees_north", "standard_name": "latitude"}),
            "lon": ("lon", lon, {"units": "degrees_east", "standard_name": "longitude"}),
        },
        attrs={"Conventions": "CF-1.11", "title": "Synthetic surface weather"},
    )


@contextmanager
def dask_cluster(workers: int, scratch: Path, s3: S3Server) -> Iterator[Client]:
    """Start worker processes, and have them load all that they will need before the first clock starts."""
    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=str(scratch),
        ) as cluster,
        Client(cluster) as client,  # type: ignore[no-untyped-call]
    ):
        ds = open_dataset(s3.store(BUCKET, WARM_UP, read_only=True), cache=None)
        for statistic in STATISTICS.values():
            statistic(ds).compute()
        yield client


@dataclass(frozen=True)
class Step:
    """What the S3 server saw of one step, and how long it took."""

    name: str
    counts: Counts
    seconds: float


@dataclass(frozen=True)
class Session:
    """The dataset opened and both statistics computed."""

    name: str
    steps: list[Step]
    results: list[xr.Dataset]

    @property
    def total(self) -> Step:
        tallies = tuple(tally for step in self.steps for tally in step.counts.tallies)
        return Step(self.name, Counts(tallies), sum(step.seconds for step in self.steps))


class FromS3(ProgressColumn):
    """What the S3 server has sent since the step began."""

    max_refresh = 0.2

    def __init__(self, s3: S3Server) -> None:
        super().__init__()
        self._s3 = s3

    def render(self, task: Task) -> Text:
        return Text(describe(self._s3.counts()), style="cyan")


def describe(counts: Counts) -> str:
    return f"{counts.objects:4} objects, {counts.bytes / 1e6:5.1f} MB from S3"


def run_session(name: str, s3: S3Server, cache: Path | None, progress: Progress) -> Session:
    """Do what somebody at a notebook does, and take notes."""
    steps: list[Step] = []

    def measure(step: str, function: Callable[[], xr.Dataset]) -> xr.Dataset:
        s3.reset()
        task = progress.add_task(f"{name}: {step}", total=None)
        started = time.perf_counter()
        result = function()
        steps.append(Step(step, s3.counts(), time.perf_counter() - started))
        progress.remove_task(task)
        report = f"{describe(steps[-1].counts)} in {steps[-1].seconds:4.1f} s"
        progress.console.print(f"{name + ': ' + step:<46}{report}")
        return result

    remote = s3.store(BUCKET, DATASET, read_only=True)
    ds = measure("open", lambda: open_dataset(remote, cache))
    results = [measure(step, lambda f=f: f(ds).compute()) for step, f in STATISTICS.items()]
    return Session(name, steps, results)


def check_equal(sessions: list[Session]) -> None:
    """Compare the results of every session with those of the first, bit for bit."""
    first, *others = sessions
    for session in others:
        for expected, result in zip(first.results, session.results, strict=True):
            for name in expected.variables:
                np.testing.assert_array_equal(result[name], expected[name])


def tabulate(sessions: list[Session], latency: float) -> Table:
    table = Table(
        title="What each session asked of S3",
        caption="Counted at the S3 server, metadata included. Hit rate: of the objects that the same step needs "
        f"without the cache, those not asked of S3. Every request waits {1000 * latency:.0f} ms, as if S3 were "
        "far away.",
        caption_justify="left",
    )
    table.add_column("session")
    for column in ("objects", "MB", "seconds", "hit rate"):
        table.add_column(column, justify="right")
    needed = [sessions[0].total, *sessions[0].steps]
    for session in sessions:
        table.add_section()
        for step, base in zip([session.total, *session.steps], needed, strict=True):
            table.add_row(
                session.name if step.name == session.name else f"  {step.name}",
                str(step.counts.objects),
                f"{step.counts.bytes / 1e6:.1f}",
                f"{step.seconds:.1f}",
                f"{1 - step.counts.objects / base.counts.objects:.0%}" if session is not sessions[0] else "",
                style="bold" if step.name == session.name else "",
            )
    return table


def conclude(sessions: list[Session], workers: int) -> str:
    """Say in a sentence what the table shows."""
    without, cold, warm, later = (session.total for session in sessions)
    chunks = cold.counts.only("GET", "*/c/*")
    return (
        f"Without the cache, two statistics took {without.counts.objects} objects "
        f"({without.counts.bytes / 1e6:.0f} MB) from S3. With it, the {workers} workers together asked for each "
        f"chunk {chunks.objects / chunks.distinct_objects:.2f} times ({cold.counts.bytes / 1e6:.0f} MB); "
        f"the same again took {warm.counts.bytes / 1e6:.2f} MB and {warm.seconds:.1f} s instead of "
        f"{without.seconds:.1f} s, and so it did in new processes "
        f"({later.counts.bytes / 1e6:.2f} MB, {later.seconds:.1f} s)."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=20, help="wait of every request to S3 (default: 20)")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the dataset in S3 (default: 200)")
    parser.add_argument("--workers", type=int, default=4, help="Dask worker processes (default: 4)")
    parser.add_argument("--keep", action="store_true", help="leave the bucket and the cache behind")
    return parser.parse_args()


def demonstrate(arguments: argparse.Namespace, folder: Path, console: Console) -> None:
    latency, workers = arguments.latency_ms / 1000, arguments.workers
    days = max(1, round(arguments.megabytes / MEGABYTES_PER_DAY))
    buckets, cache, scratch = folder / "s3", folder / "cache", folder / "dask"
    buckets.mkdir()

    started = time.perf_counter()
    for name, length in ((WARM_UP, 4), (DATASET, days)):
        make_dataset(length).to_zarr(buckets / BUCKET / name, zarr_format=3, consolidated=False)
    sizes = [file.stat().st_size for file in (buckets / BUCKET / DATASET).rglob("*") if file.is_file()]
    console.print(
        f"Wrote {days} days of hourly weather into the bucket's directory: {len(sizes)} objects, "
        f"{sum(sizes) / 1e6:.0f} MB, {time.perf_counter() - started:.1f} s."
    )
    with s3_server(buckets, latency=latency) as s3:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), FromS3(s3), TimeElapsedColumn())
        # A log has no use for a bar that moves: there, the line printed at the end of each step is all.
        with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
            with dask_cluster(workers, scratch, s3):
                sessions = [
                    run_session("no cache", s3, None, progress),
                    run_session("xzcache, cold", s3, cache, progress),
                    run_session("xzcache, warm", s3, cache, progress),
                ]
            console.print("A new cluster, as if tomorrow: nothing is left of the old one but the cache on disk.")
            with dask_cluster(workers, scratch, s3):
                sessions.append(run_session("xzcache, next day", s3, cache, progress))
    check_equal(sessions)
    console.print("The results of all four sessions are equal, bit for bit.\n")
    console.print(tabulate(sessions, latency))
    console.print(conclude(sessions, workers))


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="xzcache-quickstart-"))
    try:
        demonstrate(arguments, folder, console)
    finally:
        if arguments.keep:
            console.print(f"Kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
