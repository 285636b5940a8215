"""Write-through: the cache is invalidated before and after the source is written, so that it is never stale."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from xzcache.model import is_cacheable, is_document, run_to_completion
from xzcache.reading._request import contents, peers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence

    from zarr.core.buffer import Buffer

    from xzcache.model import Backend
    from xzcache.reading._freshness import Freshness

    Turn = Callable[[], Awaitable[None]]


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

    async def value(
        self, key: str, value: Buffer, write: Callable[[], Awaitable[None]], *, keep: bool, certain: bool = True
    ) -> None:
        """Write a value to the source.

        `keep` stores it in the cache unless another process wrote it at the same time. `certain` tells that the source
        has this value once `write` returns.
        """
        if not self._is_cacheable(key):
            await write()
            return

        async def whole(turn: Turn) -> None:
            async with self._begun([key]) as values:
                await turn()
                await write()
                if keep:
                    values.append(contents(value))
            if certain and is_document(key):
                document = value.to_bytes()
                await self._backend.apply_document(key, document, None, is_written=True)
                self._freshness.mark_validated(key, document)

        await self._to_the_end(whole, [key], [key])

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

        async def whole(turn: Turn) -> None:
            async with self._begun(keys, prefix):
                await turn()
                await delete()

        await self._to_the_end(whole, [*keys, f"{prefix}/" if prefix else ""], keys, prefix)

    async def _to_the_end(
        self,
        whole: Callable[[Turn], Coroutine[Any, Any, None]],
        names: Sequence[str],
        keys: Sequence[str],
        beneath: str | None = None,
    ) -> None:
        """Do a whole write, in its turn, even if the caller is cancelled.

        A store that writes in a thread, as `LocalStore` does, goes on after its task was cancelled. Were the write
        ended then, a reader could store the old value after it.
        """
        with self._turns.take(names) as turn:
            async with self._telling(keys, beneath):
                _, cancelled = await run_to_completion(whole(turn))
                if cancelled:
                    raise asyncio.CancelledError

    @asynccontextmanager
    async def _begun(self, keys: Sequence[str], beneath: str | None = None) -> AsyncIterator[list[memoryview]]:
        """While the source is being written; yields a list for the values that are to be stored."""
        begun = await self._backend.begin_write(keys, beneath)
        values: list[memoryview] = []
        try:
            yield values
        except BaseException as error:
            # After a cancellation at the end of the event loop, the source may go on: the keys are not cached until
            # this process ends
            if isinstance(error, Exception) or _is_from_source(error):
                # the state of the source is unknown, so no value is stored
                await self._backend.end_write(begun)
            raise
        await self._backend.end_write(begun, values)

    @asynccontextmanager
    async def _telling(self, keys: Sequence[str], beneath: str | None = None) -> AsyncIterator[None]:
        """While the source is being written: before it is, the other nodes are told."""
        with ExitStack() as stack:
            for each in list(peers):
                stack.callback(each.end_write, await each.begin_write(self._backend, keys, beneath))
            yield

    def _is_cacheable(self, key: str) -> bool:
        return not self._passes and is_cacheable(self._backend.prefix + key)


def _is_from_source(error: BaseException) -> bool:
    """Whether a source has cancelled its own work, which ends this task no more than another error of it does."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling()


class _Turns:
    """Writes of the same key reach the source in the order in which they were begun.

    Zarr may write a document again before the last write of it has ended, and some stores, such as those in memory,
    keep the order. The invalidation in front of a write must not change that order. Writes of several event loops have
    no order.
    """

    def __init__(self) -> None:
        self._of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Future[None]]]
        self._of_loop = WeakKeyDictionary()
        """For each loop, by key, or by prefix with its trailing slash: the last write that has begun and not ended."""

    @contextmanager
    def take(self, names: Sequence[str]) -> Iterator[Turn]:
        """Begin a write of keys and prefixes; await the returned function before calling the source."""
        loop = asyncio.get_running_loop()
        last = self._of_loop.setdefault(loop, {})
        mine: asyncio.Future[None] = loop.create_future()
        overlapping = [last.get(above) for name in names for above in _with_prefixes(name)]
        if prefixes := tuple(name for name in names if name[-1:] in ("", "/")):
            overlapping += [write for name, write in last.items() if name.startswith(prefixes)]
        last.update(dict.fromkeys(names, mine))

        async def turn() -> None:
            if earlier := {write for write in overlapping if write is not None and not write.done()}:
                await asyncio.wait(earlier)
            mine.set_result(None)

        try:
            yield turn
        finally:
            if not mine.done():
                mine.set_result(None)
            for name in names:
                if last.get(name) is mine:
                    del last[name]


def _with_prefixes(name: str) -> Iterator[str]:
    """A key, or a prefix, and each prefix that it lies beneath."""
    yield name
    end = len(name.rstrip("/"))
    while (end := name.rfind("/", 0, end)) >= 0:
        yield name[: end + 1]
    yield ""
