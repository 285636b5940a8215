"""A few reads through the installed package: xarray, zarr, another process, the command. Needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

scratch = tempfile.TemporaryDirectory(prefix="xzcache-smoke-", ignore_cleanup_errors=True)
os.environ |= {"XZCACHE_DIRECTORY": os.path.join(scratch.name, "cache"), "XZCACHE_MIN_FREE": "0"}

import numpy as np  # noqa: E402
import xarray as xr  # noqa: E402
import zarr  # noqa: E402

import xzcache  # noqa: E402

AGAIN = """
import sys, xarray as xr, xzcache
ds = xr.open_zarr(sys.argv[1], engine="zcache", chunks={}, consolidated=False)
assert float(ds["t"].sum()) == 4950.0
assert ds.zcache.stats()["hits"] >= 10, ds.zcache.stats()
"""


def main() -> None:
    place = Path(xzcache.__file__).parent
    assert (place / "py.typed").exists()
    source = Path(scratch.name) / "source.zarr"
    data = xr.Dataset({"t": ("x", np.arange(100.0))})
    data.to_zarr(source, zarr_format=3, consolidated=False, encoding={"t": {"chunks": (10,)}})
    ds = xr.open_zarr(source, engine="zcache", consolidated=False, chunks={})
    assert float(ds["t"].sum()) == 4950.0
    assert ds.zcache.cached_fraction() == {"t": 1.0}
    store = xzcache.CacheStore(source)
    assert np.asarray(zarr.open_array(store, path="t", mode="r")[:]).sum() == 4950.0
    assert store.cache_stats()["hits"] >= 10
    subprocess.run([sys.executable, "-c", AGAIN, source], check=True)
    command = Path(sys.executable).with_name("xzcache")
    listed = subprocess.run([command, "ls"], check=True, capture_output=True, text=True).stdout
    assert "source" in listed, listed
    print(f"xzcache {xzcache.__version__} works, from {place}")


if __name__ == "__main__":
    main()
