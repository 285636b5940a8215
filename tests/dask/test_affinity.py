"""Affinity: what reads a block again runs on the node that has it, and the rest of the scheduling stays Dask's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from clusters import give_up_after, nodes, pids
from distributed import Client, Event, Security
from distributed.diagnostics.plugin import SchedulerPlugin
from processes import PATIENCE, Dataset, Source, until
from zarr.storage import LocalStore

import xzcache

pytestmark = pytest.mark.slow

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NODES = 4


class Cluster:
    """Four simulated nodes, and an array whose source notes which node asks for which chunk."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.dataset = Dataset(folder, side=12, chunk=8)

    def array(self) -> Any:
        source = Source(LocalStore(self.dataset.place, read_only=True), self.dataset.log)
        return zarr.open_array(xzcache.CacheStore(source), mode="r", zarr_format=3)

    def lazy(self, **options: Any) -> da.Array:
        array = self.array()
        return da.from_array(array, chunks=array.chunks, **options)

    def clear(self) -> None:
        xzcache.dask.each_node(self.client, xzcache.clear)

    def requests(self, job: Callable[[], Any]) -> int:
        """How many chunks a job requests of the source."""
        self.dataset.forget_requests()
        job()
        return sum(self.dataset.chunk_requests().values())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("affinity")
    with nodes(folder, NODES) as client, xzcache.config.set(directory=None):
        client.register_plugin(xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto"))
        yield Cluster(client, folder)


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    started.clear()
    return started


def test_other_operations_on_the_same_variable_read_where_the_blocks_are(cluster: Cluster) -> None:
    chunks, values = cluster.dataset.chunks, cluster.dataset.values
    lazy = cluster.lazy()
    assert lazy.sum().compute() == values.sum()
    asked = cluster.requests(lambda: lazy.std().compute())
    # a node without tasks of its own takes some of another; by chance alone, three of four would be elsewhere
    assert asked < chunks / 4
    # a selection, a graph that is not fused, an array within the tasks, and another array on the same grid
    assert cluster.requests(lambda: lazy[: values.shape[0] // 2].max().compute()) < chunks / 4
    assert cluster.requests(lambda: lazy.mean().compute(optimize_graph=False)) < chunks / 4
    assert cluster.requests(lambda: cluster.lazy(inline_array=True).min().compute()) < chunks / 4
    both = (cluster.lazy(name="again") + lazy).sum()
    assert cluster.requests(lambda: both.compute()) < chunks / 4


def test_xarray(cluster: Cluster, tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((48, 8, 8))
    place = tmp_path / "x.zarr"
    xr.Dataset(dict.fromkeys("uv", (("t", "y", "x"), values))).to_zarr(
        place, encoding={name: {"chunks": (1, 8, 8)} for name in "uv"}, zarr_format=3, consolidated=False
    )
    ds = xzcache.open_zarr(place, chunks={}, consolidated=False)

    def misses(job: Callable[[], Any]) -> int:
        before = sum(node.misses for node in xzcache.cluster_info(cluster.client))
        job()
        return sum(node.misses for node in xzcache.cluster_info(cluster.client)) - before

    assert misses(lambda: ds.u.sum().compute()) >= 48
    np.testing.assert_allclose(ds.u.mean("t").compute(), values.mean(0))
    assert misses(lambda: ((ds.u - 1) * 2).std().compute()) < 48 / 4
    assert misses(lambda: ds.u.isel(t=slice(3, 33)).max().compute()) < 48 / 4
    assert misses(lambda: ds.u.chunk({"t": -1, "y": 2}).mean("t").compute()) < 48 / 4


class Backlog(SchedulerPlugin):
    """The most tasks that a worker has at once, and the names of workers that tasks ended on."""

    name = "backlog"

    def __init__(self) -> None:
        self.most = 0

    async def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def transition(self, key: Any, start: str, finish: str, *_: Any, **__: Any) -> None:
        if finish == "processing":
            self.most = max(self.most, *(len(worker.processing) for worker in self.scheduler.workers.values()))


def test_tasks_stay_in_the_queue_of_the_scheduler(cluster: Cluster) -> None:
    cluster.client.register_plugin(Backlog())
    try:
        cluster.lazy().map_blocks(np.copy).sum().compute()
        most = cluster.client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["backlog"].most)
    finally:
        cluster.client.unregister_scheduler_plugin("backlog")
    # of 144, and not the 36 of each node at once; Dask alone has 2 or 3
    assert most <= 8


def test_a_task_that_a_user_restricts_runs_where_the_user_says(cluster: Cluster) -> None:
    only = next(iter(cluster.client.scheduler_info(n_workers=-1)["workers"]))
    with dask.annotate(workers=[only]):
        lazy = cluster.lazy() + 0
    before = {node.node: node.misses for node in xzcache.cluster_info(cluster.client)}
    assert lazy.sum().compute(optimize_graph=False) == cluster.dataset.values.sum()
    after = xzcache.cluster_info(cluster.client)
    assert [list(node.workers) for node in after if node.misses > before[node.node]] == [[only]]


class Odd:
    """An array that is nothing that affinity knows."""

    shape, dtype, ndim = (40, 4), np.dtype("f8"), 2

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble

    @property
    def array(self) -> Any:
        if self.trouble == "raises":
            raise RuntimeError("no")
        return self

    @property
    def key(self) -> Any:
        return self

    tuple = (None, "?")

    def __getitem__(self, index: Any) -> Any:
        return np.ones(self.shape)[index]


@pytest.mark.parametrize("trouble", ["raises", "leads to itself"])
def test_what_it_does_not_understand_is_left_to_dask(trouble: str, cluster: Cluster) -> None:
    client = cluster.client
    odd = da.from_array(Odd(trouble), chunks=(1, 4), asarray=False)
    both = da.concatenate([odd.sum(axis=1), cluster.lazy().sum(axis=1)])
    assert both.sum().compute() == 160 + cluster.dataset.values.sum()
    many = client.map(lambda number: number + 1, range(100), pure=False)
    assert sum(client.gather(many)) == 5050
    # it is on again for whoever registers it
    client.unregister_worker_plugin("xzcache")
    client.register_plugin(xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto"))
    lazy = cluster.lazy()
    lazy.sum().compute()
    assert cluster.requests(lambda: lazy.max().compute()) < cluster.dataset.chunks / 4


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"affinity='always' is not accepted: give \"off\", \"auto\" or \"on\""):
        xzcache.CachePlugin(affinity="always")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="affinity=True"):
        xzcache.CachePlugin(affinity=True)  # type: ignore[arg-type]


def test_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    def plugins(client: Client) -> bool:
        return client.run_on_scheduler(lambda dask_scheduler: "xzcache-affinity" in dask_scheduler.plugins)

    with nodes(tmp_path, 1) as client:
        client.register_plugin(xzcache.CachePlugin(max_size="1 MB", min_free=0))
        assert not plugins(client)
        client.register_plugin(xzcache.CachePlugin(affinity="on"))
        assert plugins(client)
        client.register_plugin(xzcache.CachePlugin(policy="lru"))
        assert plugins(client)
        client.register_plugin(xzcache.CachePlugin(affinity="off"))
        assert not plugins(client)


# -- workers that come and go


def _wait(block: Any, name: str) -> Any:
    Event(name).wait("60s")
    return block


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "retired"])
def test_a_worker_that_goes_in_the_middle_takes_nothing_with_it(end: str, tmp_path: Path) -> None:
    with nodes(tmp_path, NODES) as client, xzcache.config.set(directory=None):
        client.register_plugin(xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto"))
        cluster = Cluster(client, tmp_path)
        lazy = cluster.lazy()
        lazy.max().compute()
        gate = Event(end)
        future = client.compute(lazy.map_blocks(_wait, end, meta=np.empty((0, 0))).sum())
        until(lambda: any(client.processing().values()))
        gone, pid = next(iter(pids(client).items())) if end == "killed" else (next(iter(client.nthreads())), 0)
        if end == "killed":
            os.kill(pid, signal.SIGKILL)
            until(lambda: gone not in client.scheduler_info(n_workers=-1)["workers"])
            gate.set()
        else:
            gate.set()
            client.retire_workers([gone])
        assert future.result(timeout=60) == cluster.dataset.values.sum()
        assert lazy.min().compute() == 0
        keys: Counter[str] = cluster.dataset.chunk_requests()
        # what the others had, they did not fetch again
        assert sum(keys.values()) < 2 * cluster.dataset.chunks


@pytest.mark.timeout(300)
@pytest.mark.soak
def test_a_node_that_answers_no_more_takes_nothing_with_it(tmp_path: Path) -> None:
    """As a node does from which the network has gone: its connections stay, and nothing comes through them."""
    with (
        dask.config.set({"distributed.scheduler.worker-ttl": "1s"}),
        nodes(tmp_path, NODES) as client,
        xzcache.config.set(directory=None),
    ):
        # not the others, which are slow to start on a busy machine
        give_up_after(client, 3600)
        client.register_plugin(xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto"))
        cluster = Cluster(client, tmp_path)
        lazy = cluster.lazy()
        lazy.max().compute()
        gate = Event("frozen")
        future = client.compute(lazy.map_blocks(_wait, "frozen", meta=np.empty((0, 0))).sum())
        until(lambda: all(client.processing().values()))
        gone, pid = next(iter(pids(client).items()))
        os.kill(pid, signal.SIGSTOP)
        give_up_after(client, 5)
        try:
            gate.set()
            assert future.result(timeout=PATIENCE) == cluster.dataset.values.sum()
            until(lambda: gone not in client.scheduler_info(n_workers=-1)["workers"])
        finally:
            # unless Dask has given it up and killed it
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert lazy.min().compute() == 0
        assert sum(cluster.dataset.chunk_requests().values()) < 2 * cluster.dataset.chunks


def test_with_the_tls_of_the_cluster(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    with nodes(tmp_path, NODES, security=Security.temporary()) as client, xzcache.config.set(directory=None):
        assert client.scheduler.address.startswith("tls://")
        client.register_plugin(xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto"))
        cluster = Cluster(client, tmp_path)
        lazy = cluster.lazy()
        assert lazy.sum().compute() == cluster.dataset.values.sum()
        # by chance alone, three of four would be elsewhere; on a busy machine, nodes that are ahead take some of others
        assert cluster.requests(lambda: lazy.std().compute()) < cluster.dataset.chunks / 2


# -- the scheduler itself


class Site:
    """A scheduler and workers as a site runs them, each by a command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self.commands: list[subprocess.Popen[bytes]] = []

    def start(self) -> str:
        """Start all of it, at the same address as before; returns that."""
        where = self._folder / "scheduler.json"
        where.unlink(missing_ok=True)
        self._command("scheduler", "--port", str(self._port), "--scheduler-file", str(where))
        until(where.exists)
        address: str = until(lambda: json.loads(where.read_text() or "{}").get("address"))
        self._port = int(address.rpartition(":")[2])
        for node in range(NODES):
            directory = str(self._folder / f"node{node}")
            self._command("worker", address, "--no-nanny", "--nthreads", "1", XZCACHE_DIRECTORY=directory)
        return address

    def _command(self, *words: str, **env: str) -> None:
        line = [sys.executable, "-m", "dask", *words, "--host", "127.0.0.1", "--no-dashboard"]
        here = Path(__file__).parent
        path = os.pathsep.join((str(here), str(here.parent / "support"), os.environ.get("PYTHONPATH", "")))
        self.commands.append(subprocess.Popen(line, env={**os.environ, "PYTHONPATH": path, **env}))

    def kill_scheduler(self) -> None:
        """SIGKILL, and wait for the workers: those of Dask end when they have lost their scheduler."""
        self.commands[0].kill()
        for command in self.commands:
            command.wait(PATIENCE)
        self.commands.clear()

    def close(self) -> None:
        """SIGKILL: workers of Dask that get SIGTERM while their scheduler closes as well may never end."""
        for command in self.commands:
            command.kill()
        for command in self.commands:
            command.wait()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    made = Site(folder)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.timeout(300)
@pytest.mark.soak
def test_after_the_scheduler_has_gone_and_come_again_blocks_are_where_they_were(tmp_path: Path) -> None:
    """Its run is lost, as without affinity; the next one finds what the nodes have."""
    plugin = xzcache.CachePlugin(max_size="10 MB", min_free=0, affinity="auto")
    with site(tmp_path) as made, xzcache.config.set(directory=None), Client(made.start(), timeout=PATIENCE) as one:
        one.wait_for_workers(NODES)
        one.register_plugin(plugin)
        cluster = Cluster(one, tmp_path)
        lazy = cluster.lazy()
        # others would take the blocks of a worker that is yet importing what it needs
        one.run(_corner, cluster.array())
        one.compute(lazy.max()).result()
        lost = one.compute(lazy.map_blocks(_wait, "never", meta=np.empty((0, 0))).sum())
        until(lambda: all(one.processing().values()))
        made.kill_scheduler()
        with pytest.raises(CancelledError):
            lost.result(timeout=PATIENCE)
        made.start()
        until(lambda: one.status == "running")
        one.wait_for_workers(NODES)
        one.register_plugin(plugin)
        one.run(_corner, cluster.array())
        # by chance alone, three of four would be elsewhere
        assert cluster.requests(lambda: one.compute(lazy.sum()).result()) < cluster.dataset.chunks / 2
        assert one.compute(lazy.sum()).result() == cluster.dataset.values.sum()


def _corner(array: Any) -> Any:
    return array[0, 0]
