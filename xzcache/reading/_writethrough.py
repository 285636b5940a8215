"""Write-through: the cache is invalidated before and after the source is written, so that it is never stale."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from xzcache.model import is_cacheable, is_document, run_to_completion
from xzcache.reading._request import contents, peers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from zarr.core.buffer import Buffer

    from xzcache.model import Backend
    from xzcache.reading._freshness import Freshness


class WriteThrough:
    """Writes to one source through one backend.

    If a write raises, the key is invalidated: the state of the source is unknown. `passes` tells that nothing of the
    source may be cached.
    """

    def __init__(self, backend: Backend, freshness: Freshness, *, passes: bool) -> None:
        self._backend = backend
        self._freshness = freshness
        self._passes = passes
        self._turns = _Turns()

    async def values(
        self,
        pairs: list[tuple[str, Buffer]],
        write: Callable[[], Awaitable[None]],
        *,
        keep: bool,
        certain: bool = True,
    ) -> None:
        """Write values to the source.

        `keep` stores them in the cache unless another process wrote them at the same time. `certain` tells that the
        source has these values once `write` returns.
        """
        if self._passes:
            await write()
            return
        pairs = [(key, value) for key, value in pairs if self._is_cacheable(key)]
        keys = [key for key, _ in pairs]
        with self._turns.take(keys) as turn:
            async with self._telling(keys):
                # to the end even if cancelled: a write that has begun must be ended, or its key is not cached again
                begun, cancelled = await run_to_completion(self._backend.begin_write(keys))
                done = False
                try:
                    _honour(cancelled)
                    await turn()
                    await write()
                    done = True
                finally:
                    # after an exception the state of the source is unknown, so no value is stored
                    values = [contents(value) if keep and done else None for _, value in pairs]
                    _, cancelled = await run_to_completion(self._end(begun, values, pairs if done and certain else []))
                    _honour(cancelled and done)

    async def _end(self, begun: Any, values: list[memoryview | None], certain: list[tuple[str, Buffer]]) -> None:
        await self._backend.end_write(begun, values)
        for key, value in certain:
            if is_document(key):
                document = value.to_bytes()
                await self._backend.apply_document(key, document, None, is_written=True)
                self._freshness.mark_validated(key, document)

    async def deletion(self, key: str, delete: Callable[[], Awaitable[None]]) -> None:
        """Delete a key and everything beneath it, as a file store does."""
        if not self._is_cacheable(key):
            await delete()
            return
        await self._deletion(key, delete, itself=True)

    async def deletion_beneath(self, prefix: str, delete: Callable[[], Awaitable[None]]) -> None:
        """Delete everything beneath a prefix."""
        if not self._is_cacheable(prefix):
            await delete()
            return
        await self._deletion(prefix.rstrip("/"), delete, itself=False)

    async def _deletion(self, prefix: str, delete: Callable[[], Awaitable[None]], *, itself: bool) -> None:
        keys = [prefix] if itself else []
        names = [*keys, f"{prefix}/" if prefix else ""]
        with self._turns.take(names) as turn:
            async with self._telling(keys, prefix):
                begun, cancelled = await run_to_completion(self._backend.begin_write(keys, beneath=prefix))
                try:
                    _honour(cancelled)
                    await turn()
                    await delete()
                finally:
                    _, cancelled = await run_to_completion(self._backend.end_write(begun))
                _honour(cancelled)

    @asynccontextmanager
    async def _telling(self, keys: Sequence[str], beneath: str | None = None) -> AsyncIterator[None]:
        """While the source is being written: before it is, the other nodes are told."""
        with ExitStack() as stack:
            for each in list(peers):
                stack.callback(each.end_write, await each.begin_write(self._backend, keys, beneath))
            yield

    def _is_cacheable(self, key: str) -> bool:
        return not self._passes and is_cacheable(self._backend.prefix + key)


class _Turns:
    """Writes of the same key reach the source in the order in which they were begun.

    Zarr may write a document again before the last write of it has ended, and some stores, such as those in memory,
    keep the order. The invalidation in front of a write must not change that order. Writes of several event loops have
    no order.
    """

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Future[None]] = {}
        """By key, or by prefix with its trailing slash: the last write that has begun and not ended."""

    @contextmanager
    def take(self, names: Sequence[str]) -> Iterator[Callable[[], Awaitable[None]]]:
        """Begin a write of keys and prefixes; await the returned function before calling the source."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        overlapping = [self._last.get(above) for name in names for above in _with_prefixes(name)]
        if prefixes := tuple(name for name in names if name[-1:] in ("", "/")):
            overlapping += [write for name, write in list(self._last.items()) if name.startswith(prefixes)]
        self._last.update(dict.fromkeys(names, mine))

        async def turn() -> None:
            earlier = {write for write in overlapping if write is not None and not write.done()}
            if earlier := {write for write in earlier if write.get_loop() is loop}:
                await asyncio.wait(earlier)
            mine.set_result(None)

        try:
            yield turn
        finally:
            if not mine.done():
                mine.set_result(None)
            for name in names:
                if self._last.get(name) is mine:
                    del self._last[name]


def _with_prefixes(name: str) -> Iterator[str]:
    """A key, or a prefix, and each prefix that it lies beneath."""
    yield name
    end = len(name.rstrip("/"))
    while (end := name.rfind("/", 0, end)) >= 0:
        yield name[: end + 1]
    yield ""


def _honour(cancelled: bool) -> None:
    if cancelled:
        raise asyncio.CancelledError
