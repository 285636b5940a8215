"""The index is made anew while a source is written through the cache: nothing old stays, however the write ends."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import Child, Team, audit, index_path, until, visit
from sources import buffer, read
from zarr.storage import LocalStore

import xzcache
from xzcache.directory import opened_directory

KEYS = ("a/c/0", "a/c/1", "b/c/0")
WRITES = {
    "set": ("a/c/0", {"a/c/0": b"new", "a/c/1": b"old", "b/c/0": b"old"}),
    "delete": ("a/c/0", {"a/c/0": None, "a/c/1": b"old", "b/c/0": b"old"}),
    "delete_dir": ("a/c", {"a/c/0": None, "a/c/1": None, "b/c/0": b"old"}),
}
OLD = dict.fromkeys(KEYS, b"old")

pytestmark = pytest.mark.slow


class Held(LocalStore):
    """A source whose writes wait for a word before and after they are done, and fail if the second word says so."""

    def __init__(self, root: str, link: Connection) -> None:
        super().__init__(root)
        self._link = link
        self.words: dict[str, asyncio.Queue[str]] = {what: asyncio.Queue() for what in WRITES}

    async def _hold(self, what: str, write: Awaitable[None]) -> None:
        self._link.send("arrived")
        assert await self.words[what].get() == "write"
        await write
        self._link.send("written")
        if await self.words[what].get() == "failure":
            raise OSError("the source has failed")

    async def set(self, key: str, value: Any) -> None:
        await self._hold("set", super().set(key, value))

    async def delete(self, key: str) -> None:
        await self._hold("delete", super().delete(key))

    async def delete_dir(self, prefix: str) -> None:
        await self._hold("delete_dir", super().delete_dir(prefix))


def serve(link: Connection, root: str) -> None:
    """Read and write through a store as the test says; writes go on while orders are obeyed."""
    asyncio.run(_serve(link, root))


async def _serve(link: Connection, root: str) -> None:
    source = Held(f"{root}/source", link)
    store = xzcache.CacheStore(source, cache_store=f"{root}/cache", namespace="n", revalidate=False)
    writes = []
    while (order := await asyncio.to_thread(link.recv)) is not None:
        what, word = order
        if word:
            source.words[what].put_nowait(word)
        elif what == "read":
            link.send({key: await read(store, key) for key in KEYS})
        elif what == "cleanup":
            await asyncio.to_thread(xzcache.cleanup_resources)
            link.send("cleaned")
        elif what == "remove":
            directory = opened_directory(f"{root}/cache")
            assert directory is not None
            link.send(await asyncio.to_thread(directory.remove_if_last))
        elif what == "hits":
            link.send(store.cache_stats()["hits"])
        else:
            writes.append(asyncio.create_task(_write(link, store, what)))
    await asyncio.gather(*writes)


async def _write(link: Connection, store: Any, what: str) -> None:
    arguments = (buffer(b"new"),) if what == "set" else ()
    with suppress(OSError):
        await getattr(store, what)(WRITES[what][0], *arguments)
    link.send("ended")


class Worker:
    """A store in a process of its own."""

    def __init__(self, team: Team, root: Path) -> None:
        self.child: Child = team.start(serve, str(root))

    def reads(self) -> dict[str, bytes | None]:
        self.child.send(("read", ""))
        return dict(self.child.hear())

    def begin(self, what: str) -> None:
        """Begin a write, which waits at the source."""
        self.child.send((what, ""))
        self.child.hear("arrived")

    def write(self, what: str) -> None:
        """Let the source have a write that has begun."""
        self.child.send((what, "write"))
        self.child.hear("written")

    def end(self, what: str, how: str = "success") -> None:
        """Let the source answer."""
        if how == "kill":
            self.child.kill()
        else:
            self.child.send((what, how))
            self.child.hear("ended")

    def caches(self) -> bool:
        """Whether all that it reads now is cached."""
        self.child.send(("hits", ""))
        before = self.child.hear()
        expected = sum(value is not None for value in self.reads().values())
        self.child.send(("hits", ""))
        return bool(self.child.hear() - before >= expected)

    def cleanup(self) -> None:
        self.child.send(("cleanup", ""))
        self.child.hear("cleaned")

    def remove_if_last(self) -> bool:
        self.child.send(("remove", ""))
        return bool(self.child.hear())

    def leave(self) -> None:
        self.child.send(None)
        self.child.result()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key in KEYS:
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    return tmp_path


def destroy(root: Path) -> None:
    path = Path(index_path(str(root / "cache")))
    path.write_bytes(b"x" * path.stat().st_size)


def make_anew(root: Path, worker: Worker, expected: dict[str, bytes | None] = OLD) -> None:
    """Destroy the index, and let a process that reads make it anew."""
    before = index_path(str(root / "cache"))
    destroy(root)
    # entries that are cached need no index
    worker.reads()
    if index_path(str(root / "cache")) == before:
        visit(str(root / "cache"))
    assert index_path(str(root / "cache")) != before
    for _ in range(3):
        assert worker.reads() == expected


def check(root: Path, expected: dict[str, bytes | None], *workers: Worker) -> None:
    """All processes read the new state, an additional one as well; they cache it, and leave a sound directory."""
    with Team() as team:
        everyone = [*workers, Worker(team, root)]
        for _ in range(2):
            for worker in everyone:
                assert worker.reads() == expected
        for worker in everyone:
            until(worker.caches)
            assert worker.reads() == expected
            worker.leave()
    visit(str(root / "cache"))
    audit(str(root / "cache"))


@pytest.mark.parametrize("end", ["kill", "success", "failure"])
@pytest.mark.parametrize("write", WRITES)
def test_a_process_that_cleans_up_during_a_write_is_not_taken_for_dead(root: Path, write: str, end: str) -> None:
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        assert reader.reads() == writer.reads() == OLD
        writer.begin(write)
        writer.cleanup()
        visit(str(root / "cache"))
        for _ in range(3):
            assert reader.reads() == OLD
        writer.write(write)
        writer.end(write, end)
        if end == "kill":
            visit(str(root / "cache"))
            check(root, WRITES[write][1], reader)
        else:
            check(root, WRITES[write][1], reader, writer)


@pytest.mark.parametrize("end", ["kill", "success"])
@pytest.mark.parametrize("by_another", [False, True])
def test_a_directory_stays_while_a_process_that_leaves_it_is_writing(root: Path, end: str, *, by_another: bool) -> None:
    with Team() as team:
        writer, *others = (Worker(team, root) for _ in range(2 if by_another else 1))
        for worker in (writer, *others):
            assert worker.reads() == OLD
        writer.begin("set")
        for worker in (writer, *others):
            assert not worker.remove_if_last()
        others.append(Worker(team, root))
        assert others[-1].reads() == OLD
        writer.write("set")
        writer.end("set", end)
        if end == "kill":
            visit(str(root / "cache"))
            check(root, WRITES["set"][1], *others)
        else:
            for worker in others:
                assert worker.reads() == WRITES["set"][1]
                worker.leave()
            assert writer.remove_if_last()
            assert not (root / "cache").exists()


@pytest.mark.parametrize("end", ["kill", "success", "failure"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_is_under_way_leaves_nothing_old(root: Path, write: str, end: str) -> None:
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        assert reader.reads() == writer.reads() == OLD
        writer.begin(write)
        make_anew(root, reader)
        writer.write(write)
        writer.end(write, end)
        check(root, WRITES[write][1], reader, *([] if end == "kill" else [writer]))


@pytest.mark.parametrize("write", WRITES)
def test_a_writer_that_makes_the_index_anew_itself(root: Path, write: str) -> None:
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        assert reader.reads() == OLD
        writer.begin(write)
        make_anew(root, writer)
        assert reader.reads() == OLD
        writer.write(write)
        writer.child.kill()
        check(root, WRITES[write][1], reader)


@pytest.mark.parametrize("times", [2, 3])
def test_an_index_that_is_made_anew_again(root: Path, times: int) -> None:
    with Team() as team:
        readers, writer = [Worker(team, root) for _ in range(times)], Worker(team, root)
        writer.begin("set")
        for reader in readers:
            make_anew(root, reader)
        # the one that made the last index may be gone
        readers.pop().child.kill()
        for reader in readers:
            assert reader.reads() == OLD
        writer.write("set")
        writer.child.kill()
        check(root, WRITES["set"][1], *readers)


def test_a_write_that_ends_does_not_stand_for_another_one(root: Path) -> None:
    """Neither one of another process, nor one of the same process."""
    with Team() as team:
        reader, writer, other = (Worker(team, root) for _ in range(3))
        for worker in (writer, other):
            worker.begin("set")
        writer.begin("delete_dir")
        make_anew(root, reader)
        writer.write("set")
        writer.end("set")
        present = {"a/c/0": b"new", "a/c/1": b"old", "b/c/0": b"old"}
        for _ in range(3):
            assert reader.reads() == present
        other.write("set")
        other.child.kill()
        for _ in range(3):
            assert reader.reads() == present
        writer.write("delete_dir")
        writer.child.kill()
        check(root, WRITES["delete_dir"][1], reader)


def test_what_is_written_after_the_index_was_made_anew(root: Path) -> None:
    """The writer has written before, and reads and writes again: the new index knows its writes."""
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        writer.begin("set")
        make_anew(root, reader)
        writer.write("set")
        writer.end("set")
        until(reader.caches)
        writer.begin("delete_dir")
        for _ in range(3):
            assert reader.reads() == WRITES["set"][1]
        writer.write("delete_dir")
        writer.child.kill()
        check(root, WRITES["delete_dir"][1], reader)


def test_a_writer_that_is_idle_keeps_nothing_out_of_the_cache(root: Path) -> None:
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        writer.begin("set")
        writer.write("set")
        writer.end("set")
        make_anew(root, reader, WRITES["set"][1])
        assert reader.caches()
        check(root, WRITES["set"][1], reader, writer)


def test_notes_of_writers_are_not_needed(root: Path) -> None:
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        assert reader.reads() == OLD
        # no note can be left here
        notes = root / "cache/.xzcache/written"
        notes.write_text("no directory")
        writer.begin("set")
        make_anew(root, reader)
        writer.write("set")
        writer.child.kill()
        notes.unlink()
        check(root, WRITES["set"][1], reader)


@contextmanager
def index_locked(root: Path) -> Iterator[None]:
    """Have the index as another program that the cache does not wait for."""
    with closing(sqlite3.connect(index_path(str(root / "cache")), isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_began_without_the_index(root: Path, write: str) -> None:
    """Another program has the index locked when it begins; later the index learns of the write while it goes on."""
    with Team() as team:
        reader, writer = Worker(team, root), Worker(team, root)
        assert reader.reads() == writer.reads() == OLD
        with index_locked(root):
            writer.begin(write)
        notes = root / "cache/.xzcache/tmp"

        def is_made_up_for() -> bool:
            assert writer.reads() == OLD
            return not any(name.startswith("undone-") for name in os.listdir(notes))

        until(is_made_up_for)
        for _ in range(3):
            assert reader.reads() == OLD
        writer.write(write)
        writer.child.kill()
        check(root, WRITES[write][1], reader)
