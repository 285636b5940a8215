"""The contract between reading and a cache, which is a directory that processes share or any other Zarr store.

Keys are those of the source. Only the key of an `Entry` has the `prefix` of the backend in front.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from xzcache._config import Age
    from xzcache.model.entry import Data, Entry, Extent
    from xzcache.model.spans import Listed, Span


class Absence(Enum):
    """The type of `MISSING`."""

    MISSING = "missing"


MISSING: Final = Absence.MISSING
"""The answer of a lookup for a key that is known to be missing at the source."""

Cached = memoryview | Literal[Absence.MISSING] | None
"""The answer of a lookup: bytes, `MISSING`, or None if the source must be asked."""

Array = np.ndarray[Any, np.dtype[np.uint8]]
"""A numpy array of bytes."""


def nothing() -> None:
    """Release a lock that needs no release."""


class Parts(Protocol):
    """The cached parts of one object. Each answer is read from the cache at its first use, and kept."""

    @property
    def is_empty(self) -> bool:
        """Whether there certainly are none."""

    @property
    def pieces(self) -> Listed:
        """The cached byte ranges, without the whole object."""

    @property
    def states(self) -> set[str]:
        """The validators of all parts, the whole object included; an empty string stands for an unknown state."""

    def validator(self, entry: Entry) -> str:
        """The validator of a cached entry at this moment; empty if it has none."""

    def size(self, max_age: Age) -> int | None:
        """The size of the whole object, if `get` would find it; None also if only `get` can tell."""

    def validated(self, entry: Entry | None = None) -> float | None:
        """When the source last gave or confirmed what an entry is served from, in seconds since the epoch.

        By default that is the whole object. The oldest time, if it may be served from several files; None if unknown.
        """


class Reads(NamedTuple):
    """Counters of reads; bytes and seconds of all of them together."""

    hits: int = 0
    misses: int = 0
    bytes_from_cache: int = 0
    bytes_from_source: int = 0
    seconds_from_cache: float = 0.0
    peer_hits: int = 0
    bytes_from_peers: int = 0


class ReadCounters(Protocol):
    """Counters that only grow."""

    def reads(self) -> Reads:
        """Their values."""


class Statistics(Protocol):
    """What a cache counts for longer than a process."""

    def count(self, counters: ReadCounters) -> None:
        """Keep what these counters of reads of this source count, for longer than this process if possible."""
        return

    def record_fetch(self, began: float) -> None:
        """Record that a request to the source has just ended, which began at a time of `time.perf_counter`."""
        return


class Documents(Protocol):
    """What a cache knows of the metadata documents of one source."""

    async def apply_document(self, key: str, document: bytes | None, version: Any, *, is_written: bool = False) -> Any:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with.

        `document` is None if the source has none. With `is_written`, the document was written through the cache: it is
        remembered, and nothing is invalidated.
        """

    async def unconfirmed(self, seen: Mapping[str, bytes], asked: Collection[str] = ()) -> list[str]:
        """The documents whose recorded state may not be the one under which the chunks were cached.

        `seen` has the first bytes of the states that another machine has seen. The documents in `asked` were just
        revalidated, and are confirmed for this process from now on.
        """
        return []


class Backend(Statistics, Documents, Protocol):
    """The cached entries of one source.

    No method raises because the cache fails: an entry that cannot be read counts as not cached, one that cannot be
    stored is not stored, and one that cannot be invalidated is not served. All methods are safe for threads and event
    loops. A *write version* counts the writes to a key: an entry is published only if no process that shares the cache
    has written its key since the version was read.

    The bodies here are those of a cache that no other process shares.
    """

    namespace: str
    """The name of the source in the cache."""
    prefix: str
    """Precedes the keys of the source in the keys of entries; empty for a cache of a single source."""

    @property
    def cache_id(self) -> object:
        """The same object for all backends of one cache in this process. Weakly referable, compared by identity."""

    async def prepare(self) -> None:
        """Open the cache, if it is not open. Every other method works without, but may find and store nothing."""
        return

    # -- looking up

    def get_nowait(
        self,
        extent: Extent,
        max_age: Age,
        missing_max_age: Age = 0,
        *,
        place: Array | None = None,
        patient: bool = False,
    ) -> Array | Literal[Absence.MISSING] | None:
        """Like `get`, without waiting for anything but, with `patient`, the disk; None means that `get` must be called.

        With a `place`, an array of bytes as long as the entry, the bytes are read into it and it is returned as the
        answer. After None, the contents of the place are undefined. An array that was not given is read-only.
        """
        return None

    def are_at_hand(self, keys: Iterable[str], max_age: Age, missing_max_age: Age = 0) -> bool:
        """Whether `get_nowait`, with `patient`, would answer for the whole objects of all keys of the source."""
        return False

    async def get(self, entry: Entry, max_age: Age, missing_max_age: Age = 0) -> Cached:
        """The bytes of an entry, no older than `max_age` and exactly those that were published.

        They may be part of another entry. No entry is returned that any process invalidated before the call. A key
        that was found missing in the last `missing_max_age` seconds, and not written since, is `MISSING`.
        """

    async def get_checked(self, entry: Entry, max_age: Age, missing_max_age: Age = 0) -> Cached:
        """Like `get`, but also checks bytes that this process has checked before, because they are given away."""
        return await self.get(entry, max_age, missing_max_age)

    def parts(self, key: str) -> Parts:
        """The cached parts of an object, which other processes may change at any moment."""

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry that the source has confirmed, for all processes, if ages matter.

        The age of a document always matters.
        """

    # -- fetching once, and storing

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """A context around a fetch; the last one of this process to exit waits for pending publishes."""
        return nullcontext()

    def acquire(self, key: str, span: Span, *, exactly: bool = True) -> Callable[[], None] | Span:
        """Try to lock a span of an object against other processes, without waiting.

        Returns the function that releases the lock, or a part of the span that another process has locked; without
        `exactly`, perhaps the span itself for the part, which costs less. The lock goes with the process. The whole
        object is `(0, END)`; a suffix is locked against equal suffixes only. Threads of one process must not lock the
        same bytes twice, except a suffix.
        """
        return nothing

    def write_version(self, key: str) -> Any:
        """The write version of a key, read before its fetch begins; None if nothing can be stored. Never waits."""

    async def publish(
        self,
        entry: Entry,
        data: Data | None,
        version: Any,
        validator: str = "",
        done: Callable[[], None] = nothing,
        *,
        age: float = 0.0,
    ) -> None:
        """Store an entry, perhaps later; with None for `data`, record that the key is missing at the source.

        Nothing is stored if the version is None, if any process has written the key since the version was read or is
        writing it now, or if a part with an incompatible validator is cached. Readers see all of an entry or nothing.
        An absence that was found during a write is forgotten when the write ends. A whole object replaces its pieces.
        `age` is how long ago the source gave the bytes, in seconds. `done` is called exactly once, when other processes
        can find the entry or it was dropped.
        """

    async def stored(self, key: str) -> None:
        """Wait until no publish of an object by this process is pending."""
        return

    # -- invalidation: after these return, no process serves what was stored before

    async def begin_write(self, keys: Sequence[str], beneath: str | None = None) -> Any:
        """Invalidate keys before the source is written; until `end_write`, no process stores them.

        With `beneath`, all keys beneath that path are invalidated; `keys` then has the path itself or nothing.
        """

    async def end_write(self, begun: Any, values: Sequence[Data | None] = ()) -> None:
        """Invalidate the same keys again after the source was written, and store their new values.

        A value, one for each of `keys`, is not stored if another process wrote the key at the same time.
        """

    async def invalidate(self, key: str, since: Any) -> Any:
        """Invalidate a key that changed at the source.

        Returns the version to publish the new value with; None if the key was written after the version `since`.
        """


class Cache(Backend, Protocol):
    """A backend as the store over it needs it."""

    @property
    def is_open(self) -> bool:
        """Whether the cache is open, so that `info` creates nothing."""

    @property
    def bound(self) -> int | None:
        """The bound of the cache, in bytes."""

    @property
    def evictions(self) -> int:
        """How many entries this process evicted."""

    @property
    def faults(self) -> int:
        """How many times the cache failed."""

    def close(self) -> None:
        """Leave the cache until the next use."""

    def is_same_cache(self, other: object) -> bool:
        """Whether another backend keeps its entries in the same place."""

    def info(self, *, exact: bool = True) -> dict[str, Any]:
        """The size and the number of entries of this source and of the whole cache; sizes in bytes."""

    async def clear(self) -> None:
        """Invalidate all entries of this source."""


# -- other nodes

UNKNOWN_AGE: Final = 3e8
"""Ten years: a reader with a limit for the age of entries asks the source."""


class Given(NamedTuple):
    """Spans of an object, as the cache of another node had them."""

    values: tuple[memoryview, ...] | None
    """None if the object is missing at the source."""
    validator: str = ""
    """The validator of the object; empty if that is unknown, for a whole object only."""
    age: float = UNKNOWN_AGE
    """How long ago the source gave or confirmed them, in seconds."""
    is_worth_storing: bool = True
    """Whether this node should store them as well."""


class Peers(Protocol):
    """The caches of other nodes. Safe for threads and event loops; no method raises."""

    async def ask(self, store: object, backend: Backend, key: str, spans: Sequence[Span]) -> Given | None:
        """Ask the node that owns a chunk, on behalf of a store; None if the source must be asked.

        The spans, as in an `Entry`, are the whole object or byte ranges of it.
        """

    def record_fetch(self, backend: Backend, seconds: float) -> None:
        """Record how long the source took to answer."""

    async def begin_write(self, backend: Backend, keys: Sequence[str], beneath: str | None = None) -> Any:
        """Tell all nodes that these keys, or all beneath a path, are being written: no node asks another for them."""

    def end_write(self, begun: Any) -> None:
        """Record that a write has ended, so that the nodes may be told when the last one has."""
