"""What is read: a Zarr store from whatever the user gave."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, StorePath

_ACCEPTED: Final = "a Zarr store, a path, a URL such as 's3://bucket/x.zarr', a UPath or an FSMap"


def open_source(store: Any, storage_options: Any, *, read_only: bool) -> Store:
    """A Zarr store from anything that names one.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, the value and what is accepted.
    """
    if isinstance(store, str) and ("://" in store or "::" in store) and not store.startswith("file://"):
        if storage_options is not None and not isinstance(storage_options, Mapping):
            # never with its value, which may be a secret
            kind = type(storage_options).__name__
            raise TypeError(f"storage_options is a {kind}, which is not accepted: give a mapping of options")
        options = dict(storage_options or {})
        if urlsplit(store).scheme in ("s3", "s3a"):
            # s3fs asks for the size of every object first, unless it is told not to split them
            options.setdefault("max_concurrency", 1)
        return FsspecStore.from_url(store, storage_options=options, read_only=read_only)
    if storage_options is not None:
        raise TypeError(
            f"storage_options goes with a URL only: store is a {type(store).__name__}, which has its options already"
        )
    if isinstance(store, StorePath):
        if store.path:
            raise ValueError(f"store={store.path!r} is a path within a store: give the store itself")
        return store.store
    if isinstance(store, Store):
        return store
    if isinstance(store, str):
        if not store:
            raise ValueError(f"store='' is not accepted: give {_ACCEPTED}")
        return LocalStore(Path(store.removeprefix("file://")), read_only=read_only)
    if type(store).__name__ == "FSMap":
        return FsspecStore.from_mapper(store, read_only=read_only)
    if hasattr(store, "protocol") and hasattr(store, "fs") and hasattr(store, "path"):
        if store.protocol in ("", "file", "local"):
            return LocalStore(Path(store.path), read_only=read_only)
        return FsspecStore.from_upath(store, read_only=read_only)
    if isinstance(store, os.PathLike):
        return LocalStore(Path(store), read_only=read_only)
    # never with its value, which may be a secret
    raise TypeError(f"store is a {type(store).__name__}, which is not accepted: give {_ACCEPTED}")
