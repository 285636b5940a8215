"""The threads that do what blocks.

Ours alone: Zarr's few default threads belong to the stores, and waiting in them starves the very fetch that is waited
for.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, ParamSpec, TypeVar

from xzcache._config import config, parse_threads
from xzcache._fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class _Pool:
    """An executor that is made at its first use.

    Parameters
    ----------
    threads : int or None
        None for as many as are configured.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                threads = self._threads or parse_threads("threads", config.get("threads"))
                self._executor = ThreadPoolExecutor(threads, thread_name_prefix="xzcache")
            return self._executor


_pool: Final = _Pool()
_queue: Final = _Pool(threads=1)


class _Once(Generic[T]):
    """A call that is made once, though two may try: an executor keeps what it could not start a thread for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self.future: Future[T] = Future()

    def __call__(self) -> None:
        if not self._lock.acquire(blocking=False):
            return
        try:
            self.future.set_result(self._call())
        except BaseException as error:
            self.future.set_exception(error)


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run a function in a thread of ours; where there are none to be had, as at the end of the process, right here."""
    once = _Once(partial(function, *args, **kwargs))
    try:
        _pool.executor().submit(once)
    except RuntimeError:
        once()
    return once.future


def try_in_order(function: Callable[[], None]) -> bool:
    """Run a function in one thread of ours, after all that was submitted in this way before; False if there is none.

    It may be run once more where that was said: an executor keeps what it could not start a thread for.
    """
    try:
        _queue.executor().submit(function)
    except RuntimeError:
        return False
    return True


async def outcome(future: Future[T]) -> T:
    """Await what a thread does. Cancelling the await does not stop it."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking function. Cancelling the await does not stop it."""
    return await outcome(submit(function, *args, **kwargs))
