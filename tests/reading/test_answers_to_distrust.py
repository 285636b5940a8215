"""What a source or a disk can say that is no answer: nothing of it is cached, nothing hangs, and reads go on.

Pages of proxies instead of documents, answers that do not say which bytes they hold, servers that each have a name of
their own for one object, and pipes, links and devices where the cache has its files.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from processes import opened_index, run
from servers import needs_obstore, nobody, serving, tidy
from sources import Part, between, buffer, by_ranges, read, write_now
from test_states import Shelf, _Answering
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, ObjectStore, WrapperStore

import xzcache

__all__ = ["nobody", "tidy"]
pytestmark = [
    pytest.mark.usefixtures("nobody"),
    by_ranges,
    pytest.mark.filterwarnings("ignore:.*[uU]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LIBRARIES = [pytest.param("obstore", marks=needs_obstore), "fsspec"]
KEY = "a/c/0"
DATA = random.Random(1).randbytes(60_000)


# -- a server that can be told what to say instead


class _Lying(_Answering):
    lie: Callable[[Any, str, bytes], bool] | None = None

    def do_GET(self) -> None:
        key = self.path.removeprefix("/x/")
        data = self.shelf.objects.get(key)
        lie = type(self).lie
        if lie is None or data is None or not lie(self, key, data):
            super().do_GET()


class Server:
    def __init__(self, handler: type[_Lying], shelf: Shelf) -> None:
        self._handler = handler
        self.shelf = shelf

    def says(self, lie: Callable[[Any, str, bytes], bool] | None) -> None:
        self._handler.lie = staticmethod(lie) if lie is not None else None  # type: ignore[assignment]

    def opened(self, cache: Path, library: str, **options: Any) -> xzcache.CacheStore:
        return xzcache.CacheStore(self.shelf.url, cache_store=cache, read_only=True, upstream=library, **options)


@pytest.fixture
def server(tidy: None) -> Iterator[Server]:
    shelf = Shelf()
    handler = type("Handler", (_Lying,), {"shelf": shelf})
    with serving(handler) as url:
        shelf.url = f"{url}/x"
        yield Server(handler, shelf)


def now(store: Store, key: str, part: Part = None) -> bytes | None:
    """Read on the loop that Zarr has, as clients of fsspec's stay with the loop that they were first used by."""
    found: bytes | None = sync(read(store, key, part))
    return found


# -- documents


@pytest.mark.parametrize("lie", [b"<html>sign in</html>", b"", b'{"zarr_format": 3, "node_ty', b"\xff\xfe", b"[]"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_document_that_is_none_changes_nothing(server: Server, library: str, lie: bytes, tmp_path: Path) -> None:
    values = np.arange(64)
    inside = MemoryStore()
    zarr.create_array(inside, name="a", data=values, chunks=(16,))
    server.shelf.objects |= {key: value.to_bytes() for key, value in inside._store_dict.items()}
    first = server.opened(tmp_path / "cache", library)
    np.testing.assert_array_equal(zarr.open_array(first, path="a", mode="r")[:], values)
    server.shelf.asked()

    def instead(handler: Any, key: str, data: bytes) -> bool:
        if key.endswith("zarr.json"):
            handler.answer(200, lie, {})
        return key.endswith("zarr.json")

    server.says(instead)
    store, cold = server.opened(tmp_path / "cache", library), server.opened(tmp_path / "other", library)
    for each in (store, cold):
        with pytest.raises(Exception, match=r".*"):
            zarr.open_array(each, path="a", mode="r")
    server.says(None)
    np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[:], values)
    assert server.shelf.asked() == 0, "what is cached of the array was dropped"
    offline = server.opened(tmp_path / "other", library, revalidate=False)
    np.testing.assert_array_equal(zarr.open_array(offline, path="a", mode="r")[:], values)


# -- answers that do not say which bytes they hold


def _no_content(handler: Any, key: str, data: bytes) -> bool:
    handler.send_response(204)
    handler.end_headers()
    return True


def _not_modified(handler: Any, key: str, data: bytes) -> bool:
    handler.send_response(304)
    handler.end_headers()
    return True


def _a_part_of_unknown_place(handler: Any, key: str, data: bytes) -> bool:
    handler.answer(206, data[-99:], {})
    return True


def _cut_off_with_the_connection(handler: Any, key: str, data: bytes) -> bool:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(data[:3000])
    handler.close_connection = True
    return True


@pytest.mark.parametrize("part", [None, SuffixByteRequest(100), RangeByteRequest(100, 200), OffsetByteRequest(59_000)])
@pytest.mark.parametrize(
    "lie",
    [_no_content, _not_modified, _a_part_of_unknown_place, _cut_off_with_the_connection],
    ids=lambda lie: lie.__name__,
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_an_answer_that_does_not_say_what_it_holds_is_not_cached(
    server: Server, library: str, lie: Any, part: ByteRequest | None, tmp_path: Path
) -> None:
    if library == "obstore" and part is None and lie is _a_part_of_unknown_place:
        pytest.skip("obstore does not tell a part that nobody asked for from the whole")
    server.shelf.objects[KEY] = DATA
    store = server.opened(tmp_path / "cache", library)
    server.says(lie)
    for _ in range(2):
        # a source's failure is its own
        with suppress(Exception):
            now(store, KEY, part)
    server.says(None)
    assert now(store, KEY, part) == now(MemoryStore({KEY: buffer(DATA)}), KEY, part)


def test_ranges_that_are_packed_on_the_way_are_read_as_without_the_cache(server: Server, tmp_path: Path) -> None:
    server.shelf.objects[KEY] = DATA

    def packed(handler: Any, key: str, data: bytes) -> bool:
        first, last = (int(text) for text in handler.headers["Range"].removeprefix("bytes=").split("-"))
        said = {"Content-Encoding": "gzip", "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        handler.answer(206, gzip.compress(data[first : last + 1]), said)
        return True

    server.says(packed)
    store = server.opened(tmp_path / "cache", "fsspec")
    assert now(store, KEY, between((0, 50), (3000, 3100))) == DATA[:50] + DATA[3000:3100]


# -- an object that has several names


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize("told", ["ETag", "Last-Modified"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_servers_that_each_have_a_name_for_an_object(
    server: Server, library: str, told: str, servers: int, tmp_path: Path
) -> None:
    """Without the cache nobody notices, so with it nobody may."""
    values = np.arange(128 * 128).reshape(128, 128)
    inside = MemoryStore()
    zarr.create_array(inside, name="a", data=values, chunks=(8, 8), shards=(64, 64), compressors=None)
    server.shelf.objects |= {key: value.to_bytes() for key, value in inside._store_dict.items()}
    server.shelf.tells = False
    turn = iter(range(1_000_000))

    def by_turns(handler: Any, key: str, data: bytes) -> bool:
        if "/c/" not in key:
            return False
        number = next(turn) % servers
        name = f'"server-{number}-of-all"' if told == "ETag" else formatdate(1_000_000_000 + number, usegmt=True)
        send = handler.answer
        handler.answer = lambda status, body, said: send(status, body, {**said, told: name})
        type(handler).__mro__[1].__mro__[1].do_GET(handler)
        handler.answer = send
        return True

    server.says(by_turns)
    array = zarr.open_array(server.opened(tmp_path / "cache", library), path="a", mode="r")
    draw = random.Random(0)
    for _ in range(20):
        y, x = draw.randrange(90), draw.randrange(90)
        np.testing.assert_array_equal(array[y : y + 38, x : x + 38], values[y : y + 38, x : x + 38])


# -- a range that begins where an object ends


@needs_obstore
def test_a_range_behind_the_end_is_what_the_source_makes_of_it(server: Server, tmp_path: Path) -> None:
    """An exception of its own, or nothing; once the object is cached as a whole, nothing."""
    from obstore.store import MemoryStore as InMemory

    size = 2400
    data = DATA[:size]
    server.shelf.objects[KEY] = data

    def unsatisfiable(handler: Any, key: str, data: bytes) -> bool:
        first = handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        if first and int(first) >= len(data):
            handler.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return True
        return False

    server.says(unsatisfiable)
    files, memory, object_store = LocalStore(tmp_path / "files"), MemoryStore(), ObjectStore(InMemory())
    for store in (files, memory, object_store):
        sync(store.set(KEY, buffer(data)))
    web: list[Any] = [server.opened(tmp_path / library, library)._store for library in ("obstore", "fsspec")]
    for number, source in enumerate([files, memory, object_store, *web]):
        for part in (
            RangeByteRequest(size, size + 1),
            RangeByteRequest(size + 100, size + 200),
            OffsetByteRequest(size),
        ):
            there = xzcache.CacheStore(source, cache_store=tmp_path / f"cache{number}", read_only=True)
            assert _outcome(there, part) == _outcome(source, part)
        assert now(there, KEY) == data
        assert now(there, KEY, RangeByteRequest(size, size + 1)) == b""


def _outcome(store: Store, part: ByteRequest) -> object:
    try:
        return now(store, KEY, part)
    except Exception as error:
        return type(error)


# -- exceptions that lead back to themselves


class _Failing(WrapperStore[Store]):
    async def get_ranges(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        raise BaseExceptionGroup("reading failed", [PermissionError(13, "not yours", "a/c/0")])
        yield


def _pickled(link: Any, cache: str) -> list[str]:
    support = pytest.importorskip("tblib.pickling_support")
    support.install()
    source = _Failing(MemoryStore())
    write_now(source._store, KEY, DATA)
    told = []
    store = xzcache.CacheStore(source, cache_store=cache)
    try:
        asyncio.run(read(store, KEY, between((0, 10), (20_000, 20_010), (3_000_000, 3_000_010))))
    except Exception as error:
        told.append(repr(pickle.loads(pickle.dumps(error))))
    return told


def test_an_exception_of_a_group_can_be_pickled_with_its_traceback(tmp_path: Path) -> None:
    """As libraries that bring tracebacks from process to process have it, which follow what led to an exception."""
    pytest.importorskip("tblib")
    assert run(_pickled, str(tmp_path / "cache")) == [repr(PermissionError(13, "not yours"))]


# -- what is no file where the cache has its files


def _pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path, 0o600)


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _endless(path: Path, victim: Path) -> None:
    path.symlink_to("/dev/zero")


def _read_and_write(link: Any, source: str, cache: str) -> bool:
    store = xzcache.CacheStore(LocalStore(source), cache_store=cache, max_size="1 MB")
    array = zarr.open_array(store, path="a", mode="r+")
    values = array[:]
    array[:16] = values[:16]
    store.cache_info()
    return bool((zarr.open_array(store, path="a", mode="r")[:] == np.arange(64)).all())


@pytest.mark.parametrize("make", [_pipe, _link, _endless], ids=lambda make: make.__name__)
def test_what_is_no_file_hangs_no_read_and_leads_nowhere(make: Any, tmp_path: Path) -> None:
    source, cache, victim = tmp_path / "source", tmp_path / "cache", tmp_path / "victim"
    zarr.create_array(LocalStore(source), name="a", data=np.arange(64), chunks=(16,), compressors=None)
    assert run(_read_and_write, str(source), str(cache))
    names = [path.name for path in (cache / ".xzcache").iterdir() if path.is_file()]
    assert len(names) > 4
    for name in [*names, "max_size.new"]:
        victim.write_text("precious")
        victim.chmod(0o600)
        (cache / ".xzcache" / name).unlink(missing_ok=True)
        make(cache / ".xzcache" / name, victim)
        assert run(_read_and_write, str(source), str(cache)), name
        assert victim.read_text() == "precious", name


def test_a_size_that_no_file_has_is_damage(tmp_path: Path) -> None:
    """It makes sums overflow, whoever forged it: the index is made anew, as for any other damage."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    zarr.create_array(LocalStore(source), name="a", data=np.arange(64), chunks=(16,), compressors=None)
    assert run(_read_and_write, str(source), str(cache))
    with opened_index(str(cache)) as index:
        index.execute("UPDATE entry SET size = ?", [2**63 - 1])
        index.commit()
    for _ in range(2):
        assert run(_read_and_write, str(source), str(cache))
    xzcache.LockedLocalStore(cache).check(repair=True)
    assert xzcache.LockedLocalStore(cache).check().ok
