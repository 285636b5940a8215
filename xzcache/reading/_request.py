"""One read, and what all reads of one source through one backend have in common."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype

from xzcache import sources
from xzcache.model import beside, differ, fits, is_chunk, is_document, is_json, span, tells, told

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._config import Age
    from xzcache.model import Backend, Entry
    from xzcache.reading._freshness import Freshness
    from xzcache.reading._stats import Stats


_PROBE: Final = 1 << 14
"""Bytes that are compared to find out whether an object is what it was."""
_PROBES: Final = 8
"""Pieces of which one should be there to compare."""
_LOOKS: Final = 4
"""Requests of one byte that tell whether an object has several names at a time."""


class Request(NamedTuple):
    """What somebody wants to read."""

    key: str
    entry: Entry
    prototype: BufferPrototype
    byte_range: ByteRequest | None
    started: float
    """When it was asked for, by `time.perf_counter`."""


@dataclass(eq=False)
class Watch:
    """One reader of parts of an object, who has to learn of it when the object is found to be replaced."""

    key: str
    replaced: bool = False


@dataclass
class Reading:
    """What reads of one source through one backend have in common.

    Parameters
    ----------
    source : Store
    backend : Backend
    freshness : Freshness
    stats : Stats
    max_age : float or "infinity"
        Seconds for which an entry is served.
    max_size : int or None
        The bound of a backend that is not bounded by itself, in bytes.
    missing_max_age : float or "infinity"
        Seconds for which a chunk that the source does not have is not asked for again.
    timeout : float
        Seconds to wait for somebody else's fetch.
    writable : bool
        Whether what is read may become the base of a write.
    passes : bool
        Whether nothing of this source may be cached, so that each read goes to it.
    promote_above : int or None
        Bytes of an object that are read in byte ranges before it is fetched whole; None for any.
    fixed : bool
        Whether the source can never change.
    untold : bool
        Whether what the source says of its states was found not to be true.
    """

    source: Store
    backend: Backend
    freshness: Freshness
    stats: Stats
    max_age: Age
    max_size: int | None
    missing_max_age: Age
    timeout: float
    writable: bool = False
    passes: bool = False
    promote_above: int | None = None
    fixed: bool = False
    untold: bool = False
    _watches: dict[int, Watch] = field(default_factory=dict, repr=False)

    @contextmanager
    def watching(self, key: str) -> Iterator[Watch]:
        """While parts of an object are read that have to be of one state."""
        watch = Watch(key)
        self._watches[id(watch)] = watch
        try:
            yield watch
        finally:
            del self._watches[id(watch)]

    def note_replaced(self, key: str) -> None:
        """Tell those who read parts of an object that the source has another one than what was cached."""
        for watch in list(self._watches.values()):
            if watch.key == key:
                watch.replaced = True

    def must_ask(self, key: str) -> bool:
        """Whether the source has to be asked for a key whatever the cache holds."""
        return self.freshness.must_ask(key, writable=self.writable)

    async def lacks(self, key: str) -> bool:
        """Whether the source is known not to have a chunk."""
        return self._remembers(key) and await self.backend.lacks(key, self.missing_max_age)

    async def lacked(self, key: str) -> bool:
        """Whether the source did not have a chunk when it was last asked."""
        return self._remembers(key) and await self.backend.lacks(key, "infinity")

    def lacks_now(self, key: str) -> bool:
        """As `lacks`, as far as this process knows."""
        return self._remembers(key) and self.backend.lacks_now(key, self.missing_max_age)

    async def note_lack(self, key: str, ticket: Any) -> None:
        """Remember that the source, asked after the ticket was taken, does not have a chunk."""
        if ticket is not None and self._remembers(key):
            await self.backend.note_lack(key, ticket)

    def _remembers(self, key: str) -> bool:
        return self.missing_max_age != 0 and is_chunk(key)

    async def find(self, entry: Entry) -> memoryview | None:
        """What is cached and not too old."""
        return await self.backend.find(entry, self.max_age)

    def hit(self, request: Request, data: memoryview | None) -> Buffer | None:
        """Count a read that the source was not asked for, and answer it."""
        self.stats.hit(0 if data is None else len(data), time.perf_counter() - request.started)
        return None if data is None else buffer_of(data, request.prototype)

    async def ask(self, request: Request, *, known: str = "") -> sources.Answer:
        """Ask the source, and count it, unless it says that what is known is what it has."""
        answer = await sources.ask(
            self.source,
            request.key,
            request.prototype,
            request.byte_range,
            known=known,
            certain=self.freshness.revalidate is True,
            fixed=self.fixed,
            untold=self.untold,
            states=partial(self.backend.states_of, request.key),
        )
        if not answer.unchanged:
            size = 0 if answer.value is None else len(answer.value)
            self.stats.miss(size, time.perf_counter() - request.started)
        if answer.value is not None and is_document(request.key) and not is_json(contents(answer.value)):
            # it says nothing of what is cached, and is asked for again
            return answer._replace(exact=False)
        return answer

    async def ask_again(self, request: Request) -> tuple[sources.Answer, memoryview | None]:
        """Ask the source whether it has something else than what is cached.

        Returns
        -------
        Answer
        memoryview or None
            What is cached, where the source has the same; else None.
        """
        known = await self.backend.validator(request.entry)
        answer = await self.ask(request, known=known)
        if not answer.unchanged:
            return answer, None
        data = await self.backend.find(request.entry, "infinity")
        if data is not None and await self.backend.validator(request.entry) == known:
            await self.backend.renew(request.entry, self.max_age)
            return answer, data
        # it was evicted or replaced while the source was asked, or is damaged
        return await self.ask(request), None

    async def agree(
        self, key: str, entry: Entry, validator: str, ticket: Any, data: memoryview | None = None
    ) -> tuple[Any, str, bool]:
        """Forget what is cached of an object, unless an answer of the source is of the same state.

        Where no state is told, a small piece is asked for again: while its bytes are what they were, so is the object,
        as far as can be told.

        Parameters
        ----------
        key : str
        entry : Entry
            What was asked for.
        validator : str
        ticket : Any
            From before it was asked for.
        data : memoryview, optional
            The bytes of the entry.

        Returns
        -------
        ticket : Any
            To store the answer with.
        validator : str
            To store it under.
        replaced : bool
            Whether parts of another state were cached, as far as that is known.
        """
        if not tells(validator):
            # what is still to be stored is of a session, too, and nothing of another one is cached beside it
            await self.backend.stored(key)
        if entry.is_whole and self.backend.listed(key).any() is None:
            # it takes the place of another whole one, whatever that is
            return ticket, validator, False
        if entry.start == entry.stop:
            # no bytes are of any state
            return ticket, validator, False
        states = self.backend.states_of(key)
        if all(fits(validator, state) for state in states):
            return ticket, validator, False
        replaced = any(differ((validator, state)) for state in states)
        if not replaced and self.backend.ticket(entry) != ticket:
            # what is cached came later than this was asked for, and this is not stored
            return ticket, validator, False
        if not replaced:
            state = min(states)
            is_told = tells(validator) or tells(state)
            if data is not None and not entry.is_whole and not is_told and await self.find(entry) == data:
                # there is nothing to be stored beside it
                return ticket, beside(validator, state), False
            still = await self._is_still(key, entry, data)
            # parts that are cached without a state fit none that has one
            alike = not is_told and all(fits(state, other) or state == other for other in states)
            if still and alike and not entry.is_whole:
                return ticket, beside(validator, state), False
            replaced = still is False
        if replaced and await self.has_several_names(key):
            replaced = False
        if replaced:
            self.note_replaced(key)
        return await self.backend.forget(key, ticket), validator, replaced

    async def has_several_names(self, key: str) -> bool:
        """Whether an object that seems to be replaced is one that its source gives several names in turn.

        The servers behind a balancer may each make ETags, or have times of modification, of their own. Of an object
        that was replaced, two names are told while it is, and one afterwards; where two are told again, what this
        source says of its states is not believed any more.
        """
        names: set[str] | None = None
        while not self.untold:
            # at once, as turns that many readers take could make each of them meet one server
            looks = [self._asked_aside(key, RangeByteRequest(0, 1)) for _ in range(_LOOKS)]
            answers = await asyncio.gather(*looks, return_exceptions=True)
            found = told(answer.validator for answer in answers if isinstance(answer, sources.Answer))
            if names is None:
                names = found
            else:
                self.untold = len(names & found) > 1
                break
            if len(names) < 2:
                break
        return self.untold

    async def _asked_aside(self, key: str, part: ByteRequest) -> sources.Answer:
        return await sources.ask(
            self.source, key, default_buffer_prototype(), part, fixed=self.fixed, untold=self.untold
        )

    async def _is_still(self, key: str, entry: Entry, data: memoryview | None) -> bool | None:
        """Whether a piece of an object is at the source what it is in the cache; None where that cannot be told.

        Compared with what was just fetched, if that is the whole object; else a piece is asked for again.
        """
        pieces = self.backend.listed(key).by_size()[:_PROBES]
        for piece in pieces if entry.is_whole else [*pieces, entry.whole]:
            if not (cached := await self.find(piece)):
                continue
            if piece.start < 0:
                cached = cached[-_PROBE:]
                byte_range: ByteRequest = SuffixByteRequest(len(cached))
            else:
                cached = cached[:_PROBE]
                byte_range = RangeByteRequest(piece.start, piece.start + len(cached))
            if entry.is_whole and data is not None:
                return (data[-len(cached) :] if piece.start < 0 else data[piece.start :][: len(cached)]) == cached
            # a request that no reader made fails nobody's read
            with suppress(Exception):
                answer = await self._asked_aside(key, byte_range)
                if answer.value is None or answer.exact:
                    return answer.value is not None and contents(answer.value) == cached
            return None
        return None


def whole() -> tuple[int, int]:
    """The span of a whole object."""
    wanted = span(None)
    assert wanted is not None
    return wanted


def request_for(key: str, entry: Entry) -> Request:
    """What asks for one range, by itself."""
    byte_range = RangeByteRequest(entry.start, entry.stop)
    return Request(key, entry, default_buffer_prototype(), byte_range, time.perf_counter())


def buffer_of(data: memoryview, prototype: BufferPrototype) -> Buffer:
    """A buffer of some bytes: in main memory, those very bytes."""
    owner = data.obj
    if prototype.buffer is cpu.Buffer and type(owner) is np.ndarray and owner.nbytes == len(data):
        return cpu.Buffer(owner)
    return prototype.buffer.from_bytes(data)


def contents(value: Buffer) -> memoryview:
    """The bytes of a buffer, without a copy where they are in main memory; nobody may change them."""
    array = np.ascontiguousarray(value.as_numpy_array())
    # an empty view cannot be cast
    return memoryview(array).toreadonly().cast("B") if array.size else memoryview(b"")
