"""A read with `revalidate=True` that begins after the source has changed sees the change, whatever is under way."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fsspec.asyn import AsyncFileSystem
from processes import PATIENCE, Team
from sources import CountingStore, again, between, by_ranges, cached, local_source, ranges, read
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import FsspecStore, LocalStore

import xzcache

SIZE = 4000
OLD, NEW = b"o" * SIZE, b"n" * SIZE
CHUNK, DOCUMENT = "a/c/0", "a/zarr.json"
ASIDE = "a/c/1"
BOUND = 3.0
"""Seconds for which a read may wait before it is taken to wait for another one."""

Read = Callable[[Store, str], Awaitable[Any]]


async def whole(store: Store, key: str) -> bytes | None:
    return await read(store, key)


async def one_range(store: Store, key: str) -> bytes | None:
    return await read(store, key, RangeByteRequest(100, 900))


async def suffix(store: Store, key: str) -> bytes | None:
    return await read(store, key, SuffixByteRequest(100))


async def one_of_many(store: Store, key: str) -> bytes:
    return b"".join(await ranges(store, between((100, 900)), key))


async def many(store: Store, key: str) -> bytes:
    return b"".join(await ranges(store, between((100, 900), (2000, 2500)), key, max_gap_bytes=0))


async def across(store: Store, key: str) -> bytes:
    return b"".join(await ranges(store, between((500, 1500)), key))


READS = pytest.mark.parametrize(
    ("key", "how"),
    [
        pytest.param(CHUNK, whole, id="whole"),
        pytest.param(CHUNK, one_range, id="range"),
        pytest.param(CHUNK, suffix, id="suffix"),
        pytest.param(CHUNK, one_of_many, id="one-of-many-ranges"),
        pytest.param(CHUNK, many, id="many-ranges", marks=by_ranges),
        pytest.param(DOCUMENT, whole, id="document"),
    ],
)
METHODS = ("get", "get_ranges")
PIPELINES = ["zarr.core.codec_pipeline.BatchedCodecPipeline"]
if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
    PIPELINES += ["zarr.core.codec_pipeline.FusedCodecPipeline", "xzcache.pipeline.CachePipeline"]


def rewrite(tmp_path: Path, key: str, data: bytes, age: float = 100.0) -> None:
    """Replace an object at the source by one that was written a while ago, so that its time tells its state."""
    path = tmp_path / "source" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name("new")
    new.write_bytes(data)
    status = new.stat()
    os.utime(new, (status.st_mtime - age, status.st_mtime - age))
    os.replace(new, path)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def bounded(condition: Callable[[], bool]) -> None:
    """Wait until something holds, but no longer than `BOUND`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(BOUND):
            await until(condition)


def is_new(got: Any) -> bool:
    return bool(got) and set(got) == set(b"n")


async def persistent(how: Read, store: Store, key: str) -> Any:
    """Read; again where the store says that the object was replaced meanwhile."""
    while True:
        try:
            return await how(store, key)
        except BaseExceptionGroup as group:
            if group.split(lambda error: isinstance(error, OSError) and error.errno == errno.ESTALE)[1] is not None:
                raise


def hold(source: CountingStore, key: str) -> None:
    """Hold back what the source answers, by whichever method it is asked."""
    for method in METHODS:
        source.hold(method, key)


def let_go(source: CountingStore, key: str) -> None:
    for method in METHODS:
        source.let_go(method, key)


@READS
@pytest.mark.parametrize("leader", ["the same store", "a store that asks each time", "a store that does not"])
async def test_a_request_that_is_under_way_is_not_shared(
    leader: str, key: str, how: Read, cache_kind: str, tmp_path: Path
) -> None:
    for name in (CHUNK, DOCUMENT, ASIDE):
        rewrite(tmp_path, name, OLD)
    source = local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path, read_only=True, revalidate=True)
    first = store
    if leader != "the same store":
        first = again(store, read_only=True, revalidate="open" if leader == "a store that does not" else True)
    # both have nothing to prepare any more
    await asyncio.gather(read(first, ASIDE), read(store, ASIDE))
    hold(source, key)
    source.forget()
    earlier = asyncio.create_task(persistent(how, first, key))
    await until(lambda: source.reads > 0)
    asked = source.reads
    rewrite(tmp_path, key, NEW)
    later = asyncio.create_task(persistent(how, store, key))
    await bounded(lambda: source.reads > asked or later.done())
    let_go(source, key)
    assert is_new(await later)
    # the earlier one began before the change: it may have seen either
    await earlier
    assert is_new(await how(store, key))


def ask_and_hold(link: Connection, tmp_path: Path, how: Read, key: str) -> None:
    """Read in a process of its own, whose answer is held back until it is told to go on."""

    async def lead() -> None:
        source = local_source(tmp_path)
        store = cached("directory", source, tmp_path, read_only=True)
        await read(store, ASIDE)
        hold(source, key)
        source.forget()
        task = asyncio.create_task(how(store, key))
        await until(lambda: source.reads > 0)
        link.send("asked")
        assert await asyncio.to_thread(link.recv) == "go on"
        let_go(source, key)
        await task
        store.close()

    asyncio.run(lead())
    xzcache.cleanup_resources()


@READS
def test_what_another_process_is_fetching_is_not_waited_for(key: str, how: Read, tmp_path: Path) -> None:
    for name in (CHUNK, DOCUMENT, ASIDE):
        rewrite(tmp_path, name, OLD)

    async def read_on() -> None:
        store = cached("directory", local_source(tmp_path), tmp_path, read_only=True, revalidate=True)
        await read(store, ASIDE)
        later = asyncio.create_task(persistent(how, store, key))
        await bounded(later.done)
        child.send("go on")
        assert is_new(await later)
        child.result()
        assert is_new(await how(store, key))

    with Team() as team:
        child = team.start(ask_and_hold, tmp_path, how, key)
        child.hear("asked")
        rewrite(tmp_path, key, NEW)
        asyncio.run(read_on())


async def test_cached_pieces_that_together_hold_a_range_are_asked_about(cache_kind: str, tmp_path: Path) -> None:
    rewrite(tmp_path, CHUNK, OLD)
    source = LocalStore(tmp_path / "source")
    store = cached(cache_kind, source, tmp_path, read_only=True, revalidate=True)
    for piece in ((0, 1000), (1000, 2000)):
        await ranges(store, between(piece), CHUNK)
    rewrite(tmp_path, CHUNK, NEW, age=50.0)
    assert is_new(await persistent(across, store, CHUNK))


@pytest.mark.parametrize("pipeline", PIPELINES, ids=[name.rpartition(".")[2] for name in PIPELINES])
async def test_a_part_of_a_chunk_is_not_written_to_an_answer_from_before(pipeline: str, tmp_path: Path) -> None:
    plain = LocalStore(tmp_path / "source")
    zarr.create_array(plain, name="x", data=np.full(4, 1, "i4"), chunks=(4,))
    source = local_source(tmp_path)
    store = cached("directory", source, tmp_path)
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array = zarr.open_array(store, path="x")
        hold(source, "x/c/0")
        source.forget()
        earlier = asyncio.create_task(read(store, "x/c/0"))
        await until(lambda: source.reads > 0)
        zarr.open_array(plain, path="x")[:] = np.full(4, 2, "i4")
        writing = asyncio.create_task(asyncio.to_thread(array.__setitem__, slice(0, 2), 3))
        await bounded(lambda: source.reads > 1 or writing.done())
        let_go(source, "x/c/0")
        await asyncio.gather(earlier, writing)
    assert zarr.open_array(plain, path="x")[:].tolist() == [3, 3, 2, 2]


class Bucket(AsyncFileSystem):  # type: ignore[misc]  # it has no types
    """Objects in memory with ETags, whose answers can be held back."""

    protocol = "bucket"
    cachable = False

    def __init__(self) -> None:
        super().__init__(asynchronous=True)
        self.data = b""
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []

    async def _hold(self, method: str) -> None:
        self.asked.append(method)
        gate = self.gates.get(method)
        if gate is not None:
            await gate.wait()

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        answer = {"name": path, "type": "file", "size": len(self.data), "ETag": f'"{self.data[:8].hex()}"'}
        await self._hold("info")
        return answer

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        answer = self.data[start:end]
        await self._hold("cat")
        return answer


async def test_what_is_unchanged_is_what_was_asked_about(cache_kind: str, tmp_path: Path) -> None:
    bucket = Bucket()
    bucket.data = OLD
    strict = cached(cache_kind, FsspecStore(bucket, path="root"), tmp_path, read_only=True, revalidate=True)
    lax = again(strict, read_only=True)
    # the answer to one who does not ask each time is late
    late = bucket.gates["cat"] = asyncio.Event()
    earlier = asyncio.create_task(read(lax, CHUNK))
    await until(lambda: "cat" in bucket.asked)
    del bucket.gates["cat"]
    bucket.data = NEW
    assert await read(strict, CHUNK) == NEW
    # between the source's word that what is cached is what it has, and a look at what is cached, that answer comes
    slow = bucket.gates["info"] = asyncio.Event()
    bucket.asked.clear()
    later = asyncio.create_task(read(strict, CHUNK))
    await until(lambda: "info" in bucket.asked)
    del bucket.gates["info"]
    late.set()
    assert await earlier == OLD
    lax.cache_info()
    slow.set()
    assert await later == NEW
