"""Open public data through the cache. NEEDS THE INTERNET, some 100 MB of it; not run by CI.

ARCO-ERA5, the ERA5 reanalysis in Zarr on Google Cloud Storage, needs no account. Run it with ``python
examples/public_data.py``, twice: the second time nothing but one metadata document is fetched.

The data are made by the Copernicus Climate Change Service and published by Google Research
(https://github.com/google-research/arco-era5).
"""

from __future__ import annotations

import time

import xarray as xr

import xzcache

ERA5 = "gs://gcp-public-data-arco-era5/ar/full_37-1h-0p25deg-chunk-1.zarr-v3"


def main() -> None:
    started = time.perf_counter()
    ds = xr.open_zarr(ERA5, engine="zcache", storage_options={"token": "anon"}, max_size="20 GB")
    mean = ds["2m_temperature"].sel(time="2020-07-01").mean("time").compute()
    print(f"{float(mean.min()):.1f} to {float(mean.max()):.1f} K, in {time.perf_counter() - started:.1f} s")
    print(xzcache.CacheStore(ERA5, storage_options={"token": "anon"}).cache_info())


if __name__ == "__main__":
    main()
