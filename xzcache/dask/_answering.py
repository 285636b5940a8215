"""Answering: a node reads a chunk for others that ask for it, as a task there would, with a copy of the asker's store.

It reads from its cache, or once from the source for all that ask. It never asks a third node.

What a node had before a write, or before another node found it to be stale, is fetched anew before it is given away.

State: the stores of other nodes, the answers to them, and what was confirmed; on Zarr's event loop only, as connections
to a source belong to one loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from distributed.protocol.pickle import loads
from distributed.protocol.serialize import to_serialize
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from xzcache import _threads as pool
from xzcache.dask._asking import place_of
from xzcache.dask._peering import Latest, crc_of
from xzcache.dask._told import Since
from xzcache.model import END, Given, Span
from xzcache.reading import ForPeers, contents, process
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer

    from xzcache.dask._telling import Writes
    from xzcache.dask._told import Told
    from xzcache.dask._worth import Worth
    from xzcache.directory import CacheDirectory
    from xzcache.reading import ReadThrough


logger = logging.getLogger("xzcache.dask")

_PIECE: Final = 4 << 20
"""The most bytes of one answer: larger chunks come in several, each within the time-out."""
_KEPT: Final = 1.0
"""Seconds for which an answer is kept."""
_STORES: Final = 256
_ANSWERS: Final = 256
_REMEMBERED: Final = 1 << 16
"""Chunks that were confirmed."""

_Asked = tuple[str, str, tuple[Span, ...], Since | tuple[()]]
"""The name of a store, a key, spans, and since when older entries are stale."""


class _Answer(NamedTuple):
    """What this node gives to others that ask for a chunk."""

    given: Given | None
    data: memoryview = memoryview(b"")
    crc: int = 0
    at: float = 0.0
    """When it was read, by `time.monotonic`."""
    fetching: float = 0.0
    """The seconds that the request to the source took; 0 for what was cached."""


class Answers:
    """What one worker answers to the others."""

    def __init__(self, directory: CacheDirectory, told: Told, worth: Worth, writes: Writes) -> None:
        self._directory, self._told, self._worth, self._writes = directory, told, worth, writes
        self._stores: Latest[str, asyncio.Future[CacheStore | None]] = Latest(_STORES)
        self._fresh: Latest[tuple[str, Since], bool] = Latest(_REMEMBERED)
        self._settled: Latest[str, bytes] = Latest(_STORES)
        """The totals of the directory's write counters when the copy of a name last confirmed its documents."""
        self._answers: Latest[_Asked, asyncio.Task[_Answer]] = Latest(_ANSWERS)

    async def answer(self, **question: Any) -> dict[str, Any]:
        if not self._told.is_valid:
            return {"status": "refused"}
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._give(**question), await zarr_loop()))

    async def _give(
        self,
        store: str,
        key: str,
        spans: list[Span],
        namespace: str,
        hold: float,
        at: int = 0,
        pickled: bytes | None = None,
    ) -> dict[str, Any]:
        """A piece of the answer, from the byte `at` on, or after `hold` seconds that there is none yet."""
        refused, wait = {"status": "refused"}, {"status": "fetching", "usual": self._worth.usual(namespace)}
        if (opening := self._stores.get(store)) is None:
            if pickled is None:
                return {"status": "unknown"}
            if blake2b(pickled, digest_size=16).hexdigest() != store:
                return refused
            opening = asyncio.ensure_future(pool.run(_unpickled, pickled))
            self._stores.put(store, opening)
        until = time.monotonic() + hold
        await asyncio.wait([opening], timeout=hold)
        if not opening.done():
            return wait
        if opening.exception() is not None or (copy := opening.result()) is None:
            self._stores.drop(store)
            return {"status": "elsewhere"}
        backend = copy._reads.backend
        if backend.cache_id is not self._directory or copy.namespace != namespace:
            # the same path or address may lead to other data here
            return refused
        since = self._told.stale_since(backend.prefix + key)
        if since is None:
            return refused
        wanted = tuple((start, stop) for start, stop in spans)
        asked: _Asked = store, key, wanted, since
        task = self._answers.get(asked)
        if task is None:
            self._settle(store, copy)
            task = asyncio.ensure_future(self._read(copy, key, wanted, since))
            self._answers.put(asked, task)
            task.add_done_callback(lambda _: self._forget_soon(asked))
        done, _ = await asyncio.wait([task], timeout=max(0.0, until - time.monotonic()))
        if not done:
            return wait
        try:
            answer = task.result()
        except Exception as error:
            # the asker gets the error from the source itself
            logger.debug("%s was not read for another node: %s", key, error)
            return refused
        if answer.given is None or self._told.stale_since(backend.prefix + key) != since or not self._told.is_valid:
            return refused
        values = answer.given.values
        told = {"status": "given", "key": key, "missing": values is None, "fetching": answer.fetching}
        if values is None:
            # another program may write the chunk at any moment
            self._answers.drop(asked)
            return told
        more = {"sizes": list(map(len, values)), "crc": answer.crc, "validator": answer.given.validator}
        more["age"] = answer.given.age + time.monotonic() - answer.at
        if at + _PIECE >= len(answer.data):
            self._answers.drop(asked)
        piece = to_serialize(answer.data[at : at + _PIECE])  # type: ignore[no-untyped-call]
        return told | more | {"data": piece}

    def _forget_soon(self, asked: _Asked) -> None:
        """Keep an answer for a second: an asker fetches it in several pieces, or asks again after a while."""
        asyncio.get_running_loop().call_later(_KEPT, self._answers.drop, asked)

    def _settle(self, name: str, copy: CacheStore) -> None:
        """Have a copy confirm its documents again, if anything in the directory was invalidated since it did."""
        process = self._directory.session.current
        totals = b"" if process is None else process.writes.totals()
        if not totals or self._settled.get(name) != totals:
            copy._reads.distrust_documents()
            self._settled.put(name, totals)

    async def _read(self, store: CacheStore, key: str, spans: tuple[Span, ...], since: Since | tuple[()]) -> _Answer:
        reads = store._reads
        full = reads.backend.prefix + key
        # a node that does not own the chunk, as it sees the cluster, does not fetch it for others
        owns = self._told.owns(key)
        began, at = time.perf_counter(), time.monotonic()
        fetching = 0.0
        # what was confirmed of byte ranges holds for these only
        what = full if spans == ((0, END),) else f"{full} {spans}"
        if isinstance(since, Since) and not self._is_fresh(what, since, reads, key):
            if not owns:
                return _Answer(None)
            with self._writes.renewing(full):
                # what this node has goes only once the source has answered
                given = await reads.give(key, spans, partial(_renewed, store, key, spans), anew=True)
            fetching = time.perf_counter() - began
            if given is not None:
                self._fresh.put((what, since), True)
        elif (given := await reads.give(key, spans, None)) is None and owns:
            given = await reads.give(key, spans, partial(_fetched, store, key, spans))
            fetching = time.perf_counter() - began
        if given is None or given.values is None:
            return _Answer(given, fetching=fetching)
        data = given.values[0] if len(given.values) == 1 else memoryview(b"".join(given.values))
        return _Answer(given, data, crc_of(data), at, fetching)

    def _is_fresh(self, what: str, since: Since, reads: ReadThrough, key: str) -> bool:
        """Whether nothing that this node has of a chunk is from before a time."""
        full, parts = reads.backend.prefix + key, reads.backend.parts(key)
        if parts.is_empty:
            # answers to requests from before then are not stored
            self._fresh.put((full, since), True)
        known = self._fresh.get((full, since)) is not None or self._fresh.get((what, since)) is not None
        return known or since.is_before(parts.validated())


def _unpickled(pickled: bytes) -> CacheStore | None:
    """A copy of another node's store; None if it would read other data here."""
    store, place = loads(pickled)  # type: ignore[no-untyped-call]
    assert isinstance(store, CacheStore)
    if place_of(store) != place:
        return None
    reading = store._reads.reading
    reading.asks_peers, reading.stats = False, ForPeers(process)
    reading.backend.count(reading.stats)
    return store


async def _fetched(store: CacheStore, key: str, spans: tuple[Span, ...]) -> Given:
    """Read spans as any reader does: once for all that want them."""
    prototype = default_buffer_prototype()
    if any(start < 0 or stop == END for start, stop in spans):
        read = [await store.get(key, prototype, _request_of(span)) for span in spans]
    else:
        found: dict[int, Buffer | None] = {}
        async for group in store.get_ranges(key, [RangeByteRequest(*span) for span in spans], prototype=prototype):
            found.update(group)
        read = [found[number] for number in range(len(spans))]
    values = tuple(contents(value) for value in read if value is not None)
    return Given(values if len(values) == len(read) else None, age=0.0)


async def _renewed(store: CacheStore, key: str, spans: tuple[Span, ...]) -> Given:
    """Ask the source for spans, which keeps what it confirms."""
    read = [await store._reads.renew(key, _request_of(span)) for span in spans]
    values = tuple(contents(value) for value in read if value is not None)
    return Given(values if len(values) == len(read) else None)


def _request_of(span: Span) -> ByteRequest | None:
    start, stop = span
    if span == (0, END):
        return None
    if start < 0:
        return SuffixByteRequest(-start)
    return OffsetByteRequest(start) if stop == END else RangeByteRequest(start, stop)


async def _loop_here() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def zarr_loop() -> asyncio.AbstractEventLoop:
    """The event loop on which Zarr reads."""
    if not _zarr or _zarr[0].is_closed():
        _zarr[:] = [await pool.run(lambda: sync(_loop_here()))]
    return _zarr[0]


_zarr: Final[list[asyncio.AbstractEventLoop]] = []
