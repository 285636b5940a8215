"""The contract of a cache with reading, on three of them: a directory, another Zarr store, and one of the tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clocks import Clock
from memory_cache import MemoryCache
from processes import Child
from sources import local_source, memory_source

import xzcache
from xzcache.model import END, MISSING, Backend, Entry

KEY = "x/c/0"
FOREVER: Any = "infinity"


@pytest.fixture(params=["directory", "store", "memory"])
async def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "memory":
        return MemoryCache()
    kept: Any = tmp_path / "cache" if request.param == "directory" else memory_source()
    backend: Backend = xzcache.CacheStore(local_source(tmp_path), cache_store=kept)._reads.backend
    await backend.prepare()
    return backend


def entry(cache: Backend, start: int = 0, stop: int = END, key: str = KEY) -> Entry:
    return Entry(cache.prefix + key, start, stop)


async def put(
    cache: Backend, data: bytes | None, version: Any, *span: int, validator: str = "", key: str = KEY
) -> None:
    async with cache.fetching():
        await cache.publish(entry(cache, *span, key=key), data, version, validator)
    await cache.stored(key)


async def got(cache: Backend, *span: int, max_age: Any = FOREVER, key: str = KEY) -> bytes | None:
    data = await cache.get(entry(cache, *span, key=key), max_age)
    assert data is not MISSING
    return None if data is None else bytes(data)


# -- looking up


async def test_what_is_published_is_found_also_in_parts(cache: Backend) -> None:
    assert await got(cache) is None
    await put(cache, b"0123456789", cache.write_version(KEY), validator="etag a")
    assert await got(cache) == b"0123456789"
    assert [await got(cache, 2, 5), await got(cache, 7), await got(cache, -3)] == [b"234", b"789", b"789"]
    parts = cache.parts(KEY)
    assert (parts.states, parts.validator(entry(cache)), parts.size(FOREVER)) == ({"etag a"}, "etag a", 10)
    assert list(parts.pieces) == []


async def test_pieces_are_listed_and_serve_what_lies_within(cache: Backend) -> None:
    version = cache.write_version(KEY)
    await put(cache, b"2345", version, 2, 6, validator="etag a")
    await put(cache, b"89", version, -2, END, validator="etag a")
    parts = cache.parts(KEY)
    assert list(parts.pieces) == [entry(cache, 2, 6)]
    assert parts.pieces.suffixes == [-2]
    assert (parts.states, parts.size(FOREVER)) == ({"etag a"}, None)
    assert [await got(cache, 3, 5), await got(cache, 0, 4), await got(cache, -1), await got(cache)] == [
        b"34",
        None,
        b"9",
        None,
    ]


@pytest.mark.parametrize("span", [(), (2, 5), (-3, END)])
async def test_nothing_older_than_asked_for_is_found(
    span: tuple[int, ...], cache: Backend, clock: Clock, tmp_path: Path
) -> None:
    await put(cache, b"234", cache.write_version(KEY), *span, validator="etag a")
    assert await got(cache, *span, max_age=500) == b"234"
    clock.move(600, tmp_path / "cache")
    assert await got(cache, *span, max_age=0) is None
    assert await got(cache, *span, max_age=500) is None
    assert await got(cache, *span, max_age=1000) == b"234"
    assert cache.parts(KEY).size(0) is None


async def test_a_lookup_that_does_not_wait_finds_the_same_or_nothing(cache: Backend) -> None:
    await put(cache, b"0123456789", cache.write_version(KEY))
    assert await got(cache) == b"0123456789"
    for patient in (False, True):
        found = cache.get_nowait(entry(cache), FOREVER, patient=patient)
        assert found is None or bytes(found) == b"0123456789"  # type: ignore[arg-type]
        assert cache.get_nowait(entry(cache), 0, patient=patient) is None
        assert cache.get_nowait(entry(cache, key="x/c/1"), FOREVER, patient=patient) is None


async def test_an_absence_is_found_until_it_is_old_or_the_key_is_written(cache: Backend, clock: Clock) -> None:
    assert await cache.get(entry(cache), FOREVER, FOREVER) is None
    await put(cache, None, cache.write_version(KEY))
    assert await cache.get(entry(cache), FOREVER, FOREVER) is MISSING
    assert await cache.get(entry(cache, 2, 5), FOREVER, 1000) is MISSING
    assert await cache.get(entry(cache), FOREVER) is None
    clock.wall += 2000
    assert await cache.get(entry(cache), FOREVER, 1000) is None
    assert await cache.get(entry(cache), FOREVER, 3000) is MISSING
    await cache.end_write(await cache.begin_write([KEY]))
    assert await cache.get(entry(cache), FOREVER, FOREVER) is None


async def test_an_absence_from_before_a_write_is_not_recorded(cache: Backend) -> None:
    version = cache.write_version(KEY)
    await cache.invalidate(KEY, None)
    await put(cache, None, version)
    assert await cache.get(entry(cache), FOREVER, FOREVER) is None


# -- publishing


@pytest.mark.parametrize(
    "write",
    [
        lambda cache: cache.invalidate(KEY, None),
        lambda cache: write(cache, [KEY]),
        lambda cache: write(cache, [], "x"),
        lambda cache: write(cache, ["x"], "x"),
        lambda cache: write(cache, [], ""),
    ],
    ids=["invalidate", "write", "delete beneath", "delete", "clear"],
)
@pytest.mark.parametrize("span", [(), (2, 5)])
async def test_a_write_hides_what_was_cached_and_what_is_published_under_an_old_version(
    write: Callable[[Backend], Any], span: tuple[int, ...], cache: Backend
) -> None:
    version = cache.write_version(KEY)
    await put(cache, b"old", version, *span, validator="etag a")
    assert await got(cache, *span) == b"old"
    await write(cache)
    assert await got(cache, *span) is None
    assert cache.parts(KEY).states == set()
    await put(cache, b"old", version, *span, validator="etag a")
    assert await got(cache, *span) is None
    await put(cache, b"new", cache.write_version(KEY), *span, validator="etag b")
    assert await got(cache, *span) == b"new"


async def write(cache: Backend, keys: list[str], beneath: str | None = None) -> None:
    await cache.end_write(await cache.begin_write(keys, beneath))


@pytest.mark.parametrize(("keys", "beneath"), [([KEY], None), ([], "x"), (["x"], "x"), ([], "")])
async def test_while_a_write_is_under_way_nothing_is_stored(
    keys: list[str], beneath: str | None, cache: Backend
) -> None:
    begun = await cache.begin_write(keys, beneath)
    await put(cache, b"either", cache.write_version(KEY))
    assert await got(cache) is None
    await put(cache, None, cache.write_version(KEY))
    await cache.end_write(begun, [None] * len(keys))
    assert await cache.get(entry(cache), FOREVER, FOREVER) is None


async def test_a_write_leaves_other_keys_alone(cache: Backend) -> None:
    for key in ("x/c/0", "x/c/1", "xy/c/0", "x"):
        await put(cache, key.encode(), cache.write_version(key), key=key)
    await write(cache, ["x/c/1"])
    assert [await got(cache, key=key) for key in ("x/c/0", "x/c/1", "xy/c/0")] == [b"x/c/0", None, b"xy/c/0"]
    await write(cache, [], "x")
    assert [await got(cache, key=key) for key in ("x/c/0", "xy/c/0")] == [None, b"xy/c/0"]


async def test_a_value_is_stored_when_its_write_ends_unless_others_wrote(cache: Backend) -> None:
    await cache.end_write(await cache.begin_write([KEY, "x/c/1"]), [b"mine", None])
    assert await got(cache) == b"mine"
    one, other = await cache.begin_write([KEY]), await cache.begin_write([KEY])
    await cache.end_write(one, [b"one"])
    await cache.end_write(other, [b"other"])
    assert await got(cache) is None


async def test_who_invalidates_gets_a_version_unless_others_wrote(cache: Backend) -> None:
    version = cache.write_version(KEY)
    new = await cache.invalidate(KEY, version)
    assert new is not None
    await put(cache, b"new", new)
    assert await got(cache) == b"new"
    assert await cache.invalidate(KEY, version) is None


async def test_two_states_are_not_cached_side_by_side(cache: Backend) -> None:
    version = cache.write_version(KEY)
    await put(cache, b"01", version, 0, 2, validator="etag a")
    await put(cache, b"23", version, 2, 4, validator="etag b")
    await put(cache, b"45", version, 4, 6)
    assert (cache.parts(KEY).states, len(list(cache.parts(KEY).pieces))) == ({"etag a"}, 1)
    await put(cache, b"0123", version, validator="etag b")
    assert await got(cache) is None
    await put(cache, b"0123", version, validator="etag a")
    assert await got(cache) == b"0123"


@pytest.mark.parametrize("data", [b"data", None])
@pytest.mark.parametrize("is_current", [True, False, None])
async def test_done_is_called_once_whatever_becomes_of_an_entry(
    data: bytes | None, is_current: bool | None, cache: Backend
) -> None:
    version = None if is_current is None else cache.write_version(KEY)
    if is_current is False:
        await cache.invalidate(KEY, None)
    calls: list[None] = []
    async with cache.fetching():
        await cache.publish(entry(cache), data, version, "etag a", lambda: calls.append(None))
    assert calls == [None]
    assert (await got(cache) is not None) == bool(data and is_current)


async def test_a_confirmed_entry_is_young_again(cache: Backend, clock: Clock, tmp_path: Path) -> None:
    await put(cache, b"data", cache.write_version(KEY))
    clock.move(600, tmp_path / "cache")
    assert await got(cache, max_age=500) is None
    await cache.mark_validated(entry(cache), 500)
    assert await got(cache, max_age=500) == b"data"
    assert cache.parts(KEY).size(500) == 4


# -- locks


@pytest.mark.parametrize("span", [(0, END), (0, 5), (7, END), (-5, END)])
async def test_a_lock_is_free_again_after_its_release(span: tuple[int, int], cache: Backend) -> None:
    for _ in range(2):
        release = cache.acquire(KEY, span)
        assert not isinstance(release, tuple)
        release()


def try_locks(link: Any, root: str, namespace: str, spans: list[tuple[int, int]]) -> list[Any]:
    async def attempt() -> list[Any]:
        store = xzcache.CacheStore(memory_source(), cache_store=root, namespace=namespace)
        backend = store._reads.backend
        await backend.prepare()
        answers = [backend.acquire(KEY, span) for span in spans]
        return [answer if isinstance(answer, tuple) else None for answer in answers]

    return asyncio.run(attempt())


@pytest.mark.parametrize(
    ("held", "answers"),
    [
        ((0, END), {(0, END): (0, END), (5, 9): (5, 9), (5, END): (5, END), (-5, END): None}),
        ((5, 9), {(0, 5): None, (9, END): None, (6, 20): (6, 9)}),
        ((5, 9), {(0, END): (5, 9)}),
        ((5, END), {(0, END): (5, END)}),
        ((-5, END), {(-5, END): (-5, END), (-6, END): None, (0, END): None}),
    ],
)
async def test_a_lock_keeps_other_processes_out(
    held: tuple[int, int], answers: dict[tuple[int, int], Any], tmp_path: Path
) -> None:
    store = xzcache.CacheStore(memory_source(), cache_store=tmp_path, namespace="n")
    backend = store._reads.backend
    await backend.prepare()
    release = backend.acquire(KEY, held)
    assert not isinstance(release, tuple)
    child = Child(try_locks, str(tmp_path), "n", list(answers))
    assert child.result() == list(answers.values())
    release()
    child = Child(try_locks, str(tmp_path), "n", [held])
    assert child.result() == [None]


# -- documents


def array(shape: int) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "array", "shape": [shape]}).encode()


async def test_a_document_that_shows_a_change_hides_its_array(cache: Backend) -> None:
    document, chunk = "x/zarr.json", KEY
    assert await cache.apply_document(document, array(1), cache.write_version(document)) is not None
    await put(cache, b"old", cache.write_version(chunk))
    await put(cache, b"other", cache.write_version("y/c/0"), key="y/c/0")
    begun = cache.write_version(chunk)
    assert await cache.apply_document(document, array(1), cache.write_version(document)) is not None
    assert await got(cache) == b"old"
    version = await cache.apply_document(document, array(2), cache.write_version(document))
    assert await got(cache) is None
    assert await got(cache, key="y/c/0") == b"other"
    await put(cache, b"old", begun)
    assert await got(cache) is None
    await put(cache, array(2), version, key=document)
    assert await got(cache, key=document) == array(2)


async def test_a_document_that_was_written_through_the_cache_hides_nothing(cache: Backend) -> None:
    document = "x/zarr.json"
    await cache.apply_document(document, array(1), cache.write_version(document))
    await put(cache, b"kept", cache.write_version(KEY))
    await cache.apply_document(document, array(2), None, is_written=True)
    await cache.apply_document(document, array(2), cache.write_version(document))
    assert await got(cache) == b"kept"
