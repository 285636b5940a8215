"""xzcache: a node-local, persistent, size-bounded cache of Zarr chunks, shared safely by every process on a machine."""

from importlib.metadata import version

from xzcache._config import config
from xzcache.local import LockedLocalStore
from xzcache.store import CacheStore

__version__ = version("xzcache")

__all__ = ["CacheStore", "LockedLocalStore", "__version__", "config"]
