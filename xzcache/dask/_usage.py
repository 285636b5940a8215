"""Usage of this process and of its default cache."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from distributed.metrics import context_meter

from xzcache import _threads as pool
from xzcache._fork import renew_after_fork
from xzcache.directory import Counts
from xzcache.reading import observers, process

if TYPE_CHECKING:
    from collections.abc import Collection

    from xzcache.directory import CacheDirectory


# workers report twice a second, and the index should not be read for each report
_SECONDS: Final = 1.0
_SECONDS_OF_ALL: Final = 10.0
"""The seconds between two looks at the counts of all processes, for which the index adds up its statistics."""


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
    peer_hits: int
    peer_misses: int
    bytes_from_cache: int
    bytes_from_peers: int
    bytes_from_source: int
    seconds_from_cache: float
    seconds_from_peers: float
    seconds_from_source: float
    evictions: int
    faults: int
    seconds_saved: float
    """The share of this process in the wall-clock time that the node has saved."""
    host: str
    ever: Counts = Counts()
    """The counts of all processes, since the directory has statistics."""
    ended: tuple[tuple[str, Counts], ...] = ()
    """The counts of ended processes, by the ids that the caller gave."""


def usage(directory: CacheDirectory) -> Usage:
    """The current usage; may wait for the lock of the index, and creates no cache."""
    node = ""
    if directory.is_made and directory.prepare():
        node = directory.barrier.try_or(directory.session.node_id, "")
    totals = directory.totals()
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
        seconds_saved=directory.counted.seconds_saved,
        host=socket.gethostname(),
        **{name: counts[name] for name in Usage._fields if name in counts},
    )


def exact_usage(directory: CacheDirectory, processes: Collection[str] = ()) -> Usage:
    """The usage with the exact counts of this process, those of its node, and those of given ended processes."""
    if directory.is_made:
        directory.flush(everything=True)
    ended = tuple(directory.counted_by([name for name in processes if name != _this.id]).items())
    return usage(directory)._replace(ever=directory.counted_ever(), ended=ended)


def remember(directory: CacheDirectory) -> None:
    """Keep the counts of this process in the index of a directory, also after its end."""
    directory.remember_process(_this.id)


class Gauge:
    """The usage of a directory, updated in the background for callers that must not wait.

    Of all gauges with the same `purpose`, on all processes of a node, one shows the figures of the node: see `leads`.
    """

    def __init__(self, directory: CacheDirectory, purpose: str) -> None:
        self.directory = directory
        self._purposes = {purpose}
        self._purpose = purpose
        self._next_of_all = 0.0
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
        current = {name: counts[name] for name in Usage._fields if name in counts}
        return self._latest._replace(**current, seconds_saved=self.directory.counted.seconds_saved)

    def leads(self, purpose: str = "") -> bool:
        """Whether this process is the one that shows the figures of the directory for all processes that share it."""
        self._purposes.add(purpose or self._purpose)
        return self.directory.leads(purpose or self._purpose)

    def _look(self) -> None:
        # held during the look, so that `close` does not return before the directory is left alone
        with self._looking:
            if self._closed:
                return
            latest, ever = usage(self.directory), self._latest.ever
            if time.monotonic() >= self._next_of_all and any(map(self.directory.leads, self._purposes)):
                self._next_of_all = time.monotonic() + _SECONDS_OF_ALL
                ever = self.directory.counted_ever()
            self._latest = latest._replace(ever=ever)

    def close(self) -> None:
        """Stop updating, and end the use of the directory."""
        with self._looking:
            self._closed = True
        for purpose in self._purposes:
            self.directory.resign(purpose)
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
