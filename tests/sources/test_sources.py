"""What can be read: URLs of every kind, paths, stores, snapshots, virtual datasets; read right, and fetched once."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import fsspec.config
import numpy as np
import pytest
import xarray as xr
import zarr
from damage import contents, make_source, read
from servers import (
    CLOSED,
    UPSTREAMS,
    S3Server,
    Web,
    impatient,
    needs_obstore,
    nginx_server,
    nobody,
    obstores_words,
    s3_server,
    serving,
    tidy,
    web_server,
    words,
)
from sources import memory_source
from sources import read as awaited
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, StorePath, ZipStore

import xzcache
from xzcache.sources._obstore import region_of
from xzcache.xarray._globs import expanded

__all__ = ["impatient", "nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# Zarr, of chains of fsspec's that end at an asynchronous file system: they are read all the same.
chained = pytest.mark.filterwarnings("ignore:fs .* was not created with `asynchronous=True`")

ODD = [
    "a b",
    "a+b",
    "a%20b",
    "é",
    "a~b",
    "a#b",
    "a?b",
    "a[0]",
    "a*b",
    "a&b=c",
    "a@b",
    "a:b",
    "a,b;c",
    "a'b",
    'a"b',
    "{x}",
]
"""Names of objects that URLs, patterns or clients might take for something else."""
SECRET = "s3cr3t-Value"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of the same shape, with different values, and what may be found beside them."""
    root = tmp_path_factory.mktemp("data")
    make_source(root / "bucket" / "data.zarr", "a")
    make_source(root / "bucket" / "deep" / "er.zarr", "ab")
    make_source(root / "whole", "a")
    shards = LocalStore(root / "bucket" / "shards.zarr")
    zarr.create_array(shards, name="a", shape=(256,), chunks=(8,), shards=(64,), dtype="i4")[:] = np.arange(256)
    for name in ODD:
        path = root / "bucket" / f"{name}.zarr" / "c"
        path.mkdir(parents=True)
        (path / name).write_text(name)
    return root


@pytest.fixture(scope="module")
def expected(data: Path) -> bytes:
    return contents(data / "bucket" / "data.zarr", "a")


@pytest.fixture(scope="module")
def s3(data: Path) -> Iterator[S3Server]:
    with s3_server(data) as server:
        yield server


def chunks(server: S3Server) -> int:
    """How many times a chunk left the server."""
    return server.counts().only("GET", "*/c/*").requests


def library(store: xzcache.CacheStore) -> str:
    return "fsspec" if isinstance(store._store, FsspecStore) else "obstore"


def get(store: Any, key: str) -> bytes | None:
    return sync(awaited(store, key))


def twice(make: Callable[[], xzcache.CacheStore], expected: bytes, fetched: Callable[[], int] | None = None) -> None:
    """Whatever was read once comes from the cache the next time, through a store that is opened anew."""
    first = make()
    assert read(first, "a") == expected
    # waits for what is still being stored
    assert first.cache_info()["cached_keys"] == 5
    before = fetched() if fetched else 0
    again = make()
    assert read(again, "a") == expected
    if fetched:
        assert before > 0
        assert fetched() == before
    assert again.cache_stats()["hits"] >= 4
    assert again.cache_stats()["cache_errors"] == first.cache_stats()["cache_errors"] == 0


# -- S3, by URL


SPELLINGS: dict[str, Callable[[S3Server], dict[str, Any]]] = {
    "endpoint_url of the client": words,
    "endpoint_url": lambda s3: {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint},
    "a slash at the end": lambda s3: {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint + "/"},
    "user and password": lambda s3: {
        "username": s3.access_key,
        "password": s3.secret_key,
        "endpoint_url": s3.endpoint,
    },
    "all of the client": lambda s3: {
        "client_kwargs": {
            "endpoint_url": s3.endpoint,
            "aws_access_key_id": s3.access_key,
            "aws_secret_access_key": s3.secret_key,
            "region_name": None,
        }
    },
    "nothing more": lambda s3: words(s3, token=None, anon=False, use_ssl=True, requester_pays=False),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_s3(s3: S3Server, tmp_path: Path, expected: bytes, spelling: str, upstream: str) -> None:
    options = SPELLINGS[spelling](s3)

    def make() -> xzcache.CacheStore:
        return xzcache.CacheStore(
            "s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options, upstream=upstream
        )

    s3.reset()
    twice(make, expected, lambda: chunks(s3))
    assert make().path == "s3://bucket/data.zarr"


@needs_obstore
@pytest.mark.parametrize("upstream", ["auto", "obstore"])
def test_s3_in_the_words_of_obstore(s3: S3Server, tmp_path: Path, expected: bytes, upstream: str) -> None:
    options = obstores_words(
        s3, client_options={"timeout": "60s"}, retry_config={"max_retries": 2}, virtual_hosted_style_request=False
    )

    def make() -> xzcache.CacheStore:
        return xzcache.CacheStore(
            "s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options, upstream=upstream
        )

    twice(make, expected, lambda: chunks(s3))
    assert library(make()) == "obstore"


@needs_obstore
def test_s3_is_read_with_obstore_where_nothing_speaks_against_it(s3: S3Server) -> None:
    store = xzcache.CacheStore("s3://bucket/data.zarr", cache_store=MemoryStore(), storage_options=words(s3))
    assert library(store) == "obstore"
    assert pickle.loads(pickle.dumps(store))._store == store._store


def test_the_library_that_is_configured(s3: S3Server) -> None:
    with xzcache.config.set(upstream="fsspec"):
        store = xzcache.CacheStore("s3://bucket/data.zarr", cache_store=MemoryStore(), storage_options=words(s3))
    assert library(store) == "fsspec"


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    ("url", "where", "name"),
    [
        ("s3://bucket/data.zarr/", "bucket/data.zarr", "a"),
        ("s3a://bucket/data.zarr", "bucket/data.zarr", "a"),
        ("s3://bucket/deep/er.zarr", "bucket/deep/er.zarr", "b"),
        ("s3://bucket/deep", "bucket/deep", "er.zarr/b"),
        ("s3://whole", "whole", "a"),
        ("s3://whole/", "whole", "a"),
    ],
)
def test_where_s3_is_read(s3: S3Server, data: Path, url: str, where: str, name: str, upstream: str) -> None:
    store = xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=words(s3), upstream=upstream)
    assert read(store, name) == contents(data / where, name)
    assert names_in(store) == names_in(LocalStore(data / where, read_only=True))


def names_in(store: Any) -> list[str]:
    async def collected() -> list[str]:
        return sorted([name async for name in store.list_dir("")])

    return sync(collected())


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("name", ODD)
def test_names_of_objects_that_look_like_something_else(s3: S3Server, name: str, upstream: str) -> None:
    store = xzcache.CacheStore(
        f"s3://bucket/{name}.zarr", cache_store=MemoryStore(), storage_options=words(s3), upstream=upstream
    )
    assert get(store, f"c/{name}") == name.encode()


def test_names_that_obstore_does_not_take_are_left_to_fsspec(s3: S3Server) -> None:
    for path in ("a/../b", "./b", "a//b", "a\x7fb"):
        store = xzcache.CacheStore(f"s3://bucket/{path}", cache_store=MemoryStore(), storage_options=words(s3))
        assert library(store) == "fsspec"
        with pytest.raises(ValueError, match="'auto' or 'fsspec'"):
            xzcache.CacheStore(
                f"s3://bucket/{path}", cache_store=MemoryStore(), storage_options=words(s3), upstream="obstore"
            )


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_parts_of_shards(s3: S3Server, tmp_path: Path, upstream: str) -> None:
    """Ranges of objects, and what is at their end."""
    for attempt in range(2):
        s3.reset()
        store = xzcache.CacheStore(
            "s3://bucket/shards.zarr", cache_store=tmp_path, storage_options=words(s3), upstream=upstream
        )
        array = zarr.open_array(store, path="a", mode="r")
        assert array[60:70].tolist() == list(range(60, 70))
        assert array[:].tolist() == list(range(256))
        store.cache_info()
        assert (chunks(s3) > 0) == (attempt == 0)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_s3_is_written_and_the_cache_stays_true(tmp_path: Path, upstream: str) -> None:
    (tmp_path / "buckets" / "new").mkdir(parents=True)
    with s3_server(tmp_path / "buckets") as server:
        given: dict[str, Any] = {"cache_store": tmp_path / "cache", "storage_options": words(server)}
        store = xzcache.CacheStore("s3://new/x.zarr", upstream=upstream, **given)
        array = zarr.create_array(store, name="a", shape=8, chunks=4, dtype="i4")
        array[:] = np.arange(8)
        array[:4] = 7
        assert zarr.open_array(store, path="a", mode="r")[:].tolist() == [7, 7, 7, 7, 4, 5, 6, 7]
        plain = server.store("new", "x.zarr", read_only=True)
        assert zarr.open_array(plain, path="a", mode="r")[:].tolist() == [7, 7, 7, 7, 4, 5, 6, 7]


def test_what_is_cached_is_read_while_the_server_is_down(tmp_path: Path, data: Path, expected: bytes) -> None:
    """By whichever library: a store that is made then is the same source."""
    with s3_server(data) as server:
        options = words(server)
        store = xzcache.CacheStore("s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options)
        assert read(store, "a") == expected
        store.cache_info()
    for upstream in ("auto", "fsspec"):
        store = xzcache.CacheStore(
            "s3://bucket/data.zarr",
            cache_store=tmp_path,
            storage_options=options,
            upstream=upstream,
            revalidate=False,
        )
        assert read(store, "a") == expected


# -- options that obstore does not support

UNTRANSLATABLE: list[dict[str, Any]] = [
    {"config_kwargs": {"user_agent": SECRET}},
    {"s3_additional_kwargs": {"ChecksumMode": SECRET}},
    {"default_cache_type": SECRET},
    {"use_ssl": False},
    {"version_aware": True},
    {"cache_regions": True},
    {"client_kwargs": {"verify": SECRET}},
    {"client_kwargs": {"use_ssl": False}},
    {"client_kwargs": {"api_version": SECRET}},
    {"no such option": SECRET},
]


@pytest.mark.parametrize("more", UNTRANSLATABLE, ids=str)
def test_no_option_is_left_out(s3: S3Server, more: dict[str, Any]) -> None:
    options = words(s3) | more
    options["client_kwargs"] = words(s3)["client_kwargs"] | more.get("client_kwargs", {})
    store = xzcache.CacheStore("s3://bucket/data.zarr", cache_store=MemoryStore(), storage_options=options)
    assert library(store) == "fsspec"
    assert store._store.fs.storage_options.items() >= options.items()
    with pytest.raises(ValueError, match="upstream='obstore'") as refused:
        xzcache.CacheStore(
            "s3://bucket/data.zarr", cache_store=MemoryStore(), storage_options=options, upstream="obstore"
        )
    name = next(iter(more.get("client_kwargs", more)))
    if needs_obstore.args[0] is False:
        assert repr(name) in str(refused.value)
    for secret in (SECRET, s3.access_key, s3.secret_key):
        assert secret not in str(refused.value)


@pytest.mark.parametrize("given", [{"client_options": SECRET}, {"client_kwargs": SECRET}])
def test_options_of_a_wrong_type_are_refused_without_their_values(s3: S3Server, given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as refused:
        xzcache.CacheStore(
            "s3://bucket/x", cache_store=MemoryStore(), storage_options=words(s3) | given, upstream="obstore"
        )
    assert SECRET not in str(refused.value)


@needs_obstore
@pytest.mark.parametrize(
    "contradicting",
    [
        {"username": SECRET},
        {"client_kwargs": {"aws_access_key_id": SECRET}},
        {"client_kwargs": {"aws_secret_access_key": SECRET}},
        {"token": "t", "client_kwargs": {"aws_session_token": SECRET}},
        {"endpoint_url": f"http://{SECRET}"},
        {"endpoint": f"http://{SECRET}"},
        {"region": SECRET},
    ],
    ids=str,
)
def test_options_that_contradict_each_other(s3: S3Server, contradicting: dict[str, Any]) -> None:
    """None of them is taken in silence."""
    options = words(s3) | contradicting
    options["client_kwargs"] = words(s3)["client_kwargs"] | contradicting.get("client_kwargs", {})
    with pytest.raises(ValueError, match="upstream='obstore'") as refused:
        xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options, upstream="obstore")
    assert SECRET not in str(refused.value)
    try:
        store = xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options)
    except (TypeError, ValueError, KeyError) as refusal:
        assert SECRET not in str(refusal)  # noqa: PT017
    else:
        assert library(store) == "fsspec"


@chained
def test_options_are_left_as_they_were_given(s3: S3Server) -> None:
    """fsspec writes into what is nested in them."""
    for upstream in ("auto", "fsspec"):
        for url in ("s3://bucket/data.zarr", "simplecache::s3://bucket/data.zarr"):
            options = {"s3": words(s3)}
            xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options, upstream=upstream)
            assert options == {"s3": words(s3)}


# -- credentials that do not open the door


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_a_refusal_by_the_server_is_its_own(s3: S3Server, tmp_path: Path, wrong: str, upstream: str) -> None:
    options = words(s3) | {wrong: SECRET}
    store = xzcache.CacheStore(
        "s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options, upstream=upstream
    )
    s3.reset()
    with pytest.raises(Exception) as refused:  # noqa: PT011
        get(store, "a/c/0")
    if library(store) == "fsspec":
        assert isinstance(refused.value, PermissionError)
    else:
        assert type(refused.value).__name__ == "PermissionDeniedError"
    # nobody tries for long what is forbidden, and it is not kept
    assert s3.counts().requests <= 2
    assert store.cache_info()["cached_keys"] == 0


def test_no_credentials_at_all(s3: S3Server) -> None:
    store = xzcache.CacheStore(
        "s3://bucket/data.zarr", cache_store=MemoryStore(), storage_options={"endpoint_url": s3.endpoint}
    )
    # whichever library reads, in its own kind of exception
    with pytest.raises(Exception, match=r"(?i)find no credentials|unable to locate credentials"):
        get(store, "a/c/0")


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_down(tmp_path: Path) -> None:
    for upstream in ("auto", "fsspec"):
        options = {"key": "k", "secret": SECRET, "endpoint_url": CLOSED}
        store = xzcache.CacheStore(
            "s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options, upstream=upstream
        )
        with pytest.raises(xzcache.SourceUnreachable, match=r"s3://bucket/data\.zarr cannot be reached") as caught:
            get(store, "a/c/0")
        assert "127.0.0.1:9" in str(caught.value.__cause__)


# -- the environment

Case = tuple[dict[str, Any], dict[str, str]]


def _profiles(s3: S3Server, tmp_path: Path) -> str:
    path = tmp_path / "config"
    keys = f"aws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    path.write_text(
        f"[default]\nendpoint_url = {s3.endpoint}\nregion = us-east-1\n"
        f"[profile full]\nendpoint_url = {s3.endpoint}\nregion = us-east-1\n{keys}"
        f"[profile services]\nservices = here\nregion = us-east-1\n{keys}"
        f"[services here]\ns3 =\n  endpoint_url = {s3.endpoint}\n"
    )
    return str(path)


def _keys(s3: S3Server, tmp_path: Path) -> str:
    path = tmp_path / "credentials"
    keys = f"aws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    path.write_text(f"[default]\n{keys}[named]\n{keys}")
    return str(path)


def _signed(s3: S3Server) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}


def _nowhere(s3: S3Server) -> dict[str, Any]:
    """Credentials, and not a word of where to go."""
    return {"key": s3.access_key, "secret": s3.secret_key, "client_kwargs": {"region_name": "us-east-1"}}


REGION = {"client_kwargs": {"region_name": "us-east-1"}}
ENVIRONMENTS: dict[str, Callable[[S3Server, Path], Case]] = {
    # what is given goes before what lies about
    "another key": lambda s3, _: (words(s3), {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "x"}),
    "a session's key": lambda s3, _: (
        words(s3),
        {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "t"},
    ),
    "a lone token": lambda s3, _: (words(s3), {"AWS_SESSION_TOKEN": "t"}),
    "AWS_TOKEN": lambda s3, _: (words(s3), {"AWS_TOKEN": "t", "AWS_SECURITY_TOKEN": "t"}),
    "another endpoint": lambda s3, _: (words(s3), {"AWS_ENDPOINT_URL": CLOSED}),
    "another endpoint for S3": lambda s3, _: (words(s3), {"AWS_ENDPOINT_URL_S3": CLOSED}),
    "another endpoint for obstore": lambda s3, _: (words(s3), {"AWS_ENDPOINT": CLOSED, "AWS_ALLOW_HTTP": "true"}),
    "another region": lambda s3, _: (words(s3), {"AWS_REGION": "eu-west-9", "AWS_DEFAULT_REGION": "eu-west-8"}),
    "another bucket": lambda s3, _: (words(s3), {"AWS_BUCKET": "whole", "AWS_BUCKET_NAME": "whole"}),
    "a role": lambda s3, _: (
        words(s3),
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
    ),
    # what only obstore knows
    "unsigned": lambda s3, _: (words(s3), {"AWS_SKIP_SIGNATURE": "true"}),
    "virtual hosts": lambda s3, _: (words(s3), {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"}),
    "express": lambda s3, _: (words(s3), {"AWS_S3_EXPRESS": "true"}),
    "payer": lambda s3, _: (words(s3), {"AWS_REQUEST_PAYER": "true"}),
    "no http": lambda s3, _: (words(s3), {"AWS_ALLOW_HTTP": "false"}),
    "conditional put": lambda s3, _: (words(s3), {"AWS_CONDITIONAL_PUT": "dynamo:x"}),
    # where to go
    "an endpoint": lambda s3, _: (_nowhere(s3), {"AWS_ENDPOINT_URL": s3.endpoint}),
    "an endpoint for S3": lambda s3, _: (
        _nowhere(s3),
        {"AWS_ENDPOINT_URL_S3": s3.endpoint, "AWS_ENDPOINT_URL": CLOSED},
    ),
    "an endpoint and one for obstore": lambda s3, _: (
        _nowhere(s3),
        {"AWS_ENDPOINT_URL": s3.endpoint, "AWS_ENDPOINT": CLOSED},
    ),
    "all in the environment": lambda s3, _: (
        {},
        {**_signed(s3), "AWS_ENDPOINT_URL": s3.endpoint, "AWS_REGION": "us-east-1"},
    ),
    "an endpoint in a file": lambda s3, tmp: (_nowhere(s3), {"AWS_CONFIG_FILE": _profiles(s3, tmp)}),
    "an endpoint in a file, a key in the environment": lambda s3, tmp: (
        REGION,
        {"AWS_CONFIG_FILE": _profiles(s3, tmp), **_signed(s3)},
    ),
    "an endpoint in a profile of the environment": lambda s3, tmp: (
        REGION,
        {"AWS_CONFIG_FILE": _profiles(s3, tmp), "AWS_PROFILE": "full", **_signed(s3)},
    ),
    "an endpoint among the services of a profile": lambda s3, tmp: (
        REGION,
        {"AWS_CONFIG_FILE": _profiles(s3, tmp), "AWS_PROFILE": "services", **_signed(s3)},
    ),
    "all in a profile": lambda s3, tmp: ({"profile": "full"}, {"AWS_CONFIG_FILE": _profiles(s3, tmp)}),
    "all in a profile of the environment": lambda s3, tmp: (
        {},
        {"AWS_CONFIG_FILE": _profiles(s3, tmp), "AWS_PROFILE": "full"},
    ),
    # where the keys are
    "keys in the environment": lambda s3, _: ({"endpoint_url": s3.endpoint}, _signed(s3)),
    "keys in a file": lambda s3, tmp: (
        {"endpoint_url": s3.endpoint},
        {"AWS_SHARED_CREDENTIALS_FILE": _keys(s3, tmp)},
    ),
    "named keys in a file": lambda s3, tmp: (
        {"endpoint_url": s3.endpoint},
        {"AWS_SHARED_CREDENTIALS_FILE": _keys(s3, tmp), "AWS_PROFILE": "named"},
    ),
    "keys in a file, and a container": lambda s3, tmp: (
        {"endpoint_url": s3.endpoint},
        {
            "AWS_SHARED_CREDENTIALS_FILE": _keys(s3, tmp),
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{CLOSED}/",
        },
    ),
    "keys that the option names over keys that lie about": lambda s3, tmp: (
        {"endpoint_url": s3.endpoint, "profile": "named"},
        {
            "AWS_SHARED_CREDENTIALS_FILE": _keys(s3, tmp),
            "AWS_ACCESS_KEY_ID": "other",
            "AWS_SECRET_ACCESS_KEY": "x",
        },
    ),
}


@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_environment_is_no_trap(
    s3: S3Server, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, name: str, upstream: str
) -> None:
    """Unasked, nothing else is read than fsspec reads, and nothing fails that it can do."""
    options, environment = ENVIRONMENTS[name](s3, tmp_path)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    store = xzcache.CacheStore(
        "s3://bucket/data.zarr", cache_store=tmp_path / "cache", storage_options=options, upstream=upstream
    )
    assert read(store, "a") == expected


@needs_obstore
@pytest.mark.parametrize("name", [name for name in ENVIRONMENTS if "file" not in name and "profile" not in name])
def test_the_environment_is_no_trap_for_obstore(
    s3: S3Server, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Asked for by its name, it may refuse, but not read something else."""
    options, environment = ENVIRONMENTS[name](s3, tmp_path)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    try:
        store = xzcache.CacheStore(
            "s3://bucket/data.zarr", cache_store=tmp_path / "cache", storage_options=options, upstream="obstore"
        )
    except ValueError as refusal:
        assert "upstream='obstore' cannot read this" in str(refusal)  # noqa: PT017
    else:
        assert read(store, "a") == expected


@pytest.mark.parametrize("key", ["options", "environment"])
def test_what_fsspec_is_configured_with(
    s3: S3Server, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """In its files, or as FSSPEC_S3_ENDPOINT_URL."""

    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3.endpoint})
    for variable, value in _signed(s3).items() if key == "environment" else ():
        monkeypatch.setenv(variable, value)
    options = _nowhere(s3) if key == "options" else REGION
    store = xzcache.CacheStore("s3://bucket/data.zarr", cache_store=tmp_path, storage_options=options)
    assert read(store, "a") == expected


@pytest.mark.parametrize(
    ("url", "options", "environment"),
    [
        # whoever has said where else to go is not sent to Amazon, and the other way round
        ("s3://b/x", {"key": "k", "secret": "s", **REGION}, {"AWS_ENDPOINT": CLOSED}),
        ("s3://b/x", {"key": "k", "secret": "s", **REGION}, {"AWS_CA_BUNDLE": "/ca.pem"}),
        (
            "s3://b/x",
            {"key": "k", "secret": "s", **REGION},
            {"AWS_ENDPOINT_URL": CLOSED, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
        ),
    ],
    ids=["AWS_ENDPOINT", "AWS_CA_BUNDLE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"],
)
def test_what_obstore_takes_otherwise_is_left_to_fsspec(
    monkeypatch: pytest.MonkeyPatch, url: str, options: dict[str, Any], environment: dict[str, str]
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    store = xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options)
    if isinstance(store._store, ObjectStore):
        # or it was told so expressly
        assert store._store.store.config.get("endpoint", "").endswith(".amazonaws.com")
        assert "AWS_CA_BUNDLE" not in environment


# -- what reaches the server


def signed_for(tmp_path: Path, upstream: str, **options: Any) -> dict[str, str]:
    """The headers of a request for an object, sent by a copy of the store; names in lower case."""
    (tmp_path / "site" / "bucket" / "x").mkdir(parents=True, exist_ok=True)
    (tmp_path / "site" / "bucket" / "x" / "k").write_bytes(b"1")
    with web_server(tmp_path / "site") as web:
        store = xzcache.CacheStore(
            "s3://bucket/x",
            cache_store=MemoryStore(),
            storage_options={"endpoint_url": web.url, **options},
            upstream=upstream,
        )
        assert get(pickle.loads(pickle.dumps(store)), "k") == b"1"
        assert [request.path for request in web.requests] == ["/bucket/x/k"]
        return {name.lower(): value for name, value in web.requests[0].headers.items()}


def region_in(headers: dict[str, str]) -> str:
    return headers["authorization"].split("/")[2]


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_nobody_signs_for_the_anonymous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    assert "authorization" not in signed_for(tmp_path, upstream, anon=True)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_all_options_arrive(tmp_path: Path, upstream: str) -> None:
    headers = signed_for(
        tmp_path, upstream, key="K", secret="S", token="T", requester_pays=True, client_kwargs={"region_name": "r-7"}
    )
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=K/")
    assert region_in(headers) == "r-7"
    assert headers["x-amz-security-token"] == "T"
    assert headers["x-amz-request-payer"] == "requester"


@pytest.mark.parametrize(
    ("environment", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_REGION": "r-1"}, "us-east-1"),
        ({"AWS_DEFAULT_REGION": "r-2"}, "r-2"),
        ({"AWS_REGION": "r-1", "AWS_DEFAULT_REGION": "r-2"}, "r-2"),
        ({"AWS_CONFIG_FILE": "config"}, "r-3"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_requests_are_signed_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], region: str, upstream: str
) -> None:
    """For the region that boto finds: servers that look at it refuse any other."""
    (tmp_path / "config").write_text("[default]\nregion = r-3\n")
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert region_in(signed_for(tmp_path, upstream, key="K", secret="S")) == region


# -- where Amazon keeps a bucket


class Amazon(BaseHTTPRequestHandler):
    """Answers as its S3 does to somebody who may know nothing of a bucket; the bucket's name says how."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        status, _, region = self.path.strip("/").partition("-")
        self.send_response(int(status))
        if region:
            self.send_header("x-amz-bucket-region", region)
        self.send_header("Location", "/200-elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def amazon() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Amazon,), {"asked": []})
    with serving(handler) as url:
        yield url, handler.asked


@pytest.mark.parametrize("status", [200, 301, 307, 403, 404])
def test_a_region_is_told_whoever_asks(amazon: tuple[str, list[str]], status: int) -> None:
    url, asked = amazon
    assert [region_of(f"{status}-eu-west-1", url) for _ in range(2)] == ["eu-west-1"] * 2
    # once for each process, and nobody is followed elsewhere
    assert asked == [f"/{status}-eu-west-1"]


@pytest.mark.parametrize("status", [200, 301, 403, 404, 500])
def test_a_region_that_is_not_told_is_asked_for_again(amazon: tuple[str, list[str]], status: int) -> None:
    url, asked = amazon
    assert [region_of(str(status), url) for _ in range(2)] == [None, None]
    assert asked == [f"/{status}"] * 2


def test_a_region_that_nobody_is_there_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert region_of("bucket", CLOSED) is None
    assert region_of("bucket", "no://where") is None
    monkeypatch.setattr("xzcache.sources._obstore._SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert region_of("bucket", f"http://127.0.0.1:{silent.getsockname()[1]}") is None


def test_a_bucket_is_one_part_of_the_question(amazon: tuple[str, list[str]]) -> None:
    url, asked = amazon
    region_of("200-a b", url)
    assert asked == ["/200-a%20b"]


@needs_obstore
def test_a_bucket_whose_region_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"key": "k", "secret": SECRET}
    store = xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options)
    assert library(store) == "fsspec"
    with pytest.raises(ValueError, match="region_name") as refused:
        xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options, upstream="obstore")
    assert SECRET not in str(refused.value)
    monkeypatch.setattr("xzcache.sources._obstore.region_of", lambda bucket: f"region-of-{bucket}")
    store = xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options)
    assert store._store.store.config["region"] == "region-of-bucket"
    given = xzcache.CacheStore("s3://bucket/x", cache_store=MemoryStore(), storage_options=options | REGION)
    assert given._store.store.config["region"] == "us-east-1"


# -- Google's and Microsoft's, which nobody has here: what comes out is looked at

MADE: list[Any] = [
    ("gs://b/p/x.zarr", {"token": "anon"}, {}, "GCSStore", "p/x.zarr", {"bucket": "b", "skip_signature": "true"}),
    ("gcs://b", {"token": "anon"}, {}, "GCSStore", None, {"bucket": "b"}),
    ("gs://b/x/", {"skip_signature": True}, {}, "GCSStore", "x", {"skip_signature": "true"}),
    (
        "az://c/p/x.zarr",
        {"account_name": "acc", "account_key": "a2V5"},
        {},
        "AzureStore",
        "p/x.zarr",
        {"container_name": "c", "account_name": "acc", "account_key": "a2V5"},
    ),
    ("az://c", {"account_name": "acc", "anon": True}, {}, "AzureStore", None, {"skip_signature": "true"}),
    (
        "abfs://c@acc.dfs.core.windows.net/x",
        {"sas_token": "?sv=1&sig=x"},
        {},
        "AzureStore",
        "x",
        {"container_name": "c", "account_name": "acc", "sas_key": "?sv=1&sig=x"},
    ),
    (
        "abfss://c@acc.blob.core.windows.net/x",
        {"tenant_id": "t", "client_id": "i", "client_secret": "s"},
        {},
        "AzureStore",
        "x",
        {"account_name": "acc", "client_id": "i", "client_secret": "s"},
    ),
    (
        "az://c/x",
        {"account_key": "a2V5"},
        {"AZURE_STORAGE_ACCOUNT_NAME": "acc"},
        "AzureStore",
        "x",
        {"account_key": "a2V5"},
    ),
    (
        "az://c/x",
        {"account_name": "acc", "account_key": "a2V5", "endpoint": "http://127.0.0.1:1/acc"},
        {},
        "AzureStore",
        "x",
        {"endpoint": "http://127.0.0.1:1/acc"},
    ),
]


@needs_obstore
@pytest.mark.parametrize(("url", "options", "environment", "kind", "prefix", "config"), MADE)
@pytest.mark.parametrize("upstream", ["auto", "obstore"])
def test_what_is_made_of_a_url(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    options: dict[str, Any],
    environment: dict[str, str],
    kind: str,
    prefix: str | None,
    config: dict[str, str],
    upstream: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options, upstream=upstream)
    made = store._store.store
    assert (type(made).__name__, made.prefix) == (kind, prefix)
    assert made.config.items() >= config.items()


@needs_obstore
def test_a_service_account_of_google() -> None:
    """Its text goes into a pickle, as any other option, and nowhere else."""
    account = {"type": "service_account", "private_key": SECRET}
    with pytest.raises(ValueError, match="upstream='obstore'") as refused:
        # this one is not a good one
        xzcache.CacheStore(
            "gs://b/x", cache_store=MemoryStore(), storage_options={"token": account}, upstream="obstore"
        )
    assert SECRET not in str(refused.value)


@needs_obstore
@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("gs://b/x", {"token": "cloud"}, "token"),
        ("gs://b/x", {"token": {"type": "other", "key": SECRET}}, "token"),
        ("gs://b/x", {"token": "anon", "project": SECRET}, "project"),
        ("gs://b/x", {"token": "anon", "endpoint_url": SECRET}, "endpoint_url"),
        ("az://c/x", {"anon": True}, "account_name"),
        ("az://c/x", {"connection_string": SECRET}, "connection_string"),
        ("az://c/x", {"account_name": "a", "credential": SECRET}, "credential"),
        ("az://c/x", {"account_name": "a", "account_host": SECRET}, "account_host"),
        ("http://h/x", {"headers": {"x": SECRET}}, "headers"),
        ("http://h/x", {"client_kwargs": {"headers": {}, "auth": SECRET}}, "client_kwargs"),
        ("http://h/x", {"block_size": 2}, "block_size"),
        ("http://h/x?sig=" + SECRET, {}, "query"),
        (f"http://u:{SECRET}@h/x", {}, "user"),
        # not where the account's name would be looked for
        ("abfss://c@acc.dfs.core.chinacloudapi.cn/x", {"anon": True}, ""),
        ("abfss://w@onelake.dfs.fabric.microsoft.com/x", {"anon": True}, ""),
    ],
)
def test_what_obstore_has_no_word_for(url: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="upstream='obstore'") as refused:
        xzcache.CacheStore(url, cache_store=MemoryStore(), storage_options=options, upstream="obstore")
    assert named in str(refused.value)
    assert SECRET not in str(refused.value)


@needs_obstore
@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is there")
def test_google_without_its_package_for_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing is in sight that obstore could sign with, but there is no other way
    assert library(xzcache.CacheStore("gs://b/x", cache_store=MemoryStore())) == "obstore"
    with pytest.raises(ImportError, match="gcsfs"):
        xzcache.CacheStore("gs://b/x", cache_store=MemoryStore(), upstream="fsspec")
    # gcsfs would go elsewhere
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", CLOSED)
    with pytest.raises(ImportError, match="gcsfs"):
        xzcache.CacheStore("gs://b/x", cache_store=MemoryStore(), storage_options={"token": "anon"})


@needs_obstore
@pytest.mark.parametrize("content", [{"type": "external_account", "audience": "x"}, {}, None])
def test_credentials_of_google_that_obstore_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, str] | None
) -> None:
    file = tmp_path / "credentials.json"
    if content is not None:
        file.write_text(json.dumps(content))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ImportError, match="gcsfs"):
            xzcache.CacheStore("gs://b/x", cache_store=MemoryStore())
    else:
        assert library(xzcache.CacheStore("gs://b/x", cache_store=MemoryStore())) == "fsspec"


# -- URLs that nobody reads


@pytest.mark.parametrize("url", ["nosuch://x", "nosuch::file:///x", "gopher+x://y/z", "S4://b/x"])
@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_a_scheme_that_nobody_reads(tmp_path: Path, url: str, upstream: str) -> None:
    with pytest.raises(ValueError, match="scheme '") as refused:
        xzcache.CacheStore(url, cache_store=tmp_path / "cache", upstream=upstream)
    text = str(refused.value)
    for part in ("s3", "gs", "abfs", "https", "xzcache[remote]", "github", "zip", "package"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "package"), [("oss://b/x", "ossfs"), ("box://x", "boxfs"), ("hdfs://h/x", "pyarrow")])
def test_a_scheme_whose_package_is_missing(url: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip("it is there")
    with pytest.raises(ImportError, match=package):
        xzcache.CacheStore(url, cache_store=MemoryStore())


# -- the web


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hierarchy that is not consolidated, so that it has to be listed."""
    root = tmp_path_factory.mktemp("site")
    root.chmod(0o755)
    make_source(root / "data.zarr", ["a", "b c", "ü", "p+q", "r&s", "t%20u"])
    group = zarr.open_group(LocalStore(root / "data.zarr"), mode="a")
    group.create_group("sub").create_array("deep", shape=4, chunks=2, dtype="i4")[:] = 7
    return root


MEMBERS = ["a", "b c", "p+q", "r&s", "sub", "sub/deep", "t%20u", "ü"]


@pytest.fixture
def web(site: Path) -> Iterator[Web]:
    with web_server(site) as server:
        yield server


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_http(web: Web, site: Path, tmp_path: Path, upstream: str, slash: str) -> None:
    def make() -> xzcache.CacheStore:
        return xzcache.CacheStore(f"{web.url}/data.zarr{slash}", cache_store=tmp_path, upstream=upstream)

    twice(make, contents(site / "data.zarr", "a"), web.chunks)
    assert make().path == f"{web.url}/data.zarr"
    assert get(make(), "a/c/99") is None


@contextmanager
def serving_site(kind: str, site: Path, scratch: Path) -> Iterator[str]:
    if kind == "nginx":
        scratch.mkdir()
        with nginx_server(site, scratch) as url:
            yield url
    else:
        with web_server(site) as web:
            yield web.url


@needs_obstore
@pytest.mark.parametrize("kind", ["python", "nginx"])
def test_a_hierarchy_is_found_through_the_links_of_its_pages(site: Path, tmp_path: Path, kind: str) -> None:
    with serving_site(kind, site, tmp_path / "scratch") as url:
        store = xzcache.CacheStore(f"{url}/data.zarr", cache_store=tmp_path / "cache")
        assert library(store) == "obstore"
        # Zarr warns of names that are no part of a hierarchy
        members = dict(zarr.open_group(store, mode="r").members(max_depth=None))
        assert sorted(members) == MEMBERS
        for name in MEMBERS:
            if name not in ("sub", "sub/deep"):
                assert read(store, name) == contents(site / "data.zarr", name)
        assert members["sub/deep"][:].tolist() == [7, 7, 7, 7]
        assert sync(store.getsize_prefix("sub/deep/c")) == sync(
            LocalStore(site / "data.zarr").getsize_prefix("sub/deep/c")
        )
        assert not sync(store.is_empty("sub"))


@pytest.mark.parametrize(
    "options",
    [
        {"client_kwargs": {"headers": {"X-Key": SECRET}}},
        {"headers": {"X-Key": SECRET}},
        pytest.param({"client_options": {"default_headers": {"X-Key": SECRET}}}, marks=needs_obstore),
    ],
    ids=["client_kwargs", "headers", "client_options"],
)
def test_headers_go_with_every_request(web: Web, site: Path, options: dict[str, Any]) -> None:
    store = xzcache.CacheStore(f"{web.url}/data.zarr", cache_store=MemoryStore(), storage_options=options)
    assert read(store, "a") == contents(site / "data.zarr", "a")
    assert names_in(store) != []
    assert len(web.requests) > 5
    for request in web.requests:
        assert {name.lower(): value for name, value in request.headers.items()}["x-key"] == SECRET


def test_headers_that_fsspec_is_configured_with(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"X-Key": SECRET}})
    store = xzcache.CacheStore(f"{web.url}/data.zarr", cache_store=MemoryStore())
    assert get(store, "a/c/0") is not None
    assert {name.lower() for name in web.requests[-1].headers} >= {"x-key"}


def test_a_user_in_the_url_signs_in(web: Web) -> None:
    url = web.url.replace("://", "://charlotte:pass%40word@")
    store = xzcache.CacheStore(f"{url}/data.zarr", cache_store=MemoryStore())
    assert get(store, "a/c/0") is not None
    assert web.requests[-1].headers["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_by_a_web_server_is_its_own(tmp_path: Path, upstream: str, status: int) -> None:
    class Refusing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Refusing) as url:
        retry = {"retry_config": {"max_retries": 0}} if upstream == "obstore" else None
        store = xzcache.CacheStore(url, cache_store=tmp_path, upstream=upstream, storage_options=retry)
        with pytest.raises(Exception, match=str(status)) as refused:
            get(store, "a")
        error: BaseException | None = refused.value
        if status == 500:
            assert isinstance(error, xzcache.SourceUnreachable)
            error = error.__cause__
        assert type(error).__module__.partition(".")[0] in ("aiohttp", "obstore")
        assert store.cache_info()["cached_keys"] == 0


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_server_that_sends_elsewhere(web: Web, upstream: str) -> None:
    class Moved(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", web.url + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Moved) as url:
        store = xzcache.CacheStore(f"{url}/data.zarr", cache_store=MemoryStore(), upstream=upstream)
        assert get(store, "a/c/0") is not None


# -- this machine


SPELLED: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "path": lambda path: path,
    "a slash at the end": lambda path: f"{path}/",
    "file": lambda path: f"file://{path}",
    "home": lambda path: f"~/{path.name}",
    "relative": lambda path: path.name,
    "a relative path": lambda path: Path(path.name),
    "a roundabout path": lambda path: path.parent / "x" / ".." / path.name,
    "store": lambda path: LocalStore(path, read_only=True),
    "relative store": lambda path: LocalStore(path.name, read_only=True),
    "store and path": lambda path: StorePath(LocalStore(path, read_only=True)),
    "local": lambda path: pytest.importorskip("fsspec.implementations.asyn_wrapper") and f"local://{path}",
    "map": lambda path: pytest.importorskip("fsspec.implementations.asyn_wrapper") and _mapped(f"file://{path}"),
    "upath": lambda path: pytest.importorskip("upath").UPath(path),
    "upath of a url": lambda path: pytest.importorskip("upath").UPath(f"file://{path}"),
}


def _mapped(url: str, **options: Any) -> Any:

    return fsspec.get_mapper(url, **options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that one is in, and that is home."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "x").mkdir()
    make_source(home / "data.zarr", "a")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_directory(here: Path, tmp_path: Path, spelled: str) -> None:
    given = SPELLED[spelled](here / "data.zarr")
    twice(lambda: xzcache.CacheStore(given, cache_store=tmp_path / "cache"), contents(here / "data.zarr", "a"))
    store = xzcache.CacheStore(given, cache_store=tmp_path / "cache")
    # however it is given, it is the same source
    assert store.namespace == xzcache.CacheStore(here / "data.zarr", cache_store=tmp_path / "cache").namespace
    assert store.path == str(here / "data.zarr")


@pytest.mark.parametrize("spelled", ["relative", "a relative path", "relative store"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_a_relative_path_means_what_it_meant(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str, copied: bool
) -> None:
    """Wherever the process goes, or a copy of the store is used."""
    elsewhere = tmp_path / "elsewhere"
    make_source(elsewhere / "data.zarr", ["x", "a"])
    truth = contents(here / "data.zarr", "a")
    assert contents(elsewhere / "data.zarr", "a") != truth
    store = xzcache.CacheStore(SPELLED[spelled](here / "data.zarr"), cache_store=tmp_path / "cache")
    monkeypatch.chdir(elsewhere)
    if copied:
        store = pickle.loads(pickle.dumps(store))
    told = read(store, "a")
    # what matters most: nobody else is told of elsewhere
    assert read(xzcache.CacheStore(here / "data.zarr", cache_store=tmp_path / "cache"), "a") == truth
    assert told == truth


def test_a_link_that_comes_to_point_elsewhere(here: Path, tmp_path: Path) -> None:
    """As "latest" does: nothing of the new is kept under the name of the old."""
    make_source(tmp_path / "new.zarr", ["x", "a"])
    link = tmp_path / "latest.zarr"
    link.symlink_to(here / "data.zarr")
    old, new = contents(here / "data.zarr", "a"), contents(tmp_path / "new.zarr", "a")
    assert old != new
    store = xzcache.CacheStore(link, cache_store=tmp_path / "cache")
    link.unlink()
    link.symlink_to(tmp_path / "new.zarr")
    read(store, "a")
    assert read(xzcache.CacheStore(here / "data.zarr", cache_store=tmp_path / "cache"), "a") == old
    assert read(xzcache.CacheStore(link, cache_store=tmp_path / "cache"), "a") == new


def test_a_directory_whose_name_looks_like_a_chain(tmp_path: Path) -> None:
    make_source(tmp_path / "a::b.zarr", "a")
    store = xzcache.CacheStore(str(tmp_path / "a::b.zarr"), cache_store=tmp_path / "cache")
    assert read(store, "a") == contents(tmp_path / "a::b.zarr", "a")


def test_a_zip_store(here: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "data"), "zip", here / "data.zarr"))
    truth = contents(here / "data.zarr", "a")
    twice(lambda: xzcache.CacheStore(ZipStore(archive, mode="r"), cache_store=tmp_path / "cache"), truth)


def test_memory(tmp_path: Path) -> None:
    source = memory_source()
    zarr.create_array(source, name="a", data=np.arange(64, dtype="i4"), chunks=16)
    truth = np.arange(64, dtype="i4").tobytes()
    twice(lambda: xzcache.CacheStore(source, cache_store=tmp_path), truth, lambda: source.count("get", "a/c/0"))
    as_dict = dict(source._store._store_dict)
    twice(lambda: xzcache.CacheStore(as_dict, cache_store=tmp_path), truth)


# -- chains of fsspec's


@pytest.fixture
def wrapper() -> None:
    """fsspec has to make file systems asynchronous."""
    pytest.importorskip("fsspec.implementations.asyn_wrapper")


@pytest.mark.usefixtures("wrapper")
def test_a_file_in_an_archive(here: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", here)
    truth = contents(here / "data.zarr", "a")
    for url in (f"zip://data.zarr::file://{archive}", f"zip://data.zarr::{archive}"):
        twice(lambda url=url: xzcache.CacheStore(url, cache_store=tmp_path / "cache"), truth)  # type: ignore[misc]


@pytest.mark.usefixtures("wrapper")
def test_a_chain_that_ends_here(here: Path, tmp_path: Path) -> None:
    url = f"simplecache::file://{here}/data.zarr"
    twice(lambda: xzcache.CacheStore(url, cache_store=tmp_path / "cache"), contents(here / "data.zarr", "a"))


@chained
@pytest.mark.usefixtures("wrapper")
@pytest.mark.parametrize(
    "chain",
    [
        "zip://data.zarr::s3://archives/data.zip",
        "simplecache::s3://bucket/data.zarr",
        "filecache::s3://bucket/data.zarr",
    ],
)
def test_a_chain_that_ends_at_a_server(tmp_path: Path, here: Path, chain: str) -> None:
    (tmp_path / "buckets" / "archives").mkdir(parents=True)
    shutil.copytree(here / "data.zarr", tmp_path / "buckets" / "bucket" / "data.zarr")
    shutil.make_archive(str(tmp_path / "buckets" / "archives" / "data"), "zip", here)
    with s3_server(tmp_path / "buckets") as server:
        # one's own, which no other test has used in another event loop
        options = {"s3": words(server)}
        if chain.startswith("filecache"):
            options["filecache"] = {"cache_storage": str(tmp_path / "files")}

        def make() -> xzcache.CacheStore:
            return xzcache.CacheStore(chain, cache_store=tmp_path / "cache", storage_options=options)

        twice(make, contents(here / "data.zarr", "a"))


@pytest.mark.usefixtures("wrapper")
def test_a_chain_that_ends_in_the_web(web: Web, site: Path, tmp_path: Path) -> None:
    options = {"http": {"asynchronous": True}}

    def make() -> xzcache.CacheStore:
        url = f"simplecache::{web.url}/data.zarr"
        return xzcache.CacheStore(url, cache_store=tmp_path / "cache", storage_options=options)

    twice(make, contents(site / "data.zarr", "a"), web.chunks)


@pytest.mark.usefixtures("wrapper")
def test_a_file_system_in_memory(tmp_path: Path) -> None:

    files = fsspec.filesystem("memory")
    make_source(tmp_path / "data.zarr", "a")
    files.put(str(tmp_path / "data.zarr"), "/sources/data.zarr", recursive=True)
    try:
        truth = contents(tmp_path / "data.zarr", "a")
        twice(lambda: xzcache.CacheStore("memory://sources/data.zarr", cache_store=tmp_path / "cache"), truth)
        mapped = files.get_mapper("/sources/data.zarr")
        twice(lambda: xzcache.CacheStore(mapped, cache_store=tmp_path / "cache2"), truth)
    finally:
        files.rm("/sources", recursive=True)


def test_a_map_and_a_upath_of_s3(s3: S3Server, tmp_path: Path, expected: bytes) -> None:
    options = words(s3)
    mapped = _mapped("s3://bucket/data.zarr", **options)
    twice(lambda: xzcache.CacheStore(mapped, cache_store=tmp_path / "map"), expected, lambda: chunks(s3))
    upath = pytest.importorskip("upath").UPath("s3://bucket/data.zarr", **options)
    twice(lambda: xzcache.CacheStore(upath, cache_store=tmp_path / "upath"), expected, lambda: chunks(s3))


def test_stores_of_zarrs(s3: S3Server, tmp_path: Path, expected: bytes) -> None:
    plain = s3.store("bucket", "data.zarr", read_only=True)
    twice(lambda: xzcache.CacheStore(plain, cache_store=tmp_path), expected, lambda: chunks(s3))
    over_fsspec = FsspecStore.from_url("s3://bucket/data.zarr", storage_options=words(s3), read_only=True)
    # cached already
    before = chunks(s3)
    assert read(xzcache.CacheStore(over_fsspec, cache_store=tmp_path), "a") == expected
    assert chunks(s3) == before


# -- Icechunk


@pytest.fixture
def repository(tmp_path: Path) -> Any:
    icechunk = pytest.importorskip("icechunk")
    return icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repository")))


def committed(repository: Any, value: int) -> str:
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="a", shape=8, chunks=4, dtype="i4", overwrite=True)[:] = value
    return str(session.commit(f"value {value}"))


def value_of(store: Any) -> list[int]:
    return sorted(set(zarr.open_array(store, path="a", mode="r")[:].tolist()))


def test_snapshots_of_icechunk(repository: Any, tmp_path: Path) -> None:
    snapshots = {value: committed(repository, value) for value in (1, 2, 3)}
    repository.create_tag("two", snapshot_id=snapshots[2])
    for _ in range(2):
        for value, snapshot in snapshots.items():
            session = repository.readonly_session(snapshot_id=snapshot)
            store = xzcache.CacheStore(session.store, cache_store=tmp_path / "cache")
            assert value_of(store) == [value]
            store.cache_info()
    assert store.cache_stats()["misses"] == 0
    assert store.read_only
    tagged = xzcache.CacheStore(repository.readonly_session(tag="two").store, cache_store=tmp_path / "cache")
    assert value_of(tagged) == [2]
    assert tagged.cache_stats()["misses"] == 0
    latest = xzcache.CacheStore(repository.readonly_session("main").store, cache_store=tmp_path / "cache")
    committed(repository, 4)
    assert value_of(latest) == [3]


def test_a_session_of_icechunk_that_writes(repository: Any, tmp_path: Path) -> None:
    committed(repository, 1)
    session = repository.writable_session("main")
    store = xzcache.CacheStore(session.store, cache_store=tmp_path / "cache")
    assert value_of(store) == [1]
    zarr.open_array(store, path="a", mode="r+")[:] = 2
    assert value_of(store) == [2]
    # what was not committed is nobody else's
    other = xzcache.CacheStore(repository.writable_session("main").store, cache_store=tmp_path / "cache")
    assert value_of(other) == [1]
    session.commit("two")
    assert value_of(store) == [2]
    committed_store = xzcache.CacheStore(repository.readonly_session("main").store, cache_store=tmp_path / "cache")
    assert value_of(committed_store) == [2]


# -- virtual datasets: the bytes are in other files


@pytest.fixture
def netcdf(tmp_path: Path) -> tuple[Path, xr.Dataset]:
    """A file as models write it, with a record for each time."""
    pytest.importorskip("scipy")
    root = tmp_path / "files" / "data"
    root.mkdir(parents=True)
    dataset = xr.Dataset({"a": (("time", "x"), np.random.default_rng(7).random((6, 500)))})
    dataset.to_netcdf(root / "one.nc", engine="scipy", format="NETCDF3_64BIT", unlimited_dims=["time"])
    return root / "one.nc", dataset


def references(file: Path, *, url: str = "", inline: int = 0) -> dict[str, Any]:
    kerchunk = pytest.importorskip("kerchunk.netCDF3")
    found: dict[str, Any] = kerchunk.NetCDF3ToZarr(str(file), inline_threshold=inline).translate()
    table = found.get("refs", found)
    moved = {key: [url or value[0], *value[1:]] if isinstance(value, list) else value for key, value in table.items()}
    return {"version": 1, "refs": moved}


def virtual_twice(make: Callable[[], xzcache.CacheStore], dataset: xr.Dataset) -> None:
    for attempt in range(2):
        store = make()
        opened = xr.open_zarr(store, consolidated=False, chunks=None)
        np.testing.assert_array_equal(opened["a"].values, dataset["a"].values)
        store.cache_info()
        assert attempt == 0 or store.cache_stats()["bytes_from_source"] < dataset["a"].nbytes
        assert store.cache_stats()["cache_errors"] == 0


@pytest.mark.parametrize("inline", [0, 10**6], ids=["", "inline"])
@pytest.mark.parametrize("given", ["mapping", "file", "chain"])
def test_references_of_kerchunk(tmp_path: Path, netcdf: tuple[Path, xr.Dataset], given: str, inline: int) -> None:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    file, dataset = netcdf
    table = references(file, inline=inline)
    (tmp_path / "table.json").write_text(json.dumps(table))

    def make() -> xzcache.CacheStore:
        if given == "chain":
            return xzcache.CacheStore(f"reference::{tmp_path}/table.json", cache_store=tmp_path / "cache")
        options = {"fo": table if given == "mapping" else str(tmp_path / "table.json")}
        return xzcache.CacheStore("reference://", cache_store=tmp_path / "cache", storage_options=options)

    virtual_twice(make, dataset)


@pytest.mark.parametrize("given", ["mapping", "file", "remote", "file system"])
def test_references_to_a_server(tmp_path: Path, netcdf: tuple[Path, xr.Dataset], given: str) -> None:
    file, dataset = netcdf
    table = references(file, url="s3://data/one.nc")
    for path in (tmp_path / "table.json", file.parent / "table.json"):
        path.write_text(json.dumps(table))
    with s3_server(tmp_path / "files") as server:

        def make() -> xzcache.CacheStore:
            remote = {"remote_protocol": "s3", "remote_options": words(server, asynchronous=True)}
            options: dict[str, Any] = {
                "mapping": {"fo": table},
                "file": {"fo": str(tmp_path / "table.json")},
                "remote": {"fo": "s3://data/table.json", "target_options": words(server)},
                "file system": {"fo": table},
            }[given] | remote
            if given != "file system":
                return xzcache.CacheStore("reference://", cache_store=tmp_path / "cache", storage_options=options)

            files = fsspec.filesystem("reference", asynchronous=True, **options)
            return xzcache.CacheStore(FsspecStore(files, read_only=True, path=""), cache_store=tmp_path / "cache")

        virtual_twice(make, dataset)
        fetched = server.counts().only("GET", "data/one.nc").requests
        virtual_twice(make, dataset)
        # all that is read again is what tells a dataset's shape
        assert server.counts().only("GET", "data/one.nc").requests == fetched


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_dataset_of_virtualizarr(tmp_path: Path, netcdf: tuple[Path, xr.Dataset], where: str) -> None:
    parsers = pytest.importorskip("virtualizarr.parsers")
    registry = pytest.importorskip("obspec_utils.registry").ObjectStoreRegistry
    from obstore.store import LocalStore as Files

    file, dataset = netcdf
    if where == "here":
        made = parsers.NetCDF3Parser()(url=f"file://{file}", registry=registry({"file://": Files()}))
        virtual_twice(lambda: xzcache.CacheStore(made, cache_store=tmp_path / "cache"), dataset)
        copy = pickle.loads(pickle.dumps(made))
        virtual_twice(lambda: xzcache.CacheStore(copy, cache_store=tmp_path / "cache"), dataset)
        return
    with s3_server(tmp_path / "files") as server:
        stores = registry({"s3://data": server.store("data").store})
        made = parsers.NetCDF3Parser()(url="s3://data/one.nc", registry=stores)
        make = lambda: xzcache.CacheStore(made, cache_store=tmp_path / "cache")  # noqa: E731
        virtual_twice(make, dataset)
        server.reset()
        virtual_twice(make, dataset)
        assert server.counts().only("GET", "data/one.nc").requests == 0


# -- many at once


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A dataset in three stores of a bucket, one of which is meant for somebody else."""
    root = tmp_path_factory.mktemp("parts")
    for number in range(3):
        values = np.arange(8.0).reshape(4, 2) + 8 * number
        dataset = xr.Dataset({"t": (("time", "x"), values)}, coords={"time": np.arange(4) + 4 * number})
        dataset.chunk(time=2).to_zarr(root / "bucket" / f"part{number}.zarr", zarr_format=3)
    with s3_server(root) as server:
        yield server


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize(
    ("paths", "count"),
    [
        ("s3://bucket/*.zarr", 3),
        ("s3://bucket/part[01].zarr", 2),
        ("s3://bucket/part?.zarr", 3),
        ("s3://bucket/part2.zarr", 1),
        (["s3://bucket/part0.zarr", "s3://bucket/part1.zarr"], 2),
    ],
)
def test_open_mfdataset(parts: S3Server, tmp_path: Path, paths: Any, count: int, upstream: str) -> None:
    for _ in range(2):
        parts.reset()
        opened = xzcache.open_mfdataset(paths, storage_options=words(parts), cache_store=tmp_path, upstream=upstream)
        assert dict(opened.sizes) == {"time": 4 * count, "x": 2}
        first = 16 if paths == "s3://bucket/part2.zarr" else 0
        np.testing.assert_array_equal(opened["t"].values.ravel(), np.arange(8.0 * count) + first)
    assert chunks(parts) == 0


@needs_obstore
@pytest.mark.parametrize("paths", ["s3://bucket/*.zarr", ["s3://bucket/part0.zarr"]], ids=str)
def test_open_mfdataset_in_the_words_of_obstore(parts: S3Server, tmp_path: Path, paths: Any) -> None:
    opened = xzcache.open_mfdataset(paths, storage_options=obstores_words(parts), cache_store=tmp_path)
    assert opened.sizes["time"] >= 4


@pytest.mark.parametrize("upstream", ["auto", "fsspec"])
def test_open_mfdataset_with_options_by_protocol(parts: S3Server, tmp_path: Path, upstream: str) -> None:
    options = {"s3": words(parts)}
    for _ in range(2):
        opened = xzcache.open_mfdataset(
            "s3://bucket/*.zarr", storage_options=options, cache_store=tmp_path, upstream=upstream
        )
        assert opened.sizes["time"] == 12


PATTERNS = [
    *("*.zarr", "c?.zarr", "c[12].zarr", "c[!1].zarr", "[A-C].zarr", "none*", "none/*.zarr", "d[[]1].zarr", "*.zarr/"),
    *(
        "x/*.zarr",
        "x/*",
        "*/a.zarr",
        "*/*.zarr",
        "*/*/a.zarr",
        "y/*/a.zarr",
        "y/*/none.zarr",
        "**/a.zarr",
        "x/**/b.zarr",
    ),
]


class Tree(NamedTuple):
    """Stores at all depths, and what is none."""

    s3: S3Server
    web: Web
    found: dict[str, list[str]]
    """What each pattern stands for with fsspec, and so in xarray."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    root = tmp_path_factory.mktemp("tree")
    names = ["a", "b", "c1", "c2", "d[1]", "A", "x/a", "x/b", "x/w/b", "y/z/a", "sp ace", "é"]
    for name in names:
        (root / "b" / f"{name}.zarr").mkdir(parents=True)
        (root / "b" / f"{name}.zarr" / "zarr.json").write_text("{}")
    (root / "b" / "file.txt").write_text("no store")
    with s3_server(root) as server, web_server(root) as web:
        files = fsspec.filesystem("s3", skip_instance_cache=True, **words(server))
        found = {each: sorted(path.removeprefix("b/") for path in files.glob(f"b/{each}")) for each in PATTERNS}
        yield Tree(server, web, found)


@pytest.mark.parametrize("pattern", PATTERNS)
# "auto" chooses one of the others, as `test_open_mfdataset` shows
@pytest.mark.parametrize("upstream", UPSTREAMS[1:])
def test_what_a_pattern_stands_for(tree: Tree, pattern: str, upstream: str) -> None:
    """What it does with fsspec, and so in xarray: what there is, and nothing else."""
    for where, options in [("s3://b", words(tree.s3)), (f"{tree.web.url}/b", None)]:
        if "?" in pattern and options is None:
            continue
        urls = expanded(f"{where}/{pattern}", options, upstream)
        assert [url.removeprefix(f"{where}/").rstrip("/") for url in urls] == tree.found[pattern]


def test_open_mfdataset_of_nothing(parts: S3Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no files"):
        xzcache.open_mfdataset("s3://bucket/none*.zarr", storage_options=words(parts), cache_store=tmp_path)
    with pytest.raises(FileNotFoundError):
        xzcache.open_mfdataset("s3://bucket/none.zarr", storage_options=words(parts), cache_store=tmp_path)
    with pytest.raises(Exception, match="Access Key Id you provided does not exist"):
        xzcache.open_mfdataset(
            "s3://bucket/*.zarr", storage_options=words(parts) | {"key": "other"}, cache_store=tmp_path
        )


def test_open_mfdataset_of_something_new(parts: S3Server, tmp_path: Path) -> None:
    """What was listed before is listed again."""
    (tmp_path / "buckets" / "new").mkdir(parents=True)
    dataset = xr.Dataset({"t": ("time", [1.0, 2.0])}, coords={"time": [0, 1]})
    with s3_server(tmp_path / "buckets") as server:
        for number in range(2):
            moved = dataset.assign_coords(time=dataset["time"] + 2 * number)
            moved.to_zarr(server.store("new", f"{number}.zarr"), zarr_format=3)
            opened = xzcache.open_mfdataset(
                "s3://new/*.zarr", storage_options=words(server), cache_store=tmp_path / "cache"
            )
            assert opened.sizes["time"] == 2 + 2 * number


def test_open_mfdataset_of_a_web_address_with_a_query(tmp_path: Path) -> None:
    """Its question mark is no pattern: the source is asked, and says itself that nothing is there."""
    with web_server(tmp_path) as web:
        with pytest.raises(FileNotFoundError):
            xzcache.open_mfdataset(f"{web.url}/none.zarr?sig=x", cache_store=tmp_path / "cache")
        assert web.requests != []


def test_open_mfdataset_of_pages_with_links(tmp_path: Path) -> None:
    for number in range(2):
        dataset = xr.Dataset({"t": ("time", [1.0, 2.0])}, coords={"time": [2 * number, 2 * number + 1]})
        dataset.to_zarr(tmp_path / "site" / f"part{number}.zarr", zarr_format=3)
    with web_server(tmp_path / "site") as web:
        opened = xzcache.open_mfdataset(f"{web.url}/*.zarr", cache_store=tmp_path / "cache")
        assert opened.sizes["time"] == 4
