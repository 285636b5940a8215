"""What other bounds would give: predicted miss ratios against replays at 0.25, 0.5, 2 and 4 times the bound.

The traces of ``ci/bench policy`` run through a cache that holds a fifth of their keys, by several processes that tell
of their uses in batches; from the sample that these leave, the miss ratios with other bounds are predicted. Then the
same trace runs with each of these bounds. ``--real`` does so with a real cache, through `CacheStore`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Final

import numpy as np
from _policies import PROCESSES, Trace, _Cache, _Recency, turns
from _report import Report, arguments
from _traces import DESCRIBED, GUESSES, make
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

import xzcache
from xzcache._config import PolicyName
from xzcache.directory import Sample, predicted
from xzcache.directory._statistics import WATCHED, sampled_uses
from xzcache.eviction._adaptive import Adaptive
from xzcache.index import SAMPLED, UsesRow, lot_of
from xzcache.index._statistics import MOST_USES
from xzcache.manage import curve
from xzcache.model import Entry

SHARE: Final = 0.2
FACTORS: Final = (0.25, 0.5, 2, 4)
WITHIN: Final = 0.03
BYTES: Final = 2000
TOLD: Final = 256
LONGEST: Final = 20_000
"""Accesses after which a process tells of its uses in any case, as it does after seconds."""
EVERY: Final = 16
"""Reports to the policy between two reports to the statistics."""
STEP_NS: Final = 50_000
REAL: Final = ("epochs over everything", "Zipf 1.0", "time means, maps, hot regions")


def sampled(trace: Trace, room: int) -> Sample:
    """The sample that processes leave in the index, as `xzcache.directory` makes it."""
    entries = [Entry(f"n/c/{key}") for key in range(int(np.max(trace)) + 1)]
    shift = (min(room, len(entries)) // WATCHED).bit_length()
    limit = 1 << 32 >> shift
    held = _Recency(room, [1] * len(entries))
    uses: list[dict[Entry, int]] = [{} for _ in range(PROCESSES)]
    parts: list[list[bytes]] = [[] for _ in range(PROCESSES)]
    # hits, misses, used, accesses, reports
    counts = np.zeros((PROCESSES, 5), np.int64)
    rows = [UsesRow(0, 0, 0, 0, 0, b"")]

    def tell(process: int) -> None:
        parts[process].append(sampled_uses(uses[process], limit))
        counts[process, 2] += len(uses[process])
        uses[process] = {}

    def report(process: int) -> None:
        hits, misses, used, _, _ = counts[process].tolist()
        packed = b"".join(parts[process])
        number = rows[-1].number + len(packed) // SAMPLED.size
        rows.append(UsesRow(number, shift, hits + misses, 0, hits - used, packed))
        counts[process] = 0
        parts[process] = []

    for at, (key, process) in enumerate(zip(trace.tolist(), turns(len(trace)).tolist(), strict=True)):
        now = (at + 1) * STEP_NS
        is_hit = held.use(key)
        counts[process] += (is_hit, not is_hit, 0, 1, 0)
        if is_hit:
            uses[process][entries[key]] = now
        if not is_hit or len(uses[process]) >= TOLD or counts[process, 3] % LONGEST == 0:
            tell(process)
            counts[process, 4] += 1
        if not is_hit and (lot := lot_of(entries[key])) < limit:
            parts[process].append(SAMPLED.pack(now, lot, BYTES, 0))
        if counts[process, 4] >= EVERY:
            report(process)
    for process in range(PROCESSES):
        tell(process)
        report(process)
    kept = rows if rows[-1].number <= MOST_USES else [row for row in rows if row.number > rows[-1].number - MOST_USES]
    return Sample.of(kept, BYTES)


def replayed(trace: Trace, room: int, policy: str, begin: int) -> float:
    """The part of the accesses, from one on, that are misses."""
    misses = 0
    sizes = [1] * (int(np.max(trace)) + 1)
    if policy == "lru":
        held = _Recency(room, sizes)
        for number, key in enumerate(trace.tolist()):
            misses += not held.use(key) and number >= begin
    else:
        cache = _Cache(Adaptive(), sizes, room, 4096)
        for number, (key, process) in enumerate(zip(trace.tolist(), turns(len(trace)).tolist(), strict=True)):
            if cache.is_here[key]:
                cache.hit(key, process, number)
            else:
                cache.come(key, process, number)
                misses += number >= begin
    return misses / (len(trace) - begin)


def compare(trace: Trace, policy: str, most: int | None) -> dict[float, tuple[float, float]]:
    """For each factor, the predicted miss ratio and that of a replay."""
    room = max(1, int(SHARE * len(np.unique(trace))))
    sample = sampled(trace, room)
    if most is not None:
        sample = sample.thinned(most)
    begin = 0 if sample.is_whole else int(sample.at[sample.counted_from]) // STEP_NS
    rooms = [max(1, int(room * factor)) for factor in FACTORS]
    ratios = predicted(sample, [room * BYTES for room in rooms], policy) or [float("nan")] * len(FACTORS)
    return {
        factor: (ratio, replayed(trace, room, policy, begin))
        for factor, ratio, room in zip(FACTORS, ratios, rooms, strict=True)
    }


def read_all(root: str, trace: Trace, policy: PolicyName, room: int) -> float:
    """Read a trace through a real cache; the part of the reads that are misses."""
    prototype = default_buffer_prototype()
    source = MemoryStore({f"c/{key}": prototype.buffer.from_bytes(bytes(BYTES)) for key in set(trace.tolist())})
    cache = xzcache.LockedLocalStore(root, max_size=room * BYTES, min_free=0, policy=policy)
    store = xzcache.CacheStore(source, cache_store=cache, namespace="n", read_only=True, revalidate=False)

    async def read() -> None:
        for key in trace.tolist():
            await store.get(f"c/{key}", prototype)

    sync(read())
    stats = store.cache_stats()
    cache.directory.close()
    return 1 - stats["hit_rate"]


def compare_real(trace: Trace, policy: PolicyName, most: int | None) -> dict[float, tuple[float, float]]:
    room = max(1, int(SHARE * len(np.unique(trace))))
    found = {}
    with tempfile.TemporaryDirectory() as root:
        read_all(root, trace, policy, room)
        ratios = curve(root, factors=FACTORS, policy=policy, most=most).miss_ratios
    for factor, ratio in zip(FACTORS, ratios, strict=True):
        with tempfile.TemporaryDirectory() as root:
            found[factor] = ratio, read_all(root, trace, policy, max(1, int(room * factor)))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=1001)
    parser.add_argument("--keys", type=int, default=4000)
    parser.add_argument("--length", type=int, default=100_000, help="accesses of each trace")
    parser.add_argument("--most", type=int, help="predict from so many uses, as the report does from 32768")
    parser.add_argument("--policy", choices=["lru", "adaptive"], action="append", help="default: both")
    parser.add_argument("--trace", action="append", help="only traces whose name has this word")
    parser.add_argument("--real", action="store_true", help="through a real cache, which takes long")
    options = parser.parse_args()
    kinds = [*DESCRIBED, *GUESSES]
    if options.trace:
        kinds = [kind for kind in kinds if any(word in kind for word in options.trace)]
    elif options.real:
        kinds = list(REAL)
    with Report("curve-real" if options.real else "curve", options.out) as report:
        report.say(f"Seed {options.seed}: {options.length} accesses to about {options.keys} keys of one size.")
        for policy in options.policy or ["lru", "adaptive"]:
            rows, errors = [], []
            began = time.perf_counter()
            for kind in kinds:
                trace = make(kind, options.seed, options.keys, options.length)
                run = compare_real if options.real else compare
                found: Mapping[float, tuple[float, float]] = run(trace, policy, options.most)
                cells = [f"{ratio:.3f} / {true:.3f}" for ratio, true in found.values()]
                errors += [(abs(ratio - true), f"{kind}, {factor:g}") for factor, (ratio, true) in found.items()]
                rows.append((kind, *cells, f"{max(abs(ratio - true) for ratio, true in found.values()):.3f}"))
            columns = ["trace", *(f"{factor:g} times" for factor in FACTORS), "worst"]
            report.table(f"Miss ratio, predicted / replayed: policy {policy}", columns, rows)
            good = sum(error <= WITHIN for error, _ in errors)
            worst, where = max(errors)
            mean = sum(error for error, _ in errors) / len(errors)
            report.say(
                f"Policy {policy}: {good} of {len(errors)} within {WITHIN:.0%}; mean error {mean:.4f}, the worst "
                f"{worst:.3f} ({where}); {time.perf_counter() - began:.0f} s."
            )


if __name__ == "__main__":
    main()
