"""Telling Dask what a task read from the cache and from its source: for Fine Performance Metrics and spans.

Seconds are those of the clock on the wall: what is read in parallel is not counted twice, so that they add up with the
task's other activities.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from distributed.metrics import context_meter

from xzcache._stats import observers

_MOST: Final = 1024

_lock = threading.Lock()
_users = 0
_covered: Final[dict[int, float]] = {}


def begin() -> None:
    """Tell of reads from now on."""
    global _users
    with _lock:
        _users += 1
        if _tell not in observers:
            observers.append(_tell)


def end() -> None:
    """Undo one `begin`."""
    global _users
    with _lock:
        _users = max(0, _users - 1)
        if not _users and _tell in observers:
            observers.remove(_tell)


def _tell(where: str, size: int, seconds: float) -> None:
    context_meter.digest_metric(f"xzcache-{where}", size, "bytes")
    context_meter.digest_metric(f"xzcache-{where}", 1, "count")
    if (task := _task()) is not None:
        now = time.perf_counter()
        with _lock:
            since = max(now - seconds, _covered.get(task, 0.0))
            if len(_covered) >= _MOST:
                _covered.clear()
            _covered[task] = now
        seconds = max(0.0, now - since)
    context_meter.digest_metric(f"xzcache-{where}", seconds, "seconds")


def _task() -> int | None:
    """What stands for the task that reads; None where Dask does not show it."""
    callbacks = getattr(context_meter, "_callbacks", None)
    try:
        return None if callbacks is None else id(callbacks.get())
    except LookupError:
        return None
