"""The contract between reading and a cache, which is a directory that processes share or any other Zarr store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    import numpy as np

    from xzcache._config import Age
    from xzcache.model.entry import Data, Entry
    from xzcache.model.singleflight import Claims, Flights
    from xzcache.model.spans import Listed, Span


class Backend(Protocol):
    """The cached entries of one source.

    No method raises because the cache fails: an entry that cannot be read counts as not cached, one that cannot be
    stored is not stored, and one that cannot be invalidated is not served. All methods are safe for threads and event
    loops. A *write version* counts the writes to a key: an entry is published only if no process that shares the cache
    has written its key since the version was read.
    """

    namespace: str
    flights: Flights[memoryview | None]
    """The fetches of this process that are under way, by entry."""
    claims: Claims
    """The byte ranges that this process is fetching."""

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

    def entry(self, key: str, start: int, stop: int) -> Entry | None:
        """The entry of a span of an object; None for a key that cannot be cached."""

    async def prepare(self) -> None:
        """Open the cache, if it is not open."""

    def close(self) -> None:
        """Leave the cache until the next use."""

    def is_same_cache(self, other: object) -> bool:
        """Whether another backend keeps its entries in the same place."""

    def info(self, *, exact: bool = True) -> dict[str, Any]:
        """The size and the number of entries of this source and of the whole cache; sizes in bytes."""

    # -- looking up: never older than `max_age`, never of other bytes than were stored

    def get_nowait(self, key: str, max_age: Age) -> memoryview | None:
        """The value of a key if it can be read without waiting; None means that `get` must be called."""

    def readinto_nowait(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """As `get_nowait`, into an array of bytes, which is undefined after False."""

    def get_blocking(self, entry: Entry, max_age: Age) -> memoryview | None:
        """Like `get`, blocking, for threads; None means that `get` must be called."""

    async def get(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry."""

    async def size(self, entry: Entry, max_age: Age) -> int | None:
        """The size of a whole object that `get` would find."""

    def listed(self, key: str) -> Listed:
        """The byte ranges that are cached of an object."""

    def states_of(self, key: str) -> set[str]:
        """The validators of all cached parts of an object; an empty string stands for an unknown state."""

    async def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if it has none."""

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Restart the age of an entry that the source has confirmed."""

    # -- fetching once, and storing

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """A context around a fetch; the last one to exit waits for pending publishes."""

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """Try to take the fetch lock of an entry, without waiting; returns the function that releases it."""

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """Like `try_acquire`, for a span of an object; a span that another process fetches if one does."""

    def write_version(self, entry: Entry) -> Any:
        """The write version of an entry, read before its fetch begins; None if nothing can be stored."""

    async def publish(self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str = "") -> bool:
        """Store an entry unless its key was written since the version was read; readers see all of it or nothing."""

    async def publish_soon(
        self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str, done: Callable[[], None]
    ) -> None:
        """Like `publish`, perhaps later; `done` is always called in the end."""

    async def stored(self, key: str) -> None:
        """Wait until no publish of an object by this process is pending."""

    # -- invalidation: after these return, no process serves what was stored before

    async def begin_write(self, keys: Sequence[str]) -> Sequence[Any]:
        """Invalidate keys before the source is written; until `end_write`, no process stores them."""

    async def end_write(self, writes: Sequence[Any], values: Sequence[Data | None], max_size: int | None) -> None:
        """Invalidate the keys again after the source was written, and store their new values."""

    async def invalidate(self, key: str, since: Any) -> Any:
        """Invalidate a key that changed at the source; returns the version to publish the new value with."""

    async def begin_delete(self, prefix: str, *, itself: bool = False) -> Any:
        """Like `begin_write`, for all keys beneath a prefix, and with `itself` for the prefix as a key."""

    async def end_delete(self, begun: Any) -> None:
        """Like `end_write`, for `begin_delete`."""

    async def clear(self) -> None:
        """Invalidate all entries of this source."""

    # -- metadata documents

    async def apply_document(self, key: str, document: bytes | None, version: Any) -> Any:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""

    async def record_document(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""

    async def unconfirmed(self, seen: Mapping[str, bytes]) -> list[str]:
        """The documents whose recorded state may not be the one under which the chunks were cached."""

    async def confirm(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """Record, in this process, that unconfirmed documents were revalidated."""

    # -- the negative cache

    async def is_document_missing(self, key: str, max_age: Age) -> bool:
        """Whether a metadata document is known to be missing at the source."""

    def is_known_missing_nowait(self, key: str, max_age: Age) -> bool:
        """Whether a chunk is known to be missing at the source, without waiting."""

    async def is_known_missing(self, key: str, max_age: Age) -> bool:
        """Whether a chunk is known to be missing at the source."""

    async def record_missing(self, key: str, version: Any) -> None:
        """Record that a chunk is missing at the source, unless its key was written since the version was read."""
