"""Reading an array that is cached: the whole of it, or a chunk a call as Dask does, against all else there is."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from _contestants import (
    BATCHED,
    CODECS,
    COPY,
    OURS,
    SIZES,
    SOURCE,
    THEIRS,
    UNCHOSEN,
    Kind,
    Outside,
    fill,
    make,
    outside,
    pipelines,
    stores,
    using,
)
from _measure import Samples, alternate
from _report import Report, arguments
from zarr.storage import LocalStore

WHOLE, CHUNK = "whole array", "a chunk a call"
DEFAULT = [(WHOLE, Kind(chunk, codec)) for chunk in ("64 KiB", "4 MiB") for codec in ("none", "zstd")]
DEFAULT += [(CHUNK, Kind("64 KiB", codec)) for codec in ("none", "zstd")]
FULL = [(mode, Kind(chunk, codec)) for mode in (WHOLE, CHUNK) for chunk in SIZES for codec in CODECS]
IN_ANY_PIPELINE = frozenset({COPY, THEIRS, OURS})
"""Those that are also read with other pipelines than Zarr's default."""

PREAD, MEMCPY = "limit: pread into the result", "limit: memcpy"
PREAD_ALL = "limit: the files read, not decoded"
Taken = dict[str, Samples]
Clock = Callable[[], float]


def name_of(store: str, pipeline: str) -> str:
    return store if pipeline == usual(store) else f"{store}, {pipeline}"


def usual(store: str) -> str:
    """The pipeline of a user who chooses none: of others, Zarr's, as where xzcache was not imported."""
    return UNCHOSEN if store == OURS else BATCHED


def ways(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each store with the pipelines that it is read with."""
    for pipeline in pipelines():
        for name in names:
            if pipeline == usual(name) or (name in IN_ANY_PIPELINE and pipeline != UNCHOSEN):
                yield name, pipeline


def chunks_of(mode: str, kind: Kind) -> int:
    """Small enough for many turns, large enough for what an array costs beside its chunks not to show."""
    return max(8, min(250 if mode == WHOLE else 50, (64 << 20) // SIZES[kind.chunk]))


def measure(mode: str, kind: Kind, scratch: Path, budget: float, clock: Clock) -> Taken:
    """Everybody reads the same array."""
    source = scratch / "source"
    count = chunks_of(mode, kind)
    data = make(LocalStore(source), kind, count)
    opened = stores(source, scratch)
    fill(opened, data)
    contestants: dict[str, Callable[[], object]] = {}
    for name, pipeline in ways(opened):
        with using(pipeline):
            array = zarr.open_array(opened[name], mode="r")
        np.testing.assert_array_equal(array[:], data)
        contestants[name_of(name, pipeline)] = partial(_read, array, mode)
    if mode == WHOLE:
        if kind.codec == "none":
            contestants[PREAD] = partial(_pread, [source / "c" / str(n) / "0" for n in range(count)], data)
        contestants[MEMCPY] = data.copy
    return alternate(contestants, calls=count, budget=budget, clock=clock)


def measure_outside(found: Outside, scratch: Path, budget: float, clock: Clock) -> Taken:
    """Everybody reads all arrays of the user's data, whole."""
    opened = stores(found.path, scratch)
    with zarr.config.set({"async.concurrency": 1}):
        expected = found.read(found.open(opened[SOURCE]))
        for store in opened.values():
            found.read(found.open(store))
    contestants: dict[str, Callable[[], object]] = {}
    for name, pipeline in ways(opened):
        with using(pipeline):
            arrays = found.open(opened[name])
        for mine, right in zip(found.read(arrays), expected, strict=True):
            np.testing.assert_array_equal(mine, right)
        contestants[name_of(name, pipeline)] = partial(found.read, arrays)
    keys = found.objects()
    contestants[PREAD_ALL] = lambda: [(found.path / key).read_bytes() for key in keys]
    contestants[MEMCPY] = lambda: [array.copy() for array in expected]
    return alternate(contestants, calls=len(keys), budget=budget, clock=clock)


def _read(array: zarr.Array[Any], mode: str) -> None:
    if mode == WHOLE:
        array[:]
    else:
        for row in range(array.shape[0]):
            array[row]


def _pread(paths: list[Path], like: np.ndarray[Any, Any]) -> None:
    result = np.empty_like(like)
    for path, row in zip(paths, result, strict=True):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.preadv(fd, [row.view("u1")], 0)
        os.close(fd)


def goals(results: dict[tuple[str, Kind], Taken]) -> list[tuple[str, str, str, str]]:
    """What we promise ourselves, as far as it was measured."""
    raw, packed = Kind("64 KiB", "none"), Kind("64 KiB", "zstd")
    wanted = [(WHOLE, raw, OURS, COPY, 0.2), (WHOLE, packed, OURS, COPY, 0.4)]
    wanted += [(WHOLE, Kind("4 MiB", codec), OURS, COPY, 0.9) for codec in ("none", "zstd")]
    wanted += [(CHUNK, kind, OURS, COPY, 1.0) for kind in (raw, packed)]
    for pipeline in pipelines().keys() - {UNCHOSEN, BATCHED}:
        mine, theirs = name_of(OURS, pipeline), name_of(COPY, pipeline)
        wanted += [(WHOLE, kind, mine, theirs, 0.95) for kind in (raw, packed)]
        wanted += [(WHOLE, Kind("4 MiB", codec), mine, theirs, 0.95) for codec in ("none", "zstd")]
    rows = []
    for mode, kind, one, other, goal in wanted:
        taken = results.get((mode, kind), {})
        if one in taken and other in taken:
            ratio = taken[one].over(taken[other])
            what = f"{mode}, {kind}: {one} / {other}"
            rows.append((what, f"{goal:.2f}", str(ratio), f"{ratio.low:.2f} to {ratio.high:.2f}"))
    return rows


def show(report: Report, title: str, taken: Taken) -> None:
    """One comparison as a table."""
    rows = []
    for name, samples in taken.items():
        spread = " to ".join(f"{quartile * 1e6:.0f}" for quartile in samples.quartiles)
        compared = (str(samples.over(taken[other])) for other in (COPY, THEIRS))
        rows.append((name, f"{samples.median * 1e6:.0f}", spread, *compared))
    report.table(title, ["", "microseconds a chunk", "quartiles", f"over {COPY}", f"over {THEIRS}"], rows)


def main() -> None:
    parser = arguments(__doc__, can_be_outside=True, can_count_cpu=True)
    parser.add_argument("--budget", type=float, default=18, help="seconds for each comparison, if that is enough")
    options = parser.parse_args()
    results: dict[tuple[str, Kind], Taken] = {}
    with Report("warm", options.out) as report:
        if options.clock is time.process_time:
            report.say("CPU time of the process, all threads")
        if options.outside:
            with tempfile.TemporaryDirectory() as scratch:
                taken = measure_outside(outside(options.outside), Path(scratch), options.budget, options.clock)
            show(report, f"all arrays of {options.outside.name}, whole", taken)
            return
        for mode, kind in FULL if options.full else DEFAULT:
            with tempfile.TemporaryDirectory() as scratch:
                taken = results[mode, kind] = measure(mode, kind, Path(scratch), options.budget, options.clock)
            show(report, f"{mode}, {kind}", taken)
        report.table("Goals", ["what", "goal", "ratio of medians", "quartiles of the rounds"], goals(results))
        for mode in (WHOLE, CHUNK):
            groups = {
                str(kind): {name: s.median * 1e6 for name, s in taken.items() if name != SOURCE}
                for (of, kind), taken in results.items()
                if of == mode and kind.chunk == "64 KiB"
            }
            report.bars(mode.replace(" ", "-"), f"{mode}, 64 KiB chunks, from the page cache", groups, "us a chunk")


if __name__ == "__main__":
    main()
