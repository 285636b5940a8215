"""Threads for blocking work.

They are separate from Zarr's few default threads, which belong to the stores: blocking those could starve the fetch
that is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Generic, ParamSpec, TypeVar

from xzcache._config import config, parse_threads
from xzcache._fork import renew_after_fork
from xzcache.model import report_bug

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


logger = logging.getLogger("xzcache")

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_IDLE: Final = 1.0
"""Seconds after which an idle thread ends."""


class _Pool:
    """Threads that start on demand and end when idle; at most `threads`, or the configured number.

    The executors of the standard library keep their threads for the life of the process, which test suites report as a
    leak.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._most = threads
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._allowed = 0

    def _limit(self) -> int:
        if not self._threads:
            self._allowed = self._most or parse_threads("threads", config.get("threads"))
        return self._allowed

    def submit(self, work: Callable[[], object]) -> None:
        """Queue some work; raises `RuntimeError` if no thread can be started, as at the end of the process."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._limit():
                # at the end of the process, only `stop` waits for the thread
                thread = threading.Thread(target=self._work, name="xzcache", daemon=True)
                self._threads.add(thread)
                try:
                    thread.start()
                except RuntimeError:
                    self._threads.discard(thread)
                    if not self._threads:
                        raise
            self._queue.put(work)

    def _work(self) -> None:
        while self._goes_on():
            pass

    def _goes_on(self) -> bool:
        """Do one thing; False if the thread is to end."""
        queue = self._queue
        is_idle = False
        # under the lock of `submit`, so that work is never queued between this look and the thread's becoming idle
        with self._lock:
            try:
                work = queue.get_nowait()
            except Empty:
                # at most as many as wait, because `submit` starts no thread if one is idle
                is_idle = True
                self._idle += 1
        if is_idle:
            try:
                work = queue.get(timeout=_IDLE)
            except Empty:
                with self._lock:
                    if not queue.empty():
                        return True
                    self._idle = max(0, self._idle - 1)
                    self._threads.discard(threading.current_thread())
                    return False
        if work is None:
            with self._lock:
                if len(self._threads) == 1 and not queue.empty():
                    # it was meant for a thread that has ended by itself
                    return True
                self._threads.discard(threading.current_thread())
                return False
        try:
            work()
        except BaseException as error:
            report_bug(error, "in a thread")
        return True

    def stop(self, timeout: float) -> None:
        """Let the threads finish their work and end; the next use starts new ones."""
        with self._lock:
            threads = self._threads - {threading.current_thread()}
            self._idle = 0
            for _ in threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_pool: Final = _Pool()
_queue: Final = _Pool(threads=1)


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run a function in a thread, or in the caller if no thread can be started, as at the end of the process."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    try:
        _pool.submit(call)
    except RuntimeError:
        call()
    return future


def spawn(function: Callable[[], object]) -> None:
    """Like `submit`, for work without a result."""

    def call() -> None:
        try:
            function()
        except Exception as error:
            if not report_bug(error, "in a thread"):
                logger.warning("trouble with the cache: %s", error)

    submit(call)


def try_in_order(function: Callable[[], None]) -> bool:
    """Run a function in the one thread that keeps the order of submission; False if it cannot be started."""
    try:
        _queue.submit(function)
    except RuntimeError:
        return False
    return True


def stop(timeout: float) -> None:
    """Let all threads of the package finish their work and end; the next use starts new ones."""
    for each in (_queue, _pool):
        each.stop(timeout)


class Together(Generic[T, R]):
    """Calls a function of several items in one thread. All items that come during a call are in the next call.

    Parameters
    ----------
    function : callable
        Takes a list of items, and returns a result for each.
    name : callable
        Items of the same name are not done by one call.
    most : int
        The most items of one call, unless one caller brings more.
    """

    def __init__(self, function: Callable[[list[T]], Sequence[R]], name: Callable[[T], object], most: int) -> None:
        self._function, self._name, self._most = function, name, most
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Start empty: the parent finishes its own work."""
        self._lock = threading.Lock()
        self._queue: deque[tuple[Sequence[T], Future[list[R]]]] = deque()
        self._is_busy = False

    def submit(self, items: Sequence[T]) -> Future[list[R]]:
        """Queue some items, whose results come together; in the caller if no thread can be started."""
        future: Future[list[R]] = Future()
        # from now on it cannot be cancelled: what is queued is done
        future.set_running_or_notify_cancel()
        with self._lock:
            self._queue.append((items, future))
            begins, self._is_busy = not self._is_busy, True
        if begins:
            spawn(self._run)
        return future

    def hurry(self) -> None:
        """Do what waits in another thread, because the call that is under way takes long."""
        if self._queue:
            spawn(self._run)

    def _run(self) -> None:
        while group := self._take():
            try:
                results = list(self._function([item for items, _ in group for item in items]))
            except BaseException as error:
                for _, future in group:
                    future.set_exception(error)
                continue
            for items, future in group:
                future.set_result(results[: len(items)])
                results = results[len(items) :]

    def _take(self) -> list[tuple[Sequence[T], Future[list[R]]]]:
        """The calls that are next."""
        group: list[tuple[Sequence[T], Future[list[R]]]] = []
        names: set[object] = set()
        with self._lock:
            while self._queue:
                more = [self._name(item) for item in self._queue[0][0]]
                if group and (len(names) + len(more) > self._most or not names.isdisjoint(more)):
                    break
                names.update(more)
                group.append(self._queue.popleft())
            self._is_busy = bool(group)
        return group


async def outcome(future: Future[T]) -> T:
    """Await the result of a thread; cancelling the await does not stop the thread."""
    # as `asyncio.shield` of `asyncio.wrap_future`, which take three turns of the event loop instead of two
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def tell(_: object) -> None:
        # the loop may have been closed meanwhile
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_end, ended)

    future.add_done_callback(tell)
    await ended
    try:
        return future.result()
    finally:
        # an exception refers to this frame, and must not be referred to by it
        del future


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking function. Cancelling the await does not stop it."""
    return await outcome(submit(function, *args, **kwargs))
