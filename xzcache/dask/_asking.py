"""Asking: a node that lacks a chunk asks the node that owns it, before the source.

Questions run on the worker's event loop. A reader waits for them for a limited time on its own loop, and blocking work
runs in threads, so that no loop waits for another one.

State: the pickles of stores, what the stores have seen, and the chunks that were asked for once; under a mutex.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from distributed.protocol.pickle import dumps

from xzcache import _threads as pool
from xzcache._fork import renew_after_fork
from xzcache.dask._peering import Latest, crc_of, start
from xzcache.dask._told import block_of
from xzcache.dask._worth import Whom
from xzcache.model import Given, Span, array_documents, arrays_of, is_chunk, report_bug
from xzcache.store import CacheStore

if TYPE_CHECKING:
    from distributed.worker import Worker

    from xzcache.dask._told import Told
    from xzcache.dask._worth import Worth
    from xzcache.directory import CacheDirectory
    from xzcache.model import Backend


logger = logging.getLogger("xzcache.dask")

_LONGEST: Final = 5.0
"""Seconds after which a question that nobody waits for any more is given up; connections take time to open."""
_STORES: Final = 256
_REMEMBERED: Final = 1 << 16
"""Chunks that other nodes have given once, and that are stored when they are asked for again."""


class _Pickle(NamedTuple):
    """A store as it is sent to other nodes."""

    store: weakref.ref[CacheStore]
    seen: bytes
    """The documents that the store had seen."""
    name: str
    """Stands for the pickle, once a node has it."""
    pickled: bytes
    """Empty for a store that cannot be sent."""


class Questions:
    """What one worker asks the others."""

    def __init__(self, worker: Worker, directory: CacheDirectory, told: Told, worth: Worth, timeout: float) -> None:
        self._worker, self._directory = worker, directory
        self._told, self._worth, self._timeout = told, worth, timeout
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._mutex = threading.Lock()
        self._seen: Latest[str, bool] = Latest(_REMEMBERED)
        self._known: Latest[tuple[bytes, str], bool] = Latest(_REMEMBERED)
        self._pickles: Latest[int, _Pickle] = Latest(_STORES)
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Another thread may have held the mutex."""
        self._mutex = threading.Lock()

    async def ask(self, store: object, backend: Backend, key: str, spans: Sequence[Span]) -> Given | None:
        """Ask the owner of a chunk, on behalf of a store."""
        try:
            if (whom := self._whom(store, backend, key)) is None:
                return None
            assert isinstance(store, CacheStore)
            if not (known := await self._pickled(store)).pickled:
                return None
            given = await self._ask(whom, known, backend, key, spans)
        except Exception as error:
            if not isinstance(error, OSError):
                report_bug(error, "while another node was asked")
            given = None
        if given is None and isinstance(store, CacheStore):
            store._reads.reading.stats.peer_miss()
        return given

    def _whom(self, store: object, backend: Backend, key: str) -> Whom | None:
        """The worker to ask for a chunk; None if no other node owns it or has owned it, or none may be asked."""
        if backend.cache_id is not self._directory or not self._told.is_valid or not is_chunk(key):
            return None
        if not isinstance(store, CacheStore) or not store.source.lasting or store.source.fickle:
            return None
        if not store.source.immutable and not self._has_seen(store, key):
            # a chunk must be of the array that the reader knows
            return None
        if self._told.stale_since(backend.prefix + key) is None:
            return None
        array = f"{backend.namespace}/{arrays_of(key)[0]}"
        workers = [Whom(address, backend.namespace, array) for address in self._told.workers_for(key)]
        workers = [whom for whom in workers if self._worth.may_ask(whom)]
        return workers[_number(block_of(key)) % len(workers)] if workers else None

    async def _ask(self, whom: Whom, known: _Pickle, backend: Backend, key: str, spans: Sequence[Span]) -> Given | None:
        question: dict[str, Any] = {
            "store": known.name,
            "key": key,
            "spans": [list(span) for span in spans],
            "namespace": backend.namespace,
            # an owner that is still fetching says so in time
            "hold": self._timeout / 2,
        }
        began = time.monotonic()
        pieces: list[memoryview] = []
        size, crc, is_sent = 0, None, False
        while True:
            told = await self._send(whom.address, question | {"at": size})
            if told is None:
                logger.debug("%s gives no sign of life: %s comes from the source", whom.address, key)
                self._worth.was_late(whom, began)
                return None
            status, took = told["status"], time.monotonic() - began
            if status == "unknown" and not is_sent:
                question["pickled"] = known.pickled
                is_sent = True
                continue
            question.pop("pickled", None)
            if status == "not now":
                self._worth.gave(whom, took)
                return None
            if status == "given" and told["key"] == key:
                took -= told["fetching"]
                if told["missing"]:
                    self._worth.gave(whom, took)
                    return Given(None)
                if crc is not None and crc != told["crc"]:
                    # the owner has another value by now
                    return None
                # an empty view cannot be cast
                piece = memoryview(told["data"]).cast("B") if "data" in told else memoryview(b"")
                crc = told["crc"]
                pieces.append(piece)
                size += len(piece)
                if size >= sum(told["sizes"]) or not len(piece):
                    break
            elif status != "fetching":
                if status == "elsewhere":
                    # it may have been changed since it was looked at
                    with self._mutex:
                        self._pickles.drop(id(known.store()))
                self._worth.refused(whom, began)
                return None
            if time.monotonic() - began > self._worth.limit(backend.namespace, told.get("usual")):
                logger.debug("%s takes too long: %s comes from the source", whom.address, key)
                self._worth.was_late(whom, began)
                return None
        data = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        if crc_of(data) != crc:
            logger.warning("%s gave other bytes for %s than it has: they are not used", whom.address, key)
            self._worth.refused(whom, began)
            return None
        self._worth.gave(whom, took)
        full = backend.prefix + key
        with self._mutex:
            is_known = self._told.owns(key) or self._seen.get(full) is not None
            self._seen.put(full, True)
        ends = list(accumulate(told["sizes"]))
        values = tuple(data[end - length : end] for end, length in zip(ends, told["sizes"], strict=True))
        return Given(values, told["validator"], told["age"], is_known) if len(values) == len(spans) else None

    async def _send(self, address: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """One question and its answer; None without an answer in time."""

        async def send() -> Any:
            limit = max(_LONGEST, self._timeout)
            return await asyncio.wait_for(self._worker.rpc(address).xzcache_ask(**question), limit)

        try:
            async with asyncio.timeout(self._timeout):
                # it goes on after that: the connection may still be opened, for the next question
                told = await pool.outcome(start(send(), self._loop))
        except Exception as error:
            logger.debug("%s does not answer: %s", address, str(error) or "no answer in time")
            return None
        return told if isinstance(told, dict) and "status" in told else None

    def _has_seen(self, store: CacheStore, key: str) -> bool:
        """Whether a store has seen a document by which the owner can tell the state of a chunk's array."""
        seen = store._reads.freshness.seen()
        paths = arrays_of(key)
        with self._mutex:
            known = self._known.get((seen.packed, paths[0]))
        if known is None:
            above = {path[:end] for path in paths for end in range(len(path) + 1) if end == 0 or path[end:][:1] in "/"}
            documents = (document for path in above for document in array_documents(path))
            known = seen.more or any(seen.state(document) is not None for document in documents)
            with self._mutex:
                self._known.put((seen.packed, paths[0]), known)
        return known and store.revalidate is not False

    async def _pickled(self, store: CacheStore) -> _Pickle:
        seen = store._reads.freshness.seen().packed
        with self._mutex:
            known = self._pickles.get(id(store))
        if known is None or known.store() is not store or known.seen != seen:
            place = await pool.run(place_of, store)
            pickled = b""
            # a source may be a store of the user's that no other process can have
            with suppress(Exception):
                pickled = dumps((store, place))  # type: ignore[no-untyped-call]
            name = blake2b(pickled, digest_size=16).hexdigest()
            known = _Pickle(weakref.ref(store), seen, name, pickled)
            with self._mutex:
                self._pickles.put(id(store), known)
        return known


def place_of(store: CacheStore) -> str:
    """What tells a file system apart from one that has other data under the same path; empty for other sources."""
    if not store.source.label.startswith("/"):
        return ""
    try:
        status = os.stat(store.source.label)
    except OSError:
        return uuid.uuid4().hex
    return f"{status.st_ino} {status.st_ctime_ns}"


def _number(block: str) -> int:
    return int.from_bytes(blake2b(block.encode(), digest_size=4).digest(), "little")
