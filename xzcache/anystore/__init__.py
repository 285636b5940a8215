"""A cache in any Zarr store that can delete, for one process and one source.

State: what is cached, its size and age, and the writes so far, under one mutex that is never held while the store
is asked; what documents said of arrays, and which keys are being written, in tables that change by single
operations.
"""

from xzcache.anystore._anystore import StoreBackend

__all__ = [
    "StoreBackend",
]
