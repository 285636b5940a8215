"""Policies as pure objects, run through traces of keys of one size; for each, the share of accesses that are hits.

`adaptive` is the package's own, in the batches in which the index tells it of uses, and asks it who leaves.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xzcache.eviction._adaptive import Adaptive, Uses

Trace = NDArray[np.int64]

PROCESSES: Final = 4
IN_A_ROW: Final = 16
"""How many accesses one process makes before another does."""
_TOLD: Final = 256
_EVERY: Final = 32
_FEWEST: Final = 16
_RUNS: Final = 16
_LEAVING, _LEAVING_OF_SOME = 32, 16
_ALL: Final = 4096
_SOME: Final = 128
"""How many entries are looked at in place of 4096, as if the cache were as much larger."""
_GHOSTS: Final = (50_000, 16)


def best(trace: Trace, room: int) -> float:
    """Belady's MIN, which need not admit: whoever is used next the latest leaves."""
    order = np.lexsort((np.arange(len(trace)), trace))
    upcoming = np.full(len(trace), len(trace))
    same = trace[order][1:] == trace[order][:-1]
    upcoming[order[:-1][same]] = order[1:][same]
    due: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    hits = 0
    for key, then in zip(trace.tolist(), upcoming.tolist(), strict=True):
        hits += due.pop(key, None) is not None
        if then == len(trace):
            continue
        due[key] = then
        heapq.heappush(latest, (-then, key))
        while len(due) > room:
            late, loser = heapq.heappop(latest)
            if due.get(loser) == -late:
                del due[loser]
    return hits / len(trace)


class _Recency:
    """Keys in the order of their use; one that comes may be put where it leaves first."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._keys: OrderedDict[int, None] = OrderedDict()

    def use(self, key: int, *, stays: bool = True) -> bool:
        if key in self._keys:
            self._keys.move_to_end(key)
            return True
        if len(self._keys) >= self.room:
            self._keys.popitem(last=False)
        self._keys[key] = None
        self._keys.move_to_end(key, last=stays)
        return False


def least_recent(trace: Trace, room: int) -> float:
    held = _Recency(room)
    return sum(held.use(key) for key in trace.tolist()) / len(trace)


def none(trace: Trace, room: int) -> float:
    held: set[int] = set()
    hits = 0
    for key in trace.tolist():
        hits += key in held
        if len(held) < room:
            held.add(key)
    return hits / len(trace)


def dueling(trace: Trace, room: int) -> float:
    """DIP: of two small caches of every sixteenth key, one puts who comes where it leaves first, but for every 32nd.

    The whole cache does as whichever has fewer misses.
    """
    whole, plain, bimodal = _Recency(room), _Recency(max(1, room // 16)), _Recency(max(1, room // 16))
    watched = (hashed(np.arange(int(np.max(trace)) + 1)) % 16 == 0).tolist()
    hits = duel = 0
    for come, key in enumerate(trace.tolist()):
        if watched[key]:
            duel += bimodal.use(key, stays=come % 32 == 0) - plain.use(key)
            duel = max(-1024, min(1024, duel))
        hits += whole.use(key, stays=duel <= 0 or come % 32 == 0)
    return hits / len(trace)


def recorded(path: Path) -> tuple[Trace, Trace]:
    """The keys of a trace that was recorded, numbered, in the order of time, and the sizes of what they are of."""
    lines = sorted(line.split() for line in path.read_text().splitlines())
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(key, len(numbers)) for _, key, _ in lines]
    return np.array(keys, np.int64), np.array([int(size) for *_, size in lines], np.int64)


def hashed(keys: Trace) -> Trace:
    """62 bits for each number, all as likely."""
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(2)).astype(np.int64))


def turns(length: int, seed: int = 0) -> Trace:
    """Which process makes each access."""
    draw = np.random.default_rng(seed).integers(0, PROCESSES, length // IN_A_ROW + 1)
    return np.asarray(np.repeat(draw, IN_A_ROW)[:length])


class _Cache:
    """What the index does for a policy: time in uses, gaps between them, ghosts, and who is to leave.

    Without a policy, what was not used for the longest time leaves.
    """

    def __init__(self, policy: Adaptive | None, hashes: Trace, room: int, looked_at: int) -> None:
        self.policy = policy
        self.room = room
        self.is_here = [False] * len(hashes)
        self._hashes = hashes
        self._looked_at = looked_at
        self._random = np.random.default_rng(0)
        self._came = np.zeros(0, np.int64)
        """The key of each entry that has come, by its id."""
        self._ids = np.full(len(hashes), -1)
        self._last, self._gaps = np.zeros(len(hashes), np.int64), np.zeros(len(hashes), np.int64)
        self._told: list[dict[int, None]] = [{} for _ in range(PROCESSES)]
        self._heard: list[tuple[int, int]] = []
        self._leaving: list[tuple[int, int]] = []
        self._tick = self._count = self._learned = self._next = 0

    def hit(self, key: int, process: int) -> None:
        self._told[process][key] = None
        if len(self._told[process]) >= _TOLD:
            self._tell(process)

    def come(self, key: int, process: int) -> None:
        while self._count >= self.room:
            self._tell(process)
            self._let_leave()
        fewest, share = _GHOSTS
        if self._last[key] and self._tick - self._last[key] > max(fewest, share * self.room):
            self._last[key] = self._gaps[key] = 0
        self._use(key)
        self.is_here[key] = True
        self._count += 1
        if self._next == len(self._came):
            self._came = np.append(self._came, np.full(10_000 + self._next, -1))
        self._came[self._next], self._ids[key] = key, self._next
        self._next += 1

    def _tell(self, process: int) -> None:
        for key in self._told[process]:
            if self.is_here[key]:
                self._use(key)
        self._told[process].clear()

    def _use(self, key: int) -> None:
        self._tick += 1
        if (last := int(self._last[key])) > 0:
            gap, interval = int(self._gaps[key]), self._tick - last
            self._gaps[key] = max(1, gap + (interval - gap) // 4 if gap else interval)
        self._last[key] = self._tick
        self._heard.append((self._tick, key))

    def _let_leave(self) -> None:
        while self._leaving:
            id_, last = self._leaving.pop()
            key = int(self._came[id_])
            if key >= 0 and self._last[key] == last:
                self._came[id_] = -1
                self.is_here[key] = False
                self._count -= 1
                return
        self._learn()
        if self.policy is None or self.policy.prefers_recency:
            here = np.flatnonzero(self.is_here)
            first = here[np.argsort(self._last[here], kind="stable")][: max(1, len(here) // _EVERY)]
            self._leaving = list(zip(self._ids[first].tolist(), self._last[first].tolist(), strict=True))[::-1]
        else:
            self._look(self.policy)

    def _look(self, policy: Adaptive) -> None:
        here, share = np.flatnonzero(self._came[: self._next] >= 0), _LEAVING
        if len(here) > self._looked_at:
            watched = policy.some_ids(self._random, 20 * _RUNS)
            watched = watched[np.isin(watched, here)][:_RUNS]
            if self._random.random() < 1 / 8 or not len(watched):
                watched = np.append(watched[1:], self._random.integers(0, self._next))
            begins, run = np.searchsorted(here, watched), self._looked_at // _RUNS
            here, share = np.unique(np.concatenate([here[begin : begin + run] for begin in begins])), _LEAVING_OF_SOME
        keys = self._came[here]
        worth = policy.worth_of(self._gaps[keys], self._tick - self._last[keys])
        fewest = min(_FEWEST, self._looked_at // share)
        first = np.argsort(worth, kind="stable")[: max(fewest, len(here) // share)]
        self._leaving = list(zip(here[first].tolist(), self._last[keys[first]].tolist(), strict=True))[::-1]

    def _learn(self) -> None:
        if self.policy is None or self._tick - self._learned < self._count // _EVERY:
            return
        ticks, keys = np.array(self._heard, np.int64).reshape(-1, 2).T
        uses = Uses(ticks, self._hashes[keys], np.ones(len(keys), np.int64), self._ids[keys])
        self.policy.learn(uses, self._count, self.room)
        self._heard, self._learned = [], self._tick


def adaptive(trace: Trace, room: int, *, made: list[Adaptive] | None = None) -> float:
    """Several processes, which tell of their hits late."""
    policy = Adaptive()
    if made is not None:
        made.append(policy)
    return _shared(trace, room, policy, _ALL)


def adaptive_in_parts(trace: Trace, room: int) -> float:
    """As in a cache so large that only a part of it is looked at before somebody leaves."""
    return _shared(trace, room, Adaptive(), _SOME)


def least_recent_told(trace: Trace, room: int) -> float:
    """As `least_recent`, by several processes, which tell of their hits as late as those of `adaptive` do."""
    return _shared(trace, room, None, _ALL)


def _shared(trace: Trace, room: int, policy: Adaptive | None, looked_at: int) -> float:
    cache = _Cache(policy, hashed(np.arange(int(np.max(trace)) + 1)), room, looked_at)
    hits = 0
    for key, process in zip(trace.tolist(), turns(len(trace)).tolist(), strict=True):
        if cache.is_here[key]:
            hits += 1
            cache.hit(key, process)
        else:
            cache.come(key, process)
    return hits / len(trace)


POLICIES: Final[Mapping[str, Callable[[Trace, int], float]]] = {
    "xzcache adaptive": adaptive,
    "adaptive, large xzcache": adaptive_in_parts,
    "xzcache LRU": least_recent_told,
    "LRU": least_recent,
    "none": none,
    "DIP": dueling,
    "MIN, the limit": best,
}
