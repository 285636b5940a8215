"""Reading through a cache: from the cache if it may be, else once from the source, for all who wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import Store

from xzcache._assembly import assembled
from xzcache._documents import is_document
from xzcache._errors import Replaced
from xzcache._flights import Flight, HandedOver
from xzcache._keys import clip, span
from xzcache._reading import Request, buffer_of, contents, whole
from xzcache._revalidation import Revalidation
from xzcache._upstream import Answer

if TYPE_CHECKING:
    import numpy as np
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._keys import Entry
    from xzcache._reading import Reading

_READS_SHARDS_BY_GET: Final = not hasattr(Store, "get_ranges")
"""Then whoever asks for a byte range may have read before where in the object it is."""
_FIRST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.005


Count = Callable[[int, float], None]
"""Told of a hit: its bytes, and the seconds that it took."""


class NotCached(Exception):
    """What somebody wanted from the cache alone is to be read by `get`."""


class ReadThrough:
    """Reads of one source through one backend.

    Parameters
    ----------
    reading : Reading

    Notes
    -----
    The leader of a fetch is found in two steps: among the tasks and threads of this process by a table of futures, then
    among processes by a lock on a byte that stands for the entry, which is polled and never waited for on the loop.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.backend = reading.backend
        self.freshness = reading.freshness
        self._revalidation = Revalidation(reading)

    def at_once(self, key: str, prototype: BufferPrototype, count: Count | None = None) -> Buffer | None:
        """The value of a chunk, where it is cached and to be had without waiting; else None, and `get` tells."""
        if not self._may_serve(key):
            return None
        started = time.perf_counter()
        data = self.backend.at_once(key, self.reading.max_age)
        if data is None:
            return None
        (count or self.reading.stats.hit)(len(data), time.perf_counter() - started)
        return buffer_of(data, prototype)

    def into(self, key: str, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """As `at_once`, into bytes that somebody has; what is there after False is undefined."""
        started = time.perf_counter()
        if not self._may_serve(key) or not self.backend.into(key, self.reading.max_age, place, patient=patient):
            return False
        self.reading.stats.hit(len(place), time.perf_counter() - started)
        return True

    def _may_serve(self, key: str) -> bool:
        """Whether what is cached of a key may be served without another word."""
        if self.freshness.revalidate is True or self.reading.passes or is_document(key):
            return False
        return not self._revalidation.may_settle or self._revalidation.is_settled(key)

    def cached(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, count: Count
    ) -> Buffer | None:
        """As `get`, from the cache alone, by a thread that may wait for the disk; `count` is told of a hit.

        Raises
        ------
        NotCached
            `get` has to be asked.
        """
        if byte_range is None and (value := self.at_once(key, prototype, count)) is not None:
            return value
        wanted = span(byte_range)
        entry = None if wanted is None or is_document(key) else self.backend.entry(key, *wanted)
        if entry is None or not self._may_serve(key):
            raise NotCached
        started = time.perf_counter()
        data = self.backend.find_now(entry, self.reading.max_age)
        if data is None and not self.reading.lacks_now(key):
            raise NotCached
        count(0 if data is None else len(data), time.perf_counter() - started)
        return None if data is None else buffer_of(data, prototype)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, *, anew: bool | None = False
    ) -> Buffer | None:
        """The value of a key or a byte range of it, as `Store.get`.

        Parameters
        ----------
        anew : bool or None
            Whether to ask the source for a chunk whatever the cache holds, as a write depends on it; None where that is
            not known.

        Raises
        ------
        Replaced
            The rest of the object is another one than this byte range is of, and this Zarr reads shards by `get`.
        """
        if not is_document(key):
            return await self._get(key, prototype, byte_range, anew=anew)
        with self.freshness.asking(key):
            return await self._get(key, prototype, byte_range)

    async def _get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, *, anew: bool | None = False
    ) -> Buffer | None:
        started = time.perf_counter()
        wanted = span(byte_range)
        entry = None if wanted is None or self.reading.passes else self.backend.entry(key, *wanted)
        if wanted is None or entry is None:
            return await self._past_the_cache(key, prototype, byte_range, started)
        if not entry.is_whole and is_document(key):
            # only a whole document can be compared
            value = await self.get(key, prototype, None)
            return None if value is None else value[slice(*clip(*wanted, len(value)))]
        await self.get_ready(key)
        request = Request(key, entry, prototype, byte_range, started)
        may_write = anew is None
        if anew is None:
            # what is not cached is fetched from the source in any case, once for all who began before it is asked
            anew = await self.backend.find(entry, "infinity") is not None or await self.reading.lacks(key)
        if anew or (self.reading.must_ask(key) and not await self._is_vouched_for(request)):
            return await self._revalidation.read(request)
        data = await self.reading.find(entry)
        if data is not None or await self._lacks(key):
            return self.reading.hit(request, data)
        try:
            return await self.fetch(request, anew=may_write)
        except Exception:
            if self.freshness.revalidate is False and await self.reading.lacked(key):
                return self.reading.hit(request, None)
            raise

    async def get_ready(self, key: str) -> None:
        """Before anything of a key is looked for in the cache."""
        await self.backend.prepare()
        if self._revalidation.may_settle:
            await self._revalidation.settle(key)

    async def _is_vouched_for(self, request: Request) -> bool:
        """Whether a document is cached as the store that this one is a copy of has seen it."""
        key = request.key
        told = self.freshness.revalidate is not True and not self.reading.writable and is_document(key)
        if not told or self.freshness.inherited.state(key) is None:
            return False
        data = await self.reading.find(request.entry)
        absent = data is None and await self.backend.is_absent(key, self.reading.max_age)
        return (data is not None or absent) and self.freshness.vouches(key, data)

    async def cached_size(self, key: str) -> int | None:
        """The size of a value, in bytes, if it is cached and may be served; else None."""
        entry = self.backend.entry(key, *whole())
        if entry is None or self.reading.passes or self.reading.must_ask(key):
            return None
        await self.get_ready(key)
        return await self.backend.size(entry, self.reading.max_age)

    async def is_known_absent(self, key: str) -> bool:
        """Whether the source is known not to have a key, and need not be asked."""
        if self.backend.entry(key, *whole()) is None or self.reading.passes or self.reading.must_ask(key):
            return False
        await self.get_ready(key)
        return await self._lacks(key)

    async def _lacks(self, key: str) -> bool:
        if is_document(key):
            return await self.backend.is_absent(key, self.reading.max_age)
        return await self.reading.lacks(key)

    async def _past_the_cache(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, started: float
    ) -> Buffer | None:
        value = await self.reading.source.get(key, prototype, byte_range)
        self.reading.stats.miss(0 if value is None else len(value), time.perf_counter() - started)
        return value

    # -- what is not cached

    async def fetch(self, request: Request, *, anew: bool = False) -> Buffer | None:
        """Fetch what is not cached, once for all who want it.

        Parameters
        ----------
        request : Request
        anew : bool
            Whether the source has to be asked after this read began.
        """
        entry = request.entry
        since = request.started if anew else -math.inf
        while True:
            # a fetch that began before a write is no fetch to wait for after it: writes so far are part of its name
            ticket = self.backend.ticket(entry)
            if ticket is None:
                return await self._lead(Flight(), None, request, anew=anew)
            flight, leads = self.backend.flights.join((entry, ticket, anew), since)
            if leads:
                return await self._lead(flight, ticket, request, anew=anew)
            try:
                data = await asyncio.wait_for(flight.outcome(), self.reading.timeout)
            except HandedOver:
                data = None if anew else await self.reading.find(entry)
                if data is None:
                    continue
            except TimeoutError:
                # whoever fetches may never come back, as when its event loop was stopped
                return await self._lead(Flight(), ticket, request, anew=anew)
            return self.reading.hit(request, data)

    async def _lead(
        self, flight: Flight[memoryview | None], ticket: Any, request: Request, *, anew: bool
    ) -> Buffer | None:
        """Fetch for all who wait in this process, unless another process does or has done so."""
        async with self.backend.fetching():
            return await self._take_off(flight, ticket, request, anew=anew)

    async def _take_off(
        self, flight: Flight[memoryview | None], ticket: Any, request: Request, *, anew: bool
    ) -> Buffer | None:
        key, entry = request.key, request.entry
        unlock: Callable[[], None] | None = None
        began = ticket

        def done() -> None:
            self.backend.flights.leave((entry, began, anew), flight)
            if unlock is not None:
                # a lock that cannot be given back goes with the process
                with suppress(OSError):
                    unlock()

        publishing = False
        try:
            if anew:
                # what another process fetches it may have asked for before this read began
                await asyncio.sleep(0)
                flight.depart()
                answer, data = await self.reading.ask_again(request)
            else:
                unlock, data = await self._win(entry)
                if data is None:
                    answer, data = await self._ask(request)
            if data is not None:
                flight.land(data)
                return self.reading.hit(request, data)
            data = None if answer.value is None else contents(answer.value)
            if data is None:
                await self.reading.note_lack(key, ticket)
            if is_document(key) and answer.exact:
                ticket = await self.backend.compare(key, None if data is None else bytes(data), ticket)
                self.freshness.note(key, data)
            validator = answer.validator
            if data is not None and answer.exact:
                ticket, validator = await self._agree(request, data, validator, ticket)
            # those who wait need not wait for the disk
            flight.land(data)
            if data is not None and answer.exact:
                publishing = True
                await self.backend.publish_soon(entry, data, ticket, self.reading.max_size, validator, done)
            return answer.value
        except BaseException as error:
            flight.fail(error)
            raise
        finally:
            if not publishing:
                done()

    async def _agree(self, request: Request, data: memoryview, validator: str, ticket: Any) -> tuple[Any, str]:
        """Forget parts of what the object was before; the ticket and the validator to publish with."""
        ticket, validator, replaced = await self.reading.agree(request.key, request.entry, validator, ticket, data)
        if replaced and _READS_SHARDS_BY_GET and request.entry.start > 0:
            raise Replaced(request.key)
        return ticket, validator

    async def _ask(self, request: Request) -> tuple[Answer, memoryview | None]:
        """Ask the source; what is cached, where that is only too old and the source still has it."""
        if request.entry.is_whole and not is_document(request.key):
            answer = await assembled(self.reading, request)
            if answer is not None:
                return answer, None
        if self.reading.max_age == "infinity":
            return await self.reading.ask(request), None
        return await self.reading.ask_again(request)

    async def _win(self, entry: Entry) -> tuple[Callable[[], None] | None, memoryview | None]:
        """Become the one process that fetches, or get what another one fetched.

        Past the deadline, neither: the other process may be stopped, so this one fetches as well.
        """
        deadline = time.monotonic() + self.reading.timeout
        pause = _FIRST_POLL
        while True:
            unlock = self.backend.lead(entry)
            try:
                # looked at with the lock held: whoever had it before may just have published
                data = await self.reading.find(entry)
            except BaseException:
                if unlock is not None:
                    unlock()
                raise
            if unlock is not None or data is not None or time.monotonic() >= deadline:
                return unlock, data
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, _LONGEST_POLL)
