"""Write-behind: publishing after the read has returned, and leaving directories.

One thread publishes in order; entries that wait are published together. The number of waiting bytes is limited: beyond
it, readers wait.
"""

from __future__ import annotations

import _thread
import asyncio
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from xzcache._fork import renew_after_fork
from xzcache._threads import try_in_order
from xzcache.directory import _publish as publishing
from xzcache.files import LONG
from xzcache.model import report_bug

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xzcache.directory._publish import PendingEntry


logger = logging.getLogger("xzcache.directory")

# these bytes are kept in memory after the readers have them: beyond it, memory would grow with a slow disk
_MOST_BYTES: Final = 64 << 20
_LINGER: Final = 0.1
"""Seconds between the end of the last use of a directory and leaving it: another store may be about to be opened."""
# a directory that cannot be left yet is tried again after a pause that doubles up to this
_LONGEST_PAUSE: Final = 1.0


class WriteBehind:
    """The pending publishes of one cache directory. Safe for threads and event loops; empty after a fork.

    Work is numbered in the order in which it comes and is done, so that a waiter only waits for a number. As a context,
    it counts a fetch; the last fetch to end waits for all work.

    `publish_all` stores several entries together. `hangs` returns whether the disk hangs; its argument tells whether
    the caller has waited for long already.
    """

    def __init__(
        self,
        publish_all: Callable[[Sequence[PendingEntry]], None],
        hangs: Callable[[bool], bool] = lambda waited: False,
    ) -> None:
        self._publish_all = publish_all
        self._hangs = hangs
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start empty: the parent finishes its own work."""
        self._lock = threading.Lock()
        self._queue: deque[PendingEntry | Callable[[], None]] = deque()
        self._added = self._ended = 0
        self._last_of: dict[str, int] = {}
        self._waiters: list[tuple[int, Callable[[], object]]] = []
        self._begins_in: asyncio.AbstractEventLoop | None = None
        self._bytes = 0
        self._readers = 0
        self._is_busy = False

    def begin_fetch(self) -> None:
        """Count a fetch that begins."""
        with self._lock:
            self._readers += 1

    def end_fetch(self) -> None:
        """Count a fetch that has ended."""
        with self._lock:
            self._readers -= 1

    async def __aenter__(self) -> None:
        self.begin_fetch()

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            # An exception or a cancellation is not held up. Both numbers are read without the
            # lock: `drain_if_last` looks again
            if kind is None and (self._readers <= 1 or self._bytes > _MOST_BYTES):
                await self.drain_if_last()
        finally:
            # counted until the wait is over, so that a fetch that ends meanwhile leaves the wait to this one
            self.end_fetch()

    def add(self, work: Callable[[], None]) -> None:
        """Run some work in the background."""
        self._add(work, 0)
        self._begin()

    def publish(self, pending: PendingEntry) -> None:
        """Publish an entry in the background; requires a running loop."""
        self._add(pending, len(pending.data))
        self._begin_soon()

    def _add(self, what: PendingEntry | Callable[[], None], size: int) -> None:
        with self._lock:
            self._bytes += size
            self._added += 1
            self._queue.append(what)
            if not callable(what):
                # a reader of this key waits for this number only, not for all work
                self._last_of[what.entry.key] = self._added

    def _begin_soon(self) -> None:
        # tasks that were woken with this one are about to bring their entries
        loop = asyncio.get_running_loop()
        if self._begins_in is not loop:
            self._begins_in = loop
            loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._begins_in = None
        # at the end of the process no thread can be started: the caller then does the work itself
        if self._may_begin() and not try_in_order(self._go_on):
            self._go_on()

    def _may_begin(self) -> bool:
        """Whether there is work that no thread does; the caller must then do it."""
        with self._lock:
            mine = bool(self._queue) and not self._is_busy
            self._is_busy = self._is_busy or mine
            return mine

    def _go_on(self) -> None:
        while True:
            try:
                self._do_next()
            except Exception as error:
                if not report_bug(error, "storing an entry"):
                    logger.warning("an entry may not have been stored: %s", error)
            finally:
                with self._lock:
                    self._is_busy = False
            # requeue, so that other directories have their turn
            if not self._may_begin() or try_in_order(self._go_on):
                return

    def _do_next(self) -> None:
        with self._lock:
            batch = self._take()
        try:
            if len(batch) == 1 and callable(work := batch[0]):
                work()
            elif batch:
                self._publish_all([what for what in batch if not callable(what)])
        finally:
            self._end(batch)

    def _take(self) -> list[PendingEntry | Callable[[], None]]:
        """The next piece of work, or the next entries that may be published together."""
        batch: list[PendingEntry | Callable[[], None]] = []
        size, entries = 0, set()
        while self._queue and len(batch) < publishing.MOST:
            what = self._queue[0]
            if callable(what):
                # entries that came before this work are published first: waiters rely on the order
                return batch or [self._queue.popleft()]
            size += len(what.data)
            # `publish_all` takes different entries, so a second value of one entry waits for the next batch
            if batch and (size > publishing.MOST_BYTES or what.entry in entries):
                break
            entries.add(what.entry)
            batch.append(self._queue.popleft())
        return batch

    def _end(self, batch: Sequence[PendingEntry | Callable[[], None]]) -> None:
        """Notify everything that waits for some work."""
        failure = None
        for what in batch:
            # one caller's function that raises must not keep the others waiting
            try:
                if not callable(what) and what.done is not None:
                    what.done()
            except BaseException as error:
                failure = error
        with self._lock:
            for what in batch:
                self._ended += 1
                if not callable(what):
                    self._bytes -= len(what.data)
                    if self._last_of.get(what.entry.key) == self._ended:
                        del self._last_of[what.entry.key]
            ready = [wake for number, wake in self._waiters if number <= self._ended]
            self._waiters = [waiter for waiter in self._waiters if waiter[0] > self._ended]
        for wake in ready:
            # an event loop may have been closed meanwhile
            with suppress(RuntimeError):
                wake()
        if failure is not None:
            raise failure

    @property
    def is_idle(self) -> bool:
        """Whether there are no fetches and no pending publishes."""
        with self._lock:
            return not self._readers and self._ended == self._added

    async def drain_if_last(self) -> None:
        """Wait for pending publishes if no other fetch is under way, or if too many bytes wait."""
        while True:
            with self._lock:
                last = self._added if self._readers <= 1 or self._bytes > _MOST_BYTES else 0
            if last <= self._ended or self._hangs(False):
                return
            # other fetches may have ended meanwhile and left the wait to this one
            if not await self._outcome(last) and self._hangs(True):
                return

    async def stored(self, key: str) -> None:
        """Wait until no publish of an object is pending, unless the disk hangs."""
        if (last := self._last_of.get(key)) is None or self._hangs(False):
            return
        if not await self._outcome(last):
            self._hangs(True)

    async def _outcome(self, number: int) -> bool:
        """Wait until the work up to a number has ended; False if that takes long."""
        self._begin_soon()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        if not self._tell(number, partial(loop.call_soon_threadsafe, _set, ended, True)):
            return True
        timer = loop.call_later(LONG, _set, ended, False)
        try:
            return await ended
        finally:
            timer.cancel()

    def _tell(self, number: int, wake: Callable[[], object]) -> bool:
        """Call a function once the work up to a number has ended; False if it has ended already."""
        with self._lock:
            if number <= self._ended:
                return False
            self._waiters.append((number, wake))
            return True

    def wait(self) -> None:
        """Wait for all work that was added before this call."""
        self._begin()
        ended = threading.Event()
        if self._tell(self._added, ended.set):
            ended.wait()


def _set(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


class Departures:
    """Leaves unused directories, in a thread that ends when there are none."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start empty: the child has not joined any directory."""
        self._queue: SimpleQueue[Callable[[], bool] | None] = SimpleQueue()
        self._is_running = threading.Lock()

    def add(self, leave: Callable[[], bool]) -> None:
        """Add a function that leaves a directory; it returns whether that is done.

        Finalizers call this at any point of any thread, so it takes no lock that the thread may hold already, such as
        those of `threading`.
        """
        self._queue.put(leave)
        self._start()

    def _start(self) -> None:
        # the lock is only a flag: it is taken by one thread and released by another
        if self._is_running.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError:
                # at the end of the process all directories are closed
                self._is_running.release()

    def _run(self) -> None:
        waiting: dict[Callable[[], bool], None] = {}
        pause = _LINGER
        try:
            due = time.monotonic() + pause
            while True:
                with suppress(Empty):
                    if (leave := self._queue.get(timeout=max(0.0, due - time.monotonic()))) is None:
                        due = 0.0
                    else:
                        waiting[leave] = None
                        due = min(due, time.monotonic() + _LINGER)
                if time.monotonic() >= due:
                    waiting = {leave: None for leave in waiting if not self._is_left(leave)}
                    if not waiting:
                        break
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    due = time.monotonic() + pause
        finally:
            self._is_running.release()
        # work that came after the last look at the queue, and before the release, found the flag set
        if not self._queue.empty():
            self._start()

    @staticmethod
    def _is_left(leave: Callable[[], bool]) -> bool:
        try:
            return leave()
        except Exception as error:
            if not report_bug(error, "leaving a cache directory"):
                logger.warning("a cache directory could not be left: %s", error)
            return True

    def wait(self, timeout: float) -> None:
        """Wait until each directory that is due has been left and the thread has ended."""
        self._queue.put(None)
        if self._is_running.acquire(timeout=timeout):
            self._is_running.release()


departures: Final = Departures()
