"""One source's part of a cache directory: the thin skin that takes blocking work off the event loop."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from xzcache import _threads as pool
from xzcache._config import is_fresh
from xzcache._fork import renew_after_fork
from xzcache.directory._publish import PendingEntry
from xzcache.files import allowance
from xzcache.model import Claims, Entry, Flights, Listed, is_cacheable, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    import numpy as np

    from xzcache._config import Age
    from xzcache.directory._directory import CacheDirectory
    from xzcache.directory._fetchlocks import WriteVersion
    from xzcache.directory._invalidation import Begun, Deletion
    from xzcache.files import Found
    from xzcache.model import Data, Span


_INLINE: Final = 1 << 20
"""Up to this many bytes are read on the event loop, where they are in memory: a thread would take longer to wake."""

_flights: Final[Flights[memoryview | None]] = Flights()
_claims: Final = Claims()


class SharedBackend:
    """The entries of one namespace of a cache directory.

    `namespace` is the path component of the source. `lasting` tells that the source is the same one in other processes.
    """

    flights = _flights
    claims = _claims

    def __init__(self, directory: CacheDirectory, namespace: str, *, lasting: bool = True) -> None:
        self.directory = directory
        self.namespace = namespace
        self._use = directory.used_by(self)
        if not lasting:
            renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Change the namespace: a source in memory differs between parent and child."""
        self.namespace = f"{self.namespace}-{os.getpid()}"

    def entry(self, key: str, start: int, stop: int) -> Entry | None:
        """The entry of a span of an object; None for a key that cannot be cached."""
        full = f"{self.namespace}/{key}"
        return Entry(full, start, stop) if is_cacheable(full) else None

    @property
    def is_aside(self) -> bool:
        """Whether the disk is put aside, so that reads find no entry."""
        return self.directory.health.is_aside

    async def prepare(self) -> None:
        """Open the directory, where that was not done yet."""
        if self.directory.wants_preparing:
            self._use_again()
            await self.directory.prepare_promptly()

    def close(self) -> None:
        """Leave the directory soon unless it has other users; the next use joins again."""
        self._use()

    def _use_again(self) -> None:
        if not self._use.alive:
            self._use = self.directory.used_by(self)

    def get_nowait(self, key: str, max_age: Age) -> memoryview | None:
        """The value of a key if it can be read without waiting; None means that `get` must be called."""
        directory = self.directory
        if directory.health.is_aside or not directory.is_ready:
            return None
        entry = Entry(f"{self.namespace}/{key}")
        data = directory.reader.get_nowait(entry, None if max_age == "infinity" else int(max_age * 1e9), _INLINE)
        if data is not None and directory.recency.record_use(entry):
            pool.spawn(directory.flush)
        return data

    def readinto_nowait(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """Like `get_nowait`, into an array, which is undefined after False."""
        directory = self.directory
        if directory.health.is_aside or not directory.is_ready:
            return False
        entry = Entry(f"{self.namespace}/{key}")
        max_age_ns = None if max_age == "infinity" else int(max_age * 1e9)
        if not directory.reader.readinto_nowait(entry, max_age_ns, place, patient=patient):
            return False
        if directory.recency.record_use(entry):
            pool.spawn(directory.flush)
        return True

    def get_blocking(self, entry: Entry, max_age: Age) -> memoryview | None:
        """As `get`, where waiting for the disk is no harm."""
        if self.directory.health.is_aside or not self.directory.is_ready:
            return None
        reader = self.directory.reader
        for found in reader.open_covering(entry):
            if not _is_fresh(found, max_age):
                reader.close(found)
                continue
            span = (0, found.size) if found.entry == entry else within(entry, found.entry, found.size)
            if (data := reader.read(found, *span)) is not None:
                if self.directory.recency.record_use(found.entry):
                    pool.spawn(self.directory.flush)
                return data
        return None

    async def get(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry that is cached, no older than `max_age` seconds and sound; else None."""
        reader = self.directory.reader
        if self.is_aside or not self.directory.may_serve:
            return None
        for found in reader.open_covering(entry):
            if not _is_fresh(found, max_age):
                # another file that holds it may be younger
                reader.close(found)
            elif (data := await self._read(found, entry)) is not None:
                if self.directory.recency.record_use(found.entry):
                    pool.spawn(self.directory.flush)
                return data
        return None

    async def _read(self, found: Found, entry: Entry) -> memoryview | None:
        reader = self.directory.reader
        first, last = (0, found.size) if found.entry == entry else within(entry, found.entry, found.size)
        if (last - first if found.known else found.size) <= _INLINE:
            done, data = reader.read_now(found, first, last)
            if done:
                return data
        patience = allowance(found.size)
        return await self.directory.promptly(None, reader.read, found, first, last, patience=patience)

    async def size(self, entry: Entry, max_age: Age) -> int | None:
        """The size in bytes of a whole object that `get` would find; the file is read only if it has no stamp."""
        reader = self.directory.reader
        if self.is_aside or not self.directory.may_serve or (found := reader.open_entry(entry)) is None:
            return None
        if not _is_fresh(found, max_age):
            reader.close(found)
            return None
        if (size := reader.size(found)) is None:
            data = await self.get(entry, max_age)
            return None if data is None else len(data)
        return size

    def listed(self, key: str) -> Listed:
        """The byte ranges that are cached of an object."""
        full = f"{self.namespace}/{key}"
        return Listed(full, ()) if self.is_aside else self.directory.reader.listed(full)

    def states_of(self, key: str) -> set[str]:
        """The validators of all cached parts of an object; an empty string stands for an unknown state."""
        return set() if self.is_aside else self.directory.reader.states_of(f"{self.namespace}/{key}")

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """Try to take the fetch lock of an entry; returns the function that releases it, or None."""
        return _nothing if self.is_aside else self.directory.fetch_locks.try_acquire(entry)

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """Try to lock a span of an object; returns a function to release it, or a part that another process holds."""
        return _nothing if self.is_aside else self.directory.fetch_locks.claim(f"{self.namespace}/{key}", span)

    def write_version(self, entry: Entry) -> WriteVersion | None:
        """The write version of an entry, read before its fetch begins."""
        return None if self.is_aside else self.directory.fetch_locks.write_version(entry)

    async def publish(self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str = "") -> bool:
        """Store an entry with its validator, unless its key was written since the version was read."""
        if self.is_aside:
            return False
        return await self.directory.promptly(False, self.directory.publisher.publish, entry, data, version, validator)

    async def publish_soon(
        self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str, done: Callable[[], None]
    ) -> None:
        """As `publish`, but without waiting for it: the last to leave `fetching` does."""
        if self.is_aside:
            done()
        else:
            self.directory.write_behind.publish(PendingEntry(entry, data, version, validator, done=done))

    async def stored(self, key: str) -> None:
        """Wait until no publish of an object by this process is pending."""
        if not self.is_aside:
            await self.directory.write_behind.stored(f"{self.namespace}/{key}")

    @asynccontextmanager
    async def fetching(self) -> AsyncIterator[None]:
        """A context around a fetch; the last one to exit waits for pending publishes."""
        self._use_again()
        self.directory.write_behind.begin_fetch()
        try:
            yield
            await self.directory.write_behind.drain_if_last()
        finally:
            self.directory.write_behind.end_fetch()

    async def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if there is none."""
        return "" if self.is_aside else self.directory.reader.validator(entry)

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry, if ages matter."""
        if max_age != "infinity" and not self.is_aside:
            self.directory.reader.mark_validated(entry)

    async def begin_write(self, keys: Sequence[str]) -> list[Begun]:
        """Before the source of some keys is written."""
        return await self.directory.to_completion(
            self.directory.writes.begin_write, [f"{self.namespace}/{key}" for key in keys]
        )

    async def end_write(self, writes: Sequence[Any], values: Sequence[Data | None], max_size: int | None) -> None:
        """After the source of some keys was written."""
        await self.directory.to_completion(self.directory.writes.end_write, writes, values)

    async def invalidate(self, key: str, since: Any) -> WriteVersion | None:
        """Invalidate a key that changed at the source; returns the version to store it with."""
        return await self.directory.to_completion(self.directory.writes.invalidate, f"{self.namespace}/{key}", since)

    async def begin_delete(self, prefix: str, *, itself: bool = False) -> Deletion:
        """Before all keys beneath a prefix, and perhaps the prefix as a key, are deleted at the source."""
        full = f"{self.namespace}/{prefix}".rstrip("/")
        return await self.directory.to_completion(self.directory.writes.begin_delete, full, itself=itself)

    async def end_delete(self, begun: Any) -> None:
        """After all keys beneath a prefix were deleted at the source."""
        await self.directory.to_completion(self.directory.writes.end_delete, begun)

    async def apply_document(self, key: str, document: bytes | None, version: Any) -> WriteVersion | None:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""
        if self.is_aside:
            self.directory.metadata.apply_document_later(self.namespace, key, document)
            return None
        apply = self.directory.metadata.apply_document
        return await self.directory.to_completion(apply, self.namespace, key, document, version)

    async def unconfirmed(self, seen: Mapping[str, bytes]) -> list[str]:
        """Documents whose state elsewhere may differ from the state under which entries were cached here."""
        return await self.directory.promptly(list(seen), self.directory.metadata.unconfirmed, self.namespace, seen)

    async def confirm(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """Record, in this process, that unconfirmed documents were revalidated."""
        await self.directory.promptly(None, self.directory.metadata.confirm, self.namespace, seen, asked)

    async def is_document_missing(self, key: str, max_age: Age) -> bool:
        """Whether a document is known to be missing from a node that has other documents."""
        return await self.directory.promptly(
            False, self.directory.metadata.is_document_missing, self.namespace, key, max_age
        )

    def is_known_missing_nowait(self, key: str, max_age: Age) -> bool:
        """Like `is_known_missing`, without asking the index."""
        return not self.is_aside and self.directory.negative_cache.knows(f"{self.namespace}/{key}", max_age) is True

    async def is_known_missing(self, key: str, max_age: Age) -> bool:
        """Whether a chunk is known to be missing at the source."""
        negative_cache = self.directory.negative_cache
        if self.is_aside or not self.directory.may_serve:
            return False
        known = negative_cache.knows(full := f"{self.namespace}/{key}", max_age)
        return await self.directory.promptly(False, negative_cache.look, full, max_age) if known is None else known

    async def record_missing(self, key: str, version: WriteVersion) -> None:
        """Record that a chunk is missing at the source."""
        if self.directory.negative_cache.record_missing(f"{self.namespace}/{key}", version):
            self.directory.write_behind.add(self.directory.negative_cache.flush)

    async def record_document(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""
        await self.directory.promptly(None, self.directory.metadata.record_document, self.namespace, key, document)

    async def clear(self) -> None:
        """Forget all entries of this source, and no other's."""
        await self.directory.to_completion(self.directory.writes.drop, self.namespace)

    def info(self, *, exact: bool = True) -> dict[str, Any]:
        """The size and the number of entries of this source and of the whole cache; sizes in bytes.

        With `exact`, pending publishes are awaited. Otherwise nothing is awaited, and the figures may be slightly old.
        """
        if exact:
            if not self.is_aside:
                self.directory.write_behind.wait()
            if self.directory.is_made:
                self.directory.prepare()
                self.directory.flush()
            totals = self.directory.totals()
            count, size = self.directory.share(self.namespace)
        else:
            totals, (count, size) = self.directory.glance(self.namespace)
        return {
            "cache_store_type": "LockedLocalStore",
            "current_size": size,
            "tracked_keys": count,
            "cached_keys": count,
            "total_size": totals.size,
            "total_keys": totals.entries,
            "cache_directory": self.directory.root,
            "max_size": totals.max_size,
        }

    @property
    def is_open(self) -> bool:
        """Whether the directory is open, so that inspecting it creates nothing."""
        return self.directory.is_prepared

    @property
    def bound(self) -> int | None:
        """The bound of the whole directory, in bytes."""
        return self.directory.totals().max_size

    @property
    def evictions(self) -> int:
        return self.directory.space.evictions

    @property
    def faults(self) -> int:
        return self.directory.barrier.faults

    def is_same_cache(self, other: object) -> bool:
        """Whether another backend keeps its entries in the same place."""
        return isinstance(other, SharedBackend) and self.directory is other.directory


def _nothing() -> None:
    pass


def _is_fresh(found: Found, max_age: Age) -> bool:
    return is_fresh(found.opened.mtime_ns / 1e9, max_age)
