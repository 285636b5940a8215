"""What other programs, older versions and the system do to the index, the locks and the descriptors of a directory."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from processes import Team, audit, barrier, run_program, until, visit
from sources import buffer, neighbours
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

import xzcache

META = ".xzcache"
PROTOTYPE = default_buffer_prototype()
SIZE = 1000
linux = pytest.mark.skipif(sys.platform != "linux", reason="descriptors and locks are looked at as Linux shows them")


def descriptors(root: Path) -> list[str]:
    """What this process has open beneath a directory."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if path.startswith(os.path.realpath(root) + "/"):
            found.append(path)
    return found


async def get(store: Store, key: str) -> bytes | None:
    found = await store.get(key, PROTOTYPE)
    return None if found is None else found.to_bytes()


def value(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


def make_source(path: Path, count: int) -> LocalStore:
    folder = path / "source" / "a" / "c"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / str(number)).write_bytes(value(number))
    return LocalStore(path / "source", read_only=True)


def opened(path: Path, **options: Any) -> xzcache.CacheStore:
    options = {"cache_store": path / "cache", "namespace": "source", "revalidate": False, **options}
    return xzcache.CacheStore(LocalStore(path / "source", read_only=True), **options)


def read_all(store: xzcache.CacheStore, count: int, first: int = 0) -> None:
    async def reading() -> None:
        for number in range(first, count):
            assert await get(store, f"a/c/{number}") == value(number)

    asyncio.run(reading())


def is_cached(store: xzcache.CacheStore, count: int) -> bool:
    """Whether all keys are cached once they were read."""
    read_all(store, count)
    return bool(store.cache_info()["cached_keys"] == count)


def index_of(path: Path) -> Path:
    (found,) = (path / "cache" / META).glob("index-*.db")
    return found


HEAD = """
    import asyncio, os, sys, zarr, xzcache
    from zarr.core.buffer import default_buffer_prototype
    path = sys.argv[1]
    def open_store(**options):
        return xzcache.CacheStore(
            zarr.storage.LocalStore(path + "/source", read_only=True), cache_store=path + "/cache",
            namespace="source", revalidate=False, **options)
    store = open_store()
    async def read(first, last):
        for number in range(first, last):
            got = await store.get(f"a/c/{number}", default_buffer_prototype())
            assert got.to_bytes() == bytes([number % 251]) * 1000, number
"""


def program(text: str) -> str:
    """A program that knows `path` and `store`, with a source of 400 keys, and `read`."""
    return textwrap.dedent(HEAD) + textwrap.dedent(text)


def ran(path: Path, text: str, *arguments: object) -> tuple[str, str]:
    """A process that has run a program to its end; what it wrote."""
    return run_program(program(text), path, *arguments)


def script(path: Path, text: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """An interpreter of its own that runs a program."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", program(text), str(path), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (process.returncode, err)
    return out, err


# -- descriptors


@linux
@pytest.mark.parametrize("count", [1, 10, 100])
def test_four_descriptors_for_a_directory_in_use_and_none_for_others(tmp_path: Path, count: int) -> None:
    make_source(tmp_path, 3)
    stores = [opened(tmp_path, cache_store=tmp_path / "caches" / str(number)) for number in range(count)]
    for store in stores:
        read_all(store, 3)
    assert store.cache_info()["cached_keys"] == 3
    assert len(descriptors(tmp_path / "caches")) <= 4 * count
    # closed, or collected
    for store in stores[::2]:
        store.close()
    last = stores[-1]
    del stores, store
    gc.collect()
    last.close()
    assert until(lambda: descriptors(tmp_path / "caches") == []), descriptors(tmp_path / "caches")
    # and one that is closed can be used again
    read_all(last, 3)
    assert last.cache_info()["cached_keys"] == 3
    del last
    gc.collect()
    assert until(lambda: descriptors(tmp_path / "caches") == [])
    for number in range(count):
        audit(str(tmp_path / "caches" / str(number)))


@linux
def test_a_local_store_and_the_engine_let_go(tmp_path: Path) -> None:
    local = xzcache.LockedLocalStore(tmp_path / "cache" / "one")
    local.set_sync("k", buffer(b"v"))
    assert descriptors(tmp_path / "cache")
    local.close()
    assert until(lambda: descriptors(tmp_path / "cache") == [])
    assert asyncio.run(get(local, "k")) == b"v"
    local.set_sync("k", buffer(b"w"))
    del local
    gc.collect()
    assert until(lambda: descriptors(tmp_path / "cache") == [])
    xr.Dataset({"x": ("t", np.arange(10))}).to_zarr(tmp_path / "x.zarr")
    with xzcache.open_zarr(str(tmp_path / "x.zarr"), cache_store=tmp_path / "cache" / "two") as dataset:
        assert dataset["x"].sum() == 45
        assert 0 < len(descriptors(tmp_path / "cache")) <= 4
    del dataset
    gc.collect()
    assert until(lambda: descriptors(tmp_path / "cache") == []), descriptors(tmp_path / "cache")


@linux
def test_two_stores_use_a_directory_until_the_second_is_gone(tmp_path: Path) -> None:
    make_source(tmp_path, 4)
    one, two = opened(tmp_path), opened(tmp_path)
    read_all(one, 2)
    one.close()
    del one
    gc.collect()
    # what is let go of is looked at in the background: another directory shows when that has been done
    other = opened(tmp_path, cache_store=tmp_path / "other")
    read_all(other, 1)
    other.close()
    assert until(lambda: descriptors(tmp_path / "other") == [])
    assert descriptors(tmp_path / "cache")
    read_all(two, 4)
    assert two.cache_info()["cached_keys"] == 4


class Halting(MemoryStore):
    """A source whose writes wait for a word."""

    def __init__(self) -> None:
        super().__init__({"a/c/0": buffer(b"old")})
        self.arrived, self.word = asyncio.Event(), asyncio.Event()

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        self.arrived.set()
        await self.word.wait()
        await super().set(key, value, byte_range)


@linux
def test_a_store_that_is_closed_during_a_write_lets_go_at_its_end(tmp_path: Path) -> None:
    async def main() -> None:
        source = Halting()
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")
        write = asyncio.create_task(store.set("a/c/0", buffer(b"new")))
        await source.arrived.wait()
        store.close()
        await asyncio.to_thread(xzcache.cleanup_resources)
        assert descriptors(tmp_path / "cache")
        source.word.set()
        await write

    asyncio.run(main())
    gc.collect()
    assert until(lambda: descriptors(tmp_path / "cache") == [])
    audit(str(tmp_path / "cache"))


@linux
def test_a_process_that_leaves_leaves_its_pending_invalidations_to_others(tmp_path: Path) -> None:
    with xzcache.config.set({"lock_timeout": 0.1}):
        store = xzcache.CacheStore(MemoryStore({"a/c/0": buffer(b"old")}), cache_store=tmp_path / "cache")
    assert asyncio.run(get(store, "a/c/0")) == b"old"
    guard = os.open(tmp_path / "cache" / META / "lock", os.O_RDWR)
    fcntl.flock(guard, fcntl.LOCK_EX)
    asyncio.run(store.set("a/c/0", buffer(b"new")))
    store.close()
    del store
    gc.collect()
    # nobody lets go of the guard before this process has left without it
    until(lambda: descriptors(tmp_path / "cache") == [str(tmp_path / "cache" / META / "lock")])
    os.close(guard)
    visit(str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache" / META / "tmp") == []
    audit(str(tmp_path / "cache"))


def test_a_write_that_the_end_of_its_loop_cuts_off_keeps_no_program_from_ending(tmp_path: Path) -> None:
    patience = 10.0

    async def main() -> None:
        source = Halting()
        store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")
        write = asyncio.create_task(store.set("a/c/0", buffer(b"new")))
        await source.arrived.wait()
        assert not write.done()

    asyncio.run(main())
    gc.collect()
    began = time.monotonic()
    # nobody can tell whether the source goes on, so this process stays, but it waits for nothing
    xzcache.cleanup_resources(patience)
    assert time.monotonic() - began < patience


@linux
def test_a_directory_that_was_removed_is_not_made_again_to_leave_it(tmp_path: Path) -> None:
    make_source(tmp_path, 2)
    store = opened(tmp_path)
    read_all(store, 2)
    shutil.rmtree(tmp_path / "cache")
    del store
    gc.collect()
    assert until(lambda: descriptors(tmp_path / "cache") == [])
    assert not (tmp_path / "cache").exists()


# -- threads


def ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("xzcache")}


def test_threads_end_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    make_source(tmp_path, 4)
    store = opened(tmp_path)
    read_all(store, 2)
    # distributed's test fixtures wait for five seconds
    assert until(lambda: not ours(), 4.5)
    read_all(store, 4)
    assert store.cache_info()["cached_keys"] == 4


def test_cleanup_resources_leaves_nothing_and_ends_nothing_for_good(tmp_path: Path) -> None:
    make_source(tmp_path, 4)
    store = opened(tmp_path)
    read_all(store, 2)
    xzcache.cleanup_resources()
    assert not ours()
    if sys.platform == "linux":
        assert descriptors(tmp_path) == []
    audit(str(tmp_path / "cache"))
    read_all(store, 4)
    assert store.cache_info()["cached_keys"] == 4
    xzcache.cleanup_resources()
    xzcache.cleanup_resources()


def test_distributed_finds_no_thread_and_no_process_that_leaks(tmp_path: Path) -> None:
    utils_test = pytest.importorskip("distributed.utils_test")
    make_source(tmp_path, 4)
    # Zarr's own thread stays
    zarr.open_group(MemoryStore())
    store = opened(tmp_path)
    # the check ends all children of this process, of whichever test they are
    neighbours.shut_down()
    with utils_test.check_thread_leak(), utils_test.check_process_leak():
        read_all(store, 4)


# -- other programs that use the index


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
connection.execute("SELECT * FROM entry LIMIT 1").fetchall()
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def held(index: Path, statement: str) -> Iterator[Callable[[], None]]:
    """Another program that has a transaction open; what ends that, but not the program."""
    command = [sys.executable, "-c", HOLDER, str(index), statement]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"

    def release() -> None:
        print(file=holder.stdin, flush=True)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "released\n"

    try:
        yield release
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("statement", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE", "BEGIN"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_program_that_has_the_index_locked_is_waited_for_once(tmp_path: Path, statement: str, joined: bool) -> None:
    make_source(tmp_path, 60)
    ran(tmp_path, "asyncio.run(read(0, 2))")
    store = opened(tmp_path)
    if joined:
        read_all(store, 3)
        store.cache_info()
    writer = xzcache.CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", namespace="source")
    with held(index_of(tmp_path), statement) as release:
        began = time.monotonic()
        read_all(store, 40)
        asyncio.run(writer.set("a/c/1", buffer(b"new")))
        assert asyncio.run(get(store, "a/c/1")) == b"new"
        # a quarter of a second for each would be ten seconds
        assert time.monotonic() - began < 8, "each miss waits"
        (tmp_path / "source/a/c/1").write_bytes(value(1))
        release()
        # what was unlinked by hand is stored again
        assert until(lambda: is_cached(store, 60), 30)
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


def test_totals_that_are_wrong_are_made_right(tmp_path: Path) -> None:
    make_source(tmp_path, 60)
    ran(tmp_path, "open_store(max_size=20_000); asyncio.run(read(0, 10))")
    with closing(sqlite3.connect(index_of(tmp_path))) as index:
        index.execute("UPDATE total SET n = 0, bytes = -1000000, lease = -5, dying = -5, max_size = 1000000000")
        index.execute("UPDATE ns SET n = 7, bytes = 7")
        index.commit()
    store = opened(tmp_path)
    read_all(store, 60)
    assert store.cache_info()["total_size"] <= 20_000
    assert store.cache_info()["max_size"] == 20_000
    assert sum(file.stat().st_size for file in (tmp_path / "cache/source").rglob("*") if file.is_file()) <= 20_000
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "garbage",
    [
        "UPDATE learned SET serial = NULL",
        "UPDATE learned SET state = NULL",
        "UPDATE total SET n = NULL, bytes = NULL",
        "UPDATE total SET lease = NULL, serial = NULL",
        "UPDATE entry SET size = NULL, rank = NULL",
        "UPDATE entry SET key = NULL WHERE id % 2",
        "UPDATE owner SET lease = NULL",
    ],
)
def test_rows_that_make_no_sense_are_damage_and_no_error_of_the_cache(tmp_path: Path, garbage: str) -> None:
    """A flipped bit in the head of a record is enough for a value to be missing, in a file that SQLite opens."""
    make_source(tmp_path, 60)
    options = "max_size=20_000, policy='adaptive'"
    ran(tmp_path, f"open_store({options}); asyncio.run(read(0, 40))")
    with closing(sqlite3.connect(index_of(tmp_path))) as index:
        index.execute("INSERT OR IGNORE INTO learned(one, serial, state) VALUES(1, 1, x'00')")
        index.execute("PRAGMA writable_schema = ON")
        tables = index.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND sql IS NOT NULL"
        ).fetchall()
        index.execute("UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '') WHERE type = 'table'")
        index.commit()
    with closing(sqlite3.connect(index_of(tmp_path))) as index:
        index.execute("PRAGMA ignore_check_constraints = ON")
        triggers = index.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            index.execute(f"DROP TRIGGER {name}")
        index.execute(garbage)
        for _, sql in triggers:
            index.execute(sql)
        index.execute("PRAGMA writable_schema = ON")
        index.executemany("UPDATE sqlite_schema SET sql = ?2 WHERE name = ?1 AND type = 'table'", tables)
        index.commit()
    # what the policy has learned is looked at after some hundred uses
    _, said = ran(tmp_path, f"open_store({options}); [asyncio.run(read(0, 60)) for _ in range(8)]")
    assert "an error in xzcache itself" not in said
    audit(str(tmp_path / "cache"))


# -- files that are cut, overwritten or put there while they are in use


SPOILS: dict[str, Callable[[Path], None]] = {
    "cut": lambda file: os.truncate(file, 0),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "garbage": lambda file: file.write_bytes(os.urandom(max(100, file.stat().st_size))),
    "gone": lambda file: file.unlink(),
}


def spoil(meta: Path, how: str) -> None:
    for file in sorted(meta.iterdir()):
        if file.is_file() and not file.name.startswith(("format", "node", "max_size")):
            try:
                SPOILS[how](file)
            except FileNotFoundError:
                continue


@pytest.mark.parametrize("how", SPOILS)
def test_no_file_of_the_books_can_end_a_process_or_fail_a_read(tmp_path: Path, how: str) -> None:
    make_source(tmp_path, 400)
    process = script(
        tmp_path,
        """
        asyncio.run(read(0, 20))
        print("begun", flush=True)
        for turn in range(20):
            sys.stdin.readline()
            asyncio.run(read(0, 20 * (turn + 2) if turn < 19 else 400))
            print("read", flush=True)
        """,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    for turn in range(20):
        print(file=process.stdin, flush=True)
        if turn % 2:
            # while it reads
            spoil(tmp_path / "cache" / META, how)
        line = process.stdout.readline()
        assert line == "read\n", process.communicate()[1]
        if not turn % 2:
            spoil(tmp_path / "cache" / META, how)
    _, err = finished(process)
    assert "Traceback" not in err


@linux
@pytest.mark.parametrize("what", ["a program that sets journal_mode=WAL", "files of a log", "a folder for the journal"])
def test_nothing_is_mapped_whatever_another_program_does(tmp_path: Path, what: str) -> None:
    make_source(tmp_path, 90)
    store = opened(tmp_path)
    read_all(store, 30)
    store.cache_info()
    index = index_of(tmp_path)
    if what.startswith("a program"):
        with closing(sqlite3.connect(index)) as other:
            other.execute("PRAGMA journal_mode=WAL")
            read_all(store, 40)
    elif what.startswith("files"):
        for suffix in ("-wal", "-shm"):
            Path(f"{index}{suffix}").write_bytes(os.urandom(40_000))
    else:
        Path(f"{index}-journal").unlink()
        Path(f"{index}-journal").mkdir()
    read_all(store, 60)
    assert META not in Path("/proc/self/maps").read_text()
    for file in (tmp_path / "cache" / META).glob("index-*"):
        if file.is_file() and file.name.endswith("-shm"):
            os.truncate(file, 0)
    read_all(store, 90)
    assert META not in Path("/proc/self/maps").read_text()
    assert until(lambda: is_cached(store, 90))
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


@linux
@pytest.mark.parametrize("limit", [20_000, 100_000, 130_000, 200_000])
def test_a_damaged_index_under_a_limit_of_file_sizes_is_made_anew_once(tmp_path: Path, limit: int) -> None:
    make_source(tmp_path, 400)
    _, err = ran(
        tmp_path,
        """
            import glob, logging, resource
            logging.basicConfig(level=logging.WARNING)
            asyncio.run(read(0, 20))
            limit = int(sys.argv[2])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for name in glob.glob(path + "/cache/.xzcache/index-*.db"):
                with open(name, "r+b") as file:
                    file.write(os.urandom(16_000))
            asyncio.run(read(0, 400))
            asyncio.run(read(0, 400))
            """,
        limit,
    )
    assert err.count("has been rebuilt") <= 1, err
    visit(str(tmp_path / "cache"))
    audit(str(tmp_path / "cache"))


# -- kills


def read_when_told(link: Connection, root: Path, first: int) -> None:
    barrier(link)
    read_all(opened(root, max_size=30_000), first + 40, first)


@linux
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace kills at the n-th call")
# which call, how many there are between two kills, and how many kills there are at least
@pytest.mark.parametrize(
    ("call", "step", "least"),
    [("pwrite64", 19, 5), ("fcntl", 19, 5), ("flock", 19, 5), ("unlink", 4, 3)],
)
@pytest.mark.slow
def test_a_kill_at_any_write_of_the_index_leaves_one_that_can_be_read(
    tmp_path: Path, call: str, step: int, least: int
) -> None:
    make_source(tmp_path, 400)
    ran(tmp_path, "store = open_store(max_size=30_000); asyncio.run(read(0, 40))")
    killed = 0
    for turn in range(8):
        inject = f"inject={call}:signal=SIGKILL:when={1 + step * turn}"
        options = ("-e", f"trace={call}", "-e", inject)
        with Team() as team:
            child = team.start(read_when_told, tmp_path, 30 * turn)
            child.hear("ready")
            command = ["strace", "-f", "-o", "/dev/null", *options, "-p", str(child.pid)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
                assert tracer.stderr is not None
                if not any("attached" in line for line in tracer.stderr):
                    pytest.skip("strace may not trace here")
                child.send("go")
                # if it makes fewer calls than that, nothing happens
                killed += child.exit_code() != 0
        visit(str(tmp_path / "cache"))
        audit(str(tmp_path / "cache"))
    assert killed >= least


# -- leaving while another thread joins


def held_up(path: Path, text: str, folder: str, seconds: float) -> None:
    """Run a text in a process whose thread that makes one of the cache's directories is held up there."""
    slow = ("strace", "-f", "-o", "/dev/null", "-P", str(path / "cache" / META / folder))
    inject = f"inject=mkdir,mkdirat:delay_exit={int(1e6 * seconds)}"
    finished(script(path, text, path / "cache" / META / folder, prefix=(*slow, "-e", inject)))


@linux
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace holds a thread up")
def test_a_process_that_leaves_while_a_thread_takes_its_number_leaves_no_number_behind(tmp_path: Path) -> None:
    make_source(tmp_path, 1)
    text = """
        import threading, time
        def leave():
            while not os.path.exists(sys.argv[2]):
                time.sleep(0.001)
            xzcache.cleanup_resources()
        leaving = threading.Thread(target=leave)
        leaving.start()
        store.cache_info()
        leaving.join()
    """
    ran(tmp_path, "asyncio.run(read(0, 1))")
    held_up(tmp_path, text, "tmp/2", 0.8)
    audit(str(tmp_path / "cache"))


@linux
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace holds a thread up")
def test_a_process_that_ends_while_a_thread_joins_leaves_no_number_behind(tmp_path: Path) -> None:
    make_source(tmp_path, 1)
    # the read does not wait for the disk, but the end of the process does
    held_up(tmp_path, "asyncio.run(read(0, 1))", "trash", 3)
    audit(str(tmp_path / "cache"))


# -- what only looks


def test_what_is_only_looked_at_waits_for_no_lock(tmp_path: Path) -> None:
    make_source(tmp_path, 4)
    store = opened(tmp_path)
    read_all(store, 2)
    store.cache_info()
    files = [file for file in (tmp_path / "cache" / META).iterdir() if file.is_file()]
    locked = [os.open(file, os.O_RDWR) for file in files]
    try:
        for fd in locked:
            fcntl.flock(fd, fcntl.LOCK_EX)

        async def looking() -> float:
            assert await get(store, "a/c/3") == value(3)
            began = time.monotonic()
            assert repr(store)
            assert store._repr_html_()
            return time.monotonic() - began

        with xzcache.config.set(lock_timeout=5):
            assert asyncio.run(looking()) < 4
    finally:
        for fd in locked:
            os.close(fd)


# -- errors of the cache's own code


def test_a_programming_error_is_told_with_its_traceback_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_source(tmp_path, 20)
    store = opened(tmp_path)
    read_all(store, 1)
    store.cache_info()

    def broken(*args: object, **options: object) -> None:
        raise AttributeError("as a slip in the code would")

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG, "xzcache"):
        patch.setattr(os, "replace", broken)
        read_all(store, 20)
        store.cache_info()
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1
    assert told[0].exc_info is not None
    assert "as a slip in the code would" in caplog.text
    assert "Traceback" in caplog.text
    assert store.cache_stats()["cache_errors"] > 0
    read_all(store, 20)
    assert until(lambda: is_cached(store, 20))


def test_a_programming_error_of_a_cache_store_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryStore):
        async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
            raise KeyError("as a slip in the code would")

    source = MemoryStore({"a/c/0": buffer(b"x"), "a/c/1": buffer(b"y")})
    store = xzcache.CacheStore(source, cache_store=Broken())
    assert asyncio.run(get(store, "a/c/0")) == b"x"
    assert asyncio.run(get(store, "a/c/1")) == b"y"
    assert caplog.text.count("Traceback") == 1


# -- a directory of version 0.1.0


def as_of_old(path: Path) -> None:
    """Lay a directory that nobody uses out as version 0.1.0 did: a file for each lock, an index with a log."""
    meta = path / "cache" / META
    with closing(sqlite3.connect(index_of(path))) as index:
        index.execute("PRAGMA journal_mode=WAL")
    for file in meta.glob("index-*-*"):
        file.unlink()
    # generation, serial number and epoch, eight bytes each
    numbers = (meta / "lock").read_bytes()[:24]
    (meta / "lock").unlink()
    (meta / "guard.lock").rmdir()
    (meta / "guard.lock").write_bytes(numbers)
    for name in ("storing", "door", "owners", *(f"keys-{number}" for number in range(16))):
        (meta / f"{name}.lock").touch()


@contextmanager
def process_of_old(path: Path) -> Iterator[None]:
    """What is to be seen of a process of version 0.1.0 that uses a directory: it has its byte of a file locked."""
    fd = os.open(path / "cache" / META / "owners.lock", os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 17, 1, 0))
        yield
    finally:
        os.close(fd)


@linux
def test_a_directory_of_an_older_version_is_taken_over_with_all_that_it_holds(tmp_path: Path) -> None:
    make_source(tmp_path, 40)
    ran(tmp_path, "asyncio.run(read(0, 20))")
    as_of_old(tmp_path)
    shutil.rmtree(tmp_path / "source")
    store = opened(tmp_path)
    read_all(store, 20)
    assert store.cache_info()["cached_keys"] == 20
    make_source(tmp_path, 40)
    read_all(store, 40)
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))
    # a process of that version that comes now finds no guard that it could hold
    with pytest.raises(IsADirectoryError):
        os.open(tmp_path / "cache" / META / "guard.lock", os.O_RDWR | os.O_CREAT)


@linux
@pytest.mark.parametrize("old", [False, True], ids=["new", "of-0.1.0"])
def test_two_processes_that_open_a_directory_at_once_both_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    make_source(tmp_path, 2)
    if old:
        ran(tmp_path, "asyncio.run(read(0, 1))")
        as_of_old(tmp_path)
    others = 0

    def other_is_faster(path: str) -> None:
        nonlocal others
        if os.path.basename(path) == "guard.lock" and not os.path.exists(path):
            os.mkdir(path)
            others += 1

    def open_late(path: Any, *arguments: Any, **options: Any) -> int:
        if isinstance(path, str):
            other_is_faster(path)
        return real_open(path, *arguments, **options)

    def unlink_early(path: Any, **options: Any) -> None:
        real_unlink(path, **options)
        other_is_faster(path)

    real_open, real_unlink = os.open, os.unlink
    monkeypatch.setattr(os, "open", open_late)
    monkeypatch.setattr(os, "unlink", unlink_early)
    store = opened(tmp_path)
    read_all(store, 2)
    assert others == 1
    assert store.cache_stats()["cache_errors"] == 0
    assert store.cache_info()["cached_keys"] == 2
    del store
    xzcache.cleanup_resources()
    audit(str(tmp_path / "cache"))


@linux
def test_a_process_of_an_older_version_that_comes_during_the_conversion_keeps_its_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path, 2)
    ran(tmp_path, "asyncio.run(read(0, 1))")
    as_of_old(tmp_path)
    guard = tmp_path / "cache" / META / "guard.lock"

    def unlink_early(path: Any, **options: Any) -> None:
        real_unlink(path, **options)
        if str(path) == str(guard):
            guard.touch(mode=0o600)
            old.enter_context(process_of_old(tmp_path))

    real_unlink = os.unlink
    with ExitStack() as old:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink_early)
            store = opened(tmp_path)
            read_all(store, 2)
        assert guard.is_file()
        assert guard.with_name("owners.lock").exists()
    xzcache.cleanup_resources()
    ran(tmp_path, "asyncio.run(read(0, 2))")
    assert guard.is_dir()


@linux
def test_a_directory_that_an_older_version_uses_is_read_and_not_changed(tmp_path: Path) -> None:
    make_source(tmp_path, 40)
    ran(tmp_path, "asyncio.run(read(0, 20))")
    as_of_old(tmp_path)
    with process_of_old(tmp_path):
        before = index_of(tmp_path).read_bytes(), (tmp_path / "cache" / META / "guard.lock").read_bytes()
        store = opened(tmp_path)
        read_all(store, 40)
        assert store.cache_info()["cached_keys"] == 0
        assert not (tmp_path / "cache/source/a/c/30").exists()
        # what is written is not read any more by the other one: it is gone, and the count of writes is another
        counters = (tmp_path / "cache" / META / "writes").read_bytes()
        writer = xzcache.CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", namespace="source")
        asyncio.run(writer.set("a/c/3", buffer(b"new")))
        assert not (tmp_path / "cache/source/a/c/3").exists()
        assert (tmp_path / "cache" / META / "writes").read_bytes() != counters
        assert (index_of(tmp_path).read_bytes(), (tmp_path / "cache" / META / "guard.lock").read_bytes()) == before
        del store, writer
    xzcache.cleanup_resources()
    (tmp_path / "source/a/c/3").write_bytes(value(3))
    ran(tmp_path, "asyncio.run(read(0, 40))")
    audit(str(tmp_path / "cache"))


def test_the_children_of_a_fork_close_what_they_got(tmp_path: Path) -> None:
    if not hasattr(os, "fork") or sys.platform != "linux":
        pytest.skip("descriptors are looked at as Linux shows them")
    make_source(tmp_path, 400)
    out, _ = finished(
        script(
            tmp_path,
            """
            def open_files():
                found = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                         if os.path.exists(f"/proc/self/fd/{n}")]
                return sum(name.startswith(path + "/cache/") for name in found)
            asyncio.run(read(0, 5))
            for turn in range(5):
                if (pid := os.fork()) == 0:
                    before = open_files()
                    asyncio.run(read(5 * turn, 5 * turn + 10))
                    xzcache.cleanup_resources()
                    print(before, open_files(), flush=True)
                    os._exit(0)
                os.waitpid(pid, 0)
            asyncio.run(read(0, 40))
            """,
        )
    )
    assert out.split() == ["0"] * 10
    audit(str(tmp_path / "cache"))


def test_a_process_that_is_stopped_with_the_guard_keeps_nobody(tmp_path: Path) -> None:
    make_source(tmp_path, 400)
    store = opened(tmp_path)
    read_all(store, 2)
    process = script(tmp_path, "asyncio.run(read(0, 300)); asyncio.run(read(0, 300)); sys.stdin.readline()")
    with xzcache.config.set(lock_timeout=1.0):
        for turn in range(5):
            process.send_signal(signal.SIGSTOP)
            read_all(store, 20 * turn + 20)
            process.send_signal(signal.SIGCONT)
    finished(process)
    del store
    xzcache.cleanup_resources()
    visit(str(tmp_path / "cache"))
    audit(str(tmp_path / "cache"))
