"""Requests to a source, conditional where possible.

The validator of an object comes with its bytes if the source sends it. Otherwise the object's metadata is requested
before and after a read of a part, if the source supports that. A part without any validator gets a unique one.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import zarr.storage
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from xzcache.model import FIXED, clip, is_document, is_from_source, session_validator, span
from xzcache.sources._open import WebStore

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from xzcache.model import Span


T = TypeVar("T")

_ABSENT: Final = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_OBSTORES: Final = (zarr.storage.ObjectStore, WebStore)
_BY_CONTENT: Final = ("S3Store", "GCSStore", "AzureStore")
"""Stores whose ETags depend on the content or on the version."""
_ETAG: Final = re.compile(r'"[^"]+"|[0-9A-Fa-fx-]{8,}')
"""A strong one: a weak one promises the same meaning, not the same bytes."""
_SETTLED_SECONDS: Final = 60.0
"""The age after which a time of modification identifies a state: clocks differ, and tick in seconds."""
_SETTLED_HERE_SECONDS: Final = 2.0
"""The same for local files: their clock is known, and a replaced file has another inode."""


class FetchResult(NamedTuple):
    """The answer of a source."""

    value: Buffer | None
    """None if the object is missing, or unchanged."""
    validator: str = ""
    """The validator; empty only for a whole object of a source without validators."""
    unchanged: bool = False
    """Whether the source confirmed the known validator."""
    exact: bool = True
    """Whether the bytes are certainly the requested ones."""
    size: int | None = None
    """The size of the whole object, if the source reports it."""


class _Head(NamedTuple):
    """The metadata of an answer, or of a metadata request."""

    validator: str = ""
    size: int | None = None
    got: Span | None = None
    """Which bytes of the object the answer holds."""
    is_plain: bool = True
    """Whether the bytes are the object's own, and were not unpacked on the way."""
    is_clear: bool = True
    """Whether the answer says which bytes it holds, and where they end."""


_UNKNOWN: Final = _Head()


# -- asking


async def fetch(
    source: Store,
    key: str,
    prototype: BufferPrototype,
    byte_range: ByteRequest | None,
    *,
    known: str = "",
    certain: bool = False,
    fixed: bool = False,
    ignore_validators: bool = False,
    states: Callable[[], set[str]] = set,
) -> FetchResult:
    """Request the value of a key from a source.

    Parameters
    ----------
    source : Store
    key : str
    prototype : BufferPrototype
    byte_range : ByteRequest or None
    known : str
        The validator of the cached entry; empty to get the value in any case.
    certain : bool
        Whether the validator of a whole object is worth a request of its own.
    fixed : bool
        Whether the source can never change.
    ignore_validators : bool
        Whether what the source says of its states is not to be believed.
    states : callable
        Returns the validators of the cached parts, which replace a metadata request before the read.

    Raises
    ------
    Exception
        The source's own.
    """
    if type(source) in _OBSTORES and (options := _range_of(byte_range)) is not None:
        answer = await _of_obstore(source, key, prototype, byte_range, known, options)
        return _labelled([answer], byte_range, fixed=fixed, ignore_validators=ignore_validators)[0]
    look, twin = None if fixed else _look_at(source), _Recording.twin_of(source)
    is_of_files = isinstance(source, LocalStore)
    # if the validator comes with the bytes, a metadata request pays only if it is likely to save them
    if look is not None and known and (twin is None or certain):
        if (seen := (await look(key)).validator) == known:
            return FetchResult(None, known, unchanged=True)
        states = lambda: {seen}  # noqa: E731
    elif is_of_files or byte_range is None:
        states = set
    is_clear = True
    if twin is not None:
        answer, is_clear = await _fetch_recorded(twin, key, prototype, byte_range)
    else:
        # of a whole chunk in a file, to look costs little, and parts of it are of the same state
        is_worth_it = byte_range is not None or known or certain or (is_of_files and not is_document(key))
        if look is None or not is_worth_it:
            answer = _judged(await source.get(key, prototype, byte_range), byte_range, _UNKNOWN)
        else:
            (answer,) = await _between_looks(
                look, key, [byte_range], states, lambda: _alone(source.get(key, prototype, byte_range))
            )
    if byte_range is not None and answer.value is not None and answer.size is None and is_clear and not answer.exact:
        answer = await _measured(source, key, byte_range, answer)
    return _labelled([answer], byte_range, fixed=fixed, ignore_validators=ignore_validators)[0]


async def _measured(source: Store, key: str, byte_range: ByteRequest, answer: FetchResult) -> FetchResult:
    """Check by the object's size whether a short answer is exact."""
    assert answer.value is not None
    length = len(answer.value)
    most = span(byte_range)
    if most is None or (most[1] >= 0 and length > most[1] - most[0]) or (most[0] < 0 and length > -most[0]):
        return answer
    if type(source).getsize is Store.getsize and not isinstance(source, MemoryStore):
        # the default method of Zarr would read the whole object
        return answer
    # after any error the size is unknown
    with suppress(Exception):
        size = await source.getsize(key)
        return answer._replace(exact=_is_exact(length, byte_range, _Head(size=size)), size=size)
    return answer


async def fetch_spans(
    source: Store,
    key: str,
    prototype: BufferPrototype,
    spans: Sequence[Span],
    *,
    fixed: bool = False,
    ignore_validators: bool = False,
    states: Callable[[], set[str]] = set,
    **limits: int,
) -> list[FetchResult]:
    """Request several spans of the value of a key, one request for each span.

    The spans are merged already as `limits` require, which are those of `Store.get_ranges`. The other parameters are as
    for `fetch`. Exceptions of the source are raised.
    """
    ranges = [RangeByteRequest(*span) for span in spans]
    if len(ranges) == 1:
        options: dict[str, Any] = {"fixed": fixed, "ignore_validators": ignore_validators, "states": states}
        return [await fetch(source, key, prototype, ranges[0], **options)]
    # these send the validator with each answer, but only through `fetch`
    one_by_one = type(source) in _OBSTORES or _Recording.twin_of(source) is not None
    if one_by_one or not hasattr(source, "get_ranges"):
        turn = asyncio.Semaphore(limits["max_concurrency"])

        async def one(byte_range: RangeByteRequest) -> FetchResult:
            async with turn:
                return await fetch(
                    source, key, prototype, byte_range, fixed=fixed, ignore_validators=ignore_validators, states=states
                )

        return await all_of(one(byte_range) for byte_range in ranges)

    async def read() -> list[Buffer | None]:
        values: list[Buffer | None] = [None] * len(ranges)
        failure: BaseException | None = None
        # the spans are merged already. If Zarr merged them again, it would cut answers whose exactness is unknown
        apart = limits | {"max_gap_bytes": 0, "max_coalesced_bytes": 0}
        try:
            async for group in source.get_ranges(key, ranges, prototype=prototype, **apart):
                for at, value in group:
                    values[at] = value
        except BaseExceptionGroup as failures:
            if (others := failures.split(FileNotFoundError)[1]) is not None:
                failure = _only(others)
            # some ranges may have been read before the object was deleted
            values = [None] * len(ranges)
        if failure is not None:
            # raised outside of the `except`: otherwise its context would be the group that contains it, a cycle that
            # cannot be pickled
            raise failure
        return values

    look = None if fixed else _look_at(source)
    known = set if isinstance(source, LocalStore) else states
    return _labelled(
        await _between_looks(look, key, ranges, known, read),
        ranges[0],
        fixed=fixed,
        ignore_validators=ignore_validators,
    )


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of several calls; if one fails, cancel the others and raise its exception."""
    calls = list(calls)
    # a task of its own would only cost time
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        # awaited after the cancel: a request must not go on after its reader has returned
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


async def _alone(value: Awaitable[Buffer | None]) -> list[Buffer | None]:
    return [await value]


async def _between_looks(
    look: Callable[[str], Awaitable[_Head]] | None,
    key: str,
    byte_ranges: Sequence[ByteRequest | None],
    states: Callable[[], set[str]],
    read: Callable[[], Awaitable[list[Buffer | None]]],
) -> list[FetchResult]:
    """Read between two metadata requests, to verify that the object did not change meanwhile."""
    head = _Head()
    if look is None:
        values = await read()
    else:
        seen = states()
        before = min(seen) if len(seen) == 1 else ""
        if not is_from_source(before):
            # the cached parts were verified before, and are valid only if the object is unchanged since
            before = (await look(key)).validator
        values = await read()
        if (after := await look(key)).validator == before:
            head = after
    return [_judged(value, byte_range, head) for value, byte_range in zip(values, byte_ranges, strict=True)]


def _labelled(
    answers: list[FetchResult], part: ByteRequest | None, *, fixed: bool, ignore_validators: bool
) -> list[FetchResult]:
    """Answers without unreliable validators; each part without a validator of the source gets a session's."""
    if part is None:
        return [
            answer._replace(validator="") if ignore_validators and not answer.unchanged else answer
            for answer in answers
        ]
    # a session of its own: bytes of unknown state may only be combined with bytes of the same request
    session = uuid.uuid4().hex
    return [
        answer
        if answer.unchanged
        or answer.value is None
        or (is_from_source(answer.validator) and not fixed and not ignore_validators)
        else answer._replace(validator=FIXED if fixed else session_validator(session, number))
        for number, answer in enumerate(answers)
    ]


def _judged(value: Buffer | None, byte_range: ByteRequest | None, head: _Head) -> FetchResult:
    """The answer with its metadata, checked for exactness."""
    if value is None or (byte_range is None and head is _UNKNOWN):
        return FetchResult(value)
    # the reported size of a compressed response is not that of its value
    size = head.size if head.is_plain and head.is_clear else None
    return FetchResult(value, head.validator, exact=_is_exact(len(value), byte_range, head), size=size)


def _is_exact(length: int, byte_range: ByteRequest | None, head: _Head) -> bool:
    wanted = span(byte_range)
    if not head.is_clear:
        return False
    if not head.is_plain or wanted is None:
        return byte_range is None
    start, stop = wanted
    if head.size is not None:
        first, last = clip(start, stop, head.size)
        return length == last - first and head.got in (None, (first, last))
    # without a size, a short answer may be cut off, or end where the object ends
    if isinstance(byte_range, OffsetByteRequest):
        return False
    if isinstance(byte_range, SuffixByteRequest):
        return length == byte_range.suffix
    return byte_range is None or (length == stop - start and head.got in (None, wanted))


# -- obstore


def _range_of(byte_range: ByteRequest | None) -> dict[str, Any] | None:
    """A byte range as obstore's option; None for a range that Zarr handles better."""
    if byte_range is None:
        return {}
    if isinstance(byte_range, RangeByteRequest):
        # an empty range is an error for obstore, and an empty value for Zarr
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
) -> FetchResult:
    import obstore

    if known.startswith("etag "):
        options["if_none_match"] = known.removeprefix("etag ")
    try:
        if known.startswith("time ") and await _time_of(source, key) == known:
            # compared here: a server that is asked for newer objects only does not report an older one
            return FetchResult(None, known, unchanged=True)
        got = await obstore.get_async(source.store, key, options=options or None)  # type: ignore[arg-type]
        # read before the bytes: older versions of obstore release metadata and range with them
        meta: dict[str, Any] = dict(got.meta)
        part = got.range
        if type(source) is WebStore and got.attributes.get("Content-Encoding"):
            # other HTTP clients decompress objects that are stored compressed
            value = await source.linked().get(key, prototype, byte_range)
            return _judged(value, byte_range, _Head(is_plain=False))
        data = await got.bytes_async()
    except obstore.exceptions.NotModifiedError:
        if not options.get("if_none_match"):
            # the request had no condition
            raise
        return FetchResult(None, known, unchanged=True)
    except obstore.exceptions.NotSupportedError:
        # Azure does not support suffixes, but Zarr has a workaround
        return _judged(await source.get(key, prototype, byte_range), byte_range, _Head())
    except _ABSENT:
        return FetchResult(None)
    head = _Head(_validator(source, meta), meta.get("size"), (int(part[0]), int(part[1])))
    return _judged(prototype.buffer.from_bytes(data), byte_range, head)  # type: ignore[arg-type]


async def _time_of(source: Any, key: str) -> str:
    import obstore

    try:
        return _validator(source, dict(await obstore.head_async(source.store, key)))
    except Exception:
        # not every server supports HEAD; errors show at the request for the object
        return ""


def _validator(source: Any, meta: dict[str, Any]) -> str:
    etag, modified = meta.get("e_tag") or "", meta.get("last_modified")
    if type(source.store).__name__ in _BY_CONTENT:
        return _of_content(etag)
    return _of_web(etag, modified if isinstance(modified, datetime) else None, meta.get("size"))


def _of_content(etag: str) -> str:
    return f"etag {etag}" if _ETAG.fullmatch(etag) else ""


def _of_web(etag: str, modified: datetime | None, size: int | None) -> str:
    # obstore replaces a missing time by the epoch
    if modified is not None and modified.timestamp() > 0:
        if (validator := _of_content(etag)) and not _is_of_the_time(etag, modified):
            # a server may use the same time for two writes within its resolution, so a young object has no validator
            return validator
        if datetime.now(UTC).timestamp() - modified.timestamp() <= _SETTLED_SECONDS:
            return ""
        return validator or f"time {modified} {size} {etag}"
    return _of_content(etag)


def _is_of_the_time(etag: str, modified: datetime) -> bool:
    """Whether an ETag is made of only a time, a size and perhaps an inode.

    nginx uses seconds, Apache and obstore's local store microseconds.
    """
    seconds = modified.timestamp()
    for part in etag.strip('"').split("-"):
        # a word that is no number, or one that is larger than any time
        with suppress(ValueError, OverflowError):
            number = int(part, 16)
            if any(abs(number - seconds * unit) <= unit for unit in (1, 10**3, 10**6, 10**9)):
                return True
    return False


# -- files


async def _of_file(path: str | os.PathLike[str]) -> _Head:
    with suppress(OSError):
        status = os.stat(path)
        # a younger file may be written again within the same tick of the clock
        if time.time() - status.st_mtime > _SETTLED_HERE_SECONDS:
            return _Head(f"file {status.st_ino} {status.st_size} {status.st_mtime_ns}", status.st_size)
    return _Head()


def _look_at(source: Store) -> Callable[[str], Awaitable[_Head]] | None:
    """The function that requests the metadata of an object; None if the source has none."""
    if isinstance(source, LocalStore):
        root = source.root
        return lambda key: _of_file(root / key)
    if type(source) is not FsspecStore:
        return None
    fs: Any = source.fs
    inner = getattr(fs, "sync_fs", fs)
    if any(kind.__name__ in _APART for kind in type(inner).__mro__) or _is_fsspecs_web(fs):
        return None
    return partial(_of_fsspec, source, inner)


# -- fsspec

_APART: Final = ("CachingFileSystem", "AbstractArchiveFileSystem", "ReferenceFileSystem", "DirFileSystem")
"""File systems whose metadata may belong to other data than they read."""
_BUCKETS: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"})
_TIMED: Final = frozenset({"memory", "sftp", "ssh", "smb", "hdfs", "arrow_hdfs", "webhdfs"})
"""Protocols whose times of modification are those of the files."""


async def _of_fsspec(source: FsspecStore, inner: Any, key: str) -> _Head:
    root = source.path.rstrip("/")
    path = f"{root}/{key}" if root else key
    names = {inner.protocol} if isinstance(inner.protocol, str) else set(inner.protocol)
    if type(inner).__name__ == "LocalFileSystem":
        return await _of_file(inner._strip_protocol(path))
    # after any error the state is unknown
    with suppress(Exception):
        if getattr(inner, "dircache", None):
            # drop the listing cache, which may be outdated
            inner.invalidate_cache(inner._parent(path))
        return _of_info(await source.fs._info(path), names)
    return _Head()


def _of_info(info: Mapping[str, Any], protocols: set[str]) -> _Head:
    etag = str(info.get("ETag") or info.get("etag") or "")
    size = said if isinstance(said := info.get("size"), int) else None
    validator = ""
    if protocols & {"http", "https"}:
        validator = _of_web(etag, _date(info.get("Last-Modified")), size)
    elif etag:
        # a weak ETag may be the same for objects with different bytes
        validator = "" if etag.startswith("W/") else f"etag {etag}"
    elif protocols & _TIMED:
        modified = next((info[name] for name in ("mtime", "modified", "created") if info.get(name)), None)
        at = modified.timestamp() if isinstance(modified, datetime) else modified
        if isinstance(at, int | float) and time.time() - at > _SETTLED_SECONDS:
            validator = f"time {at} {size}"
    return _Head(validator, size if validator else None)


def _date(text: str | None) -> datetime | None:
    with suppress(TypeError, ValueError):
        return parsedate_to_datetime(text or "").astimezone(UTC)
    return None


def _is_fsspecs_web(fs: Any) -> bool:
    return type(fs).__name__ == "HTTPFileSystem" and type(fs).__module__ == "fsspec.implementations.http"


def _is_s3fs(fs: Any) -> bool:
    return type(fs).__name__ == "S3FileSystem" and type(fs).__module__.startswith("s3fs")


class _Recording:
    """An fsspec file system for one read that records the metadata of the responses.

    fsspec returns bytes alone. This lets s3fs and fsspec's HTTP client read as usual, and records the headers.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self.heads: list[_Head] = []

    @classmethod
    def twin_of(cls, source: Store) -> FsspecStore | None:
        """A store that reads the same bytes through such a file system; None for other kinds of stores."""
        if type(source) is not FsspecStore or not (_is_fsspecs_web(source.fs) or _is_s3fs(source.fs)):
            return None
        # a shallow copy, because the caller's store must not get the recording file system
        twin = object.__new__(FsspecStore)
        twin.__dict__.update(source.__dict__)
        twin.fs = cls(source.fs)
        return twin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    async def _cat_file(self, *args: Any, **options: Any) -> Any:
        return await type(self._fs)._cat_file(self, *args, **options)

    async def _cat_file_concurrent(self, *args: Any, **options: Any) -> Any:
        return await type(self._fs)._cat_file_concurrent(self, *args, **options)

    async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        answer = await self._fs._call_s3(method, *args, **options)
        if method == "get_object":
            self.heads.append(_head(_of_content(answer.get("ETag") or ""), answer.get("ContentRange"), None))
        return answer

    async def set_session(self) -> Any:
        return _Session(await self._fs.set_session(), self.heads)


class _Session:
    """An aiohttp session that records the headers of its responses."""

    def __init__(self, session: Any, heads: list[_Head]) -> None:
        self._session = session
        self._heads = heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @asynccontextmanager
    async def get(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        async with self._session.get(*args, **options) as answer:
            said = answer.headers
            length = said.get("Content-Length") if answer.status == 200 else None
            # a body that ends with the connection may have been cut off; 204 and 304 are no answers to a plain GET
            ends = "Content-Length" in said or "chunked" in said.get("Transfer-Encoding", "").lower()
            is_clear = ends and (answer.status == 200 or (answer.status == 206 and "Content-Range" in said))
            head = _head("", said.get("Content-Range") if answer.status == 206 else None, length)
            validator = _of_web(said.get("ETag", ""), _date(said.get("Last-Modified")), head.size)
            plain = said.get("Content-Encoding", "identity") == "identity"
            self._heads.append(head._replace(validator=validator, is_plain=plain, is_clear=is_clear))
            yield answer


def _head(validator: str, content_range: str | None, length: str | None) -> _Head:
    if content_range is None:
        return _Head(validator, int(length) if length and length.isdecimal() else None)
    if (match := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip())) is None:
        # an unreadable range: its bytes belong to no known place of the object
        return _Head(validator, got=(0, 0))
    first, last, size = match.groups()
    return _Head(validator, None if size == "*" else int(size), (int(first), int(last) + 1))


async def _fetch_recorded(
    twin: FsspecStore, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None
) -> tuple[FetchResult, bool]:
    """Read through a `_Recording` twin of a store; also returns whether the source reported which bytes it sent."""
    value = await twin.get(key, prototype, byte_range)
    heads: list[_Head] = twin.fs.heads
    if not heads or value is None:
        return _judged(value, byte_range, _Head()), True
    head = heads[-1]
    if len({head.validator for head in heads}) > 1:
        # read in several parts, which are of different states
        return FetchResult(value, exact=False), True
    if not all(head.is_clear for head in heads):
        return FetchResult(value, exact=False), False
    if byte_range is None and len(heads) > 1:
        head = _Head(head.validator, head.size)
    elif head.got is None and head.is_plain:
        # an answer without a range is the whole object
        head = head._replace(got=(0, len(value)), size=len(value) if head.size is None else head.size)
    return _judged(value, byte_range, head), True
