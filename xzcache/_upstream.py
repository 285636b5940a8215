"""Asking the source: for what it has, or only whether that is still what we have.

What tells two states of an object apart is its *validator*: an ETag, a time of modification, as RFC 9110 has it. It
comes with the bytes where the source says it unasked, and for one more request where we have to ask and were told to.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import zarr.storage
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.storage import FsspecStore, LocalStore

from xzcache._sources import WebStore

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache._spans import Span

T = TypeVar("T")

_ABSENT: Final = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_BY_CONTENT: Final = ("S3Store", "GCSStore", "AzureStore")
"""Stores whose ETags are of the content, or of the version."""
_ETAG: Final = re.compile(r'"[^"]+"|[0-9A-Fa-fx-]{8,}')
"""A strong one: a weak one promises the same meaning, not the same bytes."""
_SETTLED_SECONDS: Final = 60.0
"""A time of modification tells states apart only once it is as old as this: clocks differ, and tick in seconds."""
_SETTLED_HERE_SECONDS: Final = 2.0
"""The same for files, which have a clock that we know, and another inode when they were replaced."""


class Answer(NamedTuple):
    """What the source said."""

    value: Buffer | None
    """None where the source has nothing, or nothing new."""
    validator: str = ""
    """What tells this state from others; empty where there is nothing that does."""
    unchanged: bool = False
    """Whether the source has what was known."""


async def ask(
    source: Store,
    key: str,
    prototype: BufferPrototype,
    byte_range: ByteRequest | None,
    *,
    known: str = "",
    certain: bool = False,
) -> Answer:
    """Ask a source for the value of a key.

    Parameters
    ----------
    source : Store
    key : str
    prototype : BufferPrototype
    byte_range : ByteRequest or None
    known : str
        The validator of what is cached; empty to be sent the value whatever it is.
    certain : bool
        Whether a validator is worth a request of its own.

    Raises
    ------
    Exception
        The source's own.
    """
    kind = type(source)
    if kind in (zarr.storage.ObjectStore, WebStore) and (options := _range_of(byte_range)) is not None:
        return await _of_obstore(source, key, prototype, byte_range, known, options)
    # the state of a file is told by a look at it; that of an object elsewhere by one more request
    if known or certain or (byte_range is not None and isinstance(source, LocalStore)):
        look = _of_file if isinstance(source, LocalStore) else _LOOKS.get(kind)
        if look is not None:
            return await _looked_at(source, key, prototype, byte_range, known, look)
    return Answer(await source.get(key, prototype, byte_range))


async def ask_for_spans(
    source: Store, key: str, prototype: BufferPrototype, spans: Sequence[Span], **limits: int
) -> list[Answer]:
    """Ask a source for several spans of the value of a key, as many requests as there are spans.

    Parameters
    ----------
    key : str
    prototype : BufferPrototype
    spans : sequence of (int, int)
        Merged already as `limits` have it.
    **limits : int
        ``max_concurrency``, ``max_gap_bytes`` and ``max_coalesced_bytes``, as for `Store.get_ranges`.

    Raises
    ------
    Exception
        The source's own.
    """
    ranges = [RangeByteRequest(*span) for span in spans]
    kind = type(source)
    if len(ranges) == 1 or kind in (zarr.storage.ObjectStore, WebStore) or not hasattr(source, "get_ranges"):
        turn = asyncio.Semaphore(limits["max_concurrency"])

        async def one(byte_range: RangeByteRequest) -> Answer:
            async with turn:
                return await ask(source, key, prototype, byte_range)

        return await all_of(one(byte_range) for byte_range in ranges)
    validator = await _of_file(source, key) if isinstance(source, LocalStore) else ""
    answers = [Answer(None)] * len(ranges)
    try:
        # what lies between them is left out on purpose
        async for group in source.get_ranges(key, ranges, prototype=prototype, **limits | {"max_gap_bytes": 0}):
            for at, value in group:
                answers[at] = Answer(value, validator)
    except BaseExceptionGroup as failures:
        if (others := failures.split(FileNotFoundError)[1]) is not None:
            raise _only(others) from None
        # some may have been read before the object went
        return [Answer(None)] * len(ranges)
    return answers


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What several calls return; where one fails, the others are cancelled, and its exception is raised as it is."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _only(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception of a group of one."""
    first = failures.exceptions[0]
    if len(failures.exceptions) > 1:
        return failures
    return _only(first) if isinstance(first, BaseExceptionGroup) else first


def _range_of(byte_range: ByteRequest | None) -> dict[str, Any] | None:
    """A byte range in the words of obstore; None for one that is better left to Zarr."""
    if byte_range is None:
        return {}
    if isinstance(byte_range, RangeByteRequest):
        return {"range": (byte_range.start, byte_range.end)} if byte_range.start < byte_range.end else None
    if isinstance(byte_range, SuffixByteRequest):
        return {"range": {"suffix": byte_range.suffix}} if byte_range.suffix > 0 else None
    return {"range": {"offset": byte_range.offset}}


async def _of_obstore(
    source: Any,
    key: str,
    prototype: BufferPrototype,
    byte_range: ByteRequest | None,
    known: str,
    options: dict[str, Any],
) -> Answer:
    import obstore

    if known.startswith("etag "):
        options["if_none_match"] = known.removeprefix("etag ")
    try:
        if known.startswith("time ") and await _time_of(source, key) == known:
            # asked for anything newer, a server would not tell of something older
            return Answer(None, known, unchanged=True)
        got = await obstore.get_async(source.store, key, options=options or None)  # type: ignore[arg-type]
        # older versions let go of it with the bytes
        meta = dict(got.meta)
        if type(source) is WebStore and got.attributes.get("Content-Encoding"):
            # what was stored compressed is unpacked by other clients of the web
            return Answer(await source.linked().get(key, prototype, byte_range))
        data = await got.bytes_async()
    except obstore.exceptions.NotModifiedError:
        return Answer(None, known, unchanged=True)
    except obstore.exceptions.NotSupportedError:
        # Azure knows no suffixes, and Zarr a way around
        return Answer(await source.get(key, prototype, byte_range))
    except _ABSENT:
        return Answer(None)
    return Answer(prototype.buffer.from_bytes(data), _validator(source, meta))  # type: ignore[arg-type]


async def _time_of(source: Any, key: str) -> str:
    import obstore

    try:
        return _validator(source, dict(await obstore.head_async(source.store, key)))
    except Exception:
        # not every server answers this; what it has to say, it says when it is asked for the object
        return ""


def _validator(source: Any, meta: dict[str, Any]) -> str:
    etag, modified = meta.get("e_tag") or "", meta.get("last_modified")
    if type(source.store).__name__ in _BY_CONTENT:
        return f"etag {etag}" if _ETAG.fullmatch(etag) else ""
    # elsewhere, ETags are often made of the time; a time of the epoch is what obstore makes of none
    dated = isinstance(modified, datetime) and modified.timestamp() > 0
    if dated and datetime.now(UTC).timestamp() - modified.timestamp() <= _SETTLED_SECONDS:  # type: ignore[union-attr]
        return ""
    if _ETAG.fullmatch(etag):
        return f"etag {etag}"
    return f"time {modified} {meta.get('size')} {etag}" if dated else ""


async def _looked_at(
    source: Any,
    key: str,
    prototype: BufferPrototype,
    byte_range: ByteRequest | None,
    known: str,
    look: Callable[[Any, str], Awaitable[str]],
) -> Answer:
    # looked at first: if the object changes before it is read, the next look sees another state
    before = await look(source, key)
    if before and before == known:
        return Answer(None, known, unchanged=True)
    value = await source.get(key, prototype, byte_range)
    return Answer(value, before if value is not None else "")


async def _of_file(source: LocalStore, key: str) -> str:
    with suppress(OSError):
        status = os.stat(source.root / key)
        if time.time() - status.st_mtime > _SETTLED_HERE_SECONDS:
            return f"file {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return ""


async def _of_fsspec(source: FsspecStore, key: str) -> str:
    # the only file system of fsspec's that can be told not to answer from what it listed before
    if not type(source.fs).__module__.startswith("s3fs"):
        return ""
    with suppress(*_ABSENT):
        info = await source.fs._info(f"{source.path}/{key}".lstrip("/"), refresh=True)
        if etag := info.get("ETag"):
            return f"etag {etag}"
    return ""


_LOOKS: Final[dict[type, Callable[[Any, str], Awaitable[str]]]] = {FsspecStore: _of_fsspec}
