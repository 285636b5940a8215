"""Dask's ways in: the plugin, the preload (`dask_setup`), and what clusters show of their caches.

State: what a worker process was set up with, and the latest counters that its gauges show, under a mutex.
"""

from xzcache.dask._cluster import cluster_info
from xzcache.dask._plugin import CacheDashboard, CachePlugin, dask_setup

__all__ = [
    "CacheDashboard",
    "CachePlugin",
    "cluster_info",
    "dask_setup",
]
