"""Reads and writes of one source through a cache: lookup, single-flight fetches, byte ranges, freshness.

This room knows a cache by `model.Backend` only. Its state: the metadata documents that each store has seen
(`Freshness`) and the readers of parts of an object that must be of one state (`Reading`), in dictionaries that change
by single operations; the counters, under one mutex for all, and a queue of hits that are not counted yet; for each
cache a table of the fetches under way (`model.Claims`), with its lock; and the caches of other nodes (`peers`), which
the Dask plugin sets.
"""

from xzcache.reading._freshness import SMALL, Freshness, Seen, decoded_size, is_read_for_a_write, keys_to_read
from xzcache.reading._readthrough import NotCached, RangeReads, ReadThrough
from xzcache.reading._request import Reading, contents, peers
from xzcache.reading._stats import ForPeers, Stats, observers, process
from xzcache.reading._writethrough import WriteThrough

__all__ = [
    "SMALL",
    "ForPeers",
    "Freshness",
    "NotCached",
    "RangeReads",
    "ReadThrough",
    "Reading",
    "Seen",
    "Stats",
    "WriteThrough",
    "contents",
    "decoded_size",
    "is_read_for_a_write",
    "keys_to_read",
    "observers",
    "peers",
    "process",
]
