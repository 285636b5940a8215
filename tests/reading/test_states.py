"""Objects that are rewritten at their source, and sources that answer something else than they are asked for.

Parts of two states of an object never meet, whatever library reads it, and an answer that is not exactly what was asked
for is never cached.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import S3Server, needs_obstore, nobody, s3_server, serving, tidy, words
from sources import Part, between, buffer, by_ranges, neighbours, read
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore

import xzcache

__all__ = ["nobody", "tidy"]
pytestmark = [
    pytest.mark.usefixtures("nobody"),
    by_ranges,
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore:.*[uU]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KEY = "a/c/0"
OLD, NEW = (random.Random(number).randbytes(60_000) for number in (1, 2))
LIBRARIES = [pytest.param("obstore", marks=needs_obstore), "fsspec"]
UNSATISFIABLE = pytest.importorskip("obstore.exceptions").GenericError
"""What obstore raises, which is no `OSError`, for a range that begins where an object ends."""


def read_now(store: Store, key: str, part: Part = None) -> bytes | None:
    """Read on the loop that Zarr has, as clients of fsspec's stay with the loop that they were first used by."""
    found: bytes | None = sync(read(store, key, part))
    return found


# -- a server that can be told to answer wrongly


@dataclass
class Shelf:
    """The objects of a web server, and how it answers."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    tells: bool = True
    """Whether it gives ETags."""
    modified: float | None = None
    """When its files were modified, where its ETags tell no more than that and a size, as nginx makes them."""
    mode: str = "right"
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and range of each request for a chunk."""
    after: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What happens once so many requests for chunks were answered."""

    def asked(self) -> int:
        """How many requests for chunks there were since this was last called."""
        count = len(self.requests)
        self.requests.clear()
        return count


class _Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        shelf, key = self.shelf, self.path.removeprefix("/x/")
        data = shelf.objects.get(key)
        if data is None:
            self.answer(404, b"", {})
            return
        is_chunk = "/c/" in key
        said = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if shelf.tells else {}
        if shelf.modified is not None:
            at = formatdate(shelf.modified, usegmt=True)
            said = {"ETag": f'"{int(shelf.modified):x}-{len(data):x}"', "Last-Modified": at}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        mode = shelf.mode if is_chunk else "right"
        if asked is None or mode == "ignores":
            self.answer(200, data, said)
        else:
            size = len(data)
            first, last = (int(part) if part else None for part in asked.groups())
            if first is None:
                first, last = max(0, size - (last or 0)), size - 1
            last = size - 1 if last is None else min(last, size - 1)
            told = first, last
            if mode == "more":
                last = min(last + 1, size - 1)
            if mode == "shifted":
                first, last = told = max(0, first - 1), last - 1
            if mode == "fewer":
                last -= 5
                told = first, last
            self.answer(206, data[first : last + 1], said | {"Content-Range": f"bytes {told[0]}-{told[1]}/{size}"})
        if is_chunk:
            shelf.requests.append((self.command, self.headers.get("Range", "")))
            shelf.after.pop(len(shelf.requests), lambda: None)()

    def answer(self, status: int, data: bytes, said: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**said, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def shelf_server() -> Iterator[Shelf]:
    shelf = Shelf()
    with serving(type("Handler", (_Answering,), {"shelf": shelf})) as url:
        shelf.url = f"{url}/x"
        yield shelf


@pytest.fixture
def shelf(tidy: None) -> Iterator[Shelf]:
    with shelf_server() as shelf:
        yield shelf


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, tidy: None) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / "bucket").mkdir()
    with s3_server(directory) as server:
        yield server


# -- sources of every kind that can be rewritten


class Plain(WrapperStore[Store]):
    """A store of somebody's own, which tells no state."""


@dataclass
class Source:
    """Something to read, and how to rewrite an object of it."""

    store: Any
    write: Callable[[str, bytes], None]
    options: dict[str, Any] = field(default_factory=dict)

    def opened(self, cache: Path, **options: Any) -> xzcache.CacheStore:
        return xzcache.CacheStore(
            self.store, cache_store=cache, namespace="source", read_only=True, **self.options, **options
        )


KINDS = [
    pytest.param("web obstore", marks=needs_obstore),
    "web fsspec",
    pytest.param("web obstore untold", marks=needs_obstore),
    "web fsspec untold",
    "s3 fsspec",
    "files",
    "files just written",
    "file://",
    "memory://",
    "plain",
]


@pytest.fixture
def source(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return source_of(kind, request, tmp_path)


def source_of(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    if kind.startswith("web"):
        shelf: Shelf = request.getfixturevalue("shelf")
        shelf.tells = not kind.endswith("untold")
        return Source(shelf.url, shelf.objects.__setitem__, {"upstream": kind.split()[1]})
    if kind.startswith("s3"):
        server: S3Server = request.getfixturevalue("s3")
        name = f"{tmp_path.name}.zarr"
        through = server.store("bucket", name)
        options = {"upstream": kind.split()[1], "storage_options": words(server)}
        return Source(f"s3://bucket/{name}", lambda key, data: sync(through.set(key, buffer(data))), options)
    clock = iter(range(1_000_000_000, 2_000_000_000, 5))

    def write(key: str, data: bytes) -> None:
        place = tmp_path / "source" / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        if kind != "files just written":
            at = next(clock)
            os.utime(place, (at, at))

    if kind == "file://":
        return Source(FsspecStore.from_url(f"file://{tmp_path}/source"), write)
    if kind.startswith("files"):
        return Source(LocalStore(tmp_path / "source"), write)
    inner: Store = FsspecStore.from_url(f"memory://{tmp_path.name}") if kind == "memory://" else MemoryStore()
    outer = inner if kind == "memory://" else Plain(inner)
    return Source(outer, lambda key, data: sync(inner.set(key, buffer(data))))


def again_if_replaced(act: Callable[[], Any]) -> Any:
    """What a reader does who is told that the object was replaced: it reads again, and once is enough."""
    try:
        return act()
    except (OSError, BaseExceptionGroup) as error:
        first = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        assert isinstance(first, OSError)
        assert first.errno == errno.ESTALE
        return act()


# -- an object that is rewritten


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [RangeByteRequest(0, 3000), SuffixByteRequest(3000), OffsetByteRequest(57_000)])
def test_a_range_is_of_one_state(source: Source, before: Part, tmp_path: Path) -> None:
    """What is cached of the old object is no part of a range of the new one, nor beside one."""
    source.write(KEY, OLD)
    store = source.opened(tmp_path / "cache")
    read_now(store, KEY, before)
    source.write(KEY, NEW)
    wanted = between((1000, 6000), (56_000, 58_000))
    found = again_if_replaced(lambda: read_now(store, KEY, wanted))
    assert found == NEW[1000:6000] + NEW[56_000:58_000]
    assert read_now(store, KEY, RangeByteRequest(0, 3000)) == NEW[:3000]
    assert read_now(store, KEY, SuffixByteRequest(3000)) == NEW[-3000:]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_that_are_asked_for_together_are_of_one_state(source: Source, tmp_path: Path) -> None:
    """Though one of them is cached, and lies in a part that both states have."""
    same = OLD[:2000]
    source.write(KEY, OLD)
    store = source.opened(tmp_path / "cache")
    read_now(store, KEY, between((0, 1000), (10_000, 20_000)))
    source.write(KEY, same + NEW[2000:])
    found = again_if_replaced(lambda: read_now(store, KEY, between((10_000, 12_000), (30_000, 31_000))))
    assert found == NEW[10_000:12_000] + NEW[30_000:31_000]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_object_is_of_one_state(source: Source, tmp_path: Path) -> None:
    source.write(KEY, OLD)
    store = source.opened(tmp_path / "cache")
    read_now(store, KEY, between((0, 30_000)))
    source.write(KEY, NEW)
    assert read_now(store, KEY) == NEW
    assert read_now(store, KEY, RangeByteRequest(0, 40_000)) == NEW[:40_000]


@pytest.mark.parametrize("kind", KINDS)
def test_promotion_is_of_one_state(source: Source, tmp_path: Path) -> None:
    source.write(KEY, OLD)
    with xzcache.config.set(promote_above=20_000):
        store = source.opened(tmp_path / "cache")
    read_now(store, KEY, between((0, 10_000), (40_000, 50_000)))
    source.write(KEY, NEW)
    found = again_if_replaced(lambda: read_now(store, KEY, between((0, 100), (50_000, 51_000))))
    assert found == NEW[:100] + NEW[50_000:51_000]


def make(write: Callable[[str, bytes], None], values: np.ndarray[Any, Any], compressors: Any) -> None:
    """Write an array of one shard."""
    made = MemoryStore()
    zarr.create_array(
        made, name="a", shape=values.shape, chunks=(8, 8), shards=values.shape, dtype="i4", compressors=compressors
    )[:] = values
    for key, value in made._store_dict.items():
        if key.startswith("a/"):
            write(key, value.to_bytes())


@pytest.mark.parametrize("compressors", [None, "auto"], ids=["raw", "compressed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_has_the_values_of_one_version(source: Source, compressors: Any, tmp_path: Path) -> None:
    old = np.arange(64 * 64, dtype="i4").reshape(64, 64)
    new = np.random.default_rng(0).integers(0, 1 << 16, (64, 64), dtype="i4")
    new[:8, :8] = old[:8, :8]
    make(source.write, old, compressors)
    array = zarr.open_array(source.opened(tmp_path / "cache"), path="a", mode="r")
    np.testing.assert_array_equal(array[:16, :16], old[:16, :16])
    make(source.write, new, compressors)
    for box in ((slice(0, 32), slice(0, 40)), (slice(40, 64), slice(40, 64)), (slice(None), slice(None))):
        found = again_if_replaced(lambda box=box: array[box])
        assert np.array_equal(found, new[box])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("memory://", "plain")])
def test_two_processes_keep_no_parts_of_two_states(source: Source, tmp_path: Path) -> None:
    source.write(KEY, OLD)
    store = source.opened(tmp_path / "cache")
    assert neighbours.run(read_now, store, KEY, RangeByteRequest(0, 3000)) == OLD[:3000]
    source.write(KEY, NEW)
    wanted = between((2000, 9000), (30_000, 31_000))
    assert again_if_replaced(lambda: read_now(store, KEY, wanted)) == NEW[2000:9000] + NEW[30_000:31_000]
    spread = between((0, 9000), (29_000, 30_500))
    found = again_if_replaced(lambda: neighbours.run(read_now, store, KEY, spread))
    assert found == NEW[:9000] + NEW[29_000:30_500]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_object_that_is_rewritten_between_two_requests_of_a_call(shelf: Shelf, library: str, tmp_path: Path) -> None:
    shelf.objects[KEY] = OLD
    store = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library}).opened(tmp_path / "cache")
    wanted = between((0, 20_000), (20_000, 40_000))
    shelf.after[1] = lambda: shelf.objects.__setitem__(KEY, NEW)

    async def act() -> bytes:
        groups = [
            pair
            async for group in store.get_ranges(
                KEY,
                wanted,
                prototype=zarr.core.buffer.default_buffer_prototype(),
                max_coalesced_bytes=1,
                max_concurrency=1,
            )
            for pair in group
        ]
        return b"".join(value.to_bytes() for _, value in sorted(groups, key=lambda pair: pair[0]))

    assert again_if_replaced(lambda: sync(act())) == NEW[:40_000]
    assert read_now(store, KEY, between((10_000, 30_000))) == NEW[10_000:30_000]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_an_object_of_which_a_piece_was_evicted(source: Source, tmp_path: Path) -> None:
    """What left the cache says nothing of the object: nobody is told that it was replaced unless it was."""
    source.write(KEY, OLD)
    store = source.opened(tmp_path / "cache", max_size=45_000)
    wanted = between((0, 10_000), (20_000, 30_000))
    for part in wanted:
        assert read_now(store, KEY, part) == right(OLD, part)
    for number in range(3):
        source.write(f"a/c/{number + 1}", NEW[:10_000])
        read_now(store, f"a/c/{number + 1}")
        read_now(store, KEY, wanted[1])
    assert store.cache_stats()["evictions"]
    assert read_now(store, KEY, wanted) == right(OLD, wanted)
    for number in range(3):
        read_now(store, f"a/c/{number + 1}")
    source.write(KEY, NEW)
    spread = between((5000, 10_000), (25_000, 26_000), (40_000, 41_000))
    assert again_if_replaced(lambda: read_now(store, KEY, spread)) == right(NEW, spread)


@pytest.mark.parametrize("first", [True, False], ids=["told first", "untold first"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_server_that_tells_the_state_only_at_times(shelf: Shelf, library: str, first: bool, tmp_path: Path) -> None:
    """As the object is what it was, no reader is told otherwise."""
    shelf.objects[KEY] = OLD
    store = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library}).opened(tmp_path / "cache")
    for number, wanted in enumerate(
        (between((0, 1000), (10_000, 20_000)), between((10_000, 12_000), (30_000, 31_000)), between((500, 2000)))
    ):
        shelf.tells = first is (number != 1)
        assert read_now(store, KEY, wanted) == right(OLD, wanted)


class Failing(WrapperStore[Store]):
    """A store of somebody's own that fails at times."""

    failing: frozenset[int] = frozenset()
    """Which of the next calls fail."""
    calls = 0

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        self.calls += 1
        if self.calls in self.failing:
            raise ConnectionError("down")
        return await super().get(key, prototype, byte_range)

    async def get_ranges(self, key: str, byte_ranges: Any, **options: Any) -> Any:
        async for group in Store.get_ranges(self, key, byte_ranges, **options):
            yield group


@pytest.mark.parametrize("part", [RangeByteRequest(5000, 6000), between((5000, 6000)), SuffixByteRequest(700)])
def test_a_look_that_fails_fails_no_read(cache_kind: str, part: Part, tmp_path: Path) -> None:
    """What the cache asks on its own account, beside what the reader wants, is its own trouble."""
    source = Failing(MemoryStore())
    sync(source.set(KEY, buffer(OLD)))
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    store = xzcache.CacheStore(source, cache_store=cache)
    assert read_now(store, KEY, RangeByteRequest(0, 100)) == OLD[:100]
    source.calls, source.failing = 0, frozenset({2})
    assert read_now(store, KEY, part) == right(OLD, part)
    assert source.calls >= 2
    assert read_now(store, KEY, between((0, 100), (5000, 6000))) == OLD[:100] + OLD[5000:6000]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_etag_that_is_a_time_tells_nothing_of_a_young_file(shelf: Shelf, library: str, tmp_path: Path) -> None:
    """Another file of the same size may be of the same second."""
    shelf.objects[KEY] = OLD
    shelf.modified = time.time()
    source = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library})
    store = source.opened(tmp_path / "young")
    wanted = between((1000, 6000), (56_000, 58_000))
    assert read_now(store, KEY, between((0, 3000))) == OLD[:3000]
    shelf.objects[KEY] = NEW
    assert again_if_replaced(lambda: read_now(store, KEY, wanted)) == right(NEW, wanted)
    assert read_now(store, KEY, between((0, 3000))) == NEW[:3000]
    # of an old one it tells enough, and costs no request
    shelf.modified -= 86_400
    store = source.opened(tmp_path / "old")
    read_now(store, KEY, between((0, 3000)))
    shelf.asked()
    assert read_now(store, KEY, between((5000, 6000))) == NEW[5000:6000]
    assert shelf.asked() == 1


# -- what it costs


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_state_that_comes_with_the_bytes_costs_no_request(shelf: Shelf, library: str, tmp_path: Path) -> None:
    source = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library})
    values = np.arange(64 * 64, dtype="i4").reshape(64, 64)
    make(source.write, values, None)
    for box, requests in [((0, 16), 2), ((0, 16), 0), ((8, 24), 1)]:
        array = zarr.open_array(source.opened(tmp_path / "cache"), path="a", mode="r")
        shelf.asked()
        np.testing.assert_array_equal(array[:8, slice(*box)], values[:8, slice(*box)])
        assert shelf.asked() == requests
    source.write(KEY, OLD)
    assert read_now(source.opened(tmp_path / "other"), KEY) == OLD
    assert shelf.asked() == 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_untold_state_costs_one_small_request_for_each_fetch(shelf: Shelf, library: str, tmp_path: Path) -> None:
    shelf.tells = False
    source = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library})
    values = np.arange(64 * 64, dtype="i4").reshape(64, 64)
    make(source.write, values, None)
    for box, requests in [((0, 16), 3), ((0, 16), 0), ((8, 24), 2), ((0, 24), 0)]:
        array = zarr.open_array(source.opened(tmp_path / "cache"), path="a", mode="r")
        shelf.asked()
        np.testing.assert_array_equal(array[:8, slice(*box)], values[:8, slice(*box)])
        assert shelf.asked() == requests


# -- a source that answers something else


WRONG = ["ignores", "more", "shifted", "fewer"]
PARTS: dict[str, Any] = {
    "range": RangeByteRequest(100, 200),
    "suffix": SuffixByteRequest(500),
    "offset": OffsetByteRequest(59_000),
    "ranges": between((100, 200), (300, 400), (50_000, 50_100)),
}


def right(data: bytes, part: Part) -> bytes:
    if isinstance(part, Sequence):
        return b"".join(right(data, each) for each in part)
    if isinstance(part, RangeByteRequest):
        return data[part.start : part.end]
    if isinstance(part, OffsetByteRequest):
        return data[part.offset :]
    return data[-part.suffix :] if isinstance(part, SuffixByteRequest) else data


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", WRONG)
@pytest.mark.parametrize("library", LIBRARIES)
def test_an_answer_that_is_not_what_was_asked_for_is_not_cached(
    shelf: Shelf, library: str, mode: str, part: str, tmp_path: Path
) -> None:
    shelf.objects[KEY] = OLD
    shelf.mode = mode
    store = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library}).opened(tmp_path / "cache")
    wanted = PARTS[part]
    try:
        found = read_now(store, KEY, wanted)
    except Exception:
        # a source's failure is its own
        pass
    else:
        # what the source said to the reader's own question, or what is right; but nothing that we cut out of it
        assert part != "ranges" or found == right(OLD, wanted)
    shelf.mode = "right"
    assert read_now(store, KEY, wanted) == right(OLD, wanted)
    assert read_now(store, KEY, between((0, 20_000))) == OLD[:20_000]
    assert read_now(store, KEY) == OLD


class Sloppy(WrapperStore[Store]):
    """A store of somebody's own that answers ranges with other bytes, for a while."""

    mode = "right"

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await super().get(key, prototype, None if self.mode == "ignores" else byte_range)
        return value[:-5] if self.mode == "fewer" and value is not None and byte_range is not None else value

    async def get_ranges(self, key: str, byte_ranges: Any, **options: Any) -> Any:
        async for group in Store.get_ranges(self, key, byte_ranges, **options):
            yield group


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", ["ignores", "fewer"])
def test_nor_that_of_a_store_of_somebodys_own(cache_kind: str, mode: str, part: str, tmp_path: Path) -> None:
    source = Sloppy(MemoryStore())
    sync(source.set(KEY, buffer(OLD)))
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
    store = xzcache.CacheStore(source, cache_store=cache)
    source.mode = mode
    wanted = PARTS[part]
    if part == "ranges" and mode == "ignores":
        with pytest.raises(OSError, match="bytes"):
            read_now(store, KEY, wanted)
    elif part == "ranges":
        # each as the store answers it by itself: nothing is cut out of one answer to all
        assert read_now(store, KEY, wanted) == b"".join(right(OLD, each)[:-5] for each in wanted)
    else:
        assert read_now(store, KEY, wanted) == read_now(source, KEY, wanted)
    source.mode = "right"
    assert read_now(store, KEY, wanted) == right(OLD, wanted)
    assert read_now(store, KEY, between((0, 20_000))) == OLD[:20_000]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("mode", WRONG)
def test_an_array_is_well_again_with_its_server(shelf: Shelf, library: str, mode: str, tmp_path: Path) -> None:
    values = np.arange(64 * 64, dtype="i4").reshape(64, 64)
    source = Source(shelf.url, shelf.objects.__setitem__, {"upstream": library})
    make(source.write, values, None)
    array = zarr.open_array(source.opened(tmp_path / "cache"), path="a", mode="r")
    shelf.mode = mode
    try:
        found = array[:16, :16]
    except Exception:
        # a source's failure is its own
        pass
    else:
        np.testing.assert_array_equal(found, values[:16, :16])
    shelf.mode = "right"
    np.testing.assert_array_equal(array[:16, :16], values[:16, :16])
    np.testing.assert_array_equal(array[:], values)


# -- a model

SPANS = st.tuples(st.integers(0, 2500), st.integers(1, 900)).map(lambda p: RangeByteRequest(p[0], p[0] + p[1]))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.one_of(SPANS, st.integers(1, 900).map(SuffixByteRequest), st.none())),
        st.tuples(st.just("ranges"), st.lists(SPANS, min_size=1, max_size=4)),
        st.tuples(st.just("rewrite"), st.integers(2400, 3400)),
        st.tuples(st.just("rewrite during"), st.integers(1, 3)),
        st.tuples(st.just("reopen"), st.booleans()),
        st.tuples(st.just("elsewhere"), st.booleans()),
    ),
    max_size=14,
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_every_range_is_of_one_version(
    kind: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of an object that is rewritten between reads and during them; and in the end it is the present one."""
    here = tmp_path_factory.mktemp("model")
    source = source_of(kind, request, here)
    draw = random.Random(0)
    versions: list[bytes] = []

    def rewrite(size: int = 3000) -> None:
        versions.append(draw.randbytes(size))
        source.write(KEY, versions[-1])

    rewrite()
    store = source.opened(here / "cache")
    there = False
    for what, how in data.draw(STEPS):
        if what == "rewrite":
            rewrite(how)
        elif what == "rewrite during" and kind.startswith("web"):
            shelf = request.getfixturevalue("shelf")
            shelf.asked()
            shelf.after[how] = rewrite
        elif what == "reopen":
            store = source.opened(here / "cache", revalidate=how)
        elif what == "elsewhere":
            there = how and kind not in ("memory://", "plain")
        elif what in ("read", "ranges"):
            part: Any = how[0] if isinstance(how, list) and len(how) == 1 else how
            try:
                found = neighbours.run(read_now, store, KEY, part) if there else read_now(store, KEY, part)
            except (OSError, UNSATISFIABLE):
                # replaced meanwhile, or a range beyond the end of the present version
                continue
            if isinstance(part, list) and kind.endswith(("plain", "untold")):
                continue
            assert found in [right(version, part) for version in versions]
    request_done(kind, request)
    for part in (between((0, 1000), (1500, 2400)), None, SuffixByteRequest(100)):
        last = source.opened(here / "cache", revalidate=True)
        assert again_if_replaced(lambda part=part, last=last: read_now(last, KEY, part)) == right(versions[-1], part)


def request_done(kind: str, request: pytest.FixtureRequest) -> None:
    if kind.startswith("web"):
        request.getfixturevalue("shelf").after.clear()


async def test_tasks_that_read_while_an_object_is_rewritten(shelf: Shelf, tmp_path: Path) -> None:
    """Each has ranges of one version, whoever fetched the bytes."""
    versions = [random.Random(number).randbytes(20_000) for number in range(6)]
    shelf.objects[KEY] = versions[0]
    for number, version in enumerate(versions[1:], 1):
        shelf.after[4 * number] = lambda version=version: shelf.objects.__setitem__(KEY, version)
    source = Source(shelf.url, shelf.objects.__setitem__, {"upstream": "fsspec"})
    stores = [source.opened(tmp_path / "cache") for _ in range(3)]

    async def one(number: int) -> None:
        draw = random.Random(number)
        for _ in range(12):
            wanted = between(*((at, at + draw.randrange(1, 4000)) for at in sorted(draw.sample(range(15_000), 3))))
            try:
                found = await read(stores[number % 3], KEY, wanted)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                continue
            assert found in [right(version, wanted) for version in versions]

    await asyncio.gather(*(one(number) for number in range(9)))
