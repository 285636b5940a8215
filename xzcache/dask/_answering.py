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
from xzcache.model import END, UNKNOWN_AGE, Given, Span
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
_INLINE: Final = 128 << 10
"""The most bytes that are sent within the message: a copy of so few takes less time than a frame of their own."""
_KEPT: Final = 1.0
"""Seconds for which an answer is kept."""
_STORES: Final = 256
_HELD: Final = 64 << 20
"""The most bytes of all answers that are kept, but for the latest one."""
_OVERHEAD: Final = 1 << 10
_REMEMBERED: Final = 1 << 16
"""Chunks that were confirmed."""

_Asked = tuple[str, str, tuple[Span, ...], Since | tuple[()]]
"""The name of a store, a key, spans, and since when older entries are stale."""


class _Copy(NamedTuple):
    """A copy of another node's store."""

    store: CacheStore
    place: str
    """Where it read when it was opened, as `place_of` tells it."""


class _Answer(NamedTuple):
    """What this node gives to others that ask for a chunk."""

    told: dict[str, Any]
    """What others are told; its status is ``"given"``, ``"refused"``, or ``"not now"``, which is no refusal."""
    data: memoryview = memoryview(b"")
    age: float = 0.0
    at: float = 0.0
    """When it was that old, by `time.monotonic`."""


_REFUSED: Final = _Answer({"status": "refused"})
_NOT_NOW: Final = _Answer({"status": "not now"})
_ELSEWHERE: Final = _Answer({"status": "elsewhere"})


async def refuse(**_: Any) -> dict[str, Any]:
    """Answer for a worker that has left."""
    return _REFUSED.told


class Answers:
    """What one worker answers to the others."""

    def __init__(self, directory: CacheDirectory, told: Told, worth: Worth, writes: Writes) -> None:
        self._directory, self._told, self._worth, self._writes = directory, told, worth, writes
        self._stores: Latest[str, asyncio.Future[_Copy | None]] = Latest(_STORES)
        self._fresh: Latest[tuple[str, Since], bool] = Latest(_REMEMBERED)
        self._settled: Latest[str, bytes] = Latest(_STORES)
        """The totals of the directory's write counters when the copy of a name last confirmed its documents."""
        self._reading: dict[_Asked, asyncio.Task[_Answer]] = {}
        self._answers: Latest[_Asked, _Answer] = Latest(_HELD, lambda answer: len(answer.data) + _OVERHEAD)

    async def answer(self, **question: Any) -> dict[str, Any]:
        """Answer a question; on the worker's event loop."""
        if not self._told.is_valid:
            return _NOT_NOW.told
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
        wait = {"status": "fetching", "usual": self._worth.usual(namespace)}
        if (opening := self._stores.get(store)) is None:
            if pickled is None:
                return {"status": "unknown"}
            if blake2b(pickled, digest_size=16).hexdigest() != store:
                return _REFUSED.told
            opening = asyncio.ensure_future(pool.run(_unpickled, pickled))
            self._stores.put(store, opening)
        until = time.monotonic() + hold
        if not await _is_done(opening, hold):
            return wait
        if opening.exception() is not None or (copy := opening.result()) is None:
            self._stores.drop(store)
            return _ELSEWHERE.told
        backend = copy.store._reads.backend
        if backend.cache_id is not self._directory or copy.store.namespace != namespace:
            # the same path or address may lead to other data here
            return _REFUSED.told
        since = self._told.stale_since(backend.prefix + key)
        if since is None:
            return _NOT_NOW.told
        asked: _Asked = store, key, tuple((start, stop) for start, stop in spans), since
        if (answer := self._answers.get(asked)) is None:
            if (task := self._reading.get(asked)) is None:
                self._settle(store, copy.store)
                task = self._reading[asked] = asyncio.ensure_future(self._read_and_keep(copy, asked))
            if not await _is_done(task, until - time.monotonic()):
                return wait
            answer = task.result()
        if answer is _ELSEWHERE:
            self._stores.drop(store)
        if self._told.stale_since(backend.prefix + key) != since or not self._told.is_valid:
            return _NOT_NOW.told
        if at + _PIECE >= len(answer.data):
            # another program may write a missing chunk at any moment
            self._answers.drop(asked)
        told = answer.told | {"age": answer.age + time.monotonic() - answer.at}
        if not answer.data:
            return told
        data = answer.data[at : at + _PIECE]
        return told | {"data": bytes(data) if len(data) <= _INLINE else to_serialize(data)}  # type: ignore[no-untyped-call]

    async def _read_and_keep(self, copy: _Copy, asked: _Asked) -> _Answer:
        """Read, and keep the answer for a second: an asker fetches it in pieces, or asks again after a while."""
        _, key, spans, since = asked
        try:
            answer = await self._read(copy, key, spans, since)
        except Exception as error:
            # the asker gets the error from the source itself
            logger.debug("%s was not read for another node: %s", key, error)
            answer = _REFUSED
        finally:
            del self._reading[asked]
        self._answers.put(asked, answer)
        asyncio.get_running_loop().call_later(_KEPT, self._answers.drop, asked)
        return answer

    def _settle(self, name: str, copy: CacheStore) -> None:
        """Have a copy confirm its documents again, if anything in the directory was invalidated since it did."""
        process = self._directory.session.current
        totals = b"" if process is None else process.writes.totals()
        if not totals or self._settled.get(name) != totals:
            copy._reads.distrust_documents()
            self._settled.put(name, totals)

    async def _read(self, copy: _Copy, key: str, spans: tuple[Span, ...], since: Since | tuple[()]) -> _Answer:
        store, reads = copy.store, copy.store._reads
        full = reads.backend.prefix + key
        # a node that does not own the chunk, as it sees the cluster, does not fetch it for others
        owns = self._told.owns(key)
        began, at = time.perf_counter(), time.monotonic()
        fetching = 0.0
        # what was confirmed of byte ranges holds for these only
        what = full if spans == ((0, END),) else f"{full} {spans}"
        if isinstance(since, Since) and not self._is_fresh(what, since, reads, key, spans):
            if not owns:
                return _NOT_NOW
            with self._writes.renewing(full):
                # what this node has goes only once the source has answered
                given = await reads.give(key, spans, partial(_renewed, store, key, spans), anew=True)
            fetching = time.perf_counter() - began
            if given is not None and given.age < UNKNOWN_AGE:
                # it is what this node has now, whose disk may also have been put aside, with what it had before
                self._fresh.put((what, since), True)
        elif (given := await reads.give(key, spans, None)) is None and owns:
            given = await reads.give(key, spans, partial(_fetched, store, key, spans))
            fetching = time.perf_counter() - began
        if fetching and copy.place and await pool.run(place_of, store) != copy.place:
            # the directory may have been unmounted here, which looks as if chunks were missing
            return _ELSEWHERE
        if given is None:
            # of an object without a validator, parts are never given
            return _REFUSED if owns else _NOT_NOW
        told = {"status": "given", "key": key, "missing": given.values is None, "fetching": fetching}
        if given.values is None:
            return _Answer(told)
        data = given.values[0] if len(given.values) == 1 else memoryview(b"".join(given.values))
        more = {"sizes": list(map(len, given.values)), "crc": crc_of(data), "validator": given.validator}
        return _Answer(told | more, data, given.age, at)

    def _is_fresh(self, what: str, since: Since, reads: ReadThrough, key: str, spans: tuple[Span, ...]) -> bool:
        """Whether nothing that this node has of a chunk is from before a time."""
        full, parts = reads.backend.prefix + key, reads.backend.parts(key)
        if parts.is_empty:
            # answers to requests from before then are not stored
            return True
        known = self._fresh.get((full, since)) is not None or self._fresh.get((what, since)) is not None
        entries = [reads.reading.entry(key, *span) for span in spans]
        return known or all(entry is not None and since.is_before(parts.validated(entry)) for entry in entries)


def _unpickled(pickled: bytes) -> _Copy | None:
    """A copy of another node's store; None if it would read other data here."""
    store, place = loads(pickled)  # type: ignore[no-untyped-call]
    assert isinstance(store, CacheStore)
    if place_of(store) != place:
        return None
    reading = store._reads.reading
    reading.asks_peers, reading.stats = False, ForPeers(process)
    reading.backend.count(reading.stats)
    return _Copy(store, place)


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


async def _is_done(future: asyncio.Future[Any], seconds: float) -> bool:
    """Wait for a future, for a while; returns whether it is done."""
    if not future.done():
        # `asyncio.wait` takes a turn of the loop and a timer even for what is done
        await asyncio.wait([future], timeout=max(0.0, seconds))
    return future.done()


async def _loop_here() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def zarr_loop() -> asyncio.AbstractEventLoop:
    """The event loop on which Zarr reads."""
    if not _zarr or _zarr[0].is_closed():
        _zarr[:] = [await pool.run(lambda: sync(_loop_here()))]
    return _zarr[0]


_zarr: Final[list[asyncio.AbstractEventLoop]] = []
