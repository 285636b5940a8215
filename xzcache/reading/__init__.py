"""Reads and writes of one source through a cache: lookup, single-flight fetches, byte ranges, freshness.

Knows a cache by `model.Backend` only. State: what each store has seen of metadata documents (`Freshness`), and
the counters, under a mutex of their own. The tables of fetches under way are the backend's, each with its lock.
"""

from xzcache.reading._freshness import Freshness, Seen, is_read_for_a_write
from xzcache.reading._readthrough import NotCached, RangeReads, ReadThrough
from xzcache.reading._request import Reading
from xzcache.reading._stats import Stats, observers, process
from xzcache.reading._writethrough import WriteThrough

__all__ = [
    "Freshness",
    "NotCached",
    "RangeReads",
    "ReadThrough",
    "Reading",
    "Seen",
    "Stats",
    "WriteThrough",
    "is_read_for_a_write",
    "observers",
    "process",
]
