"""What the cache logs: a line for each fetch, publish, eviction and invalidation, by the logger of its room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zarr
from sources import buffer
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

import xzcache

SIZE = 4096
PROTOTYPE = default_buffer_prototype()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """What was logged since the last call: loggers, and the first words of their messages."""
    with caplog.at_level(logging.DEBUG, "xzcache"):

        def take() -> list[tuple[str, str]]:
            found = [(record.name, record.getMessage()) for record in caplog.records if "xzcache" in record.name]
            caplog.clear()
            return [(name, message.partition(":")[0]) for name, message in found]

        yield take


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    group = zarr.create_array(store, name="a", shape=4 * SIZE, chunks=SIZE, dtype="u1", compressors=None, fill_value=0)
    group[:] = 7
    return store


def read(store: Store, key: str) -> int:
    """The size of a value; what was read is stored when this returns."""
    value = asyncio.run(store.get(key, PROTOTYPE))
    return 0 if value is None else len(value)


def caches(tmp_path: Path) -> dict[str, Path | MemoryStore]:
    return {"directory": tmp_path / "cache", "anystore": MemoryStore()}


@pytest.mark.parametrize("room", ["directory", "anystore"])
def test_each_step_says_one_line_and_a_hit_says_none(
    tmp_path: Path, source: LocalStore, room: str, lines: Callable[[], list[tuple[str, str]]]
) -> None:
    # room for one chunk and the document
    store = xzcache.CacheStore(source, cache_store=caches(tmp_path)[room], max_size=3 * SIZE // 2, namespace="n")
    # a bound this small is logged, once in a process
    lines()
    prefix = "n/" if room == "directory" else ""
    reading, storing = "xzcache.reading", f"xzcache.{room}"
    assert read(store, "a/c/0") == SIZE
    assert lines() == [(reading, "fetched n/a/c/0"), (storing, f"published {prefix}a/c/0")]
    for _ in range(3):
        assert read(store, "a/c/0") == SIZE
    assert lines() == []
    # there is no room for another one
    assert read(store, "a/c/1") == SIZE
    said = lines()
    assert said.count((reading, "fetched n/a/c/1")) == 1
    assert [name for name, message in said if message.startswith(f"evicted {prefix}a/c/0")] == [storing]
    assert said.count((storing, f"published {prefix}a/c/1")) == 1
    assert len(said) == 3
    asyncio.run(store.set("a/c/1", buffer(b"x" * SIZE)))
    # the new value is published with the second invalidation, or after it
    assert sorted(lines()) == [(storing, f"invalidated {prefix}a/c/1")] * 2 + [(storing, f"published {prefix}a/c/1")]
    asyncio.run(store.clear_cache())
    assert len(lines()) == 1


def test_byte_ranges(tmp_path: Path, source: LocalStore, lines: Callable[[], list[tuple[str, str]]]) -> None:
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache", namespace="n")

    async def ranges() -> None:
        wanted = [RangeByteRequest(0, 100), RangeByteRequest(100, 200)]
        async for _ in store.get_ranges("a/c/0", wanted, prototype=PROTOTYPE, max_gap_bytes=0):
            pass

    asyncio.run(ranges())
    said = [(name, message) for name, message in lines() if name == "xzcache.reading"]
    assert [message.split("[")[0] for _, message in said] == ["fetched n/a/c/0"]
    asyncio.run(ranges())
    assert lines() == []


def test_what_a_document_shows_to_have_changed(
    tmp_path: Path, source: LocalStore, lines: Callable[[], list[tuple[str, str]]]
) -> None:
    only = LocalStore(source.root, read_only=True)
    old = xzcache.CacheStore(only, cache_store=tmp_path / "cache", namespace="n")
    zarr.open_array(old, path="a", mode="r")[:]
    assert ("xzcache.directory", "published n/a/zarr.json") in lines()
    zarr.open_array(source, path="a").resize((2 * SIZE,))
    lines()
    new = xzcache.CacheStore(only, cache_store=tmp_path / "cache", namespace="n")
    assert zarr.open_array(new, path="a", mode="r").shape == (2 * SIZE,)
    assert ("xzcache.directory", "invalidated n/a/") in lines()


def test_nothing_is_logged_by_default(
    tmp_path: Path, source: LocalStore, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    assert read(store, "a/c/0") == SIZE
    assert not [record for record in caplog.records if record.name.startswith("xzcache")]
    assert capfd.readouterr() == ("", "")
