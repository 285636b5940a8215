"""Asking the source: for what it has, or only whether that is still what we have.

What tells two states of an object apart is its *validator*: an ETag, a time of modification, as RFC 9110 has it. It
comes with the bytes where the source says it unasked, and for one more request where we have to ask and were told to.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import zarr.storage
from zarr.storage import FsspecStore, LocalStore

from xzcache._sources import WebStore

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

_ABSENT: Final = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_BY_CONTENT: Final = ("S3Store", "GCSStore", "AzureStore")
"""Stores whose ETags are of the content, or of the version."""
_ETAG: Final = re.compile(r'"[^"]+"|[0-9A-Fa-fx-]{8,}')
"""A strong one: a weak one promises the same meaning, not the same bytes."""
_SETTLED_SECONDS: Final = 60.0
"""A time of modification tells states apart only once it is as old as this: clocks differ, and tick in seconds."""


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
    if byte_range is None and kind in (zarr.storage.ObjectStore, WebStore):
        return await _of_obstore(source, key, prototype, known)
    if byte_range is None and (known or certain):
        look = _LOOKS.get(kind)
        if look is not None:
            return await _looked_at(source, key, prototype, known, look)
    return Answer(await source.get(key, prototype, byte_range))


async def _of_obstore(source: Any, key: str, prototype: BufferPrototype, known: str) -> Answer:
    import obstore

    options: dict[str, Any] = {}
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
            return Answer(await source.linked().get(key, prototype))
        data = await got.bytes_async()
    except obstore.exceptions.NotModifiedError:
        return Answer(None, known, unchanged=True)
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
    source: Any, key: str, prototype: BufferPrototype, known: str, look: Callable[[Any, str], Awaitable[str]]
) -> Answer:
    # looked at first: if the object changes before it is read, the next look sees another state
    before = await look(source, key)
    if before and before == known:
        return Answer(None, known, unchanged=True)
    value = await source.get(key, prototype, None)
    return Answer(value, before if value is not None else "")


async def _of_file(source: LocalStore, key: str) -> str:
    with suppress(OSError):
        status = os.stat(source.root / key)
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
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


_LOOKS: Final[dict[type, Callable[[Any, str], Awaitable[str]]]] = {LocalStore: _of_file, FsspecStore: _of_fsspec}
