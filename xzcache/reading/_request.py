"""The common parts of all reads of one source through one backend."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import cpu, default_buffer_prototype

from xzcache import sources
from xzcache._config import shown_duration
from xzcache.model import (
    END,
    MISSING,
    Claims,
    Entry,
    SourceUnreachable,
    adopt_session,
    are_compatible,
    array_documents,
    arrays_of,
    differ,
    from_source,
    is_cacheable,
    is_chunk,
    is_document,
    is_from_source,
    is_json,
    siblings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence, Set

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._config import Age
    from xzcache.model import Backend, Given, Peers, Span
    from xzcache.reading._freshness import Freshness
    from xzcache.reading._stats import Stats


logger = logging.getLogger("xzcache.reading")

peers: Final[list[Peers]] = []
"""The caches of other nodes, for each worker in this process. They share its cache, so that the first one asks before
the source is asked; each tells its own cluster of writes."""

_PROBE: Final = 1 << 14
"""The number of bytes that are compared to check that an object is unchanged."""
_PROBES: Final = 8
"""Pieces of which one should be there to compare."""
_LOOKS: Final = 8
"""Requests of one byte that tell whether an object has several validators at a time."""


class Request(NamedTuple):
    """One read of a key or a byte range."""

    key: str
    entry: Entry
    prototype: BufferPrototype
    byte_range: ByteRequest | None
    started: float
    """The time of the call, by `time.perf_counter`."""


# weak keys, so that the table does not keep a closed cache alive
_claims: Final[WeakKeyDictionary[object, Claims]] = WeakKeyDictionary()
_claims_lock: Final = threading.Lock()
# held over a fork, so that the table in the child is whole
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_claims_lock.acquire, after_in_parent=_claims_lock.release, after_in_child=_claims_lock.release
    )


def claims_of(backend: Backend) -> Claims:
    """The claims of a cache, which all stores over it in this process share."""
    with _claims_lock:
        if (claims := _claims.get(backend.cache_id)) is None:
            claims = _claims[backend.cache_id] = Claims()
        return claims


@dataclass(eq=False)
class Watch:
    """A reader of several ranges that must be notified if the object is replaced."""

    key: str
    replaced: bool = False


@dataclass
class Reading:
    """The settings and state that all reads of one source through one backend share.

    Parameters
    ----------
    source : Store
    backend : Backend
    freshness : Freshness
    stats : Stats
    max_age : float or "infinity"
        Seconds for which an entry is served.
    missing_max_age : float or "infinity"
        Seconds for which a missing chunk is not requested again.
    timeout : float
        Seconds to wait for the fetch of another task or process.
    writable : bool
        Whether a result may be the base of a write.
    passes : bool
        Whether nothing of this source may be cached.
    promote_above : int or None
        Bytes read in byte ranges after which an object is fetched whole; None for never.
    fixed : bool
        Whether the source can never change.
    ignore_validators : bool
        Whether the validators of the source were found to be unreliable.
    claims : Claims
        The fetches of this cache that are under way in this process.
    label : str
        The name of the source in messages.
    missing_offline : float or "infinity", optional
        Seconds for which a missing chunk is not requested again while the source cannot be reached; default is
        `missing_max_age`.
    store : callable
        Returns the store that reads, for other nodes that read on its behalf; None if it must not be given away.
    asks_peers : bool
        Whether the caches of other nodes may be asked; not for a read that another node has asked for.
    has_validators : bool or None
        Whether the last answer had a validator of the source; None before the first one. Without, parts of different
        answers are never put together.
    """

    source: Store
    backend: Backend
    freshness: Freshness
    stats: Stats
    max_age: Age
    missing_max_age: Age
    timeout: float
    writable: bool = False
    passes: bool = False
    promote_above: int | None = None
    fixed: bool = False
    ignore_validators: bool = False
    label: str = "the source"
    missing_offline: Age | None = None
    claims: Claims = field(init=False, repr=False)
    reach: sources.Reach = field(init=False, repr=False)
    store: Callable[[], object] = lambda: None
    asks_peers: bool = True
    has_validators: bool | None = None
    _watches: dict[int, Watch] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.claims = claims_of(self.backend)
        self.reach = sources.reach_of(self.backend.namespace)
        # a user's own store may raise exceptions of its own kinds, which are passed on unchanged
        self._explains = self.freshness.serves_offline and sources.is_of_a_client(self.source)
        self.backend.count(self.stats)

    @contextmanager
    def watching(self, key: str) -> Iterator[Watch]:
        """A context for a reader of several ranges that must be of one state."""
        watch = Watch(key)
        self._watches[id(watch)] = watch
        try:
            yield watch
        finally:
            del self._watches[id(watch)]

    def record_replaced(self, key: str) -> None:
        """Notify the readers of an object's ranges that the object was replaced."""
        for watch in list(self._watches.values()):
            if watch.key == key:
                watch.replaced = True

    def must_ask(self, key: str) -> bool:
        """Whether a key must be revalidated even if it is cached."""
        return self.freshness.must_ask(key, writable=self.writable)

    def entry(self, key: str, start: int = 0, stop: int = END) -> Entry | None:
        """The entry of a span of an object; None for a key that cannot be cached."""
        full = self.backend.prefix + key
        return Entry(full, start, stop) if is_cacheable(full) else None

    def age_of_absence(self, key: str) -> Age:
        """The time for which a key that was found missing is not requested again, in seconds."""
        if is_document(key):
            return self.max_age
        return self.missing_max_age if self.missing_max_age != 0 and is_chunk(key) else 0

    async def was_missing(self, entry: Entry, key: str) -> bool:
        """Whether a chunk was missing at the last request, no longer ago than the limit that holds offline."""
        if self.age_of_absence(key) == 0:
            return False
        most: Age = "infinity"
        if self.freshness.revalidate is not False:
            most = self.missing_max_age if self.missing_offline is None else self.missing_offline
        return await self.backend.get(entry, self.max_age, most) is MISSING

    async def is_known_missing(self, key: str) -> bool:
        """Whether a key was missing at the last request, however long ago."""
        entry = self.entry(key)
        return entry is not None and await self.backend.get(entry, "infinity", "infinity") is MISSING

    async def record_missing(self, entry: Entry, key: str, version: Any) -> None:
        """Record that a chunk is missing; the version is from before the request."""
        if not is_document(key) and self.age_of_absence(key) != 0:
            await self.backend.publish(entry, None, version)

    async def get_cached(self, entry: Entry, max_age: Age | None = None) -> memoryview | None:
        """The cached bytes of an entry, if fresh."""
        data = await self.backend.get(entry, self.max_age if max_age is None else max_age)
        return None if data is MISSING else data

    def hit(self, request: Request, data: memoryview | None) -> Buffer | None:
        """Count a read that needed no bytes of the source; returns its value as a buffer."""
        self.stats.hit(0 if data is None else len(data), time.perf_counter() - request.started)
        return None if data is None else buffer_of(data, request.prototype)

    async def fetch(self, request: Request, *, known: str = "") -> sources.FetchResult:
        """Send a request to the source, and count it as a miss unless the source confirms the known validator."""
        key = request.key
        # if there is something to serve, a source that does not answer in time counts as unreachable
        may_give_up = self.may_serve_offline(key) and self._has_documents(key)
        async with self.asking(key), asyncio.timeout(self.timeout) if may_give_up else nullcontext():
            answer = await sources.fetch(
                self.source,
                key,
                request.prototype,
                request.byte_range,
                known=known,
                certain=self.freshness.revalidate is True,
                fixed=self.fixed,
                ignore_validators=self.ignore_validators,
                states=lambda: self.backend.parts(key).states,
            )
        if answer.value is not None:
            sources.remember_place(self.source)
        elif not answer.unchanged:
            answer = answer._replace(exact=await self.is_certainly_missing(key))
        fetched = request.entry.start, request.entry.stop
        if not answer.unchanged:
            size = None if answer.value is None else len(answer.value)
            self.miss(request.key, size, request.started, [fetched])
        else:
            self.stats.revalidated()
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("asked the source for %s: not changed", self._described(request.key, [fetched]))
        if answer.value is not None and is_document(request.key) and not is_json(contents(answer.value)):
            # perhaps an error page of a proxy: it invalidates no entry, and is not stored
            return answer._replace(exact=False)
        return answer

    async def ask_peers(
        self, key: str, spans: Sequence[Span], began: float, states: Set[str] = frozenset()
    ) -> Given | None:
        """Spans of a chunk from the cache of the node that owns it; None if the source must be asked.

        `began` is when the read began, by `time.perf_counter`; `states` are the validators of what the reader has.
        """
        is_whole = list(spans) == [(0, END)]
        if not self.asks_peers or self.writable or self.max_age != "infinity" or (store := self.store()) is None:
            return None
        if is_whole and not self.backend.parts(key).is_empty:
            return None
        for each in peers[:1]:
            if (given := await each.ask(store, self.backend, key, spans)) is None:
                return None
            if not is_whole and given.values is not None:
                # parts of another state may be newer than what the other node has
                others = (self.backend.parts(key).states | states) - {given.validator}
                pairs = zip(spans, given.values, strict=True)
                is_exact = all(stop == END or len(value) == stop - start for (start, stop), value in pairs)
                if others or not is_exact or not is_from_source(given.validator):
                    self.stats.peer_miss()
                    return None
                # with the state of these bytes, the next ones are compared
                given = given._replace(is_worth_storing=True)
            self.stats.peer_hit(sum(map(len, given.values or ())), time.perf_counter() - began)
            return given
        return None

    async def fetch_chunk(self, request: Request) -> sources.FetchResult:
        """Like `fetch`, for an answer whose time is compared with that of other nodes."""
        began = time.perf_counter()
        answer = await self.fetch(request)
        for each in peers[:1]:
            each.record_fetch(self.backend, time.perf_counter() - began)
        return answer

    # -- a source that cannot be reached

    def may_serve_offline(self, key: str) -> bool:
        """Whether a cached key may be served while the source cannot be reached; never to a store that may write."""
        return self.freshness.serves_offline and not self.writable

    def is_outage(self, error: BaseException) -> bool:
        """Whether an exception of `asking` says that the source cannot be reached."""
        return isinstance(error, SourceUnreachable) or sources.is_outage(error)

    @asynccontextmanager
    async def asking(self, key: str, what: str = "") -> AsyncIterator[None]:
        """A context around a request; says what is missing if the source cannot be reached."""
        try:
            yield
        except Exception as error:
            if isinstance(error, FileNotFoundError):
                # the whole directory may be missing
                await self.is_certainly_missing(key, what, error)
            if not self._explains or isinstance(error, SourceUnreachable) or not sources.is_outage(error):
                raise
            raise await self._unreachable(key, error, what) from error
        # any answer ends the outage, also one that is not stored
        self.reach.answered()

    async def _unreachable(self, key: str, error: BaseException, what: str = "") -> SourceUnreachable:
        if not what:
            what = f"{key} is cached, but must be asked for" if await self._is_cached(key) else f"{key} is not cached"
        return SourceUnreachable(f"{what}, and {self.label} cannot be reached ({sources.in_short(error)})")

    def _has_documents(self, key: str) -> bool:
        """Whether a key is that of a document of a node of which a document is cached."""
        names = [key, *siblings(key)] if is_document(key) else []
        return any(self.backend.parts(name).validated() is not None for name in names)

    async def _is_cached(self, key: str, missing_max_age: Age = 0) -> bool:
        entry = self.entry(key)
        return entry is not None and await self.backend.get(entry, "infinity", missing_max_age) is not None

    async def is_certainly_missing(self, key: str, what: str = "", error: OSError | None = None) -> bool:
        """Whether a key is really missing at the source, and not only hidden with its whole directory.

        Raises `SourceUnreachable` if that is unknown and anything of the source is cached. For a store that may write,
        the key counts as missing, because it is about to be written. `error` is the exception of the source, if there
        is one.
        """
        if self.writable or sources.is_deleted(self.source):
            return True
        documents = [name for path in ["", *arrays_of(key)] for name in array_documents(path)]
        # a cached document of a node above is enough: its directory was there once
        for name in [key, *documents]:
            if await self._is_cached(name, "infinity"):
                told = OSError(errno.ENOENT, "its directory was deleted, or is not mounted")
                raise await self._unreachable(key, told, what) from (error or told)
        return False

    def served_offline(self, key: str, began: float, error: BaseException) -> None:
        """Record that the source could not be reached and the cache has answered; warn once for each source.

        `began` is when the source was asked, by `time.monotonic`.
        """
        self.reach.failed(time.monotonic() - began)
        if self.reach.is_told or (at := self.backend.parts(key).validated()) is None:
            return
        self.reach.is_told = True
        cause = error.__cause__ if isinstance(error, SourceUnreachable) and error.__cause__ is not None else error
        logger.warning(
            "%s cannot be reached (%s): what is cached of it is served, last confirmed %s ago (%s UTC); it is asked "
            "again from time to time, and revalidate='strict' raises the error",
            self.label,
            sources.in_short(cause),
            shown_duration(max(0.0, time.time() - at)),
            datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M"),
        )

    def miss(self, key: str, size: int | None, began: float, spans: Sequence[Span] = ()) -> None:
        """Count a fetch from the source, and log it.

        `size` is the number of bytes that the source sent, None for a missing key; `began` is when it was asked, by
        `time.perf_counter`; `spans` are the byte ranges, unless the whole object was fetched.
        """
        seconds = time.perf_counter() - began
        self.stats.miss(size or 0, seconds)
        self.backend.record_fetch(began)
        if logger.isEnabledFor(logging.DEBUG):
            result = "absent" if size is None else f"{size} bytes"
            logger.debug("fetched %s: %s in %.3f s", self._described(key, spans), result, seconds)

    def _described(self, key: str, spans: Sequence[Span]) -> str:
        entries = (Entry("", *part) for part in spans)
        return f"{self.backend.namespace}/{key}{''.join(map(str, entries))}"

    async def revalidate(self, request: Request) -> tuple[sources.FetchResult, memoryview | None]:
        """Ask the source whether a cached entry has changed; returns the answer, and the cached bytes if it has not."""
        parts = self.backend.parts(request.key)
        known = parts.validator(request.entry)
        answer = await self.fetch(request, known=known)
        if not answer.unchanged:
            return answer, None
        # read after the answer: an entry that is evicted meanwhile cannot be served, whatever the source says
        data = await self.get_cached(request.entry, "infinity")
        if data is not None and parts.validator(request.entry) == known:
            await self.backend.mark_validated(request.entry, self.max_age)
            return answer, data
        # it was evicted or replaced while the source was asked, or is damaged
        return await self.fetch(request), None

    async def agree(
        self, key: str, entry: Entry, validator: str, version: Any, data: memoryview | None = None
    ) -> tuple[Any, str, bool]:
        """Invalidate the cached parts of an object unless an answer of the source is of the same state.

        If the source gives no validator, a small piece is fetched again and compared: while its bytes are the same, the
        object counts as unchanged.

        `version` is from before the request. Returns the version and the validator to publish the answer with, and
        whether the object is known to be replaced.
        """
        if not is_from_source(validator):
            # pending publishes belong to a session as well; wait, so that no other session is cached beside them
            await self.backend.stored(key)
        parts = self.backend.parts(key)
        if parts.is_empty or (entry.is_whole and parts.pieces.any() is None):
            # a whole object replaces another whole one of any state
            return version, validator, False
        if entry.start == entry.stop:
            # an empty range fits every state
            return version, validator, False
        states = parts.states
        if all(are_compatible(validator, state) for state in states):
            return version, validator, False
        replaced = any(differ((validator, state)) for state in states)
        if not replaced and self.backend.write_version(key) != version:
            # the cached parts are newer than this answer, which will not be stored
            return version, validator, False
        if not replaced:
            state = min(states)
            is_told = is_from_source(validator) or is_from_source(state)
            if data is not None and not entry.is_whole and not is_told and await self.get_cached(entry) == data:
                # the same bytes are cached already, so nothing of another state is stored beside them
                return version, adopt_session(validator, state), False
            still = await self._is_still(key, entry, data)
            # a part without a validator is not compatible with one that has a validator
            alike = not is_told and all(are_compatible(state, other) or state == other for other in states)
            if still and alike and not entry.is_whole:
                return version, adopt_session(validator, state), False
            replaced = still is False
        if replaced and await self.has_several_validators(key):
            replaced = False
        if replaced:
            self.record_replaced(key)
        return await self.backend.invalidate(key, version), validator, replaced

    async def has_several_validators(self, key: str) -> bool:
        """Whether the source gives one state of an object several validators in turn, as servers behind a balancer do.

        A replaced object has two validators only while it is being replaced, so two bursts of requests are compared. If
        both see the same two validators, those of this source are not believed any more.
        """
        names: set[str] | None = None
        while not self.ignore_validators:
            # sent together: a balancer that serves in turn might give requests one by one to the same server
            looks = [self._asked_aside(key, RangeByteRequest(0, 1)) for _ in range(_LOOKS)]
            answers = await asyncio.gather(*looks, return_exceptions=True)
            found = from_source(answer.validator for answer in answers if isinstance(answer, sources.FetchResult))
            if names is None:
                names = found
            else:
                self.ignore_validators = len(names & found) > 1
                break
            if len(names) < 2:
                # one server, or one answer: one burst is enough
                break
        return self.ignore_validators

    async def _asked_aside(self, key: str, part: ByteRequest) -> sources.FetchResult:
        return await sources.fetch(
            self.source,
            key,
            default_buffer_prototype(),
            part,
            fixed=self.fixed,
            ignore_validators=self.ignore_validators,
        )

    async def _is_still(self, key: str, entry: Entry, data: memoryview | None) -> bool | None:
        """Whether a piece of an object is unchanged at the source; None if that is unknown.

        The piece is compared with `data` if that is the whole object; otherwise it is fetched again.
        """
        pieces = self.backend.parts(key).pieces.by_size()[:_PROBES]
        for piece in pieces if entry.is_whole else [*pieces, entry.whole]:
            if not (cached := await self.get_cached(piece)):
                continue
            if piece.start < 0:
                cached = cached[-_PROBE:]
                byte_range: ByteRequest = SuffixByteRequest(len(cached))
            else:
                cached = cached[:_PROBE]
                byte_range = RangeByteRequest(piece.start, piece.start + len(cached))
            if entry.is_whole and data is not None:
                return (data[-len(cached) :] if piece.start < 0 else data[piece.start :][: len(cached)]) == cached
            # a failure of this extra request must not fail the read
            with suppress(Exception):
                answer = await self._asked_aside(key, byte_range)
                if answer.value is None or answer.exact:
                    return answer.value is not None and contents(answer.value) == cached
            return None
        return None


def buffer_of(data: memoryview, prototype: BufferPrototype) -> Buffer:
    """A buffer of some bytes, without a copy in main memory."""
    owner = data.obj
    if prototype.buffer is cpu.Buffer and type(owner) is np.ndarray and owner.nbytes == len(data):
        return cpu.Buffer(owner)
    return prototype.buffer.from_bytes(data)


def contents(value: Buffer) -> memoryview:
    """The bytes of a buffer, without a copy in main memory; they must not be changed."""
    array = np.ascontiguousarray(value.as_numpy_array())
    # an empty view cannot be cast
    return memoryview(array).toreadonly().cast("B") if array.size else memoryview(b"")
