"""What is invalidated stays invalid, whatever fails and whoever stalls; by real processes, rights, mounts, signals."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from damage import Unsupported, enter_private_mounts, in_process
from processes import PATIENCE, Child, Team, findings, made, traced, until, version_of
from sources import buffer, read
from sweeps import sweep
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

import xzcache

pytestmark = pytest.mark.slow

SIZE = 2000
NAMESPACE = "source"
UNPRIVILEGED = 65534
ALL = ("a/c/0", "a/c/1", "a/d/0")

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace here")


def over_attempts() -> Iterator[None]:
    """For longer than what is between two attempts to make up for something, a second."""
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        yield
        time.sleep(0.2)


# -- stores in processes of their own


def value(key: str, version: int) -> bytes:
    return made(key, version, SIZE)


def cached(link: Connection, root: str, **options: Any) -> None:
    """Do what is asked for over the pipe, through one store, until `None` comes."""
    store = xzcache.CacheStore(
        LocalStore(f"{root}/origin"), cache_store=f"{root}/cache", namespace=NAMESPACE, **options
    )
    asyncio.run(obey(link, store))


def plain(link: Connection, root: str, **options: Any) -> None:
    asyncio.run(obey(link, xzcache.LockedLocalStore(f"{root}/cache", **options)))


async def obey(link: Connection, store: Any) -> None:
    link.send("ready")
    while (order := await asyncio.to_thread(link.recv)) is not None:
        try:
            link.send(await carry_out(store, *order))
        except OSError as error:
            link.send(error)


async def carry_out(store: Any, what: str, key: str, argument: Any = None) -> Any:
    if what == "get all":
        return [await carry_out(store, "get", one) for one in argument]
    if what in ("set all", "delete all"):
        await asyncio.gather(*(carry_out(store, what.partition(" ")[0], one, 2) for one in argument))
        return "done"
    if what == "hits":
        return store.cache_stats()["hits"]
    if what == "get":
        found = await read(store, key, argument)
        return None if found is None else (version_of(key, found, SIZE) if argument is None else found)
    if what == "set":
        await store.set(key, buffer(value(key, argument)))
    elif what == "delete":
        await store.delete(key)
    elif what == "delete_dir":
        await store.delete_dir(key)
    elif what == "clear":
        await store.clear()
    elif what == "info":
        return store.cache_info()
    return "done"


class Worker:
    """A store in a process of its own."""

    def __init__(self, team: Team, target: Callable[..., Any], root: Path, *args: Any, **options: Any) -> None:
        self.child: Child = team.start(target, str(root), *args, **options)
        self.child.hear("ready")

    def ask(self, what: str, key: str = "", argument: Any = None) -> Any:
        self.child.send((what, key, argument))
        return self.child.hear()

    def begin(self, what: str, key: str = "", argument: Any = None) -> None:
        """As `ask`, without waiting for the answer."""
        self.child.send((what, key, argument))

    def leave(self) -> None:
        self.child.send(None)
        self.child.result()


def anew(root: Path, what: str, key: str = "", argument: Any = None, *, target: Any = cached) -> Any:
    """What a new process is answered."""
    with Team() as team:
        worker = Worker(team, target, root)
        answer = worker.ask(what, key, argument)
        worker.leave()
    return answer


def make_origin(root: Path, keys: Sequence[str] = ALL) -> None:
    for key in keys:
        path = root / "origin" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key, 1))


def entry(root: Path, key: str) -> Path:
    return root / "cache" / NAMESPACE / key


def accounted(root: Path) -> None:
    """Once every process has left, and one more has come and gone, disk and index agree."""
    give_away(root, os.geteuid())
    anew(root, "info")
    assert findings(str(root / "cache")) == []


@pytest.fixture
def root() -> Iterator[Path]:
    """A place that an unprivileged user can get at."""
    path = Path(tempfile.mkdtemp(prefix="xzcache-tests-"))
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", path], check=False)
    shutil.rmtree(path, ignore_errors=True)


def unprivileged(link: Connection, root: str, target: Callable[..., Any], **options: Any) -> None:
    """As `target`, by a user whom rights of directories concern."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(UNPRIVILEGED)
        os.setuid(UNPRIVILEGED)
    target(link, root, **options)


def give_away(root: Path, user: int = UNPRIVILEGED) -> None:
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{user}:{user}", root], check=True)


# -- files that cannot be unlinked


@pytest.mark.parametrize("write", ["set", "delete", "delete_dir"])
def test_a_folder_that_may_not_be_written(root: Path, write: str) -> None:
    """The old value is read neither by who wrote nor by others; once the folder can be written, nothing is left."""
    make_origin(root)
    give_away(root)
    with Team() as team:
        writer = Worker(team, unprivileged, root, cached, revalidate=False)
        other = Worker(team, unprivileged, root, cached, revalidate=False)
        for worker in (writer, other):
            assert [worker.ask("get", key) for key in ALL] == [1, 1, 1]
        folder = entry(root, "a/c")
        folder.chmod(0o500)
        expected = {"set": (2, 1), "delete": (None, 1), "delete_dir": (None, None)}[write]
        writer.ask(write, "a/c" if write == "delete_dir" else "a/c/0", 2)
        late = Worker(team, unprivileged, root, cached, revalidate=False)
        for _ in over_attempts():
            for worker in (writer, other, late):
                assert (worker.ask("get", "a/c/0"), worker.ask("get", "a/c/1")) == expected
        folder.chmod(0o700)
        for worker in (writer, other, late):
            assert (worker.ask("get", "a/c/0"), worker.ask("get", "a/c/1")) == expected
            worker.leave()
    accounted(root)
    assert anew(root, "get", "a/c/0") == expected[0]


def _unremovable(team: Team, root: Path, **options: Any) -> tuple[Worker, tuple[Path, Path]]:
    """A process that has cached all keys, and the folders of the files, which it cannot remove."""
    make_origin(root)
    give_away(root)
    writer = Worker(team, unprivileged, root, cached, revalidate=False, **options)
    assert [writer.ask("get", key) for key in ALL] == [1, 1, 1]
    folders = entry(root, "a/c"), entry(root, "a/d")
    for folder in folders:
        folder.chmod(0o500)
    return writer, folders


def test_a_folder_in_which_nothing_can_be_looked_for(root: Path) -> None:
    """A file that the index has lost is not served after a deletion that could not find it."""
    make_origin(root)
    give_away(root)
    with Team() as team:
        reader = Worker(team, unprivileged, root, cached, revalidate=False)
        assert [reader.ask("get", key) for key in ALL] == [1, 1, 1]
        reader.leave()
        (index,) = (root / "cache/.xzcache").glob("index-*.db")
        with closing(sqlite3.connect(index)) as connection, connection:
            connection.execute("DELETE FROM entry WHERE key = ?", [f"{NAMESPACE}/a/c/0"])
        writer = Worker(team, unprivileged, root, cached, revalidate=False)
        folder = entry(root, "a/c")
        folder.chmod(0o300)
        writer.ask("delete_dir", "a")
        for _ in over_attempts():
            assert [writer.ask("get", key) for key in ALL] == [None] * 3
        folder.chmod(0o700)
        until(lambda: writer.ask("get", "a/c/0") or not folder.exists())
        assert [writer.ask("get", key) for key in ALL] == [None] * 3
        writer.leave()
    accounted(root)


def test_two_pending_invalidations_end_each_by_itself(root: Path) -> None:
    with Team() as team:
        writer, folders = _unremovable(team, root)
        for key in ("a/c/0", "a/d/0"):
            writer.ask("set", key, 2)
        folders[0].chmod(0o700)

        def is_made_up_for() -> bool:
            assert writer.ask("get", "a/d/0") == 2
            return not entry(root, "a/c/0").exists() or entry(root, "a/c/0").read_bytes() == value("a/c/0", 2)

        until(is_made_up_for)
        for _ in over_attempts():
            assert [writer.ask("get", key) for key in ("a/c/0", "a/c/1", "a/d/0")] == [2, 1, 2]
        folders[1].chmod(0o700)
        writer.leave()
    accounted(root)


def test_writes_that_waited_together_end_each_by_itself(root: Path) -> None:
    with Team() as team:
        writer, folders = _unremovable(team, root)
        # while the first one waits for the disk, the others come
        writer.ask("set all", argument=("a/c/1", "a/c/0", "a/d/0"))
        folders[0].chmod(0o700)

        def is_cached_again() -> bool:
            before = writer.ask("hits")
            assert [writer.ask("get", key) for key in ("a/c/0", "a/d/0")] == [2, 2]
            return bool(writer.ask("hits") > before)

        until(is_cached_again)
        folders[1].chmod(0o700)
        writer.leave()
    accounted(root)


def write_under_a_read_only_mount(root: str) -> list[Any]:
    enter_private_mounts()
    folder = f"{root}/cache/{NAMESPACE}"
    found: list[Any] = []

    async def act() -> None:
        store = xzcache.CacheStore(
            LocalStore(f"{root}/origin"), cache_store=f"{root}/cache", namespace=NAMESPACE, revalidate=False
        )

        async def read_while(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(PATIENCE):
                again = True
                while again:
                    again = condition()
                    if (read := [await carry_out(store, "get", key) for key in ALL]) not in found:
                        found.append(read)
                    await asyncio.sleep(0.02)

        for key in ALL:
            await carry_out(store, "get", key)
        for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unsupported(f"no mounts here: {done.stderr}")
        await carry_out(store, "set", "a/c/0", 2)
        await carry_out(store, "delete", "a/c/1")
        # until another attempt to make up for the writes has failed, and until one has succeeded
        errors = store.cache_stats()["cache_errors"]
        await read_while(lambda: store.cache_stats()["cache_errors"] == errors)
        subprocess.run(["umount", folder], check=True)
        # what was written may be cached anew
        await read_while(lambda: os.path.exists(f"{folder}/a/c/1"))
        await read_while(lambda: False)

    asyncio.run(act())
    return found


def test_a_read_only_mount(root: Path) -> None:
    """Nothing of the files can be changed: what was written is read from the source until they are gone."""
    make_origin(root)
    assert in_process(write_under_a_read_only_mount, str(root)) == [[2, None, 1]]
    accounted(root)


@pytest.mark.parametrize("how", ["delete", "delete_dir", "clear"])
def test_a_store_of_its_own_deletes_or_raises(root: Path, how: str) -> None:
    (root / "cache").mkdir(mode=0o700)
    give_away(root)
    with Team() as team:
        store = Worker(team, unprivileged, root, plain)
        assert store.ask("set", "a/c/0", 1) == "done"
        (root / "cache/a/c").chmod(0o500)
        key = {"delete": "a/c/0", "delete_dir": "a", "clear": ""}[how]
        answer = store.ask(how, key)
        assert isinstance(answer, OSError) or store.ask("get", "a/c/0") is None
        assert isinstance(answer, OSError), "the file is there"
        (root / "cache/a/c").chmod(0o700)
        assert store.ask(how, key) == "done"
        assert store.ask("get", "a/c/0") is None
        store.leave()


# -- the index cannot be told


@contextmanager
def index_locked(root: Path) -> Iterator[None]:
    """Have the lock of the index as if another process had stopped with it."""
    with open(root / "cache/.xzcache/lock", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class SlowToReturn(LocalStore):
    """A source that has written a key when another process stops that has the index."""

    lock: Any = None

    async def set(self, key: str, value: Any, byte_range: Any = None) -> None:
        await super().set(key, value)
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    async def delete(self, key: str) -> None:
        await super().delete(key)
        fcntl.flock(self.lock, fcntl.LOCK_EX)


@pytest.mark.parametrize("write", ["set", "delete"])
def test_a_write_whose_end_the_index_was_not_told_is_over(root: Path, write: str) -> None:
    """Its key is cached again, by the same process, which leaves the directory in the end."""
    make_origin(root)
    (root / "cache").mkdir()
    with xzcache.config.set(lock_timeout=0.2):
        origin = SlowToReturn(root / "origin")
        store = xzcache.CacheStore(origin, cache_store=root / "cache", namespace=NAMESPACE, revalidate=False)
        asyncio.run(read(store, "a/c/1"))
        until(entry(root, "a/c/1").exists)
        with open(root / "cache/.xzcache/lock", "r+b") as origin.lock:
            asyncio.run(store.set("a/c/0", buffer(value("a/c/0", 2))) if write == "set" else store.delete("a/c/0"))
    make_origin(root)

    def is_cached() -> bool:
        assert asyncio.run(read(stores[0], "a/c/0")) == value("a/c/0", 1)
        return entry(root, "a/c/0").exists()

    stores = [store]
    del store
    until(is_cached)
    stores.clear()
    until(lambda: not os.listdir(root / "cache/.xzcache/tmp"))
    accounted(root)


def test_deletions_that_waited_together_end_each_by_itself(root: Path) -> None:
    """Neither the index nor the files of two keys can be reached: one that can be made up for does not wait."""
    with Team() as team:
        writer, folders = _unremovable(team, root, settings={"lock_timeout": 0.3})
        with index_locked(root):
            # while the first one waits for the lock, the others come
            writer.ask("delete all", argument=("a/c/1", "a/c/0", "a/d/0"))
        make_origin(root)
        give_away(root / "origin")
        folders[0].chmod(0o700)

        def is_cached_again() -> bool:
            before = writer.ask("hits")
            assert [writer.ask("get", key) for key in ("a/c/0", "a/c/0", "a/d/0")] == [1, 1, 1]
            return bool(writer.ask("hits") > before)

        until(is_cached_again)
        folders[1].chmod(0o700)
        writer.leave()
    accounted(root)


def test_a_write_that_the_index_was_not_told_of_ends_an_absence(root: Path) -> None:
    make_origin(root, [f"a/c/{number}" for number in range(5)])
    with Team() as team:
        writer = Worker(team, cached, root, settings={"lock_timeout": 0.3}, revalidate=False)
        options = {"revalidate": False, "missing_max_age_seconds": 60}
        first, second, third = (Worker(team, cached, root, **options) for _ in range(3))
        for number, worker in enumerate((writer, first, second, third)):
            assert worker.ask("get", f"a/c/{number}") == 1
        assert first.ask("get", "a/c/7") is None
        # what was noted is stored in order: once this is, so is that
        first.ask("get", "a/c/4")
        until(entry(root, "a/c/4").exists)
        make_origin(root, ["a/c/7"])
        assert second.ask("get", "a/c/7") is None, "it is not remembered to be absent"
        with index_locked(root):
            assert writer.ask("set", "a/c/7", 2) == "done"
        # the writer has not used the index since
        for worker in (third, second, first, writer):
            assert worker.ask("get", "a/c/7") == 2
            worker.leave()
    accounted(root)


# -- processes that stall


def injected(log: Path, word: str = "INJECTED") -> int:
    """How often strace has meddled so far."""
    with suppress(FileNotFoundError):
        return log.read_text(errors="replace").count(word)
    return 0


RENAMES = "rename,renameat,renameat2"


def first_call(calls: str, files: Iterable[Path], doing: str) -> list[str]:
    """Do something to a process at its first call on one of some files."""
    paths = [option for path in files for option in ("-P", str(path))]
    return [*paths, "-e", f"trace={calls}", "-e", f"inject={calls}:{doing}:when=1"]


def in_flight(root: Path) -> list[Path]:
    """What files in flight of a few processes are called."""
    return [root / f"cache/.xzcache/tmp/{owner}/{number}" for owner in range(1, 5) for number in range(1, 9)]


PIECE = RangeByteRequest(100, 1100)

# what the stalled process reads, and what is written meanwhile
WRITTEN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "whole": (None, ("set", "a/c/0", 2)),
    "deleted": (None, ("delete", "a/c/0")),
    "beneath": (None, ("delete_dir", "a")),
    "piece": (PIECE, ("set", "a/c/0", 2)),
    "piece beneath": (PIECE, ("delete_dir", "a")),
}


@needs_strace
@pytest.mark.parametrize("end", ["goes on", "is killed"])
@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.slow
def test_a_publisher_that_stalls_before_it_names_its_file(root: Path, case: str, end: str) -> None:
    """It holds the lock of the index, so the write is done by hand; what it publishes later is not the old value."""
    part, write = WRITTEN[case]
    make_origin(root, ["a/c/0", "a/c/1"])
    with Team() as team:
        writer = Worker(team, cached, root, settings={"lock_timeout": 0.3}, revalidate=False)
        publisher = Worker(team, cached, root, revalidate=False)
        publisher.ask("get", "a/c/1", part)
        log = root / "strace"
        with traced(publisher.child, log, *first_call(RENAMES, in_flight(root), "delay_enter=4s")):
            publisher.begin("get", "a/c/0", part)
            # strace writes the beginning of a call when the call begins
            until(lambda: log.exists() and "rename" in log.read_text(errors="replace"))
            writer.ask(*write)
            expected = None if write[0] != "set" else value("a/c/0", 2)[100:1100] if part else 2
            if end == "is killed":
                publisher.child.signal(signal.SIGKILL)
        if end == "goes on":
            publisher.child.hear()
            assert publisher.ask("get", "a/c/0", part) == expected
            publisher.leave()
        assert writer.ask("get", "a/c/0", part) == expected
        writer.leave()
    assert anew(root, "get", "a/c/0", part) == expected
    accounted(root)


@needs_strace
@pytest.mark.parametrize("writer_dies", [False, True])
def test_a_publisher_that_is_stopped_and_killed_when_the_file_has_its_name(root: Path, writer_dies: bool) -> None:
    """The folder is not there yet, so that the first rename fails: there it stops; and dies after the second."""
    make_origin(root)
    with Team() as team:
        writer = Worker(team, cached, root, settings={"lock_timeout": 0.3}, revalidate=False)
        publisher = Worker(team, cached, root, revalidate=False)
        publisher.ask("get", "a/d/0")
        log = root / "strace"
        with traced(publisher.child, log, *first_call(RENAMES, in_flight(root), "signal=STOP")):
            publisher.begin("get", "a/c/0")
            until(lambda: injected(log, "SIGSTOP"))
            writer.ask("set", "a/c/0", 2)
            if writer_dies:
                writer.child.kill()
            publisher.child.signal(signal.SIGCONT)
            until(lambda: publisher.child.link.poll() or entry(root, "a/c/0").exists())
            publisher.child.kill()
        assert anew(root, "get", "a/c/0") == 2
    accounted(root)


@needs_strace
def test_an_evictor_that_stalls_takes_no_newer_file_along(root: Path) -> None:
    """It has committed that an entry leaves, and stalls before it renames or unlinks the file."""
    make_origin(root)
    with Team() as team:
        writer = Worker(team, cached, root, settings={"lock_timeout": 0.3}, revalidate=False)
        evictor = Worker(team, cached, root, revalidate=False)
        assert evictor.ask("get", "a/c/0") == 1
        log = root / "strace"
        with traced(evictor.child, log, *first_call(f"{RENAMES},unlink", [entry(root, "a/c/0")], "delay_enter=4s")):
            evictor.begin("set", "a/c/0", 2)
            until(lambda: log.exists() and re.search("rename|unlink", log.read_text(errors="replace")))
            writer.ask("set", "a/c/0", 3)
        evictor.child.hear()
        expected = version_of("a/c/0", (root / "origin/a/c/0").read_bytes(), SIZE)
        for worker in (evictor, writer):
            assert worker.ask("get", "a/c/0") == expected
            worker.leave()
    assert anew(root, "get", "a/c/0") == expected
    accounted(root)


# -- directories that come back


@pytest.mark.parametrize("what", ["", NAMESPACE, f"{NAMESPACE}/a", f"{NAMESPACE}/a/c"])
@pytest.mark.parametrize("write", ["set", "delete", "delete_dir"])
def test_a_directory_that_comes_back(root: Path, what: str, write: str) -> None:
    """Who wrote meanwhile reads nothing old of it, and when that one has left, nobody does."""
    make_origin(root)
    place, away = root / "cache" / what, root / "away"
    with Team() as team:
        writer = Worker(team, cached, root, revalidate=False)
        assert [writer.ask("get", key) for key in ALL] == [1, 1, 1]
        place.rename(away)
        expected = {"set": (2, 1), "delete": (None, 1), "delete_dir": (None, None)}[write]
        writer.ask(write, "a/c" if write == "delete_dir" else "a/c/0", 2)
        for _ in range(2):
            assert (writer.ask("get", "a/c/0"), writer.ask("get", "a/c/1")) == expected
        shutil.rmtree(place, ignore_errors=True)
        away.rename(place)
        for _ in over_attempts():
            assert (writer.ask("get", "a/c/0"), writer.ask("get", "a/c/1")) == expected
        writer.leave()
    assert (anew(root, "get", "a/c/0"), anew(root, "get", "a/c/1")) == expected


# -- links


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "what", [".xzcache/trash", ".xzcache/tmp", ".xzcache/odd", ".xzcache/ranges", NAMESPACE, f"{NAMESPACE}/a"]
)
def test_nothing_is_changed_behind_a_link(root: Path, what: str, running: bool) -> None:
    make_origin(root)
    theirs = root / "theirs"
    theirs.mkdir()
    with Team() as team:
        first = Worker(team, cached, root, revalidate=False, max_size=3 * SIZE)
        first.ask("get", "a/c/0")
        first.ask("get", "a/c/1", PIECE)
        if not running:
            first.leave()
        place = root / "cache" / what
        shutil.rmtree(place, ignore_errors=True)
        for name in [*map(str, range(4, 30)), "c/0", "c/1", "a/c/0", "1/1", "1/2", "2/1", "note", "00/11"]:
            (theirs / name).parent.mkdir(parents=True, exist_ok=True)
            (theirs / name).write_text("theirs")
        before = {path: path.is_dir() or path.read_text() for path in theirs.rglob("*")}
        place.symlink_to(theirs)
        worker = first if running else Worker(team, cached, root, revalidate=False, max_size=3 * SIZE)
        for key in (*ALL, *ALL):
            assert worker.ask("get", key) == 1
            assert worker.ask("get", key, PIECE) == value(key, 1)[100:1100]
        worker.ask("set", "a/c/0", 2)
        assert worker.ask("get", "a/c/0") == 2
        worker.ask("delete", "a/c/1")
        assert worker.ask("get", "a/c/1") is None
        worker.ask("delete_dir", "a")
        assert [worker.ask("get", key) for key in ALL] == [None] * 3
        worker.leave()
    anew(root, "info")
    assert {path: path.is_dir() or path.read_text() for path in theirs.rglob("*")} == before


# -- one call that fails


CALLS = ("lgetxattr", "getxattr", "fgetxattr", "newfstatat", "lstat", "unlink", "unlinkat", "rename", "open", "openat")
MOST = 3 * SIZE


async def write_read_and_evict(store: Any) -> None:
    for key in ALL:
        await carry_out(store, "get", key)
    await carry_out(store, "set", "a/c/0", 2)
    await carry_out(store, "get", "a/d/1", PIECE)
    await carry_out(store, "set", "a/d/1", 2)
    await carry_out(store, "delete", "a/c/1")
    for _ in range(2):
        for key in EXPECTED:
            assert await carry_out(store, "get", key) == EXPECTED[key], key
    await carry_out(store, "delete_dir", "a/d")
    for key in EXPECTED:
        assert await carry_out(store, "get", key) == (None if key.startswith("a/d/") else EXPECTED[key]), key


EXPECTED = {"a/c/0": 2, "a/c/1": None, "a/d/0": 1, "a/d/1": 2, "a/e/0": 1}


def scenario(link: Connection, root: str) -> None:
    """As `write_read_and_evict`, over a source that makes no system calls."""
    source = MemoryStore()
    for key in EXPECTED:
        asyncio.run(source.set(key, buffer(value(key, 1))))
    store = xzcache.CacheStore(
        source, cache_store=f"{root}/cache", namespace=NAMESPACE, max_size=MOST, revalidate=False
    )
    # the index is there already when calls begin to fail
    asyncio.run(carry_out(store, "get", "a/c/0"))
    link.send("ready")
    link.recv()
    asyncio.run(write_read_and_evict(store))


def places(root: Path) -> list[Path]:
    """Where files of the cache may come to lie, and what is above them."""
    cache, meta = root / "cache", root / "cache/.xzcache"
    names = [NAMESPACE, f"{NAMESPACE}/a", f"{NAMESPACE}/a/c", f"{NAMESPACE}/a/d"]
    found = [*(cache / name for name in names), *(entry(root, key) for key in EXPECTED)]
    found += [meta / f"trash/{number}" for number in range(1, 13)]
    return found + [meta / f"tmp/1/{number}" for number in range(1, 13)]


@needs_strace
@sweep(3)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.slow
def test_one_call_that_fails(root: Path, call: str, every: int) -> None:
    """Whichever it is: nothing old is read, by nobody, and the next process finds disk and index in agreement."""
    number, fired = 0, True
    while fired:
        # one after the other at first; of many, some
        number += every * (1 if number < 12 else 7)
        here = root / str(number)
        make_origin(here, [key for key in EXPECTED if not key.startswith("a/d/")])
        (here / "origin/a/c/0").write_bytes(value("a/c/0", 2))
        (here / "origin/a/c/1").unlink()
        log = here / "strace"
        # the cache alone unlinks and renames; others, too, look for files and open them
        paths = [] if call in ("unlink", "unlinkat", "rename") else places(here)
        fault = [option for path in paths for option in ("-P", str(path))]
        fault += ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}"]
        with Team() as team:
            child = team.start(scenario, str(here))
            child.hear("ready")
            with traced(child, log, *fault):
                child.send("go")
                child.result()
        fired = injected(log) > 0
        expected = [None if key.startswith("a/d/") else version for key, version in EXPECTED.items()]
        assert anew(here, "get all", "", list(EXPECTED)) == expected, f"{call} {number}"
        accounted(here)
        shutil.rmtree(here)
