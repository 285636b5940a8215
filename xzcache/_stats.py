"""Counting what was read from the cache and what from the source."""

from __future__ import annotations

import threading
from typing import Any

from xzcache._fork import renew_after_fork


class Stats:
    """Counters of one store in one process. Safe for threads."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Count from zero."""
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        self.bytes_from_cache = self.bytes_from_source = 0
        self.seconds_from_cache = self.seconds_from_source = 0.0

    def hit(self, size: int, seconds: float) -> None:
        with self._lock:
            self.hits += 1
            self.bytes_from_cache += size
            self.seconds_from_cache += seconds

    def miss(self, size: int, seconds: float) -> None:
        with self._lock:
            self.misses += 1
            self.bytes_from_source += size
            self.seconds_from_source += seconds

    def as_dict(self) -> dict[str, Any]:
        """The counters under Zarr's names, and ours beside them; sizes in bytes, times in seconds."""
        with self._lock:
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
