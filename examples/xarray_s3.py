"""Open remote Zarr with xarray through the cache, and count what the server is asked for.

A real S3 server is made on this machine and thrown away at the end; nothing else is needed. Run it with
``python examples/xarray_s3.py``.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from _s3 import S3Server, s3_server
from rich.console import Console
from rich.table import Table
from zarr.errors import ZarrUserWarning

import xzcache

URL = "s3://climate/2025.zarr"


def make_dataset(year: int) -> xr.Dataset:
    """Two variables of daily weather on a coarse globe."""
    noise = np.random.default_rng(year).normal(size=(2, 360, 73, 144)).astype("f4")
    coords = {
        "time": (np.datetime64(f"{year}-01-01") + np.arange(360)).astype("M8[ns]"),
        "lat": np.linspace(-90, 90, 73, dtype="f4"),
        "lon": np.arange(0, 360, 2.5, dtype="f4"),
    }
    dims = ("time", "lat", "lon")
    return xr.Dataset({"t2m": (dims, 280 + noise[0]), "tp": (dims, np.exp(noise[1]))}, coords)


def write(s3: S3Server, name: str, dataset: xr.Dataset, **how: Any) -> None:
    """Write a dataset to the bucket, with consolidated metadata, of which Zarr says that it is an extension."""
    warnings.simplefilter("ignore", ZarrUserWarning)
    dataset.chunk(time=30).to_zarr(s3.store("climate", name), zarr_format=3, consolidated=True, **how)


class Ledger:
    """What was done, and what it cost at the server."""

    def __init__(self) -> None:
        self.table = Table("step", "metadata", "chunks", "MB", "seconds", title="Asked of the server")
        for column in self.table.columns[1:]:
            column.justify = "right"

    def step(self, s3: S3Server, what: str, act: Callable[[], xr.Dataset]) -> xr.Dataset:
        s3.reset()
        started = time.perf_counter()
        result = act().load()
        seconds = time.perf_counter() - started
        counts = s3.counts()
        chunks = counts.only("GET", "*/c/*")
        figures = counts.requests - chunks.requests, chunks.requests, counts.bytes / 1e6
        self.table.add_row(what, str(figures[0]), str(figures[1]), f"{figures[2]:.1f}", f"{seconds:.2f}")
        return result


def main() -> None:
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="xzcache-xarray-") as folder:
        buckets = Path(folder, "buckets")
        (buckets / "climate").mkdir(parents=True)
        # yours need not be said: it is in the user's cache directory
        xzcache.config.set(directory=f"{folder}/cache")
        with s3_server(buckets, latency=0.02) as s3:
            write(s3, "2025.zarr", make_dataset(2025))
            write(s3, "2024.zarr", make_dataset(2024))
            # as s3fs has them; obstore's words serve as well
            options = {
                "key": s3.access_key,
                "secret": s3.secret_key,
                "client_kwargs": {"endpoint_url": s3.endpoint, "region_name": "us-east-1"},
            }

            def open_zarr(**settings: Any) -> xr.Dataset:
                # the engine comes with `import xzcache`; all other keywords are xarray's, and CacheStore's
                ds: xr.Dataset = xr.open_zarr(URL, engine="zcache", storage_options=options, **settings)
                return ds

            first = ledger.step(s3, "open and read", open_zarr)
            again = ledger.step(s3, "again", open_zarr)
            xr.testing.assert_identical(first, again)

            offline = ledger.step(s3, "again, revalidate=False", lambda: open_zarr(revalidate=False))
            xr.testing.assert_identical(first, offline)

            more = make_dataset(2026).isel(time=slice(0, 45))
            write(s3, "2025.zarr", more, append_dim="time")
            longer = ledger.step(s3, "after 45 days were appended", open_zarr)
            xr.testing.assert_identical(longer, xr.concat([first, more], "time"))

            other = ledger.step(
                s3,
                "open_dataset, one variable",
                lambda: xr.open_dataset(URL, engine="zcache", chunks={}, storage_options=options)[["t2m"]],
            )
            xr.testing.assert_identical(other, longer[["t2m"]])

            both = ledger.step(
                s3,
                "two years, by a pattern",
                lambda: xzcache.open_mfdataset("s3://climate/202*.zarr", storage_options=options),
            )
            assert both.sizes["time"] == 360 + 360 + 45

        # the server is gone; what was read is not
        alone = open_zarr(revalidate=False).load()
        xr.testing.assert_identical(alone, longer)

    console = Console(highlight=False)
    console.print(ledger.table)
    console.print("With the server stopped, revalidate=False still read everything.")


if __name__ == "__main__":
    main()
