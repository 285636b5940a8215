"""In whatever form a credential is given with a source, no text, name, file, log line or token tells it.

Each form is either refused, in words without it, or read; and what a store that was made says of itself is searched.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dask.base
import pytest
import xarray as xr
from servers import CLOSED, impatient, needs_obstore, nobody, tidy
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore

import xzcache

__all__ = ["impatient", "nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("impatient", "nobody", "tidy"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # clients that are left to the garbage collector
    pytest.mark.filterwarnings("ignore:fs .* was not created with `asynchronous=True`"),  # Zarr, of chains
]

HOST = CLOSED.removeprefix("http://")
S = "WJALRxUTNFEMIk7"
"""Part of every secret: no form of it is to be found, in whatever case."""
T = f"bPx{S}Yz9"
"""The other part, where a slash or another sign cuts a secret in two."""
FORBIDDEN = [S.lower(), "akiaioexample", "hunter2"]
OBJECT = {"client_kwargs": {"endpoint_url": CLOSED, "region_name": "us-east-1"}}

Form = tuple[str, dict[str, Any] | None]
URLS: dict[str, Form] = {
    # a user and a password before a bucket
    "s3": (f"s3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "s3 slash": (f"s3://AKIAIOEXAMPLE:{S}/{T}@bucket/x.zarr", None),
    "s3 digits, slash": (f"s3://AKIAIOEXAMPLE:12/{T}@bucket/x.zarr", None),
    "s3 plus and equals": (f"s3://AKIAIOEXAMPLE:{S}+{T}=@bucket/x.zarr", None),
    "s3 at": (f"s3://AKIAIOEXAMPLE:{S}@{T}@bucket/x.zarr", None),
    "s3 hash": (f"s3://AKIAIOEXAMPLE:{S}#{T}@bucket/x.zarr", None),
    "s3 question mark": (f"s3://AKIAIOEXAMPLE:{S}?{T}@bucket/x.zarr", None),
    "s3 encoded": (f"s3://AKIAIOEXAMPLE:{quote(S + '/' + T, safe='')}@bucket/x.zarr", None),
    "s3 colons": (f"s3://AKIAIOEXAMPLE:{S}::{T}@bucket/x.zarr", None),
    "s3 key alone": ("s3://AKIAIOEXAMPLE@bucket/x.zarr", None),
    "s3 in capitals": (f"S3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "s3 blank first": (f" s3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "s3 one slash": (f"s3:/AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "s3a": (f"s3a://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "gs": (f"gs://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "az": (f"az://account:{S}@container/x.zarr", None),
    "abfs": (f"abfs://AKIAIOEXAMPLE:{S}@acc.dfs.core.windows.net/x.zarr", None),
    # within a chain
    "simplecache": (f"simplecache::s3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "filecache": (f"filecache::s3://AKIAIOEXAMPLE:{S}/{T}@bucket/x.zarr", None),
    "zip": (f"zip://x.zarr::s3://AKIAIOEXAMPLE:{S}@bucket/x.zip", None),
    "dir": (f"dir::s3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", None),
    "reference": (f"reference::http://charlotte:{S}@{HOST}/x.json", None),
    "reference slash": (f"reference::https://charlotte:{S}/{T}@{HOST}/x.json", None),
    "three links": (f"simplecache::zip://x.zarr::http://charlotte:{S}@{HOST}/x.zip?token={T}", None),
    "chained signature": (f"simplecache::http://{HOST}/x.zarr?X-Amz-Signature={S}", None),
    "chained fragment": (f"simplecache::http://{HOST}/x.zarr#access_token={S}", None),
    # web servers
    "http": (f"http://charlotte:{S}@{HOST}/x.zarr", None),
    "http slash": (f"https://charlotte:{S}/{T}@{HOST}", None),
    "http digits, slash": (f"https://charlotte:12/{T}@{HOST}/x.zarr", None),
    "http at twice": (f"http://charlotte:{S}@{T}@{HOST}/x.zarr", None),
    "http at and slash": (f"http://charlotte:{S}@{T}/{S}@{HOST}/x.zarr", None),
    "http user alone": (f"http://{S}@{HOST}/x.zarr", None),
    "http user with a slash": (f"http://127.0.0.1:9/{S}@{HOST}/x.zarr", None),
    "http encoded": (f"http://charlotte%3A{S}@{HOST}/x.zarr", None),
    "http all encoded": (f"http://charlotte%3A{S}%40{HOST}/x.zarr", None),
    "http backslash": (f"http://charlotte:{S}\\{T}@{HOST}/x.zarr", None),
    "http blank": (f"http://charlotte:{S} {T}@{HOST}/x.zarr", None),
    "ipv6": (f"http://charlotte:{S}@[::1]:9/x.zarr", None),
    "ipv6 signature": (f"http://[::1]:9/x.zarr?sig={S}", None),
    "ipv6 broken": (f"http://charlotte:{S}@[::1:9/x.zarr", None),
    "fragment": (f"http://{HOST}/x.zarr#access_token={S}", None),
    "fragment of a page": (f"http://{HOST}/x.zarr#/a?access_token={S}", None),
    "X-Amz-Signature": (f"http://{HOST}/x.zarr?X-Amz-Credential=AKIAIOEXAMPLE&X-Amz-Signature={S}", None),
    "sig": (f"http://{HOST}/x.zarr?sv=2024&sig={S}", None),
    "token": (f"http://{HOST}/x.zarr?token={S}", None),
    "query in the middle": (f"http://{HOST}/x.zarr?token={S}/a/b", None),
    "query encoded": (f"http://{HOST}/x.zarr%3Ftoken%3D{S}", None),
    "query encoded twice": (f"http://{HOST}/x.zarr%253Ftoken%253D{S}", None),
    "parameter": (f"http://{HOST}/x.zarr;token={S}", None),
    "session": (f"http://{HOST}/session={S}/x.zarr", None),
    "nested": (f"http://{HOST}/proxy/https://charlotte:{S}@example.org/x.zarr", None),
    "s3 query": (f"s3://bucket/x.zarr?X-Amz-Signature={S}", {"anon": True, **OBJECT}),
    "s3 fragment": (f"s3://bucket/x.zarr#access_token={S}", {"anon": True, **OBJECT}),
    # other schemes
    "ftp": (f"ftp://charlotte:{S}@127.0.0.1:9/x.zarr", None),
    "unknown": (f"nosuch://charlotte:{S}@h/x.zarr", None),
    "no scheme": (f"charlotte:{S}::{T}@h/x.zarr", None),
    "empty scheme": (f"://charlotte:{S}@h/x.zarr", None),
    # among options
    "options": ("s3://bucket/x.zarr", {"key": "AKIAIOEXAMPLE", "secret": S, "token": T, **OBJECT}),
    "chained options": ("simplecache::s3://bucket/x.zarr", {"s3": {"key": "AKIAIOEXAMPLE", "secret": S, **OBJECT}}),
    "endpoint": ("s3://bucket/x.zarr", {"endpoint_url": f"http://charlotte:{S}@{HOST}", "anon": True}),
    "endpoint slash": ("s3://bucket/x.zarr", {"endpoint_url": f"http://charlotte:{S}/{T}@{HOST}", "anon": True}),
    "client's endpoint slash": (
        "s3://bucket/x.zarr",
        {"anon": True, "client_kwargs": {"endpoint_url": f"http://charlotte:{S}/{T}@{HOST}"}},
    ),
    "endpoint without a scheme": ("s3://bucket/x.zarr", {"endpoint": f"charlotte:{S}/{T}@{HOST}", "region": "r"}),
    "fo": ("reference://", {"fo": f"http://charlotte:{S}@{HOST}/x.json?sig={T}"}),
    "fo slash": ("reference://", {"fo": f"http://charlotte:{S}/{T}@{HOST}/x.json"}),
    "fo of s3": ("reference://", {"fo": f"s3://AKIAIOEXAMPLE:{S}@bucket/x.json"}),
    "target_options": (
        "reference://",
        {"fo": "s3://bucket/x.json", "target_options": {"key": "AKIAIOEXAMPLE", "secret": S, **OBJECT}},
    ),
    "remote_options": (
        "reference://",
        {
            "fo": {"version": 1, "refs": {"zarr.json": [f"http://charlotte:{S}@{HOST}/x?sig={T}"]}},
            "remote_options": {"headers": {"Authorization": f"Bearer {S}"}},
            "remote_protocol": "http",
        },
    ),
    "proxy": (f"http://{HOST}/x.zarr", {"client_kwargs": {"proxy": f"http://charlotte:{S}@{HOST}"}}),
    "connection string": ("az://container/x.zarr", {"connection_string": f"AccountName=a;AccountKey={S}"}),
    "sas": ("az://container/x.zarr", {"account_name": "a", "sas_token": f"sv=1&sig={S}"}),
    "option of no use": ("s3://bucket/x.zarr", {"anon": True, f"http://charlotte:{S}@h": 1}),
}


def told(text: object, where: str) -> None:
    found = [secret for secret in FORBIDDEN if secret in str(text).lower()]
    assert found == [], f"{where}: {text}"


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def said(store: xzcache.CacheStore) -> Iterator[tuple[str, object]]:
    """All that a store says of itself, unasked and asked."""
    yield "repr", repr(store)
    yield "str", str(store)
    yield "format", f"{store}"
    yield "html", store._repr_html_()
    yield "namespace", store.namespace
    yield "path", store.path
    yield "source", repr(store.source)
    yield "info", f"{store.cache_info()} {store.cache_stats()}"
    yield "dask", f"{store.__dask_tokenize__()} {dask.base.tokenize(store)}"
    yield "copy", repr(store.with_read_only(True))


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = logging.Formatter()
    return [texts.format(record) for record in caplog.records if record.name.startswith("xzcache")]


def examine(make: Callable[[], xzcache.CacheStore], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Make a store, read where nobody answers, and search everything."""
    caplog.set_level(logging.DEBUG)
    try:
        store = make()
    except Exception as refusal:
        for error in chain_of(refusal):
            told("".join(traceback.format_exception_only(error)), "a refusal")
    else:
        for where, text in said(store):
            told(text, where)
        with suppress(Exception):  # what the source says is its own
            sync(store.get("zarr.json", default_buffer_prototype()))
        for where, text in said(store):
            told(text, where)
    for line in ours(caplog):
        told(line, "a log line")
    for path in cache.rglob("*"):
        told(path.relative_to(cache), "a file's name")
        if path.is_file():
            told(path.read_bytes().decode("latin-1"), str(path))


@pytest.mark.parametrize("upstream", ["auto", "fsspec", pytest.param("obstore", marks=needs_obstore)])
@pytest.mark.parametrize("form", URLS)
def test_a_url(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, upstream: str) -> None:
    url, options = URLS[form]
    examine(
        lambda: xzcache.CacheStore(url, cache_store=tmp_path, storage_options=options, upstream=upstream),
        tmp_path,
        caplog,
    )


DOORS: dict[str, Callable[..., Any]] = {
    "xr.open_zarr": lambda url, **given: xr.open_zarr(url, engine="zcache", **given),
    "xr.open_datatree": lambda url, **given: xr.open_datatree(url, engine="zcache", **given),
    "xzcache.open_mfdataset": lambda url, **given: xzcache.open_mfdataset([url], **given),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", URLS)
def test_what_is_refused_is_refused_by_xarrays_doors_in_the_same_words(tmp_path: Path, form: str, door: str) -> None:
    url, options = URLS[form]
    refusal: Exception | None = None
    try:
        xzcache.CacheStore(url, cache_store=tmp_path, storage_options=options)
    except ValueError as error:
        refusal = error
    except Exception as failure:  # of the library that reads it
        told(failure, "a failure")
    if refusal is not None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            DOORS[door](url, storage_options=options, cache_store=tmp_path)
        assert str(caught.value) == str(refusal)
        for each in chain_of(caught.value):
            told(each, "a refusal")


def map_of(url: str) -> Any:
    return pytest.importorskip("fsspec").get_mapper(url)


def upath_of(url: str) -> Any:
    return pytest.importorskip("upath").UPath(url)


def store_of(url: str) -> Any:
    return FsspecStore.from_url(url, read_only=True)


OBJECTS = ["s3", "s3 slash", "simplecache", "dir", "http", "http at twice", "http slash", "http user alone", "fragment"]
OBJECTS += ["X-Amz-Signature", "sig", "token", "chained signature", "chained fragment", "query encoded", "parameter"]


@pytest.mark.parametrize("kind", [map_of, upath_of, store_of], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("form", OBJECTS)
def test_an_object(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, kind: Callable[[str], Any]) -> None:
    url, _ = URLS[form]
    try:
        source = kind(url)
    except Exception:
        pytest.skip("fsspec does not make it")
    examine(lambda: xzcache.CacheStore(source, cache_store=tmp_path), tmp_path, caplog)


@needs_obstore
@pytest.mark.parametrize(
    "url", [url for form, (url, _) in URLS.items() if url.startswith("http://") and "ipv6 broken" not in form]
)
def test_a_store_of_obstores(tmp_path: Path, caplog: pytest.LogCaptureFixture, url: str) -> None:
    obstore = pytest.importorskip("obstore")
    try:
        made = obstore.store.HTTPStore.from_url(
            url, client_options={"allow_http": True}, retry_config={"max_retries": 0}
        )
    except Exception:
        pytest.skip("obstore does not make it")
    examine(lambda: xzcache.CacheStore(ObjectStore(made, read_only=True), cache_store=tmp_path), tmp_path, caplog)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        (f"s3://AKIAIOEXAMPLE:{S}/{T}@bucket/x.zarr", "s3://bucket"),
        (f"https://charlotte:{S}/{T}@example.org/x.zarr", "https://example.org"),
        (f"simplecache::s3://AKIAIOEXAMPLE:{S}@bucket/x.zarr", "s3://bucket"),
    ],
)
def test_a_refusal_says_what_is_accepted(url: str, host: str) -> None:
    with pytest.raises(ValueError, match=r"^store is a.*storage_options") as caught:
        xzcache.CacheStore(url)
    assert host in str(caught.value)
    assert "x.zarr" not in str(caught.value)
    told(caught.value, "a refusal")


def named(url: str, **options: Any) -> str:
    return xzcache.CacheStore(url, cache_store=None, storage_options=options or None).namespace


def test_credentials_tell_no_sources_apart_and_places_do() -> None:
    pytest.importorskip("s3fs")
    same = [
        [named(f"http://charlotte:{word}@{HOST}/x.zarr") for word in (S, T)],
        [named(f"http://{HOST}/x.zarr{word}") for word in ("", f"#access_token={S}", f"#access_token={T}")],
        [named(f"simplecache::http://charlotte:{word}@{HOST}/x.zarr") for word in (S, T)],
        [named("s3://b/x", secret=word, key="A", **OBJECT) for word in (S, T)],
        [named("simplecache::s3://b/x", s3={"secret": word, "key": "A", **OBJECT}) for word in (S, T)],
        [named("HTTP://h.example/x.zarr"), named("http://h.example/x.zarr")],
    ]
    for names in same:
        assert len(set(names)) == 1
    places = ["http://h/x@1", "http://h/x@2", "http://i/x@1", "http://h/token=1/x", "http://h/token=2/x"]
    places += [
        "http://h/x%3Fa",
        "http://h/x%3Fb",
        "http://h/x;a=1",
        "http://h/x;a=2",
        "http://[::1]/x",
        "http://[::2]/x",
    ]
    places += ["s3://b/x@1", "s3://b/x@2", "s3://c/x@1", "s3://b/x#1", "s3://b/x#2", "s3://b/x?1", "s3://b/x?2"]
    found = [named(url, **({"anon": True, **OBJECT} if url.startswith("s3") else {})) for url in places]
    assert len(set(found)) == len(places)


@needs_obstore
def test_what_is_not_secret_is_shown() -> None:
    shown = {
        "http://h.example:8080/a/b.zarr": "http://h.example:8080/a/b.zarr",
        "http://[::1]:8080/a/b.zarr": "http://[::1]:8080/a/b.zarr",
        "s3://bucket/year=2020/x.zarr": "s3://bucket/year=2020/x.zarr",
        "https://h.example/data%20set/x.zarr": "https://h.example/data%20set/x.zarr",
    }
    for url, text in shown.items():
        assert xzcache.CacheStore(url, storage_options={"anon": True, **OBJECT} if url[0] == "s" else None).path == text
