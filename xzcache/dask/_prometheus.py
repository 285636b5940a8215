"""Figures for Prometheus, where its client is installed: on every Dask worker's ``/metrics``, beside Dask's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from xzcache.dask._usage import Gauge


_COUNTERS: Final = {
    "hits": ("xzcache_hits", "Reads that the cache answered."),
    "misses": ("xzcache_misses", "Reads that the source answered."),
    "peer_hits": ("xzcache_peer_hits", "Reads that the cache of another node answered."),
    "peer_misses": ("xzcache_peer_misses", "Questions to another node after which the source was asked."),
    "bytes_from_cache": ("xzcache_from_cache_bytes", "Bytes read from the cache."),
    "bytes_from_peers": ("xzcache_from_peers_bytes", "Bytes read from the caches of other nodes."),
    "bytes_from_source": ("xzcache_from_source_bytes", "Bytes read from the source."),
    "seconds_from_cache": ("xzcache_from_cache_seconds", "Seconds that reads from the cache took, each by itself."),
    "seconds_from_peers": ("xzcache_from_peers_seconds", "Seconds that reads from other nodes took, each by itself."),
    "seconds_from_source": ("xzcache_from_source_seconds", "Seconds that reads from the source took, each by itself."),
    "seconds_saved": ("xzcache_saved_seconds", "The part of this process in the wall-clock time that its node saved."),
    "evictions": ("xzcache_evictions", "Entries that this process evicted."),
    "faults": ("xzcache_errors", "Times that the cache failed and the source answered."),
}
_GAUGES: Final = {
    "used": ("xzcache_used_bytes", "Bytes in the cache of this node."),
    "bound": ("xzcache_bound_bytes", "The most that the cache of this node may hold."),
    "entries": ("xzcache_entries", "Entries in the cache of this node."),
}
_EVER: Final = {
    "hits": ("xzcache_node_hits", "Reads on this node that the cache answered."),
    "misses": ("xzcache_node_misses", "Reads on this node that the source answered."),
    "peer_hits": ("xzcache_node_peer_hits", "Reads on this node that the cache of another node answered."),
    "bytes_from_cache": ("xzcache_node_from_cache_bytes", "Bytes read from the cache on this node."),
    "bytes_from_peers": ("xzcache_node_from_peers_bytes", "Bytes read from the caches of other nodes on this node."),
    "bytes_from_source": ("xzcache_node_from_source_bytes", "Bytes read from the source on this node."),
    "seconds_saved": ("xzcache_node_saved_seconds", "Estimated wall-clock seconds that this node saved."),
    "evictions": ("xzcache_node_evictions", "Entries that were evicted on this node."),
    "refetched": ("xzcache_node_refetched", "Entries that were evicted and then fetched again on this node."),
}
"""Counters of all processes, since the cache has statistics."""


class Exporter:
    """Exports the figures of this process to Prometheus, and those of its node from one of the node's processes.

    `purpose` is the name under which these processes choose the one.
    """

    def __init__(self, gauge: Gauge, purpose: str) -> None:
        self._gauge = gauge
        self._purpose = purpose
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        latest = self._gauge.read()
        node = latest.node
        for field, (name, meaning) in _COUNTERS.items():
            yield _with_value(CounterMetricFamily(name, meaning, labels=["node"]), node, getattr(latest, field))
        if not self._gauge.leads(self._purpose):
            return
        for field, (name, meaning) in _GAUGES.items():
            if (value := getattr(latest, field)) is not None:
                yield _with_value(GaugeMetricFamily(name, meaning, labels=["node"]), node, value)
        if latest.ever.reads:
            for field, (name, meaning) in _EVER.items():
                yield _with_value(
                    CounterMetricFamily(name, meaning, labels=["node"]), node, getattr(latest.ever, field)
                )

    def describe(self) -> list[Metric]:
        """No metrics in advance: asking for them would need the cache."""
        return []

    def close(self) -> None:
        """Stop exporting."""
        REGISTRY.unregister(self)


def _with_value(family: CounterMetricFamily | GaugeMetricFamily, node: str, value: float) -> Metric:
    family.add_metric([node], value)
    return family
