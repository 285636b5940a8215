"""What affinity and peers cost Dask's scheduler: its processor time for a graph of many tasks; a third of them read.

The workers do the same work in all modes, so their processor time is the control: where it differs, the machine was
faster or slower meanwhile. The comparison is that of the scheduler's time for each second of the workers.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import dask.array
import numpy as np
import zarr
from _report import Report, arguments
from distributed import Client, Nanny, SpecCluster
from distributed.deploy.subprocess import SubprocessScheduler

import xzcache

# its functions have no types
da: Any = dask.array

MODES = ("none", "off", "auto", "both")
SETTINGS: dict[str, dict[str, Any]] = {
    "off": {},
    "auto": {"affinity": "auto"},
    "both": {"affinity": "auto", "peers": "on"},
}


def worker(folder: Path) -> dict[str, Any]:
    """A worker with a cache of its own, as on a node of its own."""
    env = {"XZCACHE_DIRECTORY": str(folder), "OMP_NUM_THREADS": "1"}
    options = {"nthreads": 2, "host": "127.0.0.1", "dashboard": False, "memory_limit": 0, "env": env}
    return {"cls": Nanny, "options": options}


class Took(NamedTuple):
    """Seconds of one computation: of the processor in the scheduler's process and in all workers, and by the clock."""

    scheduler: float
    workers: float
    wall: float


def measure(source: str, mode: str, nodes: int) -> Took:
    """Compute something on a new cluster."""
    scheduler = {"cls": SubprocessScheduler, "options": {"scheduler_kwargs": {"dashboard": False, "host": "127.0.0.1"}}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        workers = {node: worker(Path(scratch) / f"node{node}") for node in range(nodes)}
        cluster: Any = SpecCluster(workers, scheduler=scheduler, silence_logs=logging.ERROR)  # type: ignore[no-untyped-call]
        with cluster, Client(cluster) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(nodes)
            if mode != "none":
                client.register_plugin(xzcache.CachePlugin(max_size="1 GB", min_free=0, **SETTINGS[mode]))
            blocks = da.from_zarr(xzcache.CacheStore(source, read_only=True))
            total = da.map_blocks(np.add, blocks, 1, dtype=blocks.dtype).sum(split_every=32)

            def used() -> Took:
                workers = sum(client.run(time.process_time).values())
                return Took(client.run_on_scheduler(time.process_time), workers, time.perf_counter())

            before = used()
            # one task for each step, so that the graph has the number of tasks that was asked for
            result = total.compute(optimize_graph=False)
            assert result == blocks.size
            return Took(*(now - then for now, then in zip(used(), before, strict=True)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    options = parser.parse_args()
    with Report("scheduler", options.out) as report, tempfile.TemporaryDirectory() as folder:
        blocks = options.tasks // 3
        zarr.create_array(folder, shape=blocks, chunks=1, dtype="u1")
        took: dict[str, list[Took]] = {mode: [] for mode in options.modes}
        # in turns, so that what the machine does meanwhile meets all of them
        for _ in range(options.rounds):
            for mode in options.modes:
                took[mode].append(measure(folder, mode, options.nodes))
        share = {mode: [each.scheduler / each.workers for each in times] for mode, times in took.items()}
        base = statistics.median(share[options.modes[0]])
        rows = []
        for mode, times in took.items():
            scheduler, workers, wall = (statistics.median(values) for values in zip(*times, strict=True))
            rows.append(
                [
                    mode,
                    f"{scheduler:.1f}",
                    f"{1e6 * scheduler / options.tasks:.0f}",
                    f"{workers:.1f}",
                    f"{wall:.1f}",
                    f"{statistics.median(share[mode]) / base:.2f}",
                    f"{min(share[mode]) / base:.2f} to {max(share[mode]) / base:.2f}",
                ]
            )
        columns = ["mode", "seconds of the scheduler", "us a task", "of the workers", "by the clock"]
        columns += [f"scheduler by workers, {options.modes[0]} = 1", "from, to"]
        report.table(f"{options.tasks} tasks, {options.nodes} nodes; medians of {options.rounds}", columns, rows)


if __name__ == "__main__":
    main()
