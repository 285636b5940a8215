"""Fetching byte ranges of one object for all who want them, each byte once, in as few requests as Zarr makes."""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from zarr.abc.store import OffsetByteRequest, RangeByteRequest

from xzcache import sources
from xzcache.model import (
    END,
    NEGLIGIBLE,
    Claim,
    Cover,
    HandedOver,
    Mosaic,
    Replaced,
    Unclear,
    beside,
    cut,
    differ,
    merged,
    tells,
    told,
)
from xzcache.reading._request import contents, request_for

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from zarr.core.buffer import BufferPrototype

    from xzcache.model import Backend, Entry, Span
    from xzcache.reading._request import Reading, Request
    from xzcache.sources import Answer


# -- A whole object put together from what is cached of it and the rest, which alone is asked for.

_MOST_REQUESTS: Final = 8


async def assembled(reading: Reading, request: Request) -> sources.Answer | None:
    """The whole of an object of which pieces are cached.

    Returns
    -------
    Answer or None
        None where it is better asked for as it is: too little of it is cached, or in too many places; or nothing tells
        whether the pieces are of the object as it is now.

    Raises
    ------
    Exception
        The source's own.
    """
    backend, key = reading.backend, request.key
    listed = backend.listed(key)
    pieces = [piece for piece in listed if piece.start >= 0 and piece.stop != END]
    if sum(piece.stop - piece.start for piece in pieces) <= NEGLIGIBLE or len(states := backend.states_of(key)) != 1:
        return None
    if not tells(state := min(states)):
        return None
    had = Mosaic()
    ends = 0
    for piece in pieces:
        # looked at one by one: they may have been stored before and after the object changed
        fitting = await backend.validator(piece) == state and (data := await reading.find(piece))
        if fitting and data and await backend.validator(piece) == state:
            had.add((piece.start, piece.start + len(data)), data)
            ends = max(ends, piece.start + len(data))
    holes = had.missing((0, ends))
    if ends <= NEGLIGIBLE or len(holes) >= _MOST_REQUESTS:
        return None
    begun = time.perf_counter()
    # the last byte is asked for again: who asks for what is beyond the end gets an error
    asked = [RangeByteRequest(*hole) for hole in holes] + [OffsetByteRequest(ends - 1)]
    answers = await sources.all_of(
        sources.ask(
            reading.source,
            key,
            request.prototype,
            part,
            fixed=reading.fixed,
            untold=reading.untold,
            states=lambda: states,
        )
        for part in asked
    )
    fetched = [contents(answer.value) for answer in answers if answer.value is not None]
    reading.stats.miss(sum(map(len, fetched)), time.perf_counter() - begun)
    if len(fetched) < len(asked) or any(answer.validator != state or not answer.exact for answer in answers):
        return None
    for hole, data in zip(holes, fetched, strict=False):
        had.add(hole, data)
    whole: Span = (0, ends - 1)
    data = memoryview(b"".join([had.of(whole), fetched[-1]]))
    size = answers[-1].size
    if size is not None and len(data) != size:
        return None
    return sources.Answer(request.prototype.buffer.from_bytes(data), state, size=size)


# -- Who fetches which bytes of an object, among the tasks of this process and among the processes of a machine.

_PIECE: Final = 1 << 20
"""Bytes of one cached piece, unless a single range has more: all of it is checked when a process first reads of it."""


class Plan(Protocol):
    """What is asked for as one, of what is needed and without what is had."""

    def __call__(self, spans: Iterable[Span], *, walls: Cover) -> list[Span]: ...


@dataclass(eq=False)
class Lead:
    """Bytes that one task fetches for all who wait, here and in other processes."""

    claim: Claim
    what: Hashable = None
    unlock: Callable[[], None] | None = None
    unstored: int = 0
    """Pieces that are yet to be stored; whoever stores the last one lets go."""


class Piece(NamedTuple):
    """Bytes that are to be stored."""

    lead: Lead
    span: Span
    data: memoryview
    validator: str


class Leads:
    """Makes claims of bytes of the objects of one source.

    Parameters
    ----------
    backend : Backend
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def claim(
        self, key: str, what: Hashable, needs: list[Span], cached: list[Span], plan: Plan
    ) -> tuple[list[Lead], list[Claim]]:
        """Claim what nobody fetches yet, with what lies between.

        Parameters
        ----------
        key : str
        what : hashable
            The object as it is now.
        needs : list of (int, int)
        cached : list of (int, int)
            What lies among them and is there.
        plan : callable

        Returns
        -------
        mine : list of Lead
        others : list of Claim
            What is needed and other tasks of this process are fetching. What other processes are fetching is neither.
        """
        taken: list[Span] = []

        def choose(flying: list[Span]) -> list[Span]:
            away = Cover([*flying, *taken])
            # what only lies between is not asked for where others do already
            asked = plan([part for need in needs for part in away.missing(need)], walls=Cover([*cached, *away.spans]))
            return [part for span in asked for part in away.missing(span)]

        mine: list[Lead] = []
        while True:
            made, others = self._backend.claims.make(what, choose)
            refused = False
            for lead in [Lead(claim, what) for claim in made]:
                answer = self._backend.claim(key, lead.claim.span)
                if isinstance(answer, tuple):
                    taken.append(answer)
                    refused = True
                    self.leave(lead)
                else:
                    lead.unlock = answer
                    mine.append(lead)
            if not refused:
                break
        ours = {lead.claim for lead in mine}
        wanted = Cover(needs)
        return mine, [claim for claim in others if claim not in ours and next(wanted.parts(claim.span), None)]

    def leave(self, lead: Lead) -> None:
        """Let go of a claim; again if need be."""
        if lead.what is not None:
            self._backend.claims.leave(lead.what, lead.claim)
        unlock, lead.unlock = lead.unlock, None
        if unlock is not None:
            # a lock that cannot be given back goes with the process
            with suppress(OSError):
                unlock()

    async def store(self, key: str, pieces: Sequence[Piece], ticket: Any, max_size: int | None) -> None:
        """Store pieces; whoever stores the last one of a claim lets go of it."""
        for piece in pieces:
            piece.lead.unstored += 1
        try:
            for lead, (first, last), data, validator in pieces:
                entry = self._backend.entry(key, first, last)
                assert entry is not None
                await self._backend.publish_soon(entry, data, ticket, max_size, validator, partial(self._stored, lead))
        except BaseException:
            for piece in pieces:
                piece.lead.unstored = 0
            raise

    def _stored(self, lead: Lead) -> None:
        lead.unstored -= 1
        if lead.unstored == 0:
            self.leave(lead)


def pieces_of(leads: Sequence[Lead], answers: Sequence[Answer], there: list[Span], seams: set[int]) -> list[Piece]:
    """What was fetched, but for what is there already, in pieces that end where ranges do."""
    cached = Cover(there)
    pieces = []
    for lead, answer in zip(leads, answers, strict=True):
        if answer.value is None:
            continue
        asked, data = lead.claim.span, contents(answer.value)
        for part in cached.missing(asked):
            for first, last in cut(part, seams, _PIECE):
                if of := data[first - asked[0] : last - asked[0]]:
                    pieces.append(Piece(lead, (first, last), of, answer.validator))
    return pieces


# -- Fetching the byte ranges that are not cached.

_FIRST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.005
_TRIES: Final = 3
"""Times that what nothing tells the state of is fetched anew, as something was forgotten meanwhile."""

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
        self,
        key: str,
        entries: Sequence[Entry],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: Iterable[str] = (),
    ) -> Found:
        """The bytes of some ranges, None where there is no such object; from the source, or from whoever asks it.

        Parameters
        ----------
        states : iterable of str
            The validators of what of the object was taken from the cache for the same reader.

        Raises
        ------
        Replaced
            The source has another object than what is cached is of.
        Unclear
            Nobody can tell whether it has.
        Exception
            The source's own.
        """
        async with self._reading.backend.fetching():
            return await _Fetch(self, self._reading, key, entries, prototype, limits, states).run()


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
        states: Iterable[str],
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
        # bytes that are at hand, by their validator: of two of them no range is put together
        self._mosaics: dict[str, Mosaic] = {}
        self._asked: list[Span] = []
        # the validators of what was taken
        self._known = told(states)
        self._used: set[str] = set(self._known)
        self._tries = 0
        # cached, but damaged, too old, gone, or of an answer whose state nobody can compare
        self._unfit: set[Entry] = set()
        self._ticket: Any = None
        self._leads = Leads(reading.backend)
        # a read that has to see each change of the source takes nothing that is cached, and joins no request that may
        # have been answered before the read began
        self._anew = reading.must_ask(key)

    async def run(self) -> Found:
        deadline = time.monotonic() + self._reading.timeout
        pause = _FIRST_POLL
        if not all(tells(state) for state in self._backend.states_of(self._key)):
            # what is wanted together is then of one time
            self._unfit.update(self._backend.listed(self._key))
        while True:
            self._let_go_if_overtaken()
            self._ticket = self._backend.ticket(self._wanted[0])
            needs = self._needs(self._names())
            alone = self._anew or self._ticket is None or time.monotonic() >= deadline
            mine, others = self._claim(needs, alone=alone)
            try:
                # with the claims made: whoever had them before may just have published
                await self._gather()
                if not self._left:
                    break
                await self._must_agree(self._used | self._mosaics.keys())
                if self._needs([]) != needs:
                    continue
                calls = [self._wait(claim) for claim in others]
                await sources.all_of([self._lead(mine), *calls] if mine else calls)
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
        await self._must_agree(self._used)
        if len(self._used) > 1 and told(self._used):
            # some of it has a state that nothing tells
            raise Unclear
        return self._found

    # -- what is there

    def _names(self) -> list[Span]:
        """What is cached of what is wanted, told by names alone."""
        if self._anew:
            return []
        listed = self._backend.listed(self._key)
        return [_span_of(piece) for span in self._left.values() for piece in self._fit(listed.overlapping(*span))]

    def _fit(self, pieces: Iterable[Entry]) -> list[Entry]:
        return [piece for piece in pieces if piece not in self._unfit and piece.stop != END]

    def _needs(self, names: list[Span]) -> list[Span]:
        """What is neither at hand nor among some other spans."""
        there = Cover(names)
        told = [mosaic for validator, mosaic in self._mosaics.items() if tells(validator)]
        at_hand = told[0] if told else Mosaic()
        return [
            part for span in self._left.values() for missing in at_hand.missing(span) for part in there.missing(missing)
        ]

    async def _gather(self) -> None:
        """Take what is cached, whole or in parts."""
        if self._anew:
            return
        listed = self._backend.listed(self._key)
        states = self._backend.states_of(self._key)
        found, missing = await self._fetches.look(self._key, self._left)
        overlapping = [piece for span in self._left.values() for piece in listed.overlapping(*span)]
        # what is unfit for being completed is as good as ever where nothing is missing any more: another reader has
        # stored the rest, of the same session
        if not self._is_overtaken() and (not missing or self._unfit.isdisjoint(overlapping)):
            for entry, data in found.items():
                self._used |= states
                self._take(entry, data)
        pieces = {piece for span in self._left.values() for piece in self._fit(listed.overlapping(*span))}
        for piece in pieces:
            state = await self._backend.validator(piece)
            if (data := await self._reading.find(piece)) is None or await self._backend.validator(piece) != state:
                self._unfit.add(piece)
                continue
            self._mosaics.setdefault(state, Mosaic()).add(_span_of(piece), data)
            if not tells(state):
                # it serves what it holds, and no more
                self._unfit.add(piece)
        self._let_go_if_overtaken()
        self._assemble()

    def _is_overtaken(self) -> bool:
        """Whether the object was written since: bytes from before and from after that are not of one state of it."""
        return bool(self._backend.ticket(self._wanted[0]) != self._ticket)

    def _let_go_if_overtaken(self) -> None:
        """Let go of what cannot be compared with what comes now, where something was forgotten since the last look."""
        if self._is_overtaken():
            self._let_go()

    def _let_go(self) -> None:
        self._mosaics.clear()
        if all(map(tells, self._used)):
            return
        self._tries += 1
        if self._tries > _TRIES:
            raise Unclear
        self._found.clear()
        self._left = {entry: (entry.start, entry.stop) for entry in self._wanted}
        self._used = set(self._known)

    def _assemble(self) -> None:
        for entry, span in list(self._left.items()):
            for validator, mosaic in self._mosaics.items():
                # nothing is known of pieces without one, not even that they are of one answer
                if validator and not mosaic.missing(span):
                    self._used.add(validator)
                    self._take(entry, mosaic.of(span))
                    break

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
            return [Lead(Claim(span)) for span in plan(needs, walls=Cover([] if self._anew else cached))], []
        return self._leads.claim(self._key, (self._wanted[0].key, self._ticket), needs, cached, plan)

    async def _wait(self, claim: Claim) -> None:
        """What another task of this process is fetching; nothing where it gave up."""
        with suppress(HandedOver, TimeoutError):
            self._land(claim.span, *await asyncio.wait_for(claim.flight.outcome(), self._reading.timeout))

    def _land(self, span: Span, data: memoryview | None, validator: str) -> None:
        if data is not None:
            self._let_go_if_overtaken()
            self._mosaics.setdefault(validator, Mosaic()).add(span, data)
            self._assemble()
        else:
            for entry in list(self._left):
                self._take(entry, None)

    # -- fetching

    async def _ask(self, spans: Sequence[Span]) -> list[sources.Answer]:
        reading = self._reading
        states = partial(self._backend.states_of, self._key)
        return await sources.ask_for_spans(
            reading.source,
            self._key,
            self._prototype,
            spans,
            fixed=reading.fixed,
            untold=reading.untold,
            states=states,
            **self._limits,
        )

    async def _lead(self, leads: list[Lead]) -> None:
        """Fetch for all who wait."""
        begun = time.perf_counter()
        spans = [lead.claim.span for lead in leads]
        stats = self._reading.stats
        try:
            answers = await self._ask(spans)
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
            if not all(answer.exact for answer in answers):
                for lead in leads:
                    # let all who wait ask for themselves
                    lead.claim.flight.fail(HandedOver())
                await self._ask_plainly(dict(zip(spans, answers, strict=True)))
                return
            await self._must_agree(self._used | {answer.validator for answer in answers})
            asked = self._backend.entry(self._key, *spans[0])
            assert asked is not None
            before = self._ticket
            self._ticket, validator, replaced = await self._reading.agree(
                self._key, asked, answers[0].validator, before, fetched[0] if len(fetched) == 1 else None
            )
            if replaced:
                raise Replaced(self._key)
            if self._ticket != before or self._is_overtaken():
                self._let_go()
            answers = [answer._replace(validator=beside(answer.validator, validator)) for answer in answers]
            for lead, answer, data in zip(leads, answers, fetched, strict=True):
                lead.claim.flight.land((data, answer.validator))
                self._mosaics.setdefault(answer.validator, Mosaic()).add(lead.claim.span, data)
            self._assemble()
            there: list[Span] = []
            if tells(answers[0].validator):
                # what is there already is not stored again
                listed = self._backend.listed(self._key)
                there = [_span_of(piece) for span in spans for piece in self._fit(listed.overlapping(*span))]
            seams = {seam for entry in self._wanted for seam in (entry.start, entry.stop)}
            pieces = pieces_of(leads, answers, there, seams)
            await self._leads.store(self._key, pieces, self._ticket, self._reading.max_size)
        except BaseException as error:
            for lead in leads:
                lead.claim.flight.fail(HandedOver() if isinstance(error, Unclear) else error)
            raise

    async def _ask_plainly(self, answers: dict[Span, sources.Answer]) -> None:
        """Ask for each range by itself, and keep nothing: the source gives something else than it is asked for.

        Raises
        ------
        OSError
            The source gives other bytes than it is asked for.
        """
        entries = [entry for entry, span in self._left.items() if next(Cover(answers).parts(span), None) is not None]
        again = [self._left[entry] for entry in entries if self._left[entry] not in answers]
        answers |= dict(zip(again, await self._ask(again) if again else [], strict=True))
        for entry in entries:
            first, last = span = self._left[entry]
            answer = answers[span]
            data = None if answer.value is None else contents(answer.value)
            # fewer may be all there is, where nobody knows the size
            if data is not None and not answer.exact and (answer.size is not None or len(data) > last - first):
                what = f"asked for bytes {first} to {last - 1}, the source gave {len(data)} bytes that are not those"
                raise OSError(errno.EIO, what, self._key)
            if data is not None and answer.exact:
                self._used.add(answer.validator)
            self._take(entry, data)

    async def _must_agree(self, validators: set[str]) -> None:
        """See that no validators are of two states."""
        if len(told(validators)) > 1:
            await self._backend.forget(self._key, self._ticket)
            if not differ(validators) or await self._reading.has_several_names(self._key):
                raise Unclear
            self._reading.note_replaced(self._key)
            raise Replaced(self._key)


def _span_of(piece: Entry) -> Span:
    return piece.start, piece.stop
