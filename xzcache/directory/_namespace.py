"""One source's part of a cache directory: it moves blocking work from the event loop to threads."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from xzcache import _threads as pool
from xzcache._config import is_fresh
from xzcache._fork import renew_after_fork
from xzcache.directory._invalidation import Deletion
from xzcache.directory._publish import PendingEntry
from xzcache.files import allowance
from xzcache.model import MISSING, Entry, Listed, is_document, nothing, within

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from xzcache._config import Age
    from xzcache.directory._directory import CacheDirectory
    from xzcache.directory._fetchlocks import WriteVersion
    from xzcache.directory._invalidation import Begun
    from xzcache.directory._writebehind import WriteBehind
    from xzcache.files import Found
    from xzcache.model import Absence, Array, Cached, Data, Extent, ReadCounters, Span


_INLINE: Final = 1 << 20
"""Up to this many bytes are read on the event loop, where they are in memory: a thread would take longer to wake."""


class SharedBackend:
    """The entries of one namespace of a cache directory.

    `namespace` is the path component of the source. `lasting` tells that other processes have the same source.
    """

    def __init__(self, directory: CacheDirectory, namespace: str, *, lasting: bool = True) -> None:
        self.directory = directory
        self.namespace = namespace
        self.prefix = f"{namespace}/"
        self._use = directory.used_by(self)
        # statistics of a source in memory are kept without its name: no later process could ask for them by it
        self._lasting = namespace if lasting else None
        if not lasting:
            renew_after_fork(self)

    def after_fork_in_child(self) -> None:
        """Change the namespace: a source in memory differs between parent and child."""
        self.namespace = f"{self.namespace}-{os.getpid()}"
        self.prefix = f"{self.namespace}/"

    @property
    def cache_id(self) -> object:
        """The directory, of which a process has one object."""
        return self.directory

    @property
    def is_aside(self) -> bool:
        """Whether the disk is put aside, so that reads find no entry."""
        return self.directory.health.is_aside

    async def prepare(self) -> None:
        """Open the directory, where that was not done yet."""
        if self.directory.wants_preparing:
            self._use_again()
            await self.directory.prepare_promptly()

    def count(self, counters: ReadCounters) -> None:
        """Add the reads of these counters to the statistics of the directory, from now on."""
        self.directory.ledger.count(counters, self, self._lasting)

    def record_fetch(self, began: float) -> None:
        """Record that a request to the source has just ended, which began at a time of `time.perf_counter`."""
        self.directory.ledger.fetched(self._lasting, began)

    def close(self) -> None:
        """Leave the directory soon unless it has other users; the next use joins again."""
        self._use()

    def _use_again(self) -> None:
        if not self._use.alive:
            self._use = self.directory.used_by(self)

    def get_nowait(
        self,
        extent: Extent,
        max_age: Age,
        missing_max_age: Age = 0,
        *,
        place: Array | None = None,
        patient: bool = False,
    ) -> Array | Literal[Absence.MISSING] | None:
        """A cached value that can be read without waiting for anything but, with `patient`, the disk."""
        directory = self.directory
        # attributes in memory only: this is asked for each hit
        if directory.health.is_aside or not directory.is_ready:
            return None
        max_age_ns = None if max_age == "infinity" else int(max_age * 1e9)
        found = directory.reader.get_nowait(extent, max_age_ns, place, most=_INLINE, patient=patient)
        if found is None:
            return self._get_patiently(Entry(*extent), max_age, missing_max_age) if patient and place is None else None
        data, used, now = found
        # as `record_use`, in which a call would be felt
        recency = directory.recency
        recency.uses[used] = now
        if (now >= recency.due_at or len(recency.uses) >= recency.most) and recency.is_due(now):
            pool.spawn(directory.flush)
        return data

    def are_at_hand(self, keys: Iterable[str], max_age: Age, missing_max_age: Age = 0) -> bool:
        """Whether whole objects of all keys can be read without waiting for anything but the disk."""
        directory = self.directory
        if directory.health.is_aside or not directory.is_ready:
            return False
        max_age_ns = None if max_age == "infinity" else int(max_age * 1e9)
        reader, prefix, absent = directory.reader, self.prefix, directory.negative_cache
        return all(
            reader.is_at_hand(prefix + key, max_age_ns)
            or (missing_max_age != 0 and bool(absent.knows(prefix + key, missing_max_age)))
            for key in keys
        )

    def _get_patiently(
        self, entry: Entry, max_age: Age, missing_max_age: Age
    ) -> Array | Literal[Absence.MISSING] | None:
        reader = self.directory.reader
        for found in reader.open_covering(entry):
            if not _is_fresh(found, max_age):
                reader.close(found)
                continue
            span = (0, found.size) if found.entry == entry else within(entry, found.entry, found.size)
            if (data := reader.read(found, *span)) is not None:
                self._record_use(found.entry)
                return np.frombuffer(data, np.uint8)
        is_missing = missing_max_age != 0 and self.directory.negative_cache.knows(entry.key, missing_max_age)
        return MISSING if is_missing else None

    async def get_checked(self, entry: Entry, max_age: Age, missing_max_age: Age = 0) -> Cached:
        """Like `get`, but also checks bytes that this process has checked before."""
        return await self.get(entry, max_age, missing_max_age, anew=True)

    async def get(self, entry: Entry, max_age: Age, missing_max_age: Age = 0, *, anew: bool = False) -> Cached:
        """The bytes of an entry that is cached, no older than `max_age` seconds and sound; else None."""
        directory = self.directory
        if directory.health.is_aside or not directory.may_serve:
            return None
        reader = directory.reader
        for found in reader.open_covering(entry):
            if not _is_fresh(found, max_age):
                # another file that holds it may be younger
                reader.close(found)
            elif (data := await self._read(found._replace(known=False) if anew else found, entry)) is not None:
                self._record_use(found.entry)
                return data
        return MISSING if missing_max_age != 0 and await self._is_missing(entry.key, missing_max_age) else None

    def _record_use(self, entry: Entry) -> None:
        if self.directory.recency.record_use(entry):
            pool.spawn(self.directory.flush)

    async def _is_missing(self, full: str, max_age: Age) -> bool:
        """Whether a key is known to be missing at the source."""
        directory = self.directory
        key = full[len(self.prefix) :]
        if is_document(key):
            return await directory.promptly(False, directory.metadata.is_document_missing, self.namespace, key, max_age)
        known = directory.negative_cache.knows(full, max_age)
        return await directory.promptly(False, directory.negative_cache.look, full, max_age) if known is None else known

    async def _read(self, found: Found, entry: Entry) -> memoryview | None:
        reader = self.directory.reader
        first, last = (0, found.size) if found.entry == entry else within(entry, found.entry, found.size)
        # the checksum is over the whole file, so the first read of a process reads all of it
        if (last - first if found.known else found.size) <= _INLINE:
            done, data = reader.read_now(found, first, last)
            if done:
                return data
        patience = allowance(found.size)
        return await self.directory.promptly(None, reader.read, found, first, last, patience=patience)

    def parts(self, key: str) -> DirectoryParts:
        """The cached parts of an object."""
        return DirectoryParts(self.directory, f"{self.prefix}{key}")

    def acquire(self, key: str, span: Span, *, exactly: bool = True) -> Callable[[], None] | Span:
        """Try to lock a span of an object; returns a function to release it, or a part that another process holds."""
        if self.directory.health.is_aside:
            return nothing
        return self.directory.fetch_locks.acquire(f"{self.prefix}{key}", span, exactly=exactly)

    def write_version(self, key: str) -> WriteVersion | None:
        """The write version of a key, read before its fetch begins."""
        directory = self.directory
        return None if directory.health.is_aside else directory.fetch_locks.write_version(f"{self.prefix}{key}")

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
        """Store an entry, or its absence, in the background; the last to leave `fetching` waits for it."""
        directory = self.directory
        if version is None or directory.health.is_aside:
            done()
        elif data is not None:
            directory.write_behind.publish(PendingEntry(entry, data, version, validator, done=done, age=age))
        else:
            if directory.negative_cache.record_missing(entry.key, version):
                # one job for all chunks that are recorded until it runs: each alone would cost a transaction
                directory.write_behind.add(directory.negative_cache.flush)
            done()

    async def stored(self, key: str) -> None:
        """Wait until no publish of an object by this process is pending."""
        if not self.directory.health.is_aside:
            await self.directory.write_behind.stored(f"{self.prefix}{key}")

    def fetching(self) -> WriteBehind:
        """A context around a fetch; the last one to exit waits for pending publishes."""
        # the store was closed, and is used again: a directory without users would be left during the fetch
        if not self._use.alive:
            self._use_again()
        return self.directory.write_behind

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry, if ages matter; the age of a document also dates data that is read offline."""
        matters = max_age != "infinity" or is_document(entry.key[len(self.prefix) :])
        if matters and not self.is_aside:
            self.directory.reader.mark_validated(entry)

    async def begin_write(self, keys: Sequence[str], beneath: str | None = None) -> list[Begun] | Deletion:
        """Before the source of some keys, or all keys beneath a path, are written."""
        directory = self.directory
        if beneath is None:
            # in a thread and to its end, even if the task is cancelled: the row of a write must not be half added
            full_keys = [f"{self.prefix}{key}" for key in keys]
            return await directory.completed_together(directory.begun_writes, full_keys)
        full = f"{self.prefix}{beneath}".rstrip("/")
        if keys:
            (deletion,) = await directory.completed_together(directory.begun_deletes, [(full, True)])
        else:
            # apart: what lies beneath a path may be much, for which those of single keys would wait
            (deletion,) = await directory.to_completion(directory.writes.begin_deletes, [(full, False)])
        return deletion

    async def end_write(self, begun: Any, values: Sequence[Data | None] = ()) -> None:
        """After the source of these keys was written."""
        directory = self.directory
        if isinstance(begun, Deletion):
            if begun.keys:
                await directory.completed_together(directory.ended_deletes, [begun])
            else:
                await directory.to_completion(directory.writes.end_deletes, [begun])
        else:
            ended = list(zip(begun, values or [None] * len(begun), strict=True))
            await directory.completed_together(directory.ended_writes, ended)

    async def invalidate(self, key: str, since: Any) -> WriteVersion | None:
        """Invalidate a key that changed at the source; returns the version to store it with."""
        return await self.directory.to_completion(self.directory.writes.invalidate, f"{self.prefix}{key}", since)

    async def apply_document(
        self, key: str, document: bytes | None, version: Any, *, is_written: bool = False
    ) -> WriteVersion | None:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""
        directory, tracker = self.directory, self.directory.metadata
        if is_written:
            if document is not None:
                await directory.promptly(None, tracker.record_document, self.namespace, key, document)
            return None
        if directory.health.is_aside:
            tracker.apply_document_later(self.namespace, key, document)
            return None
        return await directory.to_completion(tracker.apply_document, self.namespace, key, document, version)

    async def unconfirmed(self, seen: Mapping[str, bytes], asked: Collection[str] = ()) -> list[str]:
        """Documents whose state elsewhere may differ from the state under which entries were cached here."""
        tracker = self.directory.metadata
        if asked:
            await self.directory.promptly(None, tracker.confirm, self.namespace, seen, asked)
            return [key for key in seen if key not in asked]
        return await self.directory.promptly(list(seen), tracker.unconfirmed, self.namespace, seen)

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
                self.directory.flush(everything=True)
        look = self.directory.figures if exact else self.directory.glance
        totals, (count, size) = look(self.namespace)
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


class DirectoryParts:
    """The cached parts of one object in a directory."""

    def __init__(self, directory: CacheDirectory, key: str) -> None:
        self._directory = directory
        self._reader = None if directory.health.is_aside else directory.reader
        self._key = key

    @property
    def _is_known_empty(self) -> bool:
        """Whether `is_empty` was asked before, and was true."""
        return bool(self.__dict__.get("is_empty", False))

    @cached_property
    def is_empty(self) -> bool:
        """Whether there certainly are none."""
        return self._reader is None or self._reader.lacks(self._key)

    @cached_property
    def pieces(self) -> Listed:
        """The cached byte ranges."""
        return Listed(self._key, ()) if self._reader is None or self._is_known_empty else self._reader.listed(self._key)

    @cached_property
    def states(self) -> set[str]:
        """The validators of all parts; an empty string stands for an unknown state."""
        return set() if self._reader is None or self._is_known_empty else self._reader.states_of(self._key)

    def validator(self, entry: Entry) -> str:
        """The validator of a cached entry at this moment; empty if it has none."""
        return "" if self._reader is None else self._reader.validator(entry)

    def size(self, max_age: Age) -> int | None:
        """The size of the whole object; the file is not read."""
        reader = self._reader
        if reader is None or not self._directory.may_serve or (found := reader.open_entry(Entry(self._key))) is None:
            return None
        if not _is_fresh(found, max_age):
            reader.close(found)
            return None
        return reader.size(found)

    def validated(self, entry: Entry | None = None) -> float | None:
        """When the oldest file that an entry, or the whole object, is served from was stored or confirmed."""
        reader, times = self._reader, []
        if reader is None or not self._directory.may_serve:
            return None
        for found in reader.open_covering(entry or Entry(self._key)):
            reader.close(found)
            times.append(found.opened.mtime_ns / 1e9)
        return min(times, default=None)


def _is_fresh(found: Found, max_age: Age) -> bool:
    return is_fresh(found.opened.mtime_ns / 1e9, max_age)
