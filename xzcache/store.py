"""`CacheStore`: any Zarr store, read through a cache."""

from __future__ import annotations

import asyncio
import inspect
import os
import warnings
import weakref
from collections.abc import Coroutine, Generator, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, TypeVar, cast

import zarr.abc.store
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, ObjectStore

from xzcache import _config as settings
from xzcache import _threads as pool
from xzcache._caches import backend_of, cache_store_of, checked_namespace, label_of
from xzcache._config import AS_ZARR, UNSET, Age, PolicyName, Revalidate, Unset, Upstream, config, with_hints
from xzcache._display import Display, one_line
from xzcache.anystore import StoreBackend
from xzcache.local import LockedLocalStore
from xzcache.reading import (
    Freshness,
    NotCached,
    RangeReads,
    Reading,
    ReadThrough,
    Seen,
    Stats,
    WriteThrough,
    is_read_for_a_write,
    keys_to_read,
    process,
)
from xzcache.sources import (
    Identity,
    SourceLike,
    identify,
    is_at_hand,
    is_same_source,
    local_path,
    must_identify_again,
    open_source,
    remember,
    spelled,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


T = TypeVar("T")

# -- Listings and abilities, which only the source has.


class SourceView(Store):
    """A store with the listings and abilities of another store.

    It derives from `Store` and not from `WrapperStore`: a method that is not overridden here ends in `get`, `set` and
    `delete`, which go through the cache, and not at the source behind it.
    """

    _store: Store
    source: Identity
    _given_path: str | None = None

    @property
    def path(self) -> str | None:
        """The URL or path of the source, as the user gave it but without credentials; None if it has none."""
        return self._given_path

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
        # a source that cannot be opened raises at the first read that needs it; cached reads work
        with suppress(OSError):
            await self._store._ensure_open()
        self._is_open = True

    def close(self) -> None:
        """Close the source. The cache stays, and the store can be used again."""
        self._store.close()
        self._is_open = False


# -- Reading through a cache, as Zarr's stores are read.


def _is_synchronous(store: Store) -> bool:
    """Whether this Zarr can read a store synchronously."""
    can = getattr(zarr.abc.store, "_store_supports_sync_io", None)
    return can is not None and bool(can(store))


def _run_apart(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, run by an event loop of its own: in this thread, unless a loop runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # not by a thread of this package, which the coroutine may need; nor by `asyncio.run`, which would take the
        # event loop of the main thread away
        with closing(asyncio.new_event_loop()) as loop:
            return loop.run_until_complete(coroutine)
    return pool.submit(asyncio.run, coroutine).result()


class ReadableView(SourceView):
    """A view of a source that requests only misses."""

    _reads: ReadThrough
    _ranges: RangeReads

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value of a key, or a byte range of it; None where the source has none."""
        prototype = prototype or default_buffer_prototype()
        # a store that cannot write need not look at the stack
        force = False if self.read_only else is_read_for_a_write()
        # a hit without a task and without a wait: most reads end here
        if force is False and (value := self._reads.get_nowait(key, prototype, byte_range)) is not None:
            return value
        return await self._reads.get(key, prototype, byte_range, force=force)

    # -- synchronously, as Zarr's `FusedCodecPipeline` reads where it is told that it can

    @property
    def _supports_sync_io(self) -> bool:
        """Whether Zarr may read the batch that it is about to read by `get_sync`: only if all of it is cached.

        `get_sync` waits in one of a few threads that all arrays of the process share, so missing chunks would be
        fetched a few at a time, while reads of other arrays wait; and the source may need a thread as well. Hence a
        batch with a missing chunk is read asynchronously, all at once, and so is everything written.
        """
        if not self._is_read_anywhere:
            return False
        keys = keys_to_read(self)
        return keys is not None and self._reads.are_at_hand(keys)

    @property
    def _is_read_anywhere(self) -> bool:
        """Whether the source can be read from a thread that Zarr waits for: it needs none of Zarr's own threads."""
        source = self._store
        if isinstance(source, ObjectStore):
            return getattr(source.store, "credential_provider", None) is None
        return _is_synchronous(source)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As `get`, synchronously; a value that is not cached, or evicted meanwhile, is read past the cache.

        Raises
        ------
        SyncError
            An event loop runs in this thread, and the value is not cached.
        """
        prototype = prototype or default_buffer_prototype()
        # Zarr's threads do not know whose read this is, but the look that preceded it did
        contexts = self._reads.contexts
        if contexts and (context := contexts.pop(key, None)) is not None:
            return context.copy().run(self._get_sync, key, prototype, byte_range)
        return self._get_sync(key, prototype, byte_range)

    def _get_sync(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        reads, source = self._reads, self._store
        if self.read_only or is_read_for_a_write() is False:
            if (value := reads.get_nowait(key, prototype, byte_range)) is not None:
                return value
            with suppress(NotCached):
                return reads.get_blocking(key, prototype, byte_range, reads.reading.stats.hit)

        async def ask() -> Buffer | None:
            if _is_synchronous(source):
                value: Buffer | None = cast(Any, source).get_sync(key, prototype=prototype, byte_range=byte_range)
                return value
            return await source.get(key, prototype, byte_range)

        fetch = reads.get_past_the_cache(key, prototype, byte_range, ask)
        # Zarr's event loop may be waiting for a thread that waits for this one
        return _run_apart(fetch) if _is_synchronous(source) else sync(fetch)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several keys and byte ranges, each as `get`."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def get_ranges(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        *,
        prototype: BufferPrototype,
        max_concurrency: int = 10,
        max_gap_bytes: int = 1 << 20,
        max_coalesced_bytes: int = 16 << 20,
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Many byte ranges of a value: hits first, then the misses in as few requests as Zarr sends.

        Parameters
        ----------
        key : str
        byte_ranges : sequence of ByteRequest or None
        prototype : BufferPrototype
        max_concurrency : int
            The number of concurrent requests to the source.
        max_gap_bytes, max_coalesced_bytes : int
            The most bytes between two ranges that are merged into one request, and the most bytes of such a request.

        Raises
        ------
        BaseExceptionGroup
            Of exceptions of the source, of `FileNotFoundError` for a missing key, or of `OSError` with ``errno.ESTALE``
            if the object was replaced while it was read.
        """
        if (values := self._ranges.get_nowait(key, byte_ranges, prototype)) is not None:
            yield values
            return
        async for group in self._ranges.get(
            key,
            byte_ranges,
            prototype,
            max_concurrency=max_concurrency,
            max_gap_bytes=max_gap_bytes,
            max_coalesced_bytes=max_coalesced_bytes,
        ):
            yield group

    def list(self) -> AsyncIterator[str]:
        return self._reads.listing("", self._store.list())

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self._reads.listing(prefix, self._store.list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self._reads.listing(prefix, self._store.list_dir(prefix))

    async def exists(self, key: str) -> bool:
        """Whether a key has a value, from the cache or else from the source."""
        if await self._reads.cached_size(key) is not None:
            return True
        if await self._reads.is_known_missing(key):
            return False
        size = await self._reads.size_or_offline(key, self._store.exists)
        return size is not None and size is not False

    async def getsize(self, key: str) -> int:
        """The size of a value in bytes, from the cache or else from the source."""
        size = await self._reads.cached_size(key)
        if size is None and await self._reads.is_known_missing(key):
            raise FileNotFoundError(key)
        if size is None and (size := await self._reads.size_or_offline(key, self._store.getsize)) is None:
            raise FileNotFoundError(key)
        return size


# -- Writing through a cache, as Zarr's stores are written.


class WritableView(SourceView):
    """A view of a source whose writes invalidate the cache before and after, so that no stale entry remains."""

    _writes: WriteThrough
    cache_set_data: bool

    async def set(self, key: str, value: Buffer) -> None:
        """Write a value to the source, and, where so configured, to the cache."""
        self._check_writable()
        await self._writes.value(key, value, lambda: self._store.set(key, value), keep=self.cache_set_data)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, synchronously."""
        sync(self.set(key, value))

    def delete_sync(self, key: str) -> None:
        """As `delete`, synchronously."""
        sync(self.delete(key))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a value unless the key has one, by the source's own means."""
        self._check_writable()
        # not kept, because only the source knows whether this value was written
        await self._writes.value(
            key, value, lambda: self._store.set_if_not_exists(key, value), keep=False, certain=False
        )

    async def delete(self, key: str) -> None:
        """Delete a key at the source and in the cache."""
        self._check_writable()
        await self._writes.deletion(key, lambda: self._store.delete(key))

    async def delete_dir(self, prefix: str) -> None:
        """Delete everything beneath a prefix, at the source and in the cache."""
        self._check_writable()
        await self._writes.deletion_beneath(prefix, lambda: self._store.delete_dir(prefix))

    async def clear(self) -> None:
        """Delete everything at the source, and its cached entries."""
        self._check_writable()
        await self._writes.deletion_beneath("", self._store.clear)


# -- The store itself.


class CacheInfo(TypedDict):
    """The result of `CacheStore.cache_info`; sizes in bytes."""

    cache_store_type: str
    max_age_seconds: Age
    max_size: int | None
    cache_set_data: bool
    current_size: int
    tracked_keys: int
    cached_keys: int
    total_size: int
    total_keys: int
    cache_directory: str | None


class CacheStats(TypedDict):
    """The result of `CacheStore.cache_stats`; sizes in bytes, times in seconds."""

    hits: int
    misses: int
    peer_hits: int
    peer_misses: int
    revalidated: int
    evictions: int
    total_requests: int
    hit_rate: float
    bytes_from_cache: int
    bytes_from_peers: int
    bytes_from_source: int
    seconds_from_cache: float
    seconds_from_peers: float
    seconds_from_source: float
    cache_errors: int


class _Clearing(Coroutine[Any, Any, None]):
    """The coroutine of `CacheStore.clear_cache`; warns with the right call if it is never awaited."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._is_used = False

    def send(self, value: Any) -> Any:
        self._is_used = True
        return self._coroutine.send(value)

    def throw(self, *args: Any) -> Any:
        self._is_used = True
        return self._coroutine.throw(*args)

    def close(self) -> None:
        self._is_used = True
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        self._is_used = True
        return self._coroutine.__await__()

    def __del__(self) -> None:
        if not self._is_used:
            self.close()
            warnings.warn(
                "nothing was cleared: clear_cache() is a coroutine, as in Zarr, and was not awaited; write `await "
                "store.clear_cache()`, or `store.clear_cache_sync()`, which needs no event loop",
                RuntimeWarning,
                stacklevel=2,
            )


_LONGEST_LOOK: Final = 0.2
"""Seconds for which a table in a notebook may wait for its figures."""


class CacheStore(ReadableView, WritableView):
    """A Zarr store that caches the reads from another store, for every process on this machine.

    Code written for `zarr.experimental.cache_store.CacheStore` runs unchanged.

    Parameters
    ----------
    store : Store, str, Path, UPath or FSMap
        The source: a Zarr store, a path or a URL.
    cache_store : Store, str or Path, optional
        The cache. A path, or a `zarr.storage.LocalStore`, becomes a `LockedLocalStore` there, which all processes
        share. None is this user's default cache on this machine. Any other store that supports deletes keeps its index
        in this process, and serves one source.
    max_age_seconds : float or "infinity", optional
        The time for which an entry is served, in seconds.
    max_size : int, str or None, optional
        The bound of the whole cache, in bytes or as ``"20 GB"``; None for no bound. By default a directory keeps its
        bound, and a new one gets the configured bound (10 GiB); a Zarr store given as `cache_store` has no bound, as
        with Zarr. The bound of the default cache, which other datasets share, is raised but not lowered by this;
        `xzcache.resize` lowers it. Values larger than the bound are not cached.
    cache_set_data : bool, optional
        Whether values that are written through this store are cached.
    read_only : bool, optional
        Whether this object refuses writes.
    namespace : str, optional
        The name, one path component, of the entries of this source. Default is a name made from its identity. Stores
        with the same name are treated as the same source.
    revalidate : {"open", "strict", True, False} or float, optional
        When metadata documents are revalidated at the source. ``"open"``: at their first use by a newly opened store,
        and at each use by a writable store, so that writes are based on the current documents; while the source cannot
        be reached, a read-only store is served the cached ones, with one warning. ``"strict"``: as ``"open"``, but the
        error of the source is raised. True: at each read, chunks included. False: never. A number: after so many
        seconds. If the document of an array has changed, the cached entries of the array are invalidated. A chunk that
        Zarr changes in part is revalidated in any case.
    missing_max_age_seconds : float or "infinity", optional
        The time for which a missing chunk is not requested again, in seconds; 0 to always request it. Configured: 60,
        and with ``revalidate=False`` at least `max_age_seconds`. A local directory or memory is always asked by
        default.
    policy : str, optional
        Which entries are evicted first: ``"adaptive"``, those least likely to be used soon; ``"lru"``, the least
        recently used; ``"none"``, no eviction for new entries. Configured: ``"adaptive"``, which a cache store that is
        no directory treats as ``"lru"``.
    storage_options : mapping, optional
        Options for a `store` that is a URL, as for fsspec's clients or for obstore.
    upstream : {"auto", "obstore", "fsspec"}, optional
        The library that reads a `store` that is a URL. ``"auto"`` is obstore if it supports the scheme and all options,
        else fsspec.

    Raises
    ------
    ValueError, TypeError
        A parameter is invalid; the message names it, its value and the accepted values.

    Notes
    -----
    Safe for threads, event loops and processes, and after a fork. An object that is not cached is requested once for
    all readers. A failure of the cache never fails a read; an exception of the source is raised unchanged. After a
    write through any `CacheStore` over the same directory, no process reads the old value. A pickled copy carries the
    settings, and does not revalidate documents that its original has validated.

    Examples
    --------
    >>> store = xzcache.CacheStore(zarr.storage.MemoryStore(), cache_store=zarr.storage.MemoryStore())
    >>> array = zarr.create_array(store, name="x", shape=4, dtype="i4")
    >>> store.cache_info()["cached_keys"]
    1
    """

    @with_hints
    def __init__(
        self,
        store: SourceLike,
        *,
        cache_store: Store | str | os.PathLike[str] | None = None,
        max_age_seconds: Age | Unset = UNSET,
        max_size: int | str | Unset | None = UNSET,
        cache_set_data: bool | Unset = UNSET,
        read_only: bool = False,
        namespace: str | None = None,
        revalidate: Revalidate | Unset = UNSET,
        missing_max_age_seconds: Age | Unset = UNSET,
        policy: PolicyName | Unset = UNSET,
        storage_options: Mapping[str, Any] | None = None,
        upstream: Upstream | Unset = UNSET,
    ) -> None:
        self.max_age_seconds: Age = settings.chosen("max_age_seconds", max_age_seconds, settings.parse_age)
        self.cache_set_data: bool = settings.chosen("cache_set_data", cache_set_data, settings.parse_flag)
        self.revalidate: Revalidate = settings.chosen("revalidate", revalidate, settings.parse_revalidate)
        self.missing_max_age_seconds: Age = settings.chosen(
            "missing_max_age_seconds", missing_max_age_seconds, settings.parse_age
        )
        self.policy: PolicyName = settings.chosen("policy", policy, settings.parse_policy)
        self._asked_policy = policy if isinstance(policy, Unset) else self.policy
        settings.parse_threads("threads", config.get("threads"))
        self._asked_max_size = max_size if isinstance(max_size, Unset) else settings.parse_bound("max_size", max_size)
        settings.parse_flag("read_only", read_only)
        self._given_namespace = checked_namespace(namespace)
        self._given_cache = cache_store
        chosen = settings.chosen("upstream", upstream, settings.parse_upstream)
        self._store = open_source(store, storage_options, read_only=read_only, upstream=chosen)
        # requests to a local source are cheap, so missing chunks need not be remembered
        given = not isinstance(missing_max_age_seconds, Unset)
        self._asked_missing: Age | Unset = self.missing_max_age_seconds if given else UNSET
        self._asks_always = not given and is_at_hand(self._store)
        self.source: Identity = identify(self._store)
        # the identity of the source before pickling: a copy in memory is another source
        self._origin = self.source.digest
        # one spelling for each source, except that a local path is spelled as xarray does
        self._given_path = local_path(store) or self.source.url or spelled(store)
        super().__init__(read_only=read_only or self._store.read_only)
        self._cache = cache_store_of(cache_store, self._asked_max_size, self._asked_policy)
        self._stats = Stats(process)
        self._read_through(self._fresh(Seen()))
        self._avoid_oneself()

    def _avoid_oneself(self) -> None:
        """Read past an inner `CacheStore` over the same cache, which would wait for the fetch of this one."""
        inner = self._store
        while (beneath := getattr(inner, "_store", None)) is not None:
            if isinstance(inner, CacheStore) and inner._backend.is_same_cache(self._backend):
                if inner is not self._store:
                    raise ValueError("store reads through the same cache already: give its source")
                self._store, self.source = beneath, identify(beneath)
                self._read_through(self._reads.freshness)
            inner = beneath

    def _fresh(self, seen: Seen) -> Freshness:
        return Freshness(self.revalidate, immutable=self.source.immutable, inherited=seen)

    def _read_through(self, freshness: Freshness) -> None:
        given = self._given_namespace
        lasting = bool(given) or self.source.lasting
        name = given or self.source.namespace
        backend = backend_of(self._cache, name, self.policy, max_size=self._asked_max_size, lasting=lasting)
        self._backend = backend
        reading = Reading(
            self._store,
            backend,
            freshness=freshness,
            stats=self._stats,
            max_age=self.max_age_seconds,
            missing_max_age=self._missing_max_age(freshness),
            timeout=settings.parse_seconds("fetch_timeout", config.get("fetch_timeout")),
            writable=not self.read_only,
            passes=self.source.fickle,
            promote_above=settings.parse_size("promote_above", config.get("promote_above")),
            fixed=self.source.immutable,
            label=self.source.label,
            missing_offline=self._missing_max_age(freshness, is_offline=True),
            # weak: a cycle would keep the store until the garbage collector runs
            store=weakref.ref(self),
        )
        self._reads = ReadThrough(reading)
        self._ranges = RangeReads(self._reads)
        self._writes = WriteThrough(backend, freshness, passes=reading.passes)

    def _missing_max_age(self, freshness: Freshness, *, is_offline: bool = False) -> Age:
        """The time for which a missing chunk is not requested again, in seconds."""
        configured = self.missing_max_age_seconds
        if self._asks_always or configured == 0:
            return 0
        if (freshness.revalidate is False or is_offline) and isinstance(self._asked_missing, Unset):
            # missing chunks are served for as long as cached ones
            return max(self.max_age_seconds, configured, key=float)
        return configured

    @property
    def namespace(self) -> str:
        """The name under which the entries of this source are kept."""
        return self._backend.namespace

    @property
    def max_size(self) -> int | None:
        """The bound of the whole cache, in bytes; None for no bound."""
        return self._backend.bound if isinstance(self._certain_bound, Unset) else self._certain_bound

    @property
    def _certain_bound(self) -> int | Unset | None:
        """The bound that was asked for, where the cache has it: the default cache may have a larger one."""
        is_default = isinstance(self._cache, LockedLocalStore) and self._cache.is_default
        return UNSET if is_default else self._asked_max_size

    def close(self) -> None:
        """Close the source, and release the cache. The entries stay, and the store can be used again."""
        super().close()
        self._backend.close()
        if isinstance(self._cache, LockedLocalStore) and self._cache is not self._given_cache:
            self._cache.let_go()

    # -- copies

    def _settings(self) -> dict[str, Any]:
        return {
            "max_age_seconds": self.max_age_seconds,
            "max_size": self._asked_max_size,
            "cache_set_data": self.cache_set_data,
            "read_only": self.read_only,
            "namespace": self._given_namespace,
            "revalidate": self.revalidate,
            "missing_max_age_seconds": self._asked_missing,
            "policy": self._asked_policy,
        }

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same source and cache with another `read_only`; counters and validated documents are shared."""
        source = self._store
        if not read_only and source.read_only:
            source = source.with_read_only(False)
        remember(source, self.source)
        # the same object of the cache, so that a change of its bound holds for both
        copy = type(self)(source, cache_store=self._cache, **{**self._settings(), "read_only": read_only})
        copy._given_cache, copy._given_path, copy._stats = self._given_cache, self._given_path, self._stats
        copy._origin = self._origin
        copy._read_through(self._reads.freshness)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        # few objects: a graph refers to each of them, and pickle encodes references to the first 256 in fewer bytes
        kind = None if type(self) is CacheStore else type(self)
        changed = {name: value for name, value in self._settings().items() if value != AS_ZARR.get(name, value)}
        cache, token = self._given_cache, None
        if isinstance(cache, MemoryStore) and isinstance(self._backend, StoreBackend):
            # a copy gets an empty cache of its own
            cache, token = type(cache)(), self._backend.token
        known: Identity | str | None = self._origin
        if self.source.lasting:
            known = None if must_identify_again(self._store) else self.source
        seen = self._reads.freshness.seen().packed
        return _restore, (kind, self._store, cache, changed or None, self.read_only, known, seen, token)

    def __dask_tokenize__(self) -> tuple[str, str, str]:
        return "xzcache", self.namespace, type(self).__name__

    def __eq__(self, other: object) -> bool:
        # equal stores can replace each other: same source, same rights, same cache, same settings
        return (
            type(other) is type(self)
            and (is_same_source(self._store, other._store) or self._is_copy_with_same_contents(other))
            and self._backend.is_same_cache(other._backend)
            and self._settings() == other._settings()
        )

    def _is_copy_with_same_contents(self, other: CacheStore) -> bool:
        """Whether one was pickled with its source in memory and neither source has changed, as Zarr compares them."""
        return self._origin == other._origin and bool(self._store == other._store)

    __hash__ = None  # type: ignore[assignment]  # as all Zarr stores

    # Zarr puts both into its messages: use one constant line that opens nothing and waits for nothing

    def __repr__(self) -> str:
        asked = self._asked_max_size
        bound = f", max_size={settings.shown_size(asked)!r}" if isinstance(asked, int) else ""
        return f"{type(self).__name__}(store={self.source.label!r}, cache_store={label_of(self._cache)!r}{bound})"

    def __str__(self) -> str:
        return one_line(f"xzcache({self.source.label})")

    def _repr_html_(self) -> str:
        is_open = self._backend.is_open
        info: Mapping[str, Any] = {}
        if is_open:
            # a notebook runs an event loop, so do not wait for publishes or for other processes
            with suppress(TimeoutError):
                info = pool.submit(partial(self._info, exact=False)).result(_LONGEST_LOOK)
        where = self.source.label, label_of(self._cache)
        return Display(type(self).__name__, *where, is_open, info, self.cache_stats()).html()

    # -- the cache

    def cache_info(self) -> CacheInfo:
        """The state of the cache, under Zarr's names and those of xzcache.

        Returns
        -------
        CacheInfo
            A dictionary: ``cache_store_type``, ``max_age_seconds``, ``max_size``, ``cache_set_data``; of this source
            ``current_size`` (bytes), ``tracked_keys``, ``cached_keys``; of the whole cache, which `max_size` bounds,
            ``total_size`` and ``total_keys``; ``cache_directory``.

        Notes
        -----
        Waits until all reads so far are stored, so that the figures are exact.
        """
        return self._info(exact=True)

    def _info(self, *, exact: bool) -> CacheInfo:
        info: dict[str, Any] = self._backend.info(exact=exact)
        if not isinstance(self._certain_bound, Unset):
            info["max_size"] = self._certain_bound
        info |= {"max_age_seconds": self.max_age_seconds, "cache_set_data": self.cache_set_data}
        return cast(CacheInfo, info)

    def cache_stats(self) -> CacheStats:
        """The reads of this store, and of its `with_read_only` copies, in this process.

        Returns
        -------
        CacheStats
            A dictionary: ``hits``, ``misses``, ``peer_hits`` (reads that the cache of another node of a Dask cluster
            answered), ``peer_misses`` (such questions after which the source was asked), ``revalidated`` (the answers
            of the source that an entry has not changed, whose reads are hits), ``evictions`` (by this process, of any
            source), ``total_requests``, ``hit_rate``; ``bytes_from_cache``, ``bytes_from_peers``,
            ``bytes_from_source``, and the same for seconds; ``cache_errors``: how often the cache failed and the
            source answered.
        """
        backend = self._backend
        stats = {**self._stats.as_dict(), "evictions": backend.evictions, "cache_errors": backend.faults}
        return cast(CacheStats, stats)

    def cached_parts(self, keys: Iterable[str]) -> list[Literal["none", "part", "whole", "missing"]]:
        """The cached part of each object: nothing, byte ranges, the whole object, or that the source has no object."""

        async def look() -> list[Literal["none", "part", "whole", "missing"]]:
            await self._backend.prepare()
            return [await self._cached_part(key) for key in keys]

        return sync(look())

    async def _cached_part(self, key: str) -> Literal["none", "part", "whole", "missing"]:
        parts = self._backend.parts(key)
        if parts.validated() is not None:
            return "whole"
        if parts.pieces.any() is not None:
            return "part"
        return "missing" if await self._reads.reading.is_known_missing(key) else "none"

    def clear_cache(self) -> Coroutine[Any, Any, None]:
        """Invalidate the cached entries of this source, for every process: a coroutine, as in Zarr."""
        return _Clearing(self._backend.clear())

    if hasattr(inspect, "markcoroutinefunction"):
        # Python 3.12
        clear_cache = inspect.markcoroutinefunction(clear_cache)

    def clear_cache_sync(self) -> None:
        """As `clear_cache`, but synchronous: in a script, in a notebook, and within a running event loop."""
        sync(self._backend.clear())


def _restore(
    kind: type[CacheStore] | None,
    source: Store,
    cache: Any,
    changed: dict[str, Any] | None,
    read_only: bool,
    known: Identity | str | None,
    seen: bytes,
    token: str | None,
) -> CacheStore:
    """A copy in another process, with the documents that its original has validated."""
    if isinstance(known, Identity):
        remember(source, known)
    with settings.as_found():
        store = (kind or CacheStore)(source, cache_store=cache, read_only=read_only, **{**AS_ZARR, **(changed or {})})
    if isinstance(known, str):
        store._origin = known
    store._read_through(store._fresh(Seen(seen)))
    if isinstance(store._backend, StoreBackend):
        store._backend.token = token or store._backend.token
    return store
