"""Dask over several hosts: namespaces of this machine with a network, a name and a disk of their own.

The hosts are plugged into a switch, a bridge in a namespace by itself; a scheduler, two hosts with workers, and an S3
server at the end of a long line. Nothing of it has a name outside: the namespaces go with their last
process, however this one ends.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from clusters import give_up_after
from processes import PATIENCE, Dataset, Source, until
from servers import S3Server, words

import xzcache

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
PYTHON = os.pathsep.join(map(str, (TESTS, TESTS.parent / "support", ROOT, ROOT / "examples")))
NETWORK = "198.51.100"  # set aside for documentation: nobody is there
TOOLS = ("ip", "unshare", "nsenter")


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "namespaces take root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"namespaces take {', '.join(missing)}"
    return None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_why_not() is not None, reason=_why_not() or "there is nothing amiss"),
]


class Host:
    """A namespace of each kind that matters, for as long as its first process lives."""

    def __init__(self, name: str, disk: Path) -> None:
        self.name = name
        first = f"mount -t tmpfs none {disk} && hostname {name} && ip link set lo up && echo up && exec cat"
        command = ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", first]
        self._first = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._first.stdout is not None
        assert self._first.stderr is not None
        if self._first.stdout.readline() != "up\n":
            pytest.skip(f"no namespaces here: {self._first.stderr.read().strip()}")
        self._others: list[subprocess.Popen[str]] = []

    @property
    def pid(self) -> int:
        return self._first.pid

    def line(self, *words: str) -> list[str]:
        """A command as it is run on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--", *words]

    def run(self, *words: str, **options: Any) -> str:
        result = subprocess.run(
            self.line(*words), capture_output=True, text=True, timeout=PATIENCE, env=environment(), **options
        )
        assert result.returncode == 0, f"{self.name}: {' '.join(words)}: {result.stderr}"
        return result.stdout

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """A command that goes on; it ends with the host."""
        process = subprocess.Popen(
            self.line(*words), env=environment(**env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._others.append(process)
        return process

    def close(self) -> None:
        for process in (*self._others, self._first):
            process.terminate()
        for process in (*self._others, self._first):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()


def environment(**more: str) -> dict[str, str]:
    """No settings, proxies or names of this machine's."""
    unwanted = re.compile(r"(XZCACHE|DASK|RCLONE)_|.*_proxy$", re.IGNORECASE)
    mine = {name: value for name, value in os.environ.items() if not unwanted.match(name)}
    return {**mine, "PYTHONPATH": PYTHON, "XZCACHE_MIN_FREE": "0", **more}


@contextmanager
def plugged_in(disk: Path, *names: str) -> Iterator[dict[str, Host]]:
    """Hosts on one network: the first is at .1, the next at .2, and so on."""
    with ExitStack() as stack:
        hosts = {}
        for name in ("switch", *names):
            hosts[name] = Host(name, disk)
            stack.callback(hosts[name].close)
        switch = hosts.pop("switch")
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        for number, host in enumerate(hosts.values(), 1):
            port = f"port{number}"
            ends = ("type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
            switch.run("ip", "link", "add", port, *ends)
            switch.run("ip", "link", "set", port, "master", "bridge", "up")
            host.run("ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        yield hosts


SERVE = """
import sys, _s3
_s3.HOST = sys.argv[1]
_s3._serve(_s3._find_rclone(), *sys.argv[2:])
"""


def serve(host: Host, address: str, directory: Path) -> S3Server:
    """The S3 server of the examples, at another address than this machine's own, and 10 ms away."""
    try:
        host.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "10ms")
        latency = "0"
    except AssertionError:
        # no such tool, or a kernel that delays no packets: the server has to wait
        latency = "0.01"
    access, secret = secrets.token_hex(10).upper(), secrets.token_hex(20)
    key = f'"{access},{secret}"'
    process = host.start(sys.executable, "-c", SERVE, address, str(directory), latency, RCLONE_AUTH_KEY=key)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    return S3Server(f"http://{address}:{port}", access, secret)


class Seen(NamedTuple):
    """What somebody at the scheduler's host saw; the worker's name says which host it is on."""

    hostnames: dict[str, str]
    nodes: list[dict[str, Any]]
    counts: dict[str, int]
    bytes: int
    metrics: dict[str, dict[str, Any]]
    sums: list[float]


def visit(scheduler: str, root: str, *server: str) -> None:
    """On the scheduler's host: set up the caches, read all on each worker, tell what happened."""
    import socket

    import zarr
    from distributed import Client

    s3 = S3Server(*server)
    with Client(scheduler) as client:
        client.wait_for_workers(3)
        client.register_plugin(xzcache.CachePlugin(root, "50 MB"))
        store = xzcache.CacheStore("s3://bucket/x.zarr", storage_options=words(s3), cache_store=None)
        array = zarr.open_array(store, mode="r", zarr_format=3)
        s3.reset()
        hostnames = client.run(socket.gethostname)
        sums = [client.submit(_sum, array, workers=[address], pure=False).result() for address in hostnames]
        nodes = [node._asdict() for node in xzcache.cluster_info(client)]
        client.run(_beat)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        metrics = {
            address: {name: value for name, value in workers[address]["metrics"].items() if "xzcache" in name}
            for address in hostnames
        }
        chunks = s3.counts().only("GET", "*/c/*")
        counts = {tally.path: tally.requests for tally in chunks.tallies}
    print(json.dumps(Seen(hostnames, nodes, counts, chunks.bytes, metrics, sums)._asdict()))


def _sum(array: Any) -> float:
    return float(array[:].sum())


async def _beat(dask_worker: Any) -> None:
    await dask_worker.heartbeat()


class Landscape(NamedTuple):
    seen: Seen
    audits: dict[str, int]
    outside: bool
    round_trip: float
    total: float


@pytest.fixture(scope="module")
def landscape(tmp_path_factory: pytest.TempPathFactory) -> Landscape:
    import numpy as np
    import zarr

    folder = tmp_path_factory.mktemp("hosts")
    disk, root = folder / "disk", folder / "disk" / "cache"
    disk.mkdir()
    values = np.random.default_rng(5).random((60, 40))
    zarr.create_array(folder / "bucket" / "x.zarr", data=values, chunks=(5, 40))
    with plugged_in(disk, "head", "alpha", "beta", "store") as hosts:
        s3 = serve(hosts["store"], f"{NETWORK}.4", folder)
        scheduler = f"tcp://{NETWORK}.1:8786"
        dask = (sys.executable, "-m", "dask")
        hosts["head"].start(*dask, "scheduler", "--host", f"{NETWORK}.1", "--port", "8786", "--no-dashboard")
        for name, address, number in (("alpha", 2, 0), ("alpha", 2, 1), ("beta", 3, 0)):
            named = ("--name", f"{name}-{number}", "--host", f"{NETWORK}.{address}")
            hosts[name].start(*dask, "worker", scheduler, *named, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        script = "import sys, test_dask_hosts; test_dask_hosts.visit(*sys.argv[1:])"
        where = (scheduler, str(root), s3.endpoint, s3.access_key, s3.secret_key)
        seen = Seen(**json.loads(hosts["head"].run(sys.executable, "-c", script, *where)))
        round_trip = measured(hosts["head"], s3)
        # the workers are stopped in an orderly way, and then what they leave is looked at
        for name in ("alpha", "beta"):
            for worker in hosts[name]._others:
                worker.terminate()
                worker.wait(PATIENCE)
        check = f"import processes; processes.visit({str(root)!r}); print(processes.audit({str(root)!r}))"
        audits = {name: int(hosts[name].run(sys.executable, "-c", check)) for name in ("alpha", "beta")}
    return Landscape(seen, audits, root.exists(), round_trip, float(values.sum()))


def measured(host: Host, s3: S3Server) -> float:
    """Seconds that a request takes, of whoever may not ask."""
    script = (
        "import sys, time; from urllib.error import HTTPError; from urllib.request import urlopen\n"
        "began = time.perf_counter()\n"
        "try: urlopen(sys.argv[1])\n"
        "except HTTPError: print(time.perf_counter() - began)"
    )
    return float(host.run(sys.executable, "-c", script, s3.endpoint + "/bucket/x.zarr/zarr.json"))


def test_the_source_is_far_away(landscape: Landscape) -> None:
    assert landscape.round_trip >= 0.01


def test_there_are_two_hosts_with_workers(landscape: Landscape) -> None:
    assert sorted(landscape.seen.hostnames.values()) == ["alpha", "alpha", "beta"]


def test_the_results_are_right(landscape: Landscape) -> None:
    assert landscape.seen.sums == pytest.approx([landscape.total] * 3)


def test_each_chunk_crosses_the_network_once_a_host(landscape: Landscape) -> None:
    assert len(landscape.seen.counts) == 12
    assert set(landscape.seen.counts.values()) == {2}


def test_the_hosts_are_told_apart(landscape: Landscape) -> None:
    seen = landscape.seen
    assert len(seen.nodes) == len({node["node"] for node in seen.nodes}) == 2
    # the same path, on another disk
    assert len({node["directory"] for node in seen.nodes}) == 1
    for node in seen.nodes:
        (name,) = {seen.hostnames[address] for address in node["workers"]}
        shared = {"alpha": 2, "beta": 1}[name]
        assert node["hosts"] == [f"{NETWORK}.{2 if name == 'alpha' else 3}"]
        assert len(node["workers"]) == shared
        assert (node["misses"], node["hits"]) == (12, 12 * (shared - 1))
        assert (node["entries"], node["bound"]) == (12, 50_000_000)
        assert 2 * node["used"] == seen.bytes
        assert node["saved_bytes"] == (shared - 1) * node["used"]


def test_workers_say_the_same_of_themselves(landscape: Landscape) -> None:
    seen = landscape.seen
    for node in seen.nodes:
        of_node = [seen.metrics[address] for address in node["workers"]]
        assert {metrics["xzcache_node"] for metrics in of_node} == {node["node"]}
        assert sum(metrics["xzcache_misses"] for metrics in of_node) == node["misses"]
        assert sum(metrics["xzcache_bytes_from_cache"] for metrics in of_node) == node["saved_bytes"]


def test_every_account_is_what_is_on_the_hosts_own_disk(landscape: Landscape) -> None:
    assert landscape.audits == {"alpha": 12, "beta": 12}
    assert not landscape.outside


# -- a host that the network leaves


def drill(scheduler: str, root: str, place: str, log: str) -> None:
    """On the scheduler's host: a job that runs when another host goes, and one after that."""
    import dask.array as da
    import numpy as np
    import zarr
    from distributed import Client, Event

    with Client(scheduler) as client:
        # not the other workers, which are slow to start on a busy machine
        give_up_after(client, 3600)
        client.wait_for_workers(3)
        client.register_plugin(xzcache.CachePlugin(root, "50 MB", affinity="auto"))
        store = xzcache.CacheStore(Source(zarr.storage.LocalStore(place, read_only=True), log))
        array = zarr.open_array(store, mode="r", zarr_format=3)
        lazy = da.from_array(array, chunks=array.chunks)
        lazy.max().compute()
        future = client.compute(lazy.map_blocks(_held, meta=np.empty((0, 0))).sum())
        until(lambda: all(client.processing().values()))
        print("running", flush=True)
        input()
        give_up_after(client, 8)
        Event("gate").set()
        print(future.result(timeout=PATIENCE), lazy.min().compute(), len(client.nthreads()), flush=True)


def _held(block: Any) -> Any:
    from distributed import Event

    Event("gate").wait("60s")
    return block


@pytest.mark.timeout(300)
@pytest.mark.soak
def test_a_host_that_the_network_leaves_stops_no_job(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    ds = Dataset(tmp_path, side=8, chunk=8)
    with plugged_in(disk, "head", "alpha", "beta", "gamma") as hosts:
        scheduler = f"tcp://{NETWORK}.1:8786"
        dask = (sys.executable, "-m", "dask")
        serving = ("--host", f"{NETWORK}.1", "--port", "8786", "--no-dashboard")
        hosts["head"].start(*dask, "scheduler", *serving, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="8s")
        for number, name in enumerate(("alpha", "beta", "gamma"), 2):
            named = ("--name", name, "--host", f"{NETWORK}.{number}", "--no-nanny", "--nthreads", "1", "--no-dashboard")
            hosts[name].start(*dask, "worker", scheduler, *named)
        script = "import sys, test_dask_hosts; test_dask_hosts.drill(*sys.argv[1:])"
        where = (scheduler, str(disk / "cache"), ds.place, ds.log)
        job = hosts["head"].start(sys.executable, "-c", script, *where)
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stdout.readline() == "running\n"
        hosts["gamma"].run("ip", "link", "set", "eth0", "down")
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.stdout.readline().split() == [str(ds.values.sum()), "0.0", "2"]
        assert job.wait(PATIENCE) == 0
    # what the others had, they did not fetch again
    assert sum(ds.chunk_requests().values()) < 2 * ds.chunks
