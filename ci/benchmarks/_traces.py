"""How people read chunked arrays: seeded traces of keys, small integers from 0.

Nobody gave us theirs, so all of them are made up. The first eleven follow what people describe; the others, those of
`GUESSES`, are our own guesses of what else there may be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Trace = NDArray[np.int64]
Make = Callable[[Generator, int, int], Trace]


def _fill(length: int, part: Callable[[int], Trace]) -> Trace:
    """Parts one after the other, until there is enough."""
    parts: list[Trace] = []
    have = 0
    while have < length:
        parts.append(np.asarray(part(len(parts)), dtype=np.int64))
        have += len(parts[-1])
    return np.concatenate(parts)[:length]


def _zipf(rng: Generator, keys: int, length: int, exponent: float) -> Trace:
    weights = 1 / np.arange(1, keys + 1) ** exponent
    return np.asarray(rng.permutation(keys)[rng.choice(keys, length, p=weights / weights.sum())])


def _square(keys: int) -> tuple[int, int]:
    """Steps of time and places of an array of about so many chunks."""
    side = int(keys**0.5)
    return side, keys // side


def epochs(rng: Generator, keys: int, length: int) -> Trace:
    return _fill(length, lambda _: np.arange(keys))


def shuffles(rng: Generator, keys: int, length: int) -> Trace:
    return _fill(length, lambda _: rng.permutation(keys))


def zipf_08(rng: Generator, keys: int, length: int) -> Trace:
    return _zipf(rng, keys, length, 0.8)


def zipf_10(rng: Generator, keys: int, length: int) -> Trace:
    return _zipf(rng, keys, length, 1.0)


def analysis(rng: Generator, keys: int, length: int) -> Trace:
    """Means over all times, then maps of some times, then series of hot regions; and again."""
    times, places = _square(keys)
    hot = rng.choice(places, max(1, places // 10), replace=False)

    def part(number: int) -> Trace:
        if number % 3 == 0:
            return np.arange(times * places)
        if number % 3 == 1:
            chosen = rng.choice(times, times // 2)
            return (chosen[:, None] * places + np.arange(places)).ravel()
        columns = rng.choice(hot, times // 2)
        return (columns[:, None] + np.arange(times) * places).ravel()

    return _fill(length, part)


def rolling(rng: Generator, keys: int, length: int) -> Trace:
    """A window over time, each overlapping three quarters of the one before."""
    window = max(4, keys // 20)
    return _fill(length, lambda number: (np.arange(window) + number * (window // 4)) % keys)


def browsing(rng: Generator, keys: int, length: int) -> Trace:
    """A view of 4 x 4 tiles that wanders over a map, and now and then jumps to a favourite place."""
    side = int(keys**0.5)
    favourites = rng.integers(0, side, (12, 2))
    at = favourites[0].copy()
    view = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(-1, 2)

    def part(_: int) -> Trace:
        nonlocal at
        at = favourites[rng.integers(12)].copy() if rng.random() < 0.05 else (at + rng.integers(-2, 3, 2)) % side
        tiles = (at + view) % side
        return np.asarray(tiles[:, 0] * side + tiles[:, 1])

    return _fill(length, part)


def hot_and_scans(rng: Generator, keys: int, length: int) -> Trace:
    """Half of the accesses to a hot twentieth, the others to what is read once in a long while."""
    hot = max(2, keys // 20)
    trace = np.empty(length, np.int64)
    is_hot = rng.random(length) < 0.5
    trace[is_hot] = rng.integers(0, hot, is_hot.sum())
    trace[~is_hot] = hot + np.arange((~is_hot).sum()) % (keys - hot)
    return trace


def new_dataset(rng: Generator, keys: int, length: int) -> Trace:
    """Four passes over each of several datasets, each once."""
    count = max(2, round(length / keys / 4 * 8))
    each = max(8, keys // count)
    return _fill(length, lambda number: np.tile(np.arange(each) + number * each, 4))


def ping_pong(rng: Generator, keys: int, length: int) -> Trace:
    return _fill(length, lambda number: np.arange(keys)[:: 1 if number % 2 == 0 else -1])


def random(rng: Generator, keys: int, length: int) -> Trace:
    return rng.integers(0, keys, length)


def two_loops(rng: Generator, keys: int, length: int) -> Trace:
    """Two jobs in turn, one over a fifth of the keys."""
    short = keys // 5
    trace = np.empty(length, np.int64)
    first = rng.random(length) < 0.5
    trace[first] = np.arange(first.sum()) % short
    trace[~first] = short + np.arange((~first).sum()) % (keys - short)
    return trace


def epochs_with_coordinates(rng: Generator, keys: int, length: int) -> Trace:
    """Passes in which every tenth access is to a few coordinates."""
    few = max(2, keys // 100)
    trace = few + np.arange(length) % (keys - few)
    often = rng.random(length) < 0.1
    trace[often] = rng.integers(0, few, often.sum())
    return trace


def validation(rng: Generator, keys: int, length: int) -> Trace:
    """A shuffled epoch of training, then a pass over a validation set, in order."""
    train = keys * 4 // 5
    return _fill(length, lambda _: np.concatenate([rng.permutation(train), np.arange(train, keys)]))


def shuffle_buffer(rng: Generator, keys: int, length: int) -> Trace:
    """Epochs in an order that is shuffled within a buffer only."""
    buffer = max(4, keys // 20)
    return _fill(length, lambda _: np.argsort(np.arange(keys) + rng.uniform(0, buffer, keys)))


def drifting(rng: Generator, keys: int, length: int) -> Trace:
    """Zipf, with other favourites every now and then."""
    step = max(16, length // 12)
    ranks = _zipf(rng, keys, length, 0.9)
    return (ranks + (np.arange(length) // step) * (keys // 24)) % keys


def zipf_and_scans(rng: Generator, keys: int, length: int) -> Trace:
    """A user who browses while every so often a job passes over everything."""
    return _fill(length, lambda number: np.arange(keys) if number % 3 == 2 else _zipf(rng, keys, keys, 0.9))


def growing(rng: Generator, keys: int, length: int) -> Trace:
    """Each day everything so far, and one day more."""
    days = max(2, round(2 * length / keys) - 1)
    return _fill(length, lambda number: np.arange(max(1, keys * min(number + 1, days) // days)))


def strides(rng: Generator, keys: int, length: int) -> Trace:
    """Passes over every time, every second, every fourth."""
    return _fill(length, lambda _: np.arange(0, keys, int(rng.choice([1, 2, 4]))))


def regions(rng: Generator, keys: int, length: int) -> Trace:
    """A few passes over a region, then over another."""

    def part(_: int) -> Trace:
        width = int(rng.integers(keys // 20, keys // 2))
        begin = int(rng.integers(0, keys))
        return np.tile((begin + np.arange(width)) % keys, int(rng.integers(2, 6)))

    return _fill(length, part)


def transposed(rng: Generator, keys: int, length: int) -> Trace:
    """By time, then by place."""
    times, places = _square(keys)
    grid = np.arange(times * places).reshape(times, places)
    return _fill(length, lambda number: (grid if number % 2 == 0 else grid.T).ravel())


def three_users(rng: Generator, keys: int, length: int) -> Trace:
    """Each passes over a dataset of their own, at a pace of their own."""
    third = keys // 3
    who = rng.choice(3, length, p=[0.6, 0.3, 0.1])
    trace = np.empty(length, np.int64)
    for user in range(3):
        mine = who == user
        trace[mine] = user * third + np.arange(mine.sum()) % third
    return trace


def animation(rng: Generator, keys: int, length: int) -> Trace:
    """A clip of time, played three to nine times; then another, often the next one."""
    clip = max(4, keys // 30)
    at = 0

    def part(_: int) -> Trace:
        nonlocal at
        at = int(rng.integers(0, keys)) if rng.random() < 0.2 else at + clip
        return np.tile((at + np.arange(clip)) % keys, int(rng.integers(3, 10)))

    return _fill(length, part)


def stencil(rng: Generator, keys: int, length: int) -> Trace:
    """Passes in which each chunk is read with its four neighbours."""
    side = int(keys**0.5)
    y, x = (grid.ravel() for grid in np.meshgrid(np.arange(side), np.arange(side), indexing="ij"))
    around = [(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    once = np.stack([(row % side) * side + column % side for row, column in around], -1).ravel()
    return _fill(length, lambda _: once)


def crops(rng: Generator, keys: int, length: int) -> Trace:
    """Each epoch the same samples of 2 x 2 chunks, shuffled."""
    side = int(keys**0.5)
    y, x = np.divmod(rng.choice(side * side, side * side // 2, replace=False), side)
    corners = [(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)]
    samples = np.stack([(row % side) * side + column % side for row, column in corners], -1)
    return _fill(length, lambda _: rng.permutation(samples).ravel())


def phases(rng: Generator, keys: int, length: int) -> Trace:
    """Another habit every sixth of the time."""
    habits: list[Make] = [epochs, zipf_10, ping_pong, shuffles, rolling, hot_and_scans]
    return np.concatenate([habit(rng, keys, length // 6) for habit in habits])


DESCRIBED: Final[dict[str, Make]] = {
    "epochs over everything": epochs,
    "a fresh shuffle each epoch": shuffles,
    "Zipf 0.8": zipf_08,
    "Zipf 1.0": zipf_10,
    "time means, maps, hot regions": analysis,
    "rolling window, 75 % overlap": rolling,
    "map browsing": browsing,
    "hot set, scans passing by": hot_and_scans,
    "a new dataset every four epochs": new_dataset,
    "ping-pong scan": ping_pong,
    "random": random,
}
GUESSES: Final[dict[str, Make]] = {
    "two loops in turn": two_loops,
    "epochs with coordinates": epochs_with_coordinates,
    "training and validation": validation,
    "epochs through a shuffle buffer": shuffle_buffer,
    "Zipf 0.9, drifting": drifting,
    "Zipf 0.9 between scans": zipf_and_scans,
    "all days so far, each day": growing,
    "passes in strides": strides,
    "passes over changing regions": regions,
    "by time, then by place": transposed,
    "three users, three paces": three_users,
    "clips played again": animation,
    "a stencil over everything": stencil,
    "random crops": crops,
    "another habit now and then": phases,
}
LOOPS: Final = (
    "epochs over everything",
    "a fresh shuffle each epoch",
    "rolling window, 75 % overlap",
    "hot set, scans passing by",
    "a new dataset every four epochs",
)
"""Loops, shuffles, rolling windows and scans, of which the most is asked."""


def make(name: str, seed: int, keys: int, length: int) -> Trace:
    """A trace, the same one for the same seed; its keys are numbered from 0 without gaps."""
    rng = np.random.default_rng([seed, sorted(DESCRIBED | GUESSES).index(name)])
    trace = (DESCRIBED | GUESSES)[name](rng, keys, length)
    return np.unique(trace, return_inverse=True)[1].astype(np.int64)
