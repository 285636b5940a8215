"""Telling: all nodes are told what a worker writes, and what it has found to be stale.

Before a write through a cache reaches the source, all nodes are told that the array is being written, and neither ask
nor answer for it until the writes have ended.

State: the writes of each worker of this process, under a mutex, and what was told of them, on the worker's event loop
only. It outlives a registration of the plugin, because the scheduler keeps the worker as a writer until it hears of the
end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from distributed.core import Status

from xzcache import _threads as pool
from xzcache._fork import renew_after_fork
from xzcache.dask._peering import start
from xzcache.dask._told import LEASE
from xzcache.model import arrays_of, is_chunk, is_document

if TYPE_CHECKING:
    from distributed.worker import Worker

    from xzcache.model import Backend


logger = logging.getLogger("xzcache.dask")

_QUIET: Final = 5.0
"""Seconds after the last write of an array after which its writes count as ended."""
_LOOK: Final = 0.5
"""Seconds between two looks whether writes have ended."""
_MOMENT: Final = 0.1
"""Seconds for which a read waits until all nodes know what it has found to be stale."""


class Writes:
    """What one worker writes."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._mutex = threading.Lock()
        self._writing: dict[str, tuple[int, float]] = {}
        """For a path that this process writes: the number of writes under way, and when the last one ended."""
        self._renewing: set[str] = set()
        """What is being asked of the source because others may have changed it: all nodes know of that already."""
        self._tellings: dict[str, asyncio.Task[None]] = {}
        self._told_at: dict[str, float] = {}
        """When the telling of a path was begun, by `time.monotonic`."""
        self._endings: dict[str, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        """Tells the end of writes, while there are any."""
        renew_after_fork(self)

    @classmethod
    def of(cls, worker: Worker) -> Writes:
        """The writes of a worker, whichever registration asks for them; on its event loop."""
        known = worker.extensions.setdefault("xzcache", cls(worker))
        assert isinstance(known, cls)
        return known

    def close(self) -> None:
        """End with a worker that closes, which the scheduler notices."""
        if self._watch is not None:
            self._watch.cancel()

    def after_fork_in_child(self) -> None:
        """Another thread may have held the mutex."""
        self._mutex = threading.Lock()

    @contextmanager
    def renewing(self, full: str) -> Iterator[None]:
        """While this context lasts, the other nodes are not told that an entry is stale: they know it already."""
        self._renewing.add(full)
        try:
            yield
        finally:
            self._renewing.discard(full)

    async def begin(self, backend: Backend, keys: Sequence[str], beneath: str | None = None) -> Any:
        """Tell all nodes that paths are being written, unless they know it."""
        names = [*keys, *([beneath] if beneath is not None and beneath not in keys else [])]
        paths = {
            path for name in names for path in _paths_of(f"{backend.namespace}/{name}", is_prefix=name not in keys)
        }
        if paths:
            self._note_writes(paths, 1)
            if self._loop.is_closed():
                # the worker is gone
                return paths
            try:
                # once that long has passed since it was begun, no node that was not told has a lease any more
                now = time.monotonic()
                spent = now - max(self._told_at.get(path, now) for path in paths)
                try:
                    async with asyncio.timeout(max(_MOMENT, 2 * LEASE - spent)):
                        # it goes on after that
                        await pool.outcome(start(self._tell_written(paths), self._loop))
                except Exception:
                    logger.warning("the other nodes may not know that %s is being written", ", ".join(sorted(paths)))
            except BaseException:
                self.end(paths)
                raise
        return paths

    def end(self, begun: Any) -> None:
        """Record that a write has ended."""
        self._note_writes(begun, -1)

    async def _tell_written(self, paths: set[str]) -> None:
        self._see_to_the_end()
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

    async def _tell_stale(self, path: str, state: bytes) -> None:
        try:
            await self._tell(path, is_written=None, state=state)
        except Exception:
            # the end of a write is sent again until the scheduler has heard of it, and this goes with it
            self._note_writes([path], 0)
            self._see_to_the_end()
            raise

    def _see_to_the_end(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._end_when_quiet())

    async def _end_when_quiet(self) -> None:
        while self._writing and self._worker.status is not Status.closed:
            await asyncio.sleep(_LOOK)
            await self._end_quiet()

    async def _end_quiet(self) -> None:
        """Tell all nodes of paths that this process has not written for a while."""
        now = time.monotonic()
        with self._mutex:
            over = [path for path, (count, ended) in self._writing.items() if not count and now - ended > _QUIET]
            for path in over:
                del self._writing[path]
        # nothing is awaited here, so that a later write is announced after the end of the earlier ones
        for path in over:
            self._tellings.pop(path, None)
            self._told_at.pop(path, None)
            self._endings[path] = asyncio.create_task(self._tell(path, is_written=False))
        for path in over:
            await asyncio.wait([self._endings[path]])
            if (error := self._endings.pop(path).exception()) is not None:
                # the others would never ask for it again: the end is told once more
                logger.debug("the scheduler was not told that writes of %s have ended: %s", path, error)
                self._note_writes([path], 0)

    def learn(self, names: Sequence[str], state: bytes = b"") -> None:
        """Tell all nodes what this process has found to be stale; in a thread, which waits for a moment only."""
        names = [name for name in names if name not in self._renewing]
        with suppress(RuntimeError):
            # stale chunks are often found one after the other: the array counts as being written, which is told once
            written = {path for name in names if not name.endswith("/") for path in _paths_of(name, is_prefix=False)}
            self._note_writes(written, 0)
            stale = [name.rstrip("/") for name in names if name.endswith("/")]
            told = [start(self._tell_stale(path, state), self._loop) for path in stale]
            told += [start(self._tell_written(written), self._loop)] if written else []
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
