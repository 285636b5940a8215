"""Every member of the installed Zarr's `Store` has a place in `CacheStore`, and is what the table says it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sources import CountingStore, again, buffer, cached, fill, memory_source, read
from zarr.abc import store as abc
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import WrapperStore

import xzcache

# Served from the cache once it was fetched.
CACHED = {"get", "get_partial_values", "exists", "get_ranges", "getsize"}

# The source does it, and the cache says the same afterwards.
COHERENT = {"set", "set_sync", "set_if_not_exists", "delete", "delete_sync", "delete_dir", "clear"}

# Only the source can answer or act.
DELEGATED = {
    "supports_writes",
    "supports_deletes",
    "supports_listing",
    "supports_consolidated_metadata",
    "list",
    "list_prefix",
    "list_dir",
    "is_empty",
    "getsize_prefix",
    "_open",
    "close",
}

# Ours to answer.
OWN = {"__init__", "__eq__", "with_read_only", "_supports_sync_io", "get_sync"}

# Zarr's own is right, and why.
INHERITED = {
    "open": "makes one and opens it",
    "_ensure_open": "opens",
    "__enter__": "is the store itself",
    "__exit__": "closes",
    "read_only": "says what was given to it",
    "_check_writable": "looks at read_only",
    "supports_partial_writes": "never",
    "_get_many": "calls get",
    "_set_many": "calls set",
    "get_ranges_sync": "calls get_sync",
    "_read_only": "belongs to the base",
    "_is_open": "belongs to the base",
}

TABLE = [CACHED, COHERENT, DELEGATED, OWN, set(INHERITED)]
PROTOCOLS = ("SupportsGetSync", "SupportsSetSync", "SupportsDeleteSync", "SupportsSyncStore")
PYTHON = set(dir(type("Plain", (), {}))) | {"__slots__", "__abstractmethods__", "_abc_impl", "__annotate_func__"}


def members(kind: type) -> set[str]:
    """What a class adds to a plain one; attributes that it only announces included."""
    named = set(vars(kind)) | set(vars(kind).get("__annotations__", {}))
    redefined = {name for name in ("__init__", "__eq__") if name in vars(kind)}
    return {
        n
        for n in named
        if n not in PYTHON
        and not n.startswith(
            (
                "_is_protocol",
                "__protocol",
                "_is_runtime",
                "__non_callable",
                "__parameters__",
                "__annotations",
                "__static",
                "__firstlineno",
            )
        )
    } | redefined


def installed() -> set[str]:
    found = members(Store)
    for name in PROTOCOLS:
        if hasattr(abc, name):
            found |= members(getattr(abc, name)) - {"__init__"}
    return found


def test_every_member_has_a_place() -> None:
    unknown = installed() - set().union(*TABLE)
    assert not unknown, f"this Zarr has members of a store that nobody has thought about: {sorted(unknown)}"


def test_no_member_has_two_places() -> None:
    assert sum(map(len, TABLE)) == len(set().union(*TABLE))


def test_the_table_names_real_members() -> None:
    since_3_2 = {"get_ranges", "get_ranges_sync", "get_sync", "set_sync", "delete_sync", "_supports_sync_io"}
    gone = set().union(*TABLE) - installed() - since_3_2 - {"_read_only", "_is_open"}
    assert not gone


def ours() -> set[str]:
    """What `CacheStore` and its bases of this package define."""
    classes = [kind for kind in xzcache.CacheStore.__mro__ if kind.__module__.startswith("xzcache")]
    return {name for kind in classes for name in vars(kind)}


@pytest.mark.parametrize("name", sorted(CACHED | COHERENT | DELEGATED | OWN))
def test_is_defined_here(name: str) -> None:
    assert name in ours()


@pytest.mark.parametrize("name", sorted(INHERITED))
def test_is_inherited(name: str) -> None:
    assert name not in ours()


def test_is_not_a_wrapper() -> None:
    # a wrapper forwards to the source whatever it does not know
    assert issubclass(xzcache.CacheStore, Store)
    assert not issubclass(xzcache.CacheStore, WrapperStore)


Use = Callable[[xzcache.CacheStore], Any]
PROTOTYPE = default_buffer_prototype()


async def gathered(found: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in found]


async def many(store: xzcache.CacheStore) -> list[bytes]:
    return [value.to_bytes() async for _, value in store._get_many([("a/c/0", PROTOTYPE, None)])]


async def ranges(store: xzcache.CacheStore) -> list[Any]:
    wanted = [RangeByteRequest(0, 2), OffsetByteRequest(3)]
    return [item async for group in store.get_ranges("a/c/0", wanted, prototype=PROTOTYPE) for item in group]


async def partial_values(store: xzcache.CacheStore) -> list[bytes]:
    wanted = iter([("a/c/0", None), ("a/c/0", RangeByteRequest(1, 2))])
    return [value.to_bytes() for value in await store.get_partial_values(PROTOTYPE, wanted)]


READS: dict[str, tuple[Callable[[xzcache.CacheStore], Awaitable[Any]], Any]] = {
    "get": (lambda store: read(store, "a/c/0"), b"old value"),
    "get_partial_values": (partial_values, [b"old value", b"l"]),
    "exists": (lambda store: store.exists("a/c/0"), True),
    "getsize": (lambda store: store.getsize("a/c/0"), 9),
    "_get_many": (many, [b"old value"]),
    "get_ranges": (ranges, None),
}


def test_every_cached_member_is_tried() -> None:
    assert set(READS) >= CACHED


@pytest.mark.parametrize("name", sorted(READS))
async def test_what_is_cached_does_not_reach_the_source_again(name: str, cache_kind: str, tmp_path: Path) -> None:
    if name == "get_ranges" and not hasattr(Store, name):
        pytest.skip("this Zarr does not have it")
    source = memory_source()
    await fill(source, a__c__0=b"old value")
    store = cached(cache_kind, source, tmp_path)
    use, expected = READS[name]
    assert await read(store, "a/c/0") == b"old value"
    source.forget()
    found = await use(store)
    assert expected is None or found == expected
    assert source.calls == []


WRITES: dict[str, tuple[Use, bytes | None]] = {
    "set": (lambda store: store.set("a/c/0", buffer(b"new")), b"new"),
    "set_sync": (lambda store: asyncio.to_thread(store.set_sync, "a/c/0", buffer(b"new")), b"new"),
    "set_if_not_exists": (lambda store: store.set_if_not_exists("a/c/0", buffer(b"new")), b"new"),
    "delete": (lambda store: store.delete("a/c/0"), None),
    "delete_sync": (lambda store: asyncio.to_thread(store.delete_sync, "a/c/0"), None),
    "delete_dir": (lambda store: store.delete_dir("a"), None),
    "clear": (lambda store: store.clear(), None),
}


def test_every_coherent_member_is_tried() -> None:
    assert set(WRITES) == COHERENT


@pytest.mark.parametrize("name", sorted(COHERENT))
async def test_what_is_written_reaches_the_source_once_and_is_seen(name: str, cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, a__c__0=b"old value")
    store = cached(cache_kind, source, tmp_path)
    bystander = again(store)
    assert await read(store, "a/c/0") == await read(bystander, "a/c/0") == b"old value"
    if name == "set_if_not_exists":
        await source._store.delete("a/c/0")
    source.forget()
    use, expected = WRITES[name]
    await use(store)
    assert [method for method, _ in source.calls] == [name.removesuffix("_sync")]
    assert await read(source, "a/c/0") == expected
    assert await read(store, "a/c/0") == await read(bystander, "a/c/0") == expected


DELEGATIONS: dict[str, tuple[Use, str]] = {
    "supports_writes": (lambda store: store.supports_writes, "supports_writes"),
    "supports_deletes": (lambda store: store.supports_deletes, "supports_deletes"),
    "supports_listing": (lambda store: store.supports_listing, "supports_listing"),
    "supports_consolidated_metadata": (
        lambda store: store.supports_consolidated_metadata,
        "supports_consolidated_metadata",
    ),
    "list": (lambda store: gathered(store.list()), "list"),
    "list_prefix": (lambda store: gathered(store.list_prefix("a/")), "list_prefix"),
    "list_dir": (lambda store: gathered(store.list_dir("a")), "list_dir"),
    "is_empty": (lambda store: store.is_empty("a"), "is_empty"),
    "getsize_prefix": (lambda store: store.getsize_prefix("a"), "getsize_prefix"),
    "_open": (lambda store: store._open(), "_ensure_open"),
    "close": (lambda store: store.close(), "close"),
}


def test_every_delegated_member_is_tried() -> None:
    assert set(DELEGATIONS) == DELEGATED


@pytest.mark.parametrize("name", sorted(DELEGATED))
async def test_what_is_delegated_reaches_the_source_once(name: str, cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    await fill(source, a__c__0=b"old value", a__c__1=b"x", b=b"y")
    store = cached(cache_kind, source, tmp_path)
    assert await read(store, "a/c/0") == b"old value"
    source.forget()
    use, arrives_as = DELEGATIONS[name]
    found = use(store)
    found = await found if isinstance(found, Awaitable) else found
    assert [method for method, _ in source.calls] == [arrives_as]
    plain = use(source) if name not in ("_open", "close") else None
    assert found == (await plain if isinstance(plain, Awaitable) else plain)


async def test_a_false_capability_of_the_source_is_passed_on(cache_kind: str, tmp_path: Path) -> None:
    class Unable(CountingStore):
        supports_deletes = supports_writes = supports_listing = supports_consolidated_metadata = False

    store = cached(cache_kind, Unable(memory_source()), tmp_path)
    for name in ("supports_deletes", "supports_writes", "supports_listing", "supports_consolidated_metadata"):
        assert getattr(store, name) is False


async def test_a_context_manager_opens_and_closes(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    options = {"cache_store": tmp_path / "cache"} if cache_kind == "directory" else {"cache_store": memory_source()}
    with await xzcache.CacheStore.open(source, **options) as store:
        assert store._is_open
        await store.set("k", buffer(b"1"))
    assert not store._is_open
    assert source.count("close") == 1
    # closing gives nothing away
    assert await read(store, "k") == b"1"
