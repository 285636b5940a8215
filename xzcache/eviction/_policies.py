"""Eviction policies: they record uses in the index, and choose entries to evict.

Processes may have different policies: each evicts by its own, and none writes data that breaks another.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

import numpy as np

from xzcache.eviction._adaptive import HASH_BITS, Adaptive, Uses, limit_for
from xzcache.index import hash_of, lot_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from xzcache.eviction._adaptive import Ints
    from xzcache.index import History, Index, Row, Totals
    from xzcache.model import Entry


# -- Which entries leave first. No disk, no clock, no SQL: entries and a limit in, victims out.


class Candidate(Protocol):
    """The attributes of an entry that a policy uses: sizes in bytes, times in any unit that grows."""

    @property
    def id(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def rank(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def least_recently_used(rows: Sequence[C], want: int, most: int) -> tuple[list[C], list[tuple[int, int]]]:
    """Choose victims by exact least recent use, from rows whose ranks may lag behind.

    A hit updates `used` only; the index is ordered by `rank`, which is never above `used`. An entry of lowest rank that
    was used since gets its true rank and is skipped. An entry whose rank is true is the oldest of all. So a hit needs
    no update of an ordered index.

    `rows` are ordered by rank. At least `want` bytes and at most `most` entries are chosen. Returns the victims, and
    `(rank, id)` of the skipped entries. If there are any, victims stop at the first rank above theirs; call again for
    more.
    """
    victims: list[C] = []
    ranks: list[tuple[int, int]] = []
    freed = 0
    horizon: int | None = None
    for row in rows:
        if freed >= want or len(victims) >= most or (horizon is not None and row.rank >= horizon):
            break
        if row.used > row.rank:
            ranks.append((row.used, row.id))
            horizon = row.used if horizon is None else min(horizon, row.used)
        else:
            victims.append(row)
            freed += row.size
    return victims, ranks


# -- The policies.

# victims of one section, for which other processes wait
_BATCH: Final = 128
_QUEUED: Final = 4096
"""The uses of watched keys that may wait before they are learned from."""
_MOST_QUEUED: Final = 4 * _QUEUED
"""How many uses are learned from at once: of more, the latest."""
# entries of a larger cache are scanned in this many only, so that the time under the guard stays the same
_LOOKED_AT: Final = 4096
_RUNS: Final = 64
_LEAVING: Final = 64
"""When scanning all entries, evict the lowest-scored 1/64. Each victim costs a scan of so many rows."""
_LEAVING_OF_SOME: Final = 16
_CANDIDATES: Final = 900
"""The number of watched keys to look up, of which some may still be cached."""
_ANYWHERE: Final = 0.125
_EVERY: Final = 32
"""Learn when the number of uses since the last time is 1/32 of the number of entries, ..."""
_REFRESHED: Final = 200
"""... but not more often than what was learned changes: each time, all of it is read and written."""
_GHOSTS: Final = 16
"""For how many uses ghosts are kept, in entries of the cache: there are never more of them."""
_FEWEST_GHOSTS: Final = 50_000


class UseBatch(NamedTuple):
    """Uses of entries, in ns since the epoch, and new entries."""

    uses: Mapping[Entry, int]
    arrived: Collection[Entry]


class Policy(Protocol):
    """An eviction policy, called within a section; `evicts` tells whether new entries replace old ones."""

    name: str
    evicts: bool

    def record(self, index: Index, batch: UseBatch) -> None:
        """Record uses and new entries."""

    def choose(self, index: Index, want: int) -> list[Row]:
        """Choose entries to evict for `want` bytes; at least one if there is any."""


class LeastRecentlyUsed:
    """Evicts the least recently used entries."""

    name = "lru"
    evicts = True

    def record(self, index: Index, batch: UseBatch) -> None:
        if batch.uses:
            index.touch(batch.uses)

    def choose(self, index: Index, want: int) -> list[Row]:
        return _oldest(index, want)


class NoEviction(LeastRecentlyUsed):
    """Evicts nothing for new entries; after the bound was lowered, the least recently used entries."""

    name = "none"
    evicts = False


class Learning:
    """Evicts the entries that `Adaptive` expects to be used the least."""

    name = "adaptive"
    evicts = True

    def __init__(self) -> None:
        self._adaptive = Adaptive()
        self._serial = 0
        self._entries = self._learned_at = 0
        self._queued = -1
        self._leaving: list[tuple[int, int]] = []
        self._found_at = 0
        self._random = np.random.default_rng()

    def record(self, index: Index, batch: UseBatch) -> None:
        history = index.history
        if self._queued < 0:
            # other processes may have queued uses and left
            self._queued = history.queued_uses(_QUEUED + 1)
        self._entries += len(batch.arrived)
        self._queue(history, batch.arrived)
        if batch.uses:
            before, self._entries = history.pass_time(len(batch.uses))
            latest = sorted(batch.uses.items(), key=lambda use: use[1])
            history.touch((tick, entry, used) for tick, (entry, used) in enumerate(latest, before + 1))
            self._queue(history, batch.uses)
        if self._queued > _QUEUED:
            self._learn(index, is_full=False)

    def _queue(self, history: History, entries: Iterable[Entry]) -> None:
        limit = limit_for(self._entries) >> 30
        watched = [(hash_of(entry), entry) for entry in entries if lot_of(entry) < limit]
        if watched:
            history.queue_uses(watched)
            self._queued += len(watched)

    def choose(self, index: Index, want: int) -> list[Row]:
        index.pins.release_ended()
        victims = self._next(index, want)
        if not victims:
            self._learn(index, is_full=True)
            if not self._adaptive.prefers_recency:
                self._look(index, want)
                victims = self._next(index, want)
        victims = victims or _oldest(index, want)
        # before the rows go: a ghost continues the history of an entry that comes back
        index.history.add_ghosts((row.entry, row.id) for row in victims)
        return victims

    def _next(self, index: Index, want: int) -> list[Row]:
        """The next entries of the eviction list that were not used since."""
        totals = index.totals()
        self._entries = totals.entries
        # the list is from so many uses ago that its order is out of date, or from before the ticks began anew
        if not 0 <= index.history.now() - self._found_at <= totals.entries:
            self._leaving.clear()
        victims: list[Row] = []
        freed = 0
        while self._leaving and freed < want and len(victims) < _BATCH:
            count = min(_BATCH - len(victims), _expected(totals, want - freed))
            rows = index.of_ids([id_ for id_, _ in self._leaving[:count]])
            passed = 0
            for id_, tick in self._leaving[:count]:
                if freed >= want:
                    break
                passed += 1
                row = rows.get(id_)
                # an entry with another tick was used since the list was made, so it stays
                if row is not None and row.tick == tick and not row.is_pinned:
                    victims.append(row)
                    freed += row.size
            del self._leaving[:passed]
        return victims

    def _look(self, index: Index, want: int) -> None:
        """Look at all entries, or at some of many, for the least worth of them, at least as many as are wanted."""
        history = index.history
        if self._entries <= _LOOKED_AT:
            rows, share = history.entries_from(0, 0, _LOOKED_AT), _LEAVING
        else:
            places, run = self._places(history), _LOOKED_AT // _RUNS
            rows = [row for id_, over in places for row in history.entries_from(id_, over, run)]
            share = _LEAVING_OF_SOME
        if rows:
            ids, ticks, gaps = _columns(rows, 3)
            # the runs may overlap
            ids, first = np.unique(ids, return_index=True)
            ticks, gaps, now = ticks[first], gaps[first], history.now()
            order = np.argsort(self._adaptive.worth_of(gaps, now - ticks), kind="stable")
            leaving = order[: max(_expected(index.totals(), want), len(ids) // share)]
            self._leaving = list(zip(ids[leaving].tolist(), ticks[leaving].tolist(), strict=True))
            self._found_at = now

    def _places(self, history: History) -> list[tuple[int, int]]:
        """Random places to scan entries from, uniform over all entries: ids, and how many entries to skip.

        A place is a watched entry and the entries up to the next watched one. One place in some scans is random: among
        entries that were unused for longer than the memory, none is watched.
        """
        places = history.present(self._adaptive.some_ids(self._random, _CANDIDATES).tolist())
        self._random.shuffle(places)
        any_ = 1 if self._random.random() < _ANYWHERE else 0
        del places[_RUNS - any_ :]
        others = self._random.integers(0, history.last_id(), _RUNS - len(places), endpoint=True)
        apart = (1 << HASH_BITS) // limit_for(self._entries)
        return list(zip([*places, *others.tolist()], self._random.integers(0, apart, _RUNS).tolist(), strict=True))

    def _learn(self, index: Index, *, is_full: bool) -> None:
        """Learn from the queued uses of all processes, on top of the stored state, if there are enough."""
        history, totals = index.history, index.totals()
        now, self._entries = history.now(), totals.entries
        if self._has_learned(now):
            return
        # another process has learned since: its state has seen the uses of all processes, so it replaces this one's
        if (serial := history.learned_serial()) != self._serial:
            self._adaptive, self._serial = _restored(index), serial
            self._queued, self._learned_at = 0, self._adaptive.now
            if self._has_learned(now):
                # another process has learned meanwhile
                return
        queued = _columns(history.take_queued(_MOST_QUEUED), 4)
        # without a bound, it is the disk that is full
        room = totals.size if is_full else totals.max_size
        self._adaptive.learn(Uses(*queued), totals.entries, float("inf") if room is None else float(room))
        self._serial = history.set_learned(self._adaptive.to_bytes())
        self._queued, self._learned_at = 0, now
        history.forget_ghosts(now - max(_FEWEST_GHOSTS, _GHOSTS * totals.entries), self._serial)

    def _has_learned(self, now: int) -> bool:
        return self._queued <= _QUEUED and 0 <= now - self._learned_at < max(_REFRESHED, self._entries // _EVERY)


POLICIES: Final[Mapping[str, type[LeastRecentlyUsed | NoEviction | Learning]]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, NoEviction, Learning)
}


def _expected(totals: Totals, want: int) -> int:
    """How many entries hold so many bytes, if they are as large as most."""
    return want * totals.entries // max(1, totals.size) + 1


def _oldest(index: Index, want: int) -> list[Row]:
    """Victims by least recent use; ranks that lag behind are put right on the way."""
    index.pins.release_ended()
    totals = index.totals()
    # twice, because some may have been used meanwhile
    while rows := index.by_rank(2 * min(_BATCH, _expected(totals, want))):
        victims, ranks = least_recently_used(rows, want, _BATCH)
        index.set_rank(ranks)
        if victims or not ranks:
            return victims
    return []


def _restored(index: Index) -> Adaptive:
    """The stored state; a new one if it cannot be read."""
    learned = index.history.learned()
    try:
        return Adaptive() if learned is None else Adaptive.from_bytes(learned.state)
    except ValueError:
        return Adaptive()


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> Iterable[Ints]:
    flat = np.fromiter(chain.from_iterable(rows), np.int64, count * len(rows))
    return flat.reshape(-1, count).T.copy()
