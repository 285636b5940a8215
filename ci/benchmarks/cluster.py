"""A cluster of several nodes, each with a cache of its own: what affinity and peers do for requests, time, memory."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import dask
import numpy as np
import xarray as xr
import zarr
from _report import Report, arguments
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.diagnostics.plugin import SchedulerPlugin

import xzcache
from xzcache.dask._affinity import Reads

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from _s3 import S3Server, s3_server

CHUNKS = 64
STEPS = 192
SIDE = 128
MODES = ("none", "off", "auto", "peers", "both")
SETTINGS = {
    "off": {"affinity": "off", "peers": "off"},
    "auto": {"affinity": "auto", "peers": "off"},
    "peers": {"affinity": "off", "peers": "on"},
    "both": {"affinity": "auto", "peers": "on"},
}


class Peak(SchedulerPlugin):
    """The most bytes of results that workers hold at once."""

    name = "peak"

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.bytes = 0

    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        """Look whenever a task has ended."""
        if finish == "memory":
            self.bytes = max(self.bytes, sum(worker.nbytes for worker in self._scheduler.workers.values()))


class Recorder(SchedulerPlugin):
    """Writes which task has read which block on which node, for `ci/bench cluster-sim --replay`."""

    name = "recorder"

    def __init__(self, scheduler: Scheduler, file: IO[str]) -> None:
        self._scheduler, self._file = scheduler, file
        self._chunks: dict[Any, list[tuple[Any, str]]] = {}

    def update_graph(self, scheduler: Scheduler, *, tasks: Any, **_: Any) -> None:
        """Note what the new tasks read."""
        reads = Reads()
        for key in tasks:
            for reader, block in reads.of(scheduler.tasks[key]):
                self._chunks.setdefault(reader.key, []).append((key, block))

    def transition(self, key: Any, start: str, finish: str, *_: Any, **more: Any) -> None:
        """Write down a task that has ended."""
        if start == "processing" and finish == "memory" and (chunks := self._chunks.pop(key, None)):
            row = {
                "block": chunks[0][1],
                # the task that holds the array stands for it
                "chunks": [f"{holder} {block}" for holder, block in chunks],
                "priority": self._scheduler.tasks[key].priority,
                "node": str(self._scheduler.workers[more["worker"]].name),
                "seconds": sum(each["stop"] - each["start"] for each in more["startstops"]),
            }
            self._file.write(json.dumps(row) + "\n")


class Row(NamedTuple):
    """What one job took."""

    seconds: float
    reads: int
    hits: int
    given: int
    """The reads that other nodes answered."""
    requests: int
    peak: int


class Lab:
    """A cluster of simulated nodes, and what they ask of the source."""

    def __init__(self, folder: Path, server: S3Server, nodes: int, mode: Any, max_size: str) -> None:
        self._folder, self._server = folder, server
        scheduler = {"cls": Scheduler, "options": {"dashboard": False, "host": "127.0.0.1"}}
        workers: dict[Any, Any] = {node: self._worker(node) for node in range(nodes)}
        self.cluster: Any = SpecCluster(workers, scheduler=scheduler, silence_logs=logging.ERROR)  # type: ignore[no-untyped-call]
        self.client: Any = Client(self.cluster)  # type: ignore[no-untyped-call]
        self.client.wait_for_workers(nodes)
        here: Any = self.cluster.scheduler
        self.peak = Peak(here)
        here.add_plugin(self.peak)
        if mode != "none":
            settings: dict[str, Any] = SETTINGS[mode]
            self.client.register_plugin(xzcache.CachePlugin(max_size=max_size, min_free=0, **settings))
            # until the nodes know each other
            while settings["peers"] == "on" and not all(self._known(nodes)):
                time.sleep(0.1)

    def _known(self, nodes: int) -> list[bool]:
        """For each worker, whether it knows all other nodes."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return [worker["metrics"].get("xzcache_peers") == nodes - 1 for worker in workers]

    def _worker(self, node: int) -> dict[str, Any]:
        env = {"XZCACHE_DIRECTORY": str(self._folder / f"node{node}"), "OMP_NUM_THREADS": "1"}
        options = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False, "memory_limit": 0, "env": env}
        return {"cls": Nanny, "options": options}

    def add_node(self) -> None:
        """One more node, with an empty cache."""
        node = len(self.cluster.worker_spec)
        self.cluster.worker_spec[node] = self._worker(node)
        self.client.sync(self.cluster._correct_state)
        self.client.wait_for_workers(node + 1)

    def run(self, job: Callable[[], Any]) -> Row:
        """Do a job, and say what it took."""
        before = self._counts()
        self._server.reset()
        self.peak.bytes = 0
        began = time.perf_counter()
        job()
        seconds = time.perf_counter() - began
        counts = [after - earlier for after, earlier in zip(self._counts(), before, strict=True)]
        requests = self._server.counts().only("GET", "*/c/*").requests
        hits, given, misses = counts
        return Row(seconds, hits + given + misses, hits, given, requests, self.peak.bytes)

    def _counts(self) -> tuple[int, int, int]:
        nodes = xzcache.cluster_info(self.client)
        return tuple(sum(getattr(node, name) for node in nodes) for name in ("hits", "peer_hits", "misses"))

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.cluster.close()


@contextmanager
def lab(server: S3Server, nodes: int, mode: Any, max_size: str = "1 GB") -> Iterator[Lab]:
    """A cluster with empty caches."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        made = Lab(Path(scratch), server, nodes, mode, max_size)
        try:
            yield made
        finally:
            made.close()


def slow(block: Any, block_info: Any = None) -> Any:
    """Ten times as long for early blocks as for late ones."""
    (at, *_) = block_info[0]["chunk-location"]
    time.sleep(0.1 if at < STEPS / 8 else 0.01)
    return block.mean(keepdims=True)


def jobs(ds: xr.Dataset) -> dict[str, Callable[[], Any]]:
    """What people do one after the other with the same data."""
    half = slice(0, STEPS // 2)
    return {
        "sum(t), cold": lambda: ds.t.sum().compute(),
        "mean((t-1)*2+u), half of it cold": lambda: ((ds.t - 1) * 2 + ds.u).mean().compute(),
        "std(t)": lambda: ds.t.std().compute(),
        "max(u), half": lambda: ds.u.isel(t=half).max().compute(),
        "rechunk and mean": lambda: ds.t.chunk({"t": -1, "y": 32}).mean("t").compute(),
        "skewed work": lambda: ds.t.data.map_blocks(slow, chunks=(1, 1, 1), dtype="f4").sum().compute(),
        "t - t.shift": lambda: (ds.t - ds.t.shift(t=1)).std().compute(),
        "not fused": lambda: ds.t.data.mean().compute(optimize_graph=False),
    }


def measure(
    server: S3Server, storage: dict[str, Any], mode: str, options: argparse.Namespace, record: IO[str] | None
) -> dict[str, Row]:
    """All jobs, one after the other; then a node joins."""
    rows = {}
    with lab(server, options.nodes, mode, options.max_size) as found:
        open_zarr = xr.open_zarr if mode == "none" else xzcache.open_zarr
        ds = open_zarr("s3://bucket/x.zarr", storage_options=storage, chunks={}, consolidated=False)
        if record is not None:
            here: Any = found.cluster.scheduler
            here.add_plugin(Recorder(here, record))

        def run(name: str, job: Callable[[], Any]) -> None:
            row = rows[name] = found.run(job)
            if record is not None:
                about = {"mode": mode, "job": name, "nodes": len(found.cluster.worker_spec), "threads": 1}
                about |= {"latency": options.latency, "chunk_bytes": 4 * SIDE * SIDE}
                record.write(json.dumps(about | row._asdict()) + "\n")

        for name, job in jobs(ds).items():
            run(name, job)
        found.add_node()
        run("max(t), a node has joined", lambda: ds.t.max().compute())
        run("min(t), after that", lambda: ds.t.min().compute())
    return rows


def time_of_a_read(store: Any, keys: list[str]) -> list[float]:
    """On a worker: the seconds that each chunk takes."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    took = []
    for key in keys:
        began = time.perf_counter()
        value = sync(store.get(key, default_buffer_prototype()))
        took.append(time.perf_counter() - began)
        assert value is not None
    return took


def measure_hits(server: S3Server, storage: dict[str, Any]) -> list[list[str]]:
    """What a chunk costs on a node that lacks it, if another node has it."""
    rows = []
    with lab(server, 2, "peers") as found:
        first, second = sorted(found.client.nthreads())
        for name in ("64K", "1M"):
            source = xzcache.CacheStore(f"s3://bucket/{name}.zarr", storage_options=storage, read_only=True)
            # a node asks for the chunks of arrays whose documents it has seen
            zarr.open_array(source, mode="r", zarr_format=3)
            keys = [f"c/{number}" for number in range(CHUNKS)]
            options = {"pure": False}
            cold = found.client.submit(time_of_a_read, source, keys, workers=[first], **options).result()
            before = sum(node.peer_hits for node in xzcache.cluster_info(found.client))
            warm = found.client.submit(time_of_a_read, source, keys, workers=[second], **options).result()
            given = sum(node.peer_hits for node in xzcache.cluster_info(found.client)) - before
            # half of the chunks belong to the second node, and are cached there
            peers = sorted(warm)[-given:] if given else [float("nan")]
            local = sorted(warm)[:-given] if given else warm
            rows.append([name, *(f"{1e3 * float(np.median(times)):.2f}" for times in (cold, peers, local)), str(given)])
    return rows


def write(folder: Path) -> None:
    """Two variables on one grid, a chunk for each step."""
    rng = np.random.default_rng(1)
    shape = STEPS, SIDE, SIDE
    data = {name: (("t", "y", "x"), rng.random(shape, dtype="f4")) for name in "tu"}
    encoding = {name: {"chunks": (1, SIDE, SIDE)} for name in "tu"}
    for name, size in (("64K", 1 << 16), ("1M", 1 << 20)):
        place = folder / "bucket" / f"{name}.zarr"
        array = zarr.create_array(str(place), shape=CHUNKS * size, chunks=size, dtype="u1", compressors=None)
        array[:] = rng.integers(0, 255, array.shape, dtype="u1")
    xr.Dataset(data).to_zarr(folder / "bucket" / "x.zarr", encoding=encoding, zarr_format=3, consolidated=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds to the source")
    parser.add_argument("--max-size", default="1 GB", help="of each node's cache; the data take some 22 MB")
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what ran where, for cluster-sim --replay")
    options = parser.parse_args()
    with ExitStack() as stack:
        report = stack.enter_context(Report("cluster", options.out))
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        record = None if options.record is None else stack.enter_context(options.record.open("w", encoding="utf-8"))
        write(Path(scratch))
        found = {}
        with s3_server(scratch, latency=options.latency) as server:
            storage = {
                "key": server.access_key,
                "secret": server.secret_key,
                "client_kwargs": {"endpoint_url": server.endpoint, "region_name": "us-east-1"},
            }
            hits = measure_hits(server, storage)
            for mode in options.modes:
                recorded = None if mode == "none" else record
                found[mode] = measure(server, storage, mode, options, recorded)
        columns = ["a chunk of", "ms, first node", "ms, from the other node", "ms, cached here", "from the other node"]
        report.table(f"Median times of {CHUNKS} reads, two nodes, the source {options.latency:g} s away", columns, hits)
        rows = [
            [f"{job}: {mode}", *_cells(found[mode][job])] for job in found[options.modes[0]] for mode in options.modes
        ]
        rows += [[f"all of them: {mode}", *_cells(_sum(found[mode].values()))] for mode in options.modes]
        columns = ["job: mode", "cached here", "from other nodes", "seconds", "requests", "peak MB"]
        report.table(
            f"{STEPS} chunks a variable, {options.nodes} nodes of {options.max_size}, the source "
            f"{options.latency:g} s away",
            columns,
            rows,
        )


def _sum(rows: Collection[Row]) -> Row:
    """All jobs as one."""
    return Row(*map(sum, zip(*rows, strict=True)))._replace(peak=max(row.peak for row in rows))


def _cells(row: Row) -> list[str]:
    local, given = (part / max(1, row.reads) for part in (row.hits, row.given))
    return [f"{local:.0%}", f"{given:.0%}", f"{row.seconds:.2f}", str(row.requests), f"{row.peak / 1e6:.1f}"]


if __name__ == "__main__":
    dask.config.set({"distributed.comm.timeouts.connect": "30s", "logging": {"distributed": "error"}})
    main()
