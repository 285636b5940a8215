"""Counters of reads from the cache and from the source."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from xzcache._fork import renew_after_fork
from xzcache.model import Reads

observers: Final[list[Callable[[str, int, float], None]]] = []
"""Called for each read with ``"cache"``, ``"peer"`` or ``"source"``, its bytes and its seconds."""

# so many hits are counted under one lock
_MOST_UNCOUNTED: Final = 256


class Stats:
    """Counters of one store in one process, or of all stores. Safe for threads.

    `of_all` are counters that count the same reads. A hit only joins a queue, without a lock: it is counted when
    counters are read, or when the queue is long.
    """

    def __init__(self, of_all: Stats | None = None) -> None:
        # one lock and one queue, those of all, for both
        self._root = of_all or self
        self.after_fork_in_child()
        renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Count from zero."""
        self._lock = threading.Lock()
        self._uncounted: deque[tuple[Stats, int, float]] = deque()
        self._hits = self._misses = self._revalidated = self._peer_hits = self._peer_misses = 0
        self._bytes_from_cache = self._bytes_from_source = self._bytes_from_peers = 0
        self._seconds_from_cache = self._seconds_from_source = self._seconds_from_peers = 0.0

    def hit(self, size: int, seconds: float) -> None:
        uncounted = self._root._uncounted
        uncounted.append((self, size, seconds))
        if len(uncounted) >= _MOST_UNCOUNTED:
            with self._root._lock:
                self._count_hits()
        for observe in observers:
            observe("cache", size, seconds)

    def _count_hits(self) -> None:
        """Count the hits in the queue; under the lock."""
        root = self._root
        hits = [root._uncounted.popleft() for _ in range(len(root._uncounted))]
        for counters in {root, *(hit[0] for hit in hits)} if hits else ():
            _, sizes, seconds = zip(*(hit for hit in hits if counters in (hit[0], root)), strict=True)
            counters._hits += len(sizes)
            counters._bytes_from_cache += sum(sizes)
            counters._seconds_from_cache += sum(seconds)

    def miss(self, size: int, seconds: float) -> None:
        with self._root._lock:
            # a set, since the counters of all stores are their own root
            for counters in {self, self._root}:
                counters._misses += 1
                counters._bytes_from_source += size
                counters._seconds_from_source += seconds
        for observe in observers:
            observe("source", size, seconds)

    def peer_hit(self, size: int, seconds: float) -> None:
        """Count a read that the cache of another node answered."""
        with self._root._lock:
            for counters in {self, self._root}:
                counters._peer_hits += 1
                counters._bytes_from_peers += size
                counters._seconds_from_peers += seconds
        for observe in observers:
            observe("peer", size, seconds)

    def peer_miss(self) -> None:
        """Count a question to another node after which the source was asked; that read is a miss."""
        with self._root._lock:
            for counters in {self, self._root}:
                counters._peer_misses += 1

    def revalidated(self) -> None:
        """Count an answer of the source that an entry has not changed; the read that serves the entry is a hit."""
        with self._root._lock:
            for counters in {self, self._root}:
                counters._revalidated += 1

    def reads(self) -> Reads:
        """The counters that a cache may keep for longer."""
        with self._root._lock:
            self._count_hits()
            sizes = self._bytes_from_cache, self._bytes_from_source
            from_peers = self._peer_hits, self._bytes_from_peers
            return Reads(self._hits, self._misses, *sizes, self._seconds_from_cache, *from_peers)

    def as_dict(self) -> dict[str, Any]:
        """The counters under Zarr's names, and those of xzcache; sizes in bytes, times in seconds."""
        with self._root._lock:
            self._count_hits()
            requests = self._hits + self._misses + self._peer_hits
            return {
                "hits": self._hits,
                "misses": self._misses,
                "peer_hits": self._peer_hits,
                "peer_misses": self._peer_misses,
                "revalidated": self._revalidated,
                "total_requests": requests,
                "hit_rate": (self._hits + self._peer_hits) / requests if requests else 0.0,
                "bytes_from_cache": self._bytes_from_cache,
                "bytes_from_peers": self._bytes_from_peers,
                "bytes_from_source": self._bytes_from_source,
                "seconds_from_cache": self._seconds_from_cache,
                "seconds_from_peers": self._seconds_from_peers,
                "seconds_from_source": self._seconds_from_source,
            }


class ForPeers(Stats):
    """Counters of what a process reads for other nodes: the misses are its own, the hits are counted where they go."""

    def hit(self, size: int, seconds: float) -> None:
        pass


process: Final = Stats()
"""The reads of all stores of this process."""
