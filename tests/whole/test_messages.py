"""What a user reads after a mistake: one line that names it and says what to do, and the source's own text behind it.

Each row is one wrong input, on real files and servers, with the sentence that is expected.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from servers import CLOSED, S3Server, impatient, needs_obstore, nobody, s3_server, serving, tidy, web_server, words
from zarr.storage import MemoryStore, StorePath

import xzcache

__all__ = ["impatient", "nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("nobody", "impatient", "tidy"),
    pytest.mark.filterwarnings("ignore:Failed to open Zarr store with consolidated metadata:RuntimeWarning"),
    # clients of s3fs and aiohttp whose opening failed are left to the garbage collector, whichever test calls that
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
    # the page to sign in is there for every name
    pytest.mark.filterwarnings("ignore:Both zarr.json"),
    needs_obstore,
]

SECRET = "SECRETofSomebody"
FILES = {
    "era5.nc": b"CDF\x01",
    "era5.nc4": b"\x89HDF\r\n\x1a\n",
    "era5.grib2": b"GRIB\0\0",
    "era5.tif": b"II*\0",
    "era5.zip": b"PK\x03\x04",
    "era5.json": b'{"version": 1}',
    "era5.parquet": b"PAR1",
    "index.html": b"<!DOCTYPE html>",
    "notes.txt": b"read me",
}


@dataclass
class World:
    """Where a row finds what it opens."""

    root: Path
    web: str
    login: str
    tls: str
    s3: S3Server

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)

    def options(self, **more: Any) -> dict[str, Any]:
        return words(self.s3, **more)

    def at(self, endpoint: str) -> dict[str, Any]:
        return {"key": "somebody", "secret": SECRET, "endpoint_url": endpoint}


class _Login(http.server.BaseHTTPRequestHandler):
    """Answers everything with a page to sign in."""

    def do_GET(self) -> None:
        page = b"<!DOCTYPE html><title>Sign in</title>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args: Any) -> None:
        pass


def _tls_server(root: Path) -> http.server.HTTPServer:
    """A server with a certificate that nobody signed."""
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    made = root / "key.pem", root / "certificate.pem"
    subprocess.run([*command.split(), "-keyout", made[0], "-out", made[1]], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made[1], made[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        # the client ends the handshake, as it should
        with suppress(OSError):
            super().handle()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    data = xr.Dataset({"t2m": (("time", "x"), np.ones((4, 10), "f4"))})
    data.to_zarr(root / "era5.zarr", zarr_format=3, consolidated=False)
    data.to_zarr(root / "deep.zarr", group="surface/era5", zarr_format=3, consolidated=False)
    data.to_zarr(root / "many" / "a.zarr", zarr_format=2, consolidated=False)
    zarr.create_array(str(root / "array.zarr"), shape=4, dtype="i4")
    (root / "empty.zarr").mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content + bytes(100))
    shutil.copytree(root / "era5.zarr", root / "s3" / "bucket" / "era5.zarr")
    shutil.copytree(root / "many", root / "s3" / "bucket" / "many")
    with ExitStack() as stack:
        web = stack.enter_context(web_server(root)).url
        login = stack.enter_context(serving(_Login))
        s3 = stack.enter_context(s3_server(root / "s3"))
        tls = _tls_server(root)
        thread = threading.Thread(target=tls.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(tls.server_close)
        stack.callback(tls.shutdown)
        yield World(root, web, login, f"https://127.0.0.1:{tls.server_port}", s3)


Act = Callable[[World], Any]
ROWS: list[Any] = []


def row(name: str, act: Act, error: type[Exception], says: str, *, cause: bool = False) -> None:
    ROWS.append(pytest.param(act, error, says, cause, id=name))


opened = xzcache.open_zarr
engine = functools.partial(xr.open_dataset, engine="zcache")

# -- what is opened

row(
    "s3:/",
    lambda w: opened("s3:/bucket/era5.zarr"),
    ValueError,
    "store is not accepted, neither an existing path nor a URL (no slashes), did you mean s3://bucket/era5.zarr?",
)
row(
    "s3:/ with options",
    lambda w: opened("s3:/bucket/x.zarr", storage_options={"anon": True}),
    ValueError,
    "did you mean s3://bucket/x.zarr?",
)
row("s3: without any", lambda w: xzcache.CacheStore("s3:bucket/x.zarr"), ValueError, "did you mean s3://bucket/x.zarr?")
row("https:/", lambda w: engine("https:/host/x.zarr"), ValueError, "did you mean https://host/x.zarr?")
row(
    "s3:/ with a password",
    lambda w: opened(f"s3:/me:{SECRET}@bucket/x.zarr"),
    ValueError,
    "store is not accepted, neither an existing path nor a URL (no slashes): give a Zarr store, a path, a URL",
)
row(
    "a scheme that is misspelled",
    lambda w: opened("htps://host/x.zarr"),
    ValueError,
    "store is a URL of the scheme 'htps', which nothing here reads, did you mean https?",
)
row(
    "an unknown scheme",
    lambda w: opened("quux://host/x.zarr"),
    ValueError,
    "store is a URL of the scheme 'quux', which nothing here reads. obstore (in 'xzcache[remote]') reads s3,",
)
row("a path that is missing", lambda w: opened(w / "none.zarr"), FileNotFoundError, "{root}/none.zarr does not exist")
row(
    "a pattern that matches nothing",
    lambda w: xzcache.open_mfdataset(w / "none-*.zarr"),
    OSError,
    "no files to open: nothing matches {root}/none-*.zarr",
)
row(
    "a number",
    lambda w: opened(3),
    TypeError,
    "store is a int, which is not accepted: give a Zarr store, a path, a URL",
)  # type: ignore[arg-type]
row(
    "nothing",
    lambda w: xzcache.CacheStore(None),
    TypeError,
    "store is a NoneType, which is not accepted: give a Zarr store",
)  # type: ignore[arg-type]
row("no name", lambda w: opened(""), ValueError, "store='' is not accepted: give a Zarr store, a path, a URL")
row(
    "a path within a store",
    lambda w: xzcache.CacheStore(StorePath(MemoryStore(), "group")),
    ValueError,
    "store='group' is a path within a store: give the store itself",
)
row("a list", lambda w: opened([w / "era5.zarr"]), TypeError, "store is a list, which is not accepted")  # type: ignore[arg-type]

for name, kind, use in [
    ("era5.nc", "a NetCDF file", 'xr.open_dataset(..., engine="netcdf4")'),
    ("era5.nc4", "a NetCDF or HDF5 file", 'xr.open_dataset(..., engine="h5netcdf")'),
    ("era5.grib2", "a GRIB file", 'xr.open_dataset(..., engine="cfgrib")'),
    ("era5.tif", "a TIFF file", "rioxarray.open_rasterio(...)"),
    ("era5.zip", "a zip file", 'zarr.storage.ZipStore(..., mode="r") as the store'),
    ("era5.json", "a JSON file", '"reference://" with storage_options={"fo": ...}'),
    ("index.html", "an HTML page", "the address of the data themselves"),
]:
    said = f"store='{{root}}/{name}' is {kind}, not a Zarr store: use {use}"
    row(f"{name} on disk", lambda w, name=name: opened(w / name), ValueError, said)
    said = f"{{web}}/{name}: this is {kind} by its name, not a Zarr store: use {use}"
    row(f"{name} on the web", lambda w, name=name: opened(f"{w.web}/{name}"), FileNotFoundError, said, cause=True)
row(
    "another file",
    lambda w: engine(w / "notes.txt"),
    ValueError,
    "store='{root}/notes.txt' is a file, not a Zarr store: give a directory or a URL",
)
row(
    "a NetCDF file, with zarr",
    lambda w: zarr.open_group(xzcache.CacheStore(w / "era5.nc"), mode="r"),
    ValueError,
    "is a NetCDF file, not a Zarr store",
)
row("NetCDF files", lambda w: xzcache.open_mfdataset([w / "era5.nc"]), ValueError, "is a NetCDF file, not a Zarr store")
row(
    "a login",
    lambda w: opened(f"{w.login}/era5.zarr", consolidated=False),
    ValueError,
    "{login}/era5.zarr has metadata that are not JSON: is this the address of a web page or a login?",
    cause=True,
)

# -- what is in it

row(
    "an array",
    lambda w: opened(w / "array.zarr"),
    ValueError,
    "{root}/array.zarr is a Zarr array and no group: zarr.open_array(xzcache.CacheStore(...)) opens it",
    cause=True,
)
row(
    "an array on the web",
    lambda w: opened(f"{w.web}/array.zarr"),
    ValueError,
    "{web}/array.zarr is a Zarr array and no group",
    cause=True,
)
row(
    "stores in a folder",
    lambda w: engine(w / "many"),
    FileNotFoundError,
    "{root}/many has no Zarr group at its root: it has 'a.zarr'; give its path, or group=",
    cause=True,
)
row(
    "stores in a folder of S3",
    lambda w: opened("s3://bucket/many", storage_options=w.options()),
    FileNotFoundError,
    "s3://bucket/many has no Zarr group at its root: it has 'a.zarr'",
    cause=True,
)
row(
    "a group that is missing",
    lambda w: opened(w / "deep.zarr", group="nope"),
    KeyError,
    "{root}/deep.zarr has no group 'nope': it has 'surface'",
    cause=True,
)
row(
    "a group, where there is none",
    lambda w: opened(w / "era5.zarr", group="nope"),
    KeyError,
    "{root}/era5.zarr has no group 'nope': it has no groups",
)
row(
    "a group that is an array",
    lambda w: opened(w / "era5.zarr", group="t2m"),
    ValueError,
    "'t2m' in {root}/era5.zarr is an array and no group: open the group that has it",
    cause=True,
)
row(
    "another format",
    lambda w: opened(w / "era5.zarr", zarr_format=2),
    FileNotFoundError,
    "{root}/era5.zarr has a group at its root, but of another format: leave zarr_format out",
    cause=True,
)
row(
    "consolidated",
    lambda w: opened(w / "era5.zarr", consolidated=True),
    ValueError,
    "{root}/era5.zarr has no consolidated metadata: leave consolidated=True out",
    cause=True,
)

# -- who has it

at = "s3://bucket/era5.zarr"
for upstream in ("obstore", "fsspec"):
    read = functools.partial(opened, upstream=upstream)
    row(
        f"a misspelled name, {upstream}",
        lambda w, read=read: read("s3://bucket/era6.zarr", storage_options=w.options()),
        FileNotFoundError,
        "there is no Zarr group at s3://bucket/era6.zarr, did you mean era5.zarr?",
        cause=True,
    )
    row(
        f"another name, {upstream}",
        lambda w, read=read: read("s3://bucket/many/zzz", storage_options=w.options()),
        FileNotFoundError,
        "there is no Zarr group at s3://bucket/many/zzz; its folder has 'a.zarr'",
        cause=True,
    )
    row(
        f"a misspelled name on the web, {upstream}",
        lambda w, read=read: read(f"{w.web}/many/b.zarr"),
        FileNotFoundError,
        "there is no Zarr group at {web}/many/b.zarr, did you mean a.zarr?",
        cause=True,
    )
    row(
        f"an address without its scheme, {upstream}",
        lambda w, read=read: read(at, storage_options=w.at("127.0.0.1:9000")),
        ValueError,
        "endpoint_url='127.0.0.1:9000' is not accepted, it has no scheme: give 'https://127.0.0.1:9000' or 'http://127",
    )
    row(
        f"an address with a password and without its scheme, {upstream}",
        lambda w, read=read: read(at, storage_options={"client_kwargs": {"endpoint_url": f"me:{SECRET}@host"}}),
        ValueError,
        "endpoint_url='...' is not accepted, it has no scheme",
    )
    row(
        f"no bucket, {upstream}",
        lambda w, read=read: read("s3://no-bucket/x.zarr", storage_options=w.options()),
        FileNotFoundError,
        "s3://no-bucket/x.zarr: the bucket does not exist on this server: check its name and endpoint_url",
        cause=True,
    )
    row(
        f"wrong secret, {upstream}",
        lambda w, read=read: read(at, storage_options=w.options(secret=SECRET)),
        PermissionError,
        f"{at}: the server refuses the credentials (SignatureDoesNotMatch): check key, secret and token in",
        cause=True,
    )
    row(
        f"wrong key, {upstream}",
        lambda w, read=read: read(at, storage_options=w.options(key=SECRET)),
        PermissionError,
        f"{at}: the server refuses the credentials (InvalidAccessKeyId): check key, secret and token in",
        cause=True,
    )
    row(
        f"no credentials, {upstream}",
        lambda w, read=read: read(at, storage_options={"client_kwargs": w.options()["client_kwargs"]}),
        PermissionError,
        f'{at}: no credentials were found: give storage_options={{"anon": True}} for public data',
        cause=True,
    )
    row(
        f"server down, {upstream}",
        lambda w, read=read: read(f"{CLOSED}/x.zarr"),
        ConnectionError,
        f"{CLOSED}/x.zarr: the server cannot be reached (no connection): check that it runs, the address and",
        cause=True,
    )
    row(
        f"S3 down, {upstream}",
        lambda w, read=read: read(at, storage_options=w.at(CLOSED)),
        ConnectionError,
        f"{at}: the server cannot be reached (no connection): check that it runs",
        cause=True,
    )
    row(
        f"no such host, {upstream}",
        lambda w, read=read: read("http://no-such-host.invalid/x.zarr"),
        ConnectionError,
        "http://no-such-host.invalid/x.zarr: the name of the server is not known: check the address",
        cause=True,
    )
    row(
        f"certificate, {upstream}",
        lambda w, read=read: read(f"{w.tls}/era5.zarr"),
        ConnectionError,
        "{tls}/era5.zarr: the certificate of the server is refused: give a bundle of authorities",
        cause=True,
    )
    row(
        f"https for http, {upstream}",
        lambda w, read=read: read(w.web.replace("http:", "https:") + "/era5.zarr"),
        ConnectionError,
        "/era5.zarr: the server does not speak https: give its address with http://",
        cause=True,
    )
row(
    "several that are down",
    lambda w: xzcache.open_mfdataset([f"{CLOSED}/x.zarr"]),
    ConnectionError,
    f"{CLOSED}/x.zarr: the server cannot be reached",
    cause=True,
)
row(
    "an option that is misspelled",
    lambda w: opened(at, storage_options={"endpoint_ulr": "x", "anon": True}),
    TypeError,
    "storage_options has the option 'endpoint_ulr', which no client knows, did you mean endpoint_url?",
    cause=True,
)
row(
    "options that are no mapping",
    lambda w: opened(at, storage_options=SECRET),
    TypeError,
    "storage_options is a str, which is not accepted: give a mapping of options",
)  # type: ignore[arg-type]
row(
    "options for a path",
    lambda w: opened(w / "era5.zarr", storage_options={"key": SECRET}, policy="lru"),
    TypeError,
    "storage_options goes with a URL only, such as s3://bucket/key: store is a path",
)
row(
    "a password in the URL",
    lambda w: opened(CLOSED.replace("//", f"//me:{SECRET}@") + "/x.zarr"),
    ConnectionError,
    f"{CLOSED}/x.zarr: the server cannot be reached",
    cause=True,
)
row(
    "a password that cannot be told apart",
    lambda w: opened(f"https://me:{SECRET}#@host/x.zarr"),
    ValueError,
    "store",
)

# -- words and numbers

for name, value, accepted in [
    ("max_size", 2e9, 'a whole number of bytes, 0 or more, a string such as "20 GB"'),
    ("max_size", "20 GBB", 'a whole number of bytes, 0 or more, a string such as "20 GB"'),
    ("max_age_seconds", "1 h", 'a number of seconds, 0 or more, or "infinity"'),
    ("missing_max_age_seconds", -1, 'a number of seconds, 0 or more, or "infinity"'),
    ("revalidate", "always", '"open", "strict", True, False, or a number of seconds, 0 or more'),
    ("policy", "fifo", '"lru" (least recently used), "adaptive" or "none"'),
    ("upstream", "s3fs", '"auto" (obstore where it can, else fsspec), "obstore" or "fsspec"'),
    ("cache_set_data", "yes", "True or False"),
    ("namespace", "a/b", "None, or one path component that does not begin with a dot"),
]:
    error = TypeError if value in (2e9, "yes") else ValueError
    given = {name: value}
    row(
        f"{name}={value!r}",
        lambda w, given=given: opened(w / "era5.zarr", **given),
        error,
        f"{name}={value!r} is not accepted: give {accepted}",
    )
row(
    "pipeline",
    lambda w: opened(w / "era5.zarr", pipeline="on"),
    TypeError,
    "pipeline='on' is not accepted: give True or False",
)  # type: ignore[arg-type]
row(
    "min_free",
    lambda w: xzcache.CachePlugin(min_free="105%"),
    ValueError,
    "min_free='105%' is not accepted: give a share such as \"5%\"",
)
row(
    "a cache on the web",
    lambda w: opened(w / "era5.zarr", cache_store="s3://bucket/cache"),
    ValueError,
    "cache_store is a URL, which is not accepted: give a Zarr store that supports deletes, a path, or None",
)
row(
    "a cache in a file",
    lambda w: opened(w / "era5.zarr", cache_store=w / "era5.nc"),
    ValueError,
    "cache_store='{root}/era5.nc' is a file: give a directory of this user's",
)
for function, name in [
    (lambda w, **more: opened(w / "era5.zarr", **more), "open_zarr"),
    (lambda w, **more: xr.open_zarr(w / "era5.zarr", engine="zcache", **more), "open_zarr"),
    (lambda w, **more: xzcache.open_mfdataset([w / "era5.zarr"], **more), "open_mfdataset"),
    (lambda w, **more: engine(w / "era5.zarr", **more), "open_dataset"),
    (lambda w, **more: xzcache.CacheStore(w / "era5.zarr", **more), "CacheStore"),
    (lambda w, **more: xzcache.LockedLocalStore(w / "cache", **more), "LockedLocalStore"),
    (lambda w, **more: xzcache.CachePlugin(**more), "CachePlugin"),
]:
    row(
        f"max_sise of {name}, {len(ROWS)}",
        lambda w, function=function: function(w, max_sise="1 GB"),
        TypeError,
        f"{name}() got an unexpected keyword argument 'max_sise', did you mean max_size?",
    )
row(
    "another engine",
    lambda w: xr.open_zarr(w / "era5.zarr", engine="netcdf4"),
    TypeError,
    "open_zarr() knows no engine but \"zcache\", not 'netcdf4'; xr.open_dataset has the other engines",
    cause=True,
)
row(
    "an engine that is misspelled",
    lambda w: xr.open_zarr(w / "era5.zarr", engine="zcach"),
    TypeError,
    "not 'zcach', did you mean zcache?",
    cause=True,
)
row(
    "engine zarr",
    lambda w: opened(w / "era5.zarr", engine="zarr"),
    ValueError,
    "engine='zarr' is not accepted: this function reads with 'zcache'",
)  # type: ignore[arg-type]
row(
    "no client",
    lambda w: xzcache.cluster_info(None),
    TypeError,
    "client=None is not accepted: give a distributed.Client",
)


@pytest.mark.parametrize(("act", "error", "says", "cause"), ROWS)
def test_a_wrong_input(act: Act, error: type[Exception], says: str, cause: bool, world: World, tmp_path: Path) -> None:
    with xzcache.config.set(directory=str(tmp_path / "cache")), pytest.raises(error) as raised:
        act(world)
    said = raised.value.args[0] if isinstance(raised.value, KeyError) else str(raised.value)
    places = {"{root}": str(world.root), "{web}": world.web, "{login}": world.login, "{tls}": world.tls}
    for name, place in places.items():
        says = says.replace(name, place)
    assert says in said
    # one line, and no display of a store within it
    assert "\n" not in said
    assert "CacheStore(store=" not in said
    assert SECRET not in said
    # what the source itself says is kept
    assert not cause or raised.value.__cause__ is not None


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_address_of_the_environment_without_its_scheme(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "127.0.0.1:9000")
    anyone = {"storage_options": {"anon": True}, "cache_store": tmp_path / "cache"}
    with pytest.raises(ValueError, match=f"{name}='127.0.0.1:9000' is not accepted, it has no scheme"):
        xzcache.CacheStore("s3://bucket/era5.zarr", **anyone)
    # boto does not look at it then
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert xzcache.CacheStore("s3://bucket/era5.zarr", upstream="fsspec", **anyone)


def test_a_path_that_is_misspelled_has_its_neighbours_as_a_note(world: World) -> None:
    for read in (opened, engine, xzcache.open_mfdataset):
        given = [world / "era6.zarr"] if read is xzcache.open_mfdataset else world / "era6.zarr"
        with pytest.raises(FileNotFoundError, match="does not exist") as raised:
            read(given)
        assert str(raised.value) == f"{world / 'era6.zarr'} does not exist"
        assert raised.value.__notes__ == ["did you mean era5.zarr?"]


def test_there_are_enough_rows() -> None:
    assert len(ROWS) >= 60


def test_groups_that_are_not_at_the_root_are_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        # asyncio logs at any moment what earlier tests have left to the garbage collector
        return [record.getMessage() for record in caplog.records if record.name.partition(".")[0] == "xzcache"]

    for read in (opened, engine):
        caplog.clear()
        assert not read(world / "deep.zarr").variables
        assert said() == [f"{world / 'deep.zarr'} has no arrays at its root: give group=, it has 'surface'"]
        caplog.clear()
        assert read(world / "deep.zarr", group="surface/era5").variables
        assert said() == []


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    urls = {"s3://b/x": "remote", "https://h/x": "remote", "gs://b/x": "gcs", "az://c/x": "azure"}
    code = """
import sys
for name in ("obstore", "s3fs", "gcsfs", "adlfs", "aiohttp"):
    sys.modules[name] = None
import xzcache
for url in sys.argv[1:]:
    try:
        xzcache.CacheStore(url)
    except ImportError as error:
        print(error)
"""
    environment = {**os.environ, "XZCACHE_DIRECTORY": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, *urls]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == len(urls), done
    for line, (url, extra) in zip(said, urls.items(), strict=True):
        assert line.startswith(f"{url} needs a package that reads it: pip install 'xzcache[{extra}]'")
