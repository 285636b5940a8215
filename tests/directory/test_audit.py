"""`check()` finds what is wrong with a cache directory, and repairs it; and finds nothing where nothing is."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore

import xzcache

KEYS = [f"a/c/{number}" for number in range(6)]
PROTOTYPE = default_buffer_prototype()


def value(key: str) -> bytes:
    return key.encode() * 300


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A directory that holds six entries, one of them under a hash, and a file of the user's; no process uses it."""
    root = tmp_path / "cache"
    (root / "source" / "a" / "taken").mkdir(parents=True)
    (root / "source" / "a" / "taken" / "notes").write_text("the user's own")
    for key in [*KEYS, "a/taken"]:
        path = tmp_path / "origin" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key))
    store = xzcache.CacheStore(LocalStore(tmp_path / "origin"), cache_store=root, namespace="source")

    async def read() -> None:
        for key in [*KEYS, "a/taken"]:
            assert await store.get(key, PROTOTYPE) is not None

    asyncio.run(read())
    store.cache_info()
    store.close()
    xzcache.cleanup_resources()
    return root


def index_of(root: Path) -> Path:
    (path,) = (root / ".xzcache").glob("index-*.db")
    return path


def change_index(root: Path, statement: str) -> None:
    with sqlite3.connect(index_of(root)) as connection:
        connection.execute(statement)
    connection.close()


def kinds(report: object) -> set[str]:
    return {finding.kind for finding in report.findings}  # type: ignore[attr-defined]


def test_nothing_is_wrong(cache: Path) -> None:
    report = xzcache.LockedLocalStore(cache).check()
    assert report.ok
    assert report.findings == ()
    assert report.entries == len(KEYS) + 1
    assert report.size == sum(len(value(key)) for key in [*KEYS, "a/taken"])
    assert "nothing is wrong" in str(report)


def flip(root: Path) -> None:
    path = root / "source" / KEYS[0]
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def cut(root: Path) -> None:
    os.truncate(root / "source" / KEYS[1], 5)


def lose(root: Path) -> None:
    (root / "source" / KEYS[2]).unlink()


def put_a_directory(root: Path) -> None:
    lose(root)
    (root / "source" / KEYS[2]).mkdir()


def put_a_link_in_a_circle(root: Path) -> None:
    lose(root)
    (root / "source" / KEYS[2]).symlink_to(root / "source" / KEYS[2])


def strip_the_stamp(root: Path) -> None:
    os.removexattr(root / "source" / KEYS[0], "user.xzcache")


def exchange(root: Path) -> None:
    """The file of one entry, stamp and all, in the place of another."""
    shutil.copy2(root / "source" / KEYS[0], root / "source" / KEYS[1])


def forget_a_row(root: Path) -> None:
    change_index(root, f"DELETE FROM entry WHERE key = 'source/{KEYS[0]}'")


def forget_a_hashed_row(root: Path) -> None:
    change_index(root, "DELETE FROM entry WHERE odd = 1")


def litter_in_ranges(root: Path) -> None:
    place = root / ".xzcache" / "ranges" / "ab" / "abcd"
    place.mkdir(parents=True)
    (place / "0_100").write_bytes(bytes(100))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (flip, "damaged"),
    (cut, "damaged"),
    (lose, "missing"),
    (put_a_directory, "missing"),
    (put_a_link_in_a_circle, "missing"),
    (strip_the_stamp, "damaged"),
    (exchange, "damaged"),
    (forget_a_row, "orphan"),
    (forget_a_hashed_row, "orphan"),
    (litter_in_ranges, "orphan"),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_is_found_and_repaired(cache: Path, fault: Callable[[Path], None], kind: str) -> None:
    fault(cache)
    store = xzcache.LockedLocalStore(cache)
    report = store.check()
    assert not report.ok
    assert kinds(report) == {kind}
    # looking repairs nothing
    assert kinds(store.check()) == {kind}
    repaired = store.check(repair=True)
    assert repaired.ok
    assert repaired.repaired
    assert kinds(repaired) == {kind}
    assert "repaired" in str(repaired)
    assert store.check().findings == ()
    assert (cache / "source" / "a" / "taken" / "notes").read_text() == "the user's own"


def test_a_link_in_a_circle_is_no_file_to_anyone(cache: Path) -> None:
    """The link lies beside the entries, as a user might leave one, and then the index is lost too."""
    link = cache / "source" / "a" / "circle"
    link.symlink_to(link)
    store = xzcache.LockedLocalStore(cache)
    assert store.check().findings == ()

    async def listed() -> set[str]:
        return {key async for key in store.list()}

    assert asyncio.run(listed()) == {f"source/{key}" for key in [*KEYS, "a/taken"]} | {"source/a/taken/notes"}
    xzcache.cleanup_resources()
    index_of(cache).unlink()
    store = xzcache.LockedLocalStore(cache)
    assert store.check().findings == ()
    assert store.check().entries == len(KEYS) + 1
    asyncio.run(store.delete_dir("source/a"))
    assert store.check().entries == 0
    assert link.is_symlink()


def test_wrong_sums_are_found_in_a_directory_that_is_in_use(cache: Path) -> None:
    store = xzcache.LockedLocalStore(cache)
    assert store.check().ok
    change_index(cache, "UPDATE total SET bytes = bytes + 7, lease = 3")
    report = store.check()
    assert kinds(report) == {"totals"}
    assert {finding.where for finding in report.findings} == {"bytes", "leases"}
    assert store.check(repair=True).repaired
    assert store.check().findings == ()


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    report = xzcache.LockedLocalStore(tmp_path / "none").check(repair=True)
    assert (report.entries, report.findings) == (0, ())
    assert not (tmp_path / "none").exists()


def test_what_others_do_meanwhile_is_no_finding(cache: Path) -> None:
    """A writer stores, replaces and deletes while the audit goes round."""
    store = xzcache.LockedLocalStore(cache)

    async def write(rounds: int) -> None:
        for number in range(rounds):
            await store.set(f"b/c/{number % 7}", cpu.Buffer.from_bytes(bytes([number % 251]) * 2000))
            await store.delete(f"b/c/{(number + 3) % 7}")

    async def both() -> list[str]:
        writing = asyncio.create_task(write(150))
        found = []
        while not writing.done():
            report = await asyncio.to_thread(store.check)
            found += [str(finding) for finding in report.findings]
        await writing
        return found

    assert asyncio.run(both()) == []


def test_bad_input(cache: Path) -> None:
    with pytest.raises(TypeError, match="repair"):
        xzcache.LockedLocalStore(cache).check(repair="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"read-only|read only"):
        xzcache.LockedLocalStore(cache, read_only=True).check(repair=True)
