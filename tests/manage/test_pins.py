"""`xzcache.pin` and `unpin`: what is pinned outlives eviction, of any policy and any process, and is counted right."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from processes import Connection, audit, index_path, opened_index, run
from zarr.storage import LocalStore

import xzcache

SIZE, CHUNKS = 1000, 10
BOUND = 40 * SIZE


def make(path: Path, *arrays: str, chunks: int = CHUNKS) -> None:
    group = zarr.create_group(LocalStore(path))
    for name in arrays:
        array = group.create_array(name, shape=chunks * SIZE, chunks=SIZE, dtype="u1", compressors=None)
        array[:] = np.arange(chunks * SIZE) % 251 + 1


def read(tmp_path: Path, name: str, *arrays: str, policy: str = "lru", part: int = CHUNKS, **options: Any) -> None:
    store = xzcache.CacheStore(
        tmp_path / name, cache_store=tmp_path / "cache", read_only=True, policy=policy, max_size=BOUND, **options
    )
    for array in arrays:
        zarr.open_array(store, path=array, mode="r", zarr_format=3)[: part * SIZE]
    store.cache_info()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of 10 chunks of each of two arrays of a source; another source has more chunks than fit."""
    make(tmp_path / "one.zarr", "a", "b")
    make(tmp_path / "much.zarr", "x", chunks=100)
    read(tmp_path, "one.zarr", "a", "b")
    return tmp_path / "cache"


def cached(cache: Path, source: str = "one.zarr") -> dict[str, int]:
    try:
        return {array.name: array.cached for array in xzcache.ls(source, cache)}
    except LookupError:
        return {}


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_eviction_passes_over_what_is_pinned(cache: Path, tmp_path: Path, policy: str) -> None:
    assert not len(xzcache.pin("one.zarr", "a", directory=cache)) - 1
    for _ in range(3):
        read(tmp_path, "much.zarr", "x", part=100, policy=policy)
    assert cached(cache) == {"a": 10}
    found = xzcache.info(cache)
    assert (found.pins, found.used <= BOUND) == (1, True)
    # with the document of the array, which is needed to open it
    assert 10 * SIZE < found.pinned < 11 * SIZE
    assert [array.pinned for array in xzcache.ls("one.zarr", cache)] == [10 * SIZE]
    assert [source.pinned > 0 for source in xzcache.ls(directory=cache)] == [False, True]
    assert xzcache.unpin("one.zarr", "a", directory=cache) == 1
    read(tmp_path, "much.zarr", "x", part=100, policy=policy)
    read(tmp_path, "much.zarr", "x", part=100, policy=policy)
    assert cached(cache).get("a", 0) == 0
    assert xzcache.info(cache).pinned == 0
    xzcache.cleanup_resources()
    audit(str(cache))


def test_what_is_read_later_is_pinned_too(cache: Path, tmp_path: Path) -> None:
    xzcache.clear("one.zarr", directory=cache)
    with pytest.raises(LookupError, match="no source"):
        xzcache.pin("one.zarr", directory=cache)
    read(tmp_path, "one.zarr", "a", part=1)
    xzcache.pin(tmp_path / "one.zarr", directory=cache)
    # by another process
    run(_read_all, str(tmp_path))
    read(tmp_path, "much.zarr", "x", part=100)
    assert cached(cache) == {"a": 10, "b": 10}


def _read_all(link: Connection, tmp_path: str) -> None:
    read(Path(tmp_path), "one.zarr", "a", "b")


def test_pins_end(cache: Path, tmp_path: Path) -> None:
    xzcache.pin("one.zarr", "a", duration="1d", directory=cache)
    xzcache.pin("one.zarr", "b", duration=timedelta(days=2), directory=cache)
    # as if a day and a half had gone by
    with opened_index(str(cache)) as index, index:
        index.execute("UPDATE pin SET until = until - ?", (int(1.5 * 86400e9),))
    assert xzcache.info(cache).pins == 1
    xzcache.cleanup_resources()
    read(tmp_path, "much.zarr", "x", part=100)
    assert cached(cache) == {"b": 10}
    assert xzcache.pin("one.zarr", duration=3600.0, directory=cache)[0].until is not None


def test_a_share_of_the_bound(cache: Path, tmp_path: Path) -> None:
    read(tmp_path, "much.zarr", "x", part=19)
    xzcache.pin("one.zarr", directory=cache)
    with pytest.raises(ValueError, match=r"has 19\.\d kB and 19\.\d kB are pinned already, .* 32 kB, 80%"):
        xzcache.pin("much.zarr", directory=cache)
    assert xzcache.info(cache).pins == 1
    xzcache.unpin(directory=cache)
    xzcache.pin("much.zarr", directory=cache)
    # more of it than may be pinned is evicted like all else
    read(tmp_path, "much.zarr", "x", part=100)
    found = xzcache.info(cache)
    assert 0.7 * BOUND < found.pinned <= 0.8 * BOUND
    assert found.used <= BOUND
    with pytest.raises(ValueError, match=r"are pinned, .*give \d+"):
        xzcache.resize(20_000, cache)
    # whoever opens the cache with a lower bound has the last word
    store = xzcache.CacheStore(tmp_path / "one.zarr", cache_store=cache, read_only=True, max_size=10 * SIZE)
    zarr.open_array(store, path="a", mode="r", zarr_format=3)[:]
    store.cache_info()
    assert xzcache.info(cache).used <= 10 * SIZE
    xzcache.cleanup_resources()
    audit(str(cache))


def test_clearing(cache: Path) -> None:
    xzcache.pin("one.zarr", "a", directory=cache)
    assert xzcache.clear(older_than=0, directory=cache, dry_run=True).entries == 11
    assert xzcache.clear(older_than=0, directory=cache).entries == 11
    assert cached(cache) == {"a": 10}
    assert xzcache.clear("one.zarr", directory=cache).entries == 11
    found = xzcache.info(cache)
    assert (found.entries, found.pins, found.pinned) == (0, 1, 0)


def test_a_rebuilt_index_keeps_pins(cache: Path, tmp_path: Path) -> None:
    xzcache.pin("one.zarr", "a", directory=cache)
    xzcache.cleanup_resources()
    before = index_path(str(cache))
    with closing(sqlite3.connect(before)) as index, index:
        index.execute("DELETE FROM total")
    assert xzcache.check(cache, repair=True).root
    read(tmp_path, "much.zarr", "x", part=100)
    assert index_path(str(cache)) != before
    assert [source.entries for source in xzcache.ls(directory=cache)] == [29, 11]
    assert xzcache.info(cache).pins == 1
    assert xzcache.info(cache).pinned > 10 * SIZE


def test_an_index_without_pins_is_as_before(cache: Path) -> None:
    def tables() -> set[str]:
        with opened_index(str(cache)) as index:
            return {name for (name,) in index.execute("SELECT name FROM sqlite_master")}

    before = tables()
    xzcache.pin("one.zarr", "a", directory=cache)
    xzcache.pin("one.zarr", directory=cache)
    assert tables() > before
    assert xzcache.unpin("one.zarr", directory=cache) == 2
    assert tables() == before


def test_while_others_read_and_write(cache: Path, tmp_path: Path) -> None:
    done = threading.Event()
    errors: list[BaseException] = []

    def churn() -> None:
        try:
            while not done.is_set():
                read(tmp_path, "much.zarr", "x", part=30)
                read(tmp_path, "one.zarr", "b")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(15):
            xzcache.pin("one.zarr", directory=cache) if cached(cache) else read(tmp_path, "one.zarr", "a")
            xzcache.unpin(directory=cache)
    finally:
        done.set()
        thread.join()
    assert not errors
    assert xzcache.info(cache).pinned == 0
    xzcache.cleanup_resources()
    audit(str(cache))


def test_warming_pins(cache: Path, tmp_path: Path) -> None:
    assert xzcache.warm(tmp_path / "one.zarr", "a", pin="7d", directory=cache).ok
    read(tmp_path, "much.zarr", "x", part=100)
    assert cached(cache) == {"a": 10}
    with pytest.raises(ValueError, match=r"about 100 kB .* pins may take 80% of it"):
        xzcache.warm(tmp_path / "much.zarr", pin=True, directory=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("two.zarr",), "no source"),
        (("one.zarr", "aa"), "did you mean 'a'"),
        (("one.zarr", "zzz"), "nothing is cached of 'zzz' .*'a', 'b'"),
        ((3,), "source=3 is not accepted"),
    ],
)
def test_bad_input(cache: Path, arguments: Any, message: str) -> None:
    with pytest.raises((LookupError, TypeError), match=message):
        xzcache.pin(*arguments, directory=cache)
    with pytest.raises((LookupError, TypeError)):
        xzcache.unpin(*arguments, directory=cache)
    with pytest.raises(ValueError, match="duration='7' is not accepted"):
        xzcache.pin("one.zarr", duration="7", directory=cache)
