"""Right and wrong uses of the ways in, for type checkers only: `ci/types` runs mypy and pyright over this file.

Both are strict about comments that ignore nothing: a wrong use that a checker does not notice fails, as a right use
that it refuses does.
"""

# mypy: enable-error-code="ignore-without-code"

from pathlib import Path
from typing import assert_type

import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore

import xzcache


def right(store: MemoryStore, path: Path) -> None:
    xzcache.CacheStore(store, cache_store=path, max_size="20 GB", policy="adaptive", revalidate=60.0)
    xzcache.CacheStore(path, cache_store=LocalStore(path), max_size=None, max_age_seconds="infinity")
    xzcache.CacheStore("s3://bucket/x.zarr", storage_options={"anon": True}, upstream="fsspec", revalidate="open")
    xzcache.CacheStore({}, revalidate=False, missing_max_age_seconds=0, namespace=None, read_only=True)
    assert_type(xzcache.open_zarr(path), xr.Dataset)
    xzcache.open_zarr("s3://bucket/x.zarr", "group", chunks={}, storage_options={"anon": True}, max_size="20 GB")
    xzcache.open_zarr(store, chunks=None, consolidated=False, pipeline=False, engine="zcache", decode_times=False)
    assert_type(xzcache.open_mfdataset("s3://bucket/*.zarr", storage_options={"anon": True}), xr.Dataset)
    xzcache.open_mfdataset([path, "b.zarr", store], combine="nested", concat_dim="time", policy="none", parallel=True)
    xzcache.open_mfdataset([[path, path], [path, path]], chunks={"time": 1}, join="exact", attrs_file=path)
    xzcache.CachePlugin(path, "200 GB", remove_on_close=True, policy="lru", min_free=0.05, threads=2)
    xzcache.CachePlugin(max_size=10**9, revalidate=True, max_age_seconds=3600, upstream="obstore")
    locked = xzcache.LockedLocalStore(path, max_size="1 GB", min_free="5%", policy="lru")
    zarr.open_group(xzcache.CacheStore(store, cache_store=locked), mode="r")
    xzcache.CacheStore(store).cache_info()["cached_keys"].bit_length()
    with xzcache.config.set(max_size="1 GB"):
        pass


def wrong(store: MemoryStore) -> None:
    xzcache.CacheStore(3)  # type: ignore[arg-type]
    xzcache.CacheStore(None)  # type: ignore[arg-type]
    xzcache.CacheStore(store, store)  # type: ignore[call-arg]
    xzcache.CacheStore(store, cache_store=3)  # type: ignore[arg-type]
    xzcache.CacheStore(store, max_sise="1 GB")  # type: ignore[call-arg]
    xzcache.CacheStore(store, max_size=2e9)  # type: ignore[arg-type]
    xzcache.CacheStore(store, policy="fifo")  # type: ignore[arg-type]
    xzcache.CacheStore(store, revalidate="always")  # type: ignore[arg-type]
    xzcache.CacheStore(store, max_age_seconds="forever")  # type: ignore[arg-type]
    xzcache.CacheStore(store, upstream="s3fs")  # type: ignore[arg-type]
    xzcache.CacheStore(store, cache_set_data="yes")  # type: ignore[arg-type]
    xzcache.CacheStore("s3://bucket/x.zarr", storage_options="anon")  # type: ignore[arg-type]
    xzcache.LockedLocalStore(store)  # type: ignore[arg-type]
    xzcache.LockedLocalStore("cache", policy="LRU")  # type: ignore[arg-type]
    xzcache.open_zarr(3)  # type: ignore[arg-type]
    xzcache.open_zarr("x.zarr", max_sise="20 GB")  # type: ignore[call-arg]
    xzcache.open_zarr("x.zarr", policy="fifo")  # type: ignore[arg-type]
    xzcache.open_zarr("x.zarr", engine="zarr")  # type: ignore[arg-type]
    xzcache.open_zarr("x.zarr", consolidated="yes")  # type: ignore[arg-type]
    xzcache.open_mfdataset("*.zarr", max_sise="20 GB")  # type: ignore[call-arg]
    xzcache.open_mfdataset("*.zarr", combine="by_coord")  # type: ignore[arg-type]
    xzcache.open_mfdataset(3)  # type: ignore[arg-type]
    xzcache.CachePlugin(max_sise="1 GB")  # type: ignore[call-arg]
    xzcache.CachePlugin(policy="fifo")  # type: ignore[arg-type]
    xzcache.CachePlugin(threads="4")  # type: ignore[arg-type]
    xzcache.CachePlugin(trace="file")  # type: ignore[call-arg]
