"""A job that appends each day, and readers that see it.

The job is a process of its own, started each day as cron or a workflow does it; it writes to S3 through the cache of
its machine, on which another process reads. Everything is made here and thrown away at the end. Run it with ``python
examples/append_job.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.errors import ZarrUserWarning

import xzcache

URL = "s3://station/daily.zarr"
STEPS = 24  # in a day


def one_day(day: int) -> xr.Dataset:
    """Hourly values of a day."""
    hours = np.datetime64("2026-01-01", "ns") + (STEPS * day + np.arange(STEPS)) * np.timedelta64(1, "h")
    return xr.Dataset({"t2m": (("time", "y", "x"), np.full((STEPS, 60, 60), day, "f4"))}, {"time": hours})


def job(day: int, options: dict[str, Any]) -> None:
    """Append a day. The first one creates the dataset, whose chunks hold two days."""
    store = xzcache.CacheStore(URL, storage_options=options)
    warnings.simplefilter("ignore", ZarrUserWarning)
    if day == 0:
        encoding = {
            "t2m": {"chunks": (2 * STEPS, 60, 60)},
            "time": {"units": "hours since 2026-01-01", "chunks": (480,)},
        }
        one_day(day).to_zarr(store, zarr_format=3, encoding=encoding)
    else:
        one_day(day).to_zarr(store, append_dim="time")


def main() -> None:
    from _s3 import s3_server

    with tempfile.TemporaryDirectory(prefix="xzcache-append-") as name:
        folder = Path(name)
        (folder / "buckets" / "station").mkdir(parents=True)
        os.environ["XZCACHE_DIRECTORY"] = str(folder / "cache")
        with s3_server(folder / "buckets", latency=0.01) as s3:
            options = {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint}
            held = None
            for day in range(3):
                subprocess.run([sys.executable, __file__, str(day)], input=json.dumps(options), text=True, check=True)
                s3.reset()
                # opened again: the new day is there
                ds = xr.open_zarr(URL, engine="zcache", storage_options=options)
                means = ds["t2m"].isel(time=slice(None, None, STEPS)).mean(("y", "x")).compute()
                counts = s3.counts()
                chunks = counts.only("GET", "*/t2m/c/*").requests
                print(f"day {day}: {means.values}, {counts.requests} requests, {chunks} of them for chunks")
                np.testing.assert_array_equal(means, np.arange(day + 1))
                if held is None:
                    held = ds
            # a dataset that stays open keeps its length
            assert held is not None
            print(
                f"a dataset held open since the first day has {held.sizes['time']} steps, a new one {ds.sizes['time']}"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        job(int(sys.argv[1]), json.load(sys.stdin))
    else:
        main()
