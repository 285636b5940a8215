"""Clusters of Dask on this machine, and what they say of themselves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import cloudpickle
import dask
from distributed import Client, LocalCluster, Nanny, Scheduler, Security, SpecCluster
from distributed.utils import get_mp_context
from processes import PRELOADED, until

Address = str

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])


_PRELOAD: Final = ["forked"]


@contextmanager
def _forked() -> Iterator[None]:
    """Workers that Dask starts meanwhile come from the fork server, which has imported what they need."""
    settings = {
        # a worker that was killed is its nanny's business, and not to be given up while that restarts it
        "distributed.deploy.lost-worker-timeout": "1h",
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.worker.preload": _PRELOAD,
    }
    with dask.config.set(settings):
        if get_mp_context() is (server := multiprocessing.get_context("forkserver")):
            # Dask has just named its own packages, once; nothing happens if the server runs already
            server.set_forkserver_preload([*PRELOADED, "distributed", "dask.array", "xarray", "xzcache.dask"])
        yield


@contextmanager
def cluster(workers: int, **options: Any) -> Iterator[Client]:
    """A cluster on this machine, each worker a process of its own."""
    options = {"threads_per_worker": 1, "dashboard_address": ":0", **options}
    with _forked(), LocalCluster(n_workers=workers, **options) as made, Client(made) as client:
        yield client


def threads(workers: int, **options: Any) -> Any:
    """A cluster whose workers all run in this process."""
    return cluster(workers, processes=False, **options)


async def _beat(dask_worker: Any) -> None:
    await dask_worker.heartbeat()


def metrics(client: Client) -> dict[Address, dict[str, Any]]:
    """What each worker last said, at most a moment ago."""
    client.run(_beat)
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return {
        address: {name.removeprefix("xzcache_"): value for name, value in worker["metrics"].items() if "xzc" in name}
        for address, worker in workers.items()
    }


def total(seen: dict[Address, dict[str, Any]], name: str) -> int:
    return sum(worker[name] for worker in seen.values())


def pids(client: Client) -> dict[Address, int]:
    return client.run(os.getpid)


def kill_one(client: Client) -> Address:
    """SIGKILL a worker, and wait until its nanny has put another one in its place."""
    before = pids(client)
    gone, pid = next(iter(before.items()))
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        now = client.scheduler_info(n_workers=-1)["workers"]
        return gone not in now and len(now) == len(before)

    until(replaced)
    return gone


def give_up_after(client: Client, seconds: float) -> None:
    """Have the scheduler remove workers that it has not heard of for so long; it looks as often as it is configured."""
    client.run_on_scheduler(_give_up_after, seconds)


def _give_up_after(seconds: float, dask_scheduler: Scheduler) -> None:
    dask_scheduler.worker_ttl = seconds


@contextmanager
def nodes(
    folder: Path,
    count: int,
    *,
    per_node: int = 1,
    security: Security | None = None,
    preload: Sequence[str] = (),
    **options: Any,
) -> Iterator[Client]:
    """A cluster of simulated nodes: each has a cache directory of its own, which its workers have in common."""
    safe = {} if security is None else {"security": security, "protocol": "tls://"}
    workers = {
        f"{node}.{number}": {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "host": "127.0.0.1",
                "env": {"XZCACHE_DIRECTORY": str(folder / f"node{node}")},
                "preload": [*_PRELOAD, *preload],
                **safe,
                **options,
            },
        }
        for node in range(count)
        for number in range(per_node)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0", "host": "127.0.0.1", **safe}}
    with _forked(), SpecCluster(workers, scheduler=scheduler, security=security) as made, Client(made) as client:
        client.wait_for_workers(count * per_node)
        yield client
