"""Fetches of byte ranges: each byte is fetched once for all readers, in as few requests as Zarr sends."""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from zarr.abc.store import OffsetByteRequest

from xzcache import sources
from xzcache.model import (
    END,
    LARGEST,
    Claim,
    Entry,
    Fetched,
    IntervalSet,
    LeaderCancelled,
    Replaced,
    SparseBuffer,
    Unclear,
    adopt_session,
    covers,
    cut,
    differ,
    from_source,
    is_from_source,
    merged,
    part,
    placed,
    unplaced,
)
from xzcache.reading._request import contents, peers

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from zarr.core.buffer import BufferPrototype

    from xzcache.model import Parts, Span
    from xzcache.reading._request import Reading


# -- Claims of byte ranges, among the tasks of this process and among the processes of a machine.

_PIECE: Final = 1 << 20
"""The most bytes of one cached piece, unless a single range is longer; the first read of a process checks all of them.
"""


class Plan(Protocol):
    """Plans the requests for the needed spans, excluding some bytes."""

    def __call__(self, spans: Iterable[Span], *, excluded: IntervalSet) -> list[Span]: ...


@dataclass(eq=False)
class Lead:
    """A span that one task fetches for all readers in this and in other processes."""

    claim: Claim
    what: Hashable = None
    """The name of the object in the table of claims; None for a claim that is not in it."""
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
            made, others = self._reading.claims.make(what, choose)
            refused = False
            for lead in [Lead(claim, what) for claim in made]:
                answer = self._backend.acquire(key, unplaced(lead.claim.span))
                # another process fetches a part: the next round plans around it, so that only the rest is claimed
                if isinstance(answer, tuple):
                    taken.append(placed(answer))
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
            self._reading.claims.release(lead.what, lead.claim)
        unlock, lead.unlock = lead.unlock, None
        if unlock is not None:
            # a lock that cannot be released ends with the process
            with suppress(OSError):
                unlock()

    async def store(self, key: str, pieces: Sequence[Piece], version: Any, age: float = 0.0) -> None:
        """Store pieces that the source gave some seconds ago; storing the last piece of a claim releases it."""
        for piece in pieces:
            piece.lead.unstored += 1
        try:
            for lead, (first, last), data, validator in pieces:
                entry = self._reading.entry(key, first, last)
                assert entry is not None
                await self._backend.publish(entry, data, version, validator, partial(self._stored, lead), age=age)
        except BaseException:
            for piece in pieces:
                piece.lead.unstored = 0
            raise

    def _stored(self, lead: Lead) -> None:
        lead.unstored -= 1
        if lead.unstored == 0:
            self.release(lead)


def pieces_of(
    leads: Sequence[Lead], fetched: Sequence[Fetched], there: list[Span], boundaries: set[int]
) -> list[Piece]:
    """The fetched pieces that are not cached yet, cut at the ends of the requested ranges."""
    cached = IntervalSet(there)
    pieces = []
    for lead, (data, validator, _) in zip(leads, fetched, strict=True):
        first, last = lead.claim.span
        if data is None or validator is None:
            continue
        for gap in cached.missing((first, min(last, first + len(data)) if last >= LARGEST else last)):
            for begin, end in cut(gap, boundaries, _PIECE):
                if of := data[begin - first : end - first]:
                    pieces.append(Piece(lead, (begin, end), of, validator))
    return pieces


# -- Fetching the byte ranges that are not cached.

FIRST_POLL: Final = 0.001
LONGEST_POLL: Final = 0.005


def next_poll(pause: float) -> float:
    """The pause after a pause in which another process still fetched, in seconds."""
    return min(pause * 1.5, LONGEST_POLL)


_TRIES: Final = 3
"""How often ranges without validators are fetched again because entries were invalidated meanwhile."""

Found = dict[Entry, memoryview | None]

ONE: Final = {"max_concurrency": 10, "max_gap_bytes": LARGEST, "max_coalesced_bytes": LARGEST}
"""The limits for a single entry of which parts are cached or under way: they never make it more than one request."""
_MOST_REQUESTS: Final = 8
"""Gaps of an object that are worth a request each; more are requested at once, with what lies between."""


class RangeFetches:
    """Fetches of byte ranges of objects of one source, through one backend.

    Claims are made byte by byte: a reader of other bytes of the object does not wait, and a reader of overlapping bytes
    requests only the rest. Bytes in the gaps between merged ranges are cached too.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    async def look(self, parts: Parts, entries: Iterable[Entry]) -> tuple[Found, list[Entry]]:
        """The cached ranges among some entries of an object with these cached parts, and the missing ones."""
        found: Found = {}
        listed = parts.pieces
        if listed.any() is None and parts.is_empty:
            return found, list(entries)
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
        limits: dict[str, int] = ONE,
        parts: Parts | None = None,
        states: Iterable[str] = (),
    ) -> Found:
        """The bytes of some ranges, None if the object is missing, from the source or from another task's fetch.

        Parameters
        ----------
        parts : Parts, optional
            The cached parts of the object, as the reader has just found them.
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
            fetch = _Fetch(self, self._reading, key, entries, prototype, limits, states)
            return await fetch.run(parts or self._reading.backend.parts(key))


class _Fetch:
    """One call of `RangeFetches.fetch`: its claims, the bytes it has, and the ranges that are left."""

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
        self._left = {entry: placed((entry.start, entry.stop)) for entry in entries}
        self._single = limits is ONE
        # where the object ends, if that is known
        self._end = LARGEST
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
        # a read that must see every change of the source uses no cached range. It joins no request of another reader,
        # whose answer may be from before this read
        self._force = reading.must_ask(key)
        self._is_whole_stored = False
        self._inexact = False
        # of what another node gave
        self._age = 0.0

    async def run(self, parts: Parts) -> Found:
        deadline = time.monotonic() + self._reading.timeout
        pause = FIRST_POLL
        if not all(map(is_from_source, parts.states)):
            # then all ranges are fetched together
            self._unfit.update(parts.pieces)
        self._version = self._backend.write_version(self._key)
        while True:
            needs = self._needs(self._names(parts))
            # after the deadline too: the process or the task that holds a claim may be stopped
            alone = self._force or self._version is None or self._inexact or time.monotonic() >= deadline
            mine, others = self._claim(needs, parts, alone=alone)
            try:
                # check after claiming: the previous holder may just have published
                now = await self._gather()
                if not self._left:
                    break
                await self._must_agree(self._used | self._buffers.keys())
                # a plan from an old list of pieces would request bytes that another reader has just stored
                is_as_named = self._needs([]) == needs and not self._has_gained(mine, parts, now)
                if is_as_named:
                    if mine and not others:
                        await self._lead(mine)
                    else:
                        calls = [self._wait(claim) for claim in others]
                        # at once: two readers that first wait for each other's bytes would both time out
                        await sources.all_of([self._lead(mine), *calls] if mine else calls)
                    if not self._left:
                        break
                    if (mine or others) and self._reading.has_validators is False:
                        # readers that keep dividing an object among themselves would never have bytes of one answer
                        self._count_try()
                if self._single and (self._inexact or self._tries):
                    raise Unclear
            finally:
                for lead in mine:
                    # the others are released when their last piece is stored, so that readers find it
                    if not lead.unstored:
                        self._leads.release(lead)
            if is_as_named and not mine and not others:
                # another process is fetching
                await asyncio.sleep(pause)
                pause = next_poll(pause)
            parts = self._backend.parts(self._key)
            self._let_go_if_overtaken()
            self._version = self._backend.write_version(self._key)
        await self._must_agree(self._used)
        if len(self._used) > 1 and from_source(self._used):
            # the state of some ranges is unknown
            raise Unclear
        if self._asked and not self._is_whole_stored:
            await self._store_whole([])
        return self._found

    # -- cached pieces

    def _names(self, parts: Parts) -> list[Span]:
        """The spans of cached pieces that overlap the wanted ranges, from the list of their names."""
        listed = parts.pieces
        if self._force or listed.any() is None:
            return []
        return [_span_of(piece) for span in self._left.values() for piece in self._usable(listed.overlapping(*span))]

    def _usable(self, pieces: Iterable[Entry]) -> list[Entry]:
        return [piece for piece in pieces if piece not in self._unfit and piece.stop != END]

    def _needs(self, names: list[Span]) -> list[Span]:
        """The parts of the wanted ranges that are neither in memory nor in the given spans."""
        if not names and not self._buffers:
            return [span for span in map(self._trimmed, self._left.values()) if span[0] < span[1]]
        there = IntervalSet(names)
        named = [buffer for validator, buffer in self._buffers.items() if is_from_source(validator)]
        at_hand = named[0] if named else SparseBuffer()
        return [
            part
            for span in map(self._trimmed, self._left.values())
            for missing in at_hand.missing(span)
            for part in there.missing(missing)
        ]

    def _trimmed(self, span: Span) -> Span:
        """A span that ends where the object does, if that is known."""
        return (span[0], max(span[0], self._end)) if span[1] > self._end else span

    def _has_gained(self, mine: list[Lead], before: Parts, now: Parts | None) -> bool:
        """Whether a piece has appeared in a gap that would be requested with the claimed ranges."""
        if now is None or (listed := now.pieces).any() is None:
            return False
        there = [piece for lead in mine for piece in self._usable(listed.overlapping(*lead.claim.span))]
        return bool(there) and not set(there) <= set(before.pieces)

    async def _gather(self) -> Parts | None:
        """Take cached ranges, whole or in parts; returns the cached parts that were looked at."""
        if self._force:
            return None
        parts = self._backend.parts(self._key)
        if parts.is_empty:
            return parts
        listed = parts.pieces
        # with several pieces, the validators are read before the bytes
        states = parts.states if len(listed) > 1 else None
        found, missing = await self._fetches.look(parts, self._left)
        if states is None:
            states = parts.states if found else set()
        overlapping = [piece for span in self._left.values() for piece in listed.overlapping(*span)]
        # once nothing is missing, unfit pieces can be served as well: another reader has stored the rest in the same
        # session
        if found and not self._is_overtaken() and (not missing or self._unfit.isdisjoint(overlapping)):
            for entry, data in found.items():
                self._used |= states
                self._take(entry, data)
        pieces = {piece for span in self._left.values() for piece in self._usable(listed.overlapping(*span))}
        for piece in pieces:
            state = parts.validator(piece)
            # a piece without a state may just have been replaced by the whole object: the read would return its bytes
            data = await self._reading.get_cached(piece) if state else None
            # read before and after: the file may have been replaced between state and bytes
            if data is None or parts.validator(piece) != state:
                self._unfit.add(piece)
                continue
            self._add(_span_of(piece), data, state)
            if not is_from_source(state):
                # a piece of an unknown state serves its own bytes only
                self._unfit.add(piece)
        if pieces:
            self._let_go_if_overtaken()
            self._assemble()
        return parts

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
        self._count_try()
        self._found.clear()
        self._left = {entry: placed((entry.start, entry.stop)) for entry in self._wanted}
        self._end = LARGEST
        self._used = set(self._known)

    def _count_try(self) -> None:
        self._tries += 1
        if self._tries > _TRIES:
            raise Unclear

    def _assemble(self) -> None:
        for entry, span in list(self._left.items()):
            for validator, buffer in self._buffers.items():
                # pieces without a validator may be of different answers
                if validator and not buffer.missing(trimmed := self._trimmed(span)):
                    self._used.add(validator)
                    self._take(entry, buffer.of(trimmed))
                    break

    def _add(self, span: Span, data: memoryview, validator: str) -> None:
        """Keep the bytes of a span; all of a range that lies within is served at once, whatever its validator."""
        for entry, wanted in list(self._left.items()):
            if covers(span, wanted):
                self._used.add(validator)
                self._take(entry, part(data, span, wanted))
        if not validator:
            return
        if len(data) < span[1] - span[0]:
            # the object ends here
            self._end = min(self._end, span[0] + len(data))
            span = span[0], max(self._end, span[0])
        self._buffers.setdefault(validator, SparseBuffer()).add(span, data)

    def _take(self, entry: Entry, data: memoryview | None) -> None:
        span = self._left.pop(entry)
        self._found[entry] = data
        # ranges that this reader has requested were counted as misses
        if not _meet(span, self._asked):
            self._reading.stats.hit(0 if data is None else len(data), time.perf_counter() - self._started)

    # -- claiming the missing spans

    def _claim(self, needs: list[Span], parts: Parts, *, alone: bool) -> tuple[list[Lead], list[Claim]]:
        if not needs:
            return [], []
        listed = parts.pieces
        extent = min(first for first, _ in needs), max(last for _, last in needs)
        cached = [_span_of(piece) for piece in self._usable(listed.overlapping(*extent))]
        plan = partial(self._planned, gap=self._limits["max_gap_bytes"], most=self._limits["max_coalesced_bytes"])
        if alone:
            return [Lead(Claim(span)) for span in plan(needs, excluded=IntervalSet([] if self._force else cached))], []
        return self._leads.claim(self._key, (self._wanted[0].key, self._version, False), needs, cached, plan)

    def _planned(self, spans: Iterable[Span], *, gap: int, most: int, excluded: IntervalSet) -> list[Span]:
        asked = merged(spans, gap=gap, most=most, excluded=excluded)
        if self._single and len(asked) > _MOST_REQUESTS:
            return [(asked[0][0], asked[-1][1])]
        return asked

    async def _wait(self, claim: Claim) -> None:
        """Wait for another task's fetch; a cancelled one gives nothing."""
        with suppress(LeaderCancelled):
            if (fetched := await claim.outcome(self._reading.timeout)) is None:
                return
            data, validator, exact = fetched
            if not exact:
                # the bytes answer the other reader's request only
                self._inexact = True
            elif data is None:
                self._is_missing()
            elif validator is not None:
                # bytes without one are taken from the cache, together with their state
                self._let_go_if_overtaken()
                self._add(claim.span, data, validator)
                self._assemble()

    def _is_missing(self) -> None:
        for entry in list(self._left):
            self._take(entry, None)

    # -- fetching

    async def _request(self, spans: Sequence[Span]) -> list[sources.FetchResult]:
        """Request spans; the last one may reach to the end of the object."""
        reading = self._reading
        options: dict[str, Any] = {
            "fixed": reading.fixed,
            "ignore_validators": reading.ignore_validators,
            "states": lambda: self._backend.parts(self._key).states,
        }
        bounded = [span for span in spans if span[1] < LARGEST]
        calls = []
        if bounded:
            calls.append(
                sources.fetch_spans(reading.source, self._key, self._prototype, bounded, **(options | self._limits))
            )
        for span in spans:
            if span[1] >= LARGEST:
                calls.append(self._request_tail(span[0], options))
        async with reading.asking(self._key):
            answers = [answer for call in await sources.all_of(calls) for answer in call]
        order = [*bounded, *(span for span in spans if span[1] >= LARGEST)]
        return [answers[order.index(span)] for span in spans]

    async def _request_tail(self, first: int, options: dict[str, Any]) -> list[sources.FetchResult]:
        """Request an object from a byte on: its last known byte again, because a request beyond its end is an error."""
        byte_range = OffsetByteRequest(first - 1) if first else None
        try:
            answer = await sources.fetch(self._reading.source, self._key, self._prototype, byte_range, **options)
        except Exception as error:
            if first and not sources.is_outage(error):
                # the object may be shorter by now
                raise Unclear from error
            raise
        if first and answer.value is not None:
            if not len(answer.value):
                raise Unclear
            answer = answer._replace(value=answer.value[1:])
        return [answer]

    async def _given(self, leads: list[Lead], spans: Sequence[Span], begun: float) -> list[sources.FetchResult] | None:
        """The spans from the cache of the node that owns the object; None if the source must be asked."""
        if self._force or any(lead.unlock is None for lead in leads) or any(span[1] >= LARGEST for span in spans):
            return None
        given = await self._reading.ask_peers(self._key, spans, begun, self._used | self._buffers.keys())
        if given is None or given.values is None:
            return None
        self._age = max(self._age, given.age)
        make = self._prototype.buffer.from_bytes
        return [sources.FetchResult(make(value), given.validator) for value in given.values]

    async def _lead(self, leads: list[Lead]) -> None:
        """Fetch the claimed spans for all waiting readers."""
        begun = time.perf_counter()
        spans = [lead.claim.span for lead in leads]
        reading, key = self._reading, self._key
        try:
            given = await self._given(leads, spans, begun) if peers else None
            answers = await self._request(spans) if given is None else given
            there = [contents(answer.value) for answer in answers if answer.value is not None]
            self._asked += spans
            misses = sum([_meet(span, spans) for span in self._left.values()])
            if given is None:
                reading.miss(key, sum(map(len, there)) if there else None, begun, list(map(unplaced, spans)))
            # one request answers several ranges: each counts as a miss, but bytes and seconds only once
            for _ in range(misses - 1):
                (reading.stats.miss if given is None else reading.stats.peer_hit)(0, 0.0)
            if len(there) < len(answers):
                await reading.is_certainly_missing(key)
                for lead in leads:
                    lead.claim.set_result(None)
                await reading.record_missing(Entry(self._wanted[0].key), key, self._version)
                self._is_missing()
                return
            if not all(answer.exact for answer in answers):
                if self._single:
                    raise Unclear
                for lead in leads:
                    # each waiting reader sends its own request
                    lead.claim.set_exception(LeaderCancelled())
                await self._request_plainly(dict(zip(spans, answers, strict=True)))
                return
            is_told = all(is_from_source(answer.validator) for answer in answers)
            if len(answers) > 1 and not is_told and self._is_overtaken():
                # the object was written meanwhile, so the answers may be of several states: request them again
                for lead in leads:
                    lead.claim.set_exception(LeaderCancelled())
                self._count_try()
                return
            reading.has_validators = is_told
            await self._must_agree(self._used | {answer.validator for answer in answers})
            asked = reading.entry(key, *unplaced(spans[0]))
            assert asked is not None
            before = self._version
            self._version, validator, replaced = await reading.agree(
                key, asked, answers[0].validator, before, there[0] if len(there) == 1 else None
            )
            if replaced:
                raise Replaced(key)
            if self._version != before or self._is_overtaken():
                self._let_go()
            fetched = [
                Fetched(data, adopt_session(answer.validator, validator))
                for answer, data in zip(answers, there, strict=True)
            ]
            for lead, of in zip(leads, fetched, strict=True):
                lead.claim.set_result(of.data, of.validator)
                assert of.data is not None
                assert of.validator is not None
                self._add(lead.claim.span, of.data, of.validator)
            self._assemble()
            if not self._left and await self._store_whole(leads):
                return
            # stored now, because others may wait for these bytes while this reader waits for others
            known: list[Span] = []
            if is_from_source(answers[0].validator):
                # cached spans are not stored again
                listed = self._backend.parts(key).pieces
                known = [_span_of(piece) for span in spans for piece in self._usable(listed.overlapping(*span))]
            boundaries = {boundary for entry in self._wanted for boundary in (entry.start, entry.stop)}
            await self._leads.store(key, pieces_of(leads, fetched, known, boundaries), self._version, self._age)
        except BaseException as error:
            for lead in leads:
                lead.claim.set_exception(LeaderCancelled() if isinstance(error, Unclear) else error)
            raise

    async def _store_whole(self, leads: Sequence[Lead]) -> bool:
        """Store the whole object, if that was wanted and its state is known; then release the claims."""
        (entry, *others) = self._wanted
        data = self._found.get(entry)
        if others or not entry.is_whole or data is None or len(self._used) > 1 or self._is_overtaken():
            return False
        for lead in leads:
            lead.unstored = 1

        def done() -> None:
            for lead in leads:
                lead.unstored = 0
                self._leads.release(lead)

        self._is_whole_stored = True
        # with the single validator: bytes of two states are never in one object
        await self._backend.publish(entry, data, self._version, min(self._used), done, age=self._age)
        return True

    async def _request_plainly(self, answers: dict[Span, sources.FetchResult]) -> None:
        """Request each range separately without caching, because the source returns other bytes than requested.

        Raises `OSError` if it still does.
        """
        entries = [entry for entry, span in self._left.items() if _meet(span, answers)]
        again = [self._left[entry] for entry in entries if self._left[entry] not in answers]
        answers |= dict(zip(again, await self._request(again) if again else [], strict=True))
        for entry in entries:
            if entry not in self._left:
                # another task's fetch has returned it meanwhile
                continue
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
        if len(validators) > 1 and len(from_source(validators)) > 1:
            # in any case: some of the cached parts are of a state that the source does not have any more
            await self._backend.invalidate(self._key, self._version)
            if not differ(validators) or await self._reading.has_several_validators(self._key):
                raise Unclear
            self._reading.record_replaced(self._key)
            raise Replaced(self._key)


def _meet(span: Span, spans: Iterable[Span]) -> bool:
    """Whether a span has bytes in common with one of some spans."""
    return any(max(first, span[0]) < min(last, span[1]) for first, last in spans)


def _span_of(piece: Entry) -> Span:
    return piece.start, piece.stop
