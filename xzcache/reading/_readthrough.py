"""Read-through: from the cache, else one fetch from the source for all waiting readers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import cpu, default_buffer_prototype

from xzcache import sources
from xzcache.model import (
    END,
    LARGEST,
    MISSING,
    NEGLIGIBLE,
    UNKNOWN_AGE,
    WHOLE,
    Claim,
    Entry,
    Given,
    LeaderCancelled,
    Replaced,
    SourceUnreachable,
    Unclear,
    clip,
    differ,
    from_source,
    is_document,
    is_from_source,
    merged,
    overriding_document,
    part,
    placed,
    span,
    unplaced,
)
from xzcache.reading._fetch import FIRST_POLL, LONGEST_POLL, Lead, Leads, RangeFetches, next_poll
from xzcache.reading._request import Request, buffer_of, contents, peers
from xzcache.reading._revalidation import Revalidation
from xzcache.reading._stats import observers
from xzcache.sources import FetchResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache.model import Absence, Array, Parts, Span
    from xzcache.reading._request import Reading

    Outcome = list[tuple[int, Buffer | None]] | BaseException

_READS_SHARDS_BY_GET: Final = not hasattr(Store, "get_ranges")
"""Whether Zarr reads a shard's index and then its chunks by `get`: a byte range may depend on an earlier one."""


_MOST_CONTEXTS: Final = 1 << 16

Count = Callable[[int, float], None]
"""Called for a hit with its bytes and its seconds."""


class Divided(Exception):
    """Parts of an entry are cached, or another process fetches them, so that only the rest should be requested."""


class NotCached(Exception):
    """A read from the cache alone must fall back to `get`."""


class ReadThrough:
    """Reads of one source through one backend.

    Single-flight has two steps: a table of futures among the tasks and threads of this process, then a fetch lock among
    processes, which is polled and never blocks the event loop.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.backend = reading.backend
        self.freshness = reading.freshness
        self._revalidation = Revalidation(reading)
        self._asks_always = reading.freshness.revalidate is True or reading.passes
        self._confirms = self._revalidation.may_confirm
        self._fetches = RangeFetches(reading)
        self._leads = Leads(reading)
        self.contexts: dict[str, Context] = {}
        """The contexts in which some keys are about to be read, for observers such as Dask's."""
        self.freshness.tell(self)

    def must_verify(self) -> None:
        """Stop serving without a wait until documents are verified: `get` asks for them when the source is back."""
        self._confirms = True

    def get_nowait(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
        count: Count | None = None,
    ) -> Buffer | None:
        """A cached chunk or a byte range of it, if it can be read without waiting; after None, `get` must be called."""
        # as `_may_serve`, in which a call would be felt
        if self._asks_always or is_document(key) or (self._confirms and not self._revalidation.is_confirmed(key)):
            return None
        started = time.perf_counter()
        start, stop = 0, END
        if byte_range is not None:
            if (wanted := span(byte_range)) is None:
                return None
            start, stop = wanted
        backend = self.backend
        data = backend.get_nowait((backend.prefix + key, start, stop), self.reading.max_age)
        # a missing chunk takes the long way: it has no bytes to be counted here
        if data is None or data is MISSING:
            return None
        (count or self.reading.stats.hit)(len(data), time.perf_counter() - started)
        return cpu.Buffer(data) if prototype.buffer is cpu.Buffer else prototype.buffer.from_bytes(memoryview(data))

    def readinto_nowait(self, key: str, place: Array, *, patient: bool) -> bool:
        """Like `get_nowait`, into an array, which is undefined after False."""
        started = time.perf_counter()
        if not self._may_serve(key):
            return False
        extent = self.backend.prefix + key, 0, END
        if self.backend.get_nowait(extent, self.reading.max_age, place=place, patient=patient) is None:
            return False
        self.reading.stats.hit(len(place), time.perf_counter() - started)
        return True

    def _may_serve(self, key: str) -> bool:
        """Whether a cached value of a key may be served without revalidation."""
        if self._asks_always or is_document(key):
            return False
        return not self._confirms or self._revalidation.is_confirmed(key)

    def get_blocking(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, count: Count
    ) -> Buffer | None:
        """Like `get`, from the cache alone, for a thread that may wait for the disk; raises `NotCached`."""
        wanted = span(byte_range)
        entry = self.reading.entry(key, *wanted) if wanted is not None and self._may_serve(key) else None
        if entry is None:
            raise NotCached
        started = time.perf_counter()
        data = self.backend.get_nowait(entry, self.reading.max_age, self.reading.age_of_absence(key), patient=True)
        if data is None:
            raise NotCached
        count(0 if data is MISSING else len(data), time.perf_counter() - started)
        return None if data is MISSING else buffer_of(memoryview(data), prototype)

    def are_at_hand(self, keys: Sequence[str]) -> bool:
        """Whether `get_blocking` would at this moment answer for all of some chunks of one array, whole.

        If so, Zarr reads them in threads that do not have the context of the reader, which is kept here for them.
        """
        reading = self.reading
        if not keys or not self._may_serve(keys[0]):
            return False
        if not self.backend.are_at_hand(keys, reading.max_age, reading.age_of_absence(keys[0])):
            return False
        if observers:
            if len(self.contexts) >= _MOST_CONTEXTS:
                # of reads that failed
                self.contexts.clear()
            self.contexts.update(dict.fromkeys(keys, copy_context()))
        return True

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, *, force: bool | None = False
    ) -> Buffer | None:
        """The value of a key or a byte range of it, like `Store.get`.

        With `force`, a chunk is revalidated because a write depends on it; None if that is unknown. Raises `Replaced`
        if the range belongs to a new object and this Zarr reads shards by `get`.
        """
        if is_document(key):
            with self.freshness.asking(key):
                return await self._get(key, prototype, byte_range)
        return await self._get(key, prototype, byte_range, force=force)

    async def _get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, *, force: bool | None = False
    ) -> Buffer | None:
        started = time.perf_counter()
        rules = overriding_document(key)
        # opening a node of unknown format asks for the documents of both formats at once
        is_beside = rules is not None and self.freshness.are_rules_asked(key)
        wanted = span(byte_range)
        entry = None if wanted is None or self.reading.passes else self.reading.entry(key, *wanted)
        if wanted is None or entry is None:
            return await self._past_the_cache(key, prototype, byte_range, started)
        if not entry.is_whole and is_document(key):
            # only a whole document can be compared
            value = await self.get(key, prototype, None)
            return None if value is None else value[slice(*clip(*wanted, len(value)))]
        await self.backend.prepare()
        if self._confirms:
            await self._revalidation.confirm_metadata(key)
        request = Request(key, entry, prototype, byte_range, started)
        may_write = force is None
        if force is None:
            # a missing chunk is fetched in any case, once for all readers that began before the request
            force = await self.backend.get(entry, "infinity", self.reading.age_of_absence(key)) is not None
        must_ask = self.freshness.must_ask(key, writable=self.reading.writable)
        if force or (must_ask and not await self._is_vouched_for(request)):
            ask = partial(self._revalidation.read, request)
            return await (ask() if force else self._asked_or_offline(request, ask, is_beside=is_beside))
        data = await self.backend.get(entry, self.reading.max_age, self.reading.age_of_absence(key))
        if data is not None:
            return self.reading.hit(request, None if data is MISSING else data)
        ask = partial(self.fetch, request, force=may_write)
        return await self._asked_or_offline(request, ask, is_beside=is_beside)

    async def _asked_or_offline(
        self, request: Request, ask: Callable[[], Awaitable[Buffer | None]], *, is_beside: bool
    ) -> Buffer | None:
        """The answer of the source or, if it cannot be reached, of the cache.

        `is_beside` tells that the key is a document of format 2, asked for together with that of format 3.
        """
        reading, never_asks = self.reading, self.freshness.revalidate is False
        if not reading.may_serve_offline(request.key) and not never_asks:
            return await ask()
        # after each pause, one read gets False from `is_down` and asks the source: it must be one that the cache can
        # serve if that fails
        found: memoryview | Absence | None = None
        if reading.reach.is_suspect and not never_asks:
            found = await self.offline(request.key, is_beside=is_beside)
        if found is not None and reading.reach.is_down:
            self._served_offline(request.key, found)
            return reading.hit(request, None if found is MISSING else found)
        began = time.monotonic()
        try:
            return await ask()
        except Exception as error:
            # with `revalidate=False`, an answer was not wanted
            is_outage = reading.is_outage(error)
            if not is_outage and not never_asks:
                raise
            if (found := await self.offline(request.key, is_beside=is_beside)) is None:
                raise
            if is_outage:
                reading.served_offline(request.key, began, error)
            self._served_offline(request.key, found)
            return reading.hit(request, None if found is MISSING else found)

    def _served_offline(self, key: str, found: memoryview | Absence) -> None:
        if is_document(key) and found is not MISSING and self.freshness.revalidate is not False:
            self.freshness.mark_unverified(key)

    async def offline(self, key: str, *, is_beside: bool = False) -> memoryview | Absence | None:
        """The value of a key that may be served while the source cannot be reached; None if there is none."""
        reading, max_age = self.reading, self.reading.max_age
        entry = reading.entry(key)
        if entry is None or not reading.freshness.serves_offline:
            return None
        if not is_document(key):
            return MISSING if await reading.was_missing(entry, key) else None
        found = await self.backend.get(entry, max_age, max_age)
        if found is None and is_beside and (rules := overriding_document(key)) is not None:
            above = reading.entry(rules)
            found = MISSING if above is not None and await reading.get_cached(above) is not None else None
        return found

    async def get_ready(self, key: str) -> None:
        """Open the cache and confirm the metadata before a lookup."""
        await self.backend.prepare()
        if self._confirms:
            await self._revalidation.confirm_metadata(key)

    async def _is_vouched_for(self, request: Request) -> bool:
        """Whether the cached document is the one that the original of this copy has seen."""
        key = request.key
        may_vouch = self.freshness.revalidate is not True and not self.reading.writable and is_document(key)
        # a document that may be the base of a write needs the state of this moment
        if not may_vouch or self.freshness.inherited.state(key) is None:
            return False
        data = await self.backend.get(request.entry, self.reading.max_age, self.reading.max_age)
        return data is not None and self.freshness.vouches(key, None if data is MISSING else data)

    async def cached_size(self, key: str) -> int | None:
        """The size of a value, in bytes, if it is cached and may be served; else None."""
        entry = self.reading.entry(key)
        if entry is None or self.reading.passes or self.reading.must_ask(key):
            return None
        await self.get_ready(key)
        size = self.backend.parts(key).size(self.reading.max_age)
        # only the bytes show whether a file without a stamp, or a damaged one, is the entry
        if size is None and (data := await self.reading.get_cached(entry)) is not None:
            size = len(data)
        return size

    async def is_known_missing(self, key: str) -> bool:
        """Whether a key is known to be missing at the source, so that no request is needed."""
        entry, max_age = self.reading.entry(key), self.reading.age_of_absence(key)
        if entry is None or self.reading.passes or self.reading.must_ask(key) or max_age == 0:
            return False
        await self.get_ready(key)
        return await self.backend.get(entry, self.reading.max_age, max_age) is MISSING

    async def size_or_offline(self, key: str, ask: Callable[[str], Awaitable[int]]) -> int | None:
        """The answer of `ask` or, if the source cannot be reached, the size of the cached value.

        None if the key is known to be missing. `ask` returns the size of a value, or whether there is one.
        """
        began = time.monotonic()
        try:
            async with self.reading.asking(key):
                told = await ask(key)
            # a key that is gone with its whole directory, as after an unmount, is not missing
            if told is False:
                await self.reading.is_certainly_missing(key)
            return told
        except Exception as error:
            may_serve = self.reading.may_serve_offline(key) and self.reading.is_outage(error)
            if not may_serve or (found := await self.offline(key)) is None:
                raise
            self.reading.served_offline(key, began, error)
            return None if found is MISSING else len(found)

    async def listing(self, prefix: str, keys: AsyncIterator[str]) -> AsyncIterator[str]:
        """The keys that a source lists; a directory that may not be mounted raises instead of being empty."""
        what = f"the list of keys beneath {prefix!r} is not cached"
        async with self.reading.asking(prefix, what):
            await self.reading.is_certainly_missing(f"{prefix.rstrip('/')}/-".lstrip("/"), what)
            async for key in keys:
                yield key

    async def _past_the_cache(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None, started: float
    ) -> Buffer | None:
        value = await self.reading.source.get(key, prototype, byte_range)
        self.reading.miss(key, None if value is None else len(value), started)
        return value

    async def get_past_the_cache(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None,
        ask: Callable[[], Awaitable[Buffer | None]],
    ) -> Buffer | None:
        """What a source answers for a reader that cannot wait for the fetches of others, and is not stored."""
        started = time.perf_counter()
        async with self.reading.asking(key):
            value = await ask()
            if value is None:
                await self.reading.is_certainly_missing(key)
        self.reading.miss(key, None if value is None else len(value), started)
        return value

    async def give(
        self, key: str, spans: Sequence[Span], fetch: Callable[[], Awaitable[Given]] | None, *, anew: bool = False
    ) -> Given | None:
        """Spans of a chunk for another node, from the cache or by `fetch`; with `anew`, by `fetch` in any case."""
        if is_document(key) or self._asks_always:
            return None
        entries = [self.reading.entry(key, *span) for span in spans]
        wanted = [entry for entry in entries if entry is not None]
        if len(wanted) < len(spans):
            return None
        await self.get_ready(key)
        given = None if anew else await self._given(key, wanted)
        if given is not None or fetch is None:
            return given
        fetched = await fetch()
        await self.backend.stored(key)
        # the state of what was fetched is known once it is stored
        given = await self._given(key, wanted)
        if given is not None and given.values == fetched.values:
            return given
        return fetched if wanted[0].is_whole or fetched.values is None else None

    async def renew(self, key: str, byte_range: ByteRequest | None) -> Buffer | None:
        """Ask the source for the bytes of a request; a cached entry stays if the source confirms it."""
        wanted = span(byte_range)
        entry = None if wanted is None else self.reading.entry(key, *wanted)
        if entry is None:
            return await self.reading.source.get(key, default_buffer_prototype(), byte_range)
        request = Request(key, entry, default_buffer_prototype(), byte_range, time.perf_counter())
        return await self._revalidation.read(request)

    def distrust_documents(self) -> None:
        """Confirm the documents again that the original of this copy had seen."""
        self._revalidation.forget_confirmed()

    async def _given(self, key: str, wanted: Sequence[Entry]) -> Given | None:
        reading, backend = self.reading, self.backend
        is_whole = wanted[0].is_whole
        # one validator for all, which the source gave, unless it is that of a whole object
        states = {backend.parts(key).validator(wanted[0])} if is_whole else backend.parts(key).states
        if not is_whole and not (len(states) == 1 and all(map(is_from_source, states))):
            return None
        age, values = 0.0, []
        for entry in wanted:
            stored = backend.parts(key).validated(entry)
            age = max(age, UNKNOWN_AGE if stored is None else time.time() - stored)
            look = backend.get_checked if is_whole else backend.get
            data = await look(entry, reading.max_age, reading.age_of_absence(key))
            if data is None:
                return None
            if data is MISSING:
                return Given(None)
            values.append(data)
        # read before and after: the files may have been replaced between states and bytes
        now = {backend.parts(key).validator(wanted[0])} if is_whole else backend.parts(key).states
        return Given(tuple(values), min(states), age) if now == states else None

    # -- misses

    async def fetch(self, request: Request, *, force: bool = False) -> Buffer | None:
        """Fetch a missing entry once for all readers; `force` joins no earlier request."""
        key, entry, reading = request.key, request.entry, self.reading
        span = placed((entry.start, entry.stop))
        since = request.started if force else -math.inf
        # parts of it that are cached or under way are not requested again
        may_divide = not force and span[0] >= 0 and not is_document(key)
        while True:
            # a read that begins after a write must not wait for a fetch from before it, so the write version is part of
            # the name
            version = self.backend.write_version(key)
            if version is None:
                # without a version nothing can be published, so other readers cannot rely on this fetch
                return await self._lead(Lead(Claim(span)), version, request, force=force, may_divide=False)
            what = entry.key, version, force
            # without validators, parts of several answers cannot be put together
            apart = not may_divide or reading.has_validators is False
            claim, is_leader = reading.claims.join(what, span, since, apart=apart)
            try:
                if claim is None:
                    return await self._fetch_rest(request)
                if is_leader:
                    return await self._lead(Lead(claim, what), version, request, force=force, may_divide=may_divide)
                fetched = await claim.outcome(reading.timeout)
            except Unclear:
                # the cached parts cannot be combined: fetch the whole span
                may_divide = False
                continue
            except Replaced:
                # the object was replaced during another reader's fetch; this reader has no bytes of the old one yet
                if _READS_SHARDS_BY_GET and entry.start > 0:
                    raise
                may_divide = False
                continue
            except LeaderCancelled:
                data = None if force else await reading.get_cached(entry)
                if data is None:
                    continue
                return reading.hit(request, data)
            if fetched is None or (not fetched.exact and claim.span != span):
                # the leader did not finish in time, or its answer does not fit this request
                return await self._lead(Lead(Claim(span)), version, request, force=force, may_divide=False)
            return reading.hit(request, None if fetched.data is None else part(fetched.data, claim.span, span))

    async def _fetch_rest(self, request: Request) -> Buffer | None:
        """Assemble an entry from its cached parts, the parts under way, and the rest.

        Raises `Unclear` if the parts cannot be shown to be of one state, `Replaced` if they are of different states.
        """
        found = await self._fetches.fetch(request.key, [request.entry], request.prototype)
        data = found[request.entry]
        return None if data is None else buffer_of(data, request.prototype)

    async def _lead(
        self, lead: Lead, version: Any, request: Request, *, force: bool, may_divide: bool
    ) -> Buffer | None:
        """Fetch for all readers in this process, unless another process does so."""
        try:
            async with self.backend.fetching():
                return await self._fetch_and_publish(lead, version, request, force=force, may_divide=may_divide)
        except Divided:
            pass
        return await self._fetch_rest(request)

    async def _fetch_and_publish(
        self, lead: Lead, version: Any, request: Request, *, force: bool, may_divide: bool
    ) -> Buffer | None:
        key, entry, claim, reading = request.key, request.entry, lead.claim, self.reading
        publishing = is_new = False
        given: Given | None = None
        try:
            if force:
                # another process may have sent its request before this read began
                await asyncio.sleep(0)
                claim.mark_sent()
                answer, data = await reading.revalidate(request)
            else:
                self._try_lock(lead, request, may_divide=may_divide)
                # checked with the lock held: no other process stores a part that overlaps from now on
                is_new = lead.unlock is not None and self.backend.parts(key).is_empty
                data = None if is_new else await self._wait(lead, request, may_divide=may_divide)
                if data is None:
                    if may_divide and not is_new and self._has_parts(request):
                        raise Divided
                    if peers and lead.unlock is not None:
                        given = await reading.ask_peers(key, [(entry.start, entry.stop)], request.started)
                    # with an age, an old entry may still be there: a request with its validator saves the bytes
                    if given is not None:
                        value = None if given.values is None else buffer_of(given.values[0], request.prototype)
                        # an absence that another node remembers is not remembered here for as long again
                        answer = FetchResult(value, given.validator, exact=value is not None)
                    elif reading.max_age == "infinity":
                        answer = await reading.fetch_chunk(request)
                    else:
                        answer, data = await reading.revalidate(request)
            if data is not None:
                claim.set_result(data, None)
                return reading.hit(request, data)
            data = None if answer.value is None else contents(answer.value)
            validator, may_store = answer.validator, answer.exact and data is not None
            if given is not None:
                may_store = may_store and given.is_worth_storing
            elif data is None and answer.exact:
                await reading.record_missing(entry, key, version)
            elif not is_document(key):
                reading.has_validators = is_from_source(validator)
            if answer.exact and is_document(key):
                version = await self.backend.apply_document(key, None if data is None else bytes(data), version)
                self.freshness.mark_validated(key, data)
            # a key without any cached part has nothing to agree with, which saves the looks at the disk
            if data is not None and may_store and not (is_new and entry.is_whole):
                version, validator, replaced = await reading.agree(key, entry, validator, version, data)
                if replaced and _READS_SHARDS_BY_GET and entry.start > 0:
                    raise Replaced(key)
            # readers need not wait for the disk
            claim.set_result(data, validator, exact=answer.exact)
            if data is not None and may_store:
                publishing = True
                age = 0.0 if given is None else given.age
                await self.backend.publish(entry, data, version, validator, partial(self._leads.release, lead), age=age)
            return answer.value
        except BaseException as error:
            claim.set_exception(LeaderCancelled() if isinstance(error, Divided) else error)
            raise
        finally:
            if not publishing:
                self._leads.release(lead)

    def _has_parts(self, request: Request) -> bool:
        """Whether the cached pieces of an entry are large enough to request only the rest."""
        first, last = placed((request.entry.start, request.entry.stop))
        parts = self.backend.parts(request.key)
        pieces = (piece for piece in parts.pieces.overlapping(first, last) if piece.stop != END)
        size = sum(min(piece.stop, last) - max(piece.start, first) for piece in pieces)
        # pieces of an unknown state cannot be combined with an answer, so they do not count
        return size > NEGLIGIBLE and all(map(is_from_source, parts.states))

    def _try_lock(self, lead: Lead, request: Request, *, may_divide: bool) -> None:
        """Try to take the fetch lock; raises `Divided` if another process fetches a part only."""
        if lead.what is not None:
            answer = self.backend.acquire(request.key, unplaced(lead.claim.span), exactly=may_divide)
            if not isinstance(answer, tuple):
                lead.unlock = answer
            elif may_divide and placed(answer) != lead.claim.span:
                raise Divided

    async def _wait(self, lead: Lead, request: Request, *, may_divide: bool) -> memoryview | None:
        """The entry, if another process has stored it; else wait for the entry or for the fetch lock.

        After the deadline there is neither: the other process may be stopped, so this one fetches as well.
        """
        deadline = time.monotonic() + self.reading.timeout
        pause = FIRST_POLL
        while True:
            # check with the lock held: the previous holder may just have published
            data = await self.reading.get_cached(request.entry)
            if lead.unlock is not None or data is not None or time.monotonic() >= deadline or lead.what is None:
                return data
            # polled, because a lock between processes cannot be awaited; the pause grows
            # so that many waiters cost little
            await asyncio.sleep(pause)
            pause = next_poll(pause)
            # that another process holds a part only is found out with the first try, and now and then
            self._try_lock(lead, request, may_divide=may_divide and pause >= LONGEST_POLL)


# -- Many byte ranges of one object, as Zarr's sharding codec reads them; missing ranges are requested together.

_REMEMBERED: Final = 65536
_TRIES: Final = 3
"""Times that ranges are read until they are of one state; the last time in a single request."""


class RangeReads:
    """Reads of several byte ranges of an object of one source, through one backend."""

    def __init__(self, reads: ReadThrough) -> None:
        self._reads = reads
        self._reading = reads.reading
        self._backend = reads.backend
        self._fetches = reads._fetches
        self._promoted: set[str] = set()

    def get_nowait(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype
    ) -> list[tuple[int, Buffer | None]] | None:
        """All of some byte ranges, if they can be read from the cache without waiting, of one state; else None."""
        if not byte_ranges:
            return None
        since = self._backend.write_version(key)
        hits: list[tuple[int, float]] = []
        values: list[tuple[int, Buffer | None]] = []
        for place, byte_range in enumerate(byte_ranges):
            value = self._reads.get_nowait(key, prototype, byte_range, lambda *hit: hits.append(hit))
            if value is None:
                return None
            values.append((place, value))
        # a write between two of these reads would mix two states in one answer
        if self._backend.write_version(key) != since:
            return None
        # counted only now: after None the caller reads all of them again, and would count them twice
        for hit in hits:
            self._reading.stats.hit(*hit)
        return values

    async def get(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, **limits: int
    ) -> AsyncIterator[list[tuple[int, Buffer | None]]]:
        """Like `Store.get_ranges`; nothing is yielded before all ranges are read.

        Raises
        ------
        BaseExceptionGroup
            Of exceptions of the source, of `FileNotFoundError` for a missing object, or of `Replaced`.
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
        # a range that a task of this call reads alone may find the object replaced: then
        # none of the others is of one state
        with self._reading.watching(key) as watch:
            outcomes = await self._together(key, byte_ranges, wanted, alone, prototype, limits)
            if watch.replaced:
                raise BaseExceptionGroup("reading byte ranges failed", [Replaced(key)])
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        try:
            for group in [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]:
                yield group
            if failures:
                raise _group_of(failures)
        finally:
            # The frames of an exception lead to this one. A way back would keep the store until the garbage collector
            # runs.
            del outcomes, failures

    async def _together(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        wanted: dict[Entry, list[int]],
        alone: list[int],
        prototype: BufferPrototype,
        limits: dict[str, int],
    ) -> list[Outcome]:
        """All ranges of a call, of one state as far as known; or the exceptions."""
        entry = self._reading.entry(key)
        if entry is None:
            return await self._apart(key, byte_ranges, alone, prototype, limits)
        await self._reads.get_ready(key)
        since = self._backend.write_version(key)
        parts = self._backend.parts(key)
        found, missing = await self._fetches.look(parts, wanted)
        states = parts.states if missing or alone else set[str]()
        if missing and found:
            # read after the states, which may be those of another object already
            is_current = self._backend.write_version(key) == since
            if not is_current or not all(map(is_from_source, states)):
                # cached ranges of an unknown state are fetched together with the missing ones
                found, missing = {}, list(wanted)
        if self._reading.must_ask(key):
            # revalidate each cached range with its own validator
            alone = [*alone, *(place for entry in found for place in wanted[entry])]
            found = {}
        promoted = bool(missing) and self._is_worth_the_whole(key, missing)
        calls = [self._apart(key, byte_ranges, alone, prototype, limits)] if alone else []
        if missing:
            fetch = self._whole if promoted else self._missing
            calls.append(fetch(key, {entry: wanted[entry] for entry in missing}, prototype, limits, parts))
        # awaited directly, because a task would only add its own cost
        answers = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)
        outcomes = [outcome for answer in answers for outcome in answer]
        try:
            if any(isinstance(outcome, BaseException) and not isinstance(outcome, Unclear) for outcome in outcomes):
                return [outcome for outcome in outcomes if not isinstance(outcome, Unclear)]
            is_clear = not any(isinstance(outcome, Unclear) for outcome in outcomes)
            if alone or promoted:
                # if the compared ranges are gone, they were evicted or found to be of another state
                is_clear &= from_source(states) <= self._backend.parts(key).states
            # ranges that were read one after the other are of one state only if no write came between
            if len(byte_ranges) > 1 and (alone or not missing):
                is_clear &= self._backend.write_version(key) == since
            if not is_clear:
                return await self._refetch(key, byte_ranges, wanted, prototype, limits, from_source(states))
            hits = [self._hit(key, entry, wanted[entry], data, prototype) for entry, data in found.items()]
            return [*([[pair for pairs in hits for pair in pairs]] if hits else []), *outcomes]
        finally:
            # as in `get`
            del answers, outcomes

    async def _refetch(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        states: set[str],
    ) -> list[Outcome]:
        """Fetch all ranges of a call together, past the cache; `states` are validators of the cached ranges."""
        began = time.perf_counter()
        ends = [(entry.start, entry.stop) for entry in wanted]
        most = limits["max_coalesced_bytes"]
        spans = merged(ends, gap=limits["max_gap_bytes"], most=most)
        at_once = merged(ends, gap=LARGEST, most=most)
        together = {place for places in wanted.values() for place in places}
        others = [place for place in range(len(byte_ranges)) if place not in together]
        turn = asyncio.Semaphore(limits["max_concurrency"])
        reading = self._reading

        async def fetch_part(part: ByteRequest | None) -> FetchResult:
            async with turn, reading.asking(key):
                # the state of a whole object may be worth a request here
                return await sources.fetch(
                    reading.source,
                    key,
                    prototype,
                    part,
                    certain=True,
                    fixed=reading.fixed,
                    ignore_validators=reading.ignore_validators,
                )

        for attempt in range(_TRIES):
            since = self._backend.write_version(key)
            if attempt or reading.has_validators is False:
                # a single answer is of one state
                spans = at_once
            asked = [*(RangeByteRequest(*span) for span in spans), *(byte_ranges[place] for place in others)]
            if attempt == _TRIES - 1 and asked and all(span(byte_ranges[place]) for place in others):
                # several answers may seem to be of several states for as long as others read and write the object
                spans = [WHOLE] if others else [(spans[0][0], max(last for _, last in spans))]
                asked = [None if others else RangeByteRequest(*spans[0])]
            try:
                answers = await sources.all_of(map(fetch_part, asked))
            except Exception as error:
                return [error]
            values = [answer.value for answer in answers if answer.value is not None]
            self._reading.miss(key, sum(map(len, values)) if values else None, began, list(map(unplaced, spans)))
            if len(values) < len(answers):
                try:
                    await reading.is_certainly_missing(key)
                except SourceUnreachable as error:
                    return [error]
                return [FileNotFoundError(key)]
            validators = {answer.validator for answer in answers}
            if len(asked) == 1 or (len(validators) == 1 and all(map(is_from_source, validators))):
                break
            # without validators, only writes through the cache are known
            if not differ(validators) and len(spans) <= len(at_once) and self._backend.write_version(key) == since:
                break
        if differ(validators | states) and not await reading.has_several_validators(key):
            self._reading.record_replaced(key)
            await self._backend.invalidate(key, None)
            return [Replaced(key)]
        if not all(answer.exact for answer in answers[: len(spans)]):
            # such answers cannot be cut into ranges
            return [group async for group in self._past_the_cache(key, byte_ranges, prototype, limits)]
        pairs: list[tuple[int, Buffer | None]] = []
        for (first, last), value in zip(spans, values, strict=False):
            for entry, places in wanted.items():
                if first <= entry.start and entry.stop <= last:
                    pairs += [(place, value[entry.start - first : entry.stop - first]) for place in places]
        if len(values) == len(spans):
            # one answer, with all that there is of the object
            return [[*pairs, *((place, _part_of(values[0], byte_ranges[place])) for place in others)]]
        return [[*pairs, *zip(others, values[len(spans) :], strict=True)]]

    async def _past_the_cache(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, limits: dict[str, int]
    ) -> AsyncIterator[list[tuple[int, Buffer | None]]]:
        began = time.perf_counter()
        async for group in self._reading.source.get_ranges(key, byte_ranges, prototype=prototype, **limits):
            for _, value in group:
                self._reading.miss(key, None if value is None else len(value), began)
                began = time.perf_counter()
            yield list(group)

    def _mergeable(self, key: str, byte_range: ByteRequest | None) -> Entry | None:
        wanted = span(byte_range) if isinstance(byte_range, RangeByteRequest) else None
        if wanted is None or wanted[0] == wanted[1] or is_document(key):
            return None
        return self._reading.entry(key, *wanted)

    def _hit(
        self, key: str, entry: Entry, places: list[int], data: memoryview | None, prototype: BufferPrototype
    ) -> list[tuple[int, Buffer | None]]:
        request = Request(key, entry, prototype, None, time.perf_counter())
        return [(place, self._reading.hit(request, data)) for place in places]

    async def _apart(
        self,
        key: str,
        byte_ranges: Sequence[ByteRequest | None],
        places: list[int],
        prototype: BufferPrototype,
        limits: dict[str, int],
    ) -> list[Outcome]:
        """Read ranges one by one; returns exceptions in place of failed ones."""
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
        """Whether the pieces read of an object exceed `promote_above`; once for each object, as it may be evicted."""
        most = self._reading.promote_above
        if most is None or key in self._promoted:
            return False
        pieces = [*self._backend.parts(key).pieces, *missing]
        due: bool = most < sum(piece.stop - piece.start for piece in pieces if piece.stop != END)
        if due:
            if len(self._promoted) >= _REMEMBERED:
                # a key that is forgotten may be promoted a second time, which costs one request
                self._promoted.clear()
            self._promoted.add(key)
        return due

    async def _whole(
        self,
        key: str,
        wanted: dict[Entry, list[int]],
        prototype: BufferPrototype,
        limits: dict[str, int],
        parts: Parts,
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
        parts: Parts,
    ) -> list[Outcome]:
        try:
            found = await self._fetches.fetch(key, list(wanted), prototype, limits, parts, parts.states)
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


def _group_of(failures: list[BaseException]) -> BaseExceptionGroup:
    outages = [failure for failure in failures if isinstance(failure, SourceUnreachable)]
    return BaseExceptionGroup(f"reading byte ranges failed{f': {outages[0]}' if outages else ''}", failures)


def _part_of(value: Buffer, byte_range: ByteRequest | None) -> Buffer:
    """A byte range of a whole object."""
    wanted = span(byte_range)
    return value if wanted is None else value[slice(*clip(*wanted, len(value)))]
