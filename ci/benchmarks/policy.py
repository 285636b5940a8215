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

Cells = Mapping[float, Mapping[str, float]]


def ratios(trace: Trace) -> Cells:
    """For each share of the keys that fits, the hit ratio of each policy."""
    keys = len(np.unique(trace))
    rooms = {share: max(1, int(share * keys)) for share in SHARES}
    return {share: {name: run(trace, room) for name, run in POLICIES.items()} for share, room in rooms.items()}


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
            real, pure = end_to_end(trace, policy, room), POLICIES[name](trace, room)
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
        summarize(report, measured)
        show(report, measured)
        if not options.no_end_to_end:
            run_real(report, options.seed, options.length * 3 // 10)


if __name__ == "__main__":
    main()
