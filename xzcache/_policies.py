"""Who leaves to make room: policies, which are told of uses, and choose, from the index that they are given.

Policies of several processes may differ: whoever makes room does so by its own, and nothing that one writes into the
index keeps another from working.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from xzcache._adaptive import Adaptive, Uses, limit_for
from xzcache._eviction import least_recently_used, unused_since
from xzcache._history import hash_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from xzcache._eviction import Choice
    from xzcache._index import Index
    from xzcache._keys import Entry
    from xzcache._reuse import Ints
    from xzcache._schema import Row

_BATCH: Final = 128
_HEARD: Final = 4096
"""How many uses of watched keys may wait until somebody learns from them."""
_LOOKED_AT: Final = 8192
_RUNS: Final = 32
_LEAVING: Final = 32
"""Of those who were looked at, one in so many leaves, the least worth first."""
_FEWEST: Final = 16
_GHOSTS: Final = 16
"""For how many uses ghosts are kept, in entries of the cache: there are never more of them."""
_FEWEST_GHOSTS: Final = 50_000


class Told(NamedTuple):
    """Uses of entries, in ns since the epoch, and entries that have come."""

    uses: Mapping[Entry, int]
    arrived: Sequence[Entry]


class Policy(Protocol):
    """Decides who leaves. All its methods are called within a section.

    Attributes
    ----------
    name : str
    evicts : bool
        Whether entries leave for new ones.
    """

    name: str
    evicts: bool

    def tell(self, index: Index, told: Told) -> None:
        """Write down what was used, and what has come."""

    def choose(self, index: Index, want: int) -> list[Row]:
        """Who leaves next for `want` bytes: some, as long as there are any."""


class LeastRecentlyUsed:
    """What was not used for the longest time leaves first."""

    name = "lru"
    evicts = True

    def tell(self, index: Index, told: Told) -> None:
        if told.uses:
            index.touch(told.uses)

    def choose(self, index: Index, want: int) -> list[Row]:
        return _first(index, least_recently_used, want)


class Admitting(LeastRecentlyUsed):
    """Nothing leaves for anything new; where the bound was lowered, what was not used for the longest time."""

    name = "none"
    evicts = False


class Learning:
    """What is least likely to be used soon leaves first, as `Adaptive` has learned from the uses."""

    name = "adaptive"
    evicts = True

    def __init__(self) -> None:
        self._adaptive = Adaptive()
        self._serial = 0
        self._heard = self._learned_at = 0
        self._draw = random.Random()

    def tell(self, index: Index, told: Told) -> None:
        history = index.history
        before, entries = history.pass_time(len(told.arrived) + len(told.uses))
        limit = limit_for(entries)
        watched = []
        for tick, entry in enumerate(told.arrived, before + 1):
            key = hash_of(entry)
            history.arrive(tick, entry, key)
            if key < limit:
                watched.append((tick, key, entry))
        if told.uses:
            latest = sorted(told.uses.items(), key=lambda use: use[1])
            uses = [(tick, entry, used) for tick, (entry, used) in enumerate(latest, before + len(told.arrived) + 1)]
            history.touch(uses)
            watched += ((tick, key, entry) for tick, entry, _ in uses if (key := hash_of(entry)) < limit)
        history.hear(watched)
        self._heard += len(watched)
        if self._heard > _HEARD:
            self._learn(index)

    def choose(self, index: Index, want: int) -> list[Row]:
        victims = self._next(index, want)
        if not victims:
            self._learn(index)
            if not self._adaptive.prefers_recency and self._rank(index):
                victims = self._next(index, want)
        victims = victims or _first(index, least_recently_used, want)
        index.history.bury((row.entry, row.id) for row in victims)
        return victims

    def _next(self, index: Index, want: int) -> list[Row]:
        """Of those who were ranked before all others, the next ones that were not used since."""
        return _first(index, partial(unused_since, index.history.chosen()), want)

    def _rank(self, index: Index) -> bool:
        """Rank some of the least worth before all others; False where there is nobody."""
        rows = index.history.some_entries(_LOOKED_AT, [self._draw.random() for _ in range(_RUNS)])
        if not rows:
            return False
        ids, ticks, gaps = _columns(rows, 3)
        ids, first = np.unique(ids, return_index=True)
        ticks, gaps, now = ticks[first], gaps[first], index.history.now()
        order = np.argsort(self._adaptive.worth_of(gaps, now - ticks), kind="stable")
        leaving = ids[order[: max(_FEWEST, len(ids) // _LEAVING)]]
        index.history.let_leave(leaving.tolist(), now)
        return True

    def _learn(self, index: Index) -> None:
        """Learn from what all processes have heard, on top of what any of them has learned, if there is enough."""
        history, totals = index.history, index.totals()
        now = history.now()
        if self._heard <= _HEARD and 0 <= now - self._learned_at < totals.entries // _LEAVING:
            return
        if history.learned_serial() != self._serial:
            self._adaptive = _restored(index)
        heard = _columns(history.take_heard(), 3)
        room = float("inf") if totals.max_size is None else float(totals.max_size)
        self._adaptive.learn(Uses(*heard), totals.entries, room)
        self._serial = history.set_learned(self._adaptive.to_bytes())
        self._heard, self._learned_at = 0, now
        history.forget_ghosts(now - max(_FEWEST_GHOSTS, _GHOSTS * totals.entries), self._serial)


POLICIES: Final[Mapping[str, type[LeastRecentlyUsed | Admitting | Learning]]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, Admitting, Learning)
}


def _first(index: Index, chosen: Choice[Row], want: int) -> list[Row]:
    """Victims among the entries of lowest rank; ranks that lag behind are put right on the way."""
    totals = index.totals()
    # so many leave, if they are as large as most; as many again may have been used meanwhile
    expected = want * totals.entries // max(1, totals.size) + 1
    while rows := index.by_rank(2 * min(_BATCH, expected)):
        victims, ranks = chosen(rows, want, _BATCH)
        index.set_rank(ranks)
        if victims or not ranks:
            return victims
    return []


def _restored(index: Index) -> Adaptive:
    """What was learned; from nothing, where that cannot be read."""
    learned = index.history.learned()
    try:
        return Adaptive() if learned is None else Adaptive.from_bytes(learned.state)
    except ValueError:
        return Adaptive()


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> Iterable[Ints]:
    flat = np.fromiter(chain.from_iterable(rows), np.int64, count * len(rows))
    return flat.reshape(-1, count).T.copy()
