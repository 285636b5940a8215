"""Reading through a cache: from the cache if it may be, else once from the source, for all who wait."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.core.buffer import default_buffer_prototype

from xzcache._documents import is_document
from xzcache._flights import Flight, HandedOver
from xzcache._keys import clip, span

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._anystore import StoreBackend
    from xzcache._config import Age, Revalidate
    from xzcache._keys import Entry
    from xzcache._shared import SharedBackend
    from xzcache._stats import Stats

_FIRST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.005


class Freshness:
    """Which documents have been asked for again, by one opened store.

    Parameters
    ----------
    revalidate : {"open", True, False} or float
    inherited : bool
        Whether the documents were asked for by the store that this one is a copy of.
    """

    def __init__(self, revalidate: Revalidate, *, inherited: bool = False) -> None:
        self.revalidate = revalidate
        self._asked: dict[str, float] = {}
        self._opened = time.monotonic() if inherited else None

    def must_ask(self, key: str) -> bool:
        """Whether the source has to be asked for a key whatever the cache holds."""
        policy = self.revalidate
        if policy is True or policy is False:
            return policy
        if not is_document(key):
            return False
        asked = self._asked.get(key, self._opened)
        return asked is None or (policy != "open" and time.monotonic() - asked >= policy)

    def note(self, key: str) -> None:
        """Remember that what is cached of a document is what the source has."""
        if is_document(key):
            self._asked[key] = time.monotonic()


class ReadThrough:
    """Reads of one source through one backend.

    Parameters
    ----------
    source : Store
    backend : SharedBackend or StoreBackend
    freshness : Freshness
    stats : Stats
    max_age : float or "infinity"
        Seconds for which an entry is served.
    max_size : int or None
        The bound of a backend that is not bounded by itself, in bytes.
    timeout : float
        Seconds to wait for another process's fetch.

    Notes
    -----
    The leader of a fetch is found in two steps: among the tasks and threads of this process by a table of futures, then
    among processes by a lock on a byte that stands for the entry, which is polled and never waited for on the loop.
    """

    def __init__(
        self,
        source: Store,
        backend: SharedBackend | StoreBackend,
        *,
        freshness: Freshness,
        stats: Stats,
        max_age: Age,
        max_size: int | None,
        timeout: float,
    ) -> None:
        self.source = source
        self.backend = backend
        self.freshness = freshness
        self.stats = stats
        self._max_age = max_age
        self.max_size = max_size
        self._timeout = timeout

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        """The value of a key or a byte range of it, as `Store.get`."""
        started = time.perf_counter()
        wanted = span(byte_range)
        entry = None if wanted is None else self.backend.entry(key, *wanted)
        if wanted is None or entry is None:
            return await self._from_source(key, prototype, byte_range, started)
        if not entry.is_whole and is_document(key):
            # only a whole document can be compared
            value = await self.get(key, prototype, None)
            return None if value is None else value[slice(*clip(*wanted, len(value)))]
        await self.backend.prepare()
        if self.freshness.must_ask(key):
            return await self._ask(key, entry, prototype, byte_range, started)
        data = await self.backend.find(entry, self._max_age)
        if data is None and is_document(key) and await self.backend.is_absent(key, self._max_age):
            self.stats.hit(0, time.perf_counter() - started)
            return None
        if data is None:
            return await self._fetch(key, entry, prototype, byte_range, started)
        self.stats.hit(len(data), time.perf_counter() - started)
        return prototype.buffer.from_bytes(data)

    async def cached_size(self, key: str) -> int | None:
        """The size of a value, in bytes, if it is cached and may be served; else None."""
        entry = self.backend.entry(key, *whole())
        if entry is None or self.freshness.must_ask(key):
            return None
        await self.backend.prepare()
        return await self.backend.size(entry, self._max_age)

    async def _from_source(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, started: float
    ) -> Buffer | None:
        value = await self.source.get(key, prototype, byte_range)
        self.stats.miss(0 if value is None else len(value), time.perf_counter() - started)
        return value

    # -- what is not cached

    async def _fetch(
        self, key: str, entry: Entry, prototype: BufferPrototype, byte_range: ByteRequest | None, started: float
    ) -> Buffer | None:
        while True:
            # a fetch that began before a write is no fetch to wait for after it: writes so far are part of its name
            ticket = self.backend.ticket(entry)
            if ticket is None:
                return await self._lead(Flight(), None, key, entry, prototype, byte_range, started)
            flight, leads = self.backend.flights.join((entry, ticket))
            if leads:
                return await self._lead(flight, ticket, key, entry, prototype, byte_range, started)
            try:
                data = await asyncio.wait_for(flight.outcome(), self._timeout)
            except HandedOver:
                data = await self.backend.find(entry, self._max_age)
                if data is None:
                    continue
            except TimeoutError:
                # whoever fetches may never come back, as when its event loop was stopped
                return await self._lead(Flight(), ticket, key, entry, prototype, byte_range, started)
            self.stats.hit(0 if data is None else len(data), time.perf_counter() - started)
            return None if data is None else prototype.buffer.from_bytes(data)

    async def _lead(
        self,
        flight: Flight[memoryview | None],
        ticket: Any,
        key: str,
        entry: Entry,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        started: float,
    ) -> Buffer | None:
        """Fetch for all who wait in this process, unless another process does or has done so."""
        unlock: Callable[[], None] | None = None
        began = ticket
        try:
            unlock, data = await self._win(entry)
            if data is not None:
                self.stats.hit(len(data), time.perf_counter() - started)
                flight.land(data)
                return prototype.buffer.from_bytes(data)
            value = await self._from_source(key, prototype, byte_range, started)
            data = None if value is None else contents(value)
            if is_document(key):
                ticket = await self.backend.compare(key, None if data is None else bytes(data), ticket)
            # those who wait need not wait for the disk
            flight.land(data)
            if data is not None:
                await self.backend.publish(entry, data, ticket, self.max_size)
            return value
        except BaseException as error:
            flight.fail(error)
            raise
        finally:
            self.backend.flights.leave((entry, began), flight)
            if unlock is not None:
                # a lock that cannot be given back goes with the process
                with suppress(OSError):
                    unlock()

    async def _win(self, entry: Entry) -> tuple[Callable[[], None] | None, memoryview | None]:
        """Become the one process that fetches, or get what another one fetched.

        Past the deadline, neither: the other process may be stopped, so this one fetches as well.
        """
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_POLL
        while True:
            unlock = self.backend.lead(entry)
            try:
                # looked at with the lock held: whoever had it before may just have published
                data = await self.backend.find(entry, self._max_age)
            except BaseException:
                if unlock is not None:
                    unlock()
                raise
            if unlock is not None or data is not None or time.monotonic() >= deadline:
                return unlock, data
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, _LONGEST_POLL)

    # -- what has to be asked for again

    async def _ask(
        self, key: str, entry: Entry, prototype: BufferPrototype, byte_range: ByteRequest | None, started: float
    ) -> Buffer | None:
        """Read from the source, and make the cache agree with it."""
        if not is_document(key):
            ticket = self.backend.ticket(entry)
            value = await self._from_source(key, prototype, byte_range, started)
            await self._agree(key, entry, None if value is None else contents(value), ticket)
            return value
        data = await self._document(key, entry, started)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def _document(self, key: str, entry: Entry, started: float) -> memoryview | None:
        """A metadata document from the source, asked for once by all tasks that want it now."""
        while True:
            ticket = began = self.backend.ticket(entry)
            if began is None:
                flight: Flight[memoryview | None] = Flight()
                break
            flight, leads = self.backend.flights.join((id(self.freshness), key, began))
            if leads:
                break
            try:
                data = await asyncio.wait_for(flight.outcome(), self._timeout)
            except HandedOver:
                continue
            except TimeoutError:
                flight = Flight()
                break
            self.stats.hit(0 if data is None else len(data), time.perf_counter() - started)
            return data
        try:
            value = await self._from_source(key, default_buffer_prototype(), None, started)
            data = None if value is None else contents(value)
            if data is None or await self.backend.find(entry, "infinity") != data:
                ticket = await self.backend.compare(key, None if data is None else bytes(data), ticket)
            await self._agree(key, entry, data, ticket)
            self.freshness.note(key)
            flight.land(data)
            return data
        except BaseException as error:
            flight.fail(error)
            raise
        finally:
            self.backend.flights.leave((id(self.freshness), key, began), flight)

    async def _agree(self, key: str, entry: Entry, data: memoryview | None, ticket: object) -> None:
        """Store what the source has now, where the cache has something else."""
        cached = await self.backend.find(entry, "infinity")
        if data is not None and cached == data and await self.backend.find(entry, self._max_age) is not None:
            return
        if cached is not None:
            ticket = await self.backend.forget(key, ticket)
        if data is not None and ticket is not None:
            await self.backend.publish(entry, data, ticket, self.max_size)


def whole() -> tuple[int, int]:
    """The span of a whole object."""
    wanted = span(None)
    assert wanted is not None
    return wanted


def contents(value: Buffer) -> memoryview:
    """The bytes of a buffer, without a copy where they are in main memory; nobody may change them."""
    array = np.ascontiguousarray(value.as_numpy_array())
    # an empty view cannot be cast
    return memoryview(array).toreadonly().cast("B") if array.size else memoryview(b"")
