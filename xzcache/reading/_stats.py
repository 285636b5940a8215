"""Counters of reads from the cache and from the source."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from xzcache._fork import renew_after_fork
from xzcache.model import Reads

observers: Final[list[Callable[[str, int, float], None]]] = []
"""Called for each read with ``"cache"`` or ``"source"``, its bytes and its seconds."""


class Stats:
    """Counters of one store in one process, or of all stores. Safe for threads.

    `of_all` are counters that count the same reads.
    """

    def __init__(self, of_all: Stats | None = None) -> None:
        self._all = (self,) if of_all is None else (self, of_all)
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Count from zero."""
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        self.bytes_from_cache = self.bytes_from_source = 0
        self.seconds_from_cache = self.seconds_from_source = 0.0

    def hit(self, size: int, seconds: float) -> None:
        # one lock, the one of all, for both
        with self._all[-1]._lock:
            for counters in self._all:
                counters.hits += 1
                counters.bytes_from_cache += size
                counters.seconds_from_cache += seconds
        for observe in observers:
            observe("cache", size, seconds)

    def miss(self, size: int, seconds: float) -> None:
        with self._all[-1]._lock:
            for counters in self._all:
                counters.misses += 1
                counters.bytes_from_source += size
                counters.seconds_from_source += seconds
        for observe in observers:
            observe("source", size, seconds)

    def reads(self) -> Reads:
        """The counters that a cache may keep for longer."""
        with self._all[-1]._lock:
            return Reads(self.hits, self.misses, self.bytes_from_cache, self.bytes_from_source, self.seconds_from_cache)

    def as_dict(self) -> dict[str, Any]:
        """The counters under Zarr's names, and those of xzcache; sizes in bytes, times in seconds."""
        with self._all[-1]._lock:
            requests = self.hits + self.misses
            return {
                "hits": self.hits,
                "misses": self.misses,
                "total_requests": requests,
                "hit_rate": self.hits / requests if requests else 0.0,
                "bytes_from_cache": self.bytes_from_cache,
                "bytes_from_source": self.bytes_from_source,
                "seconds_from_cache": self.seconds_from_cache,
                "seconds_from_source": self.seconds_from_source,
            }


process: Final = Stats()
"""The reads of all stores of this process."""
