"""Reading many byte ranges of one object, as Zarr's sharding codec does: what is missing is asked for together."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from zarr.abc.store import RangeByteRequest

from xzcache import _upstream as upstream
from xzcache._documents import is_document
from xzcache._errors import Replaced, Unclear
from xzcache._keys import END, span
from xzcache._rangefetch import RangeFetches
from xzcache._reading import request_for
from xzcache._spans import merged
from xzcache._states import differ, tells, told

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._keys import Entry
    from xzcache._readthrough import ReadThrough
    from xzcache._upstream import Answer

    Outcome = list[tuple[int, Buffer | None]] | BaseException

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
        source, fixed = self._reading.source, self._reading.fixed

        async def ask(part: ByteRequest | None) -> Answer:
            async with turn:
                # the state of a whole object may be worth a request here
                return await upstream.ask(source, key, prototype, part, certain=True, fixed=fixed)

        for _ in range(_TRIES):
            try:
                answers = await upstream.all_of(map(ask, asked))
            except Exception as error:
                return [error]
            values = [answer.value for answer in answers if answer.value is not None]
            self._reading.stats.miss(sum(map(len, values)), time.perf_counter() - began)
            if len(values) < len(answers):
                return [FileNotFoundError(key)]
            validators = {answer.validator for answer in answers}
            if not differ(validators):
                break
        if differ(validators | states):
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
