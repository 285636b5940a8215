"""A source that cannot be reached: what is cached is served, what is not is named, and nothing is taken for deleted."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xarray as xr
import zarr
from processes import run, until
from servers import Rclone, nobody, serving, tidy
from sources import CountingStore
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

import xzcache

__all__ = ["nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WARNS = "cannot be reached"


def quick(upstream: str) -> dict[str, Any]:
    """Options with which a server that does not answer is not waited for: those of fsspec are in `look`."""
    moment = timedelta(milliseconds=10)
    backoff = {"init_backoff": moment, "max_backoff": moment, "base": 2}
    retries = {"max_retries": 2, "retry_timeout": timedelta(minutes=1), "backoff": backoff}
    return {"retry_config": retries} if upstream == "obstore" else {}


clients = pytest.mark.parametrize(
    ("kind", "upstream"), [("s3", "obstore"), ("s3", "fsspec"), ("http", "obstore"), ("http", "fsspec")]
)
formats = pytest.mark.parametrize("zarr_format", [3, 2])
_names = (f"data{number}" for number in itertools.count())


def weather(offset: int = 0) -> xr.Dataset:
    values = offset + np.arange(40 * 6, dtype="f8").reshape(40, 6)
    values[30:] = 0
    # a change of the attributes shows that the array has changed
    t2m = ("time", "x"), values, {"offset": offset}
    return xr.Dataset({"t2m": t2m}, {"time": np.arange(40), "x": np.arange(6)})


def write(path: Path, offset: int = 0, zarr_format: Any = 3, **options: Any) -> None:
    """Four chunks of `t2m`, of which the last is absent."""
    encoding = {"t2m": {"chunks": (10, 6)}}
    dataset = weather(offset)
    dataset.to_zarr(path, mode="w", zarr_format=zarr_format, encoding=encoding, write_empty_chunks=False, **options)


class Remote(NamedTuple):
    """A dataset behind a server that can be killed."""

    server: Rclone
    kind: str
    upstream: str
    path: Path
    cache: Path

    @property
    def url(self) -> str:
        where = f"{self.path.parent.name}/{self.path.name}"
        return f"s3://{where}" if self.kind == "s3" else f"{self.server.url}/{where}"

    def options(self, **more: Any) -> dict[str, Any]:
        words = self.server.words() if self.kind == "s3" else {}
        words = {"storage_options": words | quick(self.upstream)}
        return {"upstream": self.upstream, "cache_store": str(self.cache), **words, **more}

    def open(self, **more: Any) -> xr.Dataset:
        return xr.open_zarr(self.url, engine="zcache", **self.options(**more))


@contextmanager
def remote(kind: str, upstream: str, tmp_path: Path, zarr_format: Any = 3, **options: Any) -> Iterator[Remote]:
    root = tmp_path / "served" / "bucket" / next(_names)
    root.parent.mkdir(parents=True)
    write(root, 0, zarr_format, **options)
    server = Rclone(kind, tmp_path / "served")
    try:
        yield Remote(server, kind, upstream, root, tmp_path / "cache")
    finally:
        server.kill()


class Seen(NamedTuple):
    """What a process saw."""

    values: Any
    warnings: list[str]
    error: str = ""
    kind: str = ""
    cause: str = ""
    is_ours: bool = False


class Listening(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def look(_: Any, url: str, options: dict[str, Any], part: Any = slice(None), opener: str = "xarray") -> Seen:
    """Open a dataset and read a part of it, in a process of its own."""
    # clients would try again for many seconds
    sleep = asyncio.sleep
    asyncio.sleep = lambda delay, *result: sleep(min(delay, 0.01), *result)  # type: ignore[assignment]
    listening = Listening()
    logging.getLogger("xzcache").addHandler(listening)
    try:
        values: Any
        if opener == "zarr":
            store = xzcache.CacheStore(url, **options)
            values = zarr.open_group(store, mode="r")["t2m"][part]  # type: ignore[index]
        else:
            values = xr.open_zarr(url, engine="zcache", **options)["t2m"][part].values
    except Exception as error:
        error_kind = type(error)
        cause = "" if error.__cause__ is None else type(error.__cause__).__name__
        ours = isinstance(error, xzcache.SourceUnreachable)
        return Seen(None, listening.lines, str(error), error_kind.__name__, cause, ours)
    return Seen(values, listening.lines)


# -- remote sources


@formats
@clients
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fresh_process_reads_what_is_cached_of_a_source_that_is_gone(
    kind: str, upstream: str, zarr_format: int, tmp_path: Path
) -> None:
    with remote(kind, upstream, tmp_path, zarr_format) as source:
        read = [slice(20), slice(30, 40)]
        for part in read:
            source.open().t2m[part].load()
        source.server.kill()
        for opener, part in zip(["xarray", "zarr"], read, strict=True):
            seen = run(look, source.url, source.options(), part, opener)
            assert not seen.error, seen.error
            np.testing.assert_array_equal(seen.values, weather().t2m[part])
            (warning,) = (line for line in seen.warnings if WARNS in line)
            assert "last confirmed" in warning
            assert " ago (" in warning
            # no dump of the requests of the client
            assert "Error performing" not in warning
        seen = run(look, source.url, source.options(), slice(20, 30))
        missing = "t2m/c/2/0" if zarr_format == 3 else "t2m/2.0"
        assert seen.error.startswith(f"{missing} is not cached, and {source.url} cannot be reached (")
        assert "\n" not in seen.error
        assert "Error performing" not in seen.error
        assert seen.is_ours
        assert seen.cause not in ("", "SourceUnreachable")
        strict = run(look, source.url, source.options(revalidate="strict"), slice(20))
        assert strict.error
        assert not strict.is_ours
        assert not strict.warnings


@formats
@pytest.mark.parametrize("chunks", [None, {}])
def test_which_chunks_are_cached_is_known_without_asking(tmp_path: Path, zarr_format: int, chunks: Any) -> None:
    with remote("http", "obstore", tmp_path, zarr_format, consolidated=True) as web:
        web.open()["t2m"][:10].compute()
        before = web.open(chunks=chunks)
        asked = before.zcache.stats()["misses"]
        assert [before.zcache.chunks(name).tolist() for name in ("t2m", "time")] == [[[2], [0], [0], [0]], [2]]
        assert before.zcache.stats()["misses"] == asked
        web.server.kill()
        for dataset in (before, web.open(chunks=chunks)):
            assert [dataset.zcache.chunks(name).tolist() for name in ("t2m", "time")] == [[[2], [0], [0], [0]], [2]]


@pytest.mark.parametrize("upstream", ["obstore", "fsspec"])
def test_a_refused_key_is_an_answer(upstream: str, tmp_path: Path) -> None:
    with remote("s3", upstream, tmp_path) as source:
        source.open().t2m[:20].load()
        wrong = source.options(storage_options=source.server.words(secret="no-longer-valid") | quick(upstream))
        seen = run(look, source.url, wrong, slice(20))
        assert seen.error
        assert not seen.is_ours
        assert not seen.warnings
        shutil.rmtree(source.path)
        gone = run(look, source.url, source.options(), slice(20))
        assert "NotFoundError" in gone.kind
        assert not gone.warnings


@pytest.mark.parametrize("status", [401, 403, 404, 501])
@pytest.mark.parametrize("upstream", ["obstore", "fsspec"])
def test_which_answers_of_a_server_are_none(upstream: str, status: int, tmp_path: Path) -> None:
    _answers(upstream, status, tmp_path, is_served=False)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("upstream", ["obstore", "fsspec"])
def test_a_server_that_cannot_answer_now(upstream: str, status: int, tmp_path: Path) -> None:
    _answers(upstream, status, tmp_path, is_served=True)


def _answers(upstream: str, status: int, tmp_path: Path, *, is_served: bool) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler

    class Handler(SimpleHTTPRequestHandler):
        refuses = False

        def do_GET(self) -> None:
            if self.refuses:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                super().do_GET()

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    write(tmp_path / "served" / "x.zarr")
    with serving(partial(Handler, directory=str(tmp_path / "served"))) as url:
        options = {
            "upstream": upstream,
            "cache_store": str(tmp_path / "cache"),
            "storage_options": quick(upstream),
        }
        xr.open_zarr(f"{url}/x.zarr", engine="zcache", **options).t2m[:20].load()
        Handler.refuses = True
        seen = run(look, f"{url}/x.zarr", options, slice(20))
    assert bool(seen.error) is not is_served, seen.error
    assert bool(seen.warnings) is is_served
    assert not seen.is_ours


@clients
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_source_that_is_back_is_asked_again(
    kind: str, upstream: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with remote(kind, upstream, tmp_path) as source:
        source.open().t2m[:20].load()
        source.server.kill()
        session = source.open()
        np.testing.assert_array_equal(session.t2m[:20], weather().t2m[:20])
        write(source.path, 1000)
        source.server.start()
        # a fresh process asks at once
        assert run(look, source.url, source.options(), slice(20)).values[0, 0] == 1000
        # this one after a while, whether the dataset is opened again or was opened while the source was away
        until(lambda: source.open().t2m.offset == 1000)
        until(lambda: session.t2m[:20].values[0, 0] == 1000)
        np.testing.assert_array_equal(session.t2m[:20], weather(1000).t2m[:20])
        # one warning for a source and a process
        source.server.kill()
        source.open().t2m[:20].load()
    assert sum(WARNS in record.message for record in caplog.records) == 1


@pytest.mark.slow
@pytest.mark.parametrize("upstream", ["obstore", "fsspec"])
def test_a_source_that_hangs_is_not_waited_for_at_each_read(upstream: str, tmp_path: Path) -> None:
    with remote("http", upstream, tmp_path) as source:
        source.open().t2m[:20].load()
        os.kill(source.server.pid, signal.SIGSTOP)
        with xzcache.config.set(fetch_timeout=2.0):
            for _ in range(5):
                # each of them would wait
                np.testing.assert_array_equal(source.open().t2m[:20], weather().t2m[:20])
        os.kill(source.server.pid, signal.SIGCONT)


def test_what_cannot_be_listed_is_no_empty_group(tmp_path: Path) -> None:
    with remote("http", "obstore", tmp_path, consolidated=False) as source:
        source.open(consolidated=False).t2m[:20].load()
        source.server.kill()
        store = xzcache.CacheStore(source.url, **source.options())
        np.testing.assert_array_equal(zarr.open_array(store, path="t2m", mode="r")[:20], weather().t2m[:20])
        assert "t2m" in zarr.open_group(store, mode="r")
        with pytest.raises(Exception, match=r"list of keys|annot connect"):
            list(zarr.open_group(store, mode="r"))


# -- what may write, and who asks at each read


def _ask(store: xzcache.CacheStore, key: str) -> bytes | None:
    value = sync(store.get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


def test_what_may_write_is_told_nothing_old(cache_kind: str, tmp_path: Path) -> None:
    source = CountingStore(MemoryStore())
    zarr.create_array(source, name="a", data=np.arange(20), chunks=(5,))
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    store = xzcache.CacheStore(source, cache_store=cache)
    array = zarr.open_array(store, path="a", mode="r+")
    assert array[:].tolist() == list(range(20))
    source.errors["get"] = ConnectionError("down")
    with pytest.raises(ConnectionError, match=r"^down$"):
        zarr.open_array(store, path="a", mode="r+")
    with pytest.raises(ConnectionError, match=r"^down$"):
        # a part of a chunk
        array[2:3] = 100
    assert zarr.open_array(store, path="a", mode="r")[:].tolist() == list(range(20))
    for revalidate in (True, 0, "strict"):
        other = xzcache.CacheStore(source, cache_store=store._cache, revalidate=revalidate, read_only=True)
        with pytest.raises(ConnectionError, match=r"^down$"):
            zarr.open_array(other, path="a", mode="r")


def test_a_write_of_another_process_is_seen_while_the_source_is_away(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "x" / "source")
    counted = CountingStore(source)
    zarr.create_array(source, name="a", data=np.arange(20), chunks=(5,))
    options: dict[str, Any] = {"cache_store": tmp_path / "cache", "namespace": "one"}
    reader = xzcache.CacheStore(counted, read_only=True, **options)
    assert zarr.open_array(reader, path="a", mode="r")[:].tolist() == list(range(20))
    run(_write, str(tmp_path / "x" / "source"), options)
    counted.errors["get"] = ConnectionError("down")
    # what was written through the cache is not served as it was before
    again = xzcache.CacheStore(counted, read_only=True, **options)
    assert zarr.open_array(again, path="a", mode="r")[:5].tolist() == [7] * 5


def _write(_: Any, root: str, options: dict[str, Any]) -> None:
    zarr.open_array(xzcache.CacheStore(root, **options), path="a", mode="r+")[:5] = 7


# -- local sources


@pytest.mark.parametrize("hidden", ["mount", "parent", "root"])
def test_a_directory_that_is_not_mounted_is_not_taken_for_deleted(hidden: str, tmp_path: Path) -> None:
    """A mount that is absent is an empty directory, or none."""
    mount = tmp_path / "media" / "disk"
    root = mount if hidden == "root" else mount / "data" / "x.zarr"
    write(root)
    options = {"cache_store": str(tmp_path / "cache")}
    xr.open_zarr(root, engine="zcache", **options).t2m[:20].load()
    aside = tmp_path / "aside"
    away = mount.parent if hidden == "parent" else mount
    away.rename(aside)
    if hidden != "parent":
        mount.mkdir()
    seen = run(look, str(root), options, slice(20))
    assert not seen.error, seen.error
    np.testing.assert_array_equal(seen.values, weather().t2m[:20])
    assert sum(WARNS in line for line in seen.warnings) == 1
    # no fill values in place of chunks
    other = run(look, str(root), options, slice(20, 30))
    assert other.error.startswith(f"t2m/c/2/0 is not cached, and {root} cannot be reached (")
    assert "not mounted" in other.error
    strict = run(look, str(root), {**options, "revalidate": "strict"}, slice(20))
    assert strict.error
    if hidden != "parent":
        mount.rmdir()
    aside.rename(away)
    counted = CountingStore(LocalStore(root))
    store = xzcache.CacheStore(counted, namespace=xzcache.CacheStore(root, **options).namespace, **options)
    np.testing.assert_array_equal(zarr.open_group(store, mode="r")["t2m"][:20], weather().t2m[:20])
    assert not [key for method, key in counted.calls if "t2m/c/" in key], "what is cached was dropped"


def test_a_directory_that_was_deleted_is_deleted(tmp_path: Path) -> None:
    root = tmp_path / "x.zarr"
    write(root)
    options = {"cache_store": str(tmp_path / "cache")}
    xr.open_zarr(root, engine="zcache", **options).t2m[:20].load()
    shutil.rmtree(root)
    seen = run(look, str(root), options, slice(20))
    assert "NotFoundError" in seen.kind
    assert not seen.warnings
