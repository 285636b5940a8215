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
from xzcache.index import SAMPLED, is_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xzcache.eviction._adaptive import Ints
    from xzcache.index import UsesRow

_DTYPE: Final = np.dtype([("at", "<i8"), ("key", "<u4"), ("size", "<u4")])
"""As `SAMPLED`."""
_WARMING: Final = 0.25
"""The part of a sample that only fills the simulated cache, where earlier uses are not known any more."""


class Sample(NamedTuple):
    """The uses of sampled keys in the order of time, as processes told of them.

    Attributes
    ----------
    at : array of int
        When, in ns since the epoch.
    keys, sizes : array of int
        Hashes of the keys, below ``2**62 >> shift``, and the bytes of their entries.
    told_at, reads, unstored : array of int
        For each report of a process: when its last use was, the reads of any key, sampled or not, since its report
        before, and how many more misses than stored entries there were.
    shift : int
        One key of ``2**shift`` is sampled.
    is_whole : bool
        Whether it has the uses since the cache was made, and not only the latest.
    """

    at: Ints
    keys: Ints
    sizes: Ints
    told_at: Ints
    reads: Ints
    unstored: Ints
    shift: int
    is_whole: bool

    @classmethod
    def of(cls, rows: Sequence[UsesRow], usual: int) -> Self:
        """The sample in the index; `usual` is the size of an entry whose own is not known."""
        shift = max((row.shift for row in rows), default=0)
        parts = [np.frombuffer(row.uses[: len(row.uses) // SAMPLED.size * SAMPLED.size], _DTYPE) for row in rows]
        told_at = np.maximum.accumulate([int(part["at"].max(initial=0)) for part in parts] or [0])
        uses = np.concatenate([np.zeros(0, _DTYPE), *parts])
        uses = uses[uses["key"] < 1 << 32 >> shift]
        uses = uses[np.argsort(uses["at"], kind="stable")]
        # the size is known of an entry that arrived, and it is the same for all of its uses
        _, of_key = np.unique(uses["key"], return_inverse=True)
        sizes = np.zeros(len(uses), np.int64)
        np.maximum.at(sizes, of_key, uses["size"].astype(np.int64))
        sizes = np.where(sizes > 0, sizes, usual)[of_key]
        counts = np.array([(row.reads, row.unstored) for row in rows], np.int64).reshape(-1, 2)
        keys = uses["key"].astype(np.int64) << (HASH_BITS - 32)
        return cls(
            uses["at"].astype(np.int64),
            keys,
            sizes,
            told_at[: len(rows)],
            counts[:, 0],
            counts[:, 1],
            shift,
            is_whole(rows),
        )

    def thinned(self, most: int) -> Sample:
        """A sample of fewer keys, with about so many uses at the most."""
        shift = self.shift + max(0, math.ceil(math.log2(max(1, len(self.at)) / most)))
        kept = self.keys < 1 << HASH_BITS >> shift
        return self._replace(at=self.at[kept], keys=self.keys[kept], sizes=self.sizes[kept], shift=shift)

    @property
    def counted_from(self) -> int:
        """The first use that is counted: those before it only fill the simulated cache."""
        return 0 if self.is_whole else int(len(self.at) * _WARMING)


class _Counting(Adaptive):
    """The policy ``adaptive`` with all of its simulated cache watched: counts the uses that it would have held."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0.0

    def _compare(self, ours: float, recency: float) -> None:
        self.found += recency if self.prefers_recency else ours
        super()._compare(ours, recency)


def _misses_of_recency(sample: Sample, room: float, begin: int) -> float:
    held: OrderedDict[int, int] = OrderedDict()
    used = misses = 0
    for number, (key, size) in enumerate(zip(sample.keys.tolist(), sample.sizes.tolist(), strict=True)):
        if (before := held.pop(key, None)) is None:
            misses += number >= begin
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
    used = misses = 0
    for number, (key, size) in enumerate(zip(sample.keys.tolist(), sample.sizes.tolist(), strict=True)):
        if key not in held:
            misses += number >= begin
            if used + size <= room:
                held.add(key)
                used += size
    return misses


def _misses_of_adaptive(sample: Sample, room: float, begin: int) -> float:
    count = len(sample.keys)
    entries = max(1, int(room / max(1.0, float(sample.sizes.mean()))))
    entries = min(entries, len(np.unique(sample.keys)))
    # the keys of the sample become those that the policy watches, of a cache that is larger by as much
    shift = HASH_BITS + 1 - limit_for(entries).bit_length()
    keys = (sample.keys << sample.shift) >> shift
    policy = _Counting()
    uses = Uses(np.arange(1, count + 1), keys, sample.sizes, np.zeros(count, np.int64))
    found = 0.0
    for first, last in ((0, begin), (begin, count)):
        found = policy.found
        policy.learn(Uses(*(column[first:last] for column in uses)), entries, room * 2**shift)
    return count - begin - (policy.found - found)


_MISSES: Final = {
    "lru": _misses_of_recency,
    "none": _misses_without_eviction,
    "adaptive": _misses_of_adaptive,
}


def predicted(sample: Sample, bounds: Iterable[int], policy: str) -> list[float] | None:
    """For each bound, in bytes, the part of all reads that would be misses; None if the sample shows nothing.

    It is that of the reads that the sample covers, in a cache that is empty at its beginning.
    """
    begin = sample.counted_from
    factor = 2**sample.shift
    uses = (len(sample.keys) - begin) * factor
    if not uses:
        return None
    counted = sample.told_at >= sample.at[begin]
    unstored = max(0, int(sample.unstored[counted].sum()))
    # several reads of a key between two reports are one use: the others are hits with any bound
    reads = max(int(sample.reads[counted].sum()), unstored + (uses if factor == 1 else 1))
    misses = (_MISSES[policy](sample, bound / factor, begin) * factor for bound in bounds)
    return [min(1.0, (missed + unstored) / reads) for missed in misses]
