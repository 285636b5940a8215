"""Which policy fits how people read: hit ratios of each on traces of many kinds, against the best there can be.

Policies run as pure objects; then some of the traces run end to end, through a real cache that four processes share. A
trace that was recorded (``XZCACHE_TRACE=path``) is replayed with ``--replay path``.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from ctypes import c_long
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from _policies import IN_A_ROW, POLICIES, PROCESSES, Trace, recorded
from _report import Report, arguments
from _traces import DESCRIBED, GUESSES, LOOPS, make
from zarr.core.buffer import default_buffer_prototype

import xzcache

SHARES: Final = (0.1, 0.25, 0.5, 0.8)
OURS, OUR_LRU, LRU, MIN = "xzcache adaptive", "xzcache LRU", "LRU", "MIN, the limit"
END_TO_END: Final = ("epochs over everything", "a fresh shuffle each epoch", "Zipf 0.8", "ping-pong scan")
SMALL: Final = 2000
"""Keys of the traces that run end to end, of which each process may have told of hits to a tenth when it evicts."""
LARGE: Final = 16_000
"""Keys of those of which a real cache looks at a part only before somebody leaves."""
BYTES: Final = 2000
LEAST: Final = 0.01
"""Nothing is worse than a hundredth of the best, so that a mean of ratios can be told; without hits there is none."""

ROOMS: Final = (50, 150, 600, 2500, 10_000)
"""Entries that fit into caches of other sizes."""
SHARES_OF_ROOMS: Final = (0.25, 0.8)
SIZED: Final = (10e3, 50e6)
"""The smallest and the largest of objects of many sizes, as many in each octave, in bytes."""
SIZED_KEYS: Final = 2000

Cells = Mapping[float, Mapping[str, float]]


def ratios(trace: Trace) -> Cells:
    """For each share of the keys that fits, the hit ratio of each policy."""
    keys = len(np.unique(trace))
    rooms = {share: max(1, int(share * keys)) for share in SHARES}
    return {share: {name: run(trace, room).mean() for name, run in POLICIES.items()} for share, room in rooms.items()}


def mean(cells: Sequence[Mapping[str, float]], name: str) -> float:
    """Geometric mean of hits over those of MIN."""
    some = [max(LEAST, cell[name] / cell[MIN]) for cell in cells if cell[MIN] > LEAST]
    return float(np.exp(np.mean(np.log(some)))) if some else float("nan")


def worst_against(other: str, name: str, cells: Mapping[tuple[str, float], Mapping[str, float]]) -> str:
    """By how much one policy is behind another one where it is most so."""
    kind, share = worst = min(cells, key=lambda at: cells[at][name] - cells[at][other])
    return f"{cells[worst][name] - cells[worst][other]:+.3f} ({kind}, {share:.0%})"


def summarize(report: Report, measured: Mapping[str, Cells]) -> None:
    cells = {(kind, share): cell for kind, all_ in measured.items() for share, cell in all_.items()}
    rows = []
    for name in POLICIES:
        behind = [worst_against(other, name, cells) for other in (OUR_LRU, LRU)]
        good = sum(cell[name] >= 0.9 * cell[MIN] for cell in cells.values())
        described = [cell for (kind, _), cell in cells.items() if kind in DESCRIBED]
        means = f"{mean(list(cells.values()), name):.3f}", f"{mean(described, name):.3f}"
        rows.append((name, *means, *behind, f"{good} of {len(cells)}"))
    against = ["worst against LRU as it is in xzcache", "against LRU told of each hit at once"]
    columns = ["policy", "hits over MIN, mean", "of kinds described", *against, "at 0.9 of MIN or above"]
    report.table("All traces and sizes; geometric means", columns, rows)
    loops = [(cell[OURS] / cell[MIN], at) for at, cell in cells.items() if at[0] in LOOPS and cell[MIN] > LEAST]
    if loops:
        value, (kind, share) = min(loops)
        where = f"{kind}, {share:.0%}"
        report.say(f"Loops, shuffles, windows, scans: adaptive has {value:.3f} of MIN or more ({where}).")


def show(report: Report, measured: Mapping[str, Cells]) -> None:
    rows = []
    for kind, cells in measured.items():
        values = [f"{cells[share][OURS]:.2f} / {cells[share][LRU]:.2f} / {cells[share][MIN]:.2f}" for share in SHARES]
        rows.append((f"{kind} (a guess)" if kind in GUESSES else kind, *values))
    report.table("Hit ratio: adaptive / LRU / MIN", ["trace", *(f"{share:.0%}" for share in SHARES)], rows)
    panels = {
        kind: {name: {share: cells[share][name] for share in SHARES} for name in POLICIES}
        for kind, cells in measured.items()
    }
    report.panels("ratios", "Hit ratio over the part of the keys that fits", panels)


# -- caches of other sizes


def of_room(cell: tuple[int, str, int, float]) -> tuple[float, float, float]:
    """Hit ratios of ours, of least recent use and of MIN, in a cache of so many entries, a share of the keys."""
    seed, kind, room, share = cell
    keys = int(room / share)
    trace = make(kind, seed, keys, max(40_000, 12 * keys))
    room = max(1, int(share * len(np.unique(trace))))
    ours, recency, limit = (float(POLICIES[name](trace, room).mean()) for name in (OURS, LRU, MIN))
    return ours, recency, limit


def run_rooms(
    report: Report, seed: int, results: Mapping[tuple[int, str, int, float], tuple[float, float, float]]
) -> None:
    rows = []
    for room in ROOMS:
        for share in SHARES_OF_ROOMS:
            found = {kind: results[seed, kind, room, share] for kind in DESCRIBED}
            behind = min(found, key=lambda kind: found[kind][0] - found[kind][1])
            means = [mean([{"ours": cell[at], MIN: cell[2]} for cell in found.values()], "ours") for at in range(2)]
            difference = found[behind][0] - found[behind][1]
            rows.append((f"{room}, {share:.0%}", *(f"{value:.3f}" for value in means), f"{difference:+.3f} ({behind})"))
    columns = ["entries that fit, of all", "adaptive over MIN, mean", "LRU over MIN, mean", "worst against LRU"]
    report.table("Kinds described, in caches of other sizes, at least 12 accesses a key", columns, rows)


# -- objects of many sizes


def sized(cell: tuple[int, str, int]) -> Mapping[float, Mapping[str, tuple[float, float]]]:
    """For each share of the bytes that fits, and each policy: the ratio of hits, and of bytes that are hit."""
    seed, kind, length = cell
    trace = make(kind, seed, SIZED_KEYS, length)
    draw = np.random.default_rng(seed)
    least, most = (float(np.log(size)) for size in SIZED)
    sizes = np.exp(draw.uniform(least, most, int(np.max(trace)) + 1)).astype(np.int64)
    found: dict[float, dict[str, tuple[float, float]]] = {}
    for share in SHARES:
        found[share] = {}
        for name, run in POLICIES.items():
            hits = run(trace, int(share * sizes.sum()), sizes)
            found[share][name] = float(hits.mean()), float(sizes[trace[hits]].sum()) / float(sizes[trace].sum())
    return found


def show_sized(report: Report, measured: Mapping[str, Mapping[float, Mapping[str, tuple[float, float]]]]) -> None:
    cells = {(kind, share): cell for kind, all_ in measured.items() for share, cell in all_.items()}
    rows = []
    for name in POLICIES:
        row = [name]
        for at in range(2):
            values = {place: {policy: both[at] for policy, both in cell.items()} for place, cell in cells.items()}
            row += [f"{np.mean([cell[name] for cell in values.values()]):.3f}", worst_against(LRU, name, values)]
        rows.append(tuple(row))
    columns = ["policy", "objects, mean", "worst against LRU", "bytes, mean", "worst against LRU"]
    title = f"Objects of {SIZED[0] / 1e3:.0f} kB to {SIZED[1] / 1e6:.0f} MB: hit ratio of objects and of bytes"
    report.table(f"{title} (MIN ignores sizes here, and is no limit)", columns, rows)
    kinds = []
    for kind, all_ in measured.items():
        ratios_ = [[all_[share][name] for name in (OURS, LRU)] for share in SHARES]
        kinds.append((kind, *(f"{a[0]:.2f}, {a[1]:.2f} / {b[0]:.2f}, {b[1]:.2f}" for a, b in ratios_)))
    columns = ["trace", *(f"{share:.0%} of the bytes" for share in SHARES)]
    report.table("Objects, bytes: adaptive / LRU", columns, kinds)


# -- end to end


def work(root: str, policy: Literal["lru", "adaptive"], room: int, trace: Trace, at: Any, hits: Any) -> None:
    """In each process: take some accesses, as long as there are any."""
    store = xzcache.LockedLocalStore(root, max_size=room, min_free=0, policy=policy)
    value = default_buffer_prototype().buffer.from_bytes(bytes(BYTES))
    found = 0
    while True:
        with at.get_lock():
            begin = at.value
            at.value += IN_A_ROW
        if begin >= len(trace):
            break
        for key in trace[begin : begin + IN_A_ROW].tolist():
            if store.get_sync(f"data/c/{key}") is not None:
                found += 1
            else:
                store.set_sync(f"data/c/{key}", value)
    with hits.get_lock():
        hits.value += found


def end_to_end(trace: Trace, policy: str, room: int) -> float:
    spawning = multiprocessing.get_context("spawn")
    at, hits = spawning.Value(c_long, 0), spawning.Value(c_long, 0)
    with tempfile.TemporaryDirectory() as root:
        start = partial(spawning.Process, target=work, args=(root, policy, room * BYTES, trace, at, hits))
        processes = [start() for _ in range(PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return float(hits.value) / len(trace)


def run_real(report: Report, seed: int, length: int) -> None:
    rows = []
    for kind, keys, share in [*product(END_TO_END, (SMALL,), (0.25, 0.5)), *product(END_TO_END[:2], (LARGE,), (0.5,))]:
        # a few rounds are enough for those of many keys
        trace = make(kind, seed, keys, length if keys == SMALL else 5 * keys)
        room = int(share * len(np.unique(trace)))
        row = [f"{kind}, {share:.0%} of {keys}"]
        for policy, name in {"adaptive": OURS, "lru": OUR_LRU}.items():
            real, pure = end_to_end(trace, policy, room), POLICIES[name](trace, room).mean()
            row += [f"{real:.3f}", f"{pure:.3f}", f"{real - pure:+.3f}"]
        rows.append(tuple(row))
    columns = ["trace", "adaptive", "pure", "difference", "LRU", "pure", "difference"]
    report.table(f"End to end: {PROCESSES} processes, chunks of {BYTES} bytes", columns, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--replay", type=Path, help="a trace that was recorded, in place of those made up")
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--keys", type=int, default=4000)
    parser.add_argument("--length", type=int, default=100_000, help="accesses of each trace")
    parser.add_argument("--no-end-to-end", action="store_true", help="only pure objects")
    options = parser.parse_args()
    if options.replay is not None:
        keys, sizes = recorded(options.replay)
        with Report("policy-replay", options.out) as report:
            total = sum(dict(zip(keys.tolist(), sizes.tolist(), strict=True)).values())
            report.say(f"{len(keys)} uses of {len(np.unique(keys))} entries, of {total / 1e6:.1f} MB together.")
            cells = ratios(keys)
            rows = [(name, *(f"{cells[share][name]:.3f}" for share in SHARES)) for name in POLICIES]
            columns = ["hit ratio", *(f"bound of {share * total / 1e6:.3g} MB" for share in SHARES)]
            report.table("Of entries that are taken to be of one size", columns, rows)
        return
    with Report("policy", options.out) as report:
        report.say(f"Seed {options.seed}: {options.length} accesses to about {options.keys} keys of one size.")
        kinds = [*DESCRIBED, *GUESSES]
        with multiprocessing.get_context("spawn").Pool(2 if options.full else 1) as pool:
            traces = [make(kind, options.seed, options.keys, options.length) for kind in kinds]
            measured = dict(zip(kinds, pool.map(ratios, traces, chunksize=1), strict=True))
            some = [(options.seed, kind, options.length) for kind in DESCRIBED]
            of_sizes = dict(zip(DESCRIBED, pool.map(sized, some, chunksize=1), strict=True))
            others = list(product((options.seed,), DESCRIBED, ROOMS, SHARES_OF_ROOMS))
            in_rooms = dict(zip(others, pool.map(of_room, others, chunksize=1), strict=True))
        summarize(report, measured)
        show(report, measured)
        run_rooms(report, options.seed, in_rooms)
        show_sized(report, of_sizes)
        if not options.no_end_to_end:
            run_real(report, options.seed, options.length * 3 // 10)


if __name__ == "__main__":
    main()
