"""Reading through a cache: from the cache if it may be, else once from the source, for all who wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import RangeByteRequest, Store

from xzcache import sources
from xzcache.model import (
    END,
    Flight,
    HandedOver,
    Replaced,
    Unclear,
    clip,
    differ,
    is_document,
    merged,
    span,
    tells,
    told,
)
from xzcache.reading._fetch import RangeFetches, assembled
from xzcache.reading._request import Request, buffer_of, contents, request_for, whole
from xzcache.reading._revalidation import Revalidation
from xzcache.sources import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    import numpy as np
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache.model import Entry
    from xzcache.reading._request import Reading

    Outcome = list[tuple[int, Buffer | None]] | BaseException

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


# -- Reading many byte ranges of one object, as Zarr's sharding codec does: what is missing is asked for together.

_REMEMBERED: Final = 65536
_TRIES: Final = 3
"""Times that ranges are read before the object is taken to be changing all the time."""


class RangeReads:
    """Reads of several byte ranges of an object of one source, through one backend.

    Parameters
    ----------
    reads : ReadThrough
    """

    def __init__(self, reads: ReadThrough) -> None:
        self._reads = reads
        self._reading = reads.reading
        self._backend = reads.backend
        self._fetches = RangeFetches(reads.reading)
        self._promoted: set[str] = set()

    async def get(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, **limits: int
    ) -> AsyncIterator[list[tuple[int, Buffer | None]]]:
        """As `Store.get_ranges`; all of it is there before any of it is given.

        Raises
        ------
        BaseExceptionGroup
            Of the source's own exceptions, of `FileNotFoundError` where it has no such object, or of `Replaced`.
        """
        if self._reading.passes:
            async for group in self._past_the_cache(key, byte_ranges, prototype, limits):
                yield group
            return
        wanted: dict[Entry, list[int]] = {}
        alone: list[int] = []
        for place, byte_range in enumerate(byte_ranges):
            if (entry := self._mergeable(key, byte_range)) is None:
                alone.append(place)
            else:
                wanted.setdefault(entry, []).append(place)
        with self._reading.watching(key) as watch:
            outcomes = await self._together(key, byte_ranges, wanted, alone, prototype, limits)
            if watch.replaced:
                raise BaseExceptionGroup("reading byte ranges failed", [Replaced(key)])
        for outcome in outcomes:
            if not isinstance(outcome, BaseException):
                yield outcome
        if failures := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
            raise BaseExceptionGroup("reading byte ranges failed", failures)

    async def _together(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        wanted: dict[Entry, list[int]],
        alone: list[int],
        prototype: BufferPrototype,
        limits: dict[str, int],
    ) -> list[Outcome]:
        """All ranges of a call, of one state as far as can be told; or the exceptions that came instead."""
        entry = self._backend.entry(key, 0, END)
        if entry is None:
            return await self._apart(key, byte_ranges, alone, prototype, limits)
        await self._reads.get_ready(key)
        since = self._backend.ticket(entry)
        found, missing = await self._fetches.look(key, wanted)
        states = self._backend.states_of(key) if missing or alone else set()
        if missing and found and not all(map(tells, states)):
            # what nobody can compare with what is to be fetched is fetched with it
            found, missing = {}, list(wanted)
        if self._reading.must_ask(key):
            # what is cached is asked about, each piece with its validator
            alone = [*alone, *(place for entry in found for place in wanted[entry])]
            found = {}
        promoted = bool(missing) and self._is_worth_the_whole(key, missing)
        calls = [self._apart(key, byte_ranges, alone, prototype, limits)]
        if missing:
            fetch = self._whole if promoted else self._missing
            calls.append(fetch(key, {entry: wanted[entry] for entry in missing}, prototype, limits, states))
        outcomes = [outcome for call in await asyncio.gather(*calls) for outcome in call]
        if any(isinstance(outcome, BaseException) and not isinstance(outcome, Unclear) for outcome in outcomes):
            return [outcome for outcome in outcomes if not isinstance(outcome, Unclear)]
        is_clear = not any(isinstance(outcome, Unclear) for outcome in outcomes)
        if alone or promoted:
            # what was compared with these is gone: it may have been evicted, or was found to be of another state
            is_clear &= told(states) <= self._backend.states_of(key)
        if not missing or (alone and len(byte_ranges) > 1):
            is_clear &= self._backend.ticket(entry) == since
        if not is_clear:
            return await self._anew(key, byte_ranges, wanted, prototype, limits, told(states))
        hits = [self._hit(key, entry, wanted[entry], data, prototype) for entry, data in found.items()]
        return [*([[pair for pairs in hits for pair in pairs]] if hits else []), *outcomes]

    async def _anew(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: set[str],
    ) -> list[Outcome]:
        """All ranges of a call in one go from the source, past the cache.

        Parameters
        ----------
        states : set of str
            What the source said of the state of what was cached.
        """
        began = time.perf_counter()
        ends = [(entry.start, entry.stop) for entry in wanted]
        spans = merged(ends, gap=limits["max_gap_bytes"], most=limits["max_coalesced_bytes"])
        asked: list[ByteRequest | None] = [RangeByteRequest(*span) for span in spans]
        together = {place for places in wanted.values() for place in places}
        others = [place for place in range(len(byte_ranges)) if place not in together]
        asked += [byte_ranges[place] for place in others]
        turn = asyncio.Semaphore(limits["max_concurrency"])
        reading = self._reading

        async def ask(part: ByteRequest | None) -> Answer:
            async with turn:
                # the state of a whole object may be worth a request here
                return await sources.ask(
                    reading.source, key, prototype, part, certain=True, fixed=reading.fixed, untold=reading.untold
                )

        for _ in range(_TRIES):
            try:
                answers = await sources.all_of(map(ask, asked))
            except Exception as error:
                return [error]
            values = [answer.value for answer in answers if answer.value is not None]
            self._reading.stats.miss(sum(map(len, values)), time.perf_counter() - began)
            if len(values) < len(answers):
                return [FileNotFoundError(key)]
            validators = {answer.validator for answer in answers}
            if not differ(validators):
                break
        if differ(validators | states) and not await reading.has_several_names(key):
            self._reading.note_replaced(key)
            await self._backend.forget(key, None)
            return [Replaced(key)]
        if not all(answer.exact for answer in answers[: len(spans)]):
            # nothing can be cut out of such answers
            return [group async for group in self._past_the_cache(key, byte_ranges, prototype, limits)]
        pairs: list[tuple[int, Buffer | None]] = []
        for (first, last), value in zip(spans, values, strict=False):
            for entry, places in wanted.items():
                if first <= entry.start and entry.stop <= last:
                    pairs += [(place, value[entry.start - first : entry.stop - first]) for place in places]
        return [[*pairs, *zip(others, values[len(spans) :], strict=True)]]

    async def _past_the_cache(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, limits: dict[str, int]
    ) -> AsyncIterator[list[tuple[int, Buffer | None]]]:
        began = time.perf_counter()
        async for group in self._reading.source.get_ranges(key, byte_ranges, prototype=prototype, **limits):
            for _, value in group:
                self._reading.stats.miss(0 if value is None else len(value), time.perf_counter() - began)
                began = time.perf_counter()
            yield list(group)

    def _mergeable(self, key: str, byte_range: ByteRequest | None) -> Entry | None:
        wanted = span(byte_range) if isinstance(byte_range, RangeByteRequest) else None
        if wanted is None or wanted[0] == wanted[1] or is_document(key):
            return None
        return self._backend.entry(key, *wanted)

    def _hit(
        self, key: str, entry: Entry, places: list[int], data: memoryview | None, prototype: BufferPrototype
    ) -> list[tuple[int, Buffer | None]]:
        request = request_for(key, entry)._replace(prototype=prototype)
        return [(place, self._reading.hit(request, data)) for place in places]

    async def _apart(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        places: list[int],
        prototype: BufferPrototype,
        limits: dict[str, int],
    ) -> list[Outcome]:
        """What is asked for by itself, or the exceptions of that."""
        turn = asyncio.Semaphore(limits["max_concurrency"])
        calls = (self._one(key, byte_ranges[place], prototype, place, turn) for place in places)
        return await asyncio.gather(*calls, return_exceptions=True)

    async def _one(
        self, key: str, byte_range: ByteRequest | None, prototype: BufferPrototype, place: int, turn: asyncio.Semaphore
    ) -> list[tuple[int, Buffer | None]]:
        async with turn:
            value = await self._reads.get(key, prototype, byte_range)
        if value is None:
            raise FileNotFoundError(key)
        return [(place, value)]

    def _is_worth_the_whole(self, key: str, missing: Iterable[Entry]) -> bool:
        """Whether so much of an object was read in pieces that it is promoted: once, as it may be too large to stay."""
        most = self._reading.promote_above
        if most is None or key in self._promoted:
            return False
        pieces = [*self._backend.listed(key), *missing]
        due: bool = most < sum(piece.stop - piece.start for piece in pieces if piece.stop != END)
        if due:
            if len(self._promoted) >= _REMEMBERED:
                self._promoted.clear()
            self._promoted.add(key)
        return due

    async def _whole(
        self,
        key: str,
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: set[str],
    ) -> list[Outcome]:
        try:
            value = await self._reads.get(key, prototype, None)
        except Exception as error:
            return [error]
        if value is None:
            return [FileNotFoundError(key)]
        return [[(place, value[entry.start : entry.stop]) for entry, places in wanted.items() for place in places]]

    async def _missing(
        self,
        key: str,
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: set[str],
    ) -> list[Outcome]:
        try:
            found = await self._fetches.fetch(key, list(wanted), prototype, limits, states)
        except Exception as error:
            return [error]
        if any(data is None for data in found.values()):
            return [FileNotFoundError(key)]
        return [
            [
                (place, prototype.buffer.from_bytes(data))
                for entry, data in found.items()
                if data is not None
                for place in wanted[entry]
            ]
        ]
