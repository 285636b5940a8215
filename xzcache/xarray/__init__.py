"""xarray's ways in: the engine `"zcache"`, `open_zarr`, `open_mfdataset`, `warm`, `dataset.zcache`. Keeps no state."""

from xzcache.xarray._accessor import ZcacheAccessor
from xzcache.xarray._engine import ZcacheBackendEntrypoint, open_mfdataset, open_zarr
from xzcache.xarray._warm import warm

__all__ = [
    "ZcacheAccessor",
    "ZcacheBackendEntrypoint",
    "open_mfdataset",
    "open_zarr",
    "warm",
]
