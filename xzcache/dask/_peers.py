"""Peers: a node that lacks a chunk asks the node that owns it, before the source.

The owner of a chunk is found as `_affinity` finds the node of its block. It reads the chunk as a task there would, with
a copy of the asker's store: from its cache, or once from the source for all that ask. It never asks a third node.

No node is asked for what any node of the cluster has learned to be stale. Before a write through a cache reaches the
source, all nodes are told that the array is being written, and neither ask nor answer for it until the writes have
ended. What a node had before then, or before another node found it to be stale, is fetched anew before it is given to
others. A node that the scheduler could not tell has not heard from it for as long as a *lease*, and is silent as well.

Questions run on the worker's event loop, answers on Zarr's, and blocking work in threads, so that neither loop waits
for the other: a reader waits for a limited time on its own loop.

State: what the scheduler has told (changed on the worker's loop only), the stores of other nodes and the answers to
them (Zarr's loop only), and the times of answers, under a mutex.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import threading
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar

import google_crc32c
import numpy as np
from distributed.protocol.pickle import dumps, loads
from distributed.protocol.serialize import to_serialize
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from xzcache import _threads as pool
from xzcache._fork import renew_after_fork
from xzcache.dask._affinity import Nodes
from xzcache.model import END, Given, Span, array_documents, arrays_of, is_chunk, is_document, report_bug
from xzcache.reading import ForPeers, contents, peers, process
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from distributed.worker import Worker
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer

    from xzcache.dask._usage import Usage
    from xzcache.directory import CacheDirectory
    from xzcache.model import Backend
    from xzcache.reading import ReadThrough


logger = logging.getLogger("xzcache.dask")

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

Asking = Literal["off", "on"]

LEASE: Final = 10.0
"""Seconds for which a node believes what the scheduler has told it last."""
_QUIET: Final = 5.0
"""Seconds after the last write of an array after which its writes count as ended."""
_BEAT: Final = 0.5
"""Seconds between two looks at what the scheduler knows; longer in large clusters, as Dask's own heartbeats."""
_LONGEST: Final = 5.0
"""Seconds after which a question that nobody waits for any more is given up; connections take time to open."""
_PIECE: Final = 4 << 20
"""The most bytes of one answer: larger chunks come in several, each within the time-out."""
_SOME: Final = 16
"""The latest answers that tell whether it is worth to ask."""
_FEW: Final = 64
"""Up to so many workers are connected to in advance."""
_MOMENT: Final = 0.1
"""Seconds for which a read waits until all nodes know what it has found to be stale."""
_KEPT: Final = 1.0
"""Seconds for which an answer is kept."""
_STORES: Final = 256
_ANSWERS: Final = 256
_REMEMBERED: Final = 1 << 16
"""Chunks that other nodes have given once, and that are stored when they are asked for again."""
_PAUSES: Final = (1.0, 60.0)
"""The shortest and the longest time, in seconds, for which a node that is slow is not asked."""
_STEP: Final = 0.1
"""Seconds by which the clocks of a node may disagree before times of files are not believed."""

_INDICES: Final = re.compile(r"(?:^|/)(?:c[/.])?(\d+(?:[./]\d+)*)$")


def block_of(key: str) -> str:
    """The block that a chunk's key names, as affinity names it."""
    found = _INDICES.search(key)
    return key if found is None else found[1].replace("/", ".")


class Since(NamedTuple):
    """When this node was told that entries are stale: older ones are not given to others."""

    wall: float
    steady: float

    def is_before(self, stored: float | None) -> bool:
        """Whether an entry was stored after that, for certain."""
        steps = abs((time.time() - self.wall) - (time.monotonic() - self.steady))
        return stored is not None and steps < _STEP and stored > self.wall + _STEP


_Asked = tuple[str, str, tuple[Span, ...], Since | tuple[()]]
"""The name of a store, a key, spans, and since when older entries are stale."""


class _Latest(Generic[K, V]):
    """A dictionary of the latest items."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        with suppress(KeyError):
            self._items.move_to_end(key)
            return self._items[key]
        return None

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        while len(self._items) > self._most:
            self._items.popitem(last=False)

    def drop(self, key: K) -> None:
        self._items.pop(key, None)


class _Pace:
    """Whether it is worth to ask: how long the source takes, and how much longer or shorter other nodes take."""

    def __init__(self) -> None:
        self._source: float | None = None
        self._deviation = 0.0
        # the median of some, as the first answers of a process that has just started are slow
        self._answers: deque[float] = deque(maxlen=_SOME)
        self._pause = _PAUSES[0]
        self._until = 0.0

    def source_took(self, seconds: float) -> None:
        if self._source is None:
            self._source, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._source) - self._deviation) / 4
            self._source += (seconds - self._source) / 8

    def peer_took(self, seconds: float) -> None:
        """Record what an answer took beyond the owner's own request to the source."""
        self._answers.append(seconds)
        if self._source is None or len(self._answers) < _SOME or not self.is_worth_it:
            return
        if median(tuple(self._answers)) > self._source:
            self._until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _PAUSES[1])
            # the next answers decide
            self._answers.clear()
        else:
            self._pause = _PAUSES[0]

    @property
    def is_worth_it(self) -> bool:
        return time.monotonic() >= self._until

    @property
    def usual(self) -> float | None:
        """The seconds within which the source usually answers."""
        return None if self._source is None else self._source + 4 * self._deviation


class _Silence(NamedTuple):
    """A node that does not answer."""

    since: float
    """When that was last found, by `time.monotonic`."""
    until: float
    """Until when it is not asked."""
    pause: float


class _Pickle(NamedTuple):
    """A store as it is sent to other nodes."""

    store: weakref.ref[CacheStore]
    seen: bytes
    """The documents that the store had seen."""
    name: str
    """Stands for the pickle, once a node has it."""
    pickled: bytes


class _Answer(NamedTuple):
    """What this node gives to others that ask for a chunk."""

    given: Given | None
    data: memoryview = memoryview(b"")
    crc: int = 0
    at: float = 0.0
    """When it was read, by `time.monotonic`."""
    fetching: float = 0.0
    """The seconds that the request to the source took; 0 for what was cached."""


class Neighbours:
    """The caches of the other nodes, as one worker process sees them; and what it answers to them."""

    def __init__(self, worker: Worker, directory: CacheDirectory, usage: Usage, timeout: float) -> None:
        self._worker = worker
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._directory, self._node, self._bound = directory, usage.node, usage.bound
        self._timeout = timeout
        self._nodes = Nodes()
        self._elders: frozenset[str] = frozenset()
        """The nodes that joined before this one: they have cached the share that is now this node's."""
        self._version, self._heard = -1, -LEASE
        self._cluster = ""
        self._stale: dict[str, Since | None] = {}
        """The paths whose entries another node has found to be stale; None while they are being written."""
        self._beats: asyncio.Task[None] | None = None
        self._mutex = threading.Lock()
        self._paces: _Latest[str, _Pace] = _Latest(_STORES)
        self._silences: dict[str, _Silence] = {}
        """For the addresses that did not answer the last question."""
        self._seen: _Latest[str, bool] = _Latest(_REMEMBERED)
        self._known: _Latest[tuple[bytes, str], bool] = _Latest(_REMEMBERED)
        self._pickles: _Latest[int, _Pickle] = _Latest(_STORES)
        self._stores: _Latest[str, asyncio.Future[CacheStore | None]] = _Latest(_STORES)
        self._fresh: _Latest[tuple[str, Since], bool] = _Latest(_REMEMBERED)
        self._settled: _Latest[str, bytes] = _Latest(_STORES)
        """The totals of the directory's write counters when the copy of a name last confirmed its documents."""
        self._renewing: set[str] = set()
        """What is being asked of the source because others may have changed it: all nodes know of that already."""
        self._answers: _Latest[_Asked, asyncio.Task[_Answer]] = _Latest(_ANSWERS)
        self._writing: dict[str, tuple[int, float]] = {}
        """For a path that this process writes: the number of writes under way, and when the last one ended."""
        self._tellings: dict[str, asyncio.Task[None]] = {}
        self._told_at: dict[str, float] = {}
        """When the telling of a path was begun, by `time.monotonic`."""
        self._endings: dict[str, asyncio.Task[None]] = {}
        self._looking = asyncio.Lock()
        self._thread = threading.get_ident()
        self._greetings: set[asyncio.Future[None]] = set()
        renew_after_fork(self)

    # -- on the worker's event loop: what the scheduler tells

    async def start(self) -> None:
        """Begin to ask and to answer."""
        # the first answer should not wait for it
        await _zarr_loop()
        self._worker.handlers |= {"xzcache_ask": self._answer, "xzcache_look": self._look}
        self._directory.writes.listeners.append(self._learn)
        with suppress(Exception):
            await self._look()
        self._beats = asyncio.create_task(self._beat())
        peers.append(self)

    async def leave(self) -> None:
        """End with it, and have the scheduler tell the others not to ask this worker any more."""
        self.stop()
        with suppress(Exception):
            await self._worker.scheduler.xzcache_peers(worker=self._worker.address, node="", bound=None, known=0)

    def after_fork_in_child(self) -> None:
        """Ask and tell no other node in a child, which has no event loop of the worker."""
        self._mutex = threading.Lock()
        peers.clear()
        with suppress(ValueError):
            self._directory.writes.listeners.remove(self._learn)

    def stop(self) -> None:
        """End with it; questions under way are answered by the source."""
        with suppress(ValueError):
            peers.remove(self)
        with suppress(ValueError):
            self._directory.writes.listeners.remove(self._learn)
        for name, handler in (("xzcache_ask", self._answer), ("xzcache_look", self._look)):
            # a plugin under another name may have taken its place
            if self._worker.handlers.get(name) == handler:
                del self._worker.handlers[name]
        if self._beats is not None:
            self._beats.cancel()

    @property
    def known(self) -> int:
        """How many other nodes may be asked."""
        return max(0, len(self._nodes) - 1) if self._is_told else 0

    @property
    def _is_told(self) -> bool:
        """Whether what the scheduler told last may still be believed."""
        return time.monotonic() < self._heard + LEASE

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT + len(self._nodes) / 200)
            try:
                await self._look()
                await self._end_writes()
            except Exception as error:
                # without an answer, the lease ends
                logger.debug("the scheduler does not tell of other nodes: %s", error)

    async def _look(self) -> int:
        """Ask the scheduler what has changed; returns up to where this node knows it."""
        # one after the other: what was told first must not be applied last
        async with self._looking:
            sent = time.monotonic()
            ask = self._worker.scheduler.xzcache_peers(
                worker=self._worker.address, node=self._node, bound=self._bound, known=self._version
            )
            told = await asyncio.wait_for(ask, LEASE)
            if told["cluster"] != (self._cluster or told["cluster"]):
                raise RuntimeError("another scheduler does not know what the nodes have learned")
            stale = dict(self._stale)
            if any(path == "" for path, _ in told["stale"]):
                # it covers all that was told before; paths that are being written are told with it
                stale.clear()
            for path, is_written in told["stale"]:
                stale[path] = None if is_written else await self._distrusted(path)
            self._stale = stale
            if told["nodes"] is not None:
                self._see(told["nodes"])
            self._cluster, self._version, self._heard = told["cluster"], told["version"], sent
            return self._version

    async def _distrusted(self, path: str) -> Since | None:
        """Store nothing that was requested before now; None if that fails."""
        try:
            # in a thread of the worker's: those of this package may be waiting for this very answer
            await asyncio.to_thread(self._directory.writes.distrust, path)
        except Exception as error:
            logger.debug("nothing beneath %s is given to other nodes: %s", path, error)
            return None
        return Since(time.time(), time.monotonic())

    def _see(self, members: dict[str, tuple[str, int | None]]) -> None:
        """Note which nodes there are."""
        nodes = Nodes()
        for address, (node, bound) in members.items():
            nodes.add(address, node, bound)
        self._nodes = nodes
        # in the order in which they joined
        names = list(dict.fromkeys(node for node, _ in members.values()))
        self._elders = frozenset(names[: names.index(self._node)] if self._node in names else ())
        self._silences = {address: silence for address, silence in self._silences.items() if address in members}
        if len(members) <= _FEW:
            # it takes a moment to connect, which the first question would wait for
            others = [address for address, (node, _) in members.items() if node != self._node]
            self._greetings = {asyncio.ensure_future(self._greet(address)) for address in others}

    async def _greet(self, address: str) -> None:
        with suppress(Exception):
            await asyncio.wait_for(self._worker.rpc(address).echo(data=""), _LONGEST)

    # -- on the readers' event loops: asking

    async def ask(self, store: object, backend: Backend, key: str, spans: Sequence[Span]) -> Given | None:
        """Ask the owner of a chunk, on behalf of a store."""
        try:
            if (address := self._address(store, backend, key)) is None:
                return None
            assert isinstance(store, CacheStore)
            given = await self._ask(address, store, backend, key, spans)
        except Exception as error:
            if not isinstance(error, OSError):
                report_bug(error, "while another node was asked")
            given = None
        if given is None and isinstance(store, CacheStore):
            store._reads.reading.stats.peer_miss()
        return given

    def _address(self, store: object, backend: Backend, key: str) -> str | None:
        """The worker to ask for a chunk; None if no other node owns it or has owned it, or none may be asked."""
        if backend.cache_id is not self._directory or not self._is_told or not is_chunk(key):
            return None
        if not isinstance(store, CacheStore) or not store.source.lasting or store.source.fickle:
            return None
        if not store.source.immutable and not self._has_seen(store, key):
            # a chunk must be of the array that the reader knows
            return None
        if self._stale and any(self._stale.get(path, ()) is None for path in _paths_above(backend.prefix + key)):
            return None
        pace = self._paces.get(backend.namespace)
        if pace is not None and not pace.is_worth_it:
            return None
        nodes, block = self._nodes, block_of(key)
        choice = nodes.choice(block)
        if choice is None:
            return None
        # a node that has just joined owns blocks that were those of their second choice until then
        owner = choice.second if choice.first == self._node else choice.first
        if owner == self._node or (choice.first == self._node and owner not in self._elders):
            return None
        now, scheme = time.monotonic(), self._worker.address.partition("://")[0]
        addresses = sorted(
            address
            for address in nodes.workers(owner)
            if address.startswith(f"{scheme}://")
            and (address not in self._silences or now >= self._silences[address].until)
        )
        return addresses[_number(block) % len(addresses)] if addresses else None

    async def _ask(
        self, address: str, store: CacheStore, backend: Backend, key: str, spans: Sequence[Span]
    ) -> Given | None:
        known = await self._pickled(store)
        pace = self._pace(backend.namespace)
        question: dict[str, Any] = {
            "store": known.name,
            "key": key,
            "spans": [list(span) for span in spans],
            "namespace": backend.namespace,
            # an owner that is still fetching says so in time
            "hold": self._timeout / 2,
        }
        began = time.perf_counter()
        pieces: list[memoryview] = []
        size, crc, fetching, is_sent = 0, None, 0.0, False
        while True:
            asked = time.monotonic()
            told = await self._send(address, question | {"at": size})
            if told is None:
                logger.debug("%s gives no sign of life: %s comes from the source", address, key)
                self._is_slow(address, asked)
                return None
            status = told["status"]
            if status == "unknown" and not is_sent:
                question["pickled"] = known.pickled
                is_sent = True
                continue
            question.pop("pickled", None)
            if status == "given" and told["key"] == key:
                if told["missing"]:
                    return Given(None)
                if crc is not None and crc != told["crc"]:
                    # the owner has another value by now
                    return None
                piece, crc, fetching = memoryview(told["data"]).cast("B"), told["crc"], told["fetching"]
                pieces.append(piece)
                size += len(piece)
                if size >= sum(told["sizes"]) or not len(piece):
                    break
            elif status != "fetching":
                if status == "elsewhere":
                    # it may have been changed since it was looked at
                    with self._mutex:
                        self._pickles.drop(id(store))
                return None
            usual = pace.usual or told.get("usual") or _LONGEST
            if (elapsed := time.perf_counter() - began) > usual + self._timeout:
                pace.peer_took(elapsed)
                return None
        self._silences.pop(address, None)
        pace.peer_took(time.perf_counter() - began - fetching)
        data = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        if _crc_of(data) != crc:
            logger.warning("%s gave other bytes for %s than it has: they are not used", address, key)
            return None
        full = backend.prefix + key
        with self._mutex:
            is_known = self._owns(key) or self._seen.get(full) is not None
            self._seen.put(full, True)
        ends = list(accumulate(told["sizes"]))
        values = tuple(data[end - length : end] for end, length in zip(ends, told["sizes"], strict=True))
        return Given(values, told["validator"], told["age"], is_known) if len(values) == len(spans) else None

    def _owns(self, key: str) -> bool:
        choice = self._nodes.choice(block_of(key))
        return choice is not None and choice.first == self._node

    async def _send(self, address: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """One question and its answer; None without an answer in time."""

        async def send() -> Any:
            limit = max(_LONGEST, self._timeout)
            return await asyncio.wait_for(self._worker.rpc(address).xzcache_ask(**question), limit)

        answered = asyncio.wrap_future(_start(send, self._loop))
        try:
            done, _ = await asyncio.wait([answered], timeout=self._timeout)
            if not done:
                return None
            told = answered.result()
        except Exception as error:
            logger.debug("%s does not answer: %s", address, error)
            return None
        finally:
            # the connection may still be opened, for the next question
            answered.cancel()
        return told if isinstance(told, dict) and "status" in told else None

    def _has_seen(self, store: CacheStore, key: str) -> bool:
        """Whether a store has seen a document by which the owner can tell the state of a chunk's array."""
        seen = store._reads.freshness.seen()
        paths = arrays_of(key)
        known = self._known.get((seen.packed, paths[0]))
        if known is None:
            above = {path[:end] for path in paths for end in range(len(path) + 1) if end == 0 or path[end:][:1] in "/"}
            documents = (document for path in above for document in array_documents(path))
            known = seen.more or any(seen.state(document) is not None for document in documents)
            self._known.put((seen.packed, paths[0]), known)
        return known and store.revalidate is not False

    async def _pickled(self, store: CacheStore) -> _Pickle:
        seen = store._reads.freshness.seen().packed
        known = self._pickles.get(id(store))
        if known is None or known.store() is not store or known.seen != seen:
            place = await pool.run(_place_of, store)
            pickled: bytes = dumps((store, place))  # type: ignore[no-untyped-call]
            name = blake2b(pickled, digest_size=16).hexdigest()
            known = _Pickle(weakref.ref(store), seen, name, pickled)
            with self._mutex:
                self._pickles.put(id(store), known)
        return known

    def _is_slow(self, address: str, began: float) -> None:
        """Leave a node alone for a while that did not answer twice in a row; questions at the same time count once."""
        silence = self._silences.get(address, _Silence(-math.inf, 0.0, 0.0))
        if began > silence.since:
            now = time.monotonic()
            pause = min(max(4 * silence.pause, _PAUSES[0]), _PAUSES[1]) if silence.since > 0 else 0.0
            self._silences[address] = _Silence(now, now + pause, pause)

    def _pace(self, namespace: str) -> _Pace:
        with self._mutex:
            pace = self._paces.get(namespace)
            if pace is None:
                pace = _Pace()
                self._paces.put(namespace, pace)
        return pace

    def record_fetch(self, backend: Backend, seconds: float) -> None:
        """Record how long the source took to answer."""
        self._pace(backend.namespace).source_took(seconds)

    # -- answering: first on the worker's loop, then on Zarr's, as connections to a source belong to one loop

    async def _answer(self, **question: Any) -> dict[str, Any]:
        if not self._is_told:
            return {"status": "refused"}
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._give(**question), await _zarr_loop()))

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
        refused, wait = {"status": "refused"}, {"status": "fetching", "usual": self._pace(namespace).usual}
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
        since = self._stale_since(backend.prefix + key)
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
        if answer.given is None or self._stale_since(backend.prefix + key) != since or not self._is_told:
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
        owns = self._owns(key)
        began, at = time.perf_counter(), time.monotonic()
        fetching = 0.0
        # what was confirmed of byte ranges holds for these only
        what = full if spans == ((0, END),) else f"{full} {spans}"
        if isinstance(since, Since) and not self._is_fresh(what, since, reads, key):
            if not owns:
                return _Answer(None)
            self._renewing.add(full)
            try:
                # what this node has goes only once the source has answered
                given = await reads.give(key, spans, partial(_renewed, store, key, spans), anew=True)
            finally:
                self._renewing.discard(full)
            fetching = time.perf_counter() - began
            if given is not None:
                self._fresh.put((what, since), True)
        elif (given := await reads.give(key, spans, None)) is None and owns:
            given = await reads.give(key, spans, partial(_fetched, store, key, spans))
            fetching = time.perf_counter() - began
        if given is None or given.values is None:
            return _Answer(given, fetching=fetching)
        data = given.values[0] if len(given.values) == 1 else memoryview(b"".join(given.values))
        return _Answer(given, data, _crc_of(data), at, fetching)

    def _is_fresh(self, what: str, since: Since, reads: ReadThrough, key: str) -> bool:
        """Whether nothing that this node has of a chunk is from before a time."""
        full, parts = reads.backend.prefix + key, reads.backend.parts(key)
        if parts.is_empty:
            # answers to requests from before then are not stored
            self._fresh.put((full, since), True)
        known = self._fresh.get((full, since)) is not None or self._fresh.get((what, since)) is not None
        return known or since.is_before(parts.validated())

    def _stale_since(self, full: str) -> Since | tuple[()] | None:
        """Since when an entry is not given to others if it is older; None if it is not given at all."""
        latest: Since | tuple[()] = ()
        for path in _paths_above(full) if self._stale else ():
            since = self._stale.get(path, ())
            if since is None:
                return None
            latest = max(latest, since)
        return latest

    # -- writes, and what else this node learns

    async def begin_write(self, backend: Backend, keys: Sequence[str], beneath: str | None = None) -> Any:
        """Tell all nodes that paths are being written, unless they know it."""
        names = [*keys, *([beneath] if beneath is not None and beneath not in keys else [])]
        paths = {
            path for name in names for path in _paths_of(f"{backend.namespace}/{name}", is_prefix=name not in keys)
        }
        if paths:
            self._note_writes(paths, 1)
            try:
                telling = asyncio.wrap_future(_start(partial(self._tell_written, paths), self._loop))
                # once that long has passed since it was begun, no node that was not told has a lease any more
                now = time.monotonic()
                spent = now - max(self._told_at.get(path, now) for path in paths)
                await asyncio.wait([telling], timeout=max(_MOMENT, 2 * LEASE - spent))
                if not telling.done() or telling.exception() is not None:
                    logger.warning("the other nodes may not know that %s is being written", ", ".join(sorted(paths)))
                telling.cancel()
            except BaseException:
                self.end_write(paths)
                raise
        return paths

    def end_write(self, begun: Any) -> None:
        """Record that a write has ended."""
        self._note_writes(begun, -1)

    async def _tell_written(self, paths: set[str]) -> None:
        for path in paths - self._tellings.keys():
            self._told_at[path] = time.monotonic()
            self._tellings[path] = asyncio.create_task(self._tell_anew(path))
        try:
            await asyncio.gather(*(self._tellings[path] for path in paths))
        except BaseException:
            for path in paths:
                self._tellings.pop(path, None)
                self._told_at.pop(path, None)
            raise

    async def _tell_anew(self, path: str) -> None:
        if (ending := self._endings.get(path)) is not None:
            # that earlier writes have ended must not be the latest that the scheduler hears
            await asyncio.wait([ending])
        await self._tell(path, is_written=True)

    async def _end_writes(self) -> None:
        """Tell all nodes of paths that this process has not written for a while."""
        now = time.monotonic()
        with self._mutex:
            over = [path for path, (count, ended) in self._writing.items() if not count and now - ended > _QUIET]
            for path in over:
                del self._writing[path]
        # nothing is awaited here, so a write that begins later is told anew, after the end of the earlier ones
        for path in over:
            self._tellings.pop(path, None)
            self._told_at.pop(path, None)
            self._endings[path] = asyncio.create_task(self._tell(path, is_written=False))
        for path in over:
            await asyncio.wait([self._endings[path]])
            del self._endings[path]

    def _learn(self, names: Sequence[str], state: bytes = b"") -> None:
        """Tell all nodes what this process has found to be stale; in a thread, which waits for a moment only."""
        names = [name for name in names if name not in self._renewing]
        with suppress(RuntimeError):
            # stale chunks are often found one after the other: the array counts as being written, which is told once
            written = {path for name in names if not name.endswith("/") for path in _paths_of(name, is_prefix=False)}
            self._note_writes(written, 0)
            stale = [name.rstrip("/") for name in names if name.endswith("/")]
            told = [_start(partial(self._tell, path, is_written=None, state=state), self._loop) for path in stale]
            told += [_start(partial(self._tell_written, written), self._loop)] if written else []
            deadline = time.monotonic() + _MOMENT
            for each in told if threading.get_ident() != self._thread else ():
                with suppress(Exception):
                    each.result(max(0.0, deadline - time.monotonic()))

    def _note_writes(self, paths: Collection[str], more: int) -> None:
        """Note that writes begin (1) or end (-1), or that there may have been some (0)."""
        with self._mutex:
            for path in paths:
                count, _ = self._writing.get(path, (0, 0.0))
                self._writing[path] = max(0, count + more), time.monotonic()

    async def _tell(self, path: str, *, is_written: bool | None, state: bytes = b"") -> None:
        """Have the scheduler tell all nodes that a path is being written, that its writes have ended, or is stale."""
        await self._worker.scheduler.xzcache_stale(
            worker=self._worker.address, path=path, is_written=is_written, state=state.hex()
        )


def _start(call: Callable[[], Coroutine[Any, Any, T]], loop: asyncio.AbstractEventLoop) -> Any:
    """Run a coroutine on an event loop, to its end even if the waiter gives up."""

    async def run() -> T:
        task = asyncio.ensure_future(call())
        # a late exception is nobody's
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    return asyncio.run_coroutine_threadsafe(run(), loop)


def _place_of(store: CacheStore) -> str:
    """What tells a file system apart from one that has other data under the same path; empty for other sources."""
    if not store.source.label.startswith("/"):
        return ""
    try:
        status = os.stat(store.source.label)
    except OSError:
        return uuid.uuid4().hex
    return f"{status.st_ino} {status.st_ctime_ns}"


def _unpickled(pickled: bytes) -> CacheStore | None:
    """A copy of another node's store; None if it would read other data here."""
    store, place = loads(pickled)  # type: ignore[no-untyped-call]
    assert isinstance(store, CacheStore)
    if _place_of(store) != place:
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


async def _zarr_loop() -> asyncio.AbstractEventLoop:
    """The event loop on which Zarr reads."""
    if not _zarr or _zarr[0].is_closed():
        _zarr[:] = [await pool.run(lambda: sync(_loop_here()))]
    return _zarr[0]


_zarr: Final[list[asyncio.AbstractEventLoop]] = []


def _crc_of(data: memoryview) -> int:
    return int(google_crc32c.value(np.frombuffer(data, np.uint8))) if len(data) else 0


def _number(block: str) -> int:
    return int.from_bytes(blake2b(block.encode(), digest_size=4).digest(), "little")


def _paths_of(full: str, *, is_prefix: bool) -> list[str]:
    """The paths beneath which entries are stale once a key, or all beneath a prefix, was written."""
    if is_prefix:
        return [full.rstrip("/")]
    namespace, _, key = full.partition("/")
    if is_document(key):
        # a reader compares the state of the document under which a chunk was stored
        return []
    paths = arrays_of(key) if is_chunk(key) else [key.rpartition("/")[0]]
    return [f"{namespace}/{path}".rstrip("/") for path in paths]


def _paths_above(full: str) -> list[str]:
    """A key, and all paths that it lies beneath; the empty one is the whole cache."""
    parts = full.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]
