"""Read an Icechunk repository through the cache: snapshots never mix, and never are asked about again.

The repository lies in S3; everything is made here and thrown away at the end. Run it with ``python
examples/icechunk_repository.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import icechunk
import numpy as np
import xarray as xr
from _s3 import S3Server, s3_server

import xzcache


def open_repository(s3: S3Server, *, create: bool = False) -> icechunk.Repository:
    storage = icechunk.s3_storage(
        bucket="climate",
        prefix="repository",
        region="us-east-1",
        endpoint_url=s3.endpoint,
        allow_http=True,
        force_path_style=True,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
    )
    return icechunk.Repository.create(storage) if create else icechunk.Repository.open(storage)


def commit(repository: icechunk.Repository, value: float) -> str:
    """Commit a dataset of one value, and its snapshot."""
    session = repository.writable_session("main")
    dataset = xr.Dataset({"t2m": (("time", "x"), np.full((40, 10_000), value, "f4"))})
    dataset.to_zarr(
        session.store,
        mode="w",
        zarr_format=3,
        consolidated=False,
        encoding={"t2m": {"chunks": (2, 10_000), "compressors": None}},
    )
    return session.commit(f"all {value}")


def read(repository: icechunk.Repository, snapshot: str) -> float:
    """The mean of a snapshot, read by the store of a session through the cache."""
    store = xzcache.CacheStore(repository.readonly_session(snapshot_id=snapshot).store)
    mean = float(xr.open_zarr(store, consolidated=False)["t2m"].mean())
    stats = store.cache_stats()
    print(f"snapshot {snapshot[:6]}: mean {mean}, {stats['hits']} hits, {stats['misses']} misses")
    return mean


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="xzcache-icechunk-") as name:
        folder = Path(name)
        (folder / "buckets" / "climate").mkdir(parents=True)
        xzcache.config.set(directory=str(folder / "cache"))
        with s3_server(folder / "buckets", latency=0.01) as s3:
            writer = open_repository(s3, create=True)
            first, second = commit(writer, 1.0), commit(writer, 2.0)
            assert read(open_repository(s3), first) == 1.0
            assert read(open_repository(s3), second) == 2.0
            s3.reset()
            assert read(open_repository(s3), first) == 1.0
            chunks = s3.counts().only("GET", "*/chunks/*").requests
            print(f"the first snapshot once more, by a new repository object: {chunks} chunks asked of the bucket")
            assert chunks == 0
        print(xzcache.ls())


if __name__ == "__main__":
    main()
