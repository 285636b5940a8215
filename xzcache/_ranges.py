"""Reading many byte ranges of one object, as Zarr's sharding codec does: what is missing is asked for together."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import RangeByteRequest

from xzcache._documents import is_document
from xzcache._errors import Replaced
from xzcache._keys import END, span
from xzcache._rangefetch import RangeFetches
from xzcache._reading import request_for
from xzcache._states import tells

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._keys import Entry
    from xzcache._rangefetch import Found
    from xzcache._readthrough import ReadThrough

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
        """As `Store.get_ranges`: first what is cached, then the rest.

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
        found: Found = {}
        missing: list[Entry] = []
        states: set[str] = set()
        if wanted:
            await self._reads.get_ready(key)
            since = self._backend.ticket(next(iter(wanted)))
            found, missing = await self._fetches.look(key, wanted)
            if missing or alone:
                states = self._backend.states_of(key)
            if missing and found and not (all(map(tells, states)) and self._is_as(since, wanted)):
                # what nobody can compare with what is to be fetched is fetched with it
                found, missing = {}, list(wanted)
            if self._reading.must_ask(key):
                # what is cached is asked about, each piece with its validator
                alone += [place for entry in found for place in wanted[entry]]
                found = {}
        hits = [self._hit(key, entry, wanted[entry], data, prototype) for entry, data in found.items()]
        if hits:
            yield [pair for pairs in hits for pair in pairs]
        apart = self._apart(key, byte_ranges, alone, prototype, limits["max_concurrency"], states if found else set())
        calls = []
        if missing:
            rest = {entry: wanted[entry] for entry in missing}
            promoted = self._is_worth_the_whole(key, missing)
            fetch = self._whole if promoted else self._missing
            calls.append(fetch(key, rest, prototype, limits, states))
        failures = []
        outcomes, others = await asyncio.gather(apart, asyncio.gather(*calls, return_exceptions=True))
        for outcome in [*outcomes, *others]:
            if isinstance(outcome, BaseException):
                failures.append(outcome)
            else:
                yield outcome
        if failures:
            raise BaseExceptionGroup("reading byte ranges failed", failures)

    async def _past_the_cache(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, limits: dict[str, int]
    ) -> AsyncIterator[list[tuple[int, Buffer | None]]]:
        began = time.perf_counter()
        async for group in self._reading.source.get_ranges(key, byte_ranges, prototype=prototype, **limits):
            for _, value in group:
                self._reading.stats.miss(0 if value is None else len(value), time.perf_counter() - began)
                began = time.perf_counter()
            yield list(group)

    def _is_as(self, since: Any, wanted: Iterable[Entry]) -> bool:
        """Whether nothing was forgotten of an object since a ticket was taken."""
        return bool(self._backend.ticket(next(iter(wanted))) == since)

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
        concurrency: int,
        states: set[str],
    ) -> list[list[tuple[int, Buffer | None]] | BaseException]:
        """What is asked for by itself, or the exceptions of that; together of one state with the rest of the call."""
        entry = self._backend.entry(key, 0, END)
        # no bytes are of any state
        parts = [byte_ranges[place] for place in places]
        empty = all(isinstance(part, RangeByteRequest) and part.start >= part.end for part in parts)
        turn = asyncio.Semaphore(concurrency)
        for _ in range(_TRIES):
            since = None if entry is None else self._backend.ticket(entry)
            found = await asyncio.gather(
                *(self._one(key, byte_ranges[place], prototype, place, turn) for place in places),
                return_exceptions=True,
            )
            changed = any(map(tells, states)) and not states <= self._backend.states_of(key)
            if changed:
                break
            if len(byte_ranges) < 2 or empty or entry is None or self._backend.ticket(entry) == since:
                return found
            # something was forgotten meanwhile: some of it may be of the state before
        return [Replaced(key)]

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
    ) -> list[tuple[int, Buffer | None]]:
        value = await self._reads.get(key, prototype, None)
        if value is None:
            raise FileNotFoundError(key)
        if not states <= self._backend.states_of(key) and any(map(tells, states)):
            # the parts that were there are gone, as they were of another state
            raise Replaced(key)
        return [(place, value[entry.start : entry.stop]) for entry, places in wanted.items() for place in places]

    async def _missing(
        self,
        key: str,
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: set[str],
    ) -> list[tuple[int, Buffer | None]]:
        found = await self._fetches.fetch(key, list(wanted), prototype, limits, states)
        if any(data is None for data in found.values()):
            raise FileNotFoundError(key)
        return [
            (place, prototype.buffer.from_bytes(data))
            for entry, data in found.items()
            if data is not None
            for place in wanted[entry]
        ]
