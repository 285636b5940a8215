"""What the tests of damage and faults share: arrays, new processes, an audit, small file systems, injected faults."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import zarr
from sources import CountingStore, read_now
from zarr.storage import LocalStore

import xzcache
from xzcache import files
from xzcache.directory import _registry
from xzcache.files._paths import relative_path
from xzcache.model.entry import META

T = TypeVar("T")

BOUND = 1_000_000


# -- arrays


def counted(source: Path | str) -> CountingStore:
    """A directory that counts its reads: the same source in every process."""
    return CountingStore(LocalStore(source, read_only=True))


def make_source(path: Path, names: Sequence[str] = ("a", "b"), *, chunks: int = 4, size: int = 64) -> None:
    """Arrays whose chunks are stored as they are, so that nothing but the cache checks them; sizes in bytes."""
    for number, name in enumerate(names):
        array = zarr.create_array(
            LocalStore(path), name=name, shape=chunks * size // 4, chunks=size // 4, dtype="i4", compressors=None
        )
        array[:] = np.random.default_rng(number).integers(0, 1 << 30, array.shape, dtype="i4")


def contents(path: Path, name: str) -> bytes:
    """The values of an array, as the source has them."""
    return read(LocalStore(path, read_only=True), name)


def read(store: Any, name: str) -> bytes:
    """The values of an array, read through a store."""
    array = zarr.open_array(store, path=name, mode="r", zarr_format=3)
    return np.asarray(array[:]).tobytes()


class Pass(NamedTuple):
    """What one reading of an array came to."""

    values: bytes
    requests: int
    errors: int
    """Troubles of the cache that were counted so far."""


def passes(store: Any, source: CountingStore, names: Sequence[str], times: int = 2) -> list[Pass]:
    """Read arrays several times over."""
    found = []
    for _ in range(times):
        for name in names:
            source.forget()
            values = read(store, name)
            found.append(Pass(values, source.reads, store.cache_stats()["cache_errors"]))
    return found


def read_anew(source: str, cache: str, names: Sequence[str], times: int = 2, **settings: Any) -> list[Pass]:
    """As `passes`, with stores of its own: what a new process does."""
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False, **settings)
    return passes(store, counting, names, times)


def parts(store: Any, source: CountingStore, part: Any, times: int = 3) -> list[tuple[bytes | None, int]]:
    """Read part of the first chunk of `a` several times over: its bytes, and how many requests that took."""
    found = []
    for _ in range(times):
        source.forget()
        found.append((read_now(store, "a/c/0", part), source.reads))
    return found


def parts_anew(source: str, cache: str, part: Any, times: int = 3) -> list[tuple[bytes | None, int]]:
    """As `parts`, with a store of its own."""
    counting = counted(source)
    return parts(xzcache.CacheStore(counting, cache_store=cache, revalidate=False), counting, part, times)


def bound_of(source: str, cache: str) -> int | None:
    """The bound that a directory has, to one who does not ask for any."""
    return xzcache.CacheStore(counted(source), cache_store=cache).max_size


# -- the cache directory


def entry_files(cache: Path) -> list[Path]:
    """The files that bear our stamp, wherever they lie."""
    found = []
    for directory, _, names in os.walk(cache):
        paths = (Path(directory, name) for name in names)
        found += [path for path in paths if files.read_stamp(str(path)) is not None and not path.is_symlink()]
    return sorted(found)


def audit(cache: Path, *, settled: bool = True) -> None:
    """The index speaks of the entry files that there are, of no others, and adds them up right.

    Where something failed, files may be left that the next process removes: they are counted.
    """
    directory = xzcache.LockedLocalStore(cache).directory
    assert directory.prepare()
    with directory.session.section() as (_, index):
        rows = {cache / relative_path(row.entry, hashed=row.hashed): row.size for row in index.rows()}
        totals = index.totals()
    found = {path: path.stat().st_size for path in entry_files(cache)}
    passing = cache / META / "tmp", cache / META / "trash"
    left = {path: size for path, size in found.items() if any(path.is_relative_to(place) for place in passing)}
    assert rows == {path: size for path, size in found.items() if path not in left}
    assert (totals.entries, totals.size) == (len(rows), sum(rows.values()))
    assert sum(left.values()) <= totals.tombstones + totals.lease
    if settled:
        assert left == {}
        assert totals.tombstones == 0


def leave(cache: Path) -> None:
    """Let go of a cache directory and its open files, as if this process had never used it."""
    directory = _registry._directories.pop(os.path.realpath(cache), None)
    if directory is not None:
        directory.close()


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """The names, modes and contents of everything beneath a directory."""
    found = {}
    for here, directories, names in os.walk(directory):
        for name in directories + names:
            path = Path(here, name)
            status = path.lstat()
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path.relative_to(directory))] = (status.st_mode, data)
    return found


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the package logs meanwhile, in this process."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("xzcache")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


# -- processes


class Unsupported(Exception):
    """This machine cannot do what the test needs."""


class Process:
    """A function at work in a new process, which has imported the package and used nothing of it."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "zarr", "xzcache", "damage"])
        self.channel, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function, args, kwargs), daemon=True)
        self._process.start()
        theirs.close()

    def result(self, timeout: float = 60) -> Any:
        """What the function returns; the test is skipped where it says `Unsupported`."""
        try:
            if not self.channel.poll(timeout):
                raise TimeoutError(f"no answer within {timeout} s")
            kind, result = self.channel.recv()
        except EOFError:
            self._process.join(10)
            raise AssertionError(f"the process ended with {self._process.exitcode}") from None
        finally:
            self.stop()
        if kind == "unsupported":
            pytest.skip(result)
        assert kind == "done", result
        return result

    def stop(self) -> None:
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.channel.close()


def _work(channel: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    try:
        if "channel" in function.__annotations__:
            kwargs["channel"] = channel
        answer = ("done", function(*args, **kwargs))
    except Unsupported as reason:
        answer = ("unsupported", str(reason))
    except BaseException:
        answer = ("failed", traceback.format_exc())
    channel.send(answer)


def in_process(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What a function returns in a new process."""
    result: T = Process(function, *args, **kwargs).result()
    return result


def read_until_told(source: str, cache: str, name: str, channel: Connection) -> tuple[int, set[bytes]]:
    """Read an array over and over until a word comes; how often, and all that was ever read."""
    store = xzcache.CacheStore(counted(source), cache_store=cache, revalidate=False)
    seen, count = {read(store, name)}, 1
    channel.send(("reading", None))
    while not channel.poll():
        seen.add(read(store, name))
        count += 1
    return count, seen


# -- small file systems, seen by one process only

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 0x1000, 0x4000, 0x40000


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise Unsupported(f"{name} is refused here: {os.strerror(code)}")


def enter_private_mounts() -> None:
    """Let this process mount what no other one sees, and what goes when it ends.

    To be called first of all: threads that run already stay outside.
    """
    if sys.platform != "linux":
        raise Unsupported("mounts of one process's own are Linux's")
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEWNS)
    except Unsupported:
        _call("unshare", _NEWNS | _NEWUSER)
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        except OSError as error:
            raise Unsupported(f"a user namespace cannot be set up here: {error}") from None
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)


def mount_kind(kind: str, at: Path, options: str = "") -> None:
    """A new file system that is none of a disk's."""
    enter_private_mounts()
    at.mkdir(exist_ok=True)
    _call("mount", kind.encode(), os.fsencode(at), kind.encode(), 0, f"mode=0700,{options}".encode())


def mount_memory(at: Path, options: str) -> None:
    """A file system in memory, of a certain size."""
    mount_kind("tmpfs", at, options)


def mount_disk(at: Path, size: int) -> None:
    """An ext4 file system in a file."""
    enter_private_mounts()
    at.mkdir(exist_ok=True)
    image = at.with_suffix(".image")
    with open(image, "wb") as file:
        file.truncate(size)
    for command in (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop,errors=remount-ro", str(image), str(at)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Unsupported(f"there is no {command[0]} here") from None
        if done.returncode:
            raise Unsupported(f"{command[0]} is refused here: {done.stderr.strip()}")


def make_read_only(at: Path) -> None:
    """Let nothing be written any more beneath a directory; of its files none may be open."""
    enter_private_mounts()
    path = os.fsencode(at)
    _call("mount", path, path, None, _BIND, None)
    kept = os.statvfs(at).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)
    _call("mount", path, path, None, _BIND | _REMOUNT | _RDONLY | kept, None)


def break_disk(at: Path) -> None:
    """Make the kernel find an error in an ext4 file system, which it lets nobody write to from then on."""
    device = os.stat(at).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    try:
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("1")
    except OSError as error:
        raise Unsupported(f"a disk cannot be broken on purpose here: {error}") from None
    try:
        (at / "probe").touch()
    except OSError:
        return
    raise Unsupported("a broken disk can be written to all the same here")


def fill_up(directory: Path, name: str = "ballast") -> Path:
    """Write until not one byte more fits."""
    path = directory / name
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\1" * size) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


# -- faults in the calls of the package, and of nobody else


class Faults:
    """Decides which calls fail: all, or only the one of a given number; and remembers how many there were."""

    def __init__(self, error: Callable[[], BaseException], only: int | None = None) -> None:
        self._error = error
        self._only = only
        self.calls = 0
        self.active = True
        self.where = ""

    @property
    def fired(self) -> bool:
        return self.calls > (self._only or 0)

    def check(self, call: str) -> None:
        if self.active:
            self.calls += 1
            if self._only in (None, self.calls - 1):
                self.where = f"call {self.calls - 1}: {call}"
                raise self._error()


class _Faulty:
    """Stands for a module of the standard library; some of its functions fail."""

    def __init__(self, module: Any, names: Collection[str], faults: Faults) -> None:
        self._module, self._names, self._faults = module, names, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name not in self._names:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            # letting go of a lock is the one thing that cannot fail
            if name != "flock" or args[1] != fcntl.LOCK_UN:
                self._faults.check(f"{name}{args}")
            return value(*args, **kwargs)

        return call


def inject(monkeypatch: pytest.MonkeyPatch, modules: Sequence[Any], names: Collection[str], faults: Faults) -> None:
    """Make functions of some modules fail for the package."""
    for name, ours in list(sys.modules.items()):
        for module in modules:
            if name.startswith("xzcache.") and getattr(ours, module.__name__, None) is module:
                monkeypatch.setattr(ours, module.__name__, _Faulty(module, names, faults))


def inject_sql(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """Make statements on the index fail."""

    class Connection(sqlite3.Connection):
        def execute(self, *args: Any) -> Any:
            faults.check(str(args))
            return super().execute(*args)

        def executemany(self, *args: Any) -> Any:
            faults.check(str(args))
            return super().executemany(*args)

        def executescript(self, *args: Any) -> Any:
            faults.check(str(args))
            return super().executescript(*args)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs, factory=Connection))
