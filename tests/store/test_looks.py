"""What a store looks like in a console and in a notebook."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
import zarr
from pages import HOSTILE, Page
from servers import nobody, tidy
from sources import buffer, cached, memory_source, read, read_now, write_now
from zarr.storage import FsspecStore, LocalStore, MemoryStore

import xzcache

__all__ = ["nobody", "tidy"]

SECRETS = {"key": "AKIAQ7WORDOFACCESS", "secret": "s3cr3t/Very+Secret", "token": "tok3n-of-a-Session"}


async def used(kind: str, tmp_path: Path, **options: Any) -> xzcache.CacheStore:
    """A store that read 1000 bytes from its source, and 2000 from its cache."""
    source = memory_source()
    await source.set("c/0", buffer(bytes(1000)))
    store = cached(kind, source, tmp_path, **options)
    for _ in range(3):
        await read(store, "c/0")
    return store


# -- in a console


async def test_one_line_that_never_changes(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await source.set("c/0", buffer(bytes(1000)))
    store = cached(cache_kind, source, tmp_path, max_size=4000)
    before = repr(store), str(store)
    cache = str(tmp_path / "cache") if cache_kind == "directory" else "MemoryStore"
    source_name = store.source.label
    shown = f"CacheStore(store={source_name!r}, cache_store={cache!r}, max_size='4 kB')"
    assert before == (shown, f"xzcache({source_name})")
    for _ in range(3):
        await read(store, "c/0")
    assert (repr(store), str(store)) == before
    copy = store.with_read_only(True)
    assert (repr(copy), str(copy)) == before


def test_a_short_name(tmp_path: Path) -> None:
    store = xzcache.CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache")
    assert str(store) == f"xzcache({tmp_path / 'source'})"
    inner = xzcache.LockedLocalStore(tmp_path / "cache")
    assert str(inner) == f"file://{tmp_path / 'cache'}"
    assert repr(inner) == f"LockedLocalStore('file://{tmp_path / 'cache'}')"


@pytest.mark.parametrize("name", ["plain", "a\nb", "a\rb\x1b[2J", "é \u2028 \u202e"])
def test_a_message_of_zarrs_is_one_sentence(name: str, tmp_path: Path) -> None:
    for store in (
        xzcache.CacheStore(tmp_path / name, cache_store=tmp_path / f"cache {name}"),
        xzcache.LockedLocalStore(tmp_path / f"other {name}"),
    ):
        zarr.create_array(store, name="x", shape=4, dtype="i4")
        with pytest.raises(zarr.errors.ContainsArrayError) as raised:
            zarr.create_array(store, name="x", shape=4, dtype="i4")
        for text in (str(raised.value), repr(store), str(store)):
            assert text.isprintable()


async def test_nothing_is_waited_for(tmp_path: Path) -> None:
    """While another process holds the lock of the index, and entries wait for it to be stored."""
    source = memory_source()
    for number in range(4):
        await source.set(f"c/{number}", buffer(bytes(1000)))
    store = cached("directory", source, tmp_path)
    await read(store, "c/0")
    used_before = Page(store._repr_html_()).row("used")
    assert used_before == "1 kB of 10.7 GB, 1 kB by this source"
    with open(tmp_path / "cache" / ".xzcache" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reading = asyncio.create_task(read(store, "c/1"))
        await asyncio.sleep(0)
        begun = time.perf_counter()
        for _ in range(100):
            repr(store)
            str(store)
        taken = time.perf_counter() - begun
        page = Page(store._repr_html_())
        taken_by_table = time.perf_counter() - begun - taken
    assert await reading == bytes(1000)
    assert page.row("used") in (used_before, "not known at the moment")
    # the lock would be waited for for five seconds
    assert taken < 4
    assert taken_by_table < 4


# -- in a notebook


async def test_a_table_for_notebooks(cache_kind: str, tmp_path: Path) -> None:
    store = await used(cache_kind, tmp_path, max_size=4000)
    page = Page(store._repr_html_())
    assert page.row("source") == store.source.label
    assert page.row("cache") == (str(tmp_path / "cache") if cache_kind == "directory" else "MemoryStore")
    assert page.row("used") == "1 kB of 4 kB, 1 kB by this source"
    assert page.row("hits") == "2 (67% of reads), 2 kB saved"
    assert page.row("misses") == "1, 1 kB from the source"
    assert page.filled == "25.0"
    assert "CacheStore" in page.text


@pytest.mark.parametrize("size", [0, 1000, 10**15])
async def test_the_bar_fits(size: int, cache_kind: str, tmp_path: Path) -> None:
    store = await used(cache_kind, tmp_path, max_size=size)
    page = Page(store._repr_html_())
    assert page.filled in ((None, "0.0") if size != 1000 else ("100.0",))


async def test_two_sources_in_one_directory(tmp_path: Path) -> None:
    one = await used("directory", tmp_path, max_size=4000)
    other = await used("directory", tmp_path)
    for store in (one, other):
        page = Page(store._repr_html_())
        assert page.row("used") == "2 kB of 4 kB, 1 kB by this source"
        assert page.filled == "50.0"
    assert one.source.label in repr(one)


def test_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / HOSTILE)
    write_now(source, "k", b"1")
    store = xzcache.CacheStore(source, cache_store=tmp_path / f"cache {HOSTILE}")
    assert read_now(store, "k") == b"1"
    page = Page(store._repr_html_())
    assert page.tags <= {"div", "b", "span"}
    assert page.row("source") == str(tmp_path / HOSTILE)
    assert page.row("cache") == str(tmp_path / f"cache {HOSTILE}")


# -- what looking does not do


@pytest.mark.parametrize("bound", [{}, {"max_size": 4000}, {"max_size": None}])
def test_looking_makes_nothing(bound: dict[str, Any], tmp_path: Path) -> None:
    store = xzcache.CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", **bound)
    page = Page(store._repr_html_())
    assert page.row("used") == "not opened yet"
    assert page.row("hits").startswith("0 ")
    assert page.row("misses").startswith("0, ")
    assert page.filled is None
    str(store)
    repr(store)
    assert os.listdir(tmp_path) == []


async def test_looking_counts_as_no_read(cache_kind: str, tmp_path: Path) -> None:
    store = await used(cache_kind, tmp_path)
    before = store.cache_stats(), list(store._store.calls)
    for _ in range(2):
        repr(store)
        store._repr_html_()
    assert (store.cache_stats(), store._store.calls) == before


def test_a_directory_that_cannot_be_made_is_looked_at_all_the_same(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    write_now(source, "k", b"1")
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert read_now(store, "k") == b"1"
    repr(store)
    Page(store._repr_html_())


# -- secrets


@pytest.mark.usefixtures("tidy", "nobody")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_credentials(tmp_path: Path) -> None:
    where = {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-east-1"}
    stores = [
        xzcache.CacheStore(url, storage_options=options, upstream=upstream, cache_store=tmp_path / "cache")
        for url, options, upstream in (
            ("s3://bucket/data.zarr", {**SECRETS, "client_kwargs": where}, "obstore"),
            ("s3://bucket/data.zarr", {**SECRETS, "client_kwargs": where}, "fsspec"),
            (f"http://user:{SECRETS['token']}@127.0.0.1:9/data.zarr?sig={SECRETS['token']}", None, "fsspec"),
        )
    ]
    stores.append(
        xzcache.CacheStore(
            FsspecStore.from_url(
                "http://127.0.0.1:9/data.zarr",
                storage_options={"client_kwargs": {"headers": {"Authorization": SECRETS["token"]}}},
            ),
            cache_store=MemoryStore(),
        )
    )
    for store in stores:
        for text in (repr(store), str(store), store._repr_html_(), str(store.path)):
            assert not [secret for secret in SECRETS.values() if secret in text]
        assert "data.zarr" in repr(store)
        assert "data.zarr" in Page(store._repr_html_()).row("source")
