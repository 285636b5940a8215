"""A cache in any Zarr store that can delete, with its books in this process: what Zarr's own cache does, done right.

Keys are the source's keys as they are, so one such store serves one source. Byte ranges are kept in memory, in the same
bound, as Zarr keeps them. Nothing is shared with other processes.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from xzcache import _documents as documents
from xzcache._flights import Flights
from xzcache._keys import Entry, clip

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from xzcache._config import Age
    from xzcache._files import Data

logger = logging.getLogger("xzcache")

_SLOTS: Final = 4096
_RANGES_WITHOUT_BOUND: Final = 256 << 20
"""What byte ranges may take of memory, in bytes, where the cache has no bound."""


class _Record(NamedTuple):
    size: int
    inserted: float


class StoreBackend:
    """The books of a generic cache store.

    Parameters
    ----------
    cache_store : Store
    source : str
        The identity of the one source that it caches.

    Attributes
    ----------
    token : str
        What makes a pickled copy of a store equal to it, where the cache is in memory.

    Notes
    -----
    Safe for threads and event loops: the books are changed under a lock that is never held across an await. Space is
    taken in the books before a value is written, and given back after it is deleted.
    """

    def __init__(self, cache_store: Store, source: str) -> None:
        self.cache_store = cache_store
        self.token = uuid.uuid4().hex
        self.source = source
        self.flights: Flights[memoryview | None] = Flights()
        self.evictions = 0
        self.troubles = 0
        self._lock = threading.Lock()
        self._records: OrderedDict[Entry, _Record] = OrderedDict()
        self._ranges: dict[Entry, memoryview] = {}
        self._arriving: dict[str, int] = {}
        self._nodes: dict[str, bytes] = {}
        self._writes = [0] * _SLOTS
        self._drops = 0
        self._size = 0
        self._told = False

    def entry(self, key: str, start: int, stop: int) -> Entry | None:
        return Entry(key, start, stop)

    async def prepare(self) -> None:
        """Nothing has to be opened."""

    # -- finding

    async def find(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry, or of a span of the whole object, no older than `max_age` seconds."""
        data = await self._find_whole(entry.whole, max_age)
        if data is not None:
            if entry.is_whole:
                return data
            first, last = clip(entry.start, entry.stop, len(data))
            return data[first:last]
        if entry.is_whole:
            return None
        with self._lock:
            data = self._ranges.get(entry)
            if data is None or not self._is_fresh(self._records.get(entry), max_age):
                return None
            self._records.move_to_end(entry)
            return data

    async def _find_whole(self, entry: Entry, max_age: Age) -> memoryview | None:
        with self._lock:
            ticket = self._ticket(entry.key)
            if entry.key in self._arriving or not self._is_fresh(self._records.get(entry), max_age):
                return None
        try:
            value = await self.cache_store.get(entry.key, default_buffer_prototype())
        except Exception as error:
            self._trouble(error)
            return None
        with self._lock:
            if value is None or ticket != self._ticket(entry.key) or entry.key in self._arriving:
                return None
            if entry in self._records:
                self._records.move_to_end(entry)
            else:
                # left by an earlier process: from now on it counts
                self._records[entry] = _Record(len(value), time.time())
                self._size += len(value)
        return memoryview(value.to_bytes())

    @staticmethod
    def _is_fresh(record: _Record | None, max_age: Age) -> bool:
        # of what an earlier process left, nobody knows the age
        return max_age == "infinity" or (record is not None and 0 <= time.time() - record.inserted < max_age)

    # -- fetching once, publishing

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """No other process shares these books."""
        return lambda: None

    def _ticket(self, key: str) -> tuple[int, int]:
        return self._writes[hash(key) % _SLOTS], self._drops

    def ticket(self, entry: Entry) -> tuple[int, int] | None:
        """Take note of the writes so far, before a fetch begins."""
        return self._ticket(entry.key)

    async def publish(self, entry: Entry, data: Data, ticket: Any, max_size: int | None) -> bool:
        """Store an entry, unless it was written since the ticket was taken or is larger than the bound."""
        size = len(data)
        limit = max_size
        if limit is None and not entry.is_whole:
            limit = self._size + _RANGES_WITHOUT_BOUND - sum(map(len, list(self._ranges.values())))
        if limit is not None and size > limit:
            return False
        with self._lock:
            self._arriving[entry.key] = self._arriving.get(entry.key, 0) + 1
        try:
            await self._remove([entry])
            if not await self._take(size, limit):
                return False
            stored = False
            try:
                if entry.is_whole:
                    buffer = default_buffer_prototype().buffer.from_bytes(bytes(data))
                    await self.cache_store.set(entry.key, buffer)
                with self._lock:
                    stored = ticket == self._ticket(entry.key) and entry not in self._records
                    if stored:
                        self._records[entry] = _Record(size, time.time())
                        if not entry.is_whole:
                            self._ranges[entry] = memoryview(bytes(data))
                if not stored and entry.is_whole and entry not in self._records:
                    await self.cache_store.delete(entry.key)
            finally:
                if not stored:
                    with self._lock:
                        self._size -= size
            return stored
        except Exception as error:
            self._trouble(error)
            return False
        finally:
            with self._lock:
                self._arriving[entry.key] -= 1
                if not self._arriving[entry.key]:
                    del self._arriving[entry.key]

    async def _take(self, size: int, limit: int | None) -> bool:
        while True:
            with self._lock:
                if limit is None or self._size + size <= limit:
                    self._size += size
                    return True
                oldest = next(iter(self._records), None)
            if oldest is None or not await self._remove([oldest]):
                return False
            self.evictions += 1

    async def _remove(self, entries: list[Entry]) -> int:
        """Delete entries, and only then give their bytes back; returns how many there were."""
        removed = 0
        for entry in entries:
            with self._lock:
                record = self._records.pop(entry, None)
                self._ranges.pop(entry, None)
            if record is None:
                continue
            if entry.is_whole:
                try:
                    await self.cache_store.delete(entry.key)
                except BaseException:
                    with self._lock:
                        self._records[entry] = record
                        self._records.move_to_end(entry, last=False)
                    raise
            with self._lock:
                self._size -= record.size
            removed += 1
        return removed

    # -- writes

    async def begin(self, key: str) -> tuple[int, int] | None:
        """Before the source of a key is written: forget it."""
        return await self._forget(key, None)

    async def end(self, key: str, begun: Any, value: Data | None, max_size: int | None) -> None:
        """After the source of a key was written: forget what was filled meanwhile, and store the new value."""
        ticket = await self._forget(key, begun)
        if value is not None and ticket is not None:
            await self.publish(Entry(key), value, ticket, max_size)

    async def _forget(self, key: str, begun: Any) -> tuple[int, int] | None:
        with self._lock:
            undisturbed = begun is None or begun == self._ticket(key)
            self._writes[hash(key) % _SLOTS] += 1
            ticket = self._ticket(key)
            entries = [e for e in self._records if e.key == key] if self._ranges else [Entry(key)]
        try:
            await self._remove(entries)
            # an earlier process may have left it, unknown to our books
            await self.cache_store.delete(key)
        except Exception as error:
            self._trouble(error)
        return ticket if undisturbed else None

    async def drop(self, prefix: str) -> None:
        """Forget everything beneath a prefix; everything there is for an empty one."""
        beneath = f"{prefix}/" if prefix else ""
        with self._lock:
            self._drops += 1
            entries = [e for e in self._records if e.key.startswith(beneath)]
            for node in [n for n in self._nodes if not prefix or n == prefix or n.startswith(beneath)]:
                del self._nodes[node]
        try:
            await self._remove(entries)
            with suppress(NotImplementedError, FileNotFoundError):
                await self.cache_store.delete_dir(prefix)
        except Exception as error:
            self._trouble(error)

    async def clear(self) -> None:
        """Forget everything."""
        await self.drop("")

    async def compare(self, key: str, document: bytes | None) -> None:
        """Drop what is beneath every array that a metadata document shows to have changed."""
        described = documents.describe(key, document)
        changed = [path for path, digest in described.arrays.items() if self._nodes.get(path) != digest]
        if described.complete_beneath is not None:
            beneath = f"{described.complete_beneath}/" if described.complete_beneath else ""
            changed += [n for n in list(self._nodes) if n.startswith(beneath) and n not in described.arrays]
        own = key.rpartition("/")[0]
        if not described.arrays and documents.says_absent(key, self._nodes.get(own, b"")):
            changed.append(own)
        for path in changed:
            beneath = f"{path}/" if path else ""
            if path in self._nodes or any(e.key.startswith(beneath) for e in list(self._records)):
                await self.drop(path)
        self._nodes.update(described.arrays)

    async def note(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""
        self._nodes.update(documents.describe(key, document).arrays)

    # -- looking

    def info(self) -> dict[str, Any]:
        """What is cached; sizes in bytes."""
        with self._lock:
            return {
                "cache_store_type": type(self.cache_store).__name__,
                "current_size": self._size,
                "tracked_keys": len(self._records),
                "cached_keys": len(self._records),
                "total_size": self._size,
                "total_keys": len(self._records),
                "cache_directory": None,
            }

    @property
    def bound(self) -> int | None:
        return None

    def _trouble(self, error: Exception) -> None:
        self.troubles += 1
        if not self._told:
            self._told = True
            logger.warning("trouble with the cache store, reads go to the source: %s: %s", type(error).__name__, error)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoreBackend) or type(self.cache_store) is not type(other.cache_store):
            return False
        if isinstance(self.cache_store, MemoryStore):
            return self.token == other.token
        return bool(self.cache_store == other.cache_store)

    __hash__ = None  # type: ignore[assignment]  # as mutable as the store that it serves


class _Binding(NamedTuple):
    """What a cache store is used for, for as long as it lives."""

    store: weakref.ref[Store]
    source: str
    backend: weakref.ref[StoreBackend]


_bindings: Final[dict[int, _Binding]] = {}
_registry = threading.Lock()


def store_backend(cache_store: Store, source: str) -> StoreBackend:
    """The books of a cache store: the same ones, for every store that caches in it.

    Raises
    ------
    ValueError
        It caches another source already: with bare keys, the two would be mixed.
    """
    number = id(cache_store)
    with _registry:
        known = _bindings.get(number)
        if known is not None and known.store() is cache_store:
            if known.source != source:
                raise ValueError(
                    f"cache_store={type(cache_store).__name__} caches {known.source} already and cannot cache "
                    f"{source} as well: give each source a cache store of its own, or a directory, which keeps "
                    "sources apart"
                )
            if (backend := known.backend()) is not None:
                return backend
        backend = StoreBackend(cache_store, source)
        # the binding goes with the store, whose number may be given to another then
        reference = weakref.ref(cache_store, lambda _: _bindings.pop(number, None))
        _bindings[number] = _Binding(reference, source, weakref.ref(backend))
        return backend
