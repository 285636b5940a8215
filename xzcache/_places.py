"""Where a cache is: a store to keep it in, from whatever the user gave for one."""

from __future__ import annotations

import os
from pathlib import Path

from zarr.abc.store import Store
from zarr.storage import LocalStore

from xzcache._anystore import StoreBackend
from xzcache._config import UNSET, Unset, chosen_max_size, default_directory
from xzcache._keys import META, is_plain
from xzcache._registry import store_backend
from xzcache._shared import SharedBackend
from xzcache.local import LockedLocalStore


def checked_namespace(namespace: str | None) -> str | None:
    accepted = "None, or one path component that does not begin with a dot"
    if namespace is None:
        return None
    if not isinstance(namespace, str):
        raise TypeError(f"namespace={namespace!r} is not accepted: give {accepted}")
    if not is_plain(namespace) or "/" in namespace or "\\" in namespace or namespace.startswith("."):
        raise ValueError(f"namespace={namespace!r} is not accepted: give {accepted}")
    return namespace


def cache_store_of(
    given: Store | str | Path | None, max_size: int | Unset | None, policy: str | Unset = UNSET
) -> Store:
    """The store that holds the cache, from whatever was given for it."""
    accepted = "a Zarr store that supports deletes, a path, or None for the default cache"
    if isinstance(given, LockedLocalStore):
        for name, asked in {"max_size": max_size, "policy": policy}.items():
            if not isinstance(asked, Unset) and getattr(given, name) not in (UNSET, asked):
                raise ValueError(
                    f"{name}={asked!r} contradicts {name}={getattr(given, name)!r} of the cache_store: give one of them"
                )
        if isinstance(max_size, Unset) and isinstance(policy, Unset):
            return given
        return LockedLocalStore(given.root, max_size=max_size, policy=policy)
    if given is None:
        bound = chosen_max_size() if isinstance(max_size, Unset) else max_size
        return LockedLocalStore(default_directory(), max_size=bound, policy=policy)
    if type(given) is LocalStore:
        if isinstance(max_size, Unset) and not (given.root / META).is_dir():
            # as with Zarr; a directory that is a cache already keeps its bound
            max_size = None
        given = given.root
    if isinstance(given, str) and "://" in given:
        # never with its value, which may hold a password
        raise ValueError(f"cache_store is a URL, which is not accepted: give {accepted}")
    if isinstance(given, str | os.PathLike):
        try:
            return LockedLocalStore(given, max_size=max_size, policy=policy)
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("root=", "cache_store=", 1)) from None
    if not isinstance(given, Store):
        raise TypeError(f"cache_store={given!r} is not accepted: give {accepted}")
    if not given.supports_deletes:
        raise ValueError(
            f"cache_store={type(given).__name__} does not support deletes: give {accepted}. "
            "The cache_store must support deletes for CacheStore to function properly."
        )
    return given


def label_of(cache: Store) -> str:
    return os.fspath(cache.root) if isinstance(cache, LocalStore) else type(cache).__name__


def backend_of(cache: Store, namespace: str, policy: str, *, lasting: bool) -> SharedBackend | StoreBackend:
    """What looks up and publishes in a cache store on behalf of one source."""
    if isinstance(cache, LockedLocalStore):
        return SharedBackend(cache.directory, namespace, lasting=lasting)
    backend = store_backend(cache, namespace)
    backend.evicts = policy != "none"
    return backend
