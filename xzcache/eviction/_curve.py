"""The miss ratio that other bounds would give, predicted from a sample of the uses.

A sample has all uses of some keys, chosen by their hashes, so it behaves as the whole does in a cache that is smaller
by the same factor (Waldspurger et al., "SHARDS", 2015, and "Miniature simulations", 2017). The policy of the cache
is run on the sample, at each bound.

No disk, no clock, no SQL: uses and bounds in, ratios out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np

from xzcache.eviction._adaptive import HASH_BITS, Adaptive, Uses, limit_for
from xzcache.index import USES, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from xzcache.eviction._adaptive import Ints, Reals
    from xzcache.index import UsesRow

_MOST_STEPS: Final = 8
"""The most repeated uses of an entry in one report that are simulated; if there were more, each stands for several."""
_WARMING: Final = 0.25
"""The part of a sample that only fills the simulated cache, where earlier uses are not known any more."""


class Sample(NamedTuple):
    """The uses of sampled keys in the order of time.

    Between two reports, a process records the first and the last use of an entry, and the number of repeated uses of
    all entries together. The uses between the first and the last one are taken to be equally far apart.

    Attributes
    ----------
    at : array of int
        The time of each use, in ns since the epoch.
    keys, sizes : array of int
        Hashes of the keys, below ``2**62 >> shift``, and the bytes of their entries.
    weights : array of float
        The number of uses of sampled keys that each use stands for.
    told_at, reads, unstored : array of int
        For each report of a process: the time of its last use; the reads of all keys, sampled or not, since the report
        before it; and the number of misses beyond the stored entries.
    shift : int
        One key of ``2**shift`` is sampled.
    is_whole : bool
        Whether it has the uses since the cache was made, and not only the latest.
    """

    at: Ints
    keys: Ints
    sizes: Ints
    weights: Reals
    told_at: Ints
    reads: Ints
    unstored: Ints
    shift: int
    is_whole: bool

    @classmethod
    def of(cls, rows: Sequence[UsesRow], usual: int) -> Self:
        """The sample in the index; `usual` is the size of an entry whose own is not known."""
        shift = max((row.shift for row in rows), default=0)
        parts, weights, told_at = [np.zeros(0, USES)], [np.zeros(0)], [0]
        for row in rows:
            part = np.frombuffer(row.uses[: len(row.uses) // USES.itemsize * USES.itemsize], USES)
            told_at.append(max(told_at[-1], int(part["at"].max(initial=0))))
            for some, each in _expanded(part[part["key"] < 1 << 32 >> shift], row.repeats / 2**shift):
                parts.append(some)
                weights.append(np.full(len(some), each))
        uses, weight = np.concatenate(parts), np.concatenate(weights)
        order = np.argsort(uses["at"], kind="stable")
        uses = uses[order]
        # only the arrival of an entry records its size, which holds for all of its uses
        _, of_key = np.unique(uses["key"], return_inverse=True)
        sizes = np.zeros(len(uses), np.int64)
        np.maximum.at(sizes, of_key, uses["size"].astype(np.int64))
        sizes = np.where(sizes > 0, sizes, usual)[of_key]
        counts = np.array([(row.reads, row.unstored) for row in rows], np.int64).reshape(-1, 2)
        return cls(
            uses["at"].astype(np.int64),
            uses["key"].astype(np.int64) << (HASH_BITS - 32),
            sizes,
            weight[order],
            np.array(told_at[1:], np.int64),
            counts[:, 0],
            counts[:, 1],
            shift,
            is_whole(rows),
        )

    def thinned(self, most: int) -> Sample:
        """A sample of fewer keys, with about so many uses at the most.

        In the order of their number of uses and of their first use, one of so many neighbours stays. By chance alone, a
        sample of some hundred keys would have a few percent more or fewer keys, hot keys and keys of one region than
        its part, and so would the predicted misses.
        """
        further = max(0, math.ceil(math.log2(max(1, len(self.at)) / most)))
        keys, first, of_key, counts = np.unique(self.keys, return_index=True, return_inverse=True, return_counts=True)
        places = np.arange(0, len(keys), 1 << further)
        # any of the neighbours, because a pattern of the uses may have the same period
        places += np.random.default_rng(0).integers(0, 1 << further, len(places))
        stays = np.zeros(len(keys), np.bool_)
        stays[np.lexsort((first, counts))[places[places < len(keys)]]] = True
        kept = stays[of_key]
        return self._replace(
            at=self.at[kept],
            keys=self.keys[kept] >> further,
            sizes=self.sizes[kept],
            weights=self.weights[kept],
            shift=self.shift + further,
        )

    @property
    def counted_from(self) -> int:
        """The first use that is counted: those before it only fill the simulated cache."""
        return 0 if self.is_whole else int(len(self.at) * _WARMING)


def _expanded(uses: NDArray[np.void], repeats: float) -> Iterator[tuple[NDArray[np.void], float]]:
    """The uses of one report, and the repeated ones among them, with the weight of each."""
    again = uses["span"] > 0
    count = int(again.sum())
    steps = min(_MOST_STEPS, max(1, round(repeats / count))) if count and repeats >= 1 else 0
    spans = uses["span"][again].astype(np.int64) * 1000
    for step in range(steps + 1):
        some = uses.copy() if step == 0 else uses[again]
        at = some["at"][again] if step == 0 else some["at"]
        moved = at - spans + spans * step // max(1, steps)
        if step == 0:
            some["at"][again] = moved
        else:
            some["at"] = moved
        yield some, repeats / (count * steps) if step else 1.0


class _Counting(Adaptive):
    """The policy ``adaptive``: counts the uses that its simulated cache does not hold; ids are numbers of uses."""

    def __init__(self, weights: Reals) -> None:
        super().__init__()
        self._weights = weights
        self.missed = 0.0

    def _use_once(self, uses: Uses, oldest: int) -> None:
        at = np.minimum(np.searchsorted(self._keys, uses.keys), max(0, len(self._keys) - 1))
        held = np.zeros(len(at), np.bool_)
        if len(self._keys):
            recent = uses.ticks - self._last[at] <= oldest
            held = (self._keys[at] == uses.keys) & (recent if self.prefers_recency else self._kept[at])
        self.missed += float(self._weights[uses.ids[~held]].sum())
        super()._use_once(uses, oldest)


def _misses_of_recency(sample: Sample, room: float, begin: int) -> float:
    held: OrderedDict[int, int] = OrderedDict()
    used, misses = 0, 0.0
    for number, key, size, weight in _uses_of(sample):
        if (before := held.pop(key, None)) is None:
            misses += weight if number >= begin else 0.0
        else:
            used -= before
        if size <= room:
            held[key] = size
            used += size
            while used > room:
                used -= held.popitem(last=False)[1]
    return misses


def _misses_without_eviction(sample: Sample, room: float, begin: int) -> float:
    held: set[int] = set()
    used, misses = 0, 0.0
    for number, key, size, weight in _uses_of(sample):
        if key not in held:
            misses += weight if number >= begin else 0.0
            if used + size <= room:
                held.add(key)
                used += size
    return misses


def _uses_of(sample: Sample) -> Iterator[tuple[int, int, int, float]]:
    return zip(
        range(len(sample.keys)), sample.keys.tolist(), sample.sizes.tolist(), sample.weights.tolist(), strict=True
    )


def _misses_of_adaptive(sample: Sample, room: float, begin: int) -> float:
    count = len(sample.keys)
    entries = max(1, int(room / max(1.0, float(sample.sizes.mean()))))
    entries = min(entries, len(np.unique(sample.keys)))
    # the keys are scaled so that the policy watches all of them, as in a cache that is larger by the same factor
    shift = HASH_BITS + 1 - limit_for(entries).bit_length()
    keys = (sample.keys << sample.shift) >> shift
    policy = _Counting(sample.weights)
    uses = Uses(np.arange(1, count + 1), keys, sample.sizes, np.arange(count))
    missed = 0.0
    for first, last in ((0, begin), (begin, count)):
        missed = policy.missed
        policy.learn(Uses(*(column[first:last] for column in uses)), entries, room * 2**shift)
    return policy.missed - missed


_MISSES: Final = {
    "lru": _misses_of_recency,
    "none": _misses_without_eviction,
    "adaptive": _misses_of_adaptive,
}


def predicted(sample: Sample, bounds: Iterable[int], policy: str) -> list[float] | None:
    """For each bound, in bytes, the part of all reads that would be misses; None if it cannot be told.

    That is so if the sample is too small, or if nothing here simulates the policy.

    The ratio is that of the sampled reads, in a cache that is empty before the first of them.
    """
    begin = sample.counted_from
    factor = 2**sample.shift
    simulated = _MISSES.get(policy)
    if simulated is None or begin >= len(sample.keys):
        return None
    counted = sample.told_at >= sample.at[begin]
    unstored = max(0, int(sample.unstored[counted].sum()))
    uses = float(sample.weights[begin:].sum()) * factor
    # reads of which nothing else is known are hits with any bound
    reads = max(int(sample.reads[counted].sum()), unstored + (uses if factor == 1 else 1))
    misses = (simulated(sample, bound / factor, begin) * factor for bound in bounds)
    return [min(1.0, (missed + unstored) / reads) for missed in misses]
