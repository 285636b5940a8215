"""Dask's ways in: the plugin, the preload (`dask_setup`), and what clusters show of their caches.

State of a worker process: the settings of its plugins, which change as these come and go; the seconds that tasks
were measured, and the latest figures that its gauges show, each under a mutex of its own.
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
