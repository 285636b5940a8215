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

    No method raises because the cache fails: what cannot be read is not cached, what cannot be stored is not stored,
    and what cannot be invalidated is not served. All methods are safe for threads and event loops. A *ticket* stands
    for the writes so far: an entry is published only if its key was not written since its ticket was taken, by any
    process that shares the cache.
    """

    namespace: str
    flights: Flights[memoryview | None]
    """The fetches of this process that are under way, by entry."""
    claims: Claims
    """The byte ranges that this process is fetching."""

    @property
    def is_open(self) -> bool:
        """Whether `info` makes nothing."""

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
        """What is cached of this source, and in all; sizes in bytes."""

    # -- looking up: never older than `max_age`, never of other bytes than were stored

    def get_nowait(self, key: str, max_age: Age) -> memoryview | None:
        """The value of a key if that needs no waiting; after None, `get` tells."""

    def readinto_nowait(self, key: str, max_age: Age, place: np.ndarray[Any, Any], *, patient: bool) -> bool:
        """As `get_nowait`, into an array of bytes, which is undefined after False."""

    def get_blocking(self, entry: Entry, max_age: Age) -> memoryview | None:
        """As `get`, blocking, for threads; after None, `get` tells."""

    async def get(self, entry: Entry, max_age: Age) -> memoryview | None:
        """The bytes of an entry."""

    async def size(self, entry: Entry, max_age: Age) -> int | None:
        """The size of a whole object that `get` would find."""

    def listed(self, key: str) -> Listed:
        """The byte ranges that are cached of an object."""

    def states_of(self, key: str) -> set[str]:
        """The validators of all that is cached of an object; an empty one for an unknown state."""

    async def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if it has none."""

    async def mark_validated(self, entry: Entry, max_age: Age) -> None:
        """Let the age of an entry, which the source was asked about, begin anew."""

    # -- fetching once, and storing

    def fetching(self) -> AbstractAsyncContextManager[None]:
        """A context in which the source is fetched from; the last to leave it waits for what is being stored."""

    def try_acquire(self, entry: Entry) -> Callable[[], None] | None:
        """Try to become the only process that fetches an entry, without waiting; the function that gives that up."""

    def claim(self, key: str, span: Span) -> Callable[[], None] | Span:
        """Like `try_acquire`, for a span of an object; a span that another process fetches if one does."""

    def write_version(self, entry: Entry) -> Any:
        """A ticket, taken before the fetch begins; None if nothing can be stored."""

    async def publish(self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str = "") -> bool:
        """Store an entry, unless its key was written since the ticket was taken; others see all of it or nothing."""

    async def publish_soon(
        self, entry: Entry, data: Data, version: Any, max_size: int | None, validator: str, done: Callable[[], None]
    ) -> None:
        """As `publish`, perhaps later; `done` is called in the end, whatever happens."""

    async def stored(self, key: str) -> None:
        """Wait until all that this process is storing of an object is stored, or will not be."""

    # -- what is no longer true: after these return, no process is served what was stored before

    async def begin_write(self, keys: Sequence[str]) -> Sequence[Any]:
        """Invalidate keys before the source is written; until `end_write`, nothing of them is stored."""

    async def end_write(self, writes: Sequence[Any], values: Sequence[Data | None], max_size: int | None) -> None:
        """Invalidate the keys again after the source was written, and store their new values."""

    async def invalidate(self, key: str, since: Any) -> Any:
        """Invalidate a key of which the source has another state; a ticket to store it with."""

    async def begin_delete(self, prefix: str, *, itself: bool = False) -> Any:
        """As `begin_write`, of all keys beneath a prefix, and perhaps of the prefix as a key."""

    async def end_delete(self, begun: Any) -> None:
        """As `end_write`, of `begin_delete`."""

    async def clear(self) -> None:
        """Invalidate all entries of this source."""

    # -- metadata documents

    async def apply_document(self, key: str, document: bytes | None, version: Any) -> Any:
        """Invalidate the arrays that a metadata document of the source shows to have changed; a ticket to store it."""

    async def record_document(self, key: str, document: bytes) -> None:
        """Remember the arrays of a metadata document that was written through the cache."""

    async def unconfirmed(self, seen: Mapping[str, bytes]) -> list[str]:
        """Those documents whose state may not be the one that the cached chunks are of."""

    async def confirm(self, seen: Mapping[str, bytes], asked: Sequence[str]) -> None:
        """Remember, in this process, of which documents the source was asked in doubt."""

    # -- what the source does not have

    async def is_document_missing(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a metadata document."""

    def is_known_missing_nowait(self, key: str, max_age: Age) -> bool:
        """Whether this process knows that the source does not have a chunk."""

    async def is_known_missing(self, key: str, max_age: Age) -> bool:
        """Whether the source is known not to have a chunk."""

    async def record_missing(self, key: str, version: Any) -> None:
        """Remember that the source does not have a chunk, unless it was written since the ticket was taken."""
