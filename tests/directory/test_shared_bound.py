"""The bytes on the disk never exceed the bound, however many processes write, at whatever instant one looks."""

from __future__ import annotations

import asyncio
import errno
import random
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import PATIENCE, Child, Made, Team, audit, barrier, frozen, made, run, usage, version_of
from sources import Part, between, by_ranges, read
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype

import xzcache
from xzcache._config import UNSET
from xzcache.directory._space import Space

pytestmark = pytest.mark.slow

PERIOD = 0.005
SEVERAL = "ranges" if hasattr(Store, "get_ranges") else "range"


class Shape(NamedTuple):
    """A working set of five times the bound."""

    bound: int
    smallest: int
    largest: int

    def sizes(self) -> dict[str, int]:
        draw = random.Random(self.bound)
        sizes: dict[str, int] = {}
        while sum(sizes.values()) < 5 * self.bound:
            ratio = self.largest / self.smallest
            sizes[f"k{len(sizes)}"] = round(self.smallest * ratio ** draw.random())
        return sizes


SHAPES = {
    "64KiB-in-8MiB": Shape(8 << 20, 64 << 10, 64 << 10),
    "1KB-to-1MB-in-16MiB": Shape(16 << 20, 1000, 1_000_000),
    "256KiB": Shape(256 << 10, 500, 20_000),
}


def some(draw: random.Random, size: int, what: str) -> Part:
    """All of an object, a range of it, or up to three of them."""
    count = {"whole": 0, "range": 1, "ranges": draw.randint(1, 3)}[what]
    ends = [sorted(draw.sample(range(size + 1), 2)) for _ in range(count)]
    parts = between(*((first, last) for first, last in ends))
    return {"whole": None, "range": parts[0] if parts else None, "ranges": parts}[what]


def read_much(
    link: Connection,
    root: str,
    shape: Shape,
    seed: int,
    *,
    what: str = "whole",
    broken: float = 0,
    asks: bool = True,
) -> dict[str, int]:
    """Read random keys or ranges of them, several at a time, until told to stop."""
    if broken:
        break_the_order(broken)
    sizes = shape.sizes()
    store = xzcache.CacheStore(Made(sizes), cache_store=root, max_size=bound_of(shape, asks), namespace="made")
    draw = random.Random(seed)

    async def check(key: str) -> None:
        part = some(draw, sizes[key], what)
        whole = made(key, 0, sizes[key])
        parts = part if isinstance(part, list) else [part]
        expected = [whole if each is None else whole[each.start : each.end] for each in parts]
        assert await read(store, key, part) == b"".join(expected)

    async def read_on() -> None:
        keys = list(sizes)
        while not link.poll():
            await asyncio.gather(*(check(key) for key in draw.sample(keys, 6)))

    barrier(link)
    asyncio.run(read_on())
    stats = store.cache_stats()
    return {name: stats[name] for name in ("hits", "misses", "evictions", "cache_errors")}


def write_much(
    link: Connection, root: str, shape: Shape, seed: int, *, broken: float = 0, asks: bool = True
) -> dict[str, int]:
    """Set random keys, some of them again and again, until told to stop."""
    if broken:
        break_the_order(broken)
    sizes = shape.sizes()
    store = xzcache.LockedLocalStore(root, max_size=bound_of(shape, asks))
    draw = random.Random(seed)
    buffer = default_buffer_prototype().buffer
    done = refused = 0
    barrier(link)
    while not link.poll():
        key = draw.choice(list(sizes))
        name = f"direct/{draw.choice((seed, 0))}/{key}"
        try:
            store.set_sync(name, buffer.from_bytes(made(name, 0, sizes[key])))
            done += 1
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # others may take the room that was made for this one, again and again
            refused += 1
        value = store.get_sync(name)
        assert value is None or version_of(name, value.to_bytes(), sizes[key]) == 0
    return {"done": done, "refused": refused, "cache_errors": store.directory.barrier.faults}


def bound_of(shape: Shape, asks: bool) -> Any:
    return shape.bound if asks else UNSET


def break_the_order(seconds: float) -> None:
    """Give space back before the files are unlinked, this long before."""

    def give_back_too_early(self: Space, dying: list, *, soon: bool = False) -> None:
        if dying:
            self.free_tombstones(dying)
            time.sleep(seconds)
            self.erase(dying)

    Space.unlink_deleted = give_back_too_early  # type: ignore[method-assign]  # that is the point
    # small files have no such order: they are unlinked before their row is gone for good
    sys.modules[Space.__module__]._SMALL = -1  # type: ignore[attr-defined]


class Samples(NamedTuple):
    count: int
    largest: int
    with_files_in_flight: int


def sample(root: str, writers: list[Child], seconds: float, enough: float = 0) -> Samples:
    """Look at the disk every 5 ms; on a busy machine, go on for these seconds after it has held enough bytes."""
    sizes, in_flight, largest = [], 0, 0.0
    due = time.monotonic()
    end, last = due + seconds, due + PATIENCE
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + PERIOD, time.monotonic())
        with frozen(writers):
            now = usage(root)
        sizes.append(now.size)
        if largest < enough and due < last:
            end = due + seconds
        largest = max(largest, now.size)
        in_flight += now.in_flight > 0
    return Samples(len(sizes), max(sizes), in_flight)


def write_and_sample(
    root: str, shape: Shape, seconds: float, what: str = "whole", *, broken: float = 0, enough: float = 0
) -> tuple[Samples, list, list]:
    with Team() as team:
        readers = [team.start(read_much, root, shape, seed, what=what, broken=broken) for seed in range(6)]
        setters = [team.start(write_much, root, shape, seed, broken=broken) for seed in range(6, 8)]
        team.go()
        samples = sample(root, team, seconds, enough)
        for child in team:
            with suppress(BrokenPipeError):
                child.send("stop")
        reports = [child.result() for child in readers], [child.result() for child in setters]
    print(f"{samples}: {samples.largest / shape.bound:.3f} of the bound; {reports}")
    return samples, *reports


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((name, "whole") for name in SHAPES),
        ("64KiB-in-8MiB", "range"),
        pytest.param("1KB-to-1MB-in-16MiB", "ranges", marks=by_ranges),
        pytest.param("256KiB", "ranges", marks=by_ranges),
    ],
)
def test_the_disk_never_holds_more_than_the_bound(tmp_path: Path, name: str, what: str) -> None:
    root, shape = str(tmp_path), SHAPES[name]
    samples, readers, setters = write_and_sample(root, shape, 4.0, what, enough=0.8 * shape.bound)
    assert samples.largest <= shape.bound
    # it was the bound that held, and not a cache that stored little
    assert samples.largest > 0.8 * shape.bound
    assert samples.count > 20
    assert samples.with_files_in_flight
    # small pieces do not make everybody evict, nor does a busy machine
    assert any(report["evictions"] for report in readers)
    assert all(report["done"] > 10 * report["refused"] for report in setters)
    assert not any(report["cache_errors"] for report in readers + setters)
    audit(root)


@pytest.mark.parametrize("what", ["whole", pytest.param("ranges", marks=by_ranges)])
@pytest.mark.soak
def test_the_sampler_sees_space_that_is_given_back_too_early(tmp_path: Path, what: str) -> None:
    shape = SHAPES["64KiB-in-8MiB"]
    largest = 0
    for attempt in range(8):
        # a sample sees one instant: on a busy machine the space has to be free for longer before it is used and seen
        seconds = 0.1 * 2 ** min(attempt, 3)
        samples, _, _ = write_and_sample(str(tmp_path / str(attempt)), shape, 3.0, what, broken=seconds)
        largest = max(largest, samples.largest)
        if largest > shape.bound:
            break
    assert largest > shape.bound


def ask_for(link: Connection, root: str, bound: int) -> None:
    assert xzcache.LockedLocalStore(root, max_size=bound).directory.prepare()


def test_a_lower_bound_holds_at_once_while_others_write(tmp_path: Path) -> None:
    root, shape = str(tmp_path), SHAPES["64KiB-in-8MiB"]
    # those who write ask for no bound of their own, and have leased much under a large one
    run(ask_for, root, 64 << 20)
    with Team() as team:
        for seed in range(6):
            team.start(read_much, root, shape, seed, what=("whole", "range", SEVERAL)[seed % 3], asks=False)
        for seed in range(6, 8):
            team.start(write_much, root, shape, seed, asks=False)
        team.go()
        # on a busy machine the first entry takes its time
        began, end = False, time.monotonic() + PATIENCE
        while not began and time.monotonic() < end:
            began = sample(root, team, 0.5).largest > 0
        assert began
        for bound in (8 << 20, 1 << 20, 8 << 20):
            # writers come and go all the time, and let it happen all the same
            started = time.monotonic()
            run(ask_for, root, bound)
            elapsed = time.monotonic() - started
            filled, end = 0, time.monotonic() + PATIENCE
            while filled <= 0.7 * bound and time.monotonic() < end:
                samples = sample(root, team, 1.0)
                print(f"{samples}: {samples.largest / bound:.3f} of the bound, which took {elapsed:.2f} s")
                filled = samples.largest
                assert filled <= bound
            assert filled > 0.7 * bound
        for child in team:
            child.send("stop")
        team.results()
    audit(root)


# -- what is larger than the bound


def pass_through(link: Connection, root: str, what: str) -> None:
    bound = 256 << 10
    sizes = {"larger": bound + 1, "small": 1000}
    store = xzcache.CacheStore(Made(sizes), cache_store=root, max_size=bound, namespace="made")

    async def read_all() -> None:
        for key in ("small", "larger", "larger", "small"):
            ends = 0, sizes[key]
            part = {"whole": None, "range": RangeByteRequest(*ends), "ranges": between(ends)}[what]
            assert await read(store, key, part) == made(key, 0, sizes[key])

    asyncio.run(read_all())
    assert store.cache_stats()["misses"] == 3
    assert store.cache_stats()["cache_errors"] == 0
    # and nothing was evicted for what cannot be stored
    assert (store.cache_info()["cached_keys"], store.cache_info()["total_size"]) == (1, 1000)
    direct = xzcache.LockedLocalStore(root)
    with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}"):
        direct.set_sync("larger", default_buffer_prototype().buffer.from_bytes(bytes(bound + 1)))
    assert direct.get_sync("larger") is None


@pytest.mark.parametrize("what", ["whole", "range", pytest.param("ranges", marks=by_ranges)])
def test_what_is_larger_than_the_bound_passes_through(tmp_path: Path, what: str) -> None:
    run(pass_through, str(tmp_path), what)
    assert audit(str(tmp_path)) == 1
