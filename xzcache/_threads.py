"""The threads that do what blocks.

Ours alone: Zarr's few default threads belong to the stores, and waiting in them starves the very fetch that is waited
for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from xzcache._config import config, parse_threads
from xzcache._fork import renew_after_fork
from xzcache.model import report_bug

if TYPE_CHECKING:
    from collections.abc import Callable


logger = logging.getLogger("xzcache")

P = ParamSpec("P")
T = TypeVar("T")

_IDLE: Final = 1.0
"""Seconds for which a thread waits for something to do."""


class _Pool:
    """Threads that are started as they are needed, and end when there has been nothing to do for a while.

    (The standard library's executors keep theirs for the life of the process, which test suites take for a leak.)

    Parameters
    ----------
    threads : int or None
        The most that there may be; None for as many as are configured.
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
        """Have something done.

        Raises
        ------
        RuntimeError
            There is no thread to do it, as at the end of the process.
        """
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._limit():
                # at the end of the process nobody waits for it but `stop`
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
        with self._lock:
            try:
                work = queue.get_nowait()
            except Empty:
                # never more than those that wait: `submit` starts no thread where one does
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
        """Let the threads finish what there is to do and end. The next use starts new ones."""
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
    """Run a function in a thread of ours; where there are none to be had, as at the end of the process, right here."""
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
    """As `submit`, for what nobody waits for."""

    def call() -> None:
        try:
            function()
        except Exception as error:
            if not report_bug(error, "in a thread"):
                logger.warning("trouble with the cache: %s", error)

    submit(call)


def try_in_order(function: Callable[[], None]) -> bool:
    """Run a function in one thread of ours, after all that was submitted in this way before; False if there is none."""
    try:
        _queue.submit(function)
    except RuntimeError:
        return False
    return True


def stop(timeout: float) -> None:
    """Let all threads of ours finish what there is to do and end. The next use starts new ones."""
    for each in (_queue, _pool):
        each.stop(timeout)


async def outcome(future: Future[T]) -> T:
    """Await what a thread does. Cancelling the await does not stop it."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking function. Cancelling the await does not stop it."""
    return await outcome(submit(function, *args, **kwargs))
