"""A cache in any Zarr store that can delete, with its books in this process: what Zarr's own cache does, done right.

Keys are the source's keys as they are, so one such store serves one source. Byte ranges are kept in memory, in the same
bound, as Zarr keeps them. Nothing is shared with other processes.
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

from xzcache.anystore._ledger import Ledger, Nodes, Ticket
from xzcache.model import Claims, Entry, Flights, Listed, clip, fits, report_bug, through, within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from zarr.abc.store import Store

    from xzcache._config import Age
    from xzcache.model import Data, Span


# -- What is simple where no other process shares a cache: nobody to wait for, and notes that one table holds.


class Alone:
    """The part of a backend that is about other processes, and about what the source does not have."""

    is_open = True
    _nodes: Nodes

    def __init__(self) -> None:
        self.flights: Flights[memoryview | None] = Flights()
        self.claims = Claims()
        self.evictions = self.troubles = 0
        # keys that are being written, and prefixes that end with a slash
        self._written: Counter[str] = Counter()

    async def prepare(self) -> None:
        """Nothing has to be opened."""

    def at_once(self, key: str, max_age: Age) -> memoryview | None:
        """What the store that caches has to be asked for is never to be had at once."""
        return None

    def into(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """Nor into bytes that somebody has."""
        return False

    def find_now(self, entry: Entry, max_age: Age) -> memoryview | None:
        """Nor by a thread, which is not the one of that store's event loop."""
        return None

    def lead(self, entry: Entry) -> Callable[[], None] | None:
        """No other process shares these books."""
        return lambda: None

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """As `lead`, of some bytes of an object."""
        return lambda: None

    def _write_begins(self, *written: str) -> None:
        self._written.update(written)

    def _write_ends(self, *written: str) -> None:
        self._written -= Counter(written)

    def _is_being_written(self, key: str) -> bool:
        return bool(self._written) and any(
            key == written or (written.endswith("/") and key.startswith(written)) for written in list(self._written)
        )

    async def doubtful(self, seen: Mapping[str, bytes]) -> list[str]:
        """No other process shares these books, so there is nothing that it could not know of."""
        return []

    async def settled(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """There were no doubts."""

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """While somebody fetches what is not cached."""
        return nullcontext()

    async def is_absent(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a document of a node that it has."""
        return self._nodes.is_absent(key, max_age)

    def lacks_now(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a chunk."""
        return self._nodes.lacks(key, max_age)

    async def lacks(self, key: str, max_age: Age) -> bool:
        """As `lacks_now`."""
        return self._nodes.lacks(key, max_age)

    async def note_lack(self, key: str, ticket: Any) -> None:
        """Remember that the source does not have a chunk."""
        self._nodes.note_lack(key, ticket)

    async def note(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""
        self._nodes.note(key, document)


# -- The cache itself.

logger = logging.getLogger("xzcache.anystore")

_RANGES_WITHOUT_BOUND: Final = 256 << 20  # bytes that byte ranges may take of memory where the cache has no bound


class StoreBackend(Alone):
    """A generic cache store and its books.

    Parameters
    ----------
    cache_store : Store
    source : str
        The namespace of the one source that it caches; its keys do not carry it.

    Notes
    -----
    Safe for threads and event loops. Space is taken before a value is written, and given back after it is deleted.
    """

    evicts = True
    bound: int | None = None  # the store that caches here says how much it may

    def __init__(self, cache_store: Store, source: str) -> None:
        self.cache_store = cache_store
        # what makes a pickled copy of a store equal to it, where the cache is in memory
        self.token = uuid.uuid4().hex
        self.namespace = source
        super().__init__()
        self._ledger = Ledger()
        self._nodes = Nodes(self._ledger)
        self._told: set[type[Exception]] = set()
        self._distrusted: set[str] = set()
        self._distrusts_all = False

    def entry(self, key: str, start: int, stop: int) -> Entry | None:
        """The entry of a span of an object."""
        return Entry(key, start, stop)

    # -- finding

    async def find(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry, or of a span of the whole object, no older than `max_age` seconds."""
        data = await self._find_whole(entry.whole, max_age)
        if data is not None:
            return data[slice(*clip(entry.start, entry.stop, len(data)))]
        if entry.is_whole:
            return None
        ticket = self._ledger.ticket(entry.key)
        for piece in self.listed(entry.key).covering(entry):
            if self._ledger.may_serve(piece, max_age):
                data = self._ledger.data(piece)
                if data is not None and self._ledger.used(piece, len(data), ticket):
                    return data[slice(*within(entry, piece, len(data)))]
        return None

    def listed(self, key: str) -> Listed:
        """The byte ranges that are cached of an object."""
        return Listed(key, [(piece.start, piece.stop) for piece in self._ledger.pieces(key)])

    def states_of(self, key: str) -> set[str]:
        """The validators of what is cached of an object; an empty one where the state of that is unknown."""
        return {self._ledger.validator(entry) for entry in self._ledger.of_key(key)}

    async def _find_whole(self, entry: Entry, max_age: Age) -> memoryview | None:
        ticket = self._ledger.ticket(entry.key)
        if self._distrusts_all or entry.key in self._distrusted or not self._ledger.may_serve(entry, max_age):
            return None
        try:
            value = await self.cache_store.get(entry.key, default_buffer_prototype())
        except Exception as error:
            self._trouble(error)
            return None
        if value is None or not self._ledger.used(entry, len(value), ticket):
            return None
        return memoryview(value.to_bytes())

    async def size(self, entry: Entry, max_age: Age) -> int | None:
        """The size of a whole object that `find` would find, in bytes."""
        if self._distrusts_all or entry.key in self._distrusted or not self._ledger.may_serve(entry, max_age):
            return None
        try:
            return await self.cache_store.getsize(entry.key)
        except FileNotFoundError:
            return None
        except Exception as error:
            self._trouble(error)
            return None

    async def validator(self, entry: Entry) -> str:
        """What tells the cached state of an entry from others; empty where nothing does."""
        return self._ledger.validator(entry)

    async def renew(self, entry: Entry, max_age: Age) -> None:
        """Let the age of an entry begin anew."""
        self._ledger.renew(entry)

    # -- fetching once, publishing

    def ticket(self, entry: Entry) -> Ticket | None:
        """Take note of the writes so far, before a fetch begins."""
        return self._ledger.ticket(entry.key)

    async def publish(self, entry: Entry, data: Data, ticket: Any, max_size: int | None, validator: str = "") -> bool:
        """Store an entry, unless it was written since the ticket was taken or is larger than the bound."""
        if self._is_being_written(entry.key):
            # nobody can tell whether it is of before or of after the write
            return False
        size, limit = len(data), max_size
        if limit is None and not entry.is_whole:
            limit = self._ledger.size - self._ledger.in_memory + _RANGES_WITHOUT_BOUND
        if (limit is not None and size > limit) or not self._ledger.arrive(entry.key):
            return False
        # from here on no other thread stores anything of the object
        others = [self._ledger.validator(other) for other in self._ledger.of_key(entry.key) if other != entry]
        if not all(fits(validator, other) for other in others):
            # parts of two states of an object must not be mixed
            self._ledger.arrived(entry.key)
            return False
        # once begun, it comes to its end: half a store would be taken for what an earlier process left
        stored, cancelled = await through(self._publish(entry, data, ticket, limit, validator))
        if cancelled:
            raise asyncio.CancelledError
        return stored

    async def publish_soon(
        self, entry: Entry, data: Data, ticket: Any, max_size: int | None, validator: str, done: Callable[[], None]
    ) -> None:
        """As `publish`: a cache store has to be written by the event loop that it belongs to."""
        try:
            await self.publish(entry, data, ticket, max_size, validator)
        finally:
            done()

    async def stored(self, key: str) -> None:
        """As the backend of a directory has it: here a fetch ends when its bytes are stored."""

    async def _publish(self, entry: Entry, data: Data, ticket: Ticket, limit: int | None, validator: str) -> bool:
        try:
            await self._remove([entry])
            return await self._take(len(data), limit) and await self._put(entry, data, ticket, validator)
        except Exception as error:
            # nobody knows what the cache store holds now
            self._distrusted.add(entry.key)
            self._trouble(error)
            return False
        finally:
            self._ledger.arrived(entry.key)

    async def _put(self, entry: Entry, data: Data, ticket: Ticket, validator: str) -> bool:
        """Write an entry whose space was taken, and record it."""
        stored = False
        try:
            if entry.is_whole:
                buffer = default_buffer_prototype().buffer.from_bytes(bytes(data))
                await self.cache_store.set(entry.key, buffer)
            in_memory = None if entry.is_whole else memoryview(bytes(data))
            stored = self._ledger.enter(entry, len(data), in_memory, ticket, validator)
            if stored:
                self._distrusted.discard(entry.key)
            if not stored and entry.is_whole and entry not in self._ledger:
                await self.cache_store.delete(entry.key)
        finally:
            logger.debug("%spublished %s: %d bytes", "" if stored else "not ", entry, len(data))
            if not stored:
                self._ledger.give(len(data))
        return stored

    async def _take(self, size: int, limit: int | None) -> bool:
        while not (answer := self._ledger.take(size, limit)).taken:
            if not self.evicts or answer.oldest is None or not await self._remove([answer.oldest]):
                return False
            self.evictions += 1
            logger.debug("evicted %s", answer.oldest)
        return True

    async def _remove(self, entries: list[Entry]) -> int:
        """Delete entries, and only then give their bytes back; returns how many there were."""
        removed = 0
        for entry in entries:
            record = self._ledger.pop(entry)
            if record is None:
                continue
            if entry.is_whole:
                try:
                    await self.cache_store.delete(entry.key)
                except BaseException:
                    self._ledger.put_back(entry, record)
                    raise
            self._ledger.give(record.size)
            removed += 1
        return removed

    # -- writes

    async def begin(self, keys: Sequence[str]) -> list[tuple[str, Ticket | None]]:
        """Before the source of some keys is written: forget them."""
        self._write_begins(*keys)
        return [(key, await self._forget(key)) for key in keys]

    async def end(self, writes: Sequence[Any], values: Sequence[Data | None], max_size: int | None) -> None:
        """After the source of some keys was written: forget what was filled meanwhile, and store the new values."""
        self._write_ends(*(key for key, _ in writes))
        for (key, begun), value in zip(writes, values, strict=True):
            ticket = await self.forget(key, begun)
            if value is not None and ticket is not None:
                await self.publish(Entry(key), value, ticket, max_size)

    async def forget(self, key: str, since: Any) -> Ticket | None:
        """Forget a key whose value turned out to be another; a ticket to store it with."""
        alone = since is not None and since == self._ledger.ticket(key)
        ticket = await self._forget(key)
        return ticket if alone else None

    async def begin_drop(self, prefix: str, *, itself: bool = False) -> tuple[str, Sequence[Any]]:
        """Before all keys beneath a prefix, and perhaps the prefix as a key, are deleted at the source."""
        begun = await self.begin([prefix]) if itself else []
        self._write_begins(f"{prefix}/")
        await self.drop(prefix)
        return prefix, begun

    async def end_drop(self, begun: Any) -> None:
        """After they were deleted."""
        prefix, writes = begun
        self._write_ends(f"{prefix}/")
        await self.drop(prefix)
        await self.end(writes, [None] * len(writes), None)

    async def _forget(self, key: str) -> Ticket | None:
        ticket = self._ledger.count_write(key)
        self._nodes.forget_absence(key)
        logger.debug("invalidated %s", key)
        try:
            await self._remove(self._ledger.of_key(key))
            # an earlier process may have left it
            await self.cache_store.delete(key)
            self._distrusted.discard(key)
        except Exception as error:
            # what cannot be deleted is not served any more
            self._distrusted.add(key)
            self._trouble(error)
            return None
        return ticket

    async def clear(self) -> None:
        """Forget everything."""
        await self.drop("")

    async def drop(self, prefix: str) -> None:
        """Forget everything beneath a prefix; everything there is for an empty one."""
        self._ledger.count_drop()
        self._nodes.forget(prefix)
        logger.debug("invalidated %s/", prefix)
        try:
            await self._remove(self._ledger.beneath(prefix))
            await self.cache_store.delete_dir(prefix)
            self._distrusts_all = self._distrusts_all and bool(prefix)
        except Exception as error:
            self._distrusts_all = True
            self._trouble(error)

    async def compare(self, key: str, document: bytes | None, ticket: Any) -> Ticket | None:
        """Drop what a metadata document of the source shows to have changed; the ticket to publish it with."""
        return await self._nodes.compare(key, document, ticket, self.drop)

    def close(self) -> None:
        """Nothing is open."""

    # -- looking

    def info(self, *, exact: bool = True) -> dict[str, Any]:
        """What is cached; sizes in bytes. It is always exact."""
        size, count = self._ledger.size, len(self._ledger)
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

    def _trouble(self, error: Exception) -> None:
        self.troubles += 1
        if not report_bug(error, "the cache store; reads go to the source") and type(error) not in self._told:
            self._told.add(type(error))
            logger.warning("trouble with the cache store, reads go to the source: %s: %s", type(error).__name__, error)

    def is_same_cache(self, other: object) -> bool:
        """Whether another backend keeps its entries in the same place."""
        if not isinstance(other, StoreBackend) or type(self.cache_store) is not type(other.cache_store):
            return False
        if isinstance(self.cache_store, MemoryStore):
            return self.token == other.token
        return bool(self.cache_store == other.cache_store)
