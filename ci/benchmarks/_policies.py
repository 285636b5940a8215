"""Policies as pure objects, run through traces of keys; for each, which accesses are hits.

`adaptive` is the package's own, in the batches in which the index tells it of uses, and asks it who leaves. Sizes are
in any unit, by key; without them, all keys are of size 1.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xzcache.eviction import _policies as package
from xzcache.eviction import _recency as pace
from xzcache.eviction._adaptive import Adaptive, Uses

Trace = NDArray[np.int64]
Hits = NDArray[np.bool_]

PROCESSES: Final = 4
IN_A_ROW: Final = 16
"""How many accesses one process makes before another does."""
_TOLD: Final = 128
_RUNS: Final = 16
_ALL: Final = 4096
_SOME: Final = 128
"""How many entries are looked at in place of 4096, as if the cache were as much larger."""
_GHOSTS: Final = (50_000, 16)


def sizes_or_ones(trace: Trace, sizes: Trace | None) -> Trace:
    return np.ones(int(np.max(trace)) + 1, np.int64) if sizes is None else sizes


def best(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    """Belady's MIN, which need not admit: whoever is used next the latest leaves; the limit, if all are of one size."""
    order = np.lexsort((np.arange(len(trace)), trace))
    upcoming = np.full(len(trace), len(trace))
    same = trace[order][1:] == trace[order][:-1]
    upcoming[order[:-1][same]] = order[1:][same]
    size = sizes_or_ones(trace, sizes).tolist()
    due: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    hits, held = np.zeros(len(trace), np.bool_), 0
    for at, (key, then) in enumerate(zip(trace.tolist(), upcoming.tolist(), strict=True)):
        if due.pop(key, None) is not None:
            hits[at] = True
            held -= size[key]
        if then == len(trace):
            continue
        due[key] = then
        held += size[key]
        heapq.heappush(latest, (-then, key))
        while held > room:
            late, loser = heapq.heappop(latest)
            if due.get(loser) == -late:
                del due[loser]
                held -= size[loser]
    return hits


class _Recency:
    """Keys in the order of their use; one that comes may be put where it leaves first."""

    def __init__(self, room: int, size: list[int]) -> None:
        self.room = room
        self._size = size
        self._held = 0
        self._keys: OrderedDict[int, None] = OrderedDict()

    def use(self, key: int, *, stays: bool = True) -> bool:
        if key in self._keys:
            self._keys.move_to_end(key)
            return True
        if self._size[key] > self.room:
            return False
        self._held += self._size[key]
        while self._held > self.room:
            self._held -= self._size[self._keys.popitem(last=False)[0]]
        self._keys[key] = None
        self._keys.move_to_end(key, last=stays)
        return False


def least_recent(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    held = _Recency(room, sizes_or_ones(trace, sizes).tolist())
    return np.array([held.use(key) for key in trace.tolist()])


def none(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    size = sizes_or_ones(trace, sizes).tolist()
    held: set[int] = set()
    hits, left = np.zeros(len(trace), np.bool_), room
    for at, key in enumerate(trace.tolist()):
        hits[at] = key in held
        if not hits[at] and size[key] <= left:
            held.add(key)
            left -= size[key]
    return hits


def dueling(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    """DIP: of two small caches of every sixteenth key, one puts who comes where it leaves first, but for every 32nd.

    The whole cache does as whichever has fewer misses.
    """
    size = sizes_or_ones(trace, sizes).tolist()
    whole, plain, bimodal = (_Recency(max(1, room // part), size) for part in (1, 16, 16))
    watched = (hashed(np.arange(len(size))) % 16 == 0).tolist()
    hits, duel = np.zeros(len(trace), np.bool_), 0
    for come, key in enumerate(trace.tolist()):
        if watched[key]:
            duel += bimodal.use(key, stays=come % 32 == 0) - plain.use(key)
            duel = max(-1024, min(1024, duel))
        hits[come] = whole.use(key, stays=duel <= 0 or come % 32 == 0)
    return hits


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

    def __init__(self, policy: Adaptive | None, size: list[int], room: int, looked_at: int) -> None:
        self.policy = policy
        self.room = room
        self.size = size
        self.is_here = [False] * len(size)
        self._hashes = hashed(np.arange(len(size)))
        self._looked_at = looked_at
        self._random = np.random.default_rng(0)
        self._sample = Random(0)
        self._came = np.zeros(0, np.int64)
        """The key of each entry that has come, by its id."""
        self._ids = np.full(len(size), -1)
        self._last, self._gaps = np.zeros(len(size), np.int64), np.zeros(len(size), np.int64)
        self._used = [0] * len(size)
        self._order: list[tuple[int, int]] = []
        """When each was used, the oldest first; it is passed over if it was used again."""
        self._told: list[dict[int, int]] = [{} for _ in range(PROCESSES)]
        self._heard: list[tuple[int, int]] = []
        self._leaving: list[tuple[int, int]] = []
        self._tick = self._count = self._held = self._learned = self._next = 0

    def hit(self, key: int, process: int, now: int) -> None:
        self._told[process][key] = now
        if len(self._told[process]) >= min(_TOLD, max(pace._FEWEST, self._count // (pace._SHARE * (PROCESSES - 1)))):
            self._tell(process)

    def come(self, key: int, process: int, now: int) -> None:
        if self.size[key] > self.room:
            return
        while self._held + self.size[key] > self.room:
            self._tell(process)
            self._leave(self._next_victim())
        fewest, share = _GHOSTS
        if self._last[key] and self._tick - self._last[key] > max(fewest, share * self._count):
            self._last[key] = self._gaps[key] = 0
        if self._next == len(self._came):
            self._came = np.append(self._came, np.full(10_000 + self._next, -1))
        self._came[self._next], self._ids[key] = key, self._next
        self._next += 1
        self.is_here[key] = True
        self._count += 1
        self._held += self.size[key]
        self._use(key, now)

    def _tell(self, process: int) -> None:
        for key, when in self._told[process].items():
            if self.is_here[key]:
                self._use(key, when)
        self._told[process].clear()

    def _use(self, key: int, when: int) -> None:
        self._tick += 1
        if (last := int(self._last[key])) > 0:
            gap, interval = int(self._gaps[key]), self._tick - last
            self._gaps[key] = max(1, gap + (interval - gap) // 4 if gap else interval)
        self._last[key] = self._tick
        self._used[key] = max(self._used[key], when)
        heapq.heappush(self._order, (self._used[key], key))
        self._heard.append((self._tick, key))

    def _leave(self, key: int) -> None:
        self._came[self._ids[key]] = -1
        self.is_here[key] = False
        self._count -= 1
        self._held -= self.size[key]

    def _next_victim(self) -> int:
        for _ in range(2):
            while self._leaving:
                id_, last = self._leaving.pop()
                key = int(self._came[id_])
                if key >= 0 and self._last[key] == last:
                    return key
            self._learn()
            if self.policy is None or self.policy.prefers_recency:
                break
            self._look(self.policy)
        while True:
            used, key = heapq.heappop(self._order)
            if self.is_here[key] and self._used[key] == used:
                return key

    def _look(self, policy: Adaptive) -> None:
        here, share = np.flatnonzero(self._came[: self._next] >= 0), package._LEAVING
        if len(here) > self._looked_at:
            watched = np.array(policy.some_ids(self._sample, 20 * _RUNS), np.int64)
            watched = watched[np.isin(watched, here)][:_RUNS]
            if self._random.random() < package._ANYWHERE or not len(watched):
                watched = np.append(watched[1:], self._random.integers(0, self._next))
            begins, run = np.searchsorted(here, watched), self._looked_at // _RUNS
            here = np.unique(np.concatenate([here[begin : begin + run] for begin in begins]))
            share = package._LEAVING_OF_SOME
        keys = self._came[here]
        worth = policy.worth_of(self._gaps[keys], self._tick - self._last[keys])
        first = np.argsort(worth, kind="stable")[: max(1, len(here) // share)]
        self._leaving = list(zip(here[first].tolist(), self._last[keys[first]].tolist(), strict=True))[::-1]

    def _learn(self) -> None:
        enough = max(package._REFRESHED, self._count // package._EVERY)
        if self.policy is None or self._tick - self._learned < enough:
            return
        ticks, keys = np.array(self._heard, np.int64).reshape(-1, 2).T
        uses = Uses(ticks, self._hashes[keys], np.array(self.size)[keys], self._ids[keys])
        self.policy.learn(uses, self._count, self.room)
        self._heard, self._learned = [], self._tick


def adaptive(trace: Trace, room: int, sizes: Trace | None = None, *, made: list[Adaptive] | None = None) -> Hits:
    """Several processes, which tell of their hits late."""
    policy = Adaptive()
    if made is not None:
        made.append(policy)
    return _shared(trace, room, sizes, policy, _ALL)


def adaptive_in_parts(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    """As in a cache so large that only a part of it is looked at before somebody leaves."""
    return _shared(trace, room, sizes, Adaptive(), _SOME)


def least_recent_told(trace: Trace, room: int, sizes: Trace | None = None) -> Hits:
    """As `least_recent`, by several processes, which tell of their hits as late as those of `adaptive` do."""
    return _shared(trace, room, sizes, None, _ALL)


def _shared(trace: Trace, room: int, sizes: Trace | None, policy: Adaptive | None, looked_at: int) -> Hits:
    cache = _Cache(policy, sizes_or_ones(trace, sizes).tolist(), room, looked_at)
    hits = np.zeros(len(trace), np.bool_)
    for now, (key, process) in enumerate(zip(trace.tolist(), turns(len(trace)).tolist(), strict=True), 1):
        if cache.is_here[key]:
            hits[now - 1] = True
            cache.hit(key, process, now)
        else:
            cache.come(key, process, now)
    return hits


Run = Callable[..., Hits]

POLICIES: Final[Mapping[str, Run]] = {
    "xzcache adaptive": adaptive,
    "adaptive, large xzcache": adaptive_in_parts,
    "xzcache LRU": least_recent_told,
    "LRU": least_recent,
    "none": none,
    "DIP": dueling,
    "MIN, the limit": best,
}
