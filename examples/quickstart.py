"""See what xzcache saves: two statistics of a dataset in S3, computed on a Dask cluster, with and without it.

Everything is made here and thrown away at the end: a real S3 server, some 200 MB of weather in it, the
cluster and the cache. Run it with ``python examples/quickstart.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from _s3 import Counts, S3Server, s3_server
from distributed import Client, LocalCluster
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from zarr.abc.store import Store

import xzcache

# ------------------------------------------------------------------------------------------------------------
# What you would write yourself. The cache is one line; no other line knows of it.


def open_dataset(remote: Store, cache: Path | None) -> xr.Dataset:
    """Open the dataset, through a cache on this machine's disk if there is to be one."""
    if cache is not None:
        remote = xzcache.CacheStore(remote, cache_store=cache, max_size="2 GB")
    ds: xr.Dataset = xr.open_zarr(remote, consolidated=False, chunks={})
    return ds


def mean_anomaly(ds: xr.Dataset) -> xr.Dataset:
    """Map how far the mean over time of each place is from that of the globe."""
    mean = ds.mean("time")
    return mean - mean.mean()


def spread_of_daily_maxima(ds: xr.Dataset) -> xr.Dataset:
    """Measure how much the daily maximum varies from day to day, in latitude bands of 30 degrees."""
    return ds.coarsen(time=24).max().std("time").coarsen(lat=30).mean().mean("lon")


# ------------------------------------------------------------------------------------------------------------
# The rest sets the scene and reports.

STATISTICS = {"mean anomaly": mean_anomaly, "spread of daily maxima": spread_of_daily_maxima}
BUCKET, DATASET, WARM_UP = "climate", "surface.zarr", "warm-up.zarr"
MEGABYTES_PER_DAY = 8.3  # as stored, compressed
BUSY_AT_START = os.getloadavg()[0]
"""Processes that ran, on average over the last minute, before this one."""

Array = npt.NDArray[np.float32]
Field = Callable[[Array, Array, Array, Array], Array]


def temperature(hour: Array, lat: Array, lon: Array, noise: Array) -> Array:
    """Warm at the equator and in the afternoon, with a wave that travels east; kelvin, to 1/1024."""
    day = np.cos(2 * np.pi * (hour / 24 + lon / 360 - 0.6))
    wave = np.sin(np.radians(4 * lon - 3 * hour)) * np.cos(np.radians(lat))
    kelvin = 255 + 45 * np.cos(np.radians(lat)) + 5 * day + 4 * wave + 0.7 * noise
    rounded: Array = np.rint(kelvin * 1024) / 1024
    return rounded


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
        data = da.map_blocks(  # type: ignore[no-untyped-call]  # Dask's arrays are not typed
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
def dask_cluster(workers: int, scratch: Path, s3: S3Server, progress: Progress) -> Iterator[None]:
    """Start worker processes, and have them load all that they will need before the first clock starts."""
    with dask.config.set({"temporary-directory": str(scratch)}), ExitStack() as stack:
        with shown(progress, "Starting a Dask cluster"):
            cluster = LocalCluster(  # type: ignore[no-untyped-call]  # nor is distributed
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                # on a busy machine a worker takes seconds to end, with a cache and without, and Dask warns of that
                silence_logs=logging.ERROR,
            )
            stack.enter_context(cluster)
            stack.enter_context(Client(cluster))  # type: ignore[no-untyped-call]  # nor is this
            ds = open_dataset(s3.store(BUCKET, WARM_UP, read_only=True), cache=None)
            for statistic in STATISTICS.values():
                statistic(ds).compute()
        yield


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
        """All steps as one, under the name of the session."""
        tallies = tuple(tally for step in self.steps for tally in step.counts.tallies)
        return Step(self.name, Counts(tallies), sum(step.seconds for step in self.steps))


class FromS3(ProgressColumn):
    """What the S3 server has sent since the step began."""

    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        s3: S3Server | None = task.fields["s3"]
        return Text(describe(s3.counts()) if s3 else "", style="cyan")


@contextmanager
def shown(progress: Progress, text: str, s3: S3Server | None = None) -> Iterator[None]:
    """Show that something is going on, for as long as it is."""
    task = progress.add_task(text, total=None, s3=s3)
    try:
        yield
    finally:
        progress.remove_task(task)


def describe(counts: Counts) -> str:
    return f"{counts.objects:4} objects {counts.bytes / 1e6:6.1f} MB"


def run_session(name: str, s3: S3Server, cache: Path | None, progress: Progress) -> Session:
    """Do what somebody at a notebook does, and take notes."""
    steps: list[Step] = []

    def measure(step: str, function: Callable[[], xr.Dataset]) -> xr.Dataset:
        label = f"{name:<18}{step:<23}"
        s3.reset()
        with shown(progress, label, s3):
            started = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - started
        steps.append(Step(step, s3.counts(), seconds))
        progress.console.print(f"{label}{describe(steps[-1].counts)} {seconds:6.1f} s")
        return result

    remote = s3.store(BUCKET, DATASET, read_only=True)
    ds = measure("open", partial(open_dataset, remote, cache))
    results = [measure(step, statistic(ds).compute) for step, statistic in STATISTICS.items()]
    return Session(name, steps, results)


def check_equal(sessions: list[Session]) -> None:
    """Compare the results of every session with those of the first, bit for bit."""
    first, *others = sessions
    for session in others:
        for expected, result in zip(first.results, session.results, strict=True):
            for name in expected.variables:
                np.testing.assert_array_equal(result[name], expected[name])


def tabulate(sessions: list[Session]) -> Table:
    table = Table(
        title="What each session took",
        caption="Objects and MB as counted by the S3 server. The hit rate is the share of the objects needed "
        "(those sent without the cache) that S3 did not send. At each open S3 is asked whether the metadata have "
        "changed; unchanged ones are not sent again.",
        caption_justify="left",
    )
    table.add_column("session")
    for column in ("objects from S3", "MB from S3", "seconds", "hit rate"):
        table.add_column(column, justify="right")
    needed = [sessions[0].total, *sessions[0].steps]
    for session in sessions:
        table.add_section()
        for step, base in zip([session.total, *session.steps], needed, strict=True):
            hit_rate = 1 - step.counts.objects / base.counts.objects
            table.add_row(
                session.name if step.name == session.name else f"  {step.name}",
                str(step.counts.objects),
                f"{step.counts.bytes / 1e6:.1f}",
                f"{step.seconds:.1f}",
                f"{hit_rate:.0%}" if session is not sessions[0] else "-",
                style="bold" if step.name == session.name else "",
            )
    return table


def conclude(sessions: list[Session], workers: int) -> str:
    """Say what the table shows, and whether its seconds can be trusted."""
    without, cold, warm, later = (session.total for session in sessions)
    chunks = cold.counts.only("GET", "*/c/*")
    moved = (
        f"With the cache, {workers} workers fetched each of {chunks.distinct_objects} chunks "
        f"{chunks.objects / chunks.distinct_objects:.2f} times ({cold.counts.bytes / 1e6:.0f} MB instead of "
        f"{without.counts.bytes / 1e6:.0f} MB). The same work again moved {warm.counts.bytes / 1e6:.2f} MB, "
        f"and in a new cluster {later.counts.bytes / 1e6:.2f} MB."
    )
    fast, fast_later = without.seconds / warm.seconds, without.seconds / later.seconds
    if trouble := noise(sessions):
        return f"{moved} The seconds say little: {trouble}. The counts do not depend on that."
    if min(fast, fast_later) < 1.1:
        return (
            f"{moved} It was not faster, because here computing takes longer than fetching: try --latency-ms 100, "
            "or a remote source."
        )
    return f"{moved} It ran {fast:.1f} and {fast_later:.1f} times as fast as without the cache."


def noise(sessions: list[Session]) -> str:
    """Why the seconds are not to be trusted; empty if nothing speaks against them."""
    warm, later = (session.total.seconds for session in sessions[2:])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores / 2 < BUSY_AT_START:
        return f"when this began, {BUSY_AT_START:.1f} other processes wanted the {cores} processors of this machine"
    if max(warm, later) > 1.6 * min(warm, later):
        return f"the same work took {warm:.1f} s once and {later:.1f} s another time"
    return ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=20, help="wait of every S3 request (default: 20)")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the dataset (default: 200)")
    parser.add_argument("--workers", type=int, default=4, help="Dask worker processes (default: 4)")
    parser.add_argument("--keep", action="store_true", help="leave the bucket and the cache behind")
    arguments = parser.parse_args()
    if not 0 <= arguments.latency_ms <= 10_000:
        parser.error("--latency-ms: 0 to 10000 is expected")
    if not 1 <= arguments.megabytes <= 1900:
        parser.error("--megabytes: 1 to 1900 is expected, what the cache of 2 GB can hold")
    if arguments.workers < 1:
        parser.error("--workers: 1 or more is expected")
    return arguments


def demonstrate(arguments: argparse.Namespace, folder: Path, progress: Progress) -> None:
    say, workers = progress.console.print, arguments.workers
    buckets, cache, scratch = folder / "s3", folder / "cache", folder / "dask"
    days = max(1, round(arguments.megabytes / MEGABYTES_PER_DAY))

    with shown(progress, "Writing the dataset into a bucket's directory"):
        for name, length in ((WARM_UP, 2), (DATASET, days)):
            make_dataset(length).to_zarr(buckets / BUCKET / name, zarr_format=3, consolidated=False)
    sizes = [file.stat().st_size for file in (buckets / BUCKET / DATASET).rglob("*") if file.is_file()]
    say(f"Dataset: {days} days of hourly weather in {len(sizes)} objects, {sum(sizes) / 1e6:.0f} MB.")

    with s3_server(buckets, latency=arguments.latency_ms / 1000) as s3:
        say(f"S3: rclone on this machine; a request waits {arguments.latency_ms:g} ms, as if it were remote.")
        say(f"Dask: {workers} worker processes.\n")
        with dask_cluster(workers, scratch, s3, progress):
            sessions = [
                run_session("no cache", s3, None, progress),
                run_session("xzcache, cold", s3, cache, progress),
                run_session("xzcache, warm", s3, cache, progress),
            ]
        # As if tomorrow: nothing is left of the first cluster but the cache on disk.
        with dask_cluster(workers, scratch, s3, progress):
            sessions.append(run_session("xzcache, next day", s3, cache, progress))

    check_equal(sessions)
    say("\nThe results of all four sessions are equal, bit for bit.\n")
    say(tabulate(sessions))
    say(conclude(sessions, workers))


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    console = Console(highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        FromS3(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(),
    )
    folder = Path(tempfile.mkdtemp(prefix="xzcache-quickstart-"))
    try:
        # In a log, which has no use for a line that moves, what is printed after each step is all.
        with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
            demonstrate(arguments, folder, progress)
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
