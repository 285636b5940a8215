"""The cache directory through its door: what is stored, who fetches, repair, and that no failure is the reader's."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xzcache.directory import CacheDirectory, SharedBackend, audit, cleanup_resources, open_directory
from xzcache.model import END, META, MISSING, Entry

BOUND = 10_000
SIZE = 1000
KEY = "a/c/0"


def new_directory(root: object) -> CacheDirectory:
    """A directory as another process has it: locks, lease and memory of its own."""
    return CacheDirectory(str(root), max_size=BOUND, default_max_size=None, min_free=0, lock_timeout=30.0, policy="lru")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path.resolve() / "cache"


@pytest.fixture
def mine(root: Path) -> Iterator[SharedBackend]:
    yield from opened(root)


@pytest.fixture
def theirs(mine: SharedBackend, root: Path) -> Iterator[SharedBackend]:
    """The same source in another process."""
    yield from opened(root)


def opened(root: Path) -> Iterator[SharedBackend]:
    directory = new_directory(root)
    assert directory.prepare()
    yield SharedBackend(directory, "source")
    directory.close()
    report = audit(directory, repair=False)
    assert report.ok, str(report)


def entry_of(backend: SharedBackend, key: str = KEY, start: int = 0, stop: int = -1) -> Entry:
    return Entry(backend.prefix + key, start, stop)


def data_of(key: str, version: int = 0, size: int = SIZE) -> bytes:
    return f"{key} {version} ".encode() * size


async def publish(backend: SharedBackend, key: str = KEY, version: int = 0, *, size: int = SIZE) -> bool:
    return await put(backend, entry_of(backend, key), data_of(key, version)[:size], backend.write_version(key))


async def put(backend: SharedBackend, entry: Entry, data: bytes, version: Any, validator: str = "") -> bool:
    """Publish an entry; returns whether it is there then."""
    async with backend.fetching():
        await backend.publish(entry, data, version, validator)
    found = await backend.get(entry, "infinity")
    return isinstance(found, memoryview) and bytes(found) == data


async def get(backend: SharedBackend, key: str = KEY, start: int = 0, stop: int = -1) -> bytes | None:
    data = await backend.get(entry_of(backend, key, start, stop), "infinity")
    return bytes(data) if isinstance(data, memoryview) else None


# -- what is stored is served, by all


async def test_what_one_process_stores_all_serve(mine: SharedBackend, theirs: SharedBackend) -> None:
    assert await get(theirs) is None
    assert await publish(mine)
    for backend in (mine, theirs):
        assert await get(backend) == await get(backend, KEY, 0) == data_of(KEY)[:SIZE]
        assert await get(backend, KEY, 5, 9) == data_of(KEY)[5:9]
        assert backend.parts(KEY).size("infinity") == SIZE
        now = backend.get_nowait(entry_of(backend), "infinity")
        assert isinstance(now, np.ndarray)
        assert bytes(now) == data_of(KEY)[:SIZE]
        # too old
        assert await backend.get(entry_of(backend), 0) is None
        assert backend.info()["total_size"] == SIZE
    assert mine.is_same_cache(SharedBackend(mine.directory, "other"))
    assert await get(SharedBackend(theirs.directory, "other")) is None
    assert mine.faults == theirs.faults == 0


async def test_an_entry_is_committed_before_its_file_has_its_name_and_gone_before_it_is_unlinked(
    mine: SharedBackend, root: Path
) -> None:
    path, seen, watched = str(root / "source" / KEY), list[tuple[str, int]](), [True]

    def rows() -> int:
        """What the index says to another program, which is refused while a transaction is under way."""
        (index,) = (root / META).glob("index-*.db")
        with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True, timeout=0)) as connection:
            return int(connection.execute("SELECT count(*) FROM entry WHERE key = ?", (f"source/{KEY}",)).fetchone()[0])

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watched and event in ("os.rename", "os.remove") and (path in args[:2] or "/trash/" in str(args[0])):
            seen.append((event, rows()))

    sys.addaudithook(watch)
    try:
        assert await publish(mine)
        # the first one may have found no folder
        assert set(seen) == {("os.rename", 1)}
        seen.clear()
        await mine.end_write(await mine.begin_write([KEY]), [None])
        assert ("os.remove", 0) in seen
        assert {count for _, count in seen} == {0}
    finally:
        watched.clear()


async def test_what_was_written_since_is_not_stored(mine: SharedBackend, theirs: SharedBackend) -> None:
    for backend in (mine, theirs):
        entry = entry_of(backend)
        await publish(backend)
        version = backend.write_version(KEY)
        begun = await mine.begin_write([KEY])
        assert await get(mine) is await get(theirs) is None
        during = backend.write_version(KEY)
        assert not await put(backend, entry, b"old", version)
        assert not await put(backend, entry, b"of either state", during)
        await mine.end_write(begun, [b"new"])
        assert not await put(backend, entry, b"old", version)
        assert not await put(backend, entry, b"of either state", during)
        assert await get(mine) == await get(theirs) == b"new"
        # a write to another key concerns no other
        version = backend.write_version(KEY)
        await mine.end_write(await mine.begin_write(["b/c/0"]), [None])
        assert await put(backend, entry, b"newer", version)


async def test_what_lies_beneath_a_deleted_prefix_is_gone(mine: SharedBackend, theirs: SharedBackend) -> None:
    for key in ("a/c/0", "a/c/1", "ab/c/0"):
        assert await publish(mine, key)
    version = theirs.write_version("a/c/1")
    begun = await theirs.begin_write([], beneath="a")
    assert [await get(mine, key) is None for key in ("a/c/0", "a/c/1", "ab/c/0")] == [True, True, False]
    await theirs.end_write(begun)
    assert not await put(theirs, entry_of(theirs, "a/c/1"), b"old", version)
    await mine.clear()
    assert await get(theirs, "ab/c/0") is None
    assert theirs.info()["total_keys"] == 0


async def test_parts_of_two_states_do_not_lie_side_by_side(mine: SharedBackend, theirs: SharedBackend) -> None:
    first, second, whole = entry_of(mine, KEY, 0, 10), entry_of(mine, KEY, 10, 20), entry_of(mine)
    assert await put(mine, first, b"0" * 10, mine.write_version(KEY), 'etag "1"')
    assert not await put(theirs, second, b"1" * 10, theirs.write_version(KEY), 'etag "2"')
    assert await put(theirs, second, b"0" * 10, theirs.write_version(KEY), 'etag "1"')
    assert theirs.parts(KEY).states == mine.parts(KEY).states == {'etag "1"'}
    assert [(piece.start, piece.stop) for piece in mine.parts(KEY).pieces] == [(0, 10), (10, 20)]
    assert await get(theirs, KEY, 12, 15) == b"000"
    # the whole object replaces its parts, if it is of their state
    assert not await publish(mine)
    assert await put(mine, whole, b"0" * 20, mine.write_version(KEY), 'etag "1"')
    assert list(theirs.parts(KEY).pieces) == []


# -- room


async def test_the_bound_holds_for_all_together(mine: SharedBackend, theirs: SharedBackend, root: Path) -> None:
    for number in range(15):
        for name, backend in (("mine", mine), ("theirs", theirs)):
            await publish(backend, f"{name}/c/{number}")
            totals = backend.directory.totals()
            on_disk = sum(path.stat().st_size for path in (root / "source").rglob("*") if path.is_file())
            assert on_disk <= totals.size + totals.lease + totals.tombstones <= BOUND == totals.max_size
    assert mine.evictions + theirs.evictions >= 20
    # the latest are there
    assert await get(theirs, "mine/c/14") is not None
    assert not await publish(mine, "large/c/0", size=BOUND + 1)
    assert await get(theirs, "large/c/0") is None
    theirs.directory.set_bound(3 * SIZE)
    assert theirs.directory.prepare()
    assert mine.directory.totals().size <= 3 * SIZE
    assert mine.bound == 3 * SIZE


async def test_stored_soon_is_stored_when_the_last_fetch_ends(mine: SharedBackend, theirs: SharedBackend) -> None:
    done: list[str] = []
    async with mine.fetching():
        for number in range(5):
            entry = entry_of(mine, f"a/c/{number}")
            data = data_of(entry.key)[:SIZE]
            version = mine.write_version(f"a/c/{number}")
            await mine.publish(entry, data, version, "", partial(done.append, entry.key))
    assert len(done) == 5
    assert [await get(theirs, f"a/c/{number}") is not None for number in range(5)] == [True] * 5
    await mine.stored("a/c/0")


# -- who fetches


async def test_one_process_fetches_and_the_others_only_ask_who(mine: SharedBackend, theirs: SharedBackend) -> None:
    release = mine.acquire(KEY, (0, END))
    assert callable(release)
    assert theirs.acquire(KEY, (0, END)) == (0, END)
    assert callable(theirs.acquire("a/c/1", (0, END)))
    release()
    assert callable(theirs.acquire(KEY, (0, END)))
    claimed = mine.acquire("shard", (100, 200))
    assert callable(claimed)
    assert theirs.acquire("shard", (150, 300)) == (150, 200)
    claimed()
    assert callable(theirs.acquire("shard", (150, 300)))


# -- documents, and what is absent

ARRAY = b'{"zarr_format": 3, "node_type": "array", "shape": [%d]}'


async def test_an_array_that_is_another_takes_its_chunks_along(mine: SharedBackend, theirs: SharedBackend) -> None:
    async def see(backend: SharedBackend, shape: int) -> None:
        document, entry = ARRAY % shape, entry_of(backend, "a/zarr.json")
        version = await backend.apply_document("a/zarr.json", document, backend.write_version("a/zarr.json"))
        assert await put(backend, entry, document, version)

    await see(mine, 1)
    for key in ("a/c/0", "b/c/0"):
        assert await publish(mine, key)
    await see(theirs, 1)
    assert await get(mine, "a/c/0") is not None
    before = mine.write_version("a/c/1")
    await see(theirs, 2)
    assert await get(mine, "a/c/0") is None
    assert await get(mine, "b/c/0") is not None
    assert not await put(mine, entry_of(mine, "a/c/1"), b"old", before)


async def test_an_absent_chunk_is_known_to_be_absent_until_it_is_written(
    mine: SharedBackend, theirs: SharedBackend
) -> None:
    async def is_missing(backend: SharedBackend, key: str = KEY, age: Any = "infinity") -> bool:
        return await backend.get(entry_of(backend, key), "infinity", age) is MISSING

    version = mine.write_version(KEY)
    assert not await is_missing(mine)
    async with mine.fetching():
        await mine.publish(entry_of(mine), None, version)
    assert mine.get_nowait(entry_of(mine), "infinity", "infinity", patient=True) is MISSING
    assert await is_missing(theirs)
    assert not await is_missing(theirs, "a/c/1")
    assert not await is_missing(mine, KEY, 0)
    await theirs.end_write(await theirs.begin_write([KEY]), [None])
    assert not await is_missing(mine)
    assert mine.get_nowait(entry_of(mine), "infinity", "infinity", patient=True) is None


# -- repair, and leaving


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"x" * SIZE), "damaged"),
        (lambda path: os.rename(path, path.with_name("9")), "missing"),
    ],
    ids=["unlinked", "overwritten", "renamed"],
)
async def test_an_audit_finds_what_is_wrong_and_mends_it(
    mine: SharedBackend, root: Path, harm: Callable[[Path], None], kind: str
) -> None:
    for number in range(3):
        assert await publish(mine, f"a/c/{number}")
    report = audit(mine.directory, repair=False)
    assert (report.ok, report.entries, report.size) == (True, 3, 3 * SIZE)
    harm(root / "source" / KEY)
    report = audit(mine.directory, repair=False)
    assert (report.ok, [finding.kind for finding in report.findings]) == (False, [kind])
    report = audit(mine.directory, repair=True)
    assert (report.ok, report.repaired, report.entries) == (True, True, 2)
    assert await get(mine) is None
    assert await publish(mine)


async def test_an_index_that_is_lost_is_made_anew_from_the_files(mine: SharedBackend, root: Path) -> None:
    for number in range(3):
        assert await publish(mine, f"a/c/{number}")
    mine.directory.close()
    (index,) = (root / META).glob("index-*.db")
    index.write_bytes(b"no index at all " * 1000)
    await mine.prepare()
    assert await get(mine) == data_of(KEY)[:SIZE]
    assert mine.info()["total_size"] == 3 * SIZE


async def test_a_directory_is_one_object_a_process_and_is_left_and_used_again(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    directory = open_directory(str(root), max_size=BOUND)
    backend = SharedBackend(directory, "source")
    assert not directory.is_made
    assert directory.totals() == (0, 0, 0, 0, BOUND)
    # before the directory is joined, there is no write version to store under
    assert not await publish(backend)
    await backend.prepare()
    assert await publish(backend)
    assert open_directory(str(link)) is directory
    cleanup_resources()
    assert not directory.is_prepared
    assert os.listdir(root / META / "tmp") == []
    await backend.prepare()
    assert await get(backend) == data_of(KEY)[:SIZE]
    # who comes last removes it
    other = new_directory(root)
    assert other.prepare()
    assert not directory.remove_if_last()
    other.close()
    assert directory.remove_if_last()
    assert not root.exists()


# -- no failure is the reader's


@pytest.mark.parametrize("how", ["a file", "no such place", "another format"])
async def test_a_directory_that_cannot_be_used_stores_nothing_and_fails_nothing(tmp_path: Path, how: str) -> None:
    root = tmp_path / "parent" / "cache"
    root.parent.mkdir()
    if how == "a file":
        root.write_text("not a cache")
    elif how == "another format":
        (root / META).mkdir(parents=True)
        root.chmod(0o700)
        (root / META).chmod(0o700)
        (root / META / "format").write_text("999")
    else:
        root.symlink_to("/proc/cache")
    before = sorted(path.name for path in root.parent.rglob("*"))
    directory = new_directory(root)
    backend = SharedBackend(directory, "source")
    assert not directory.prepare()
    assert not await publish(backend)
    assert await get(backend) is None
    assert backend.get_nowait(entry_of(backend), "infinity") is None
    release = backend.acquire(KEY, (0, END))
    assert callable(release)
    release()
    # the source is written whatever becomes of the cache
    await asyncio.wait_for(backend.end_write(await backend.begin_write([KEY]), [b"new"]), 60)
    assert await get(backend) is None
    assert backend.faults >= 1
    assert sorted(path.name for path in root.parent.rglob("*")) == before
    directory.close()
