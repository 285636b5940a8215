"""Usage of this process and of its default cache."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from distributed.metrics import context_meter

from xzcache import _threads as pool
from xzcache._fork import renew_after_fork
from xzcache.reading import observers, process

if TYPE_CHECKING:
    from xzcache.directory import CacheDirectory, Totals


# workers report twice a second, and the index should not be read for each report
_SECONDS: Final = 1.0


class _Process:
    """An id of this process that no other process on any host has; a forked child gets its own."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        self.id = uuid.uuid4().hex


_this: Final = _Process()


class Usage(NamedTuple):
    """One process's view of a cache directory. Sizes in bytes, times in seconds."""

    process: str
    """An id that is unique among all processes on all hosts."""
    node: str
    """The uuid of the directory, which all processes that share it have in common."""
    directory: str
    used: int
    bound: int | None
    entries: int
    hits: int
    misses: int
    bytes_from_cache: int
    bytes_from_source: int
    seconds_from_cache: float
    seconds_from_source: float
    evictions: int
    faults: int


def usage(directory: CacheDirectory) -> Usage:
    """The current usage; may wait for the lock of the index, and creates no cache."""
    node = ""
    if directory.is_made and directory.prepare():
        node = directory.barrier.try_or(directory.session.node_id, "")
    return _usage(directory, node, directory.totals())


def _usage(directory: CacheDirectory, node: str, totals: Totals) -> Usage:
    counts: dict[str, Any] = process.as_dict()
    return Usage(
        process=_this.id,
        node=node,
        directory=directory.root,
        used=totals.size,
        bound=totals.max_size,
        entries=totals.entries,
        evictions=directory.space.evictions,
        faults=directory.barrier.faults,
        **{name: counts[name] for name in Usage._fields if name in counts},
    )


class Gauge:
    """The usage of a directory, updated in the background for callers that must not wait."""

    def __init__(self, directory: CacheDirectory) -> None:
        self.directory = directory
        self._latest = usage(directory)
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._closed = False
        # a worker uses its cache even without reads: the last worker to leave may delete the cache
        self._end_use = directory.used_by(self)

    def read(self) -> Usage:
        """The latest usage, about a second old at most; the counters are current."""
        with self._lock:
            due = time.monotonic() - self._looked >= _SECONDS
            if due:
                self._looked = time.monotonic()
        if due:
            # in a thread, because metrics are read on the worker's event loop
            pool.spawn(self._look)
        counts = process.as_dict()
        return self._latest._replace(**{name: counts[name] for name in Usage._fields if name in counts})

    def _look(self) -> None:
        # held during the look, so that `close` does not return before the directory is left alone
        with self._looking:
            if not self._closed:
                self._latest = usage(self.directory)

    def close(self) -> None:
        """Stop updating, and end the use of the directory."""
        with self._looking:
            self._closed = True
        self._end_use()


# -- Reporting the reads of a task to Dask, for Fine Performance Metrics and spans.
#
# Seconds are wall-clock time: parallel reads are not counted twice, so that they add up with the task's other
# activities.

_MOST: Final = 1024

_lock = threading.Lock()
_users = 0
_covered: Final[dict[int, float]] = {}


def begin() -> None:
    """Start to report reads."""
    global _users
    with _lock:
        _users += 1
        if _record_read not in observers:
            observers.append(_record_read)


def end() -> None:
    """Undo one `begin`."""
    global _users
    with _lock:
        _users = max(0, _users - 1)
        if not _users and _record_read in observers:
            observers.remove(_record_read)


def _record_read(where: str, size: int, seconds: float) -> None:
    context_meter.digest_metric(f"xzcache-{where}", size, "bytes")
    context_meter.digest_metric(f"xzcache-{where}", 1, "count")
    if (task := _task()) is not None:
        now = time.perf_counter()
        with _lock:
            # the part of this read that overlaps earlier reads of the task was reported with them
            since = max(now - seconds, _covered.get(task, 0.0))
            # tasks that have ended are not reported here: the table is emptied now and then
            if len(_covered) >= _MOST:
                _covered.clear()
            _covered[task] = now
        seconds = max(0.0, now - since)
    context_meter.digest_metric(f"xzcache-{where}", seconds, "seconds")


def _task() -> int | None:
    """An id of the task that reads; None if Dask does not provide one."""
    # private in distributed; without it, overlapping reads are counted in full
    callbacks = getattr(context_meter, "_callbacks", None)
    try:
        return None if callbacks is None else id(callbacks.get())
    except LookupError:
        return None
