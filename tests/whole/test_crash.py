"""Processes that are killed at any step leave nothing that the next one does not put right."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Child, Made, Team, audit, findings, index_path, made, run, version_of, visit
from sources import by_ranges, ranges
from sweeps import sweep
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

import xzcache
from xzcache import files as _files
from xzcache.directory import _recovery
from xzcache.directory._publish import PendingEntry, Publisher
from xzcache.directory._space import Space
from xzcache.index._sql import Index
from xzcache.model.entry import Entry

PROCESSES = 8
BOUND = 1 << 20
SIZES = {f"k{number:03}": 1000 + 701 * number for number in range(96)}
"""Three times the bound; the keys of one process are every eighth."""
OWN = {f"d{number:03}": 500 + 997 * number for number in range(32)}
"""What is written into the cache directory itself."""


def put(data: bytes) -> Any:
    return default_buffer_prototype().buffer.from_bytes(data)


# -- kills at random moments


class Versions:
    """Of each key, the last version that a writer began to write, and the last whose write returned.

    Shared by all processes: a file that is mapped. The last row counts what each process did.
    """

    def __init__(self, path: str) -> None:
        self._keys = {key: number for number, key in enumerate([*SIZES, *OWN])}
        mode = "r+" if os.path.exists(path) else "w+"
        self._table = np.memmap(path, dtype="u8", mode=mode, shape=(3, len(self._keys)))

    def begun(self, key: str) -> int:
        """No reader that is done now can have seen a later one."""
        return int(self._table[0, self._keys[key]])

    def begin(self, key: str) -> int:
        self._table[0, self._keys[key]] += 1
        return int(self._table[0, self._keys[key]])

    def returned(self, key: str, version: int) -> None:
        self._table[1, self._keys[key]] = version

    def done(self, slot: int, operations: int) -> None:
        self._table[2, slot] += operations

    @property
    def operations(self) -> int:
        return int(self._table[2].sum())

    def least(self, key: str) -> int:
        """No reader that begins now may see an older one."""
        return int(self._table[1, self._keys[key]])


class Work:
    """What one process does until it is told to stop or killed."""

    def __init__(self, place: Path, slot: int, seed: int) -> None:
        self.draw = random.Random(seed)
        self.versions = Versions(str(place / "versions"))
        self.source = LocalStore(place / "source")
        self.store = xzcache.CacheStore(self.source, cache_store=place / "cache", namespace="source")
        self.direct = xzcache.LockedLocalStore(place / "cache")
        self.own = [key for number, key in enumerate(SIZES) if number % PROCESSES == slot]
        self.own_direct = [key for number, key in enumerate(OWN) if number % PROCESSES == slot]
        self.slot = slot

    async def go_on(self, link: Connection) -> None:
        steps = [self.read] * 12 + [self.read_part] * 3 + [self.write] * 3
        steps += [self.read_ranges] * 6 * hasattr(Store, "get_ranges")
        steps += [self.write_direct] * 3 + [self.read_direct] * 3 + [self.delete_direct]
        while not link.poll():
            # the keys of the steps that run at once differ, as a process orders its own writes of a key by itself
            todo = self.draw.sample(steps, 4)
            keys = iter(self.draw.sample(list(SIZES), 4))
            own = iter(self.draw.sample(self.own, 4))
            direct = iter(self.draw.sample(self.own_direct, 4))
            given = {self.write: own, self.read: keys, self.read_part: keys, self.read_ranges: keys}
            await asyncio.gather(*(step(next(given.get(step, direct))) for step in todo))
            self.versions.done(self.slot, len(todo))

    async def read(self, key: str, part: RangeByteRequest | None = None) -> None:
        least = self.versions.least(key)
        value = await self.store.get(key, default_buffer_prototype(), part)
        assert value is not None
        assert len(value) == (SIZES[key] if part is None else part.end - part.start)
        version = version_of(key, value.to_bytes(), SIZES[key])
        assert version >= least, f"{key}: read version {version} after the write of {least} returned"

    async def read_part(self, key: str) -> None:
        await self.read(key, RangeByteRequest(0, 600))

    async def read_ranges(self, key: str) -> None:
        """Each is of one state of the value, whichever was there meanwhile."""
        least = self.versions.least(key)
        wanted = [RangeByteRequest(*sorted(self.draw.sample(range(SIZES[key] + 1), 2))) for _ in range(3)]
        found = await ranges(self.store, wanted, key, max_gap_bytes=500)
        values = [made(key, version, SIZES[key]) for version in range(least, self.versions.begun(key) + 1)]
        for each, part in zip(wanted, found, strict=True):
            assert any(part == value[each.start : each.end] for value in values), f"{key}, {each}: from {least} on"

    async def write(self, key: str) -> None:
        version = self.versions.begin(key)
        await self.store.set(key, put(made(key, version, SIZES[key])))
        self.versions.returned(key, version)

    async def write_direct(self, key: str) -> None:
        version = self.versions.begin(key)
        try:
            await self.direct.set(f"direct/{key}", put(made(key, version, OWN[key])))
        except OSError:
            # no room at this moment: then the old value is there, or nothing
            return
        self.versions.returned(key, version)

    async def read_direct(self, key: str) -> None:
        least = self.versions.least(key)
        value = await self.direct.get(f"direct/{key}")
        if value is not None:
            version = version_of(key, value.to_bytes(), OWN[key])
            assert version >= least, f"direct/{key}: read version {version} after {least} was set or deleted"

    async def delete_direct(self, key: str) -> None:
        version = self.versions.begin(key)
        await self.direct.delete(f"direct/{key}")
        self.versions.returned(key, version)


def work(link: Connection, place: Path, slot: int, seed: int) -> None:
    asyncio.run(Work(place, slot, seed).go_on(link))


def prepare_source(place: Path) -> None:
    os.makedirs(place / "source")
    for key, size in SIZES.items():
        (place / "source" / key).write_bytes(made(key, 0, size))
    Versions(str(place / "versions"))
    run(set_bound, str(place / "cache"))


def set_bound(link: Connection, root: str) -> None:
    assert xzcache.LockedLocalStore(root, max_size=BOUND).directory.prepare()


def kill_at_random(place: Path, kills: int, seed: int) -> None:
    """Eight processes at work, of which one is killed every so often."""
    draw = random.Random(seed)
    killed = 0
    with Team() as team:
        slots: dict[int, Child] = {}

        def hire(slot: int) -> None:
            slots[slot] = team.start(work, place, slot, draw.getrandbits(32))

        for slot in range(PROCESSES):
            hire(slot)
        while killed < kills:
            # now and then all at once, as when a machine's memory runs out
            victims = list(slots) if draw.random() < 0.02 else [draw.choice(list(slots))]
            for link in wait([child.link for child in team], timeout=draw.uniform(0, 0.12)):
                raise AssertionError(next(child for child in team if child.link is link).hear())
            for slot in victims:
                os.kill(slots[slot].pid, signal.SIGKILL)
            for slot in victims:
                team.dismiss(slots[slot])
                hire(slot)
            killed += len(victims)
        for child in team:
            child.send("stop")
        team.results()


def crash_test(place: Path, rounds: int, kills: int) -> None:
    seed = random.SystemRandom().getrandbits(32)
    prepare_source(place)
    root = str(place / "cache")
    for number in range(rounds):
        print(f"round {number}: seed {seed + number}")
        done = Versions(str(place / "versions")).operations
        kill_at_random(place, kills, seed + number)
        done = Versions(str(place / "versions")).operations - done
        visit(root)
        started = time.perf_counter()
        entries = audit(root)
        elapsed = time.perf_counter() - started
        print(f"{kills} kills in {done} operations; {entries} entries audited in {1000 * elapsed:.0f} ms")
        assert entries > 10
        assert done > kills


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    crash_test(tmp_path, rounds=2, kills=50)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_thousand_kills(tmp_path: Path) -> None:
    crash_test(tmp_path, rounds=10, kills=200)


# -- kills at named steps


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(function: Callable[..., Any]) -> Callable[..., Any]:
    return die


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    def replaced(*args: Any, **options: Any) -> None:
        function(*args, **options)
        die()

    return replaced


def halfway(write: Callable[..., Any]) -> Callable[..., Any]:
    """Of a write of a file: after the first half of it."""

    def replaced(path: str, data: Any, stamp: Any) -> None:
        write(path, bytes(data)[: len(data) // 2], stamp)
        die()

    return replaced


def between(reveal: Callable[..., Any]) -> Callable[..., Any]:
    """Of the two steps that make files entries: after the commit."""

    def replaced(index: Index, moves: Any) -> None:
        index.commit()
        die()

    return replaced


def amidst(reveal: Callable[..., Any]) -> Callable[..., Any]:
    """Of the two steps that make files entries: when half of the files have their names."""

    def replaced(index: Index, moves: Any) -> None:
        reveal(index, moves[: (len(moves) + 1) // 2])
        die()

    return replaced


def rename_first(index: Index, moves: Any) -> None:
    """The two steps in the wrong order, and the end between them."""
    for item in moves:
        _files.move(item.temporary, item.path)
    die()


def third(function: Callable[..., Any]) -> Callable[..., Any]:
    """The third call, and not the first, which joins the directory."""
    calls = []

    def replaced(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options) if len(calls) < 3 else die()

    return replaced


STEPS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "before-write": (_files, "write", before),
    "half-written": (_files, "write", halfway),
    "after-write": (_files, "write", after),
    "before-commit": (Publisher, "_commit_and_reveal", before),
    "between-commit-and-rename": (Publisher, "_commit_and_reveal", between),
    "after-rename": (Publisher, "_commit_and_reveal", after),
    "before-a-later-commit": (Index, "commit", third),
    "before-condemning": (Space, "mark_deleted", before),
    "after-condemning": (Space, "mark_deleted", after),
    "before-erasing": (Space, "erase", before),
    "after-erasing": (Space, "erase", after),
    "before-settling": (Space, "free_tombstones_in", before),
    "after-settling": (Space, "free_tombstones_in", after),
}


STEPS_OF_SEVERAL = STEPS | {
    "amidst-writing": (_files, "write", third),
    "amidst-renaming": (Publisher, "_commit_and_reveal", amidst),
}
"""What may be met when several are published together."""


def patch(owner: object, name: str, change: Callable[..., Any]) -> None:
    function = getattr(owner, name)
    kept = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(change(function)) if kept else change(function))


VALUE = 100_000


def fill(store: xzcache.LockedLocalStore, keys: range) -> None:
    for number in keys:
        store.set_sync(f"k{number}", put(made(f"k{number}", 0, VALUE)))


def check(store: xzcache.LockedLocalStore, keys: range) -> int:
    """How many keys have a value, which is right."""
    found = 0
    for number in keys:
        value = store.get_sync(f"k{number}")
        if value is not None:
            assert len(value) == VALUE
            version_of(f"k{number}", value.to_bytes(), VALUE)
            found += 1
    return found


def die_at(link: Connection, root: str, step: str) -> None:
    """Fill a directory, then write on, replacing and evicting, until the step is met."""
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    fill(store, range(9))
    patch(*STEPS[step])
    store.set_sync("k8", put(made("k8", 0, VALUE)))
    fill(store, range(9, 30))


def publish_together(store: xzcache.LockedLocalStore, keys: Iterable[str]) -> list[bool]:
    """Publish several values as fetches do; which of them were stored."""
    directory = store.directory
    assert directory.prepare()
    parcels = []
    for key in keys:
        entry = Entry(key)
        ticket = directory.fetch_locks.write_version(entry.key)
        parcels.append(PendingEntry(entry, memoryview(made(entry.key, 0, VALUE)), ticket, "etag"))
    directory.publisher.publish_all(parcels)
    return [parcel.is_stored for parcel in parcels]


def die_together(link: Connection, root: str, step: str) -> None:
    """As `die_at`, of several that are published together."""
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    fill(store, range(9))
    patch(*STEPS_OF_SEVERAL[step])
    for first in range(8, 30, 4):
        publish_together(store, [f"k{number}" for number in range(first, first + 4)])


def go_on(link: Connection, root: str) -> int:
    """Use a directory as if nothing had happened; how many values there were."""
    store = xzcache.LockedLocalStore(root)
    found = check(store, range(30))
    fill(store, range(30))
    assert check(store, range(30)) >= 8
    return found


def killed(target: Callable[..., Any], *args: Any) -> None:
    with Team() as team:
        assert team.start(target, *args).exit_code() == -signal.SIGKILL


def read_pieces(root: str, numbers: range) -> int:
    """Read values that are made up, two ranges of each; how many ranges were cached."""
    store = xzcache.CacheStore(
        Made({f"k{number}": VALUE for number in numbers}), cache_store=root, max_size=BOUND, namespace="made"
    )
    wanted = [RangeByteRequest(0, 45_000), RangeByteRequest(55_000, VALUE)]
    for number in numbers:
        parts = asyncio.run(ranges(store, wanted, f"k{number}", max_gap_bytes=0))
        value = made(f"k{number}", 0, VALUE)
        assert parts == [value[:45_000], value[55_000:]]
    return int(store.cache_stats()["hits"])


def die_at_pieces(link: Connection, root: str, step: str) -> None:
    """As `die_at`, where the entries are pieces."""
    read_pieces(root, range(9))
    patch(*STEPS[step])
    read_pieces(root, range(9, 30))


def go_on_pieces(link: Connection, root: str) -> int:
    return read_pieces(root, range(30))


@pytest.mark.parametrize(
    ("die_at", "go_on"),
    [(die_at, go_on), pytest.param(die_at_pieces, go_on_pieces, marks=by_ranges)],
    ids=["whole", "pieces"],
)
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_a_named_step(
    tmp_path: Path, step: str, die_at: Callable[..., None], go_on: Callable[..., int]
) -> None:
    root = str(tmp_path)
    killed(die_at, root, step)
    assert findings(root), "the kill came too early or too late to leave anything"
    visit(root)
    assert audit(root) >= 8
    assert run(go_on, root) >= 8
    assert audit(root) >= 8


@pytest.mark.parametrize("step", STEPS_OF_SEVERAL)
def test_a_kill_amidst_several(tmp_path: Path, step: str) -> None:
    root = str(tmp_path)
    killed(die_together, root, step)
    assert findings(root), "the kill came too early or too late to leave anything"
    visit(root)
    assert audit(root) >= 4
    assert run(go_on, root) >= 4
    assert audit(root) >= 8


def leave_work(link: Connection, root: str) -> None:
    """Die with all that a recovery has to deal with."""
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    fill(store, range(6))
    space = store.directory.space
    with store.directory.session.section() as (member, index):
        space.mark_deleted(member, index, index.by_rank(2))
    with store.directory.session.section() as (member, index):
        dying = space.mark_deleted(member, index, index.by_rank(1))
    space.erase(dying)
    Path(member.next_temporary()[1]).write_bytes(bytes(100))
    patch(*STEPS["between-commit-and-rename"])
    fill(store, range(6, 7))


RECOVERY: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "before-moving-on": (_files, "move", before),
    "after-moving-on": (_files, "move", after),
    "before-emptying": (_files, "empty", before),
    "after-emptying": (_files, "empty", after),
    "before-finishing": (_recovery, "finish", before),
    "after-finishing": (_recovery, "finish", after),
    "before-the-owner-goes": (Index, "drop_owner", before),
    "before-commit": (Index, "drop_owner", after),
    "before-sweeping": (_recovery, "_sweep", before),
    "after-sweeping": (_recovery, "_sweep", after),
}


def recover_and_die(link: Connection, root: str, step: str) -> None:
    patch(*RECOVERY[step])
    xzcache.LockedLocalStore(root).directory.prepare()


@pytest.mark.parametrize("step", RECOVERY)
def test_a_kill_of_the_one_who_recovers(tmp_path: Path, step: str) -> None:
    root = str(tmp_path)
    killed(leave_work, root)
    killed(recover_and_die, root, step)
    assert findings(root)
    visit(root)
    # three of seven were on their way out; the last was whole but for its name
    assert audit(root) == 4
    assert run(go_on, root) == 4
    audit(root)


# -- a kill between the source and the cache


KEY = "k000"


class SlowSource(WrapperStore[LocalStore]):
    """A source whose writes wait for a word, and whose writer does not live to see them done."""

    def __init__(self, store: LocalStore, link: Connection) -> None:
        super().__init__(store)
        self._link = link

    async def set(self, key: str, value: Any) -> None:
        self._link.send("begun")
        assert self._link.recv() == "write"
        await super().set(key, value)
        die()


def write_and_die(link: Connection, place: Path) -> None:
    source = SlowSource(LocalStore(place / "source"), link)
    store = xzcache.CacheStore(source, cache_store=place / "cache", namespace="source")
    asyncio.run(store.set(KEY, put(made(KEY, 1, SIZES[KEY]))))


def read_again(link: Connection, place: Path) -> None:
    """Tell the version of the value whenever asked."""
    store = xzcache.CacheStore(LocalStore(place / "source"), cache_store=place / "cache", namespace="source")
    while link.recv():
        value = asyncio.run(store.get(KEY, default_buffer_prototype()))
        assert value is not None
        link.send(version_of(KEY, value.to_bytes(), SIZES[KEY]))


def test_a_writer_that_is_killed_leaves_no_old_value(tmp_path: Path) -> None:
    prepare_source(tmp_path)
    with Team() as team:
        reader = team.start(read_again, tmp_path)
        writer = team.start(write_and_die, tmp_path)
        writer.hear("begun")
        # nothing is written yet: this is the old value, which is filled in the middle of the write
        reader.send(True)
        reader.hear(0)
        writer.send("write")
        assert writer.exit_code() == -signal.SIGKILL
        visit(str(tmp_path / "cache"))
        for child in (reader, team.start(read_again, tmp_path)):
            child.send(True)
            child.hear(1)
            child.send(False)
            child.result()
    audit(str(tmp_path / "cache"))


# -- kills at every step


CALLS = ("replace", "unlink", "rmdir", "mkdir", "write", "pwrite", "setxattr", "open")


class Countdown:
    """Kills the process before the n-th step that changes a file or the index."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        for name in CALLS:
            self._arm(os, name)
        for name in ("begin", "commit"):
            self._arm(Index, name)

    def _arm(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def replaced(*args: Any, **options: Any) -> Any:
            if name != "open" or args[1] & os.O_CREAT:
                self.left -= 1
            if self.left == 0:
                die()
            return function(*args, **options)

        setattr(owner, name, replaced)


def write_and_evict(root: str) -> None:
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    fill(store, range(9, 12))
    store.set_sync("k11", put(made("k11", 0, VALUE)))
    store.set_sync("k9/beneath", put(b"odd"))
    store.delete_sync("k10")
    store.directory.close()


def publish_several(root: str) -> None:
    """Replace one, evict for others, and have one whose place another of them takes."""
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    assert publish_together(store, ["k9", "k10", "k11"]) == [True] * 3
    assert publish_together(store, ["k11", "k12", "k12/beneath", "k13"]) == [True] * 4
    store.directory.close()


def recover(root: str) -> None:
    xzcache.LockedLocalStore(root).directory.prepare()


def fill_ten(link: Connection, root: str) -> None:
    fill(xzcache.LockedLocalStore(root, max_size=BOUND), range(10))


def damage(root: str) -> None:
    run(fill_ten, root)
    Path(index_path(root)).write_bytes(os.urandom(8192))


def prepared(root: str) -> None:
    run(fill_ten, root)


def crashed(root: str) -> None:
    killed(leave_work, root)


def nothing(root: str) -> None:
    """Begin with a directory that is not there."""


SCENES: dict[str, tuple[Callable[[str], None], Callable[[str], None]]] = {
    "first-use": (nothing, recover),
    "writing": (prepared, write_and_evict),
    "publishing": (prepared, publish_several),
    "recovering": (crashed, recover),
    "rebuilding": (damage, recover),
}


def act_until(link: Connection, root: str, action: Callable[[str], None], steps: int) -> int:
    countdown = Countdown(steps)
    action(root)
    return steps - countdown.left


@sweep(5)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.slow
def test_a_kill_at_every_step(tmp_path: Path, scene: str, every: int) -> None:
    prepare, action = SCENES[scene]
    template = tmp_path / "template"
    template.mkdir()
    prepare(str(template))

    def copy(name: str) -> str:
        return str(shutil.copytree(template, tmp_path / name))

    steps = run(act_until, copy("count"), action, 1 << 30)
    print(f"{scene}: {steps} steps")
    assert steps > 10
    wrong = {}
    for step in range(1, steps + 1, every):
        root = copy(str(step))
        killed(act_until, root, action, step)
        visit(root)
        if found := findings(root):
            wrong[step] = found
    assert not wrong


# -- the negative control


def die_with_a_name_and_no_row(link: Connection, root: str) -> None:
    store = xzcache.LockedLocalStore(root, max_size=BOUND)
    fill(store, range(3))
    Publisher._commit_and_reveal = staticmethod(rename_first)  # type: ignore[method-assign,assignment]  # that is the point
    fill(store, range(3, 4))


def test_the_audit_sees_a_rename_before_the_commit(tmp_path: Path) -> None:
    root = str(tmp_path)
    killed(die_with_a_name_and_no_row, root)
    visit(root)
    assert findings(root) == [f"a file without a row: {root}/k3, {VALUE} bytes"]


def join_and_die(link: Connection, root: str) -> None:
    assert xzcache.LockedLocalStore(root).directory.prepare()
    die()


def join_many(link: Connection, root: str) -> None:
    """As if the few entries of these tests were many."""
    _recovery._FEW = 3  # type: ignore[misc]  # that is the point
    assert xzcache.LockedLocalStore(root).directory.prepare()


def test_many_entries_are_counted_after_a_crash_and_not_at_each_joining(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(fill_ten, root)
    with sqlite3.connect(index_path(root)) as index:
        index.execute("UPDATE total SET bytes = bytes + 1")
    index.close()
    run(join_many, root)
    assert findings(root)
    killed(join_and_die, root)
    # that one joined as one of few entries, and has counted them
    with sqlite3.connect(index_path(root)) as index:
        index.execute("UPDATE total SET bytes = bytes + 1")
    index.close()
    run(join_many, root)
    assert audit(root) == 10


def test_the_audit_sees_an_account_that_is_off(tmp_path: Path) -> None:
    root = str(tmp_path)
    run(fill_ten, root)
    audit(root)
    with sqlite3.connect(index_path(root)) as index:
        index.execute("UPDATE total SET bytes = bytes + 1")
    index.close()
    os.unlink(f"{root}/k9")
    found = findings(root)
    assert len(found) == 3
    assert f"a row without a file: {root}/k9" in found
