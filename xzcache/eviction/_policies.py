"""Eviction policies: they record uses in the index, and choose entries to evict.

Processes may have different policies: each evicts by its own, and none writes data that breaks another.
"""

from __future__ import annotations

import copy
import threading
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

import numpy as np

from xzcache.eviction._adaptive import HASH_BITS, Adaptive, Uses, limit_for
from xzcache.index import hash_of, lot_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

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
_ROWS_AT_ONCE: Final = 1024
"""How many rows of uses or entries one section reads, for which other processes wait."""
_RUNS_AT_ONCE: Final = 16
_IDS_AT_ONCE: Final = 150
_LESSONS: Final = 3
"""How often uses are learned from again because another process has stored what it has learned meanwhile."""
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


class Sections(Protocol):
    """Opens sections of the index."""

    def section(self) -> AbstractContextManager[tuple[object, Index]]: ...


class Policy(Protocol):
    """An eviction policy; `evicts` tells whether new entries replace old ones.

    `record` and `choose` are called within a section, and take little time. `prepare` is called outside of sections and
    opens short ones itself; it is due before the next eviction unless `is_prepared`.
    """

    name: str
    evicts: bool

    @property
    def is_prepared(self) -> bool: ...

    def prepare(self, sections: Sections, want: int = 0) -> bool:
        """Do what takes long, if it is due; returns whether it was.

        This is to learn from many uses, and to look for entries to evict if `want` bytes are to be freed.
        """

    def record(self, index: Index, batch: UseBatch) -> None:
        """Record uses and new entries."""

    def choose(self, index: Index, want: int, most: int = _BATCH) -> list[Row]:
        """Choose up to `most` entries to evict for `want` bytes; at least one if there is any."""


class LeastRecentlyUsed:
    """Evicts the least recently used entries."""

    name = "lru"
    evicts = True
    is_prepared = True

    def prepare(self, sections: Sections, want: int = 0) -> bool:
        return False

    def record(self, index: Index, batch: UseBatch) -> None:
        if batch.uses:
            index.touch(batch.uses)

    def choose(self, index: Index, want: int, most: int = _BATCH) -> list[Row]:
        return _oldest(index, want, most)


class NoEviction(LeastRecentlyUsed):
    """Evicts nothing for new entries; after the bound was lowered, the least recently used entries."""

    name = "none"
    evicts = False


class Learning:
    """Evicts the entries that `Adaptive` expects to be used the least."""

    name = "adaptive"
    evicts = True

    def __init__(self) -> None:
        self._serial = 0
        self._entries = self._learned_at = 0
        self._queued = -1
        self._leaving: list[tuple[int, int]] = []
        self._found_at = 0
        self._adaptive = Adaptive()
        # numpy's own would be imported by each process, in 6 ms
        self._random = Random()
        # the state that other processes have stored must be read first
        self._is_due, self._is_full = True, False
        self._preparing = threading.Lock()

    @property
    def is_prepared(self) -> bool:
        return not self._is_due

    def prepare(self, sections: Sections, want: int = 0) -> bool:
        is_due = self._is_due if want else self._queued > _QUEUED
        # one thread is enough: the others evict as well as they can without
        if not is_due or not self._preparing.acquire(blocking=False):
            return False
        try:
            self._learn(sections)
            if want:
                self._is_due = False
                if not self._adaptive.prefers_recency and not self._leaving:
                    self._look(sections, want)
            return True
        finally:
            self._preparing.release()

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
            self._is_full = False

    def _queue(self, history: History, entries: Iterable[Entry]) -> None:
        limit = limit_for(self._entries) >> 30
        watched = [(hash_of(entry), entry) for entry in entries if lot_of(entry) < limit]
        if watched:
            history.queue_uses(watched)
            self._queued += len(watched)

    def choose(self, index: Index, want: int, most: int = _BATCH) -> list[Row]:
        index.pins.release_ended()
        totals = index.totals()
        self._entries = totals.entries
        victims = self._next(index, want, most)
        if not victims and not self._adaptive.prefers_recency:
            # another thread has evicted those that were found
            places = self._places(index, index.history.present(self._some_ids(_IDS_AT_ONCE // 4)), _RUNS_AT_ONCE // 4)
            self._rank(index, self._entries_from(index, places), want)
            victims = self._next(index, want, most)
        if not self._leaving:
            self._is_due = self._is_full = True
        victims = victims or _oldest(index, want, most)
        # before the rows go: a ghost continues the history of an entry that comes back
        index.history.add_ghosts((row.entry, row.id) for row in victims)
        index.history.forget_ghosts(index.history.now() - max(_FEWEST_GHOSTS, _GHOSTS * totals.entries), len(victims))
        return victims

    def _next(self, index: Index, want: int, most: int) -> list[Row]:
        """The next entries of the eviction list that were not used since."""
        # the list is from so many uses ago that its order is out of date, or from before the ticks began anew
        if not 0 <= index.history.now() - self._found_at <= self._entries:
            self._leaving.clear()
        victims: list[Row] = []
        freed = 0
        while self._leaving and freed < want and len(victims) < most:
            count = min(most - len(victims), _expected(index.totals(), want - freed))
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

    # -- looking for entries to evict

    def _look(self, sections: Sections, want: int) -> None:
        """Look at all entries, or at some of many, for the least worth of them."""
        rows: list[tuple[int, int, int]] = []
        with sections.section() as (_, index):
            self._entries = index.totals().entries
        if self._entries <= _LOOKED_AT:
            places = [(0, 0)]
            while places:
                with sections.section() as (_, index):
                    found = index.history.entries_from(*places.pop(), _ROWS_AT_ONCE)
                rows += found
                if len(rows) < _LOOKED_AT and found:
                    places = [(found[-1][0] + 1, 0)]
        else:
            present: list[int] = []
            ids = self._some_ids(_CANDIDATES)
            while ids and len(present) < _RUNS:
                with sections.section() as (_, index):
                    present += index.history.present(ids[:_IDS_AT_ONCE])
                del ids[:_IDS_AT_ONCE]
            with sections.section() as (_, index):
                places = self._places(index, present, _RUNS)
            while places:
                with sections.section() as (_, index):
                    rows += self._entries_from(index, places[:_RUNS_AT_ONCE])
                del places[:_RUNS_AT_ONCE]
        with sections.section() as (_, index):
            self._rank(index, rows, want)

    def _some_ids(self, most: int) -> list[int]:
        return self._adaptive.some_ids(self._random, most)

    def _places(self, index: Index, present: list[int], most: int) -> list[tuple[int, int]]:
        """Random places to scan entries from, uniform over all entries: ids, and how many entries to skip.

        A place is a watched entry, of those that are `present`, and the entries up to the next watched one. One place
        in some scans is random: among entries that were unused for longer than the memory, none is watched.
        """
        if self._entries <= _ROWS_AT_ONCE:
            return [(0, 0)]
        self._random.shuffle(present)
        any_ = 1 if self._random.random() < _ANYWHERE else 0
        places = present[: most - any_]
        last = index.history.last_id()
        others = [self._random.randint(0, last) for _ in range(most - len(places))]
        apart = (1 << HASH_BITS) // limit_for(self._entries)
        return [(place, self._random.randrange(apart)) for place in [*places, *others]]

    def _entries_from(self, index: Index, places: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        run = _ROWS_AT_ONCE if self._entries <= _ROWS_AT_ONCE else _LOOKED_AT // _RUNS
        return [row for id_, over in places for row in index.history.entries_from(id_, over, run)]

    def _rank(self, index: Index, rows: Sequence[tuple[int, int, int]], want: int) -> None:
        """Make the eviction list of some entries, for at least `want` bytes."""
        if rows:
            ids, ticks, gaps = _columns(rows, 3)
            # the runs may overlap
            ids, first = np.unique(ids, return_index=True)
            ticks, gaps, now = ticks[first], gaps[first], index.history.now()
            order = np.argsort(self._adaptive.worth_of(gaps, now - ticks), kind="stable")
            share = _LEAVING if self._entries <= _LOOKED_AT else _LEAVING_OF_SOME
            leaving = order[: max(min(_expected(index.totals(), want), _BATCH), len(ids) // share)]
            self._leaving = list(zip(ids[leaving].tolist(), ticks[leaving].tolist(), strict=True))
            self._found_at = now

    # -- learning

    def _learn(self, sections: Sections) -> None:
        """Learn from the queued uses of all processes, on top of the stored state, if there are enough.

        The state is large and learning takes long, so both are handled between the sections.
        """
        with sections.section() as (_, index):
            history, totals = index.history, index.totals()
            now, self._entries = history.now(), totals.entries
            if self._has_learned(now):
                return
            stored = history.learned() if history.learned_serial() != self._serial else None
        if stored is not None:
            # another process has learned since: its state has seen the uses of all processes, so it replaces this one's
            self._adaptive, self._serial = _restored(stored.state), stored.serial
            self._queued, self._learned_at = 0, self._adaptive.now
            if self._has_learned(now):
                # another process has learned meanwhile
                return
        rows: list[tuple[int, int, int, int]] = []
        while len(rows) < _MOST_QUEUED:
            with sections.section() as (_, index):
                taken = index.history.take_queued(min(_ROWS_AT_ONCE, _MOST_QUEUED - len(rows)))
                if len(taken) < _ROWS_AT_ONCE or len(rows) + len(taken) >= _MOST_QUEUED:
                    index.history.drop_queued()
            rows += taken
            if len(taken) < _ROWS_AT_ONCE:
                break
        uses = Uses(*_columns(rows[::-1], 4))
        # without a bound, it is the disk that is full
        room = totals.size if self._is_full else totals.max_size
        # a copy, because other threads evict by the state meanwhile
        learning, serial = copy.deepcopy(self._adaptive), self._serial
        for _ in range(_LESSONS):
            learning.learn(uses, totals.entries, float("inf") if room is None else float(room))
            state = learning.to_bytes()
            with sections.section() as (_, index):
                if index.history.learned_serial() == serial:
                    self._serial = index.history.set_learned(state)
                    self._adaptive = learning
                    break
                stored = index.history.learned()
            if stored is not None:
                learning, serial = _restored(stored.state), stored.serial
        self._queued, self._learned_at = 0, now

    def _has_learned(self, now: int) -> bool:
        return self._queued <= _QUEUED and 0 <= now - self._learned_at < max(_REFRESHED, self._entries // _EVERY)


POLICIES: Final[Mapping[str, type[LeastRecentlyUsed | NoEviction | Learning]]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, NoEviction, Learning)
}


def _expected(totals: Totals, want: int) -> int:
    """How many entries hold so many bytes, if they are as large as most."""
    return want * totals.entries // max(1, totals.size) + 1


def _oldest(index: Index, want: int, most: int) -> list[Row]:
    """Victims by least recent use; ranks that lag behind are put right on the way."""
    index.pins.release_ended()
    totals = index.totals()
    # twice, because some may have been used meanwhile
    while rows := index.by_rank(2 * min(most, _expected(totals, want))):
        victims, ranks = least_recently_used(rows, want, most)
        index.set_rank(ranks)
        if victims or not ranks:
            return victims
    return []


def _restored(state: bytes) -> Adaptive:
    """The stored state; a new one if it cannot be read."""
    try:
        return Adaptive.from_bytes(state)
    except ValueError:
        return Adaptive()


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> Iterable[Ints]:
    flat = np.fromiter(chain.from_iterable(rows), np.int64, count * len(rows))
    return flat.reshape(-1, count).T.copy()
