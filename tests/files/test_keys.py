"""Keys that are no good paths, files that were there before, and what lies in a cache directory."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from damage import (
    BOUND,
    Pass,
    audit,
    contents,
    counted,
    entry_files,
    in_process,
    make_source,
    mount_kind,
    passes,
    read_anew,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import buffer, memory_source
from sources import read as get
from zarr.abc.store import RangeByteRequest, Store
from zarr.storage import LocalStore, MemoryStore

import xzcache
from xzcache.model.entry import META

NAMESPACE = "source"
LONG = "l" * 300
GROUPS = {
    "dots": [
        "",
        ".",
        "..",
        "../evil",
        "../../evil",
        "a/../../evil",
        "a/../b",
        "a/..",
        "./a",
        "a/./b",
        "...",
        "a/.../b",
    ],
    "slashes": [
        "/",
        "/evil",
        "//evil",
        "/etc/hostname",
        "/tmp/xzcache-evil",
        "a//b",
        "a/",
        "a//",
        "/a/",
        "~",
        "~root/x",
    ],
    "long": [LONG, f"{LONG}/b", f"a/{LONG}", "m" * 255, "m" * 256, "d/" * 250 + "e", "k" * 2000, "ä" * 127, "ä" * 128],
    "too long": ["k" * 3100, "k/" * 2500],
    "control": ["a\0b", "\0", "a\nb", "a\rb", "a\tb", "\x01\x1b[31m", "\x7f", " ", " a", "a ", "a.", "a. "],
    "unicode": ["é", unicodedata.normalize("NFD", "é"), "\ufb01", "💾", "\u202egnp", "ß", "\u1e9e", "\ufeff", "\uffff"],
    "surrogates": ["\ud800", "a\udcff/b", "\ud83d\ude00"],
    "ours": [META, f"{META}/x", f"{META}/guard.lock", f"{META}/index-1.db", f"a/{META}", f"{META}x", META.upper()],
    "reserved": ["CON", "nul", "a/com1.txt", "LPT9", "a:b", "a*b", "a?b", 'a"b', "a<b", "a|b", "C:", "C:/evil", "a#b"],
    "shells": ["%41", "a%2Fb", "-rf", "$HOME", "`id`", "{0}", "%s", "\\", "a\\b", "..\\evil", "?x", "file:x"],
    "case": ["Case", "case", "CASE/x", "case/x/y"],
    "namespace": [NAMESPACE, f"{NAMESPACE}/{NAMESPACE}"],
}
KEYS = [key for keys in GROUPS.values() for key in keys]
UNCACHEABLE = GROUPS["too long"] + GROUPS["surrogates"]
"""Those that cannot be written down as text of a reasonable length: read and written at the source alone."""
CACHEABLE = [key for key in KEYS if key not in UNCACHEABLE]


async def collected(items: AsyncIterator[str]) -> list[str]:
    return sorted([item async for item in items])


def value_of(key: str) -> bytes:
    return b"value of " + ascii(key).encode()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory around a cache, which nothing may be written to."""
    path = tmp_path / "home"
    path.mkdir()
    (path / "evil").mkdir()
    return path


def store_of(home: Path, source: Store, **given: Any) -> xzcache.CacheStore:
    return xzcache.CacheStore(source, cache_store=home / "cache", namespace=NAMESPACE, max_size=BOUND, **given)


async def ours_only(home: Path) -> None:
    """All that is in the cache is beneath the two directories that may be there."""
    assert set(os.listdir(home)) <= {"cache", "evil"}
    assert os.listdir(home / "evil") == []
    assert not (home / "cache").exists() or set(os.listdir(home / "cache")) <= {META, NAMESPACE}
    assert not os.path.exists("/tmp/xzcache-evil")
    shared = xzcache.LockedLocalStore(home / "cache")
    for listed in (shared.list(), shared.list_prefix(""), shared.list_dir("")):
        assert [key for key in await collected(listed) if key.partition("/")[0] == META] == []


# -- through CacheStore


@pytest.mark.parametrize("group", GROUPS)
async def test_keys(home: Path, group: str) -> None:
    source = memory_source()
    store = store_of(home, source)
    for key in GROUPS[group]:
        await source.set(key, buffer(value_of(key)))
        source.forget()
        for _ in range(3):
            assert await get(store, key) == value_of(key), ascii(key)
        assert await get(store, key, RangeByteRequest(2, 5)) == value_of(key)[2:5]
        if key not in UNCACHEABLE:
            assert source.reads == 1, "the second reading is a hit"
        await ours_only(home)
        await store.set(key, buffer(b"new"))
        assert await get(store, key) == b"new"
        await store.delete(key)
        assert await get(store, key) is None
    audit(home / "cache")


async def test_all_keys_at_once(home: Path) -> None:
    """None of them gets in another one's way, and none is taken for another one."""
    source = memory_source()
    for key in KEYS:
        await source.set(key, buffer(value_of(key)))
    store = store_of(home, source)
    for _ in range(2):
        source.forget()
        for key in KEYS:
            assert await get(store, key) == value_of(key), ascii(key)
            assert await get(store, key, RangeByteRequest(9, 20)) == value_of(key)[9:20]
    assert source.reads == 2 * len(UNCACHEABLE)
    await ours_only(home)
    audit(home / "cache")
    await store.clear_cache()
    assert entry_files(home / "cache") == []
    source.forget()
    for key in reversed(KEYS):
        assert await get(store, key) == value_of(key), ascii(key)
    await ours_only(home)
    audit(home / "cache")


@pytest.mark.parametrize("first", ["a", "a/b"])
@pytest.mark.parametrize("evicted", [None, "a", "a/b"])
async def test_a_key_that_is_another_ones_directory(home: Path, first: str, evicted: str | None) -> None:
    source = memory_source()
    for key in ("a", "a/b", "a/b/c"):
        await source.set(key, buffer(value_of(key)))
    store = store_of(home, source)
    order = ["a", "a/b", "a/b/c"] if first == "a" else ["a/b/c", "a/b", "a"]
    for _ in range(2):
        for key in order:
            assert await get(store, key) == value_of(key)
    if evicted is not None:
        directory = xzcache.LockedLocalStore(home / "cache").directory
        with directory.session.section() as (member, index):
            dying = directory.space.mark_deleted(member, index, index.of_key(f"{NAMESPACE}/{evicted}"))
        directory.space.unlink_deleted(dying)
    for most in (0 if evicted is None else 2, 0):
        source.forget()
        for key in reversed(order):
            assert await get(store, key) == value_of(key)
        assert source.reads <= most
    audit(home / "cache")


async def test_files_of_the_users(home: Path) -> None:
    """They are kept, whatever becomes of the keys of the same name; and never taken for the source's values."""
    root = home / "cache" / NAMESPACE
    (root / "a").mkdir(parents=True)
    theirs = [root / "a/b", root / "c", home / "cache" / "notes.txt"]
    for path in theirs:
        path.write_text("the user's own")
    before = [path.stat() for path in theirs]
    source = memory_source()
    for key in ("a", "a/b", "c", "c/d"):
        await source.set(key, buffer(value_of(key)))
    store = store_of(home, source)
    for reads in (4, 0):
        source.forget()
        for key in ("a", "a/b", "c", "c/d"):
            assert await get(store, key) == value_of(key)
            assert await store.exists(key)
        assert source.reads == reads
    audit(home / "cache")
    await store.set("c", buffer(b"new"))
    assert await get(store, "c") == b"new"
    await store.delete("a/b")
    assert await get(store, "a/b") is None
    await store.delete_dir("a")
    await store.clear_cache()
    await store.clear()
    assert [await get(store, key) for key in ("a", "a/b", "c", "c/d")] == [None] * 4
    assert store.cache_info()["total_size"] == 0
    assert [path.read_text() for path in theirs] == ["the user's own"] * 3
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) for p in theirs] == [(s.st_ino, s.st_mtime_ns) for s in before]


async def test_files_of_the_users_in_a_store_of_its_own(tmp_path: Path) -> None:
    """A `LockedLocalStore` shows them, as any store of files does, and evicts and counts none."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("the user's own")
    (tmp_path / "large").write_bytes(bytes(5000))
    store = xzcache.LockedLocalStore(tmp_path, max_size=1000)
    assert await get(store, "deep/file") == b"the user's own"
    assert await get(store, "deep/file", RangeByteRequest(4, 8)) == b"user"
    assert await store.exists("large")
    assert await store.getsize("large") == 5000
    for number in range(20):
        await store.set(f"c/{number}", buffer(bytes(300)))
    assert {"deep/file", "large"} < set(await collected(store.list()))
    assert (tmp_path / "large").stat().st_size == 5000
    assert store.directory.totals().size <= 1000
    await store.set("deep/file", buffer(b"replaced on purpose"))
    assert await get(store, "deep/file") == b"replaced on purpose"
    await store.delete("deep/file")
    assert await get(store, "deep/file") is None


async def test_names_that_differ_in_case_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that takes them for the same, they are stored under their digests."""
    monkeypatch.setattr("xzcache.files.folds_case", lambda directory: True)
    source = memory_source()
    names = ["c/A", "c/a", "C/a", "é", unicodedata.normalize("NFD", "é")]
    for key in names:
        await source.set(key, buffer(value_of(key)))
    store = store_of(home, source)
    for reads in (len(names), 0):
        source.forget()
        assert [await get(store, key) for key in names] == [value_of(key) for key in names]
        assert source.reads == reads
    folded = [str(path.relative_to(home)).casefold() for path in entry_files(home / "cache")]
    assert len(folded) == len(set(folded)) == len(names)


# -- a store of its own


@pytest.mark.parametrize("group", GROUPS)
async def test_keys_of_a_store_of_its_own(home: Path, group: str) -> None:
    store = xzcache.LockedLocalStore(home / "cache", max_size=BOUND)
    for key in GROUPS[group]:
        if key in UNCACHEABLE:
            with pytest.raises(ValueError, match="key=") as caught:
                await store.set(key, buffer(b"1"))
            assert repr(key) in str(caught.value)
        else:
            await store.set(key, buffer(b"1"))
            assert await get(store, key) == b"1"
            assert await collected(store.list()) == [key]
            assert await store.exists(key)
            assert await store.getsize(key) == 1
            await store.set(key, buffer(b"22"))
            assert await get(store, key) == b"22"
            assert not await store.is_empty("")
            await store.delete(key)
        assert await get(store, key) is None
        assert not await store.exists(key)
        assert await collected(store.list()) == []
        assert await store.is_empty("")
    assert set(os.listdir(home)) <= {"cache", "evil"}
    assert os.listdir(home / "evil") == []
    assert not os.path.exists("/tmp/xzcache-evil")
    audit(home / "cache")


async def test_our_own_files_never_show(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache")
    await store.set("../odd", buffer(b"1"))
    await store.delete("../odd")
    assert (tmp_path / "cache" / META).is_dir()
    for prefix in ("", META, f"{META}/", f"{META}/odd", "."):
        assert await collected(store.list_prefix(prefix)) == []
        assert await collected(store.list_dir(prefix)) == []
        assert await store.is_empty(prefix)
    assert await collected(store.list()) == []
    for key in ("guard.lock", "format", "index-1.db", "writes"):
        assert await get(store, f"{META}/{key}") is None
        assert not await store.exists(f"{META}/{key}")
        await store.set(f"{META}/{key}", buffer(b"not these"))
        assert await get(store, f"{META}/{key}") == b"not these"
    before = set(os.listdir(tmp_path / "cache" / META)) - {"odd"}
    await store.delete_dir(META)
    await store.delete(META)
    await store.clear()
    assert set(os.listdir(tmp_path / "cache" / META)) >= before
    await store.set("a", buffer(b"1"))
    assert await collected(store.list_dir("")) == ["a"]


# -- any keys at all, against a dictionary

WORDS = ["a", "b", "a/b", "c", "..", ".", "", META, "é", "A", "\0", "zarr.json", LONG]
keys = st.one_of(
    st.sampled_from([key for key in KEYS if len(key) < 600]),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("/".join),
    st.text(max_size=8),
    st.text(st.characters(exclude_categories=[]), max_size=4),
)
operations = st.lists(
    st.tuples(st.sampled_from(["set", "get", "get", "delete", "delete_dir", "clear", "forget"]), keys), max_size=30
)


@settings(deadline=None, max_examples=40)
@given(steps=operations)
async def test_any_keys_through_a_cache(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]) -> None:
    home = tmp_path_factory.mktemp("home")
    source, model = MemoryStore(), MemoryStore()
    store = store_of(home, source)
    for number, (step, key) in enumerate(steps):
        if step == "set":
            await store.set(key, buffer(b"%d" % number))
            await model.set(key, buffer(b"%d" % number))
        elif step in ("delete", "delete_dir"):
            await getattr(store, step)(key)
            await getattr(model, step)(key)
        elif step == "clear":
            await store.clear()
            await model.clear()
        elif step == "forget":
            await store.clear_cache()
        for used in {key for _, key in steps[: number + 1]}:
            assert await get(store, used) == await get(model, used)
    assert await collected(store.list()) == await collected(model.list())
    assert sorted(os.listdir(home)) in (["cache"], [])


def without(model: dict[str, bytes], key: str) -> dict[str, bytes]:
    return {name: value for name, value in model.items() if not name.startswith(f"{key}/")}


@settings(deadline=None, max_examples=40)
@given(steps=operations)
async def test_any_keys_in_a_store_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    store = xzcache.LockedLocalStore(home / "cache", max_size=BOUND)
    model: dict[str, bytes] = {}
    for number, (step, key) in enumerate(steps):
        if step == "set" and key in model.keys() | set(CACHEABLE):
            await store.set(key, buffer(b"%d" % number))
            model[key] = b"%d" % number
        elif step == "delete":
            await store.delete(key)
            # as in a store of files, a directory goes with all that is in it
            model = without(model, key) if key else {}
            model.pop(key, None)
        elif step == "delete_dir" and key.rstrip("/") not in model:
            await store.delete_dir(key)
            model = without(model, key.rstrip("/")) if key.rstrip("/") else {}
        elif step == "clear":
            await store.clear()
            model = {}
        assert {used: await get(store, used) for _, used in steps} == {used: model.get(used) for _, used in steps}
        assert await collected(store.list()) == sorted(model)
    for prefix in {key.partition("/")[0] for key in model} - {""}:
        expected = sorted(key for key in model if key.startswith(f"{prefix}/"))
        assert await collected(store.list_prefix(f"{prefix}/")) == expected
        names = {key[len(prefix) + 1 :].partition("/")[0] for key in expected}
        assert await collected(store.list_dir(prefix)) == sorted(names)
    assert await store.is_empty("") == (not model)
    assert sorted(os.listdir(home)) in (["cache"], [])
    audit(home / "cache")


@pytest.mark.parametrize("prefix", ["\ud800", "a/\ud800", "a/" + "x" * 4000])
async def test_a_prefix_of_keys_that_no_cache_can_hold(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    local = xzcache.LockedLocalStore(tmp_path / "local")
    source = MemoryStore({f"{prefix}/c": buffer(b"0"), "a/c": buffer(b"1")})
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    for each in (local, store):
        await each.set("a/b", buffer(b"2"))
        await each.delete_dir(prefix)
        assert await collected(each.list_prefix(prefix)) == []
        assert await collected(each.list_dir(prefix)) == []
        assert await get(each, "a/b") == b"2"
    assert sorted(await collected(store.list())) == ["a/b", "a/c"]
    assert not caplog.records


# -- what lies where


def test_a_namespace_is_an_ordinary_store(tmp_path: Path) -> None:
    data = np.random.default_rng(1).random((20, 30))
    source = MemoryStore()
    zarr.create_array(source, data=data, chunks=(7, 8), attributes={"units": "K"})
    store = store_of(tmp_path, source)
    assert (zarr.open_array(store, mode="r")[:] == data).all()
    plain = zarr.open_array(LocalStore(tmp_path / "cache" / NAMESPACE, read_only=True), mode="r")
    assert (plain[:] == data).all()
    assert plain.attrs["units"] == "K"
    for path in entry_files(tmp_path / "cache"):
        key = path.relative_to(tmp_path / "cache" / NAMESPACE).as_posix()
        assert path.read_bytes() == source._store_dict[key].to_bytes()
    assert len(entry_files(tmp_path / "cache")) == 13


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
async def test_modes(tmp_path: Path, umask: int) -> None:
    """Nobody else reads what this user may read."""
    old = os.umask(umask)
    try:
        make_source(tmp_path / "source")
        source = counted(tmp_path / "source")
        cache = tmp_path / "deep" / "cache"
        store = xzcache.CacheStore(source, cache_store=cache, max_size=BOUND)
        passes(store, source, "ab")
        await get(store, "b/c/0", RangeByteRequest(1, 2))
        odd = xzcache.CacheStore(memory_source(), cache_store=cache)
        await odd.set("..", buffer(b"odd"))
        await odd.set("a/b", buffer(b"plain"))
    finally:
        os.umask(old)
    kinds = {stat.S_ISDIR: 0o700, stat.S_ISREG: 0o600}
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    for name, (mode, _) in snapshot(cache).items():
        (expected,) = (permissions for is_kind, permissions in kinds.items() if is_kind(mode))
        assert stat.S_IMODE(mode) == expected, name


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    (tmp_path / "used").mkdir(mode=0o755)
    (tmp_path / "used" / "file").touch()
    make_source(tmp_path / "source")
    for name, mode in (("empty", 0o700), ("used", 0o755)):
        read_anew(str(tmp_path / "source"), str(tmp_path / name), "a", 1)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
        assert stat.S_IMODE((tmp_path / name / META).stat().st_mode) == 0o700


# -- a file system without extended attributes


def forget_attributes() -> None:
    """Make this process one on a file system that has none."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    os.setxattr = os.getxattr = refuse  # type: ignore[assignment]


def plain_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and META not in path.parts)


def use_without_attributes(source: Path, cache: Path) -> dict[str, Any]:
    """All that a cache has to be able to do."""
    facts: dict[str, Any] = {}
    counting = counted(source)
    store = xzcache.CacheStore(counting, cache_store=cache, revalidate=False, max_size=BOUND)
    facts["filled"] = passes(store, counting, "a")
    for path in plain_files(cache)[:3]:
        data = bytearray(path.read_bytes())
        data[7] ^= 4
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
    facts["damaged"] = passes(store, counting, "a", 3)
    facts["size"] = store.cache_info()["total_size"]
    facts["files"] = sum(path.stat().st_size for path in plain_files(cache))
    theirs = cache / store.namespace / "b" / "c" / "0"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("the user's own")
    small = xzcache.CacheStore(counting, cache_store=cache, revalidate=False, max_size=facts["files"] + 10)
    facts["evicting"] = passes(small, counting, "ba")
    facts["bounded"] = sum(path.stat().st_size for path in plain_files(cache) if path != theirs), facts["files"] + 10
    facts["beside"] = passes(small, counting, "b", 3)
    facts["kept"] = theirs.read_text()
    return facts


def read_without_attributes(source: Path, cache: Path) -> list[Pass]:
    forget_attributes()
    return read_anew(str(source), str(cache), "a")


def patched(source: Path, cache: Path) -> dict[str, Any]:
    forget_attributes()
    return use_without_attributes(source, cache)


def mounted(source: Path, disk: Path) -> dict[str, Any]:
    mount_kind("ramfs", disk)
    facts = use_without_attributes(source, disk / "cache")
    try:
        os.setxattr(disk / "probe", "user.x", b"")
    except OSError as error:
        facts["errno"] = error.errno
    return facts


@pytest.mark.parametrize("how", ["patched", "mounted"])
def test_without_extended_attributes(tmp_path: Path, how: str) -> None:
    make_source(tmp_path / "source")
    a, b = (contents(tmp_path / "source", name) for name in "ab")
    facts = in_process(patched if how == "patched" else mounted, tmp_path / "source", tmp_path / "cache")
    assert [(p.values == a, p.requests) for p in facts["filled"]] == [(True, 5), (True, 0)]
    assert [p.values for p in facts["damaged"]] == [a] * 3
    assert (facts["damaged"][0].requests, facts["damaged"][2].requests) == (3, 0)
    assert facts["size"] == facts["files"]
    assert [p.values for p in facts["evicting"]] == [b, a, b, a]
    assert facts["bounded"][0] <= facts["bounded"][1]
    assert [p.values for p in facts["beside"]] == [b] * 3
    assert facts["beside"][-1].requests == 0
    assert facts["kept"] == "the user's own"


def test_without_extended_attributes_in_a_new_process(tmp_path: Path) -> None:
    """What one process stored the next one finds, by the index."""
    make_source(tmp_path / "source")
    a = contents(tmp_path / "source", "a")
    for first in (5, 0):
        found = in_process(read_without_attributes, tmp_path / "source", tmp_path / "cache")
        assert [(p.values == a, p.requests, p.errors) for p in found] == [(True, first, 0), (True, 0, 0)]
    # without an index there is nothing to check them by
    theirs = tmp_path / "cache" / "notes" / "of-the-user.txt"
    theirs.parent.mkdir()
    theirs.touch()
    for path in (tmp_path / "cache" / META).glob("index-*"):
        path.write_bytes(b"damaged")
    found = in_process(read_without_attributes, tmp_path / "source", tmp_path / "cache")
    assert [(p.values == a, p.requests) for p in found] == [(True, 5), (True, 0)]
    assert theirs.exists()
