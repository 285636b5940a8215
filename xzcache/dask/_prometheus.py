"""Figures for Prometheus, where its client is installed: on every Dask worker's ``/metrics``, beside Dask's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from xzcache.dask._usage import Gauge


_COUNTERS: Final = {
    "hits": ("xzcache_hits", "Reads that the source was not asked for."),
    "misses": ("xzcache_misses", "Reads that the source was asked for."),
    "bytes_from_cache": ("xzcache_from_cache_bytes", "Bytes read from the cache."),
    "bytes_from_source": ("xzcache_from_source_bytes", "Bytes read from the source."),
    "seconds_from_cache": ("xzcache_from_cache_seconds", "Seconds that reads from the cache took, each by itself."),
    "seconds_from_source": ("xzcache_from_source_seconds", "Seconds that reads from the source took, each by itself."),
    "evictions": ("xzcache_evictions", "Entries that this process evicted."),
    "faults": ("xzcache_errors", "Times that the cache failed and the source answered."),
}
_GAUGES: Final = {
    "used": ("xzcache_used_bytes", "Bytes in the cache of this node."),
    "bound": ("xzcache_bound_bytes", "The most that the cache of this node may hold."),
    "entries": ("xzcache_entries", "Entries in the cache of this node."),
}


class Exporter:
    """Exports the figures of this process and of its node's cache to Prometheus."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        latest = self._gauge.read()
        labels = {"node": latest.node}
        for field, (name, meaning) in _COUNTERS.items():
            counter = CounterMetricFamily(name, meaning, labels=list(labels))
            counter.add_metric(list(labels.values()), getattr(latest, field))
            yield counter
        for field, (name, meaning) in _GAUGES.items():
            if (value := getattr(latest, field)) is not None:
                family = GaugeMetricFamily(name, meaning, labels=list(labels))
                family.add_metric(list(labels.values()), value)
                yield family

    def describe(self) -> list[Metric]:
        """No metrics in advance: asking for them would need the cache."""
        return []

    def close(self) -> None:
        """Stop exporting."""
        REGISTRY.unregister(self)
