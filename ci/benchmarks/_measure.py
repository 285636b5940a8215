"""Measures side by side: the contestants take turns in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """How two contestants compare: the ratio of their medians, and the quartiles of the ratios round by round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}"


class Samples(NamedTuple):
    """What one contestant took in each round, in seconds a call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return _quartiles(self.seconds)

    def over(self, other: Samples) -> Ratio:
        """This one's time over another's of the same rounds."""
        if len(self.seconds) != len(other.seconds):
            raise ValueError("only contestants of the same rounds can be compared")
        rounds = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        return Ratio(self.median / other.median, *_quartiles(rounds))


def _quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    calls: int = 1,
    warm_up: int = 1,
    least: int = 5,
    most: int = 25,
    budget: float = 10.0,
    before: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Let contestants take turns.

    Parameters
    ----------
    contestants : mapping of str to callable
    calls : int
        How many of what is measured one call of a contestant does.
    warm_up : int
        Rounds that are not counted.
    least, most : int
        How many rounds are counted: at least, and at the most.
    budget : float
        Seconds after which no round begins, unless there were too few.
    before : callable, optional
        What to do before each turn, given the contestant's name; its time does not count.
    clock : callable
        What tells seconds.

    Returns
    -------
    dict of str to Samples
    """
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = clock() + budget
    for turn in range(-warm_up, most):
        if turn >= least and clock() >= end:
            break
        # whoever goes first pays for what the one before has left behind: each round another one
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before(name)
            gc.collect()
            begin = clock()
            contestants[name]()
            seconds = clock() - begin
            if turn >= 0:
                taken[name].append(seconds / calls)
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}
