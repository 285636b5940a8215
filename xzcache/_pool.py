"""The threads that do what blocks. Ours alone: Zarr's few default threads belong to the stores, and waiting in them
starves the very fetch that is waited for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from xzcache._config import config, parse_threads

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run a function in a thread of ours; at the end of the process, when there are none left, right here."""
    global _executor
    executor = _executor
    if executor is None:
        with _lock:
            if _executor is None:
                threads = parse_threads("threads", config.get("threads"))
                _executor = ThreadPoolExecutor(threads, thread_name_prefix="xzcache")
            executor = _executor
    try:
        return executor.submit(function, *args, **kwargs)
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


def _after_fork_in_child() -> None:
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
