"""Dask's ways in: the plugin, the preload (`dask_setup`), and what clusters show of their caches.

State of a worker process: the settings of its plugins, which change as plugins are added and removed; the measured
seconds of tasks, and the latest figures of its gauges, each under its own mutex; what is known of other nodes
(`_peers`, and the modules that it names).
"""

from xzcache.dask._cluster import cluster_info, each_node
from xzcache.dask._plugin import CacheDashboard, CachePlugin, dask_setup

__all__ = [
    "CacheDashboard",
    "CachePlugin",
    "cluster_info",
    "dask_setup",
    "each_node",
]
