"""The statistics that last: the counts of this process, which it reports to the index with the uses of entries.

Seconds saved are an estimate of the time by which the reads of this machine would have taken longer without the cache:

1. The price of a source. While requests to a source are under way in a process, however many at once, its wall-clock
   time is counted. Least squares divide this time among reads and bytes: seconds for each read, and for each byte.
   Later reads count for more. The price is remembered in the index, so that a session without a miss has one.
2. What a process has saved is the price of its hits, less the time that it spent on them.
3. Processes that read at the same time save their time at the same time: at each moment, the one that saves the most
   counts. The time that a process reports is spread over the time since its last report.

Nothing is saved while the price of a source is unknown.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import sub
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from xzcache.index import OTHERS, SAMPLED, USES, Counts, UsesRow, lot_of
from xzcache.model import Reads, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from xzcache.index import Index, Row
    from xzcache.model import Entry, ReadCounters

WATCHED: Final = 4096
"""Up to so many entries, all uses are sampled; in a larger cache, those of about half as many entries or more."""
# a size or a span is one field of 32 bits in a sample
_LARGEST: Final = (1 << 32) - 1
_EVERY: Final = 0.5
"""Seconds between two reports to the index, at the least."""
_MOST_AT_ONCE: Final = 4096
"""The most used entries that are sampled between two reports."""
# requests that overlap an older period than these are counted twice, which hardly happens
_MOST_PERIODS: Final = 64
_REMEMBERED: Final = 2000.0
"""The reads after which an observed price has lost most of its weight."""
_SUMS: Final = 8
_MOST_SPANS: Final = 64
_LONGEST: Final = 10.0
"""The most seconds over which the time that a process saved at once is spread."""
_SHORTEST: Final = 1e-3


# -- Prices. No disk, no clock, no SQL.


def with_observation(sums: Sequence[float] | None, reads: int, size: int, seconds: float) -> list[float]:
    """Add an observation to the sums of earlier ones: reads, bytes, seconds, and their products."""
    # megabytes, so that the sums are of similar magnitude
    size_mb = size / 1e6
    # weights fall off with reads, not with time: a source that is read seldom keeps its price
    keep = math.exp(-reads / _REMEMBERED)
    new = (
        reads,
        size_mb,
        seconds,
        reads * reads,
        reads * size_mb,
        size_mb * size_mb,
        reads * seconds,
        size_mb * seconds,
    )
    return [before * keep + value for before, value in zip(_checked(sums), new, strict=True)]


def _checked(sums: Sequence[float] | None) -> Sequence[float]:
    """The sums; zeros if there are none, or garbage."""
    return sums if sums is not None and len(sums) == _SUMS and all(map(math.isfinite, sums)) else [0.0] * _SUMS


def price_of(sums: Sequence[float] | None) -> tuple[float, float]:
    """Seconds for each read and for each byte, neither negative, that explain what was observed; in all, exactly."""
    reads, size, seconds, rr, rs, ss, rt, st = _checked(sums)
    whole = rr * ss - rs * rs
    is_singular = whole <= 1e-6 * rr * ss
    each, for_size = (0.0, 0.0) if is_singular else ((rt * ss - st * rs) / whole, (st * rr - rt * rs) / whole)
    if each < 0 or for_size < 0 or not each + for_size:
        # objects of one size do not tell which of both costs; otherwise, the better of two simple explanations
        each, for_size = rt / rr if rr else 0.0, st / ss if ss else 0.0
        if is_singular:
            each, for_size = each / 2, for_size / 2
        elif rt * each >= st * for_size:
            for_size = 0.0
        else:
            each = 0.0
    explained = each * reads + for_size * size
    # so that all observed seconds are explained: the price must not drift from what was measured
    scale = seconds / explained if explained > 0 else 0.0
    return each * scale, for_size * scale / 1e6


def raised(levels: Sequence[float], begin: float, end: float, level: float) -> tuple[list[float], float]:
    """Raise a step function to a level between two times, where it is lower; returns it, and the area added.

    The steps are begin, end, level, one after the other, in the order of time.
    """
    steps = [(levels[at], levels[at + 1], levels[at + 2]) for at in range(0, len(levels) - 2, 3)]
    cuts = sorted({begin, end, *(time_ for step in steps for time_ in step[:2])})
    result: list[list[float]] = []
    area, at = 0.0, 0
    for first, last in pairwise(cuts):
        while at < len(steps) and steps[at][1] <= first:
            at += 1
        before = steps[at][2] if at < len(steps) and steps[at][0] <= first else 0.0
        after = max(before, level) if begin <= first and last <= end else before
        area += (after - before) * (last - first)
        if after <= 0:
            continue
        if result and result[-1][1] == first and result[-1][2] == after:
            result[-1][1] = last
        else:
            result.append([first, last, after])
    return [number for step in result[-_MOST_SPANS:] for number in step], area


class Busy:
    """The wall-clock time in which any of several overlapping activities was under way."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._periods: list[tuple[float, float]] = []

    def add(self, begin: float, end: float) -> None:
        """Add an activity that has just ended."""
        gained = max(0.0, end - begin)
        # what overlaps is counted once, however many requests are under way at the same time
        while self._periods and self._periods[-1][1] >= begin:
            first, last = self._periods.pop()
            gained -= max(0.0, min(last, end) - max(first, begin))
            begin, end = min(begin, first), max(end, last)
        self._periods.append((begin, end))
        del self._periods[:-_MOST_PERIODS]
        self.seconds += max(0.0, gained)


# -- What this process has counted.


@dataclass(eq=False, slots=True)
class _Counted:
    """Counters of one store, or of copies of it, and their values at the last report to the index.

    `namespace` is None for a source that only this process has.
    """

    counters: ReadCounters
    namespace: str | None
    users: weakref.WeakSet[object]
    told: Reads = field(default_factory=Reads)


class _Others(NamedTuple):
    """The other counters of one source."""

    busy: float = 0.0
    evictions: int = 0
    evicted_size: int = 0


@dataclass(slots=True)
class _Source:
    """The other counters of one source, and their values at the last report to the index."""

    busy: Busy = field(default_factory=Busy)
    evictions: int = 0
    evicted_size: int = 0
    told: _Others = field(default_factory=_Others)

    def now(self) -> _Others:
        return _Others(self.busy.seconds, self.evictions, self.evicted_size)


@dataclass(slots=True)
class _News:
    """The counts of one source since the last report to the index."""

    counts: Counts = field(default_factory=Counts)
    busy: float = 0.0
    on_hits: float = 0.0


class _Event(NamedTuple):
    """A sampled entry that arrives, or is evicted."""

    at: int
    lot: int
    size: int
    namespace: str = ""
    is_eviction: bool = False


def sampled_uses(uses: Mapping[Entry, int], limit: int) -> bytes:
    """The sampled ones of uses, packed.

    They are in the order of the first use of each entry, with the times of their last ones.
    """
    at = np.fromiter(uses.values(), np.int64, len(uses))
    # what was used first after an entry was not used before it
    first = np.minimum.accumulate(at[::-1])[::-1]
    found = np.zeros(len(at), USES)
    found["at"], found["key"] = at, [lot_of(entry) for entry in uses]
    found["span"] = np.minimum((at - first) // 1000, _LARGEST)
    return bytes(found[found["key"] < limit].tobytes())


class Ledger:
    """The reads through one directory that this process has counted and not yet reported to the index.

    Nothing here is called for a hit: the counters of the stores are read when uses are recorded in the index.
    """

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Count from zero, as the counters of the stores do."""
        self._lock = threading.Lock()
        self._sources: defaultdict[str | None, _Source] = defaultdict(_Source)
        self._events: list[_Event] = []
        self._uses: list[bytes] = []
        self._arrivals = self._used = self._passed_over = 0
        self._left = _MOST_AT_ONCE
        self._shift = 0
        self._due = 0.0
        self._began = math.inf
        self._saved_until = time.time()
        self.total = Counts()
        """All counts that this process has reported to the index."""
        self.name = ""
        """The name under which the index keeps the total after the end of this process; empty for none."""
        for counted in self._counted.values():
            counted.told = Reads()

    # -- counting

    def count(self, counters: ReadCounters, user: object, namespace: str | None) -> None:
        """Report these counters to the index while the user lives, and once after that."""
        counted = self._counted.get(id(counters))
        if not self._counted:
            self._saved_until = time.time()
        if counted is None or counted.namespace != namespace:
            # from time to time only: tests and servers open thousands of stores
            if len(self._counted) % 64 == 63:
                self._forget()
            counted = self._counted[id(counters)] = _Counted(counters, namespace, weakref.WeakSet())
        counted.users.add(user)

    def fetched(self, namespace: str | None, began: float) -> None:
        """Count a request to a source that has just ended, and began at a time of `time.perf_counter`."""
        with self._lock:
            self._sources[namespace].busy.add(began, time.perf_counter())

    def evicted(self, rows: Iterable[Row]) -> None:
        """Count entries that are about to be evicted; within a section."""
        now, limit = time.time_ns(), 1 << 32 >> self._shift
        with self._lock:
            for row in rows:
                source = self._sources[namespace_of(row.entry.key)]
                source.evictions += 1
                source.evicted_size += row.size
                # sampled by the hash of the entry, so that all processes sample the same entries
                if (lot := lot_of(row.entry)) < limit:
                    self._events.append(_Event(now, lot, row.size, is_eviction=True))

    @property
    def has_news(self) -> bool:
        """Whether there are reads that were not reported to the index."""
        return any(counted.counters.reads() != counted.told for counted in list(self._counted.values()))

    def _forget(self) -> None:
        """Forget counters without users whose values are all reported."""
        for key, counted in list(self._counted.items()):
            if not counted.users and counted.counters.reads() == counted.told:
                self._counted.pop(key, None)

    # -- telling

    def tell(self, index: Index, uses: Mapping[Entry, int], arrived: Mapping[Entry, int], *, everything: bool) -> None:
        """Report the counts to the index, in the section that records the uses.

        Without `everything`, the counts may be kept for a later transaction.
        """
        limit = 1 << 32 >> self._shift
        if uses:
            self._began = min(self._began, min(uses.values()) / 1e9)
            self._used += len(uses)
            if self._left > 0:
                self._left -= len(uses)
                self._uses.append(sampled_uses(uses, limit))
            else:
                # a process that reads so fast has shown its pattern already: the sample leaves these reads out
                self._passed_over += len(uses)
        if arrived:
            now = time.time_ns()
            self._arrivals += len(arrived)
            for entry, size in arrived.items():
                if (lot := lot_of(entry)) < limit:
                    self._uses.append(SAMPLED.pack(now, lot, min(size, _LARGEST), 0))
                    self._events.append(_Event(now, lot, size, namespace_of(entry.key)))
        # a report writes several rows, so most of these transactions go without one
        if everything or time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            self._tell(index)

    def _tell(self, index: Index) -> None:
        (events, uses), self._events, self._uses = (self._events, b"".join(self._uses)), [], []
        (arrivals, used), self._arrivals, self._used = (self._arrivals, self._used), 0, 0
        passed_over, self._passed_over, self._left = self._passed_over, 0, _MOST_AT_ONCE
        began, self._began = self._began, math.inf
        news, when_told = self._news()
        if not (news or events or uses):
            return
        statistics = index.statistics
        statistics.make(arrivals)
        now = time.time()
        numbers = {name: OTHERS if name is None else index.number_of(name) for name in news}
        saved = {}
        for name, new in news.items():
            sums = statistics.prices(numbers[name])
            if new.counts.misses and new.busy > 0:
                sums = with_observation(sums, new.counts.misses, new.counts.bytes_from_source, new.busy)
                statistics.set_prices(numbers[name], sums)
            each, for_byte = price_of(sums)
            # several threads may have spent their time at the same time
            on_hits = min(new.on_hits, max(0.0, now - began))
            saved[name] = max(0.0, new.counts.hits * each + new.counts.bytes_from_cache * for_byte - on_hits)
        part = self._part_of_machine(index, began, now, sum(saved.values()))
        refetched = self._add_events(index, events)
        reads = reduce(Counts.plus, (new.counts for new in news.values()), Counts())
        if reads.reads or uses:
            shown = max(0, reads.reads - passed_over)
            row = UsesRow(0, self._shift, shown, reads.misses - arrivals, reads.hits - used, uses)
            statistics.add_uses(row)
        rows: dict[int, Counts] = {}
        for name, new in news.items():
            counts = new.counts._replace(seconds_saved=saved[name] * part)
            rows[numbers[name]] = rows.get(numbers[name], Counts()).plus(counts)
        for name, (count, size) in refetched.items():
            number = index.number_of(name)
            again = Counts(refetched=count << self._shift, refetched_size=size << self._shift)
            rows[number] = rows.get(number, Counts()).plus(again)
        statistics.add(int(now), rows)
        total = reduce(Counts.plus, rows.values(), self.total)
        if self.name:
            statistics.set_process(self.name, int(now), total)
        # the sample halves each time the cache doubles, so that its cost stays the same
        self._shift = (index.totals().entries // WATCHED).bit_length()

        def when_committed() -> None:
            self.total = total
            # removed only now, because a transaction that is rolled back must be written once more
            when_told()

        index.when_committed.append(when_committed)

    def _news(self) -> tuple[dict[str | None, _News], Callable[[], None]]:
        """The counts of each source since the last report, and a function that marks them as reported."""
        news: defaultdict[str | None, _News] = defaultdict(_News)
        reads = [(counted, counted.counters.reads()) for counted in list(self._counted.values())]
        for counted, current in reads:
            if current != counted.told:
                hits, misses, cached, fetched, on_hits, given, passed = map(sub, current, counted.told)
                new = news[counted.namespace]
                counts = Counts(hits, misses, cached, fetched, peer_hits=given, bytes_from_peers=passed)
                new.counts = new.counts.plus(counts)
                new.on_hits += on_hits
        with self._lock:
            others = [(name, source, source.now()) for name, source in self._sources.items()]
        for name, source, now in others:
            if now != source.told:
                busy, evictions, size = map(sub, now, source.told)
                new = news[name]
                new.busy += busy
                new.counts = new.counts.plus(Counts(evictions=evictions, evicted_size=size))

        def when_told() -> None:
            for counted, current in reads:
                counted.told = current
            for _, source, now in others:
                source.told = now
            self._forget()

        return dict(news), when_told

    @staticmethod
    def _add_events(index: Index, events: Sequence[_Event]) -> dict[str, tuple[int, int]]:
        """Record evictions; returns, by source, the number and size of sampled entries that were fetched again."""
        statistics = index.statistics
        again: dict[str, tuple[int, int]] = {}
        for event in events:
            if event.is_eviction:
                statistics.add_gone(event.lot, event.at)
            elif statistics.take_gone(event.lot):
                count, size = again.get(event.namespace, (0, 0))
                again[event.namespace] = count + 1, size + event.size
        return again

    def _part_of_machine(self, index: Index, began: float, now: float, saved: float) -> float:
        """The part of this process's saved time that no other process has saved at the same time.

        A hit takes so little time that hits of several processes hardly ever coincide. So the saved time is spread over
        the time since this process saved something before, or began to read: the others read in the same time.
        """
        if saved <= 0:
            return 0.0
        statistics = index.statistics
        since = now - self._saved_until
        length = max(_SHORTEST, min(since, max(now - began, _LONGEST)))
        self._saved_until = now
        levels = [number for number in statistics.lately_saved() if math.isfinite(number)]
        levels, area = raised(levels, now - length, now, saved / length)
        statistics.set_lately_saved([round(number, 3) for number in levels])
        return area / saved
