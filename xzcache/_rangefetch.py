"""Fetching several byte ranges of one object for all who wait for them, in as few requests as Zarr makes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype

from xzcache import _spans as spans
from xzcache import _upstream as upstream
from xzcache._errors import Replaced
from xzcache._flights import Flight, HandedOver
from xzcache._keys import END
from xzcache._reading import Request, contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._keys import Entry
    from xzcache._readthrough import ReadThrough
    from xzcache._spans import Span

_PIECE: Final = 1 << 20
"""Bytes of one cached piece, unless a single range has more: all of it is checked when a process first reads of it."""

Found = dict["Entry", memoryview | None]


@dataclass(eq=False)
class _Lead:
    """A byte range that this task fetches for all who wait."""

    entry: Entry
    flight: Flight[memoryview | None]
    unlock: Callable[[], None] | None = None

    @property
    def span(self) -> Span:
        return self.entry.start, self.entry.stop


class RangeFetches:
    """Fetches of byte ranges of objects of one source, through one backend.

    Parameters
    ----------
    reads : ReadThrough

    Notes
    -----
    Each range has its own fetch, as with single reads: who wants another range of the same object waits for nobody.
    What comes back is cached with the bytes between the ranges, as they were paid for.
    """

    def __init__(self, reads: ReadThrough) -> None:
        self._reads = reads
        self._reading = reads.reading
        self._backend = reads.backend

    async def look(self, key: str, entries: Iterable[Entry]) -> tuple[Found, list[Entry]]:
        """What is cached of some ranges of an object, and which are not."""
        listed = self._backend.listed(key)
        found: Found = {}
        missing: list[Entry] = []
        for entry in entries:
            # the first one that is missed has shown that there is no whole object either
            hopeless = missing and next(listed.covering(entry), None) is None
            data = None if hopeless else await self._reading.find(entry)
            if data is None:
                missing.append(entry)
            else:
                found[entry] = data
        return found, missing

    async def fetch(
        self, key: str, entries: Sequence[Entry], prototype: BufferPrototype, limits: dict[str, int]
    ) -> Found:
        backend = self._backend
        ticket = backend.ticket(entries[0])
        mine: list[_Lead] = []
        others: dict[Entry, Flight[memoryview | None]] = {}
        behind: list[_Lead] = []
        done: list[_Lead] = []
        try:
            async with backend.fetching():
                for entry in entries:
                    flight, leads = (Flight(), True) if ticket is None else backend.flights.join((entry, ticket))
                    if not leads:
                        others[entry] = flight
                        continue
                    lead = _Lead(entry, flight)
                    done.append(lead)
                    lead.unlock = backend.lead(entry)
                    # another process may be fetching it
                    (mine if lead.unlock is not None else behind).append(lead)
                found = await self._lead(key, mine, ticket, prototype, limits, done)
                for lead in behind:
                    done.remove(lead)
                calls = [
                    *(self._reads.take_off(lead.flight, ticket, request_for(key, lead.entry)) for lead in behind),
                    *(self._wait(request_for(key, entry), flight) for entry, flight in others.items()),
                ]
                values = await upstream.all_of(calls)
        except BaseException as error:
            # some may not even have begun
            done = [*done, *behind]
            for lead in done:
                lead.flight.fail(error)
            raise
        finally:
            for lead in done:
                self._land(lead, ticket)
        late = [lead.entry for lead in behind] + list(others)
        return found | {
            entry: None if value is None else contents(value) for entry, value in zip(late, values, strict=True)
        }

    async def _wait(self, request: Request, flight: Flight[memoryview | None]) -> Buffer | None:
        """What another task of this process is fetching."""
        try:
            data = await asyncio.wait_for(flight.outcome(), self._reading.timeout)
        except (HandedOver, TimeoutError):
            return await self._reads.fetch(request)
        return self._reading.hit(request, data)

    async def _lead(
        self,
        key: str,
        leads: list[_Lead],
        ticket: Any,
        prototype: BufferPrototype,
        limits: dict[str, int],
        undone: list[_Lead],
    ) -> Found:
        """Fetch ranges for all who wait; what is still to be let go of is left in `undone`."""
        # with the locks held: whoever had them before may just have published
        found, _ = await self.look(key, [lead.entry for lead in leads])
        for entry, data in found.items():
            self._reading.hit(request_for(key, entry), data)
        for lead in [lead for lead in leads if lead.entry in found]:
            lead.flight.land(found[lead.entry])
        leads = [lead for lead in leads if lead.entry not in found]
        begun = time.perf_counter()
        had = await self._parts_of(key, [lead.span for lead in leads])
        needs = [part for lead in leads for part in spans.without(lead.span, had)]
        if not needs:
            # nothing is missing, or nothing that is not there in parts
            return found | self._landed(leads, had, hits=True)
        asked = spans.merged(needs, gap=limits["max_gap_bytes"], most=limits["max_coalesced_bytes"])
        answers = await upstream.ask_for_spans(self._reading.source, key, prototype, asked, **limits)
        values = [answer.value for answer in answers]
        fetched = [contents(value) for value in values if value is not None]
        self._reading.stats.miss(sum(map(len, fetched)), time.perf_counter() - begun)
        for _ in leads[1:]:
            self._reading.stats.miss(0, 0.0)
        if len(fetched) < len(values):
            for lead in leads:
                lead.flight.land(None)
            await self._reading.note_lack(key, ticket)
            return found | {lead.entry: None for lead in leads}
        await self._must_agree(key, ticket, answers)
        found |= self._landed(leads, had | dict(zip(asked, fetched, strict=True)), hits=False)
        await self._publish(key, dict(zip(asked, answers, strict=True)), had, leads, ticket, undone)
        return found

    def _landed(self, leads: Iterable[_Lead], sources: dict[Span, memoryview], *, hits: bool) -> Found:
        found: Found = {}
        for lead in leads:
            found[lead.entry] = data = _assembled(lead.span, sources)
            if hits:
                self._reading.hit(request_for(lead.entry.key, lead.entry), data)
            lead.flight.land(data)
        return found

    async def _parts_of(self, key: str, wanted: Iterable[Span]) -> dict[Span, memoryview]:
        """Cached pieces that hold a part of what is wanted."""
        listed = self._backend.listed(key)
        parts: dict[Span, memoryview] = {}
        for piece in {piece for part in wanted for piece in listed.overlapping(*part)}:
            if piece.stop != END and (data := await self._reading.find(piece)) is not None:
                parts[piece.start, piece.stop] = data
        return parts

    async def _must_agree(self, key: str, ticket: Any, answers: Iterable[upstream.Answer]) -> None:
        """Whoever asks for ranges has read where they are: bytes of another state of the object would be wrong ones."""
        told = {answer.validator for answer in answers} - {""}
        if told and len(told | self._backend.states_of(key)) > 1:
            await self._backend.forget(key, ticket)
            raise Replaced(key)

    async def _publish(
        self,
        key: str,
        answers: dict[Span, upstream.Answer],
        had: Iterable[Span],
        leads: list[_Lead],
        ticket: Any,
        undone: list[_Lead],
    ) -> None:
        """Store what was fetched, but for what is there already, in pieces that end where ranges do."""
        listed = self._backend.listed(key)
        # what is there of a range that had to be fetched is damaged, or too old
        unfit = {piece for lead in leads for piece in listed.overlapping(*lead.span)} - {
            self._backend.entry(key, *part) for part in had
        }
        seams = {seam for lead in leads for seam in lead.span}
        pieces = []
        for asked, answer in answers.items():
            assert answer.value is not None
            data = contents(answer.value)
            there = [
                (piece.start, asked[1] if piece.stop == END else piece.stop)
                for piece in listed.overlapping(*asked)
                if piece not in unfit
            ]
            for part in spans.without(asked, there):
                for first, last in spans.cut(part, seams, _PIECE):
                    entry = self._backend.entry(key, first, last)
                    if entry is not None and (of := data[first - asked[0] : last - asked[0]]):
                        pieces.append((entry, of, answer.validator))
        left = len(pieces)

        def done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                for lead in leads:
                    self._land(lead, ticket)

        if pieces:
            # whoever stores the last one lets go of the ranges
            ours = set(leads)
            undone[:] = [lead for lead in undone if lead not in ours]
        try:
            for entry, of, validator in pieces:
                await self._backend.publish_soon(entry, of, ticket, self._reading.max_size, validator, done)
        except BaseException:
            undone += leads
            raise

    def _land(self, lead: _Lead, ticket: Any) -> None:
        self._backend.flights.leave((lead.entry, ticket), lead.flight)
        if lead.unlock is not None:
            # a lock that cannot be given back goes with the process
            with suppress(OSError):
                lead.unlock()


def request_for(key: str, entry: Entry) -> Request:
    """What asks for one range, by itself."""
    byte_range = RangeByteRequest(entry.start, entry.stop)
    return Request(key, entry, default_buffer_prototype(), byte_range, time.perf_counter())


def _assembled(wanted: Span, sources: dict[Span, memoryview]) -> memoryview:
    """The bytes of a span, from those of spans that hold it together; fewer where the object ends."""
    at, end = wanted
    parts = []
    while at < end:
        (first, last), data = next((span, data) for span, data in sources.items() if span[0] <= at < span[1])
        parts.append(data[at - first : min(end, last) - first])
        at = min(end, last)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
