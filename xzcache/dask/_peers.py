"""Peers: a node that lacks a chunk asks the node that owns it, before the source.

The owner of a chunk is found as `_affinity` finds the node of its block. Each part has its own module and its own
state: what the scheduler has told (`_told`), whether it is worth to ask (`_worth`), questions (`_asking`), answers
(`_answering`), and what the other nodes must be told (`_telling`). Here is how a worker begins and ends with them.

State: the task that asks the scheduler, on the worker's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from xzcache._fork import renew_after_fork
from xzcache.dask._answering import Answers, refuse, zarr_loop
from xzcache.dask._asking import Questions
from xzcache.dask._telling import Writes
from xzcache.dask._told import LEASE, Told, look_no_more
from xzcache.dask._worth import Worth
from xzcache.reading import peers

if TYPE_CHECKING:
    from distributed.worker import Worker

    from xzcache.dask._usage import Gauge
    from xzcache.directory import CacheDirectory
    from xzcache.model import Backend, Given, Span


logger = logging.getLogger("xzcache.dask")

Asking = Literal["off", "on"]


class Neighbours:
    """The caches of the other nodes, as one worker process sees them; and what it answers to them."""

    def __init__(self, worker: Worker, directory: CacheDirectory, gauge: Gauge, timeout: float) -> None:
        self._worker, self._directory = worker, directory
        self._told, self._worth, self._writes = Told(worker, directory, gauge), Worth(timeout), Writes.of(worker)
        self._questions = Questions(worker, directory, self._told, self._worth, timeout)
        self._answers = Answers(directory, self._told, self._worth, self._writes)
        self._beats: asyncio.Task[None] | None = None
        renew_after_fork(self)

    async def start(self) -> None:
        """Begin to ask and to answer."""
        # the first answer should not wait for it
        await zarr_loop()
        if not self._told.has_ended:
            self._worker.handlers |= {"xzcache_ask": self._answers.answer, "xzcache_look": self._told.look}
            with suppress(Exception):
                await self._told.look()
        if self._told.has_ended:
            # the plugin was removed meanwhile
            return
        self._beats = asyncio.create_task(self._beat())
        # from one to the other at once, so that there is no time in which writes are not told
        for each in [each for each in peers if isinstance(each, Neighbours) and each._worker is self._worker]:
            each._tell_no_more()
        self._directory.writes.listeners.append(self._writes.learn)
        peers.append(self)

    async def leave(self) -> None:
        """Ask no more, and have the scheduler tell the others not to ask this worker any more.

        They are still told of its writes for a while: if the plugin is being registered again, they go on asking each
        other.
        """
        self._ask_no_more()
        asyncio.get_running_loop().call_later(LEASE, self._tell_no_more)
        with suppress(Exception):
            await self._told.leave()

    def close(self) -> None:
        """End with it, as the worker closes; questions under way are answered by the source."""
        self._ask_no_more()
        self._tell_no_more()
        self._writes.close()
        with suppress(Exception):
            # it arrives before the end of the stream
            self._worker.log_event("xzcache", {"has_left": True})

    def after_fork_in_child(self) -> None:
        """Ask and tell no other node in a child, which has no event loop of the worker."""
        self._tell_no_more()
        peers.clear()

    def _tell_no_more(self) -> None:
        # the next registration has the same listener
        with suppress(ValueError):
            peers.remove(self)
            self._directory.writes.listeners.remove(self._writes.learn)

    def _ask_no_more(self) -> None:
        self._told.end()
        # questions may be under way, but a plugin under another name may have taken its place
        if self._worker.handlers.get("xzcache_ask") == self._answers.answer:
            self._worker.handlers |= {"xzcache_ask": refuse, "xzcache_look": look_no_more}
        if self._beats is not None:
            self._beats.cancel()

    @property
    def known(self) -> int:
        """How many other nodes may be asked."""
        return self._told.known

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._told.beat)
            try:
                await self._told.look()
            except Exception as error:
                # without an answer, the lease ends
                logger.debug("the scheduler does not tell of other nodes: %s", error)

    # -- on the event loops of readers and writers

    async def ask(self, store: object, backend: Backend, key: str, spans: Sequence[Span]) -> Given | None:
        """Ask the owner of a chunk, on behalf of a store."""
        return await self._questions.ask(store, backend, key, spans)

    def record_fetch(self, backend: Backend, seconds: float) -> None:
        """Record how long the source took to answer."""
        self._worth.source_took(backend.namespace, seconds)

    async def begin_write(self, backend: Backend, keys: Sequence[str], beneath: str | None = None) -> Any:
        """Tell all nodes that paths are being written, unless they know it."""
        return await self._writes.begin(backend, keys, beneath)

    def end_write(self, begun: Any) -> None:
        """Record that a write has ended."""
        self._writes.end(begun)
