"""Several processes read one cached array at once: one cache for all of them, against a local copy and Zarr's cache."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zarr
from _contestants import BATCHED, COPY, OURS, OWN_PIPELINE, THEIRS, Kind, fill, make, pipelines, stores, using
from _measure import alternate
from _report import Report, arguments
from zarr.storage import LocalStore

CHUNKS = 200
DEFAULT = [Kind("64 KiB", "none"), Kind("64 KiB", "zstd")]
FULL = [*DEFAULT, Kind("1 MiB", "none"), Kind("1 MiB", "zstd")]
COUNTS = [1, 2, 4, 8]
THOSE = frozenset({COPY, THEIRS, OURS})


def work(connection: Connection, arrays: dict[str, tuple[Any, str]]) -> None:
    """In each process: read an array as often as one is named."""
    opened: dict[str, zarr.Array[Any]] = {}
    for name, (store, pipeline) in arrays.items():
        with using(pipeline):
            opened[name] = zarr.open_array(store, mode="r")
        opened[name][:]
    connection.send(None)
    while (name := connection.recv()) is not None:
        opened[name][:]
        connection.send(None)


@contextmanager
def workers(count: int, arrays: dict[str, tuple[Any, str]]) -> Iterator[list[Connection]]:
    spawning = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=work, args=(theirs, arrays), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, None)
            connections.append(ours)
        for connection in connections:
            connection.recv()
        yield connections


def read(connections: list[Connection], name: str) -> None:
    """All at once; done when the last one is."""
    for connection in connections:
        connection.send(name)
    for connection in connections:
        connection.recv()


def measure(kind: Kind, scratch: Path, report: Report, budget: float) -> None:
    data = make(LocalStore(scratch / "source"), kind, CHUNKS)
    opened = stores(scratch / "source", scratch, only=THOSE)
    fill(opened, data)
    arrays: dict[str, tuple[Any, str]] = {name: (store, BATCHED) for name, store in opened.items()}
    if OWN_PIPELINE in pipelines():
        arrays[f"{OURS}, {OWN_PIPELINE}"] = opened[OURS], OWN_PIPELINE
    rows, series = [], {name: dict[float, float]() for name in arrays}
    for count in COUNTS:
        with workers(count, arrays) as connections:
            contestants: dict[str, Callable[[], object]] = {name: partial(read, connections, name) for name in arrays}
            taken = alternate(contestants, budget=budget, least=7, most=40)
        for name, samples in taken.items():
            series[name][count] = count * data.nbytes / samples.median / 1e6
            ratio = taken[COPY].over(samples)
            rounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
            rows.append((f"{count} x {name}", f"{series[name][count]:.0f}", str(ratio), rounds))
    columns = ["processes", "MB/s in all", f"throughput over {COPY}", "quartiles of the rounds"]
    report.table(f"{CHUNKS} chunks of {kind}, whole array", columns, rows)
    name = str(kind).replace(", ", "-").replace(" ", "")
    report.lines(name, f"Chunks of {kind}, read by several processes at once", series, "processes", "MB/s in all")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budget", type=float, default=8, help="seconds for each comparison, if that is enough")
    options = parser.parse_args()
    with Report("processes", options.out) as report:
        for kind in FULL if options.full else DEFAULT:
            with tempfile.TemporaryDirectory() as scratch:
                measure(kind, Path(scratch), report, options.budget)


if __name__ == "__main__":
    main()
