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
from _contestants import BATCHED, COPY, OURS, THEIRS, UNCHOSEN, Kind, Outside, fill, make, outside, stores, using
from _measure import alternate
from _report import Report, arguments
from zarr.abc.store import Store
from zarr.storage import LocalStore

CHUNKS = 200
DEFAULT = [Kind("64 KiB", "none"), Kind("64 KiB", "zstd")]
FULL = [*DEFAULT, Kind("1 MiB", "none"), Kind("1 MiB", "zstd")]
COUNTS = [1, 2, 4, 8]
THOSE = frozenset({COPY, THEIRS, OURS})


def work(connection: Connection, found: Outside, arrays: dict[str, tuple[Any, str]]) -> None:
    """In each process: read an array as often as one is named."""
    opened: dict[str, dict[str, Any]] = {}
    for name, (store, pipeline) in arrays.items():
        with using(pipeline):
            opened[name] = found.open(store)
        found.read(opened[name])
    connection.send(None)
    while (name := connection.recv()) is not None:
        found.read(opened[name])
        connection.send(None)


@contextmanager
def workers(count: int, found: Outside, arrays: dict[str, tuple[Any, str]]) -> Iterator[list[Connection]]:
    spawning = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for _ in range(count):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=work, args=(theirs, found, arrays), daemon=True)
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
    compare(f"{CHUNKS} chunks of {kind}, whole array", Outside(scratch, ("",)), opened, data.nbytes, report, budget)


def measure_outside(found: Outside, scratch: Path, report: Report, budget: float) -> None:
    opened = stores(found.path, scratch, only=THOSE)
    with zarr.config.set({"async.concurrency": 1}):
        read = [found.read(found.open(store)) for store in opened.values()]
    compare(f"all arrays of {found.path.name}", found, opened, sum(a.nbytes for a in read[0]), report, budget)


def compare(title: str, found: Outside, opened: dict[str, Store], nbytes: int, report: Report, budget: float) -> None:
    """Let 1 to 8 processes read the same arrays through each store."""
    arrays: dict[str, tuple[Any, str]] = {name: (store, BATCHED) for name, store in opened.items()}
    arrays[OURS] = opened[OURS], UNCHOSEN
    arrays[f"{OURS}, {BATCHED}"] = opened[OURS], BATCHED
    rows, series = [], {name: dict[float, float]() for name in arrays}
    for count in COUNTS:
        with workers(count, found, arrays) as connections:
            contestants: dict[str, Callable[[], object]] = {name: partial(read, connections, name) for name in arrays}
            taken = alternate(contestants, budget=budget, least=7, most=40)
        for name, samples in taken.items():
            series[name][count] = count * nbytes / samples.median / 1e6
            ratio = taken[COPY].over(samples)
            rounds = f"{ratio.low:.2f} to {ratio.high:.2f}"
            rows.append((f"{count} x {name}", f"{series[name][count]:.0f}", str(ratio), rounds))
    columns = ["processes", "MB/s in all", f"throughput over {COPY}", "quartiles of the rounds"]
    report.table(title, columns, rows)
    name = title.replace(",", "").replace(" ", "-")
    report.lines(name, f"{title}, read by several processes at once", series, "processes", "MB/s in all")


def main() -> None:
    parser = arguments(__doc__, can_be_outside=True)
    parser.add_argument("--budget", type=float, default=8, help="seconds for each comparison, if that is enough")
    options = parser.parse_args()
    with Report("processes", options.out) as report:
        if options.outside:
            with tempfile.TemporaryDirectory() as scratch:
                measure_outside(outside(options.outside), Path(scratch), report, options.budget)
            return
        for kind in FULL if options.full else DEFAULT:
            with tempfile.TemporaryDirectory() as scratch:
                measure(kind, Path(scratch), report, options.budget)


if __name__ == "__main__":
    main()
