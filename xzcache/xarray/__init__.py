"""xarray's ways in: the engine `"zcache"`, `open_zarr` and `open_mfdataset`. No state of its own."""

from xzcache.xarray._engine import ZcacheBackendEntrypoint, open_mfdataset, open_zarr

__all__ = [
    "ZcacheBackendEntrypoint",
    "open_mfdataset",
    "open_zarr",
]
