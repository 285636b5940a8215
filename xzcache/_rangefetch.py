"""Fetching byte ranges of one object for all who want them, each byte once, in as few requests as Zarr makes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from xzcache import _upstream as upstream
from xzcache._errors import Replaced
from xzcache._flights import Claim, HandedOver
from xzcache._keys import END
from xzcache._rangeleads import Lead, Leads, pieces_of
from xzcache._reading import contents, request_for
from xzcache._spans import Cover, Mosaic, merged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zarr.core.buffer import BufferPrototype

    from xzcache._keys import Entry
    from xzcache._reading import Reading
    from xzcache._spans import Span

_FIRST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.005

Found = dict["Entry", memoryview | None]


class RangeFetches:
    """Fetches of byte ranges of objects of one source, through one backend.

    Parameters
    ----------
    reading : Reading

    Notes
    -----
    What is fetched is claimed byte by byte: who wants other bytes of the same object waits for nobody, and who wants
    some of them asks for the rest only. What comes back is cached with the bytes between the ranges, as they were paid
    for.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    async def look(self, key: str, entries: Iterable[Entry]) -> tuple[Found, list[Entry]]:
        """What is cached of some ranges of an object, and which are not."""
        listed = self._reading.backend.listed(key)
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
        """The bytes of some ranges, None where there is no such object; from the source, or from whoever asks it.

        Raises
        ------
        Replaced
            The source has another object than what is cached is of.
        Exception
            The source's own.
        """
        async with self._reading.backend.fetching():
            return await _Fetch(self, self._reading, key, entries, prototype, limits).run()


class _Fetch:
    """One call's way to the bytes it wants."""

    def __init__(
        self,
        fetches: RangeFetches,
        reading: Reading,
        key: str,
        entries: Sequence[Entry],
        prototype: BufferPrototype,
        limits: dict[str, int],
    ) -> None:
        self._fetches = fetches
        self._reading = reading
        self._backend = reading.backend
        self._key = key
        self._wanted = entries
        self._prototype = prototype
        self._limits = limits
        self._started = time.perf_counter()
        self._left = {entry: (entry.start, entry.stop) for entry in entries}
        self._found: Found = {}
        self._mosaic = Mosaic()
        self._asked: list[Span] = []
        # what came from the source, to this task or another, and what tells its state; what was put together of that
        self._answers: dict[Span, str] = {}
        self._joined: list[Entry] = []
        # cached, but damaged, too old or gone
        self._unfit: set[Entry] = set()
        self._ticket: Any = None
        self._leads = Leads(reading.backend)

    async def run(self) -> Found:
        deadline = time.monotonic() + self._reading.timeout
        pause = _FIRST_POLL
        while True:
            if self._is_overtaken():
                self._mosaic = Mosaic()
            self._ticket = self._backend.ticket(self._wanted[0])
            needs = self._needs(self._names())
            mine, others = self._claim(needs, alone=self._ticket is None or time.monotonic() >= deadline)
            try:
                # with the claims made: whoever had them before may just have published
                await self._gather()
                if not self._left:
                    break
                if self._needs([]) != needs:
                    continue
                calls = [self._wait(claim) for claim in others]
                await upstream.all_of([self._lead(mine), *calls] if mine else calls)
                if not self._left:
                    break
            finally:
                for lead in mine:
                    if not lead.unstored:
                        self._leads.leave(lead)
            if not mine and not others:
                # another process is fetching
                await asyncio.sleep(pause)
                pause = min(pause * 1.2, _LONGEST_POLL)
        await self._make_sure()
        return self._found

    # -- what is there

    def _names(self) -> list[Span]:
        """What is cached of what is wanted, told by names alone."""
        listed = self._backend.listed(self._key)
        return [_span_of(piece) for span in self._left.values() for piece in self._fit(listed.overlapping(*span))]

    def _fit(self, pieces: Iterable[Entry]) -> list[Entry]:
        return [piece for piece in pieces if piece not in self._unfit and piece.stop != END]

    def _needs(self, names: list[Span]) -> list[Span]:
        """What is neither at hand nor among some other spans."""
        there = Cover(names)
        return [
            part
            for span in self._left.values()
            for missing in self._mosaic.missing(span)
            for part in there.missing(missing)
        ]

    async def _gather(self) -> None:
        """Take what is cached, whole or in parts."""
        found, _ = await self._fetches.look(self._key, self._left)
        for entry, data in found.items():
            self._take(entry, data)
        listed = self._backend.listed(self._key)
        pieces = {piece for span in self._left.values() for piece in self._fit(listed.overlapping(*span))}
        for piece in pieces:
            if not self._mosaic.missing(_span_of(piece)):
                continue
            if (data := await self._reading.find(piece)) is None:
                self._unfit.add(piece)
            else:
                self._mosaic.add(_span_of(piece), data)
        if self._is_overtaken():
            self._mosaic = Mosaic()
        self._assemble()

    def _is_overtaken(self) -> bool:
        """Whether the object was written since: bytes from before and from after that are not of one state of it."""
        return bool(self._backend.ticket(self._wanted[0]) != self._ticket)

    def _assemble(self) -> None:
        for entry, span in list(self._left.items()):
            if not self._mosaic.missing(span):
                self._take(entry, self._mosaic.of(span))
                answers = [of for of in self._answers if of[0] < span[1] and span[0] < of[1]]
                if answers and not any(of[0] <= span[0] and span[1] <= of[1] for of in answers):
                    self._joined.append(entry)

    async def _make_sure(self) -> None:
        """What was put together of several answers may be of several states, where the object is just being written."""
        if not self._joined:
            return
        await self._must_agree(set(self._answers.values()))
        if await self._backend.is_written(self._key):
            spans = [(entry.start, entry.stop) for entry in self._joined]
            answers = await upstream.ask_for_spans(
                self._reading.source, self._key, self._prototype, spans, **self._limits
            )
            for entry, answer in zip(self._joined, answers, strict=True):
                self._found[entry] = None if answer.value is None else contents(answer.value)

    def _take(self, entry: Entry, data: memoryview | None) -> None:
        span = self._left.pop(entry)
        self._found[entry] = data
        if next(Cover(self._asked).parts(span), None) is None:
            request = request_for(self._key, entry)._replace(started=self._started)
            self._reading.hit(request, data)

    # -- who fetches what is not

    def _claim(self, needs: list[Span], *, alone: bool) -> tuple[list[Lead], list[Claim]]:
        if not needs:
            return [], []
        listed = self._backend.listed(self._key)
        extent = min(first for first, _ in needs), max(last for _, last in needs)
        cached = [_span_of(piece) for piece in self._fit(listed.overlapping(*extent))]
        plan = partial(merged, gap=self._limits["max_gap_bytes"], most=self._limits["max_coalesced_bytes"])
        if alone:
            return [Lead(Claim(span)) for span in plan(needs, walls=Cover(cached))], []
        return self._leads.claim(self._key, (self._wanted[0].key, self._ticket), needs, cached, plan)

    async def _wait(self, claim: Claim) -> None:
        """What another task of this process is fetching; nothing where it gave up."""
        with suppress(HandedOver, TimeoutError):
            self._land(claim.span, *await asyncio.wait_for(claim.flight.outcome(), self._reading.timeout))

    def _land(self, span: Span, data: memoryview | None, validator: str) -> None:
        if data is not None:
            if self._is_overtaken():
                # these are of one state, by themselves
                self._mosaic = Mosaic()
            self._mosaic.add(span, data)
            self._answers[span] = validator
            self._assemble()
        else:
            for entry in list(self._left):
                self._take(entry, None)

    # -- fetching

    async def _lead(self, leads: list[Lead]) -> None:
        """Fetch for all who wait."""
        begun = time.perf_counter()
        spans = [lead.claim.span for lead in leads]
        stats = self._reading.stats
        try:
            answers = await upstream.ask_for_spans(
                self._reading.source, self._key, self._prototype, spans, **self._limits
            )
            fetched = [contents(answer.value) for answer in answers if answer.value is not None]
            self._asked += spans
            misses = sum(next(Cover(spans).parts(span), None) is not None for span in self._left.values())
            stats.miss(sum(map(len, fetched)), time.perf_counter() - begun)
            for _ in range(misses - 1):
                stats.miss(0, 0.0)
            if len(fetched) < len(answers):
                for lead in leads:
                    lead.claim.flight.land((None, ""))
                await self._reading.note_lack(self._key, self._ticket)
                self._land(spans[0], None, "")
                return
            await self._must_agree({answer.validator for answer in answers})
            for lead, answer, data in zip(leads, answers, fetched, strict=True):
                lead.claim.flight.land((data, answer.validator))
                self._land(lead.claim.span, data, answer.validator)
            listed = self._backend.listed(self._key)
            # what is there already is not stored again
            there = [_span_of(piece) for span in spans for piece in self._fit(listed.overlapping(*span))]
            seams = {seam for entry in self._wanted for seam in (entry.start, entry.stop)}
            pieces = pieces_of(leads, answers, there, seams)
            await self._leads.store(self._key, pieces, self._ticket, self._reading.max_size)
        except BaseException as error:
            for lead in leads:
                lead.claim.flight.fail(error)
            raise

    async def _must_agree(self, validators: set[str]) -> None:
        """Whoever asks for ranges has read where they are: bytes of another state of the object would be wrong ones."""
        told = validators - {""}
        if told and len(told | self._backend.states_of(self._key)) > 1:
            await self._backend.forget(self._key, self._ticket)
            raise Replaced(self._key)


def _span_of(piece: Entry) -> Span:
    return piece.start, piece.stop
