"""No credential of a source is ever written down: not on disk, not in a text, not in a token."""

from __future__ import annotations

import base64
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import dask.base
import numpy as np
import pytest
import xarray as xr
import zarr
from damage import contents, entry_files, make_source, read
from servers import needs_obstore, nobody, tidy
from zarr.abc.store import Store
from zarr.storage import FsspecStore, ObjectStore

import xzcache
from xzcache.model.entry import META

pytestmark = pytest.mark.slow

__all__ = ["nobody", "tidy"]

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
    """Serves files to whoever asks, signed or not; a query may stand where fsspec puts it, before the key."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        base, asked, query = self.path.partition("?")
        self.path = base + asked.replace("?", "/") + query.partition("/")[2]
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server, or an object store with one bucket, for want of a better one; its address."""
    root = tmp_path_factory.mktemp("root")
    make_source(root / "bucket" / "data.zarr", "a")
    grid = xr.Dataset({"t": (("y", "x"), np.arange(12.0).reshape(3, 4))}, coords={"x": np.arange(4)})
    grid.chunk(x=2).to_zarr(root / "bucket" / "grid.zarr", zarr_format=3)
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


# -- by URL, through every door

Given = tuple[str, dict[str, Any] | None]


def signed(server: str, name: str) -> Given:
    return f"http://{server}/bucket/{name}?sig={TOKEN}&se=2030", None


def signed_with_a_user(server: str, name: str) -> Given:
    return f"http://{USER}:{PASSWORD}@{server}/bucket/{name}?sig={TOKEN}", None


def s3_by_url(server: str, name: str) -> Given:
    return f"s3://bucket/{name}", s3_options(server)


def s3_of_the_client(server: str, name: str) -> Given:
    client = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "aws_session_token": TOKEN}
    where = {"endpoint_url": f"http://{server}", "region_name": "us-east-1"}
    return f"s3://bucket/{name}", {"client_kwargs": client | where}


def s3_in_obstores_words(server: str, name: str) -> Given:
    signs = {"access_key_id": KEY, "secret_access_key": SECRET, "session_token": TOKEN}
    where = {"endpoint": f"http://{server}", "region": "us-east-1"}
    return f"s3://bucket/{name}", {**signs, **where, "client_options": {"default_headers": {"x-api-key": PASSWORD}}}


def s3_behind_a_user(server: str, name: str) -> Given:
    where = {"endpoint_url": f"http://{USER}:{PASSWORD}@{server}", "region_name": "us-east-1"}
    return f"s3://bucket/{name}", {"anon": True, "client_kwargs": where}


def http_headers_of_the_client(server: str, name: str) -> Given:
    return f"http://{server}/bucket/{name}", {"client_kwargs": {"headers": {"Authorization": f"Bearer {TOKEN}"}}}


def http_headers_and_cookies(server: str, name: str) -> Given:
    options = {"headers": {"Authorization": f"Bearer {TOKEN}"}, "cookies": {"session": SECRET}}
    return f"http://{server}/bucket/{name}", options


def a_chain(server: str, name: str) -> Given:
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    url = f"http://{USER}:{PASSWORD}@{server}/bucket/{name}?sig={TOKEN}"
    return f"simplecache::{url}", {"http": {"cookies": {"session": SECRET}, "asynchronous": True}}


GIVEN: list[Callable[[str, str], Given]] = [
    signed,
    signed_with_a_user,
    s3_by_url,
    s3_of_the_client,
    s3_in_obstores_words,
    s3_behind_a_user,
    http_headers_of_the_client,
    http_headers_and_cookies,
    a_chain,
]
LIBRARIES = ["auto", pytest.param("obstore", marks=needs_obstore), "fsspec"]
remote = [
    pytest.mark.usefixtures("nobody", "tidy"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Zarr, of chains of fsspec's that end at an asynchronous file system
    pytest.mark.filterwarnings("ignore:fs .* was not created with `asynchronous=True`"),
]


def every(*marks: Any) -> Callable[[Any], Any]:
    def marked(function: Any) -> Any:
        for mark in marks:
            function = mark(function)
        return function

    return marked


def refused(upstream: str, make: Callable[[], Any]) -> bool:
    """Whether obstore, if it is asked for, has no word for something; it does not say what was given."""
    try:
        make()
    except ValueError as refusal:
        told(str(refusal), "a refusal")
        if upstream == "obstore":
            return True
        raise
    except TypeError as refusal:
        # s3fs does not know the words of obstore
        told(str(refusal), "a refusal")
        if upstream == "fsspec":
            return True
        raise
    return False


@every(*remote)
@pytest.mark.parametrize("upstream", LIBRARIES)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.__name__)
def test_a_url_and_options(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture, given: Callable[[str, str], Given], upstream: str
) -> None:
    url, options = given(server, "data.zarr")
    caplog.set_level(logging.DEBUG, "xzcache")

    def make() -> xzcache.CacheStore:
        return xzcache.CacheStore(url, cache_store=tmp_path, storage_options=options, upstream=upstream)

    if refused(upstream, make):
        return
    store = make()
    if upstream == "fsspec" and given is s3_in_obstores_words:
        with pytest.raises(TypeError) as caught:
            read(store, "a")
        told(str(caught.value), "a refusal")
        return
    values = read(store, "a")
    assert len(values) == 256
    assert read(make(), "a") == values
    store.cache_info()
    for path in entry_files(tmp_path):
        path.write_bytes(b"damaged")
    for path in (tmp_path / META).glob("index*"):
        path.write_bytes(b"damaged")
    assert read(store, "a") == values
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("xzcache")]
    assert ours != []
    for text in [*ours, *texts(store), store._repr_html_(), str(store.path)]:
        told(text, "a text")
    search(tmp_path)


DOORS: dict[str, Callable[..., Any]] = {
    "xr.open_zarr": lambda url, **given: xr.open_zarr(url, engine="zcache", **given),
    "xr.open_dataset": lambda url, **given: xr.open_dataset(url, engine="zcache", chunks={}, **given),
    "xzcache.open_zarr": lambda url, **given: xzcache.open_zarr(url, **given),
    "xzcache.open_mfdataset": lambda url, **given: xzcache.open_mfdataset([url], **given),
}


@every(*remote)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.__name__)
def test_what_xarray_is_told(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture, given: Callable[[str, str], Given], door: str
) -> None:
    if given is s3_in_obstores_words:
        needs_obstore_now()
    caplog.set_level(logging.DEBUG, "xzcache")
    url, options = given(server, "grid.zarr")
    opened = DOORS[door](url, storage_options=options, cache_store=tmp_path, consolidated=True)
    assert float(opened["t"].sum()) == 66
    said = [repr(opened), opened._repr_html_(), repr(opened.encoding), dask.base.tokenize(opened)]
    said += [repr(variable.encoding) for variable in opened.variables.values()]
    said += [str(key) for key in opened.__dask_graph__()]
    said += [record.getMessage() for record in caplog.records if record.name.startswith("xzcache")]
    for text in said:
        told(text, "a text")
    opened.close()
    search(tmp_path)


@every(*remote)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.__name__)
def test_what_xarray_is_told_of_trees(tmp_path: Path, server: str, given: Callable[[str, str], Given]) -> None:
    if given is s3_in_obstores_words:
        needs_obstore_now()
    url, options = given(server, "grid.zarr")
    more: dict[str, Any] = {"engine": "zcache", "storage_options": options, "cache_store": tmp_path}
    more |= {"consolidated": True, "chunks": {}}
    tree = xr.open_datatree(url, **more)
    groups = xr.open_groups(url, **more)
    assert float(tree["t"].sum()) == float(groups["/"]["t"].sum()) == 66
    for each in (tree, groups["/"]):
        told(f"{each!r} {each.encoding} {each._repr_html_()}", "a text")


@every(*remote)
@pytest.mark.parametrize("name", ["grid.zarr", "none.zarr"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["store", "map", "upath"])
def test_what_xarray_is_told_of_stores(tmp_path: Path, server: str, kind: str, door: str, name: str) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://{USER}:{PASSWORD}@{server}/bucket/{name}?sig={TOKEN}"
    source: Any
    if kind == "store":
        source = FsspecStore.from_url(url, read_only=True)
    elif kind == "map":
        source = pytest.importorskip("fsspec").get_mapper(url)
    else:
        source = pytest.importorskip("upath").UPath(url)
    if name == "none.zarr":
        with pytest.raises(FileNotFoundError) as caught:
            DOORS[door](source, cache_store=tmp_path, consolidated=True)
        told("".join(str(error) for error in chain_of(caught.value)), "an exception")
        return
    opened = DOORS[door](source, cache_store=tmp_path, consolidated=True)
    assert float(opened["t"].sum()) == 66
    told(f"{opened!r} {opened.encoding} {''.join(map(str, opened.__dask_graph__()))}", "a text")


def needs_obstore_now() -> None:
    if needs_obstore.args[0]:
        pytest.skip("this obstore is not used")


@every(*remote)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.__name__)
def test_what_is_not_there(tmp_path: Path, server: str, given: Callable[[str, str], Given], door: str) -> None:
    if given is s3_in_obstores_words:
        needs_obstore_now()
    url, options = given(server, "none.zarr")
    with pytest.raises(FileNotFoundError) as caught:
        DOORS[door](url, storage_options=options, cache_store=tmp_path, consolidated=True)
    told("".join(traceback.format_exception_only(caught.value)), "an exception")
    told("".join(str(part) for part in chain_of(caught.value)), "what led to it")


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@every(*remote)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.__name__)
@pytest.mark.parametrize(
    "wrong",
    [
        {"max_size": "much"},
        {"namespace": "a/b"},
        {"cache_store": 3},
        {"upstream": "curl"},
        {"storage_options": SECRET},
        {"storage_options": [SECRET]},
        {"policy": "fifo"},
    ],
    ids=str,
)
def test_a_refusal_of_a_url_tells_no_credential(
    tmp_path: Path, given: Callable[[str, str], Given], wrong: dict[str, Any]
) -> None:
    url, options = given("127.0.0.1:9", "data.zarr")
    with pytest.raises((TypeError, ValueError)) as caught:
        xzcache.CacheStore(url, **{"cache_store": tmp_path, "storage_options": options, **wrong})
    for error in chain_of(caught.value):
        told(str(error), "a refusal")


@every(*remote)
@pytest.mark.parametrize(
    ("url", "options"),
    [
        (f"s3://{KEY}:{PASSWORD}@bucket/x", {"anon": True}),
        (f"gs://{KEY}:{PASSWORD}@bucket/x", {"token": "anon"}),
        (f"abfs://{KEY}:{PASSWORD}@acc.dfs.core.windows.net/x", {"anon": True}),
        (f"nosuch://{USER}:{PASSWORD}@host/x?sig={TOKEN}", {"key": SECRET}),
        (f"nosuch::http://{USER}:{PASSWORD}@host/x?sig={TOKEN}", {"key": SECRET}),
        (f"oss://{USER}:{PASSWORD}@bucket/x", {"key": KEY, "secret": SECRET}),
        ("gs://bucket/x", {"token": {"type": "service_account", "private_key": SECRET}}),
        ("gs://bucket/x", {"token": "cache", "project": SECRET}),
        ("az://bucket/x", {"connection_string": f"AccountName=a;AccountKey={SECRET}"}),
        ("az://bucket/x", {"account_name": "a", "account_key": SECRET}),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("upstream", LIBRARIES)
def test_what_cannot_be_read_is_refused_without_a_credential(url: str, options: dict[str, Any], upstream: str) -> None:
    try:
        store = xzcache.CacheStore(
            url, cache_store=zarr.storage.MemoryStore(), storage_options=options, upstream=upstream
        )
    except (ValueError, TypeError, ImportError) as refusal:
        for error in chain_of(refusal):
            told(str(error), "a refusal")
    else:
        for text in texts(store):
            told(text, "a text")


@every(*remote)
def test_patterns_of_urls(tmp_path: Path, server: str) -> None:
    """Those that are found are named as those that are given."""
    pytest.importorskip("aiohttp")
    url = f"http://{USER}:{PASSWORD}@{server}/bucket/gr*.zarr"
    opened = xzcache.open_mfdataset(url, cache_store=tmp_path)
    assert float(opened["t"].sum()) == 66
    told(repr(opened.encoding) + "".join(map(str, opened.__dask_graph__())), "a text")
    with pytest.raises(OSError, match="no files") as caught:
        xzcache.open_mfdataset(url.replace("gr", "none"), cache_store=tmp_path)
    told(str(caught.value), "an exception")
    search(tmp_path)
