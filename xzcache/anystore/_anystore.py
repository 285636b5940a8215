"""A cache in any Zarr store that supports deletes, with its index in this process.

The keys are those of the source, so one cache store serves one source. Byte ranges are kept in memory within the same
bound, as in Zarr's own cache. Nothing is shared with other processes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from xzcache.anystore._index import KnownDocuments, MemoryIndex, WriteVersion
from xzcache.model import Claims, Entry, Flights, Listed, are_compatible, clip, report_bug, run_to_completion, within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from zarr.abc.store import Store

    from xzcache._config import Age
    from xzcache.model import Data, Span


# -- Defaults for a cache that no other process shares.


class SingleProcessDefaults:
    """Backend methods that are trivial without other processes, and the negative cache."""

    is_open = True
    _documents: KnownDocuments

    def __init__(self) -> None:
        self.flights: Flights[memoryview | None] = Flights()
        self.claims = Claims()
        self.evictions = self.faults = 0
        # keys being written, and prefixes with a trailing slash
        self._written: Counter[str] = Counter()

    async def prepare(self) -> None:
        """Do nothing: there is nothing to open."""

    def get_nowait(self, key: str, max_age: Age) -> memoryview | None:
        """Return None: reading from a cache store always waits."""
        return None

    def readinto_nowait(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """Return False: reading from a cache store always waits."""
        return False

    def get_blocking(self, entry: Entry, max_age: Age) -> memoryview | None:
        """Nor by a thread, which is not the one of that store's event loop."""
        return None

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """No other process shares this cache, so the lock is always free."""
        return lambda: None

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """As `try_acquire`, of some bytes of an object."""
        return lambda: None

    def _write_begins(self, *written: str) -> None:
        self._written.update(written)

    def _write_ends(self, *written: str) -> None:
        self._written -= Counter(written)

    def _is_being_written(self, key: str) -> bool:
        return bool(self._written) and any(
            key == written or (written.endswith("/") and key.startswith(written)) for written in list(self._written)
        )

    async def unconfirmed(self, seen: Mapping[str, bytes]) -> list[str]:
        """Return no document: no other process changes this cache."""
        return []

    async def confirm(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """Do nothing: no document is unconfirmed."""

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """A context around a fetch; publishes are awaited anyway."""
        return nullcontext()

    async def is_document_missing(self, key: str, max_age: Age) -> bool:
        """Whether a document is known to be missing from a node that has other documents."""
        return self._documents.is_document_missing(key, max_age)

    def is_known_missing_nowait(self, key: str, max_age: Age) -> bool:
        """Whether a chunk is known to be missing at the source."""
        return self._documents.is_known_missing(key, max_age)

    async def is_known_missing(self, key: str, max_age: Age) -> bool:
        """As `is_known_missing_nowait`."""
        return self._documents.is_known_missing(key, max_age)

    async def record_missing(self, key: str, version: Any) -> None:
        """Record that a chunk is missing at the source."""
        self._documents.record_missing(key, version)

    async def record_document(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""
        self._documents.record_document(key, document)


# -- The cache itself.

logger = logging.getLogger("xzcache.anystore")

_RANGES_WITHOUT_BOUND: Final = 256 << 20  # bytes that byte ranges may take of memory where the cache has no bound


class StoreBackend(SingleProcessDefaults):
    """A cache store and its index; `source` is the namespace of its only source.

    Safe for threads and event loops. Space is taken before a value is written, and freed after it is deleted.
    """

    evicts = True
    bound: int | None = None  # the cache store sets its own limit

    def __init__(self, cache_store: Store, source: str) -> None:
        self.cache_store = cache_store
        # a pickled copy with a cache in memory is equal if its token is
        self.token = uuid.uuid4().hex
        self.namespace = source
        super().__init__()
        self._index = MemoryIndex()
        self._documents = KnownDocuments(self._index)
        self._logged_kinds: set[type[Exception]] = set()
        self._quarantined: set[str] = set()
        self._quarantines_all = False

    def entry(self, key: str, start: int, stop: int) -> Entry | None:
        """The entry of a span of an object."""
        return Entry(key, start, stop)

    # -- finding

    async def get(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry, or of a span of the whole object, no older than `max_age` seconds."""
        data = await self._find_whole(entry.whole, max_age)
        if data is not None:
            return data[slice(*clip(entry.start, entry.stop, len(data)))]
        if entry.is_whole:
            return None
        version = self._index.write_version(entry.key)
        for piece in self.listed(entry.key).covering(entry):
            if self._index.may_serve(piece, max_age):
                data = self._index.data(piece)
                if data is not None and self._index.used(piece, len(data), version):
                    return data[slice(*within(entry, piece, len(data)))]
        return None

    def listed(self, key: str) -> Listed:
        """The byte ranges that are cached of an object."""
        return Listed(key, [(piece.start, piece.stop) for piece in self._index.pieces(key)])

    def states_of(self, key: str) -> set[str]:
        """The validators of all cached parts of an object; an empty string stands for an unknown state."""
        return {self._index.validator(entry) for entry in self._index.of_key(key)}

    async def _find_whole(self, entry: Entry, max_age: Age) -> memoryview | None:
        version = self._index.write_version(entry.key)
        if self._quarantines_all or entry.key in self._quarantined or not self._index.may_serve(entry, max_age):
            return None
        try:
            value = await self.cache_store.get(entry.key, default_buffer_prototype())
        except Exception as error:
            self._record_fault(error)
            return None
        if value is None or not self._index.used(entry, len(value), version):
            return None
        return memoryview(value.to_bytes())

    async def size(self, entry: Entry, max_age: Age) -> int | None:
        """The size of a whole object that `get` would find, in bytes."""
        if self._quarantines_all or entry.key in self._quarantined or not self._index.may_serve(entry, max_age):
            return None
        try:
            return await self.cache_store.getsize(entry.key)
        except FileNotFoundError:
            return None
        except Exception as error:
            self._record_fault(error)
            return None

    async def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if there is none."""
        return self._index.validator(entry)

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry."""
        self._index.mark_validated(entry)

    # -- fetching once, publishing

    def write_version(self, entry: Entry) -> WriteVersion | None:
        """The write version of an entry, read before its fetch begins."""
        return self._index.write_version(entry.key)

    async def publish(self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str = "") -> bool:
        """Store an entry, unless it was written since the version was read or is larger than the bound."""
        if self._is_being_written(entry.key):
            # the entry may be from before or from after the write
            return False
        size, limit = len(data), max_size
        if limit is None and not entry.is_whole:
            limit = self._index.size - self._index.in_memory + _RANGES_WITHOUT_BOUND
        if (limit is not None and size > limit) or not self._index.arrive(entry.key):
            return False
        # from here on no other thread stores an entry of the object
        others = [self._index.validator(other) for other in self._index.of_key(entry.key) if other != entry]
        if not all(are_compatible(validator, other) for other in others):
            # parts of two states of an object must not be mixed
            self._index.arrived(entry.key)
            return False
        # finish even if cancelled: a half-written value would look like one of an earlier process
        stored, cancelled = await run_to_completion(self._publish(entry, data, version, limit, validator))
        if cancelled:
            raise asyncio.CancelledError
        return stored

    async def publish_soon(
        self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str, done: Callable[[], None]
    ) -> None:
        """As `publish`: a cache store has to be written by the event loop that it belongs to."""
        try:
            await self.publish(entry, data, version, max_size, validator)
        finally:
            done()

    async def stored(self, key: str) -> None:
        """As the backend of a directory has it: here a fetch ends when its bytes are stored."""

    async def _publish(
        self, entry: Entry, data: Data, version: WriteVersion, limit: int | None, validator: str
    ) -> bool:
        try:
            await self._remove([entry])
            return await self._take(len(data), limit) and await self._put(entry, data, version, validator)
        except Exception as error:
            # the contents of the cache store are unknown now
            self._quarantined.add(entry.key)
            self._record_fault(error)
            return False
        finally:
            self._index.arrived(entry.key)

    async def _put(self, entry: Entry, data: Data, version: WriteVersion, validator: str) -> bool:
        """Write and record an entry whose space was taken."""
        stored = False
        try:
            if entry.is_whole:
                buffer = default_buffer_prototype().buffer.from_bytes(bytes(data))
                await self.cache_store.set(entry.key, buffer)
            in_memory = None if entry.is_whole else memoryview(bytes(data))
            stored = self._index.record(entry, len(data), in_memory, version, validator)
            if stored:
                self._quarantined.discard(entry.key)
            if not stored and entry.is_whole and entry not in self._index:
                await self.cache_store.delete(entry.key)
        finally:
            logger.debug("%spublished %s: %d bytes", "" if stored else "not ", entry, len(data))
            if not stored:
                self._index.give(len(data))
        return stored

    async def _take(self, size: int, limit: int | None) -> bool:
        while not (answer := self._index.take(size, limit)).taken:
            if not self.evicts or answer.oldest is None or not await self._remove([answer.oldest]):
                return False
            self.evictions += 1
            logger.debug("evicted %s", answer.oldest)
        return True

    async def _remove(self, entries: list[Entry]) -> int:
        """Delete entries, and only then give their bytes back; returns how many there were."""
        removed = 0
        for entry in entries:
            record = self._index.pop(entry)
            if record is None:
                continue
            if entry.is_whole:
                try:
                    await self.cache_store.delete(entry.key)
                except BaseException:
                    self._index.put_back(entry, record)
                    raise
            self._index.give(record.size)
            removed += 1
        return removed

    # -- writes

    async def begin_write(self, keys: Sequence[str]) -> list[tuple[str, WriteVersion | None]]:
        """Before the source of some keys is written: forget them."""
        self._write_begins(*keys)
        return [(key, await self._invalidate(key)) for key in keys]

    async def end_write(self, writes: Sequence[Any], values: Sequence[Data | None], max_size: int | None) -> None:
        """Invalidate keys again after the source was written, and store the new values."""
        self._write_ends(*(key for key, _ in writes))
        for (key, begun), value in zip(writes, values, strict=True):
            version = await self.invalidate(key, begun)
            if value is not None and version is not None:
                await self.publish(Entry(key), value, version, max_size)

    async def invalidate(self, key: str, since: Any) -> WriteVersion | None:
        """Invalidate a key that changed at the source; returns the version to store it with."""
        alone = since is not None and since == self._index.write_version(key)
        version = await self._invalidate(key)
        return version if alone else None

    async def begin_delete(self, prefix: str, *, itself: bool = False) -> tuple[str, Sequence[Any]]:
        """Before all keys beneath a prefix, and perhaps the prefix as a key, are deleted at the source."""
        begun = await self.begin_write([prefix]) if itself else []
        self._write_begins(f"{prefix}/")
        await self.drop(prefix)
        return prefix, begun

    async def end_delete(self, begun: Any) -> None:
        """After they were deleted."""
        prefix, writes = begun
        self._write_ends(f"{prefix}/")
        await self.drop(prefix)
        await self.end_write(writes, [None] * len(writes), None)

    async def _invalidate(self, key: str) -> WriteVersion | None:
        version = self._index.count_write(key)
        self._documents.forget_absence(key)
        logger.debug("invalidated %s", key)
        try:
            await self._remove(self._index.of_key(key))
            # an earlier process may have left a value
            await self.cache_store.delete(key)
            self._quarantined.discard(key)
        except Exception as error:
            # a value that cannot be deleted is quarantined
            self._quarantined.add(key)
            self._record_fault(error)
            return None
        return version

    async def clear(self) -> None:
        """Forget everything."""
        await self.drop("")

    async def drop(self, prefix: str) -> None:
        """Forget everything beneath a prefix; everything there is for an empty one."""
        self._index.count_drop()
        self._documents.forget(prefix)
        logger.debug("invalidated %s/", prefix)
        try:
            await self._remove(self._index.beneath(prefix))
            await self.cache_store.delete_dir(prefix)
            self._quarantines_all = self._quarantines_all and bool(prefix)
        except Exception as error:
            self._quarantines_all = True
            self._record_fault(error)

    async def apply_document(self, key: str, document: bytes | None, version: Any) -> WriteVersion | None:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""
        return await self._documents.apply_document(key, document, version, self.drop)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    # -- looking

    def info(self, *, exact: bool = True) -> dict[str, Any]:
        """The size and the number of entries, always exact; sizes in bytes."""
        size, count = self._index.size, len(self._index)
        return {
            "cache_store_type": type(self.cache_store).__name__,
            "current_size": size,
            "tracked_keys": count,
            "cached_keys": count,
            "total_size": size,
            "total_keys": count,
            "cache_directory": None,
            "max_size": self.bound,
        }

    def _record_fault(self, error: Exception) -> None:
        self.faults += 1
        if not report_bug(error, "the cache store; reads go to the source") and type(error) not in self._logged_kinds:
            self._logged_kinds.add(type(error))
            logger.warning("trouble with the cache store, reads go to the source: %s: %s", type(error).__name__, error)

    def is_same_cache(self, other: object) -> bool:
        """Whether another backend keeps its entries in the same place."""
        if not isinstance(other, StoreBackend) or type(self.cache_store) is not type(other.cache_store):
            return False
        if isinstance(self.cache_store, MemoryStore):
            return self.token == other.token
        return bool(self.cache_store == other.cache_store)
