"""`CacheStore`: any Zarr store, read through a cache."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from xzcache import _config as settings
from xzcache._anystore import StoreBackend, store_backend
from xzcache._config import UNSET, Age, Revalidate, Unset, config
from xzcache._documents import is_document
from xzcache._keys import is_plain
from xzcache._readthrough import Freshness, ReadThrough, contents, whole
from xzcache._shared import SharedBackend
from xzcache._sources import Identity, identify, open_source, remember
from xzcache._stats import Stats
from xzcache.local import LockedLocalStore


class CacheStore(Store):
    """A Zarr store that keeps what it reads from another one, for every process on this machine.

    Takes the place of `zarr.experimental.cache_store.CacheStore`: code written for that one runs unchanged.

    Parameters
    ----------
    store : Store, str, Path, UPath or FSMap
        What is read: a Zarr store, a path or a URL.
    cache_store : Store, str or Path, optional
        Where it is kept. A path, or a `zarr.storage.LocalStore`, becomes a `LockedLocalStore` there, which all processes
        share. None is this user's default cache on this machine. Any other store that supports deletes keeps its books
        in this process, and serves one source.
    max_age_seconds : float or "infinity", optional
        For how long an entry is served, in seconds.
    max_size : int, str or None, optional
        The bound of the whole cache, in bytes or as ``"20 GB"``; None for no bound. Where it is not given, a directory
        keeps the bound it has, and a new one gets the configured one (10 GiB); a store given as `cache_store` is not
        bounded. Values larger than the bound are not cached.
    cache_set_data : bool, optional
        Whether what is written through this store is cached.
    read_only : bool, optional
        Whether this object refuses writes.
    namespace : str, optional
        The name under which the entries of this source are kept, instead of one made of what it is: one path component.
        Stores that are given the same name are taken for the same source.
    revalidate : {"open", True, False} or float, optional
        When the source is asked whether a metadata document changed: at its first use by a newly opened store; at each
        read, chunks included; never; or once it is so many seconds old. Where an array's document changed, everything
        cached of that array is dropped, for every process.
    policy : str, optional
        Which entries leave first: ``"lru"``.
    storage_options : mapping, optional
        Options for a `store` that is a URL.

    Raises
    ------
    ValueError, TypeError
        A parameter makes no sense; the message names it, its value and what is accepted.

    Notes
    -----
    Safe for threads, event loops, processes and after a fork. However many of them want an object that is not cached,
    the source is asked once. Trouble with the cache never fails a read; an exception of the source is raised as it is.
    After a write through any `CacheStore` over the same directory returned, no process reads the old value.
    A pickled copy carries the settings; it uses the default cache of the process that unpickles it, unless a
    `cache_store` was given, and does not ask again for metadata documents.

    Examples
    --------
    >>> import zarr, xzcache
    >>> store = xzcache.CacheStore(zarr.storage.MemoryStore(), cache_store=zarr.storage.MemoryStore())
    >>> array = zarr.create_array(store, name="x", shape=4, dtype="i4")
    >>> store.cache_info()["cached_keys"]
    1
    """

    def __init__(
        self,
        store: Any,
        *,
        cache_store: Store | str | Path | None = None,
        max_age_seconds: Age | str | Unset = UNSET,
        max_size: int | str | Unset | None = UNSET,
        cache_set_data: bool | Unset = UNSET,
        read_only: bool = False,
        namespace: str | None = None,
        revalidate: Revalidate | str | Unset = UNSET,
        policy: str | Unset = UNSET,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        def chosen(name: str, value: Any, parse: Callable[[str, Any], Any]) -> Any:
            return parse(name, config.get(name) if isinstance(value, Unset) else value)

        self.max_age_seconds: Age = chosen("max_age_seconds", max_age_seconds, settings.parse_age)
        self.cache_set_data: bool = chosen("cache_set_data", cache_set_data, settings.parse_flag)
        self.revalidate: Revalidate = chosen("revalidate", revalidate, settings.parse_revalidate)
        self.policy: str = chosen("policy", policy, settings.parse_policy)
        self._asked_max_size = max_size if isinstance(max_size, Unset) else settings.parse_size("max_size", max_size)
        settings.parse_flag("read_only", read_only)
        self._given_namespace = _checked_namespace(namespace)
        self._given_cache = cache_store
        self._store = open_source(store, storage_options, read_only=read_only)
        self.source: Identity = identify(self._store)
        super().__init__(read_only=read_only or self._store.read_only)
        self.namespace = namespace or self.source.namespace
        self._cache = _cache_store(cache_store, self._asked_max_size)
        self._stats = Stats()
        self._reads = self._read_through(Freshness(self.revalidate))

    def _read_through(self, freshness: Freshness) -> ReadThrough:
        backend: SharedBackend | StoreBackend
        if isinstance(self._cache, LockedLocalStore):
            backend = SharedBackend(self._cache.directory, self.namespace)
        else:
            backend = store_backend(self._cache, self.namespace)
        return ReadThrough(
            self._store,
            backend,
            freshness=freshness,
            stats=self._stats,
            max_age=self.max_age_seconds,
            max_size=None if isinstance(self._asked_max_size, Unset) else self._asked_max_size,
            timeout=settings.parse_seconds("fetch_timeout", config.get("fetch_timeout")),
        )

    @property
    def max_size(self) -> int | None:
        """The bound of the whole cache, in bytes; None for no bound."""
        return self._asked_max_size if not isinstance(self._asked_max_size, Unset) else self._reads.backend.bound

    # -- copies

    def _settings(self) -> dict[str, Any]:
        return {
            "max_age_seconds": self.max_age_seconds,
            "max_size": self._asked_max_size,
            "cache_set_data": self.cache_set_data,
            "read_only": self.read_only,
            "namespace": self._given_namespace,
            "revalidate": self.revalidate,
            "policy": self.policy,
        }

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same source and cache, sharing counters and what was asked for, with another `read_only`."""
        source = self._store
        if not read_only and source.read_only:
            source = source.with_read_only(False)
        # the namespace of this store, not that of a copy of its source
        given = {**self._settings(), "read_only": read_only, "namespace": self.namespace}
        copy = type(self)(source, cache_store=self._cache, **given)
        copy._given_namespace, copy._given_cache, copy.source = self._given_namespace, self._given_cache, self.source
        copy._stats = self._stats
        copy._reads = copy._read_through(self._reads.freshness)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        cache, token = self._given_cache, None
        if isinstance(cache, MemoryStore) and isinstance(self._reads.backend, StoreBackend):
            # a copy gets a cache of its own: what is in this one stays here
            cache, token = type(cache)(), self._reads.backend.token
        source = self.source if self.source.lasting else None
        return _restore, (type(self), self._store, cache, self._settings(), source, token)

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        return "xzcache", self.namespace, type(self).__name__

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, type(self))
            and self._store == other._store
            and self._reads.backend == other._reads.backend
            and self._settings() == other._settings()
        )

    __hash__ = None  # type: ignore[assignment]  # as all Zarr stores

    def __repr__(self) -> str:
        info = self.cache_info()
        return (
            f"{type(self).__name__}(store={self.source.label!r}, cache_store={_label(self._cache)!r}, "
            f"max_age_seconds={self.max_age_seconds}, max_size={self.max_size}, "
            f"current_size={info['current_size']}, cached_keys={info['cached_keys']})"
        )

    def __str__(self) -> str:
        return f"xzcache({self.source.label})"

    # -- reading

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of a key, or a byte range of it; None where the source has none."""
        return await self._reads.get(key, prototype or default_buffer_prototype(), byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several keys and byte ranges, each as `get`."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether a key has a value: in the cache, or else at the source."""
        return await self._reads.cached_size(key) is not None or await self._store.exists(key)

    async def getsize(self, key: str) -> int:
        """The size of a value, in bytes: from the cache, or else by the source's own means."""
        size = await self._reads.cached_size(key)
        return await self._store.getsize(key) if size is None else size

    # -- writing: the source first and last, the cache never ahead of it

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value to the source, and, where so configured, to the cache."""
        await self._write([(key, value)], self._store.set(key, value), keep=self.cache_set_data)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a value unless the key has one, by the source's own means."""
        await self._write([(key, value)], self._store.set_if_not_exists(key, value), keep=False)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        pairs = list(values)
        await self._write(pairs, self._store._set_many(pairs), keep=self.cache_set_data)

    async def _write(self, pairs: list[tuple[str, Buffer]], writing: Coroutine[Any, Any, None], *, keep: bool) -> None:
        backend = self._reads.backend
        try:
            self._check_writable()
            begun = [await self._begin(key) for key, _ in pairs]
        except BaseException:
            writing.close()
            raise
        done = False
        try:
            await writing
            done = True
        finally:
            for (key, value), ticket in zip(pairs, begun, strict=True):
                store = keep and done and ticket is not None and self._is_cacheable(key)
                data = contents(value) if store else None
                await backend.end(key, ticket, data, self._reads.max_size)
                if done and is_document(key):
                    await backend.note(key, value.to_bytes())
                    self._reads.freshness.note(key)

    def _is_cacheable(self, key: str) -> bool:
        return self._reads.backend.entry(key, *whole()) is not None

    async def _begin(self, key: str) -> Any:
        return await self._reads.backend.begin(key) if self._is_cacheable(key) else None

    async def delete(self, key: str) -> None:
        """Delete a key at the source and in the cache."""
        self._check_writable()
        begun = await self._begin(key)
        try:
            await self._store.delete(key)
        finally:
            if self._is_cacheable(key):
                await self._reads.backend.end(key, begun, None, None)
                # a store of files deletes a directory as a key
                await self._reads.backend.drop(key)

    async def delete_dir(self, prefix: str) -> None:
        """Delete everything beneath a prefix, at the source and in the cache."""
        self._check_writable()
        await self._around_drop(prefix, self._store.delete_dir(prefix))

    async def clear(self) -> None:
        """Delete everything at the source, and what is cached of it."""
        self._check_writable()
        await self._around_drop("", self._store.clear())

    async def _around_drop(self, prefix: str, deleting: Coroutine[Any, Any, None]) -> None:
        backend = self._reads.backend
        await backend.drop(prefix.rstrip("/"))
        try:
            await deleting
        finally:
            await backend.drop(prefix.rstrip("/"))

    # -- what only the source can say

    @property
    def supports_writes(self) -> bool:
        return self._store.supports_writes

    @property
    def supports_deletes(self) -> bool:
        return self._store.supports_deletes

    @property
    def supports_listing(self) -> bool:
        return self._store.supports_listing

    @property
    def supports_consolidated_metadata(self) -> bool:
        return self._store.supports_consolidated_metadata

    def list(self) -> AsyncIterator[str]:
        return self._store.list()

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self._store.list_prefix(prefix)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self._store.list_dir(prefix)

    async def is_empty(self, prefix: str) -> bool:
        return await self._store.is_empty(prefix)

    async def getsize_prefix(self, prefix: str) -> int:
        return await self._store.getsize_prefix(prefix)

    async def _open(self) -> None:
        if self._is_open:
            raise ValueError("store is already open")
        await self._store._ensure_open()
        self._is_open = True

    def close(self) -> None:
        """Close the source. What is cached stays, and the store can be used again."""
        self._store.close()
        self._is_open = False

    # -- the cache itself

    def cache_info(self) -> dict[str, Any]:
        """The state of the cache, under Zarr's names and ours.

        Returns
        -------
        dict
            ``cache_store_type``, ``max_age_seconds``, ``max_size``, ``cache_set_data``; ``current_size`` (bytes),
            ``tracked_keys`` and ``cached_keys`` of this source; ``total_size`` and ``total_keys`` of the whole cache,
            which `max_size` bounds; ``cache_directory``.
        """
        info = self._reads.backend.info()
        return {
            **info,
            "max_age_seconds": self.max_age_seconds,
            "max_size": self.max_size,
            "cache_set_data": self.cache_set_data,
        }

    def cache_stats(self) -> dict[str, Any]:
        """What this store, with its `with_read_only` copies, read in this process.

        Returns
        -------
        dict
            ``hits``, ``misses``, ``evictions`` (by this process, of any source), ``total_requests``, ``hit_rate``;
            ``bytes_from_cache``, ``bytes_from_source``, ``seconds_from_cache``, ``seconds_from_source``;
            ``cache_errors``: how often the cache itself failed and the source answered.
        """
        backend = self._reads.backend
        return {**self._stats.as_dict(), "evictions": backend.evictions, "cache_errors": backend.troubles}

    async def clear_cache(self) -> None:
        """Forget what is cached of this source, for every process."""
        await self._reads.backend.clear()


def _checked_namespace(namespace: str | None) -> str | None:
    accepted = "None, or one path component that does not begin with a dot"
    if namespace is None:
        return None
    if not isinstance(namespace, str):
        raise TypeError(f"namespace={namespace!r} is not accepted: give {accepted}")
    if not is_plain(namespace) or "/" in namespace or "\\" in namespace or namespace.startswith("."):
        raise ValueError(f"namespace={namespace!r} is not accepted: give {accepted}")
    return namespace


def _cache_store(given: Store | str | Path | None, max_size: int | Unset | None) -> Store:
    """The store that holds the cache, from whatever was given for it."""
    accepted = "a Zarr store that supports deletes, a path, or None for the default cache"
    if isinstance(given, LockedLocalStore):
        if not isinstance(max_size, Unset) and given.max_size not in (UNSET, max_size):
            raise ValueError(
                f"max_size={max_size!r} contradicts the max_size={given.max_size!r} of the cache_store: give one of them"
            )
        return given if isinstance(max_size, Unset) else LockedLocalStore(given.root, max_size=max_size)
    if given is None:
        bound = settings.chosen_max_size() if isinstance(max_size, Unset) else max_size
        return LockedLocalStore(settings.default_directory(), max_size=bound)
    if type(given) is LocalStore:
        given = given.root
    if isinstance(given, str | os.PathLike):
        try:
            return LockedLocalStore(given, max_size=max_size)
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


def _label(cache: Store) -> str:
    return os.fspath(cache.root) if isinstance(cache, LocalStore) else type(cache).__name__


def _restore(
    kind: type[CacheStore],
    source: Store,
    cache: Any,
    given: dict[str, Any],
    identity: Identity | None,
    token: str | None,
) -> CacheStore:
    """A copy in another process: it takes the documents for fresh, as the store that it is a copy of did."""
    if identity is not None:
        remember(source, identity)
    store = kind(source, cache_store=cache, **given)
    store._reads = store._read_through(Freshness(store.revalidate, inherited=True))
    if token is not None and isinstance(store._reads.backend, StoreBackend):
        store._reads.backend.token = token
    return store
