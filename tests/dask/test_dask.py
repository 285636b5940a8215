"""Dask: one cache a node for all workers of real clusters, whatever comes, goes, is killed or configured anew."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import dask
import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from clusters import Address, cluster, kill_one, metrics, pids, threads, total
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster, get_task_stream
from distributed.protocol import serialize_bytelist
from processes import PATIENCE, Child, Dataset, Gate, Source, Team, audit, findings, opened_index, until, visit
from servers import S3Server, s3_server, words
from zarr.storage import LocalStore

import xzcache
from xzcache._config import DEFAULTS
from xzcache.dask._cluster import ClusterInfo, Node
from xzcache.directory import Medium, medium_of
from xzcache.directory import _registry as registry
from xzcache.reading import _stats as stats

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# -- what workers are sent to do


def read_by_default(place: str, log: str) -> float:
    """Read an array through the default cache of whichever process this is."""
    store = xzcache.CacheStore(Source(LocalStore(place, read_only=True), log))
    return float(zarr.open_array(store, mode="r", zarr_format=3)[:].sum())


def sum_arrays(*arrays: zarr.Array) -> float:
    return float(sum(array[:].sum() for array in arrays))


def configured() -> dict[str, Any]:
    return {name: xzcache.config.get(name) for name in DEFAULTS}


def directories() -> dict[str, Any]:
    """The directories that a process has open: their reserves and timeouts."""
    return {root: (it.space.min_free, it.session.timeout) for root, it in registry._directories.items()}


# -- data


def write_weather(folder: Path) -> list[Any]:
    """Two arrays of 12 chunks each, in a bucket."""
    group = zarr.create_group(folder / "bucket" / "x.zarr")
    values = np.random.default_rng(1).random((2, 120, 40))
    for name, data in zip("tu", values, strict=True):
        group.create_array(name, data=data, chunks=(10, 40))
    return list(values)


def open_weather(s3: S3Server) -> list[Any]:
    """The two arrays, and no request to come but those for chunks."""
    store = xzcache.CacheStore("s3://bucket/x.zarr", storage_options=words(s3))
    group = zarr.open_group(store, mode="r", zarr_format=3)
    arrays = [group["t"], group["u"]]
    s3.reset()
    return arrays


class Served(NamedTuple):
    """What an S3 server sent."""

    chunks: Counter[str]
    chunk_bytes: int
    objects: int
    bytes: int
    """Of all objects, documents as well."""

    @classmethod
    def by(cls, s3: S3Server) -> Served:
        counts = s3.counts().only("GET")
        chunks = counts.only(path="*/c/*")
        times: Counter[str] = Counter()
        for tally in chunks.tallies:
            times[tally.path] += tally.requests
        return cls(times, chunks.bytes, counts.objects, counts.bytes)


# -- one node: each chunk once, and everybody's figures agree


class Reading(NamedTuple):
    served: Served
    metrics: dict[Address, dict[str, Any]]
    fine: dict[tuple[str, ...], float]
    nodes: list[Node]


class Story(NamedTuple):
    """Three workers compute; one is killed and a fourth comes; they compute something else."""

    first: Reading
    second: Reading
    seconds_of_tasks: float
    killed: Address
    late: set[Address]
    results: dict[str, float]
    expected: dict[str, float]
    root: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    (t, u), root = write_weather(folder), str(folder / "cache")

    def look(client: Client) -> Reading:
        def settled() -> bool:
            seen = metrics(client)
            # what is in the cache is looked at in the background
            return total(seen, "used") == sum(node.used for node in xzcache.cluster_info(client))

        until(settled)
        fine = client.run_on_scheduler(lambda dask_scheduler: dict(dask_scheduler.cumulative_worker_metrics))
        return Reading(Served.by(s3), metrics(client), fine, list(xzcache.cluster_info(client)))

    with s3_server(folder) as s3, cluster(3) as client:
        client.register_plugin(xzcache.CachePlugin(root, "50 MB"))
        arrays = open_weather(s3)
        lazy_t, lazy_u = map(dask.array.from_zarr, arrays)
        with get_task_stream(client) as stream:
            product = float((lazy_t * lazy_u).mean())
        tasks = [part for task in stream.data for part in task["startstops"] if part["action"] == "compute"]
        first = look(client)
        # a worker tells the index of its reads with the next ones, or when it is asked
        killed = kill_one(client)
        before = set(pids(client))
        client.cluster.scale(4)
        client.wait_for_workers(4)
        late = set(pids(client)) - before
        spread = float(lazy_t.std() + lazy_u.max())
        # whoever came late or instead reads from the cache as well
        for address in pids(client):
            client.submit(sum_arrays, *arrays, workers=[address], pure=False).result()
        second = look(client)
    return Story(
        first,
        second,
        sum(part["stop"] - part["start"] for part in tasks),
        killed,
        late,
        {"product": product, "spread": spread},
        {"product": float((t * u).mean()), "spread": float(t.std() + u.max())},
        root,
    )


def test_the_results_are_right(story: Story) -> None:
    assert story.results == pytest.approx(story.expected)


def test_every_chunk_is_asked_of_the_source_once(story: Story) -> None:
    for reading in (story.first, story.second):
        assert set(reading.served.chunks.values()) == {1}
        assert len(reading.served.chunks) == 24


def test_the_figures_of_workers_are_those_of_the_server(story: Story) -> None:
    seen, served = story.first.metrics, story.first.served
    assert total(seen, "misses") == served.objects == 24
    assert total(seen, "bytes_from_source") == served.bytes
    assert total(seen, "hits") == total(seen, "bytes_from_cache") == 0
    # of the three workers of a node, one shows what they share
    assert sorted(worker["used"] for worker in seen.values()) == [0, 0, served.bytes]
    assert sorted(worker["bound"] for worker in seen.values()) == [0, 0, 50_000_000]
    assert {worker["node"] for worker in seen.values()} == {story.first.nodes[0].node}


def test_whoever_comes_late_reads_from_the_cache(story: Story) -> None:
    seen, newcomers = story.second.metrics, set(story.second.metrics) - set(story.first.metrics)
    assert len(seen) == 4
    assert story.killed not in seen
    assert story.late < newcomers
    assert len(newcomers) == 2
    for address in newcomers:
        assert seen[address]["misses"] == story.second.served.objects - 24 == 0
        assert seen[address]["hits"] >= 24
        assert seen[address]["bytes_from_cache"] >= story.second.served.chunk_bytes


def of_tasks(fine: dict[tuple[str, ...], float], where: str, unit: str) -> float:
    return sum(
        value for (context, *_, label, of), value in fine.items() if (context, label, of) == ("execute", where, unit)
    )


def test_tasks_say_what_they_read(story: Story) -> None:
    fine, served = story.first.fine, story.first.served
    assert of_tasks(fine, "xzcache-source", "bytes") == served.bytes
    assert of_tasks(fine, "xzcache-source", "count") == served.objects
    assert of_tasks(fine, "xzcache-cache", "count") == of_tasks(fine, "xzcache-cache", "bytes") == 0
    assert 0 < of_tasks(fine, "xzcache-source", "seconds") <= story.seconds_of_tasks
    again = story.second.fine
    # the dead worker's as well
    assert of_tasks(again, "xzcache-source", "bytes") == story.second.served.bytes
    # one for what is computed of both arrays, and one for each worker
    assert of_tasks(again, "xzcache-cache", "bytes") == 5 * served.chunk_bytes
    assert of_tasks(again, "xzcache-cache", "count") == 5 * 24


def test_one_row_for_the_node(story: Story) -> None:
    (first,), (second,) = story.first.nodes, story.second.nodes
    assert first.node == second.node
    assert (len(first.workers), len(second.workers)) == (3, 4)
    for node in (first, second):
        assert node.directory == story.root
        assert (node.used, node.bound, node.entries) == (story.first.served.bytes, 50_000_000, 24)
    assert (first.hits, first.misses, first.saved_bytes, first.saved_seconds) == (0, 24, 0, 0)
    assert second.hits == total(story.second.metrics, "hits") == 5 * 24
    # those of the worker that was killed are remembered
    assert total(story.second.metrics, "misses") < 24 == second.misses
    assert (second.ever.hits, second.ever.misses) == (second.hits, second.misses)
    assert second.saved_bytes == total(story.second.metrics, "bytes_from_cache")
    assert second.saved_seconds >= 0


def test_the_account_is_what_is_on_disk(story: Story) -> None:
    visit(story.root)
    assert audit(story.root) == 24


@pytest.mark.slow
def test_a_warm_session_saves_about_what_a_cold_one_took(tmp_path: Path) -> None:
    """Seconds on the clock, whether or not reads are parallel, and although the session has no miss of its own."""
    write_weather(tmp_path)

    def session(s3: S3Server) -> tuple[float, Any]:
        with cluster(2) as client:
            client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
            arrays, workers = open_weather(s3), list(client.scheduler_info()["workers"])
            began = time.perf_counter()
            client.gather([client.submit(sum_arrays, *arrays, workers=[name], pure=False) for name in workers])
            seconds = time.perf_counter() - began
            (node,) = xzcache.cluster_info(client, PATIENCE)
            return seconds, node

    with s3_server(tmp_path, latency=0.3) as s3:
        cold, first = session(s3)
        warm, second = session(s3)
    assert (first.misses, second.misses) == (24, 0)
    assert second.hits == 48
    # four rounds of requests, of 0.3 s each, is the least that the cold session has waited
    assert 0.5 * 1.2 - warm <= second.saved_seconds <= 2.5 * cold
    assert second.saved_seconds == pytest.approx(second.ever.seconds_saved - first.ever.seconds_saved, abs=0.1)


# -- several nodes


class Nodes(NamedTuple):
    """Four workers on three simulated nodes, each with its own way to say where its cache is."""

    empty: Any
    """Before anything was read, and before there was a plugin."""
    info: Any
    served: Served
    where: dict[int, str]
    without_plugin: dict[int, str]
    expected: dict[int, str]
    read_by: dict[int, int]
    chunks: int


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    write_weather(folder)
    for name in ("scratch", "tmp"):
        (folder / name).mkdir()
    mine = f"xzcache-{os.getuid()}"
    expected = {0: "own", 1: "own", 2: f"scratch/{mine}", 3: f"tmp/{mine}"}
    nothing = {"XZCACHE_DIRECTORY": "", "XDG_CACHE_HOME": str(folder / "home")}
    options: list[dict[str, Any]] = [
        {"env": {"XZCACHE_DIRECTORY": str(folder / "own")}},
        {"env": {"XZCACHE_DIRECTORY": str(folder / "own")}},
        {"env": nothing, "config": {"temporary-directory": str(folder / "scratch")}},
        {"env": {**nothing, "TMPDIR": str(folder / "tmp")}},
    ]
    workers = {name: {"cls": Nanny, "options": {"nthreads": 1, **of}} for name, of in enumerate(options)}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0"}}
    with s3_server(folder) as s3, SpecCluster(workers, scheduler=scheduler) as made, Client(made) as client:
        client.wait_for_workers(4)
        names = {worker["name"]: address for address, worker in client.scheduler_info()["workers"].items()}
        empty, without = xzcache.cluster_info(client, PATIENCE), client.run(_default)
        with xzcache.config.set(directory=None):
            client.register_plugin(xzcache.CachePlugin())
        arrays = open_weather(s3)
        for address in names.values():
            client.submit(sum_arrays, *arrays, workers=[address], pure=False).result()
        info, where = xzcache.cluster_info(client, PATIENCE), client.run(_default)
        yield Nodes(
            empty,
            info,
            Served.by(s3),
            {name: where[address] for name, address in names.items()},
            {name: without[address] for name, address in names.items()},
            {name: str(folder / path) for name, path in expected.items()},
            {name: sum(names[name] in node.workers for node in info) for name in names},
            24,
        )
    for place in set(expected.values()):
        audit(str(folder / place))


def _default() -> str:
    from xzcache._caches import default_directory

    return str(default_directory())


def test_where_the_cache_of_a_node_is(nodes: Nodes) -> None:
    assert nodes.where == nodes.expected


def test_the_environment_of_workers_says_where_without_the_plugin(nodes: Nodes) -> None:
    assert {nodes.without_plugin[name] for name in (0, 1)} == {nodes.expected[0]}
    (at_home,) = {nodes.without_plugin[name] for name in (2, 3)}
    assert at_home.endswith("home/xzcache")


def test_workers_that_have_no_cache_yet(nodes: Nodes) -> None:
    assert {node.directory for node in nodes.empty} == set(nodes.without_plugin.values())
    assert len(nodes.empty) == 2
    for node in nodes.empty:
        assert len(node.workers) == 2
        nothing = (node.used, node.entries, node.hits, node.misses, node.saved_bytes, node.saved_seconds)
        assert nothing == (0,) * 6


def test_every_chunk_is_asked_for_once_a_node(nodes: Nodes) -> None:
    assert len(nodes.served.chunks) == nodes.chunks
    assert set(nodes.served.chunks.values()) == {3}
    assert sum(node.misses for node in nodes.info) == nodes.served.objects


def test_a_row_for_each_node(nodes: Nodes) -> None:
    assert set(nodes.read_by.values()) == {1}
    assert len({node.node for node in nodes.info}) == len(nodes.info) == 3
    by_directory = {node.directory: node for node in nodes.info}
    assert set(by_directory) == set(nodes.expected.values())
    for directory, node in by_directory.items():
        shared = len([name for name, path in nodes.expected.items() if path == directory])
        assert len(node.workers) == shared
        assert (node.misses, node.hits) == (24, 24 * (shared - 1))
        assert node.entries == 24
        assert node.used * 3 == nodes.served.bytes
        assert node.saved_bytes == (shared - 1) * node.used
        assert len(node.hosts) == 1


COLUMNS = ["node", "hosts", "workers", "directory", "used", "bound", "entries", "hits", "misses", "saved"]


def test_the_table(nodes: Nodes) -> None:
    title, head, *rows = repr(nodes.info).splitlines()
    assert title == "<xzcache: 3 nodes>"
    assert head.split() == COLUMNS
    assert len(rows) == 3
    for row, node in zip(rows, nodes.info, strict=True):
        assert row.startswith(node.node[:8])
        assert node.directory in row.split()
        assert "10.7 GB" in row


def test_the_table_in_a_notebook(nodes: Nodes) -> None:
    from pages import Page

    page = Page(nodes.info._repr_html_())
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    head, cells = page.texts[:10], page.texts[10:]
    assert head == COLUMNS
    rows = [dict(zip(head, cells[at : at + 10], strict=True)) for at in range(0, 30, 10)]
    assert [row["directory"] for row in rows] == [node.directory for node in nodes.info]
    assert [row["misses"] for row in rows] == ["24"] * 3


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "2 MB"), (1e-9, "2 MB"), (0.25, "2 MB, 250 ms"), (90, "2 MB, 90 s")]
)
def test_seconds_that_cannot_be_quoted_are_not_shown(seconds: float, shown: str) -> None:
    node = Node("a" * 32, ("here",), ("tcp://here:1",), "/cache", 5, None, 1, 20, 0, 2_000_000, seconds)
    assert repr(ClusterInfo((node,))).endswith(f"  {shown}")


def test_a_hostile_directory_is_only_text(tmp_path: Path) -> None:
    from pages import HOSTILE, Page

    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / HOSTILE))
        page = Page(xzcache.cluster_info(client)._repr_html_())
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert str(tmp_path / HOSTILE) in page.texts


def test_the_plot(nodes: Nodes) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = nodes.info.plot()
    assert [label.get_text()[:8] for label in ax.get_yticklabels()] == [node.node[:8] for node in nodes.info]
    hits = sorted(bar.get_width() for bar in ax.containers[0])
    assert hits == [0, 0, 50]
    assert all(0 < bar.get_width() < 1 for bar in ax.containers[1])
    _, mine = plt.subplots()
    assert nodes.info.plot(ax=mine) is mine
    ax.figure.canvas.draw()
    plt.close("all")


# -- workers that come and go


def check_one_cache(client: Client, root: str, workers: int) -> Node:
    """Every worker of a cluster has the same cache, and knows it."""
    (node,) = xzcache.cluster_info(client)
    assert node.directory == root
    assert len(node.workers) == workers
    assert {worker["node"] for worker in metrics(client).values()} == {node.node}
    return node


def test_one_cache_whoever_comes_and_goes(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    with cluster(1) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 MB"))
        node = check_one_cache(client, ds.root, 1)
        client.submit(ds.read, pure=False).result()
        client.cluster.scale(2)
        client.wait_for_workers(2)
        assert check_one_cache(client, ds.root, 2).node == node.node
        kill_one(client)
        assert check_one_cache(client, ds.root, 2).bound == 1_000_000
        client.restart()
        assert check_one_cache(client, ds.root, 2).entries == node.entries + 17
        assert {found["max_size"] for found in client.run(configured).values()} == {1_000_000}
        for address in pids(client):
            client.submit(ds.read, workers=[address], pure=False).result()
        assert set(ds.chunk_requests().values()) == {1}
        client.cluster.scale(1)
        until(lambda: len(client.scheduler_info()["workers"]) == 1)
        check_one_cache(client, ds.root, 1)
    visit(ds.root)
    assert audit(ds.root) == 17


def test_a_cluster_that_adapts(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    ds = Dataset(tmp_path, side=2, gate=gate)
    with cluster(0) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 MB"))
        client.cluster.adapt(minimum=0, maximum=2, interval="50ms", target_duration="1ms", wait_count=2)
        reads = [client.submit(ds.read, pure=False) for _ in range(4)]
        client.wait_for_workers(2)
        gate.arrival()
        gate.open()
        client.gather(reads)
        assert set(ds.chunk_requests().values()) == {1}
        # a result that somebody holds keeps a worker
        del reads
        until(lambda: not client.scheduler_info()["workers"])
        client.submit(ds.read, pure=False).result()
    assert set(ds.chunk_requests().values()) == {1}
    assert audit(ds.root) == 5
    gate.close()


def test_two_clusters_share_a_cache_and_the_last_to_leave_takes_it_away(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with cluster(1) as one:
        with cluster(1) as other:
            for client in (one, other):
                client.register_plugin(xzcache.CachePlugin(ds.root, remove_on_close=True))
                client.submit(ds.read, pure=False).result()
            assert check_one_cache(one, ds.root, 1).node == check_one_cache(other, ds.root, 1).node
            kill_one(other)
            # what is registered anew leaves nothing for good
            other.register_plugin(xzcache.CachePlugin(ds.root, "1 MB", remove_on_close=True))
            assert check_one_cache(other, ds.root, 1).bound == 1_000_000
        assert check_one_cache(one, ds.root, 1).entries == 5
        one.submit(ds.read, pure=False).result()
        assert set(ds.chunk_requests().values()) == {1}
    assert not os.path.exists(ds.root)


# -- taking the cache away


def _stay(link: Any, root: str) -> None:
    store = xzcache.LockedLocalStore(root)
    assert store.directory.prepare()
    link.send("in")
    link.recv()
    del store


def test_a_cache_that_others_use_is_kept(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with Team() as team:
        other: Child = team.start(_stay, ds.root)
        other.hear("in")
        with threads(2) as client:
            client.register_plugin(xzcache.CachePlugin(ds.root, remove_on_close=True))
            client.submit(ds.read, pure=False).result()
        assert ds.keys()
        ds.read()
        assert set(ds.chunk_requests().values()) == {1}
        other.send("go")
        other.result()
    # this process uses it still, whatever workers it once had
    held = ds.store()
    held.cache_info()
    with Team() as team:
        team.start(_be_the_last_worker, ds.root).result()
    assert os.path.exists(ds.root)
    ds.read()
    held.close()
    assert set(ds.chunk_requests().values()) == {1}


def _be_the_last_worker(link: Any, root: str) -> None:
    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(root, remove_on_close=True))


def test_the_last_worker_of_a_process_takes_the_cache_away(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with threads(3) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, remove_on_close=True))
        client.submit(ds.read, pure=False).result()
        client.cluster.scale(1)
        until(lambda: len(client.scheduler_info()["workers"]) == 1)
        assert os.path.exists(ds.root)
        client.submit(ds.read, pure=False).result()
        assert set(ds.chunk_requests().values()) == {1}
    assert not os.path.exists(ds.root)


def test_only_what_is_the_caches_own_is_taken_away(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    root = Path(ds.root)
    root.mkdir()
    (root / "mine").write_text("mine")
    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(root, remove_on_close=True))
        client.submit(ds.read, pure=False).result()
        (entry,) = root.glob("*/c/0/1")
        entry.unlink()
        entry.write_text("mine")
        (entry.parent / "7").write_text("mine")
        (root / "folder").mkdir()
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert left == sorted(["mine", str(entry.relative_to(root)), str(entry.relative_to(root).parent / "7")])
    assert {(root / name).read_text() for name in left} == {"mine"}


def test_a_task_that_still_runs_does_not_bring_the_cache_back(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    ds = Dataset(tmp_path, side=2, gate=gate)
    with cluster(1) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, remove_on_close=True))
        (pid,) = pids(client).values()
        reading = client.submit(ds.read, pure=False)
        gate.arrival()
        closing = threading.Thread(target=client.cluster.close)
        closing.start()
        until(lambda: not os.path.exists(ds.root))
        gate.open()
        closing.join()
        del reading
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    gate.close()
    assert not os.path.exists(ds.root)


def test_by_default_the_cache_is_kept(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root))
        client.submit(ds.read, pure=False).result()
    registry._directories[ds.root].close()
    assert audit(ds.root) == 5


# -- what the plugin configures


SETTINGS: dict[str, Any] = {
    "max_size": "3 MB",
    "min_free": "1 kB",
    "max_age_seconds": 77,
    "missing_max_age_seconds": 55,
    "revalidate": False,
    "cache_set_data": False,
    "policy": "lru",
    "upstream": "fsspec",
    "pipeline": False,
    "promote_above": "2 MB",
    "fetch_timeout": 3,
    "lock_timeout": 4,
    "peer_timeout": 6,
    "threads": 2,
}
PARSED = {**SETTINGS, "max_size": 3_000_000, "min_free": 1000, "promote_above": 2_000_000, "trace": None}


def test_the_settings_of_the_client_are_those_of_the_workers(tmp_path: Path) -> None:
    given = {"max_size": "3 MB", "max_age_seconds": 77, "revalidate": False}
    theirs = {name: value for name, value in SETTINGS.items() if name not in given}
    assert SETTINGS.keys() == DEFAULTS.keys() - {"directory", "trace"}
    env = {f"XZCACHE_{name.upper()}": str(value) for name, value in DEFAULTS.items() if value is not None}
    with cluster(1, env=env) as client:
        before = client.run(configured)
        with xzcache.config.set({"directory": str(tmp_path / "of the client"), **theirs}):
            client.register_plugin(xzcache.CachePlugin(**given))
        # what the client says later is another matter
        (after,) = client.run(configured).values()
        assert after == {"directory": str(tmp_path / "of the client"), **PARSED}
        client.unregister_worker_plugin("xzcache")
        assert client.run(configured) == before
        assert not any(metrics(client).values())
        assert client.run(_observed) == dict.fromkeys(before, 0)


def _observed() -> int:
    return len(stats.observers)


def test_where_by_argument(tmp_path: Path) -> None:
    with threads(1) as client, xzcache.config.set(directory=str(tmp_path / "configured")):
        client.register_plugin(xzcache.CachePlugin(tmp_path / "given"))
        assert xzcache.cluster_info(client)[0].directory == str(tmp_path / "given")
        # what is not given stays
        client.register_plugin(xzcache.CachePlugin(policy="lru"))
        assert xzcache.cluster_info(client)[0].directory == str(tmp_path / "given")
        client.unregister_worker_plugin("xzcache")
        client.register_plugin(xzcache.CachePlugin())
        assert xzcache.cluster_info(client)[0].directory == str(tmp_path / "configured")


def test_a_second_registration_changes_what_it_gives(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with cluster(1) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, "2 MB", min_free="1 kB", lock_timeout=7, revalidate=False))
        node = check_one_cache(client, ds.root, 1)
        client.submit(ds.read, pure=False).result()
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 MB", min_free="2 kB", lock_timeout=9))
        again = check_one_cache(client, ds.root, 1)
        assert (again.node, again.bound) == (node.node, 1_000_000)
        assert again.entries == 5
        for found in client.run(configured).values():
            assert (found["max_size"], found["min_free"], found["revalidate"]) == (1_000_000, 2000, False)
        for open_ in client.run(directories).values():
            assert open_[ds.root] == (2000, 9.0)
        # counted once, however often it was registered
        assert set(client.run(_observed).values()) == {1}
        client.register_plugin(xzcache.CachePlugin(tmp_path / "elsewhere"))
        assert check_one_cache(client, str(tmp_path / "elsewhere"), 1).bound == 1_000_000
    assert audit(ds.root) == 5
    assert audit(str(tmp_path / "elsewhere")) == 0


def test_what_a_second_client_does_not_give_stays(tmp_path: Path) -> None:
    with cluster(1) as client, Client(client.scheduler.address) as other:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "chosen", "1 GB", policy="lru"))
        before = client.run(configured)
        with xzcache.config.set(dict(DEFAULTS)):
            other.register_plugin(xzcache.CachePlugin())
        assert client.run(configured) == before
        # the configuration of another client is meant for its own machine
        with xzcache.config.set(directory=str(tmp_path / "configured"), min_free="7%", max_size="7 GB", policy="none"):
            other.register_plugin(xzcache.CachePlugin())
            assert client.run(configured) == before
            other.register_plugin(xzcache.CachePlugin(max_age_seconds=5))
        (after,) = client.run(configured).values()
        (was,) = before.values()
        assert after == {**was, "max_age_seconds": 5}
        # workers that join later get what all clients have given
        client.cluster.scale(2)
        client.wait_for_workers(2)
        assert list(client.run(configured).values()) == [after, after]
        client.restart()
        assert list(client.run(configured).values()) == [after, after]


def test_after_the_plugin_was_removed_the_next_begins_anew(tmp_path: Path) -> None:
    with cluster(1) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", policy="lru", remove_on_close=True))
        client.unregister_worker_plugin("xzcache")
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
        assert [found["policy"] for found in client.run(configured).values()] == ["adaptive"]
    assert (tmp_path / "cache").exists()


def test_what_was_preloaded_stays_where_a_client_gives_nothing(tmp_path: Path) -> None:
    async def preload(dask_worker: Any) -> None:
        with xzcache.config.set(directory=f"{place}/{dask_worker.name}", policy="lru", threads=3):
            await xzcache.dask.dask_setup(dask_worker)

    place = str(tmp_path)
    with cluster(2) as client:
        client.run(preload)
        with xzcache.config.set(directory=str(tmp_path / "client"), policy="none"):
            client.register_plugin(xzcache.CachePlugin(max_size="1 MB"))
        found = client.run(configured).values()
        assert sorted(of["directory"] for of in found) == [f"{place}/0", f"{place}/1"]
        assert {(of["policy"], of["threads"], of["max_size"]) for of in found} == {("lru", 3, 1_000_000)}


def test_a_scheduler_that_cannot_take_the_plugin_keeps_no_settings(tmp_path: Path) -> None:
    def refuse(dask_scheduler: Any) -> None:
        # as one without this package does
        dask_scheduler.handlers["register_scheduler_plugin"] = no_such_module

    async def no_such_module(**_: Any) -> None:
        raise ModuleNotFoundError("No module named 'xzcache'")

    with threads(1) as client:
        client.run_on_scheduler(refuse)
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", "1 GB"))
        assert xzcache.cluster_info(client)[0].bound == 1_000_000_000
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", policy="lru"))
        assert xzcache.config.get("policy") == "lru"
    assert configured()["policy"] != "lru"


def test_of_two_plugins_the_one_that_is_left_is_shown(tmp_path: Path) -> None:
    with cluster(1) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "left", "1 GB"))
        client.register_plugin(xzcache.CachePlugin(tmp_path / "gone", "2 GB"), name="other")
        assert [worker["bound"] for worker in metrics(client).values()] == [2_000_000_000]
        client.unregister_worker_plugin("other")
        assert [worker["bound"] for worker in metrics(client).values()] == [1_000_000_000]
        client.unregister_worker_plugin("xzcache")
        assert not any(metrics(client).values())


def test_workers_of_one_process_are_configured_anew_as_well(tmp_path: Path) -> None:
    before = configured()
    with threads(2) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "one", "1 MB", max_age_seconds=5))
        client.register_plugin(xzcache.CachePlugin(tmp_path / "other", max_age_seconds=7))
        (node,) = xzcache.cluster_info(client)
        assert (node.directory, node.bound) == (str(tmp_path / "other"), 1_000_000)
        assert xzcache.config.get("max_age_seconds") == 7
        assert len(stats.observers) == 1
    assert configured() == before
    assert not stats.observers


def test_workers_of_one_process_count_once(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    before = xzcache.store.process.as_dict()
    with threads(3) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root))
        for address in client.scheduler_info()["workers"]:
            client.submit(ds.read, workers=[address], pure=False).result()
        (node,) = xzcache.cluster_info(client)
        assert len(node.workers) == 3
        assert node.misses - before["misses"] >= 16
        now = xzcache.store.process.as_dict()
        assert (node.hits, node.misses) == (now["hits"], now["misses"])
        assert node.saved_bytes == now["bytes_from_cache"]


def test_a_plugin_that_several_workers_share(tmp_path: Path) -> None:
    before = configured()
    plugin = xzcache.CachePlugin(tmp_path / "cache", "1 MB", remove_on_close=True)
    with threads(2, plugins=(plugin,)) as client:
        (node,) = xzcache.cluster_info(client)
        assert (len(node.workers), node.bound) == (2, 1_000_000)
        assert all("hits" in worker for worker in metrics(client).values())
    assert configured() == before
    assert not stats.observers
    assert not (tmp_path / "cache").exists()


def check_without_a_cache(client: Client, ds: Dataset, plugin: xzcache.CachePlugin, cause: str) -> None:
    """Workers say who they are and what is the matter, to whoever has a client, and compute all the same."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        client.register_plugin(plugin)
        addresses = set(pids(client))
        warned = until(lambda: len(said) >= len(addresses) and [str(warning.message) for warning in said])
    assert {text.split(" has no cache, and reads from the source: ")[0] for text in warned} == addresses
    assert all(cause in text and str(plugin.directory) in text for text in warned)
    # what was opened on the client, and what is opened by a task
    store = xzcache.CacheStore(Source(LocalStore(ds.place, read_only=True), ds.log))
    assert dask.array.from_zarr(store).sum().compute() == ds.values.sum()
    for address in addresses:
        read = client.submit(read_by_default, ds.place, ds.log, workers=[address], pure=False)
        assert read.result() == ds.values.sum()
    # one read by all together, and one by each
    assert set(ds.chunk_requests().values()) == {1 + len(addresses)}
    for node in xzcache.cluster_info(client):
        assert (node.node, node.used, node.entries, node.hits) == ("", 0, 0, 0)


def test_a_directory_that_cannot_be_made_on_a_worker(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with cluster(2) as client:
        # nobody makes directories there, whoever they are
        check_without_a_cache(client, ds, xzcache.CachePlugin("/proc/xzcache"), "No such file or directory")


def test_a_file_where_the_directory_should_be_on_a_worker(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=2)
    with cluster(1) as client:
        plugin = xzcache.CachePlugin(tmp_path / "file")
        # it is a matter of the worker's machine, and not known where the plugin is made
        (tmp_path / "file").write_text("in the way")
        check_without_a_cache(client, ds, plugin, "is a file")
        (tmp_path / "file").unlink()
        client.register_plugin(plugin)
        assert check_one_cache(client, str(tmp_path / "file"), 1).node
    assert audit(str(tmp_path / "file")) == 0


@pytest.mark.filterwarnings("ignore:.*has no cache:UserWarning")
def test_a_plugin_that_cannot_be_set_up_leaves_no_trace(tmp_path: Path) -> None:
    before = configured()
    with threads(1) as client:
        plugin = xzcache.CachePlugin(tmp_path / "file")
        (tmp_path / "file").write_text("in the way")
        client.register_plugin(plugin)
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
    assert configured() == before
    assert not stats.observers
    assert (tmp_path / "file").read_text() == "in the way"


def _read_from_a_disk_that_is_read_only(link: Any, folder: str) -> None:
    _with_own_mounts()
    ds = Dataset(Path(folder) / "data", side=2)
    _mount("tmpfs", f"{folder}/disk", "tmpfs", MS_RDONLY, None)
    with threads(1) as client:
        check_without_a_cache(client, ds, xzcache.CachePlugin(f"{folder}/disk/cache"), "Read-only file system")


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("directory", 3, TypeError, "a directory of this user's"),
    ("directory", b"cache", TypeError, "a directory of this user's"),
    ("directory", __file__, ValueError, "a directory of this user's"),
    ("directory", __file__ + "/beneath", ValueError, "a directory of this user's"),
    ("directory", "s3://bucket/cache", ValueError, "a directory of this user's"),
    ("max_size", "plenty", ValueError, "a whole number of bytes"),
    ("max_size", -1, ValueError, "a whole number of bytes"),
    ("max_size", 1.5, TypeError, "a whole number of bytes"),
    ("min_free", 1.0, ValueError, "a share"),
    ("max_age_seconds", "long", ValueError, "a number of seconds"),
    ("revalidate", "never", ValueError, '"open"'),
    ("cache_set_data", "no", TypeError, "True or False"),
    ("policy", "fifo", ValueError, '"lru"'),
    ("upstream", "curl", ValueError, '"obstore"'),
    ("fetch_timeout", 0, ValueError, "above 0"),
    ("lock_timeout", "5 s", TypeError, "above 0"),
    ("peer_timeout", 0, ValueError, "above 0"),
    ("threads", 0, ValueError, "1 or more"),
    ("remove_on_close", "yes", TypeError, "True or False"),
]


@pytest.mark.parametrize(("name", "value", "error", "accepted"), BAD)
def test_a_bad_argument_is_named(name: str, value: Any, error: type[Exception], accepted: str) -> None:
    with pytest.raises(error) as caught:
        xzcache.CachePlugin(**{name: value})
    said = str(caught.value)
    # a URL may hold a password
    assert said.startswith(f"{name}={value!r}" if "://" not in str(value) else name)
    assert accepted in said


def test_an_argument_that_there_is_not() -> None:
    with pytest.raises(TypeError, match=r"'max_sise', did you mean max_size\?"):
        xzcache.CachePlugin(max_sise="1 GB")  # type: ignore[call-arg]


def test_the_plugin_is_small_and_has_no_state(tmp_path: Path) -> None:
    plugin = xzcache.CachePlugin(tmp_path / "cache", "1 MB", remove_on_close=True)
    fresh = pickle.dumps(plugin)
    assert len(fresh) < 600
    with threads(1, plugins=(plugin,)) as client:
        assert pickle.dumps(plugin) == fresh
        copy = pickle.loads(cloudpickle.dumps(plugin))
        client.register_plugin(copy)
    assert pickle.dumps(plugin) == fresh
    assert repr(copy) == repr(pickle.loads(fresh)) == repr(plugin)
    assert "max_size=1000000" in repr(plugin)


# -- without the plugin


def test_each_process_uses_its_own_default_cache(tmp_path: Path) -> None:
    ds, theirs = Dataset(tmp_path, side=4), str(tmp_path / "theirs")
    with xzcache.config.set(directory=str(tmp_path / "ours")), cluster(1, env={"XZCACHE_DIRECTORY": theirs}) as client:
        assert read_by_default(ds.place, ds.log) == ds.values.sum()
        assert client.submit(read_by_default, ds.place, ds.log, pure=False).result() == ds.values.sum()
        # what was opened here is read through their cache there
        store = xzcache.CacheStore(Source(LocalStore(ds.place, read_only=True), ds.log))
        assert dask.array.from_zarr(store).sum().compute() == ds.values.sum()
        (node,) = xzcache.cluster_info(client)
        assert (node.directory, node.entries) == (theirs, 17)
        assert not any(metrics(client).values())
    assert set(ds.chunk_requests().values()) == {2}
    assert audit(theirs) == 17


def test_a_dataset_that_was_opened_on_the_client(tmp_path: Path) -> None:
    expected = xr.Dataset({name: ("x", np.random.default_rng(3).random(40)) for name in "tu"})
    expected.to_zarr(tmp_path / "x.zarr", encoding={name: {"chunks": (10,)} for name in "tu"})
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    with xzcache.config.set(directory=ours), cluster(1, env={"XZCACHE_DIRECTORY": theirs}) as client:
        ds = xr.open_zarr(str(tmp_path / "x.zarr"), engine="zcache")
        xr.testing.assert_identical(client.compute(ds).result(), expected)
        xr.testing.assert_identical(ds.compute(), expected)
        (node,) = xzcache.cluster_info(client)
        assert (node.directory, node.hits, node.misses) == (theirs, 8, 8)
        assert node.entries == 8
    assert audit(theirs) == 8
    assert not list(Path(ours).glob("*/t/c/*"))


def test_the_environment_of_workers_counts_in_a_script_as_well(tmp_path: Path) -> None:
    """Where the main module imports the package, it is imported before a nanny sets most of the environment."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import dask
            import xzcache
            from distributed import Client, LocalCluster

            if __name__ == "__main__":
                env = {"XZCACHE_DIRECTORY": sys.argv[1], "XZCACHE_MAX_SIZE": "3 MB"}
                dask.config.set({"distributed.nanny.pre-spawn-environ": env})
                with LocalCluster(n_workers=1, dashboard_address=":0") as cluster, Client(cluster) as client:
                    print(xzcache.cluster_info(client)[0].directory, xzcache.cluster_info(client)[0].bound)
        """)
    )
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env=environment(XDG_CACHE_HOME=str(tmp_path / "ours")),
    )
    assert result.stdout.split() == [str(tmp_path / "theirs"), "3000000"]


def test_no_workers_no_rows() -> None:
    with threads(0) as client:
        info = xzcache.cluster_info(client)
    assert len(info) == 0
    assert list(info) == []
    assert repr(info).startswith("<xzcache: 0 nodes>")


def test_a_worker_that_does_not_answer_has_no_row(tmp_path: Path) -> None:
    with cluster(2) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
        stopped, well = sorted(pids(client))
        pid = pids(client)[stopped]
        os.kill(pid, signal.SIGSTOP)
        try:
            info = xzcache.cluster_info(client, timeout=2)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert [node.workers for node in info] == [(well,)]
        assert info.unanswered == (stopped,)
        assert f"no answer: {stopped}" in repr(info)
        assert f"no answer: {stopped}" in info._repr_html_()
        again = xzcache.cluster_info(client)
        assert [node.workers for node in again] == [(stopped, well)]
        assert not again.unanswered
        assert "no answer" not in repr(again) + again._repr_html_()


@pytest.mark.parametrize("client", [None, "tcp://127.0.0.1:8786"])
def test_what_is_no_client(client: Any) -> None:
    with pytest.raises(TypeError, match=r"client=.* is not accepted: give a distributed\.Client"):
        xzcache.cluster_info(client)


@pytest.mark.filterwarnings("ignore:.*has no cache:UserWarning")
def test_a_cache_that_cannot_be_used_has_a_row(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".xzcache").write_text("in the way")
    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
        (node,) = xzcache.cluster_info(client)
        assert (node.node, node.directory, node.used, node.entries) == ("", str(tmp_path / "cache"), 0, 0)
        assert all(worker["used"] == 0 for worker in metrics(client).values())


async def test_an_asynchronous_client(tmp_path: Path) -> None:
    async with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0", asynchronous=True) as made,
        Client(made, asynchronous=True) as client,
    ):
        await client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
        (node,) = await xzcache.cluster_info(client)
        assert node.directory == str(tmp_path / "cache")


# -- command lines and configuration files


def environment(**more: str) -> dict[str, str]:
    """No settings but these, and the reserve of the tests."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("XZCACHE_", "DASK_"))}
    return {**mine, "XZCACHE_MIN_FREE": "0", **more}


@contextmanager
def command(*words: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    line = [sys.executable, "-m", "dask", *words]
    with subprocess.Popen(line, env=environment(**env), stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_preloaded_on_command_lines(tmp_path: Path) -> None:
    ds, where = Dataset(tmp_path, side=4), str(tmp_path / "scheduler.json")
    (tmp_path / "xzcache.yaml").write_text("xzcache:\n  max-size: 3 MB\n  threads: 2\n")
    preload = ("--preload", "xzcache.dask", "--scheduler-file", where)
    python = {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    scheduler = command(
        "scheduler", *preload, "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0", **python
    )
    worker = command(
        *("worker", *preload, "--nworkers", "2", "--nthreads", "1", "--no-dashboard"),
        DASK_CONFIG=str(tmp_path),
        DASK_XZCACHE__MAX_AGE_SECONDS="77",
        XZCACHE_DIRECTORY=ds.root,
        **python,
    )
    with scheduler, worker, Client(scheduler_file=where) as client:
        client.wait_for_workers(2)
        for address in pids(client):
            client.submit(ds.read, workers=[address], pure=False).result()
        node = check_one_cache(client, ds.root, 2)
        assert (node.bound, node.entries) == (3_000_000, 17)
        assert total(metrics(client), "hits") == node.hits >= 16
        for found in client.run(configured).values():
            assert (found["max_age_seconds"], found["threads"]) == (77, 2)
        assert set(ds.chunk_requests().values()) == {1}
        plugins = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.plugins))
        assert "xzcache-dashboard" in plugins
        # what the client registers takes the place of what was preloaded
        client.register_plugin(xzcache.CachePlugin(ds.root, "2 MB"))
        assert check_one_cache(client, ds.root, 2).bound == 2_000_000
        assert set(client.run(_observed).values()) == {1}
    visit(ds.root)
    assert audit(ds.root) == 17


LOOK = "import sys, xzcache; print([xzcache.config.get(name) for name in sys.argv[1:]])"


@pytest.mark.parametrize(
    ("env", "file", "expected"),
    [
        ({"DASK_XZCACHE__MAX_SIZE": "50GB", "DASK_XZCACHE__THREADS": "3"}, "", ["50GB", 3]),
        ({"DASK_XZCACHE__MAX_SIZE": "50GB", "XZCACHE_MAX_SIZE": "7 GB"}, "", ["7 GB", 4]),
        ({}, "xzcache:\n  max-size: 3 GB\n", ["3 GB", 4]),
        ({"DASK_XZCACHE__MAX_SIZE": "50GB"}, "xzcache:\n  max_size: 3 GB\n  threads: 2\n", ["50GB", 2]),
        ({"XZCACHE_THREADS": "9"}, "xzcache: {max-size: 3 GB, threads: 2}\n", ["3 GB", 9]),
        ({}, "xzcache:\n", ["10 GiB", 4]),
        ({}, "xzcache: nonsense\n", ["10 GiB", 4]),
    ],
)
def test_dasks_configuration_is_a_source_of_settings(
    env: dict[str, str], file: str, expected: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "any.yaml").write_text(file)
    line = [sys.executable, "-c", LOOK, "max_size", "threads"]
    settings = environment(**env, DASK_CONFIG=str(tmp_path))
    said = subprocess.run(line, env=settings, capture_output=True, text=True, check=True).stdout
    assert said.strip() == repr(expected)


# -- what a task is told to have taken


@pytest.mark.parametrize("pipeline", ["xzcache.pipeline.CachePipeline", "zarr.core.codec_pipeline.FusedCodecPipeline"])
def test_seconds_add_up(pipeline: str, tmp_path: Path) -> None:
    """Of many reads at once each has its own time, of which a task's is made up only once."""
    if not hasattr(zarr.core.codec_pipeline, pipeline.rpartition(".")[2]) and pipeline.startswith("zarr."):
        pytest.skip("this Zarr has no such pipeline")
    ds = Dataset(tmp_path, side=8)
    with threads(2) as client, zarr.config.set({"codec_pipeline.path": pipeline, "codec_pipeline.max_workers": 4}):
        client.register_plugin(xzcache.CachePlugin(ds.root))
        scheduler = client.cluster.scheduler
        for where in ("source", "cache"):
            if where == "cache":
                # each file is verified once, so that Zarr's pipeline reads them in threads of its own the next time
                client.submit(ds.read, pure=False, key="between-1").result()
            with get_task_stream(client) as stream:
                client.submit(ds.read, pure=False, key=f"read{where}-1").result()
            (task,) = [task for task in stream.data if task["key"] == f"read{where}-1"]
            (wall,) = [part["stop"] - part["start"] for part in task["startstops"] if part["action"] == "compute"]

            def seen(unit: str, of: str = where) -> float:
                found = scheduler.cumulative_worker_metrics
                return found.get(("execute", f"read{of}", f"xzcache-{of}", unit), 0)

            until(lambda: metrics(client) and seen("count") >= 64)
            assert seen("bytes") >= ds.values.nbytes
            assert 0 < seen("seconds") <= wall
            shares = [
                value
                for (context, prefix, *_, unit), value in scheduler.cumulative_worker_metrics.items()
                if (context, prefix, unit) == ("execute", f"read{where}", "seconds")
            ]
            assert min(shares) >= 0


# -- the graph


@pytest.mark.parametrize("attributes", [0, 40])
@pytest.mark.parametrize("what", ["all", "mean"])
def test_the_graph_carries_no_cache(what: str, attributes: int, tmp_path: Path) -> None:
    """What is sent to the scheduler for an array of 10,000 chunks grows by a constant, and a small one."""
    place = tmp_path / "x.zarr"
    described = {f"name {i}": f"value {i}" for i in range(attributes)}
    zarr.create_group(LocalStore(place))
    options: dict[str, Any] = {"dtype": "f8", "dimension_names": ["x"], "attributes": described}
    zarr.create_array(LocalStore(place), name="t", shape=(10_000,), chunks=(1,), **options)
    sizes = []
    for engine in ({}, {"engine": "zcache"}):
        data = xr.open_zarr(str(place), consolidated=False, **engine).t.data
        (optimized,) = dask.optimize(data.mean() if what == "mean" else data)
        graph = optimized.__dask_graph__()
        assert len(graph) >= 10_000
        sizes.append((len(cloudpickle.dumps(graph)), sum(map(len, serialize_bytelist(graph, on_error="raise")))))
    growth = [cached - plain for plain, cached in zip(*sizes, strict=True)]
    assert max(growth) < 5000, sizes


# -- file systems that other machines share


_LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 0x40000, 2


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    if _LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def _with_own_mounts() -> None:
    """Mounts of this process are seen by nobody else, and go with it."""
    if _LIBC.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", None, MS_REC | MS_PRIVATE, None)


def _mount_fuse(kind: str, target: str) -> None:
    """A file system of a kind of FUSE's whose server has just gone: the mount is there, and says what it is."""
    os.makedirs(target, exist_ok=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        _mount("server:/data", target, kind, 0, f"fd={device},rootmode=40000,user_id=0,group_id=0")
    finally:
        os.close(device)


def _may_mount() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")


needs_mounts = pytest.mark.skipif(not _may_mount(), reason="mounting takes root and FUSE")


NETWORK = ("fuse.blobfuse2", "fuse.mount-s3", "fuse.unheard-of", "fuse")
"""Kinds that a program serves which is not known to keep its bytes on this machine."""


def _look_at_mounts(link: Any, folder: str) -> dict[str, Medium]:
    _with_own_mounts()
    _mount_fuse("fuse.sshfs", f"{folder}/far")
    _mount_fuse("fuse.sshfs", f"{folder}/with a space")
    _mount_fuse("fuse.sshfs", f"{folder}/b\\ack\tslash")
    _mount_fuse("fuse.bindfs", f"{folder}/near")
    for kind in NETWORK:
        _mount_fuse(kind, f"{folder}/{kind}")
    os.makedirs(f"{folder}/under")
    _mount_fuse("fuse.rclone", f"{folder}/under")
    _mount("tmpfs", f"{folder}/under", "tmpfs", 0, None)
    _mount("tmpfs", folder + "/memory", "tmpfs", 0, None)
    os.makedirs(f"{folder}/memory/far")
    os.symlink(f"{folder}/far", f"{folder}/link")
    _mount(f"{folder}/far", f"{folder}/bound", None, 4096, None)
    names = (
        *("far", "far/deep/er", "farther", "with a space", "with a space/x", "b\\ack\tslash", "near", "under"),
        *("memory/far", "link", "link/x", "bound", "none/such", ".", *NETWORK),
    )
    return {name: medium_of(f"{folder}/{name}")[0] for name in names}


@needs_mounts
def test_file_systems_that_cross_the_network_are_told_apart(tmp_path: Path) -> None:
    for name in ("memory", "bound"):
        (tmp_path / name).mkdir()
    with Team() as team:
        try:
            found = team.start(_look_at_mounts, str(tmp_path)).result()
        except AssertionError as error:
            if "Operation not permitted" in str(error):
                pytest.skip("this container may not mount")
            raise
    far = {"far", "far/deep/er", "with a space", "with a space/x", "b\\ack\tslash", "link", "link/x", "bound"}
    assert {name for name, medium in found.items() if medium is Medium.ELSEWHERE} == {*far, *NETWORK}
    assert {name for name, medium in found.items() if medium is Medium.MEMORY} == {"under", "memory/far"}


def _warnings_of_a_far_cache(link: Any, folder: str) -> tuple[list[str], float]:
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    _with_own_mounts()
    _mount_fuse("fuse.sshfs", f"{folder}/far")
    logging.getLogger("xzcache").addHandler(Listener())
    ds = Dataset(Path(folder), side=2)
    with threads(2) as client:
        client.register_plugin(xzcache.CachePlugin(f"{folder}/far/cache"))
        client.register_plugin(xzcache.CachePlugin(f"{folder}/far/cache", "1 MB"))
        found = client.submit(read_by_default, ds.place, ds.log, pure=False).result()
        xzcache.cluster_info(client)
    return [text for text in said if "network file system" in text], found - ds.values.sum()


@needs_mounts
def test_a_cache_on_a_network_file_system_is_warned_about_once(tmp_path: Path) -> None:
    with Team() as team:
        try:
            said, difference = team.start(_warnings_of_a_far_cache, str(tmp_path)).result()
        except AssertionError as error:
            if "Operation not permitted" in str(error):
                pytest.skip("this container may not mount")
            raise
    assert difference == 0
    assert len(said) == 1
    assert str(tmp_path / "far") in said[0]


@needs_mounts
def test_a_directory_that_cannot_be_written_on_a_worker(tmp_path: Path) -> None:
    for name in ("disk", "data"):
        (tmp_path / name).mkdir()
    with Team() as team:
        try:
            team.start(_read_from_a_disk_that_is_read_only, str(tmp_path)).result()
        except AssertionError as error:
            if "Operation not permitted" in str(error):
                pytest.skip("this container may not mount")
            raise


def check_warned(plugin: xzcache.CachePlugin, workers: int, *expected: str) -> None:
    """Clients are told each of these once, and nothing else."""
    with warnings.catch_warnings(record=True) as said, cluster(workers) as client:
        warnings.simplefilter("always")
        client.register_plugin(plugin)
        until(lambda: len(said) >= len(expected))
        client.run(_beat)
    told = sorted(str(warning.message) for warning in said)
    assert len(told) == len(expected)
    assert all(part in text for part, text in zip(sorted(expected), told, strict=True))


async def _beat(dask_worker: Any) -> None:
    await dask_worker.heartbeat()


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no file system in memory here")
def test_a_cache_in_memory_is_warned_about() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        check_warned(xzcache.CachePlugin(f"{folder}/cache"), 1, f"{folder}/cache is in memory (tmpfs)")


@pytest.mark.parametrize(
    ("name", "job", "place"),
    [
        ("SLURM_JOB_ID", "4711", "slurm/job_4711/tmp"),
        ("PBS_JOBID", "4711.head", "pbs.4711.head"),
        ("JOB_ID", "4711", "4711.1.all.q"),
        ("_CONDOR_SCRATCH_DIR", "{}", "condor"),
    ],
)
def test_a_cache_that_goes_with_a_job_is_warned_about(
    name: str, job: str, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[str]:
        return [record.message for record in caplog.records if record.name == "xzcache.dask" and record.levelno > 20]

    monkeypatch.setenv(name, job.format(tmp_path / place))
    with threads(1) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.register_plugin(xzcache.CachePlugin(tmp_path / f"14711/not-x{job.replace('/', '')}" / "cache"))
        assert not said()
        client.register_plugin(xzcache.CachePlugin(tmp_path / place / "cache"))
    (text,) = said()
    assert name in text
    assert "outlives its jobs" in text


def test_two_caches_of_one_machine_are_warned_about(tmp_path: Path) -> None:
    async def set_up(dask_worker: Any) -> None:
        plugin = xzcache.CachePlugin(f"{place}/{dask_worker.name}")
        await dask_worker.plugin_add(plugin, name="xzcache")

    async def set_up_alike(dask_worker: Any) -> None:
        await dask_worker.plugin_add(xzcache.CachePlugin(f"{place}/one"), name="xzcache")

    place = str(tmp_path)
    with warnings.catch_warnings(record=True) as said, cluster(2) as client:
        warnings.simplefilter("always")
        client.run(set_up_alike)
        client.run(_beat)
        assert not said
        client.run(set_up)
        (warned,) = until(lambda: list(said))
        assert "workers of one machine have 2 caches" in str(warned.message)


def test_a_local_directory_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with threads(1) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache"))
    assert not [record for record in caplog.records if record.name.startswith("xzcache")]


def test_the_log_of_each_worker_names_its_cache_once(tmp_path: Path) -> None:
    with cluster(2, silence_logs=False) as client:
        client.register_plugin(xzcache.CachePlugin(tmp_path / "cache", "2 MB"))
        # changes nothing
        client.register_plugin(xzcache.CachePlugin())
        for lines in client.get_worker_logs().values():
            told = [(level, text) for level, text in lines if str(tmp_path / "cache") in text]
            assert len(told) == 1
            assert told[0][0] == "INFO"
            assert f"The cache of this node: {tmp_path / 'cache'} (2 MB)" in told[0][1]


# -- for longer


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_workers_are_killed_all_the_time(tmp_path: Path) -> None:
    """However workers end, the bound holds, the results are right, and the account is the disk's."""
    rng = np.random.default_rng(7)
    ds = Dataset(tmp_path, side=6)
    bound = 20 * ds.chunk_bytes
    with cluster(3) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, bound))
        for round_ in range(20):
            reads = [client.submit(ds.read, pure=False, retries=10) for _ in range(6)]
            with suppress(ProcessLookupError):
                os.kill(int(rng.choice(list(pids(client).values()))), signal.SIGKILL)
            client.gather(reads)
            client.wait_for_workers(3)
            if round_ % 5 == 4:
                client.restart()
            assert xzcache.cluster_info(client)[0].used <= bound
    visit(ds.root)
    assert not findings(ds.root)
    with opened_index(ds.root) as index:
        assert index.execute("SELECT max_size FROM total").fetchone() == (bound,)
