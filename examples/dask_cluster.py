"""One cache a node on a Dask cluster of several nodes, and what it saved.

The nodes are simulated: each is two worker processes that have a cache directory of their own. A real S3 server counts
what it is asked for. Everything is made here and thrown away at the end. Run it with ``python
examples/dask_cluster.py``.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import dask.config
import numpy as np
import xarray as xr
from _s3 import S3Server, s3_server
from distributed import Client, Nanny, Scheduler, SpecCluster
from rich.console import Console
from zarr.errors import ZarrUserWarning

import xzcache

NODES, WORKERS = 2, 2


def write_dataset(s3: S3Server) -> int:
    """Write hourly weather of a month to the bucket; the number of its chunks."""
    hours, lat, lon = 720, 73, 144
    noise = np.random.default_rng(1).normal(size=(hours, lat, lon)).astype("f4")
    ds = xr.Dataset({"t2m": (("time", "lat", "lon"), 280 + noise)}).chunk(time=12)
    warnings.simplefilter("ignore", ZarrUserWarning)  # consolidated metadata is an extension of the format
    ds.to_zarr(s3.store("climate", "month.zarr"), zarr_format=3, consolidated=True)
    return hours // 12


def several_nodes(folder: Path) -> SpecCluster:
    """Make a cluster whose workers lie on several nodes, as far as their cache directories tell."""
    workers = {
        f"{node}-{worker}": {
            "cls": Nanny,
            # on a real node this is not said: every node has a disk of its own
            "options": {"env": {"XZCACHE_DIRECTORY": str(folder / f"node-{node}")}, "silence_logs": logging.ERROR},
        }
        for node in range(NODES)
        for worker in range(WORKERS)
    }
    # these nodes are one machine, and of two caches on one machine the plugin warns
    warnings.filterwarnings("ignore", "workers of one machine have 2 caches")
    logging.getLogger("xzcache.dask").setLevel(logging.ERROR)
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": ":0"}}
    return SpecCluster(workers, scheduler=scheduler, silence_logs=logging.ERROR)  # type: ignore[no-untyped-call]


def main() -> None:
    console = Console(highlight=False, width=150)
    with tempfile.TemporaryDirectory(prefix="xzcache-dask-") as name:
        folder = Path(name)
        (folder / "buckets" / "climate").mkdir(parents=True)
        with (
            s3_server(folder / "buckets", latency=0.02) as s3,
            dask.config.set(temporary_directory=name),
        ):
            chunks = write_dataset(s3)
            options = {"key": s3.access_key, "secret": s3.secret_key, "client_kwargs": {"endpoint_url": s3.endpoint}}
            with (
                several_nodes(folder) as cluster,
                Client(cluster) as client,  # type: ignore[no-untyped-call]
            ):
                # this is all; the rest would be the same without it
                client.register_plugin(xzcache.CachePlugin(max_size="1 GB"))

                # the client has a cache as well, for what it reads itself
                with xzcache.config.set(directory=str(folder / "client")):
                    ds = xr.open_zarr("s3://climate/month.zarr", engine="zcache", storage_options=options)
                for what in ("mean", "std", "max"):
                    s3.reset()
                    getattr(ds["t2m"], what)("time").compute()
                    asked = s3.counts().only("GET", "*/c/*").requests
                    console.print(f"{what:>5}: {asked} of {chunks} chunks asked of the server")
                    # at most once a node, whatever Dask's scheduler sends where
                    assert asked <= chunks * NODES
                info = xzcache.cluster_info(client)
                console.print(repr(info))
                assert len(info) == NODES
                assert sum(node.misses for node in info) <= chunks * NODES


if __name__ == "__main__":
    main()
