"""Policies, run through traces: as pure objects, in the batches that the index would give them."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xzcache._adaptive import Adaptive, Uses

Trace = NDArray[np.int64]


def following(trace: Trace) -> Trace:
    """For each access, when the same key is used next; a time after all others where it is not."""
    order = np.lexsort((np.arange(len(trace)), trace))
    result = np.full(len(trace), np.iinfo(np.int64).max // 2)
    same = trace[order][1:] == trace[order][:-1]
    result[order[:-1][same]] = order[1:][same]
    return result


def best(trace: Trace, room: int) -> float:
    """Belady's MIN, which may also not admit; keys of one size."""
    upcoming = following(trace).tolist()
    never = len(trace)
    due: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for key, then in zip(trace.tolist(), upcoming, strict=True):
        if key in due:
            hits += 1
            del due[key]
        if then >= never:
            continue
        due[key] = then
        heapq.heappush(heap, (-then, key))
        while len(due) > room:
            late, loser = heapq.heappop(heap)
            if due.get(loser) == -late:
                del due[loser]
    return hits / len(trace)


def least_recent(trace: Trace, room: int) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in trace.tolist():
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            held[key] = None
            if len(held) > room:
                held.popitem(last=False)
    return hits / len(trace)


def without_eviction(trace: Trace, room: int) -> float:
    held: set[int] = set()
    hits = 0
    for key in trace.tolist():
        if key in held:
            hits += 1
        elif len(held) < room:
            held.add(key)
    return hits / len(trace)


class Dueling:
    """DIP: insertion at the recent or the old end, whichever loses fewer of the keys that are set aside for it."""

    def __init__(self, room: int, seed: int = 0) -> None:
        self.room = room

    def run(self, trace: Trace) -> float:
        held: OrderedDict[int, None] = OrderedDict()
        hits, duel, limit, count = 0, 0, 1024, 0
        hashes = hashed(np.arange(int(trace.max()) + 1)) & 63
        for key in trace.tolist():
            if key in held:
                hits += 1
                held.move_to_end(key)
                continue
            team = hashes[key]
            if team < 4:
                duel = min(limit, duel + 1)
            elif team < 8:
                duel = max(-limit, duel - 1)
            recent = team < 4 or (team >= 8 and duel <= 0)
            if len(held) >= self.room:
                held.popitem(last=False)
            held[key] = None
            count += 1
            if not recent and count % 32:
                held.move_to_end(key, last=False)
        return hits / len(trace)


def recorded(path: Path) -> tuple[Trace, Trace]:
    """The keys of a trace that was recorded, numbered, in the order of time, and the sizes of what they are of."""
    lines = sorted(line.split() for line in path.read_text().splitlines())
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(key, len(numbers)) for _, key, _ in lines]
    return np.array(keys, np.int64), np.array([int(size) for *_, size in lines], np.int64)


def hashed(keys: Trace) -> Trace:
    """62 bits, evenly."""
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


def adaptive(
    trace: Trace, room: int, *, processes: int = 4, late: int = 256, batch: float = 1 / 32, seed: int = 0,
    make: Callable[[], Adaptive] = Adaptive, run: int = 16, ghosts: float = 10, least: int = 0, made: list[Adaptive] | None = None,
) -> float:
    """Through several processes that tell their hits in batches and evict in batches."""
    policy = make()
    count = int(trace.max()) + 1
    hashes = hashed(np.arange(count))
    last, gaps = np.zeros(count, np.int64), np.zeros(count, np.int64)
    gone = np.full(count, -1, np.int64)
    resident = [False] * count
    rng = np.random.default_rng(seed)
    who = np.repeat(rng.integers(0, processes, len(trace) // run + 1), run)[: len(trace)].tolist()
    told: list[dict[int, None]] = [{} for _ in range(processes)]
    log_ticks: list[int] = []
    log_keys: list[int] = []
    leavers: list[tuple[int, int]] = []
    tick = used = found = left = 0

    def use(key: int) -> None:
        gap, interval = int(gaps[key]), tick - int(last[key])
        gaps[key] = max(1, gap + (interval - gap) // 4 if gap else interval)
        last[key] = tick

    def tell(process: int) -> None:
        nonlocal tick
        for key in told[process]:
            tick += 1
            log_ticks.append(tick)
            log_keys.append(key)
            use(key)
        told[process].clear()

    def plan() -> None:
        keys = np.array(log_keys, np.int64)
        policy.learn(Uses(np.array(log_ticks, np.int64), hashes[keys], np.ones(len(keys), np.int64)), used, room)
        log_ticks.clear()
        log_keys.clear()
        rows = np.flatnonzero(resident)
        score = last[rows] if policy.prefers_recency else policy.worth_of(gaps[rows], tick - last[rows])
        most = max(16, int(batch * len(rows)))
        order = rows[np.argsort(score, kind="stable")[:most]]
        leavers.extend((int(row), int(last[row])) for row in order[::-1])

    for key, process in zip(trace.tolist(), who, strict=True):
        if resident[key]:
            found += 1
            told[process][key] = None
            if len(told[process]) >= late:
                tell(process)
            continue
        while used >= room:
            tell(process)
            while leavers:
                row, seen = leavers.pop()
                if resident[row] and last[row] == seen:
                    resident[row] = False
                    gone[row] = left
                    left += 1
                    used -= 1
                    break
            else:
                plan()
        tick += 1
        log_ticks.append(tick)
        log_keys.append(key)
        resident[key] = True
        used += 1
        if gone[key] >= 0 and tick - last[key] <= max(ghosts * room, least):
            use(key)
        else:
            gaps[key], last[key] = 0, tick
    if made is not None:
        made.append(policy)
    return found / len(trace)
