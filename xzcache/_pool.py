"""The threads that do what blocks.

Ours alone: Zarr's few default threads belong to the stores, and waiting in them starves the very fetch that is waited
for.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from xzcache._config import config, parse_threads
from xzcache._fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class _Pool:
    """An executor that is made at its first use."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                threads = parse_threads("threads", config.get("threads"))
                self._executor = ThreadPoolExecutor(threads, thread_name_prefix="xzcache")
            return self._executor


_pool: Final = _Pool()


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run a function in a thread of ours; at the end of the process, when there are none left, right here."""
    try:
        return _pool.executor().submit(function, *args, **kwargs)
    except RuntimeError:
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a blocking function. Cancelling the await does not stop it."""
    return await asyncio.shield(asyncio.wrap_future(submit(function, *args, **kwargs)))
