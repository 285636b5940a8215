"""A cache in any Zarr store that supports deletes, with its index in this process.

The keys are those of the source, so one cache store serves one source. Byte ranges are kept in memory within the same
bound, as in Zarr's own cache. Nothing is shared with other processes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from xzcache._config import shown_size
from xzcache.anystore._index import KnownDocuments, MemoryIndex, WriteVersion
from xzcache.model import (
    MISSING,
    Backend,
    Entry,
    are_compatible,
    clip,
    nothing,
    report_bug,
    run_to_completion,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.abc.store import Store

    from xzcache._config import Age
    from xzcache.model import Cached, Data, Listed


logger = logging.getLogger("xzcache.anystore")

_RANGES_WITHOUT_BOUND: Final = 256 << 20  # bytes that byte ranges may take of memory where the cache has no bound


class Begun(NamedTuple):
    """A write that has begun: of some keys and the versions of each, and perhaps of all keys beneath a path."""

    keys: list[str]
    versions: list[WriteVersion | None]
    beneath: str | None


class StoreParts:
    """The cached parts of one object in a cache store."""

    def __init__(self, index: MemoryIndex, key: str, *, is_held: bool) -> None:
        self._index = index
        self._key = key
        self._is_held = is_held

    @cached_property
    def is_empty(self) -> bool:
        """Whether there certainly are none."""
        return not self._index.of_key(self._key)

    @cached_property
    def pieces(self) -> Listed:
        """The cached byte ranges."""
        return self._index.listed(self._key)

    @cached_property
    def states(self) -> set[str]:
        """The validators of all parts; an empty string stands for an unknown state."""
        return {self._index.validator(entry) for entry in self._index.of_key(self._key)}

    def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if it has none."""
        return self._index.validator(entry)

    def size(self, max_age: Age) -> int | None:
        """The size of the whole object, if it was stored or read by this process."""
        may_serve = not self._is_held and self._index.may_serve(Entry(self._key), max_age)
        return self._index.size_of(Entry(self._key)) if may_serve else None

    def validated(self, entry: Entry | None = None) -> float | None:
        """When an entry, or the whole object, was stored or confirmed, by this process."""
        return self._index.inserted(entry or Entry(self._key))


class StoreBackend(Backend):
    """A cache store and its index; `source` is the namespace of its only source.

    Safe for threads and event loops. Space is taken before a value is written, and freed after it is deleted.

    `max_size` is the bound in bytes; None for no bound but that of the cache store itself.
    """

    is_open = True
    prefix = ""
    evicts = True

    def __init__(self, cache_store: Store, source: str, max_size: int | None = None) -> None:
        self.bound = max_size
        self.evictions = self.faults = 0
        self._is_bound_small = False
        # keys being written, and prefixes with a trailing slash
        self._written: Counter[str] = Counter()
        self.cache_store = cache_store
        # a pickled copy with a cache in memory is equal if its token is
        self.token = uuid.uuid4().hex
        self.namespace = source
        self._index = MemoryIndex()
        self._documents = KnownDocuments(self._index)
        self._logged_kinds: set[type[Exception]] = set()
        self._quarantined: set[str] = set()
        self._quarantines_all = False

    @property
    def cache_id(self) -> object:
        """This object, which all stores over one cache store share."""
        return self

    # -- finding

    async def get(self, entry: Entry, max_age: Age, missing_max_age: Age = 0) -> Cached:
        """The bytes of an entry, or of a span of the whole object, no older than `max_age` seconds."""
        data = await self._find(entry, max_age)
        if data is None and missing_max_age != 0 and self._documents.is_missing(entry.key, missing_max_age):
            return MISSING
        return data

    async def _find(self, entry: Entry, max_age: Age) -> memoryview | None:
        data = await self._find_whole(entry.whole, max_age)
        if data is not None:
            return data[slice(*clip(entry.start, entry.stop, len(data)))]
        if entry.is_whole:
            return None
        version = self._index.write_version(entry.key)
        for piece in self._index.listed(entry.key).covering(entry):
            if self._index.may_serve(piece, max_age):
                data = self._index.data(piece)
                if data is not None and self._index.used(piece, len(data), version):
                    return data[slice(*within(entry, piece, len(data)))]
        return None

    def parts(self, key: str) -> StoreParts:
        """The cached parts of an object."""
        is_held = self._quarantines_all or key in self._quarantined
        return StoreParts(self._index, key, is_held=is_held)

    async def _find_whole(self, entry: Entry, max_age: Age) -> memoryview | None:
        version = self._index.write_version(entry.key)
        if self._quarantines_all or entry.key in self._quarantined or not self._index.may_serve(entry, max_age):
            return None
        try:
            value = await self.cache_store.get(entry.key, default_buffer_prototype())
        except Exception as error:
            # whatever the cache store raises: a read must not fail because of the cache
            self._record_fault(error)
            return None
        if value is None or not self._index.used(entry, len(value), version):
            return None
        return memoryview(value.to_bytes())

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry."""
        self._index.mark_validated(entry)

    # -- fetching once, publishing

    def write_version(self, key: str) -> WriteVersion | None:
        """The write version of a key, read before its fetch begins."""
        return self._index.write_version(key)

    async def publish(
        self,
        entry: Entry,
        data: Data | None,
        version: Any,
        validator: str = "",
        done: Callable[[], None] = nothing,
        *,
        age: float = 0.0,
    ) -> None:
        """Store an entry now, as a cache store has to be written by the event loop that it belongs to."""
        try:
            if version is None:
                return
            if data is None:
                self._documents.record_missing(entry.key, version)
            else:
                await self._store(entry, data, version, validator)
        finally:
            done()

    async def _store(self, entry: Entry, data: Data, version: WriteVersion, validator: str) -> bool:
        """Store an entry, unless it was written since the version was read or is larger than the bound."""
        if self._is_being_written(entry.key):
            # the entry may be from before or from after the write
            return False
        size, limit = len(data), self.bound
        if limit is None and not entry.is_whole:
            limit = self._index.size - self._index.in_memory + _RANGES_WITHOUT_BOUND
        if self.bound is not None and size > self.bound and not self._is_bound_small:
            self._is_bound_small = True
            text = "an object of %s is larger than max_size=%s of the cache: such objects are not cached"
            logger.warning(text, shown_size(size), shown_size(self.bound))
        if limit is not None and size > limit:
            return False
        while (under_way := self._index.arrive(entry.key)) is not None:
            # a piece of the object is being stored, or all of it
            await asyncio.shield(asyncio.wrap_future(under_way))
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

    async def _publish(
        self, entry: Entry, data: Data, version: WriteVersion, limit: int | None, validator: str
    ) -> bool:
        try:
            # the old entry first: its bytes are given back only after they are deleted
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
            # a write came between: the value that was just stored may be from before it
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

    async def begin_write(self, keys: Sequence[str], beneath: str | None = None) -> Begun:
        """Before the source of some keys, or all keys beneath a path, are written: forget them."""
        self._written.update(keys)
        versions = [await self._invalidate(key) for key in keys]
        if beneath is not None:
            self._written.update([f"{beneath}/"])
            await self.drop(beneath)
        return Begun(list(keys), versions, beneath)

    async def end_write(self, begun: Begun, values: Sequence[Data | None] = ()) -> None:
        """Invalidate keys again after the source was written, and store the new values."""
        # before the new value is stored, which the mark would prevent
        self._written -= Counter(begun.keys)
        if begun.beneath is not None:
            self._written -= Counter([f"{begun.beneath}/"])
            await self.drop(begun.beneath)
        for key, version, value in zip_longest(begun.keys, begun.versions, values):
            new = await self.invalidate(key, version)
            if value is not None:
                await self.publish(Entry(key), value, new)

    def _is_being_written(self, key: str) -> bool:
        return bool(self._written) and any(
            key == written or (written.endswith("/") and (written == "/" or key.startswith(written)))
            for written in list(self._written)
        )

    async def invalidate(self, key: str, since: Any) -> WriteVersion | None:
        """Invalidate a key that changed at the source; returns the version to store it with."""
        alone = since is not None and since == self._index.write_version(key)
        version = await self._invalidate(key)
        return version if alone else None

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

    async def apply_document(
        self, key: str, document: bytes | None, version: Any, *, is_written: bool = False
    ) -> WriteVersion | None:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""
        if is_written:
            self._documents.record_document(key, document)
            return None
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
