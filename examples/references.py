"""Read NetCDF files in S3 as one Zarr dataset through the cache, by references of kerchunk and of VirtualiZarr.

xzcache caches the chunks that the references point to, not the files. Everything is made here and thrown away at the
end. Run it with ``python examples/references.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from _s3 import s3_server

import xzcache

FILES, STEPS = 3, 24


def write_files(folder: Path) -> None:
    """One NetCDF file for each day."""
    for day in range(FILES):
        time = STEPS * day + np.arange(STEPS)
        values = np.random.default_rng(day).normal(size=(STEPS, 60, 120)).astype("f4")
        dataset = xr.Dataset({"t2m": (("time", "lat", "lon"), values)}, {"time": ("time", time)})
        dataset.to_netcdf(folder / f"{day}.nc", engine="h5netcdf", encoding={"t2m": {"chunksizes": (8, 60, 120)}})


def references_of_kerchunk(options: dict[str, Any]) -> dict[str, Any]:
    """One set of references to all files."""
    from kerchunk.combine import MultiZarrToZarr
    from kerchunk.hdf import SingleHdf5ToZarr

    urls = [f"s3://archive/{day}.nc" for day in range(FILES)]
    single = [SingleHdf5ToZarr(url, storage_options=options).translate() for url in urls]
    how = {"remote_protocol": "s3", "remote_options": options}
    combined: dict[str, Any] = MultiZarrToZarr(single, concat_dims=["time"], **how).translate()
    return combined


def main() -> None:
    from obspec_utils.registry import ObjectStoreRegistry
    from virtualizarr.parsers import HDFParser

    with tempfile.TemporaryDirectory(prefix="xzcache-references-") as name:
        folder = Path(name)
        (folder / "buckets" / "archive").mkdir(parents=True)
        write_files(folder / "buckets" / "archive")
        xzcache.config.set(directory=str(folder / "cache"))
        with s3_server(folder / "buckets", latency=0.005) as s3:
            options = {"key": s3.access_key, "secret": s3.secret_key, "client_kwargs": {"endpoint_url": s3.endpoint}}
            references = references_of_kerchunk(options)
            # zarr reads with an asynchronous file system, and fsspec asks for the same of the one beneath
            remote = {"remote_protocol": "s3", "remote_options": {**options, "asynchronous": True}}
            for attempt in ("first", "again"):
                s3.reset()
                ds = xr.open_zarr(
                    "reference://",
                    engine="zcache",
                    consolidated=False,
                    storage_options={"fo": references, **remote},
                )
                mean = float(ds["t2m"].mean())
                asked = s3.counts().only("GET", "archive/*").requests
                print(f"kerchunk, {attempt}: {dict(ds.sizes)}, mean {mean:.4f}, {asked} requests")
            assert asked == 0

            registry = ObjectStoreRegistry({"s3://archive": s3.store("archive").store})
            virtual = HDFParser()(url="s3://archive/0.nc", registry=registry)
            for attempt in ("first", "again"):
                s3.reset()
                store = xzcache.CacheStore(virtual)
                mean = float(xr.open_zarr(store, consolidated=False)["t2m"].mean())
                asked = s3.counts().only("GET", "archive/*").requests
                print(f"VirtualiZarr, {attempt}: mean {mean:.4f}, {asked} requests")
            assert asked == 0


if __name__ == "__main__":
    main()
