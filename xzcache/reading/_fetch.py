"""Fetches of byte ranges: each byte is fetched once for all readers, in as few requests as Zarr sends."""

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
    Entry,
    IntervalSet,
    LeaderCancelled,
    Replaced,
    SparseBuffer,
    Unclear,
    adopt_session,
    cut,
    differ,
    from_source,
    is_from_source,
    merged,
)
from xzcache.reading._request import contents, request_for

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from zarr.core.buffer import BufferPrototype

    from xzcache.model import Span
    from xzcache.reading._request import Reading, Request
    from xzcache.sources import FetchResult


# -- A whole object assembled from cached pieces; only the gaps are requested.

_MOST_REQUESTS: Final = 8


async def assembled(reading: Reading, request: Request) -> sources.FetchResult | None:
    """Assemble a whole object of which pieces are cached, requesting only the gaps.

    Returns None if a plain request is better: too little is cached, the gaps are too many, or the pieces cannot be
    verified to be of the current object.
    """
    backend, key = reading.backend, request.key
    listed = backend.parts(key).pieces
    pieces = [piece for piece in listed if piece.start >= 0 and piece.stop != END]
    if sum(piece.stop - piece.start for piece in pieces) <= NEGLIGIBLE or len(states := backend.parts(key).states) != 1:
        return None
    if not is_from_source(state := min(states)):
        return None
    had = SparseBuffer()
    ends = 0
    for piece in pieces:
        # check each piece: they may have been stored before and after the object changed
        fitting = backend.parts(key).validator(piece) == state and (data := await reading.get_cached(piece))
        if fitting and data and backend.parts(key).validator(piece) == state:
            had.add((piece.start, piece.start + len(data)), data)
            ends = max(ends, piece.start + len(data))
    holes = had.missing((0, ends))
    if ends <= NEGLIGIBLE or len(holes) >= _MOST_REQUESTS:
        return None
    begun = time.perf_counter()
    # request the last byte again, because a request beyond the end is an error
    asked = [RangeByteRequest(*hole) for hole in holes] + [OffsetByteRequest(ends - 1)]
    answers = await sources.all_of(
        sources.fetch(
            reading.source,
            key,
            request.prototype,
            part,
            fixed=reading.fixed,
            ignore_validators=reading.ignore_validators,
            states=lambda: states,
        )
        for part in asked
    )
    fetched = [contents(answer.value) for answer in answers if answer.value is not None]
    reading.miss(key, sum(map(len, fetched)) if fetched else None, begun, [*holes, (ends - 1, END)])
    if len(fetched) < len(asked) or any(answer.validator != state or not answer.exact for answer in answers):
        return None
    for hole, data in zip(holes, fetched, strict=False):
        had.add(hole, data)
    whole: Span = (0, ends - 1)
    data = memoryview(b"".join([had.of(whole), fetched[-1]]))
    size = answers[-1].size
    if size is not None and len(data) != size:
        return None
    return sources.FetchResult(request.prototype.buffer.from_bytes(data), state, size=size)


# -- Claims of byte ranges, among the tasks of this process and among the processes of a machine.

_PIECE: Final = 1 << 20
"""Bytes of one cached piece, unless a single range has more: all of it is checked when a process first reads of it."""


class Plan(Protocol):
    """Plans the requests for the needed spans, excluding some bytes."""

    def __call__(self, spans: Iterable[Span], *, excluded: IntervalSet) -> list[Span]: ...


@dataclass(eq=False)
class Lead:
    """A span that one task fetches for all readers in this and in other processes."""

    claim: Claim
    what: Hashable = None
    unlock: Callable[[], None] | None = None
    unstored: int = 0
    """The pieces that are still to be stored; storing the last one releases the claim."""


class Piece(NamedTuple):
    """Bytes to store."""

    lead: Lead
    span: Span
    data: memoryview
    validator: str


class Leads:
    """Claims spans of the objects of one source."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._backend = reading.backend

    def claim(
        self, key: str, what: Hashable, needs: list[Span], cached: list[Span], plan: Plan
    ) -> tuple[list[Lead], list[Claim]]:
        """Claim the needed spans that no task fetches, with the gaps between them.

        `what` names the object in its current state; `cached` are spans that need not be fetched. Returns the new
        claims, and those of other tasks of this process that overlap the needed spans.
        """
        taken: list[Span] = []

        def choose(flying: list[Span]) -> list[Span]:
            away = IntervalSet([*flying, *taken])
            # skip gaps that another task fetches already
            asked = plan(
                [part for need in needs for part in away.missing(need)], excluded=IntervalSet([*cached, *away.spans])
            )
            return [part for span in asked for part in away.missing(span)]

        mine: list[Lead] = []
        while True:
            made, others = self._reading.tables.claims.make(what, choose)
            refused = False
            for lead in [Lead(claim, what) for claim in made]:
                answer = self._backend.acquire(key, lead.claim.span)
                if isinstance(answer, tuple):
                    taken.append(answer)
                    refused = True
                    self.release(lead)
                else:
                    lead.unlock = answer
                    mine.append(lead)
            if not refused:
                break
        ours = {lead.claim for lead in mine}
        wanted = IntervalSet(needs)
        return mine, [claim for claim in others if claim not in ours and next(wanted.parts(claim.span), None)]

    def release(self, lead: Lead) -> None:
        """Release a claim; a second call has no effect."""
        if lead.what is not None:
            self._reading.tables.claims.release(lead.what, lead.claim)
        unlock, lead.unlock = lead.unlock, None
        if unlock is not None:
            # a lock that cannot be given back goes with the process
            with suppress(OSError):
                unlock()

    async def store(self, key: str, pieces: Sequence[Piece], version: Any) -> None:
        """Store pieces; storing the last piece of a claim releases it."""
        for piece in pieces:
            piece.lead.unstored += 1
        try:
            for lead, (first, last), data, validator in pieces:
                entry = self._reading.entry(key, first, last)
                assert entry is not None
                await self._backend.publish(entry, data, version, validator, partial(self._stored, lead))
        except BaseException:
            for piece in pieces:
                piece.lead.unstored = 0
            raise

    def _stored(self, lead: Lead) -> None:
        lead.unstored -= 1
        if lead.unstored == 0:
            self.release(lead)


def pieces_of(
    leads: Sequence[Lead], answers: Sequence[FetchResult], there: list[Span], boundaries: set[int]
) -> list[Piece]:
    """The fetched pieces that are not cached yet, cut at the ends of the requested ranges."""
    cached = IntervalSet(there)
    pieces = []
    for lead, answer in zip(leads, answers, strict=True):
        if answer.value is None:
            continue
        asked, data = lead.claim.span, contents(answer.value)
        for part in cached.missing(asked):
            for first, last in cut(part, boundaries, _PIECE):
                if of := data[first - asked[0] : last - asked[0]]:
                    pieces.append(Piece(lead, (first, last), of, answer.validator))
    return pieces


# -- Fetching the byte ranges that are not cached.

_FIRST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.005
_TRIES: Final = 3
"""How often ranges without validators are fetched again because entries were invalidated meanwhile."""

Found = dict["Entry", memoryview | None]


class RangeFetches:
    """Fetches of byte ranges of objects of one source, through one backend.

    Claims are made byte by byte: a reader of other bytes of the object does not wait, and a reader of overlapping bytes
    requests only the rest. Bytes in the gaps between merged ranges are cached too.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    async def look(self, key: str, entries: Iterable[Entry]) -> tuple[Found, list[Entry]]:
        """The cached ranges among some entries, and the missing ones."""
        listed = self._reading.backend.parts(key).pieces
        found: Found = {}
        missing: list[Entry] = []
        for entry in entries:
            # the first one that is missed has shown that there is no whole object either
            hopeless = missing and next(listed.covering(entry), None) is None
            data = None if hopeless else await self._reading.get_cached(entry)
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
        """The bytes of some ranges, None if the object is missing, from the source or from another task's fetch.

        Parameters
        ----------
        states : iterable of str
            The validators of cached ranges that the same reader gets.

        Raises
        ------
        Replaced
            The object at the source is not the cached one.
        Unclear
            The states of the ranges cannot be compared.
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
        # bytes in memory, by validator: no range is assembled from two validators
        self._buffers: dict[str, SparseBuffer] = {}
        self._asked: list[Span] = []
        # the validators of the ranges taken so far
        self._known = from_source(states)
        self._used: set[str] = set(self._known)
        self._tries = 0
        # cached pieces that are damaged, too old, gone, or of an unknown state
        self._unfit: set[Entry] = set()
        self._version: Any = None
        self._leads = Leads(reading)
        # a read that must see every change of the source uses no cached range, and joins no request that may have been
        # answered before it began
        self._force = reading.must_ask(key)

    async def run(self) -> Found:
        deadline = time.monotonic() + self._reading.timeout
        pause = _FIRST_POLL
        if not all(is_from_source(state) for state in self._backend.parts(self._key).states):
            # then all ranges are fetched together
            self._unfit.update(self._backend.parts(self._key).pieces)
        while True:
            self._let_go_if_overtaken()
            self._version = self._backend.write_version(self._key)
            needs = self._needs(self._names())
            alone = self._force or self._version is None or time.monotonic() >= deadline
            mine, others = self._claim(needs, alone=alone)
            try:
                # check after claiming: the previous holder may just have published
                await self._gather()
                if not self._left:
                    break
                await self._must_agree(self._used | self._buffers.keys())
                if self._needs([]) != needs:
                    continue
                calls = [self._wait(claim) for claim in others]
                await sources.all_of([self._lead(mine), *calls] if mine else calls)
                if not self._left:
                    break
            finally:
                for lead in mine:
                    if not lead.unstored:
                        self._leads.release(lead)
            if not mine and not others:
                # another process is fetching
                await asyncio.sleep(pause)
                pause = min(pause * 1.2, _LONGEST_POLL)
        await self._must_agree(self._used)
        if len(self._used) > 1 and from_source(self._used):
            # the state of some ranges is unknown
            raise Unclear
        return self._found

    # -- cached pieces

    def _names(self) -> list[Span]:
        """The spans of cached pieces that overlap the wanted ranges, from the list of their names."""
        if self._force:
            return []
        listed = self._backend.parts(self._key).pieces
        return [_span_of(piece) for span in self._left.values() for piece in self._usable(listed.overlapping(*span))]

    def _usable(self, pieces: Iterable[Entry]) -> list[Entry]:
        return [piece for piece in pieces if piece not in self._unfit and piece.stop != END]

    def _needs(self, names: list[Span]) -> list[Span]:
        """The parts of the wanted ranges that are neither in memory nor in the given spans."""
        there = IntervalSet(names)
        named = [buffer for validator, buffer in self._buffers.items() if is_from_source(validator)]
        at_hand = named[0] if named else SparseBuffer()
        return [
            part for span in self._left.values() for missing in at_hand.missing(span) for part in there.missing(missing)
        ]

    async def _gather(self) -> None:
        """Take cached ranges, whole or in parts."""
        if self._force:
            return
        listed = self._backend.parts(self._key).pieces
        states = self._backend.parts(self._key).states
        found, missing = await self._fetches.look(self._key, self._left)
        overlapping = [piece for span in self._left.values() for piece in listed.overlapping(*span)]
        # unfit pieces can be served if nothing is missing any more: another reader has stored the rest in the same
        # session
        if not self._is_overtaken() and (not missing or self._unfit.isdisjoint(overlapping)):
            for entry, data in found.items():
                self._used |= states
                self._take(entry, data)
        pieces = {piece for span in self._left.values() for piece in self._usable(listed.overlapping(*span))}
        for piece in pieces:
            state = self._backend.parts(self._key).validator(piece)
            if (data := await self._reading.get_cached(piece)) is None or self._backend.parts(self._key).validator(
                piece
            ) != state:
                self._unfit.add(piece)
                continue
            self._buffers.setdefault(state, SparseBuffer()).add(_span_of(piece), data)
            if not is_from_source(state):
                # it serves its own bytes only
                self._unfit.add(piece)
        self._let_go_if_overtaken()
        self._assemble()

    def _is_overtaken(self) -> bool:
        """Whether the object was invalidated since, so that earlier and later bytes may differ in state."""
        return bool(self._backend.write_version(self._key) != self._version)

    def _let_go_if_overtaken(self) -> None:
        """Drop bytes that cannot be compared with later ones, if the object was invalidated meanwhile."""
        if self._is_overtaken():
            self._let_go()

    def _let_go(self) -> None:
        self._buffers.clear()
        if all(map(is_from_source, self._used)):
            return
        self._tries += 1
        if self._tries > _TRIES:
            raise Unclear
        self._found.clear()
        self._left = {entry: (entry.start, entry.stop) for entry in self._wanted}
        self._used = set(self._known)

    def _assemble(self) -> None:
        for entry, span in list(self._left.items()):
            for validator, buffer in self._buffers.items():
                # pieces without a validator may be of different answers
                if validator and not buffer.missing(span):
                    self._used.add(validator)
                    self._take(entry, buffer.of(span))
                    break

    def _take(self, entry: Entry, data: memoryview | None) -> None:
        span = self._left.pop(entry)
        self._found[entry] = data
        if next(IntervalSet(self._asked).parts(span), None) is None:
            request = request_for(self._key, entry)._replace(started=self._started)
            self._reading.hit(request, data)

    # -- claiming the missing spans

    def _claim(self, needs: list[Span], *, alone: bool) -> tuple[list[Lead], list[Claim]]:
        if not needs:
            return [], []
        listed = self._backend.parts(self._key).pieces
        extent = min(first for first, _ in needs), max(last for _, last in needs)
        cached = [_span_of(piece) for piece in self._usable(listed.overlapping(*extent))]
        plan = partial(merged, gap=self._limits["max_gap_bytes"], most=self._limits["max_coalesced_bytes"])
        if alone:
            return [Lead(Claim(span)) for span in plan(needs, excluded=IntervalSet([] if self._force else cached))], []
        return self._leads.claim(self._key, (self._wanted[0].key, self._version), needs, cached, plan)

    async def _wait(self, claim: Claim) -> None:
        """Wait for another task's fetch; a cancelled one gives nothing."""
        with suppress(LeaderCancelled, TimeoutError):
            self._deliver(claim.span, *await asyncio.wait_for(claim.flight.outcome(), self._reading.timeout))

    def _deliver(self, span: Span, data: memoryview | None, validator: str) -> None:
        if data is not None:
            self._let_go_if_overtaken()
            self._buffers.setdefault(validator, SparseBuffer()).add(span, data)
            self._assemble()
        else:
            for entry in list(self._left):
                self._take(entry, None)

    # -- fetching

    async def _request(self, spans: Sequence[Span]) -> list[sources.FetchResult]:
        reading = self._reading
        states = lambda: self._backend.parts(self._key).states  # noqa: E731
        return await sources.fetch_spans(
            reading.source,
            self._key,
            self._prototype,
            spans,
            fixed=reading.fixed,
            ignore_validators=reading.ignore_validators,
            states=states,
            **self._limits,
        )

    async def _lead(self, leads: list[Lead]) -> None:
        """Fetch the claimed spans for all waiting readers."""
        begun = time.perf_counter()
        spans = [lead.claim.span for lead in leads]
        try:
            answers = await self._request(spans)
            fetched = [contents(answer.value) for answer in answers if answer.value is not None]
            self._asked += spans
            misses = sum(next(IntervalSet(spans).parts(span), None) is not None for span in self._left.values())
            self._reading.miss(self._key, sum(map(len, fetched)) if fetched else None, begun, spans)
            for _ in range(misses - 1):
                self._reading.stats.miss(0, 0.0)
            if len(fetched) < len(answers):
                for lead in leads:
                    lead.claim.flight.set_result((None, ""))
                await self._reading.record_missing(Entry(self._wanted[0].key), self._key, self._version)
                self._deliver(spans[0], None, "")
                return
            if not all(answer.exact for answer in answers):
                for lead in leads:
                    # each waiting reader sends its own request
                    lead.claim.flight.set_exception(LeaderCancelled())
                await self._request_plainly(dict(zip(spans, answers, strict=True)))
                return
            await self._must_agree(self._used | {answer.validator for answer in answers})
            asked = self._reading.entry(self._key, *spans[0])
            assert asked is not None
            before = self._version
            self._version, validator, replaced = await self._reading.agree(
                self._key, asked, answers[0].validator, before, fetched[0] if len(fetched) == 1 else None
            )
            if replaced:
                raise Replaced(self._key)
            if self._version != before or self._is_overtaken():
                self._let_go()
            answers = [answer._replace(validator=adopt_session(answer.validator, validator)) for answer in answers]
            for lead, answer, data in zip(leads, answers, fetched, strict=True):
                lead.claim.flight.set_result((data, answer.validator))
                self._buffers.setdefault(answer.validator, SparseBuffer()).add(lead.claim.span, data)
            self._assemble()
            there: list[Span] = []
            if is_from_source(answers[0].validator):
                # cached spans are not stored again
                listed = self._backend.parts(self._key).pieces
                there = [_span_of(piece) for span in spans for piece in self._usable(listed.overlapping(*span))]
            boundaries = {boundary for entry in self._wanted for boundary in (entry.start, entry.stop)}
            pieces = pieces_of(leads, answers, there, boundaries)
            await self._leads.store(self._key, pieces, self._version)
        except BaseException as error:
            for lead in leads:
                lead.claim.flight.set_exception(LeaderCancelled() if isinstance(error, Unclear) else error)
            raise

    async def _request_plainly(self, answers: dict[Span, sources.FetchResult]) -> None:
        """Request each range separately without caching, because the source returns other bytes than requested.

        Raises `OSError` if it still does.
        """
        entries = [
            entry for entry, span in self._left.items() if next(IntervalSet(answers).parts(span), None) is not None
        ]
        again = [self._left[entry] for entry in entries if self._left[entry] not in answers]
        answers |= dict(zip(again, await self._request(again) if again else [], strict=True))
        for entry in entries:
            first, last = span = self._left[entry]
            answer = answers[span]
            data = None if answer.value is None else contents(answer.value)
            # a shorter answer may end at the end of the object, if its size is unknown
            if data is not None and not answer.exact and (answer.size is not None or len(data) > last - first):
                what = f"asked for bytes {first} to {last - 1}, the source gave {len(data)} bytes that are not those"
                raise OSError(errno.EIO, what, self._key)
            if data is not None and answer.exact:
                self._used.add(answer.validator)
            self._take(entry, data)

    async def _must_agree(self, validators: set[str]) -> None:
        """Raise unless all validators are of one state."""
        if len(from_source(validators)) > 1:
            await self._backend.invalidate(self._key, self._version)
            if not differ(validators) or await self._reading.has_several_names(self._key):
                raise Unclear
            self._reading.record_replaced(self._key)
            raise Replaced(self._key)


def _span_of(piece: Entry) -> Span:
    return piece.start, piece.stop
