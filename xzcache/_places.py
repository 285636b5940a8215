"""Where a cache is: a store to keep it in, from whatever the user gave for one."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path
from zarr.abc.store import Store
from zarr.storage import LocalStore

from xzcache._anystore import StoreBackend
from xzcache._config import UNSET, Unset, chosen_max_size, config
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


def default_directory() -> Path:
    """Where this node's default cache is."""
    configured = config.get("directory")
    if configured is None or configured == "":
        return user_cache_path("xzcache", appauthor=False)
    if isinstance(configured, bool) or not isinstance(configured, str | os.PathLike):
        accepted = "a path, or None for the platform's user cache directory"
        raise TypeError(f"directory={configured!r} is not accepted: give {accepted}")
    return Path(configured).expanduser()


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
        return _located("directory", default_directory(), bound, policy)
    if type(given) is LocalStore:
        if isinstance(max_size, Unset) and not (given.root / META).is_dir():
            # as with Zarr; a directory that is a cache already keeps its bound
            max_size = None
        given = given.root
    if isinstance(given, str) and "://" in given:
        # never with its value, which may hold a password
        raise ValueError(f"cache_store is a URL, which is not accepted: give {accepted}")
    if isinstance(given, str | os.PathLike):
        return _located("cache_store", given, max_size, policy)
    if not isinstance(given, Store):
        raise TypeError(f"cache_store={given!r} is not accepted: give {accepted}")
    if not given.supports_deletes:
        raise ValueError(
            f"cache_store={type(given).__name__} does not support deletes: give {accepted}. "
            "The cache_store must support deletes for CacheStore to function properly."
        )
    return given


def _located(name: str, path: str | Path, max_size: int | Unset | None, policy: str | Unset) -> LockedLocalStore:
    """The store in a directory, which somebody gave under another name than `root`."""
    try:
        return LockedLocalStore(path, max_size=max_size, policy=policy)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("root=", f"{name}=", 1)) from None


def label_of(cache: Store) -> str:
    return os.fspath(cache.root) if isinstance(cache, LocalStore) else type(cache).__name__


def backend_of(cache: Store, namespace: str, policy: str, *, lasting: bool) -> SharedBackend | StoreBackend:
    """What looks up and publishes in a cache store on behalf of one source."""
    if isinstance(cache, LockedLocalStore):
        return SharedBackend(cache.directory, namespace, lasting=lasting)
    backend = store_backend(cache, namespace)
    backend.evicts = policy != "none"
    return backend
