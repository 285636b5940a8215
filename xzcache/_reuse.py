"""How likely an entry is used again, by how often it was used and how long ago: learned from what was.

The idea is that of EVA (Beckmann and Sanchez, 2017) and LHD (Beckmann, Chen and Cidon, 2018): an entry is worth the
uses to be expected of it for each unit of time that it would stay. Time is counted in uses of anything.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

CLASSES: Final = 20
BUCKETS: Final = 72
_STEPS: Final = 4

_EDGES: Final[Reals] = 16.0 * 2.0 ** (np.arange(BUCKETS + 1) / _STEPS) - 16.0
_WIDTHS: Final[Reals] = np.diff(_EDGES)
_CENTRES: Final[Reals] = (_EDGES[:-1] + _EDGES[1:]) / 2
_PRIOR: Final[Reals] = 0.1 / _WIDTHS
_WEIGHT: Final = 1.0
_MOST_IN_A_BUCKET: Final = 20.0


def class_of(gaps: Ints) -> Ints:
    """0 for what was never used again, else by the octave of the time between its uses."""
    return np.where(gaps > 0, np.minimum(CLASSES - 1, 1 + np.log2(np.maximum(gaps, 0) / 16 + 1).astype(np.int64)), 0)


def place_of(ages: Ints) -> Reals:
    """Four buckets each time that an age doubles."""
    return np.asarray(np.minimum(BUCKETS - 1.0, _STEPS * np.log2(np.maximum(ages, 0) / 16 + 1)))


def next_gap(gaps: Ints, intervals: Ints) -> Ints:
    """The time between uses, the latest of which counts for a quarter."""
    return np.maximum(1, np.where(gaps > 0, gaps + (intervals - gaps) // 4, intervals))


def cells(gaps: Ints, ages: Ints) -> Reals:
    """How many there are of each class and bucket."""
    flat = np.bincount(class_of(gaps) * BUCKETS + place_of(ages).astype(np.int64), minlength=CLASSES * BUCKETS)
    return flat.reshape(CLASSES, BUCKETS).astype(np.float64)


class Reuse:
    """What was learned: uses, and the time that entries waited for one, by class and age.

    Attributes
    ----------
    uses, waited : array of float
        By class and bucket of age; older observations count for less.
    """

    def __init__(self, uses: Reals | None = None, waited: Reals | None = None) -> None:
        self.uses = np.zeros((CLASSES, BUCKETS)) if uses is None else uses
        self.waited = np.zeros((CLASSES, BUCKETS)) if waited is None else waited

    def used(self, gaps: Ints, ages: Ints) -> None:
        """Learn of uses of entries that had been used so often, so long ago."""
        self.uses += cells(gaps, ages)

    def wait(self, gaps: Ints, ages: Ints, passed: int, keep: float) -> None:
        """Learn that all these entries waited for some time; what was learned before counts `keep` of what it did."""
        self.uses *= keep
        self.waited *= keep
        self.waited += passed * cells(gaps, ages)

    def hazards(self) -> Reals:
        """Uses to be expected of one entry in one unit of time, by class and bucket.

        Where little was seen of a class, all classes speak for it, and where little was seen at all, a prior by which
        what was used last is used first.
        """
        every = (self.uses.sum(0) + _WEIGHT) / (self.waited.sum(0) + _WEIGHT / _PRIOR)
        general = (self.uses + _WEIGHT) / (self.waited + _WEIGHT / every)
        mine = (self.uses + _WEIGHT) / (self.waited + _WEIGHT / general)
        mine[0] = general[0]
        return mine

    def worth(self) -> Reals:
        """Uses for each unit of time that an entry stays, until the best time to let it go, by class and bucket."""
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
    places = place_of(ages)
    lower = places.astype(np.int64)
    upper = np.minimum(lower + 1, BUCKETS - 1)
    rows, part = class_of(gaps), places - lower
    return np.asarray(worth[rows, lower] * (1 - part) + worth[rows, upper] * part)
