"""A cache in any Zarr store that can delete, for one process and one source.

State: what is cached, its size and age, in `MemoryIndex`, under one mutex that is never held while the store is asked.
"""

from xzcache.anystore._anystore import StoreBackend

__all__ = [
    "StoreBackend",
]
