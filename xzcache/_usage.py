"""What this process, and the cache that it uses by default, have done so far."""

from __future__ import annotations

import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from xzcache import _pool as pool
from xzcache._stats import process

if TYPE_CHECKING:
    from xzcache._directory import CacheDirectory
    from xzcache._schema import Totals

_SECONDS: Final = 1.0
_PROCESS: Final = uuid.uuid4().hex


class Usage(NamedTuple):
    """One process's view of a cache directory. Sizes in bytes, times in seconds."""

    process: str
    """What no other process on any host has."""
    node: str
    """The uuid of the directory: whoever shares it has the same one."""
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
    troubles: int


def usage(directory: CacheDirectory) -> Usage:
    """Look now; may wait for the lock of the index, and makes nothing where there is no cache yet."""
    node = ""
    if directory.is_made and directory.prepare():
        node = directory.keeper.attempt(directory.books.node_id, "")
    return _usage(directory, node, directory.totals())


def _usage(directory: CacheDirectory, node: str, totals: Totals) -> Usage:
    counts: dict[str, Any] = process.as_dict()
    return Usage(
        process=_PROCESS,
        node=node,
        directory=directory.root,
        used=totals.size,
        bound=totals.max_size,
        entries=totals.entries,
        evictions=directory.space.evictions,
        troubles=directory.keeper.troubles,
        **{name: counts[name] for name in Usage._fields if name in counts},
    )


class Gauge:
    """The usage of a directory, looked at in the background, for those who must not wait.

    Parameters
    ----------
    directory : CacheDirectory
    """

    def __init__(self, directory: CacheDirectory) -> None:
        self.directory = directory
        self._latest = usage(directory)
        self._looked = time.monotonic()
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._closed = False
        # a worker uses its cache also while it reads nothing: the last worker to leave may take the cache away
        self._end_use = directory.used_by(self)

    def read(self) -> Usage:
        """What is known, no older than a second or so; counters are those of now."""
        with self._lock:
            due = time.monotonic() - self._looked >= _SECONDS
            if due:
                self._looked = time.monotonic()
        if due:
            pool.spawn(self._look)
        counts = process.as_dict()
        return self._latest._replace(**{name: counts[name] for name in Usage._fields if name in counts})

    def _look(self) -> None:
        with self._looking:
            if not self._closed:
                self._latest = usage(self.directory)

    def close(self) -> None:
        """Look no more."""
        with self._looking:
            self._closed = True
        self._end_use()
