"""Resolution of caches: the store that holds a cache, from the user's argument."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from platformdirs import user_cache_path
from zarr.abc.store import Store
from zarr.storage import LocalStore

from xzcache._config import UNSET, PolicyName, Unset, as_found, chosen_max_size, config, parse_root
from xzcache.anystore import StoreBackend
from xzcache.directory import SharedBackend, can_be_made, is_plain, private_name, resolve_directory, temporary
from xzcache.local import LockedLocalStore
from xzcache.model import META, Cache
from xzcache.sources import identify

logger = logging.getLogger("xzcache")


def checked_namespace(namespace: str | None) -> str | None:
    accepted = "None, or one path component that does not begin with a dot"
    if namespace is None:
        return None
    if not isinstance(namespace, str):
        raise TypeError(f"namespace={namespace!r} is not accepted: give {accepted}")
    if not is_plain(namespace) or "/" in namespace or "\\" in namespace or namespace.startswith("."):
        raise ValueError(f"namespace={namespace!r} is not accepted: give {accepted}")
    return namespace


def default_directory() -> str:
    """The default cache directory of this node.

    If none is configured and the platform's user cache directory cannot be created, it is this user's folder among the
    temporary files. Then a warning is logged once in a process.
    """
    configured = config.get("directory")
    if configured is not None and configured != "":
        if isinstance(configured, bool) or not isinstance(configured, str | os.PathLike):
            accepted = "a path, or None for the platform's user cache directory"
            raise TypeError(f"directory={configured!r} is not accepted: give {accepted}")
        with as_found():
            return str(parse_root(configured, "directory"))
    usual = _of_platform()
    if usual is not None and can_be_made(usual):
        return usual
    if (parent := temporary()) is None:
        # neither can be created: the first read logs the error
        return usual or os.path.join(os.sep, private_name())
    place = os.path.join(parent, private_name())
    _warn_of(place, usual or "the home directory, which is not known")
    return place


def _of_platform() -> str | None:
    """The user cache directory of the platform; None if it is unknown."""
    with suppress(RuntimeError):
        usual = user_cache_path("xzcache", appauthor=False)
        if usual.is_absolute():
            return str(usual)
    # a variable of the environment that holds no absolute path does not count
    with suppress(ImportError, KeyError):
        from pwd import getpwuid

        home = getpwuid(os.getuid()).pw_dir
        if os.path.isabs(home):
            return os.path.join(home, ".cache", "xzcache")
    return None


@cache
def _warn_of(place: str, usual: str) -> None:
    logger.warning(
        "no cache can be kept in %s: it is kept in %s instead; XZCACHE_DIRECTORY chooses another directory",
        usual,
        place,
    )


def cache_store_of(
    given: Store | str | os.PathLike[str] | None, max_size: int | Unset | None, policy: PolicyName | Unset = UNSET
) -> Store:
    """The store that holds the cache, from the user's argument."""
    accepted = "a Zarr store that supports deletes, a path, or None for the default cache"
    if isinstance(given, LockedLocalStore):
        # two bounds for one cache: neither may win silently
        for name, asked in {"max_size": max_size, "policy": policy}.items():
            if not isinstance(asked, Unset) and getattr(given, name) not in (UNSET, asked):
                raise ValueError(
                    f"{name}={asked!r} contradicts {name}={getattr(given, name)!r} of the cache_store: give one of them"
                )
        if max_size in (UNSET, given.max_size) and policy in (UNSET, given.policy):
            # not requested again: another process may have asked for another bound since
            return given
        return given.with_bound(max_size, policy)
    if given is None:
        with as_found():
            if isinstance(max_size, Unset):
                store = _located("directory", default_directory(), chosen_max_size(), policy)
                store.is_default = True
                return store
            return LockedLocalStore.of_default_cache(default_directory(), max_size, policy)
    if type(given) is LocalStore:
        if isinstance(max_size, Unset) and not _is_cache(given.root):
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


def _is_cache(root: Path) -> bool:
    return os.path.isdir(os.path.join(resolve_directory(os.path.abspath(root)), META))


def _located(
    name: str, path: str | os.PathLike[str], max_size: int | Unset | None, policy: PolicyName | Unset
) -> LockedLocalStore:
    """The store in a directory whose parameter has another name than `root`."""
    try:
        return LockedLocalStore(path, max_size=max_size, policy=policy)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("root=", f"{name}=", 1)) from None


def label_of(cache: Store) -> str:
    return os.fspath(cache.root) if isinstance(cache, LocalStore) else type(cache).__name__


class _Binding(NamedTuple):
    """The source that a cache store serves, and its backend."""

    source: str
    backend: weakref.ref[StoreBackend]


# Weak: this table must not keep an unused cache store alive. Its source is remembered, because its keys are still in it
_bindings: Final[dict[str, _Binding]] = {}


_bindings_lock: Final = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_bindings_lock.acquire, after_in_parent=_bindings_lock.release, after_in_child=_bindings_lock.release
    )


def store_backend(cache_store: Store, source: str) -> StoreBackend:
    """The backend of a cache store, shared by all stores that use the same cache store.

    Raises
    ------
    ValueError
        The cache store serves another source: bare keys of two sources would be mixed.
    """
    place = identify(cache_store).namespace
    with _bindings_lock:
        known = _bindings.get(place)
        if known is not None:
            if known.source != source:
                raise ValueError(
                    f"cache_store={type(cache_store).__name__} caches {known.source} already and cannot cache "
                    f"{source} as well: give each source a cache store of its own, or a directory, which keeps "
                    "sources apart"
                )
            if (backend := known.backend()) is not None:
                return backend
        backend = StoreBackend(cache_store, source)
        _bindings[place] = _Binding(source, weakref.ref(backend))
        return backend


def backend_of(
    cache: Store, namespace: str, policy: str, *, max_size: int | Unset | None = UNSET, lasting: bool
) -> Cache:
    """The backend of one source in a cache store; `max_size` bounds a store without a bound of its own."""
    if isinstance(cache, LockedLocalStore):
        return SharedBackend(cache.directory, namespace, lasting=lasting)
    backend = store_backend(cache, namespace)
    backend.evicts = policy != "none"
    if not isinstance(max_size, Unset):
        backend.bound = max_size
    return backend
