"""Dask: whatever schedules the tasks, on however many threads, each chunk is read once and every read is counted."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import cloudpickle
import dask
import dask.array
import pytest
import zarr
from clusters import cluster, kill_one, metrics, nodes, pids, total
from distributed import Client, LocalCluster, Scheduler, span
from processes import PATIENCE, Dataset, audit, until, visit

import xzcache
from xzcache.directory import _registry as registry

pytestmark = pytest.mark.slow

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def check_once(ds: Dataset) -> None:
    asked = ds.chunk_requests()
    assert len(asked) == ds.chunks
    assert set(asked.values()) == {1}


def check_account(ds: Dataset) -> None:
    """It is what is on disk, and holds each chunk and the document."""
    registry._directories[ds.root].close()
    visit(ds.root)
    assert audit(ds.root) == ds.chunks + 1


# -- clusters of every kind


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("processes", [True, False])
def test_workers_of_any_kind(processes: bool, threads: int, tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=8)
    with cluster(2, processes=processes, threads_per_worker=threads) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, "10 MB"))
        lazy = dask.array.from_zarr(ds.array())
        before = metrics_of_processes(client)
        ds.forget_requests()
        assert lazy.sum().compute() == ds.values.sum()
        check_once(ds)
        # what is read while others read it is read from the cache, or waited for
        totals = dask.compute(lazy.max(), lazy.min(), (lazy + lazy).sum())
        assert totals == (ds.values.max(), ds.values.min(), 2 * ds.values.sum())
        check_once(ds)
        counted = metrics_of_processes(client) - before
        # no update is lost: every one of the reads was either
        assert counted["misses"] == ds.chunks
        assert counted["bytes_from_source"] == ds.values.nbytes
        assert counted["bytes_from_cache"] == counted["hits"] * ds.chunk_bytes
        assert counted["hits"] % ds.chunks == 0 < counted["hits"]
    check_account(ds)


def metrics_of_processes(client: Client) -> Counter[str]:
    """What all processes of a cluster have read; several workers may be threads of one."""
    counts: Counter[str] = Counter()
    for found in dict(client.run(_counters).values()).values():
        counts.update(found)
    return counts


def _counters() -> tuple[int, dict[str, int]]:
    from xzcache.reading._stats import process

    return os.getpid(), {name: int(value) for name, value in process.as_dict().items() if "second" not in name}


@pytest.mark.parametrize("scheduler", ["threads", "processes", "synchronous"])
def test_plain_dask(scheduler: str, tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=8)
    lazy = dask.array.from_zarr(ds.array())
    ds.forget_requests()
    with dask.config.set(scheduler=scheduler, num_workers=2):
        for _ in range(2):
            assert lazy.sum().compute() == ds.values.sum()
            check_once(ds)
    check_account(ds)


def test_two_event_loops(tmp_path: Path) -> None:
    """Two clients that are asynchronous, each with a cluster in this process and a loop of its own."""
    ds = Dataset(tmp_path, side=4)
    lazy = dask.array.from_zarr(ds.array()).sum()
    ds.forget_requests()
    together = threading.Barrier(2, timeout=PATIENCE)

    # older versions of Dask cannot start two clusters of one process at once
    starting = threading.Lock()

    async def compute() -> tuple[float, Any]:
        async with AsyncExitStack() as stack:
            await asyncio.to_thread(starting.acquire)
            try:
                made = await stack.enter_async_context(
                    LocalCluster(
                        n_workers=1, processes=False, threads_per_worker=4, dashboard_address=":0", asynchronous=True
                    )
                )
                client = await stack.enter_async_context(Client(made, asynchronous=True, set_as_default=False))
            finally:
                starting.release()
            await client.register_plugin(xzcache.CachePlugin(ds.root))
            # both have begun before either goes on
            await asyncio.to_thread(together.wait)
            result = await client.compute(lazy)
            info = await xzcache.cluster_info(client)
            await asyncio.to_thread(together.wait)
        return float(result), info

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: asyncio.run(compute()), range(2)))
    assert [result for result, _ in found] == [ds.values.sum()] * 2
    assert len({info[0].node for _, info in found}) == 1
    check_once(ds)
    check_account(ds)


# -- several nodes, of whose workers one is killed


def test_each_chunk_once_for_every_node_that_reads_it(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    places = {str(tmp_path / "node0"), str(tmp_path / "node1")}
    with nodes(tmp_path, 2, per_node=2) as client:
        made: Any = client.cluster
        with xzcache.config.set(directory=None):
            client.register_plugin(xzcache.CachePlugin())
        lazy = dask.array.from_zarr(zarr.open_array(by_default(ds), mode="r", zarr_format=3))
        ds.forget_requests()
        assert lazy.sum().compute() == ds.values.sum()
        kill_one(client)
        made.worker_spec["0.2"] = made.worker_spec["0.0"]
        made.scale(5)
        client.wait_for_workers(5)
        assert (lazy - lazy.max()).min().compute() == ds.values.min() - ds.values.max()
        # and then each node reads all of it
        by_node = {node.directory: node for node in xzcache.cluster_info(client)}
        assert set(by_node) == places
        assert sorted(len(node.workers) for node in by_node.values()) == [2, 3]
        for address in pids(client):
            client.submit(_sum, by_default(ds), workers=[address], pure=False).result()
        assert set(ds.chunk_requests().values()) == {2}
        entries = [node.entries for node in xzcache.cluster_info(client)]
        assert len(entries) == 2
        assert all(ds.chunks <= count <= ds.chunks + 1 for count in entries)
    for place in places:
        visit(place)
        assert ds.chunks <= audit(place) <= ds.chunks + 1


def by_default(ds: Dataset) -> xzcache.CacheStore:
    """Through the default cache of whichever process this is."""
    from processes import Source
    from zarr.storage import LocalStore

    return xzcache.CacheStore(Source(LocalStore(ds.place, read_only=True), ds.log))


def _sum(store: xzcache.CacheStore) -> float:
    return float(zarr.open_array(store, mode="r", zarr_format=3)[:].sum())


# -- what Dask shows


SHARED = ("xzcache_used_bytes", "xzcache_bound_bytes", "xzcache_entries")


def test_prometheus_is_told_the_same(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families as families

    ds = Dataset(tmp_path, side=4)
    ask = build_opener(ProxyHandler({})).open
    with cluster(2) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root, "1 MB"))
        for address in pids(client):
            client.submit(ds.read, workers=[address], pure=False).result()
        until(lambda: total(metrics(client), "used") == sum(n.used for n in xzcache.cluster_info(client)))
        seen, (node,) = metrics(client), xzcache.cluster_info(client)
        shared: list[dict[str, float]] = []
        for address, worker in client.scheduler_info()["workers"].items():
            with ask(f"http://{worker['host']}:{worker['services']['dashboard']}/metrics", timeout=PATIENCE) as answer:
                text = answer.read().decode()
            samples = {
                sample.name: sample.value
                for family in families(text)
                for sample in family.samples
                if sample.name.startswith("xzcache_") and sample.labels == {"node": node.node}
            }
            figures = seen[address]
            assert samples["xzcache_hits_total"] == figures["hits"]
            assert samples["xzcache_misses_total"] == figures["misses"]
            assert samples["xzcache_from_cache_bytes_total"] == figures["bytes_from_cache"]
            assert samples["xzcache_from_source_bytes_total"] == figures["bytes_from_source"]
            shared.append({name: value for name, value in samples.items() if name in SHARED})
            assert samples["xzcache_errors_total"] == samples["xzcache_evictions_total"] == 0
            # beside Dask's own
            assert "dask_worker_tasks" in text
        assert total(seen, "misses") == len(ds.requests())
        # what the workers share is told by one, so that sums over workers are right
        empty, told = sorted(shared, key=len)
        assert not empty
        assert list(told.values()) == [node.used, 1_000_000, node.entries]
        client.unregister_worker_plugin("xzcache")
        worker = next(iter(client.scheduler_info()["workers"].values()))
        with ask(f"http://{worker['host']}:{worker['services']['dashboard']}/metrics", timeout=PATIENCE) as answer:
            assert "xzcache_" not in answer.read().decode()


def test_spans_say_what_was_read_in_them(tmp_path: Path) -> None:
    ds = Dataset(tmp_path, side=4)
    with cluster(2) as client:
        client.register_plugin(xzcache.CachePlugin(ds.root))
        lazy = dask.array.from_zarr(ds.array())
        # two computations: of one that the scheduler has not forgotten yet, nothing would be computed again
        for name, reduced in (("cold", lazy.sum()), ("warm", lazy.max())):
            with span(name):
                (graph,) = dask.optimize(reduced)
                client.compute(graph, optimize_graph=False).result()

        def of(name: str) -> dict[str, float]:
            found: Counter[str] = Counter()
            for (context, _, label, unit), value in client.run_on_scheduler(_of_span, name).items():
                if context == "execute" and label.startswith("xzcache-"):
                    found[f"{unit} of {label.removeprefix('xzcache-')}"] += value
            return found

        until(lambda: metrics(client) and of("warm")["count of cache"] >= ds.chunks)
        cold, warm = of("cold"), of("warm")
    assert cold["bytes of source"] >= ds.values.nbytes
    assert cold["bytes of cache"] == warm["bytes of source"] == 0
    assert warm["bytes of cache"] == ds.values.nbytes
    assert cold["seconds of source"] > 0 < warm["seconds of cache"]


def _of_span(name: str, dask_scheduler: Scheduler) -> dict[Any, float]:
    (found,) = dask_scheduler.extensions["spans"].find_by_tags(name)
    return dict(found.cumulative_worker_metrics)
