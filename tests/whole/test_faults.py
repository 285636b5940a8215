"""Trouble with the cache never fails a read: full disks, read-only ones, too many open files, locks that stay taken."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pickle
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import zarr
from damage import (
    BOUND,
    Faults,
    Pass,
    audit,
    bound_of,
    break_disk,
    contents,
    counted,
    entry_files,
    fill_up,
    in_process,
    inject,
    inject_sql,
    leave,
    logged,
    make_read_only,
    make_source,
    mount_disk,
    mount_memory,
    passes,
    read,
    read_anew,
)
from processes import until
from sources import CountingStore, buffer, memory_source
from sources import read as get
from sweeps import sweep
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

import xzcache
from xzcache.model.entry import META

KIB, MIB = 1 << 10, 1 << 20

T = TypeVar("T")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    make_source(path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for nothing, and try again at once."""
    monkeypatch.setattr("xzcache.directory._faults._PAUSE_AFTER_FAILURE", 0)
    with xzcache.config.set(lock_timeout=0.2):
        yield


def messages(records: list[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records]


def kinds(records: list[logging.LogRecord]) -> list[tuple[object, ...]]:
    """What the records tell of: which cache, and what kind of trouble."""
    found = []
    for record in records:
        arguments = record.args if isinstance(record.args, tuple) else ()
        found.append(
            tuple((type(a), getattr(a, "errno", None), "" if isinstance(a, Exception) else a) for a in arguments)
        )
    return found


# -- a disk that is full


class Step(NamedTuple):
    """What reading an array twice came to, on a disk that is ever fuller."""

    right: bool
    first: int
    """Requests of the first reading."""
    second: int
    kept: int
    """Bytes of entries afterwards."""


class OnDisk:
    """Arrays of 1 MiB in chunks of 64 KiB, and a cache on a file system of its own."""

    def __init__(self, source: Path, disk: Path, chunks: int = 16) -> None:
        self.source, self.disk, self.cache = source, disk, disk / "cache"
        self.requests = chunks + 1
        self.counting = counted(source)
        self.store = xzcache.CacheStore(self.counting, cache_store=self.cache, revalidate=False, max_size="1 TB")

    def step(self, name: str) -> Step:
        expected = contents(self.source, name)
        found = passes(self.store, self.counting, name)
        kept = sum(path.stat().st_size for path in entry_files(self.cache) if META not in path.parts)
        return Step(all(p.values == expected for p in found), found[0].requests, found[1].requests, kept)


def make_large_source(path: Path, names: str) -> None:
    make_source(path, names, chunks=16, size=64 * KIB)


def fill_beyond_the_disk(source: Path, disk: Path) -> list[Step]:
    here = OnDisk(source, disk)
    return [here.step(name) for name in "abcdea"]


def mounts(kind: str) -> Callable[[Path], None]:
    return {
        "tmpfs": lambda at: mount_memory(at, "size=3m"),
        "ext4": lambda at: mount_disk(at, 5 * MIB),
    }[kind]


def on(kind: str, scenario: Callable[..., Any], source: Path, disk: Path) -> Any:
    """Act out a scenario on a small disk, in a process that has it to itself."""
    mounts(kind)(disk)
    return scenario(source, disk)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_bound_larger_than_the_disk(tmp_path: Path, kind: str) -> None:
    """The disk is the bound then: the oldest entries leave, and the latest are kept."""
    make_large_source(tmp_path / "source", "abcde")
    steps = in_process(on, kind, fill_beyond_the_disk, tmp_path / "source", tmp_path / "disk")
    assert all(step.right for step in steps)
    assert steps[0].second == 0
    assert max(step.kept for step in steps) < 5 * MIB
    assert steps[5].first == 17, "`a` had left for the others"
    assert [step.second for step in steps[3:]] == [0, 0, 0], "what was read last is there"


def fill_by_others(source: Path, disk: Path) -> tuple[list[Step], list[str]]:
    """Somebody else takes all that is left of the disk, and gives it back."""
    with logged() as records:
        here = OnDisk(source, disk)
        steps = [here.step("a")]
        ballast = fill_up(disk)
        steps += [here.step("b"), here.step("a"), here.step("c")]
        assert here.store.cache_info()["cache_directory"] == str(here.cache)
        ballast.unlink()
        steps += [here.step("b"), here.step("b")]
        audit(here.cache)
    return steps, messages(records)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_filled_by_others(tmp_path: Path, kind: str) -> None:
    make_large_source(tmp_path / "source", "abc")
    steps, logs = in_process(on, kind, fill_by_others, tmp_path / "source", tmp_path / "disk")
    assert all(step.right for step in steps)
    assert [(step.first, step.second) for step in (steps[0], steps[-1])] == [(17, 0), (0, 0)]
    assert len(logs) <= 1


def start_on_a_full_disk(source: Path, disk: Path) -> list[Step]:
    ballast = fill_up(disk)
    here = OnDisk(source, disk)
    steps = [here.step("a")]
    ballast.unlink()
    return [*steps, here.step("a"), here.step("a")]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, kind: str) -> None:
    make_large_source(tmp_path / "source", "a")
    steps = in_process(on, kind, start_on_a_full_disk, tmp_path / "source", tmp_path / "disk")
    assert all(step.right for step in steps)
    assert steps[-1][1:3] == (0, 0)


def in_a_fork(function: Callable[..., T], *args: Any) -> T:
    """What a function returns in another process that sees the same file systems, and ends without any cleaning up."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with open(writing, "wb") as file:
                pickle.dump(function(*args), file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    result: T = pickle.loads(data)
    return result


def read_fresh(source: Path, cache: Path) -> tuple[bytes | None, bytes | None]:
    store = xzcache.CacheStore(LocalStore(source), cache_store=cache, revalidate=False)
    return sync(get(store, "a/c/0")), sync(get(store, "b/c/0"))


def write_on_a_full_disk(source: Path, disk: Path) -> list[object]:
    """Write and delete through the cache while somebody else has all that was left of its disk, and leave."""
    here = OnDisk(source, disk)
    here.step("a")
    here.step("b")
    fill_up(disk)
    writable = xzcache.CacheStore(LocalStore(source), cache_store=here.cache, revalidate=False)
    sync(writable.set("a/c/0", buffer(b"new")))
    sync(writable.delete_dir("b"))
    late = xzcache.CacheStore(LocalStore(source), cache_store=here.cache, revalidate=False)
    return [sync(get(late, "a/c/0")), sync(get(late, "b/c/0"))]


def read_after_writes_on_a_full_disk(kind: str, source: Path, disk: Path) -> list[object]:
    mounts(kind)(disk)
    before = in_a_fork(read_fresh, source, disk / "cache")
    assert None not in before
    seen = list(in_a_fork(write_on_a_full_disk, source, disk))
    while_full = in_a_fork(read_fresh, source, disk / "cache")
    (disk / "ballast").unlink()
    return [*seen, *while_full, *in_a_fork(read_fresh, source, disk / "cache")]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_writes_on_a_full_disk_are_seen_by_all(tmp_path: Path, kind: str) -> None:
    make_large_source(tmp_path / "source", "ab")
    seen = in_process(read_after_writes_on_a_full_disk, kind, tmp_path / "source", tmp_path / "disk")
    assert seen == [b"new", None] * 3


def clear_on_a_full_disk(kind: str, source: Path, disk: Path) -> tuple[int, int, int]:
    mounts(kind)(disk)
    here = OnDisk(source, disk)
    here.step("a")
    fill_up(disk)
    sync(here.store.clear_cache())
    info = here.store.cache_info()
    return info["current_size"], info["total_size"], len([p for p in entry_files(here.cache) if META not in p.parts])


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_clearing_makes_room_on_a_full_disk(tmp_path: Path, kind: str) -> None:
    make_large_source(tmp_path / "source", "a")
    assert in_process(clear_on_a_full_disk, kind, tmp_path / "source", tmp_path / "disk") == (0, 0, 0)


def run_out_of_inodes(source: Path, disk: Path) -> tuple[list[Step], int]:
    mount_memory(disk, "size=16m,nr_inodes=120")
    here = OnDisk(source, disk)
    steps = [here.step("a")]
    ballast = disk / "ballast"
    ballast.mkdir()
    with suppress(OSError):
        for number in range(1000):
            (ballast / str(number)).touch()
    left = os.statvfs(disk).f_ffree
    steps += [here.step("b"), here.step("c"), here.step("a")]
    shutil.rmtree(ballast)
    return [*steps, here.step("b"), here.step("b")], left


def test_no_inodes_left(tmp_path: Path) -> None:
    make_large_source(tmp_path / "source", "abc")
    steps, left = in_process(run_out_of_inodes, tmp_path / "source", tmp_path / "disk")
    assert left == 0
    assert all(step.right for step in steps)
    assert (steps[0].first, steps[0].second) == (17, 0)
    assert (steps[-1].first, steps[-1].second) == (0, 0)


def test_more_to_be_left_free_than_there_is(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting = counted(source)
    with xzcache.config.set(min_free=1 << 62):
        store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
        found = passes(store, counting, "ab")
    assert [p.values for p in found] == [contents(source, name) for name in "abab"]
    assert [p.requests for p in found] == [5, 5, 5, 5]
    assert entry_files(cache) == []
    # that is what was asked for, not trouble; but whoever did not know of it is told, once
    assert found[-1].errors == 0
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("xzcache")]
    assert "min_free=4612 PB asks" in told


async def test_locked_local_store_says_that_there_is_no_room(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache", min_free=1 << 62)
    with pytest.raises(OSError, match=r"cache|min_free") as caught:
        await store.set("a", buffer(b"1"))
    assert caught.value.errno == errno.ENOSPC
    assert await get(store, "a") is None


# -- a disk that cannot be written


def read_on_a_read_only_disk(source: Path, cache: Path) -> tuple[list[Pass], list[str]]:
    make_read_only(cache)
    with logged() as records:
        found = read_anew(str(source), str(cache), "ab")
        assert bound_of(str(source), str(cache)) in (None, BOUND)
    return found, messages(records)


def read_on_a_disk_that_breaks(source: Path, disk: Path) -> tuple[list[Pass], list[str]]:
    mount_disk(disk, 16 * MIB)
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=disk / "cache", revalidate=False, max_size=BOUND)
    passes(store, counting, "a")
    break_disk(disk)
    with logged() as records:
        found = passes(store, counting, "ab")
        store.cache_info()
    return found, messages(records)


@pytest.mark.parametrize("when", ["always", "suddenly"])
def test_a_read_only_disk(source: Path, tmp_path: Path, when: str) -> None:
    if when == "always":
        cache = tmp_path / "cache"
        in_process(read_anew, str(source), str(cache), "a")
        found, logs = in_process(read_on_a_read_only_disk, source, cache)
    else:
        found, logs = in_process(read_on_a_disk_that_breaks, source, tmp_path / "disk")
    assert [p.values for p in found] == [contents(source, name) for name in "abab"]
    assert [p.requests for p in found] == [0, 5, 0, 5], "what is there is served, more is not stored"
    assert found[-1].errors > 0
    # once for each way in which it shows, however many chunks there are
    assert 1 <= len(logs) <= 4, logs


NOBODY = 65534


@contextmanager
def directory_of(uid: int) -> Iterator[Path]:
    """A directory that another user can reach, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="xzcache-test-"))
    try:
        os.chown(path, uid, uid)
        yield path
    finally:
        shutil.rmtree(path)


def read_without_permission(source: Path, cache: Path, uid: int) -> tuple[Any, list[str]]:
    # whatever is imported late is imported by this
    passes(xzcache.CacheStore(counted(source), cache_store=MemoryStore()), counted(source), "a")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for here, _, _ in os.walk(cache, topdown=False):
        os.chmod(here, 0o500)
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
    try:
        with logged() as records:
            found = passes(store, counting, "ab")
    finally:
        for here, _, _ in os.walk(cache):
            os.chmod(here, 0o700)
    return found, messages(records)


def test_a_directory_without_write_permission() -> None:
    uid = NOBODY if os.geteuid() == 0 else os.geteuid()
    with directory_of(uid) as here:
        source, cache = here / "source", here / "cache"
        make_source(source)
        in_process(read_anew, str(source), str(cache), "a")
        for top, directories, names in os.walk(here):
            for name in [*directories, *names]:
                os.chown(os.path.join(top, name), uid, uid)
        found, logs = in_process(read_without_permission, source, cache, uid)
        assert [p.values for p in found] == [contents(source, name) for name in "abab"]
    assert [p.requests for p in found] == [0, 5, 0, 5]
    assert found[-1].errors > 0
    assert len(logs) == 1, logs


# -- too many open files


class Limited(NamedTuple):
    right: bool
    descriptors: list[int]
    """How many were open: before, and after each reading."""
    later: int
    """Requests of the last reading, with enough of them again."""
    logs: list[str]


def read_with_few_descriptors(source: Path, cache: Path, spare: int, joined: bool) -> Limited:
    memory = MemoryStore()
    for path in source.rglob("*"):
        if path.is_file():
            memory._store_dict[path.relative_to(source).as_posix()] = buffer(path.read_bytes())
    counting = CountingStore(memory)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
    other = xzcache.CacheStore(counting, cache_store=MemoryStore(), namespace="other")
    expected = read(other, "a")
    if joined:
        passes(store, counting, "a")
    before = len(os.listdir("/proc/self/fd")) - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name) for name in os.listdir("/proc/self/fd"))
    right, descriptors = True, [before]
    with logged() as records:
        for _ in range(4):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, top) + spare, hard))
            right &= read(store, "a") == expected
            right &= read(store, "b") == read(other, "b")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            descriptors.append(len(os.listdir("/proc/self/fd")) - 1)
    later = passes(store, counting, "ab", 3)[-1].requests
    return Limited(right, descriptors, later, messages(records))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
@pytest.mark.parametrize("joined", [False, True], ids=["at the start", "later"])
@pytest.mark.parametrize("spare", [0, 3, 12])
def test_too_many_open_files(source: Path, cache: Path, spare: int, joined: bool) -> None:
    found = in_process(read_with_few_descriptors, source, cache, spare, joined)
    assert found.right
    assert max(found.descriptors[1:]) - found.descriptors[1] <= 1, "each failure leaves some open"
    assert found.descriptors[1] - found.descriptors[0] <= 25
    assert found.later == 0
    assert len(found.logs) == len(set(found.logs))


# -- each step fails

ERRNOS = [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.ESTALE, errno.EROFS]
OS_CALLS = [
    "open",
    "fstat",
    "pread",
    "preadv",
    "read",
    "write",
    "pwrite",
    "replace",
    "unlink",
    "rmdir",
    "stat",
    "lstat",
]
OS_CALLS += ["makedirs", "mkdir", "listdir", "scandir", "statvfs", "getxattr", "setxattr"]
CALLS = [*OS_CALLS, "flock", "fcntl"]
SAYS_HELD = ("fcntl", errno.EACCES)
"""With which some systems say that somebody else has the lock."""
FELT = {"open", "pread", "replace", "flock", "fstat", "write"}
"""What cannot fail unnoticed when entries are read and stored."""


def _failures() -> Iterator[Any]:
    """Each call with each errno; those that may fail unnoticed with two, in turns, unless there is time for all."""
    for number, call in enumerate(CALLS):
        for at, code in enumerate(ERRNOS):
            marks = [] if call in FELT or (number + at) % 3 == 0 else [pytest.mark.soak]
            if code in (errno.ESTALE, errno.EROFS):
                # taken for the same as an error of the disk, and as one of permission
                marks.append(pytest.mark.slow)
            yield pytest.param(call, code, id=f"{call}-{errno.errorcode[code]}", marks=marks)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("call", "code"), list(_failures()))
def test_a_call_that_always_fails(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    counting = counted(source)
    expected = [contents(source, name) for name in "ab"]
    filled = xzcache.CacheStore(counting, cache_store=tmp_path / "filled", revalidate=False, max_size=BOUND)
    passes(filled, counting, "a")
    fresh = xzcache.CacheStore(counting, cache_store=tmp_path / "fresh", revalidate=False, max_size=BOUND)
    faults = Faults(lambda: OSError(code, os.strerror(code)))
    caplog.clear()
    with monkeypatch.context() as patch:
        inject(patch, [os, fcntl], {call}, faults)
        for store in (filled, fresh):
            found = passes(store, counting, "ab")
            assert [p.values for p in found] == expected * 2
            if call in FELT and code != errno.ENOSPC:
                assert found[-1].errors > 0
            if store is filled and call in ("write", "replace") and code == errno.ENOSPC:
                assert found[-1].errors == 0, "a full disk is no fault"
    told = kinds([r for r in caplog.records if r.name.startswith("xzcache")])
    assert len(told) == len(set(told)), "once a kind, not once a chunk"
    if call in FELT:
        assert faults.fired
    # when it works again, so does the cache: at once, or after the next probe of a disk that was put aside
    for store in (filled, fresh):
        until(lambda store=store: not passes(store, counting, "ab")[-1].requests)
        found = passes(store, counting, "ab", 3)
        assert [p.values for p in found] == expected * 3
        assert [p.requests for p in found[-2:]] == [0, 0]
    audit(tmp_path / "filled", settled=False)
    audit(tmp_path / "fresh", settled=False)


def fill_twice(source: CountingStore, cache: Path, expected: bytes) -> None:
    """A cold and a warm reading, and a reading of an entry that was damaged."""
    store = xzcache.CacheStore(source, cache_store=cache, revalidate=False, max_size=BOUND)
    for _ in range(2):
        assert read(store, "a") == expected
    for path in entry_files(cache):
        path.write_bytes(b"damaged")
    assert read(store, "a") == expected


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("code", "step"), [(errno.EIO, 1), (errno.ENOSPC, 3)], ids=["EIO", "ENOSPC"])
@pytest.mark.slow
@sweep(5)
def test_each_call_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: int, every: int
) -> None:
    make_source(tmp_path / "source", "a", chunks=1)
    expected = contents(tmp_path / "source", "a")
    number = 0
    while True:
        faults = Faults(lambda: OSError(code, os.strerror(code)), only=number)
        counting, cache = counted(tmp_path / "source"), tmp_path / f"cache-{number}"
        with monkeypatch.context() as patch:
            inject(patch, [os, fcntl], CALLS, faults)
            fill_twice(counting, cache, expected)
        if not faults.fired:
            break
        store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
        found = passes(store, counting, "a", 3)
        assert [p.values for p in found] == [expected] * 3, faults.where
        assert found[-1].requests == 0, faults.where
        audit(cache, settled=False)
        leave(cache)
        number += step * every
    assert number > 100


SQL = {
    "SQLITE_FULL": sqlite3.OperationalError,
    "SQLITE_IOERR_SHMSIZE": sqlite3.OperationalError,
    "SQLITE_IOERR_WRITE": sqlite3.OperationalError,
    "SQLITE_BUSY": sqlite3.OperationalError,
    "SQLITE_READONLY": sqlite3.OperationalError,
    "SQLITE_CORRUPT": sqlite3.DatabaseError,
    "SQLITE_NOTADB": sqlite3.DatabaseError,
}


def sql_error(name: str) -> BaseException:
    error = SQL[name]("injected")
    error.sqlite_errorname = name  # type: ignore[attr-defined]
    return error


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("name", SQL)
def test_an_index_that_always_fails(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    counting = counted(source)
    faults = Faults(lambda: sql_error(name))
    faults.active = False
    inject_sql(monkeypatch, faults)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False, max_size=BOUND)
    passes(store, counting, "a")
    faults.active = True
    found = passes(store, counting, "ab")
    assert [p.values for p in found] == [contents(source, name) for name in "abab"]
    assert [p.requests for p in found] == [0, 5, 0, 5]
    assert faults.fired
    assert len(caplog.records) <= 3
    faults.active = False
    # ten errors of the disk within a moment put the cache aside, until a probe succeeds: a second or two
    until(lambda: [p.requests for p in passes(store, counting, "ab", 1)] == [0, 0])
    audit(cache, settled=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("name", "step"), [("SQLITE_FULL", 1), ("SQLITE_CORRUPT", 2)], ids=["FULL", "CORRUPT"])
@sweep(5)
def test_each_statement_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int, every: int
) -> None:
    make_source(tmp_path / "source", "a", chunks=1)
    expected = contents(tmp_path / "source", "a")
    number = 0
    while True:
        faults = Faults(lambda: sql_error(name), only=number)
        counting, cache = counted(tmp_path / "source"), tmp_path / f"cache-{number}"
        with monkeypatch.context() as patch:
            inject_sql(patch, faults)
            fill_twice(counting, cache, expected)
            if not faults.fired:
                break
            faults.active = False
            store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
            found = passes(store, counting, "a", 3)
            assert [p.values for p in found] == [expected] * 3, faults.where
            assert found[-1].requests == 0, faults.where
            audit(cache, settled=False)
            leave(cache)
        number += step * every
    assert number > 50


@pytest.mark.parametrize("call", ["open", "replace", "flock", "unlink", "write"])
def test_a_write_while_the_cache_fails(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Nobody reads the old value after a write, whatever the cache could do about it."""
    counting = CountingStore(LocalStore(source))
    store = xzcache.CacheStore(counting, cache_store=tmp_path / "cache", max_size=BOUND)
    array = zarr.open_array(store, path="a", mode="r+")
    for value in range(3):
        assert array[:].shape == (64,)
        with monkeypatch.context() as patch:
            inject(patch, [os, fcntl], {call}, Faults(lambda: OSError(errno.EIO, "injected")))
            array[:] = value
            assert set(array[:].tolist()) == {value}
        assert set(array[:].tolist()) == {value}


def test_an_error_of_the_source_is_the_sources_own(source: Path, cache: Path) -> None:
    """It is not counted as the cache's, and not hidden by it."""
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False)
    counting.errors["get"] = OSError(errno.EIO, "the network is down")
    with pytest.raises(OSError, match="the network is down"):
        read(store, "a")
    assert store.cache_stats()["cache_errors"] == 0


# -- locks that are never let go of


@contextmanager
def held(path: Path, operation: int) -> Iterator[None]:
    """A lock that somebody else has: a stopped process, or one of another machine."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, operation)
        yield
    finally:
        os.close(fd)


async def times_of(store: xzcache.CacheStore, keys: list[str]) -> list[float]:
    found = []
    for key in keys:
        started = time.monotonic()
        assert await get(store, key) == key.encode()
        found.append(time.monotonic() - started)
    return found


@pytest.mark.parametrize("lock", ["lock", "writes"])
async def test_a_lock_that_is_held_for_ever(tmp_path: Path, lock: str) -> None:
    counting = memory_source()
    keys = [f"c/{i}" for i in range(7)]
    for key in keys:
        await counting.set(key, buffer(key.encode()))
    with xzcache.config.set(lock_timeout=1.0):
        store = xzcache.CacheStore(counting, cache_store=tmp_path / "cache")
    await times_of(store, keys[:1])
    assert store.cache_info()["cached_keys"] == 1
    counting.forget()
    with held(tmp_path / "cache" / META / lock, fcntl.LOCK_EX):
        first, *others = await times_of(store, keys[1:])
        # a second, and as long as a busy machine takes
        assert first < 10
        assert sum(others) < 3, "only the first waits"
        assert await get(store, keys[0]) == keys[0].encode()
        assert counting.reads == 6, "hits need no lock"
        assert store.cache_stats()["cache_errors"] > 0
    # the guard is not asked again for a while
    deadline = time.monotonic() + 60
    while counting.reads and time.monotonic() < deadline:
        counting.forget()
        await times_of(store, keys)
    assert counting.reads == 0
    audit(tmp_path / "cache")


async def test_a_rebuild_that_a_stopped_writer_keeps_away(tmp_path: Path) -> None:
    counting = memory_source()
    keys = [f"c/{i}" for i in range(7)]
    for key in keys:
        await counting.set(key, buffer(key.encode()))
    with xzcache.config.set(lock_timeout=1.0):
        store = xzcache.CacheStore(counting, cache_store=tmp_path / "cache")
    await times_of(store, keys[:1])
    with held(tmp_path / "cache" / META / "writes", fcntl.LOCK_SH):
        os.truncate(tmp_path / "cache" / META / "lock", 0)
        first, *others = await times_of(store, keys[1:])
        # a second, and as long as a busy machine takes
        assert first < 10
        assert sum(others) < 3, "only the first waits"


# -- the end of the process

AT_EXIT = """
import asyncio, atexit, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore
import xzcache

async def use(store, keys):
    for key in keys:
        value = await store.get(key, default_buffer_prototype())
        assert value.to_bytes() == b"value" * 1000, key

source = MemoryStore({f"k{i}": cpu.Buffer.from_bytes(b"value" * 1000) for i in range(8)})
store = xzcache.CacheStore(source, cache_store=sys.argv[1], namespace="here")
asyncio.run(use(store, ["k0", "k1"]))

@atexit.register
def last_words():
    asyncio.run(use(store, [f"k{i}" for i in range(8)] * 2))
    print("hits", store.cache_stats()["hits"], "errors", store.cache_stats()["cache_errors"])
"""


def test_reads_at_the_end_of_the_process(cache: Path) -> None:
    """When the threads are gone, and maybe the directory is closed."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT, str(cache)], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.split() == ["hits", "10", "errors", "0"]
    # signed off: no lease is left behind
    books = xzcache.LockedLocalStore(cache).directory.session
    with books.section() as (_, index):
        assert len(index.owners()) == 1
        assert index.totals()[:4] == (8, 8 * 5000, 0, 0)


# -- paths that can be no cache


def refused(cache: object, *, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        xzcache.CacheStore(MemoryStore(), cache_store=cache)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"cache_store={str(cache)!r} ")
    assert "\n" not in text
    assert re.search(r": give .*director", text), "what is accepted is said"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_no_cache(tmp_path: Path, kind: type) -> None:
    file = tmp_path / "file"
    file.write_text("the user's own")
    refused(kind(file), reason="is a file")
    refused(kind(file / "cache"), reason="beneath a file")
    refused(kind(file / "deep" / "cache"), reason="beneath a file")
    assert file.read_text() == "the user's own"


def test_a_path_that_no_file_system_takes() -> None:
    with pytest.raises(ValueError, match="cache_store="):
        xzcache.CacheStore(MemoryStore(), cache_store="/with\0nul")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_path_that_cannot_be_made(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can tell before it is tried, so it is no mistake but trouble."""
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store="/proc/xzcache", revalidate=False)
    found = passes(store, counting, "ab")
    assert [p.values for p in found] == [contents(source, name) for name in "abab"]
    assert found[-1].errors > 0
    assert len(caplog.records) == 1
    assert "/proc/xzcache" in caplog.text


def test_a_dangling_link(source: Path, tmp_path: Path) -> None:
    """A link to a directory that is not there yet is a path like any other."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=tmp_path / "link", revalidate=False)
    found = passes(store, counting, "a")
    assert [p.requests for p in found] == [5, 0]
    assert (tmp_path / "elsewhere" / META).is_dir()
