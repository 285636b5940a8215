"""xzcache: a node-local, persistent, size-bounded cache of Zarr chunks, shared safely by every process on a machine."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from xzcache._config import config
from xzcache._xarray_hook import install
from xzcache.directory import cleanup_resources
from xzcache.local import LockedLocalStore
from xzcache.model import SourceUnreachable
from xzcache.store import CacheInfo, CacheStats, CacheStore

if TYPE_CHECKING:
    from xzcache.dask import CachePlugin, cluster_info
    from xzcache.manage import CacheUnavailable, check, clear, info, ls, pin, progress, report, resize, unpin
    from xzcache.xarray import open_mfdataset, open_zarr, warm


__version__ = version("xzcache")

# pickles of version 0.1.0 look for `Identity` and `WebStore` there
sys.modules.update(dict.fromkeys(("xzcache._identity", "xzcache._sources"), import_module("xzcache.sources")))

__all__ = [
    "CacheInfo",
    "CachePlugin",
    "CacheStats",
    "CacheStore",
    "CacheUnavailable",
    "LockedLocalStore",
    "SourceUnreachable",
    "__version__",
    "check",
    "cleanup_resources",
    "clear",
    "cluster_info",
    "config",
    "info",
    "ls",
    "open_mfdataset",
    "open_zarr",
    "pin",
    "progress",
    "report",
    "resize",
    "unpin",
    "warm",
]

_LATE: Final = {
    "CachePlugin": "xzcache.dask",
    "CacheUnavailable": "xzcache.manage",
    "check": "xzcache.manage",
    "clear": "xzcache.manage",
    "cluster_info": "xzcache.dask",
    "info": "xzcache.manage",
    "ls": "xzcache.manage",
    "open_mfdataset": "xzcache.xarray",
    "open_zarr": "xzcache.xarray",
    "pin": "xzcache.manage",
    "progress": "xzcache.manage",
    "report": "xzcache.manage",
    "resize": "xzcache.manage",
    "unpin": "xzcache.manage",
    "warm": "xzcache.xarray",
}
"""Names whose modules take long to import."""


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


install(lambda *args, **kwargs: __getattr__("open_zarr")(*args, **kwargs))
# register the pipeline with Zarr
import_module("xzcache.pipeline")
