"""The policy ``adaptive``: evict the entries that are least likely to be used soon.

It watches a sample of all keys by their hashes, cached or not, and records when each was used and how far apart its
uses are. So it learns intervals that are longer than the lifetime of a cached entry. On the sample it simulates both
its own order and least recent use, and follows the one with more hits.

No disk, no clock, no SQL: uses in, an order out. Time is counted in uses of any entry.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from random import Random

# -- The probability that an entry is used again, learned by class and age.
#
# The idea is that of EVA (Beckmann and Sanchez, 2017) and LHD (Beckmann, Chen and Cidon, 2018): the worth of an entry
# is the expected number of its uses for each unit of time that it stays. Time is counted in uses of any entry.

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

CLASSES: Final = 20
BUCKETS: Final = 72
_STEPS: Final = 4

_EDGES: Final[Reals] = 16.0 * 2.0 ** (np.arange(BUCKETS + 1) / _STEPS) - 16.0
_WIDTHS: Final[Reals] = np.diff(_EDGES)
_CENTRES: Final[Reals] = (_EDGES[:-1] + _EDGES[1:]) / 2
# falls with the age, so that without observations recent use decides
_PRIOR: Final[Reals] = 0.1 / _WIDTHS
_WEIGHT: Final = 1.0
_MOST_IN_A_BUCKET: Final = 20.0


def class_of(gaps: Ints) -> Ints:
    """0 for entries that were used once, else the octave of the time between uses."""
    return np.where(gaps > 0, np.minimum(CLASSES - 1, 1 + np.log2(np.maximum(gaps, 0) / 16 + 1).astype(np.int64)), 0)


def bucket_of(ages: Ints) -> Reals:
    """Four buckets each time that an age doubles."""
    return np.asarray(np.minimum(BUCKETS - 1.0, _STEPS * np.log2(np.maximum(ages, 0) / 16 + 1)))


def next_gap(gaps: Ints, intervals: Ints) -> Ints:
    """The time between uses, the latest of which counts for a quarter."""
    return np.maximum(1, np.where(gaps > 0, gaps + (intervals - gaps) // 4, intervals))


def cells(gaps: Ints, ages: Ints) -> Reals:
    """How many there are of each class and bucket."""
    flat = np.bincount(class_of(gaps) * BUCKETS + bucket_of(ages).astype(np.int64), minlength=CLASSES * BUCKETS)
    return flat.reshape(CLASSES, BUCKETS).astype(np.float64)


class Reuse:
    """The learned uses and waiting times, by class and bucket of age; older observations have less weight."""

    def __init__(self, uses: Reals | None = None, waited: Reals | None = None) -> None:
        self.uses = np.zeros((CLASSES, BUCKETS)) if uses is None else uses
        self.waited = np.zeros((CLASSES, BUCKETS)) if waited is None else waited

    def used(self, gaps: Ints, ages: Ints) -> None:
        """Add uses of entries, given their classes and ages."""
        self.uses += cells(gaps, ages)

    def wait(self, gaps: Ints, ages: Ints, passed: int, keep: float) -> None:
        """Add waiting time of all entries; older observations are weighted by `keep`."""
        self.uses *= keep
        self.waited *= keep
        self.waited += passed * cells(gaps, ages)

    def hazards(self) -> Reals:
        """The expected uses of one entry in one unit of time, by class and bucket.

        With few observations of a class, all classes are used; with few at all, a prior that prefers recent use.
        """
        every = (self.uses.sum(0) + _WEIGHT) / (self.waited.sum(0) + _WEIGHT / _PRIOR)
        general = (self.uses + _WEIGHT) / (self.waited + _WEIGHT / every)
        mine = (self.uses + _WEIGHT) / (self.waited + _WEIGHT / general)
        mine[0] = general[0]
        return mine

    def worth(self) -> Reals:
        """The expected uses per unit of time until the best eviction time, by class and bucket."""
        hazards = np.minimum(self.hazards(), _MOST_IN_A_BUCKET / _WIDTHS)
        within = hazards * _WIDTHS
        stays = np.exp(-within)
        goes, time = 1 - stays, (1 - stays) / hazards
        # from the beginning of each bucket, one bucket further at a time: chance and time until then, and the best yet
        chance, spent, best = goes.copy(), time.copy(), goes / time
        lasting = stays.copy()
        for further in range(1, BUCKETS):
            lasting = lasting[:, :-1]
            chance = chance[:, :-1] + lasting * goes[:, further:]
            spent = spent[:, :-1] + lasting * time[:, further:]
            lasting = lasting * stays[:, further:]
            rest = best[:, : BUCKETS - further]
            np.maximum(rest, chance / spent, out=rest)
        return best


def rate(worth: Reals, gaps: Ints, ages: Ints) -> Reals:
    """The worth of entries, between that of the buckets around their age."""
    places = bucket_of(ages)
    lower = places.astype(np.int64)
    upper = np.minimum(lower + 1, BUCKETS - 1)
    rows, part = class_of(gaps), places - lower
    return np.asarray(worth[rows, lower] * (1 - part) + worth[rows, upper] * part)


# -- The adaptive policy.

HASH_BITS: Final = 62
_WATCHED: Final = 2048
"""Of how many entries of the cache the uses are watched, at the most."""
_REMEMBERED: Final = 10 * _WATCHED
"""How many keys are remembered, cached or not."""
# a little room is made in advance, so that not each step needs a sort
_SPARE: Final = 0.98
_REFRESH: Final = (200, 2000)
_PATIENCE: Final = 1.5
"""The lost hits, in entries of the cache, after which the other order is followed, if both were equally good."""
_FEWEST: Final = 64
# hits of least recent use are exact, while the learned order works from lists that are older than the latest uses
_AHEAD: Final = 0.95
"""The learned order is followed if this part of its hits exceeds the hits of least recent use, which never errs."""
_AGES: Final = 1 << 60
_FORMAT: Final = 2
_SUM: Final = struct.Struct("<I")


def limit_for(entries: int) -> int:
    """Below which a hash is one of a watched key, in a cache of so many entries."""
    return (1 << HASH_BITS) >> max(0, (max(1, entries) // _WATCHED).bit_length())


def _between_refreshes(entries: int) -> int:
    """After how many uses the worth of entries is computed anew."""
    return max(_REFRESH[0], min(_REFRESH[1], entries // 8))


class Uses(NamedTuple):
    """Uses of watched keys, in the order of time: when, the hash of the key, the entry's size in bytes, and its id."""

    ticks: Ints
    keys: Ints
    sizes: Ints
    ids: Ints


class Adaptive:
    """The state that is learned from the uses of the watched keys.

    `prefers_recency` tells that least recent use is the better order.
    """

    def __init__(self) -> None:
        self.reuse = Reuse()
        # most reads that do not fit into a cache are scans, of which least recent use keeps nothing
        self.prefers_recency = False
        self._now = self._refreshed = self._shift = 0
        self._regret = self._hits = self._recency_hits = 0.0
        self._keys = self._last = self._gaps = self._sizes = self._ids = np.zeros(0, np.int64)
        self._kept: NDArray[np.bool_] = np.zeros(0, np.bool_)
        # made when it is first needed: a process that only reads what is cached never does
        self._worth: Reals | None = None

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def now(self) -> int:
        """The tick of the latest use that it has learned of."""
        return self._now

    # -- learning

    def learn(self, uses: Uses, entries: int, room: float) -> None:
        """Learn from uses; `entries` and `room` (bytes) are the current count and the capacity of the cache."""
        self._watch(entries)
        watched = uses.keys < limit_for(entries)
        uses = Uses(*(column[watched] for column in uses))
        room /= 2**self._shift
        # small beside the cache: what is used within a step counts as a hit of both orders
        step = max(8, (entries >> self._shift) // 16)
        if self._sizes.sum() + uses.sizes.sum() <= room:
            # both orders keep everything
            step = max(step, _between_refreshes(entries))
        for begin in range(0, len(uses.keys), step):
            self._use(Uses(*(column[begin : begin + step] for column in uses)), room)
            self._refresh(entries)
            self._evict(room)

    def _watch(self, entries: int) -> None:
        """Watch more or fewer keys, as the cache holds fewer or more entries."""
        limit = limit_for(entries)
        self._shift = HASH_BITS + 1 - limit.bit_length()
        if len(self._keys) and self._keys[-1] >= limit:
            self._select(self._keys < limit)

    def _use(self, uses: Uses, room: float) -> None:
        """Record uses; keys with several uses take several rounds."""
        oldest = self._age_of_recency(room)
        while len(uses.keys):
            first = np.unique(uses.keys, return_index=True)[1]
            self._use_once(Uses(*(column[first] for column in uses)), oldest)
            uses = Uses(*(np.delete(column, first) for column in uses))

    def _use_once(self, uses: Uses, oldest: int) -> None:
        at = np.searchsorted(self._keys, uses.keys)
        known = np.zeros(len(at), np.bool_)
        inside = at < len(self._keys)
        known[inside] = self._keys[at[inside]] == uses.keys[inside]
        rows = at[known]
        ages = np.maximum(0, uses.ticks[known] - self._last[rows])
        self.reuse.used(self._gaps[rows], ages)
        self._compare(float(self._kept[rows].sum()), float((ages <= oldest).sum()))
        self._gaps[rows] = next_gap(self._gaps[rows], ages)
        self._last[rows] = np.maximum(self._last[rows], uses.ticks[known])
        self._sizes[rows], self._ids[rows] = uses.sizes[known], uses.ids[known]
        self._kept[rows] = True
        new, where = ~known, at[~known]
        if len(where):
            self._keys = np.insert(self._keys, where, uses.keys[new])
            self._last = np.insert(self._last, where, uses.ticks[new])
            self._gaps = np.insert(self._gaps, where, 0)
            self._sizes = np.insert(self._sizes, where, uses.sizes[new])
            self._ids = np.insert(self._ids, where, uses.ids[new])
            self._kept = np.insert(self._kept, where, True)
        self._now = max(self._now, int(np.max(uses.ticks)))

    def _age_of_recency(self, room: float) -> int:
        """The largest age in a cache of the same size that evicts by least recent use."""
        if self._sizes.sum() <= room:
            return _AGES
        order = np.argsort(-self._last)
        count = int((np.cumsum(self._sizes[order]) <= room).sum())
        return _AGES if count == len(order) else self._now - int(self._last[order[count]]) - 1

    def _evict(self, room: float) -> None:
        """Simulate the evictions by the learned order."""
        held = float(self._sizes[self._kept].sum())
        if held <= room:
            return
        rows = np.flatnonzero(self._kept)
        leaving = rows[np.argsort(rate(self._rates(), self._gaps[rows], self._now - self._last[rows]), kind="stable")]
        count = int((np.cumsum(self._sizes[leaving]) < held - _SPARE * room).sum())
        self._kept[leaving[: count + 1]] = False

    def _refresh(self, entries: int) -> None:
        passed = self._now - self._refreshed
        if passed < _between_refreshes(entries):
            return
        keep = float(np.exp(-passed / (2 * max(1, len(self._keys) << self._shift))))
        self.reuse.wait(self._gaps, self._now - self._last, passed, keep)
        self._refreshed = self._now
        self._worth = self.reuse.worth()
        self._choose(entries, keep)
        # more are dropped than need be, so that the columns are not sorted at each refresh
        if len(self._keys) > _REMEMBERED:
            self._select(self._last > np.sort(self._last)[len(self._last) - _REMEMBERED * 7 // 8])

    def _select(self, rows: NDArray[np.bool_]) -> None:
        self._keys, self._last, self._gaps = self._keys[rows], self._last[rows], self._gaps[rows]
        self._sizes, self._ids, self._kept = self._sizes[rows], self._ids[rows], self._kept[rows]

    # -- which order to follow

    def _compare(self, ours: float, recency: float) -> None:
        """Count the hits of both orders, and the hits that the followed order missed."""
        self._hits += ours
        self._recency_hits += recency
        lost = _AHEAD * ours - recency if self.prefers_recency else recency - _AHEAD * ours
        self._regret = max(0.0, self._regret + lost)

    def _choose(self, entries: int, keep: float) -> None:
        """Follow the other order once as many hits were lost as the change may cost: the more, the better this one."""
        self._hits *= keep
        self._recency_hits *= keep
        one, other = self._hits + 1, self._recency_hits + 1
        share = min(1.0, other / one if self.prefers_recency else one / other)
        if self._regret > _PATIENCE * share * max(_FEWEST, entries >> self._shift):
            self.prefers_recency = not self.prefers_recency
            self._regret = 0.0

    def worth_of(self, gaps: Ints, ages: Ints) -> Reals:
        """The worth of entries by gap and age, in ticks; the lowest is evicted first."""
        return rate(self._rates(), gaps, ages)

    def _rates(self) -> Reals:
        if self._worth is None:
            self._worth = self.reuse.worth()
        return self._worth

    def some_ids(self, random: Random, most: int) -> list[int]:
        """The last known ids of some watched keys; their entries may be gone."""
        chosen: list[int] = self._ids[random.sample(range(len(self)), min(most, len(self)))].tolist()
        return chosen

    # -- remembering

    def to_bytes(self) -> bytes:
        """All of it, for `from_bytes`."""
        times = (self._now, self._refreshed, self._shift)
        choice = (self.prefers_recency, self._regret, self._hits, self._recency_hits)
        numbers = np.array([_FORMAT, *times, *choice], np.float64)
        file = io.BytesIO()
        columns = [self._keys, self._last, self._gaps.astype(np.int32), self._sizes, self._ids, self._kept]
        for array in (numbers, self.reuse.uses, self.reuse.waited, *columns):
            np.save(file, array, allow_pickle=False)
        # a checksum, because the bytes lie in a database that damage can reach
        return _SUM.pack(crc32(file.getbuffer())) + file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`; raises `ValueError` for other data."""
        self, file = cls(), io.BytesIO(data[_SUM.size :])
        if data[: _SUM.size] != _SUM.pack(crc32(file.getbuffer())):
            raise ValueError("the bytes are not a learned state")
        try:
            numbers, uses, waited, *columns = (np.load(file, allow_pickle=False) for _ in range(9))
            self._restore(numbers, [column.astype(np.int64) for column in columns])
        except (EOFError, OSError, TypeError, ValueError) as error:
            raise ValueError("the bytes are not a learned state") from error
        if {uses.shape, waited.shape} != {(CLASSES, BUCKETS)} or len({column.shape for column in columns}) != 1:
            raise ValueError("the learned state is of another version")
        self.reuse = Reuse(uses, waited)
        self._worth = self.reuse.worth()
        return self

    def _restore(self, numbers: NDArray[Any], columns: list[Ints]) -> None:
        version, now, refreshed, shift, prefers_recency, regret, hits, recency_hits = numbers.tolist()
        if version != _FORMAT:
            raise ValueError("the learned state is of another version")
        self._now, self._refreshed, self._shift = int(now), int(refreshed), int(shift)
        self.prefers_recency = bool(prefers_recency)
        self._regret, self._hits, self._recency_hits = regret, hits, recency_hits
        self._keys, self._last, self._gaps, self._sizes, self._ids = columns[:5]
        self._kept = columns[5].astype(np.bool_)
