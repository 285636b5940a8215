"""A bad argument is refused at once, by a message that names it, its value and what is accepted; nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sources import buffer, read, write_now
from zarr.storage import LocalStore, MemoryStore, StorePath, WrapperStore

import xzcache

SIZE = 'a whole number of bytes, 0 or more, a string such as "20 GB" or "512 MiB", or None for no bound'
AGE = 'a number of seconds, 0 or more, or "infinity"'
REVALIDATE = '"open", "strict", True, False, or a number of seconds'
FLAG = "True or False"
POLICY = '"lru" (least recently used), "adaptive" or "none"'
NAMESPACE = "one path component"
MIN_FREE = 'a share such as "5%", a fraction below 1, or a size such as "20 GB"'
SECONDS = "a number of seconds above 0"
THREADS = "a whole number of threads, 1 or more"
ROOT = "a directory of this user's, or a path where one can be made"
CACHE = "a Zarr store that supports deletes, a path, or None for the default cache"
STORE = "a Zarr store, a path, a URL"

nan, inf = float("nan"), float("inf")

BAD_SIZES = [
    (-1, ValueError),
    (-(10**30), ValueError),
    ("-5 GB", ValueError),
    ("20 lightyears", ValueError),
    ("many", ValueError),
    ("", ValueError),
    ("inf", ValueError),
    ("nan", ValueError),
    (1.5, TypeError),
    (nan, TypeError),
    (inf, TypeError),
    (True, TypeError),
    (b"20 GB", TypeError),
    ([100], TypeError),
    (object, TypeError),
]
BAD_AGES = [
    (-1, ValueError),
    (-0.001, ValueError),
    (nan, ValueError),
    (-inf, ValueError),
    ("forever", ValueError),
    ("60", ValueError),
    (None, TypeError),
    (True, TypeError),
    ([1], TypeError),
    (b"infinity", TypeError),
]
BAD_REVALIDATIONS = [
    (-1, ValueError),
    (nan, ValueError),
    (inf, ValueError),
    ("always", ValueError),
    ("60", ValueError),
    (None, TypeError),
    ([1], TypeError),
]
BAD_FLAGS = [(1, TypeError), (0, TypeError), ("yes", TypeError), (None, TypeError), ([], TypeError)]
BAD_POLICIES = [("fifo", ValueError), ("LRU", ValueError), ("", ValueError), (None, TypeError), (7, TypeError)]
BAD_NAMESPACES = [
    ("", ValueError),
    (".", ValueError),
    ("..", ValueError),
    ("../up", ValueError),
    ("a/b", ValueError),
    ("/abs", ValueError),
    ("a\\b", ValueError),
    (".hidden", ValueError),
    (".xzcache", ValueError),
    ("nul\0l", ValueError),
    ("x" * 256, ValueError),
    (7, TypeError),
    (Path("a"), TypeError),
    (True, TypeError),
]
BAD_RESERVES = [
    ("105%", ValueError),
    ("-1%", ValueError),
    ("x%", ValueError),
    ("nan%", ValueError),
    (1.0, ValueError),
    (-0.1, ValueError),
    (nan, ValueError),
    (-1, ValueError),
    ("few", ValueError),
    (None, TypeError),
    (True, TypeError),
    ([5], TypeError),
]
BAD_DURATIONS = [
    (0, ValueError),
    (-1, ValueError),
    (inf, ValueError),
    (nan, ValueError),
    ("5", TypeError),
    (None, TypeError),
]
BAD_THREADS = [
    (0, ValueError),
    (-2, ValueError),
    (1.5, TypeError),
    ("4", TypeError),
    (None, TypeError),
    (True, TypeError),
]


def cases(name: str, bad: list[tuple[Any, type[Exception]]], accepted: str) -> list[Any]:
    return [pytest.param(name, value, error, accepted, id=f"{name}-{value!r}") for value, error in bad]


CACHE_STORE = [
    *cases("max_size", BAD_SIZES, SIZE),
    *cases("max_age_seconds", BAD_AGES, AGE),
    *cases("missing_max_age_seconds", BAD_AGES, AGE),
    *cases("revalidate", BAD_REVALIDATIONS, REVALIDATE),
    *cases("cache_set_data", BAD_FLAGS, FLAG),
    *cases("read_only", BAD_FLAGS, FLAG),
    *cases("policy", BAD_POLICIES, POLICY),
    *cases("namespace", BAD_NAMESPACES, NAMESPACE),
]
LOCKED = [
    *cases("max_size", BAD_SIZES, SIZE),
    *cases("min_free", BAD_RESERVES, MIN_FREE),
    *cases("policy", BAD_POLICIES, POLICY),
    *cases("read_only", BAD_FLAGS, FLAG),
]
CONFIGURED = [
    *cases("max_size", BAD_SIZES, SIZE),
    *cases("max_age_seconds", BAD_AGES, AGE),
    *cases("missing_max_age_seconds", BAD_AGES, AGE),
    *cases("revalidate", BAD_REVALIDATIONS, REVALIDATE),
    *cases("cache_set_data", BAD_FLAGS, FLAG),
    *cases("policy", BAD_POLICIES, POLICY),
    *cases("min_free", BAD_RESERVES, MIN_FREE),
    *cases("fetch_timeout", BAD_DURATIONS, SECONDS),
    *cases("lock_timeout", BAD_DURATIONS, SECONDS),
    *cases("directory", [(7, TypeError), (["a"], TypeError), (True, TypeError)], "a path"),
]


def refused(act: Callable[[], Any], name: str, value: object, error: type[Exception], accepted: str) -> None:
    """The act is refused in one line that says all there is to know."""
    with pytest.raises((ValueError, TypeError)) as raised:
        act()
    assert type(raised.value) is error, raised.value
    text = str(raised.value)
    assert f"{name}={value!r}" in text
    assert accepted in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "value", "error", "accepted"), CACHE_STORE)
def test_cache_store(
    name: str, value: object, error: type[Exception], accepted: str, cache_kind: str, tmp_path: Path
) -> None:
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    source = tmp_path / "source"
    refused(lambda: xzcache.CacheStore(source, cache_store=cache, **{name: value}), name, value, error, accepted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value", "error", "accepted"), LOCKED)
def test_locked_local_store(name: str, value: object, error: type[Exception], accepted: str, tmp_path: Path) -> None:
    refused(lambda: xzcache.LockedLocalStore(tmp_path / "cache", **{name: value}), name, value, error, accepted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value", "error", "accepted"), CONFIGURED)
def test_configuration(name: str, value: object, error: type[Exception], accepted: str, tmp_path: Path) -> None:
    with xzcache.config.set({"directory": str(tmp_path / "default"), name: value}):
        refused(lambda: xzcache.CacheStore(tmp_path / "source"), name, value, error, accepted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "value", "error", "accepted"), cases("threads", BAD_THREADS, THREADS))
def test_the_number_of_threads(name: str, value: object, error: type[Exception], accepted: str, tmp_path: Path) -> None:
    # they are started once, so the mistake has to show before that
    with xzcache.config.set(threads=value):
        refused(
            lambda: xzcache.CacheStore(tmp_path / "source", cache_store=MemoryStore()), name, value, error, accepted
        )


def test_good_values_of_every_kind_are_accepted(tmp_path: Path) -> None:
    import numpy as np

    sizes = [
        (0, 0),
        (10, 10),
        ("20 GB", 20 * 10**9),
        ("512 MiB", 512 << 20),
        ("1e3", 1000),
        (np.int64(7), 7),
        (None, None),
    ]
    for given, meant in sizes:
        assert xzcache.CacheStore(MemoryStore(), cache_store=MemoryStore(), max_size=given).max_size == meant
    for age, kept in [(0, 0), (1.5, 1.5), (np.float32(2), 2.0), ("infinity", "infinity"), (inf, "infinity")]:
        assert xzcache.CacheStore(MemoryStore(), cache_store=MemoryStore(), max_age_seconds=age).max_age_seconds == kept
    for reserve in (0, "5%", 0.25, "20 GB", 10**9):
        xzcache.LockedLocalStore(tmp_path / f"{reserve}".replace("%", ""), min_free=reserve)


@pytest.mark.parametrize("name", ["maxsize", "max_age", "cache", "cachestore", "ttl"])
def test_an_unknown_argument(name: str, tmp_path: Path) -> None:
    for make in (
        lambda: xzcache.CacheStore(tmp_path / "source", cache_store=tmp_path / "cache", **{name: 1}),
        lambda: xzcache.LockedLocalStore(tmp_path / "cache", **{name: 1}),
    ):
        hint = {"maxsize": ", did you mean max_size", "cachestore": ", did you mean cache_store"}.get(name, "")
        with pytest.raises(TypeError, match=f"'{name}'{hint if 'cache' not in name else ''}"):
            make()
    assert list(tmp_path.iterdir()) == []


def test_arguments_go_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional"):
        xzcache.CacheStore(MemoryStore(), MemoryStore())  # type: ignore[misc]


# -- what is read


@pytest.mark.parametrize("value", [None, 7, True, b"sesame", ["sesame"], {"key": "sesame"}, object()])
def test_a_source_that_is_none(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"^store is a {type(value).__name__}, which is not accepted") as raised:
        xzcache.CacheStore(value, cache_store=tmp_path / "cache")
    assert STORE in str(raised.value)
    # whatever it is, there may be a password in it
    assert "sesame" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_a_name(tmp_path: Path) -> None:
    refused(lambda: xzcache.CacheStore("", cache_store=tmp_path / "cache"), "store", "", ValueError, STORE)


def test_a_path_within_a_store_is_no_source(tmp_path: Path) -> None:
    inside = StorePath(MemoryStore(), "group")
    with pytest.raises(ValueError, match="store='group' is a path within a store: give the store itself"):
        xzcache.CacheStore(inside, cache_store=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [str, Path, LocalStore])
def test_storage_options_without_a_url(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    secret = "AKIAverysecret"
    with pytest.raises(TypeError, match="storage_options goes with a URL only") as raised:
        xzcache.CacheStore(kind(tmp_path / "source"), cache_store=tmp_path / "cache", storage_options={"key": secret})
    assert secret not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", ["anon", 7, ["a"], True])
def test_storage_options_that_are_no_mapping(options: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"storage_options.*mapping"):
        xzcache.CacheStore("memory://bucket/x", cache_store=tmp_path / "cache", storage_options=options)
    assert list(tmp_path.iterdir()) == []


# -- where it is kept


@pytest.mark.parametrize("value", [7, True, 1.5, b"bytes", ["a"], {}, object()])
def test_a_cache_that_is_none(value: object, tmp_path: Path) -> None:
    refused(
        lambda: xzcache.CacheStore(tmp_path / "source", cache_store=value),  # type: ignore[arg-type]
        "cache_store",
        value,
        TypeError,
        CACHE,
    )


def test_a_cache_store_that_cannot_delete(tmp_path: Path) -> None:
    class Archive(WrapperStore[MemoryStore]):
        supports_deletes = False

    cache = Archive(MemoryStore())
    with pytest.raises(ValueError, match=r"cache_store=Archive does not support deletes") as raised:
        xzcache.CacheStore(tmp_path / "source", cache_store=cache)
    assert CACHE in str(raised.value)
    # as Zarr says it, for whoever looks for that
    assert "The cache_store must support deletes for CacheStore to function properly." in str(raised.value)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_cache_path_that_is_a_file_or_lies_beneath_one(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("the user's")
    for path in (file, file / "beneath"):
        for name, make in [
            ("cache_store", lambda p: xzcache.CacheStore(MemoryStore(), cache_store=p)),
            ("root", xzcache.LockedLocalStore),
        ]:
            with pytest.raises(ValueError, match=f"{name}='{path}'") as raised:
                make(kind(path))
            assert ROOT in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "the user's"


def test_a_variable_that_is_not_set_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: xzcache.CacheStore(MemoryStore(), cache_store=""), "cache_store", "", ValueError, ROOT)
    refused(lambda: xzcache.LockedLocalStore(""), "root", "", ValueError, ROOT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["true", "False", "TRUE", "false"])
def test_flags_of_the_environment(tmp_path: Path, word: str) -> None:
    code = (
        "import xzcache; from zarr.storage import MemoryStore; "
        f"s = xzcache.CacheStore(MemoryStore(), cache_store={str(tmp_path)!r}); "
        "print(s.revalidate, s.cache_set_data)"
    )
    environment = {**os.environ, "XZCACHE_REVALIDATE": word, "XZCACHE_CACHE_SET_DATA": word}
    told = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.split() == [word.capitalize()] * 2


@pytest.mark.parametrize("value", [None, 7, b"bytes", ["a"], MemoryStore()])
def test_a_root_that_is_none(value: object) -> None:
    refused(lambda: xzcache.LockedLocalStore(value), "root", value, TypeError, ROOT)  # type: ignore[arg-type]


def test_two_bounds_that_contradict_each_other(tmp_path: Path) -> None:
    cache = xzcache.LockedLocalStore(tmp_path / "cache", max_size=1000)
    with pytest.raises(ValueError, match=r"max_size=2000 contradicts .*max_size=1000.*give one of them"):
        xzcache.CacheStore(MemoryStore(), cache_store=cache, max_size=2000)
    assert xzcache.CacheStore(MemoryStore(), cache_store=cache, max_size="1 kB").max_size == 1000


def test_a_generic_cache_store_of_another_source() -> None:
    cache = MemoryStore()
    store = xzcache.CacheStore(MemoryStore(), cache_store=cache)
    write_now(store, "k", b"1")
    with pytest.raises(
        ValueError, match=r"cache_store=MemoryStore caches .* give each source a cache store of its own"
    ):
        xzcache.CacheStore(MemoryStore(), cache_store=cache)
    # nothing lost
    assert cache._store_dict["k"].to_bytes() == b"1"
    assert store.cache_info()["cached_keys"] == 1


# -- keys and values


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/abs"])
async def test_a_key_that_leaves_the_root(key: str, tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "deep" / "cache")
    await store.set(key, buffer(b"1"))
    # taken as a name, and never as a way
    assert await read(store, key) == b"1"
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "deep" / "cache" not in p.parents]
    assert outside == []
    await store.delete(key)
    assert await read(store, key) is None


@pytest.mark.parametrize("key", ["x" * 4000, "\ud800"])
async def test_a_key_that_cannot_be_written_down(key: str, tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache")
    with pytest.raises(ValueError, match="key=") as raised:
        await store.set(key, buffer(b"1"))
    assert "3000 bytes" in str(raised.value)
    assert await read(store, key) is None
    # as a key of a source it is read, if not cached
    source = MemoryStore({key: buffer(b"1")})
    cache = xzcache.CacheStore(source, cache_store=store)
    assert await read(cache, key) == b"1"
    await cache.set(key, buffer(b"2"))
    assert await read(cache, key) == b"2"
    await cache.delete(key)
    assert await read(cache, key) is None


@pytest.mark.parametrize("value", [b"bytes", "text", None, 7])
async def test_a_value_that_is_no_buffer(value: Any, cache_kind: str, tmp_path: Path) -> None:
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    source = MemoryStore({"k": buffer(b"old")})
    store = xzcache.CacheStore(source, cache_store=cache)
    with pytest.raises(TypeError, match="Buffer"):
        await store.set("k", value)
    assert await read(store, "k") == b"old"
    with pytest.raises(TypeError, match="Buffer"):
        await xzcache.LockedLocalStore(tmp_path / "other").set("k", value)


async def test_a_byte_range_that_is_none(cache_kind: str, tmp_path: Path) -> None:
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    store = xzcache.CacheStore(MemoryStore({"k": buffer(b"old")}), cache_store=cache)
    for odd in ((0, 2), 5, "0-2"):
        with pytest.raises((TypeError, ValueError), match="Unexpected byte_range, got"):
            await read(store, "k", odd)  # type: ignore[arg-type]


async def test_a_read_only_store_is_not_written_through(cache_kind: str, tmp_path: Path) -> None:
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    source = MemoryStore({"k": buffer(b"old")})
    store = xzcache.CacheStore(source, cache_store=cache, read_only=True)
    assert await read(store, "k") == b"old"
    for write in (
        lambda: store.set("k", buffer(b"new")),
        lambda: store.set_if_not_exists("new", buffer(b"new")),
        lambda: store._set_many([("k", buffer(b"new"))]),
        lambda: store.delete("k"),
        lambda: store.delete_dir(""),
        lambda: store.clear(),
    ):
        with pytest.raises(ValueError, match="read-only"):
            await write()
    assert store.cache_info()["cached_keys"] == 1
    assert {key: value.to_bytes() for key, value in source._store_dict.items()} == {"k": b"old"}


def _said_by_a_process(tmp_path: Path, yaml: str = "", code: str = "", **env: str) -> str:
    """What a process logs that opens two stores, and how it ends."""
    folder = tmp_path / "home" / ".config" / "xzcache"
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XZCACHE_", "XDG_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import xzcache, zarr\n{code}\nfor _ in range(2): xzcache.CacheStore(zarr.storage.MemoryStore())",
        ],
        env={**kept, "HOME": str(tmp_path / "home"), "XZCACHE_DIRECTORY": str(tmp_path / "cache"), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


@pytest.mark.parametrize(
    ("yaml", "code", "env", "expected"),
    [
        (
            "",
            "",
            {"XZCACHE_MAX_SISE": "5 GB"},
            "environment, XZCACHE_MAX_SISE: max_sise is no setting, did you mean max_size?",
        ),
        ("polcy: lru\n", "", {}, "settings.yaml, line 1: polcy is no setting, did you mean policy?"),
        (
            "# of the cache\nxzcache:\n  max_size: 5 GB\n  polcy: lru\n",
            "",
            {},
            "settings.yaml, line 4: polcy is no setting, did you mean policy?",
        ),
        ("colour: red\n", "", {}, "line 1: colour is no setting; `xzcache config` lists all settings"),
        ("xzcache: 5\n", "", {}, "settings.yaml, line 1: xzcache is no setting; `xzcache config` lists all settings"),
        ("", "", {"DASK_XZCACHE__TREADS": "2"}, "Dask's configuration: treads is no setting, did you mean threads?"),
        (
            "",
            "for _ in range(2): xzcache.config.set(max_sise='1 GB')\nxzcache.config.set({'min-free': 0})",
            {},
            "xzcache.config.set: max_sise is no setting, did you mean max_size?",
        ),
    ],
)
def test_a_name_that_is_no_setting_is_logged_once(
    yaml: str, code: str, env: dict[str, str], expected: str, tmp_path: Path
) -> None:
    said = _said_by_a_process(tmp_path, yaml, code, **env)
    assert said.count("no setting") == 1, said
    assert said.strip().endswith(expected), said


@pytest.mark.parametrize(
    ("yaml", "code", "env", "origin"),
    [
        ("", "", {"XZCACHE_MAX_SIZE": "5 XB"}, "environment, XZCACHE_MAX_SIZE"),
        ("max_size: 5 XB\n", "", {}, "file {home}/.config/xzcache/settings.yaml, line 1"),
        ("\nxzcache:\n  policy: lru\n  max-size: 5 XB\n", "", {}, "file {home}/.config/xzcache/settings.yaml, line 4"),
        ("", "xzcache.config.set(max_size='5 XB')", {}, "xzcache.config.set"),
        ("", "", {"DASK_XZCACHE__MAX_SIZE": "5 XB"}, "Dask's configuration, xzcache.max_size"),
    ],
)
def test_a_bad_value_is_said_to_come_from_somewhere(
    yaml: str, code: str, env: dict[str, str], origin: str, tmp_path: Path
) -> None:
    said = _said_by_a_process(tmp_path, yaml, code, **env)
    assert said.strip().endswith(f"(from {origin.format(home=tmp_path / 'home')})"), said


@pytest.mark.parametrize("yaml", ["max_size: 5 GB\n", "xzcache:\n  max_size: 5 GB\n", "xzcache:\nmax-size: 5 GB\n"])
def test_settings_of_a_file_are_at_its_top_or_in_a_section(yaml: str, tmp_path: Path) -> None:
    code = "import sys; print(xzcache.CacheStore(zarr.storage.MemoryStore()).max_size, file=sys.stderr)"
    assert _said_by_a_process(tmp_path, yaml, code) == "5000000000\n"
    shutil.rmtree(tmp_path / "home")
    assert _said_by_a_process(tmp_path, yaml, code, XZCACHE_MAX_SIZE="6 GB") == "6000000000\n"


def test_what_was_set_is_shown_with_the_names_that_are_no_settings() -> None:
    assert repr(xzcache.config.set(max_size="1 GB")) == "xzcache.config.set({'max_size': '1 GB'})"
    before = xzcache.config.get("policy")
    with xzcache.config.set({"max-sise": "1 GB"}, policy="none"):
        assert xzcache.config.get("policy") == "none"
    assert xzcache.config.get("policy") == before
    assert "did you mean max_size?" in repr(xzcache.config.set(max_sise="1 GB"))
