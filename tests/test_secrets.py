"""No credential of a source is ever written down: not on disk, not in a text, not in a token."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import dask.base
import pytest
import zarr
from damage import contents, entry_files, make_source, read
from zarr.abc.store import Store
from zarr.storage import FsspecStore, ObjectStore

import xzcache
from xzcache._keys import META

KEY, SECRET, TOKEN = "AKIAQ7WORDOFACCESS", "s3cr3t/Very+Secret", "tok3n-of-a-Session"
USER, PASSWORD = "charlotte", "hunter2-is-not-good"
SECRETS = [KEY, SECRET, TOKEN, USER, PASSWORD]
FORBIDDEN = [
    *SECRETS,
    *(quote(secret, safe="") for secret in SECRETS),
    *(secret.lower() for secret in SECRETS),
    base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
    base64.b64encode(SECRET.encode()).decode(),
]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files to whoever asks, signed or not."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server, or an object store with one bucket, for want of a better one; its address."""
    root = tmp_path_factory.mktemp("root")
    make_source(root / "bucket" / "data.zarr", "a")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as served:
        served.daemon_threads = True
        thread = threading.Thread(target=served.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def http_userinfo(server: str) -> Store:
    pytest.importorskip("aiohttp")
    return FsspecStore.from_url(f"http://{USER}:{PASSWORD}@{server}/bucket/data.zarr", read_only=True)


def http_headers(server: str) -> Store:
    pytest.importorskip("aiohttp")
    options = {"client_kwargs": {"headers": {"Authorization": f"Bearer {TOKEN}"}}, "cookies": {"session": SECRET}}
    return FsspecStore.from_url(f"http://{server}/bucket/data.zarr", storage_options=options, read_only=True)


def s3_options(server: str, key: str = KEY) -> dict[str, Any]:
    return {
        "key": key,
        "secret": SECRET,
        "token": TOKEN,
        "client_kwargs": {"endpoint_url": f"http://{server}", "region_name": "us-east-1"},
        "max_concurrency": 1,
    }


def s3_fsspec(server: str) -> Store:
    pytest.importorskip("s3fs")
    return FsspecStore.from_url("s3://bucket/data.zarr", storage_options=s3_options(server), read_only=True)


def s3_endpoint_userinfo(server: str) -> Store:
    pytest.importorskip("s3fs")
    options = {"anon": True, "client_kwargs": {"endpoint_url": f"http://{USER}:{PASSWORD}@{server}"}}
    return FsspecStore.from_url("s3://bucket/data.zarr", storage_options=options, read_only=True)


def s3_obstore(server: str) -> Store:
    obstore = pytest.importorskip("obstore")
    made = partial(
        obstore.store.S3Store,
        "bucket",
        prefix="data.zarr",
        access_key_id=KEY,
        secret_access_key=SECRET,
        session_token=TOKEN,
        endpoint=f"http://{server}",
        region="us-east-1",
        virtual_hosted_style_request=False,
    )
    try:
        store = made(client_options={"allow_http": True, "default_headers": {"x-api-key": PASSWORD}})
    except TypeError:
        # obstore before 0.6 takes no headers
        store = made(client_options={"allow_http": True})
    return ObjectStore(store, read_only=True)


def http_obstore(server: str) -> Store:
    obstore = pytest.importorskip("obstore")
    url = f"http://{USER}:{PASSWORD}@{server}/bucket/data.zarr"
    return ObjectStore(obstore.store.HTTPStore.from_url(url, client_options={"allow_http": True}), read_only=True)


SOURCES: list[Callable[[str], Store]] = [
    http_userinfo,
    http_headers,
    s3_fsspec,
    s3_endpoint_userinfo,
    s3_obstore,
    http_obstore,
]


def told(text: str, where: str) -> None:
    found = [secret for secret in FORBIDDEN if secret in text]
    assert found == [], f"{where}: {text}"


def search(directory: Path) -> None:
    """No name and no content of a file beneath a directory tells a secret."""
    for path in directory.rglob("*"):
        told(str(path.relative_to(directory)), "a name")
        if path.is_file():
            told(path.read_bytes().decode("latin-1"), str(path))


def texts(store: xzcache.CacheStore) -> Iterator[str]:
    """All that a store says of itself."""
    yield repr(store)
    yield str(store)
    yield f"{store.cache_info()} {store.cache_stats()}"
    yield store.namespace
    yield repr(store.source)
    yield repr(store.__dask_tokenize__())
    yield dask.base.tokenize(store)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that are left to the garbage collector
def test_a_source_with_credentials(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture, make: Callable[[str], Store], tmp_path_factory: Any
) -> None:
    cache = tmp_path / "cache"
    store = xzcache.CacheStore(make(server), cache_store=cache, max_size=1_000_000)
    caplog.set_level(logging.DEBUG, "xzcache")
    bucket = next(path for path in tmp_path_factory.getbasetemp().glob("root*"))
    expected = contents(bucket / "bucket" / "data.zarr", "a")
    for _ in range(2):
        assert read(store, "a") == expected
    assert len(entry_files(cache)) == 5
    # trouble is told of, too
    for path in entry_files(cache):
        path.write_bytes(b"damaged")
    for path in (cache / META).glob("index*"):
        path.write_bytes(b"damaged")
    assert read(store, "a") == expected
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("xzcache")]
    assert ours != []
    for text in [*ours, *texts(store)]:
        told(text, "a text")
    search(cache)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_refusal_tells_no_credential(tmp_path: Path, make: Callable[[str], Store]) -> None:
    source = make("127.0.0.1:9")
    wrong: list[dict[str, Any]] = [
        {"max_size": "much"},
        {"revalidate": "never"},
        {"namespace": "a/b"},
        {"storage_options": {"key": KEY, "secret": SECRET}},
        {"cache_store": 3},
    ]
    for given in wrong:
        with pytest.raises((TypeError, ValueError)) as caught:
            xzcache.CacheStore(source, **{"cache_store": tmp_path, **given})
        told(f"{caught.value}", str(given))
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("scheme", ["s3", "http", "ftp"])
def test_a_url_is_no_place_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """It would become a directory whose name tells all."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cache_store") as caught:
        xzcache.CacheStore(zarr.storage.MemoryStore(), cache_store=f"{scheme}://{KEY}:{PASSWORD}@bucket/cache")
    told(str(caught.value), "the refusal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_same_source_with_other_credentials_is_the_same(tmp_path: Path) -> None:
    """Keys are exchanged every so often: the cache stays."""
    pytest.importorskip("s3fs")
    stores = []
    for key in (KEY, "ANOTHERKEY"):
        source = FsspecStore.from_url("s3://bucket/x", storage_options=s3_options("127.0.0.1:9", key), read_only=True)
        stores.append(xzcache.CacheStore(source, cache_store=tmp_path))
    assert stores[0].namespace == stores[1].namespace
    assert dask.base.tokenize(stores[0]) == dask.base.tokenize(stores[1])
    elsewhere = FsspecStore.from_url("s3://bucket/x", storage_options=s3_options("127.0.0.1:10"), read_only=True)
    assert xzcache.CacheStore(elsewhere, cache_store=tmp_path).namespace != stores[0].namespace


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_url_with_credentials_given_as_it_is(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://{USER}:{PASSWORD}@{server}/bucket/data.zarr"
    store = xzcache.CacheStore(url, cache_store=tmp_path / "cache")
    assert len(read(store, "a")) == 256
    for text in texts(store):
        told(text, "a text")
    search(tmp_path)
    # but where it is, is told
    assert str(urlsplit(url).port) in repr(store)
