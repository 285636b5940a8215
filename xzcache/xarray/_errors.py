"""Errors of opening a dataset, in one line that says what is wrong and what to do.

The full error of the source is the `__cause__`. An error that is clear already is not changed. Only errors of opening a
dataset are explained: a read of a store raises the exception of its source.
"""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.core.sync import sync
from zarr.errors import ContainsArrayError
from zarr.storage import FsspecStore

from xzcache._config import nearest
from xzcache.sources import OPTIONS, folder_of, format_by_name, is_url, shown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from zarr.abc.store import Store

    from xzcache.store import CacheStore


class _Kind(NamedTuple):
    """A kind of trouble with a source."""

    words: re.Pattern[str]
    """What the names and texts of such errors contain."""
    error: type[Exception]
    says: str
    """What is wrong and what to do; `{code}` is the code of an answer of S3, in brackets."""


def _kind(words: str, error: type[Exception], says: str) -> _Kind:
    return _Kind(re.compile(words, re.IGNORECASE), error, says)


# the first that fits; certificates before connections, of which they are a part
_KINDS: Final = (
    _kind(
        r"certificate",
        ConnectionError,
        "the certificate of the server is refused: give a bundle of authorities, for example as AWS_CA_BUNDLE or "
        "SSL_CERT_FILE, or check the address",
    ),
    _kind(
        r"wrong.version.number|InvalidContentType|InvalidMessage|corrupt message|record overflow",
        ConnectionError,
        "the server does not speak https: give its address with http://",
    ),
    _kind(
        r"nocredentials|unable to locate credentials|UnauthenticatedError|DefaultCredentialsError|NoAuthInformation",
        PermissionError,
        'no credentials were found: give storage_options={{"anon": True}} for public data, else key and secret, or set '
        "up the tools of the cloud",
    ),
    _kind(
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken|AuthenticationFailed|InvalidSecurity",
        PermissionError,
        "the server refuses the credentials{code}: check key, secret and token in storage_options or the environment",
    ),
    _kind(
        r"PermissionDenied|PermissionError|AccessDenied|Unauthorized|Forbidden",
        PermissionError,
        "the server denies access{code}: these credentials, or none, may not read it",
    ),
    _kind(
        r"gaierror|dns error|failed to lookup|name or service not known|nodename nor servname|DNSError",
        ConnectionError,
        "the name of the server is not known: check the address, endpoint_url and the network",
    ),
    _kind(
        r"connection refused|connect call failed|EndpointConnectionError|ConnectorError|ConnectionError|kind: Connect",
        ConnectionError,
        "the server cannot be reached (no connection): check that it runs, the address and endpoint_url",
    ),
    _kind(
        r"timed out|TimeoutError|kind: Timeout",
        TimeoutError,
        "the server did not answer in time: check the address and the network",
    ),
    _kind(
        r"NoSuchBucket|bucket does not exist|ContainerNotFound|NoSuchContainer",
        FileNotFoundError,
        "the bucket does not exist on this server: check its name and endpoint_url",
    ),
)
_CODE: Final = re.compile(
    r"<Code>(\w+)</Code>|\b(InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|ExpiredToken)\b"
)
_OPTION: Final = re.compile(r"got an unexpected keyword argument '(\w+)'")
_OF_ARGUMENTS: Final = ("builtins", "zarr", "xarray", "xzcache")
"""Packages whose errors are about arguments or contents, and not about a server."""
_AT_MOST: Final = 5
_PATIENCE: Final = 5.0
"""Seconds to list the contents of a source after nothing was found at its root."""


def explained(error: Exception, store: CacheStore, given: object, group: object = None) -> Exception | None:
    """A clearer error to raise from the given one; None if the given one is clear enough.

    For errors of xarray and Zarr, it has the same type, or the built-in type that theirs derives from.

    Parameters
    ----------
    error : Exception
        What opening a dataset raised.
    store : CacheStore
        The store that was opened.
    given : object
        The source as the user gave it.
    group : str, optional
        The group that was asked for.
    """
    name, source = _named(store, given), store._store
    if isinstance(error, ContainsArrayError):
        return ValueError(f"{name} is a Zarr array and no group: zarr.open_array(xzcache.CacheStore(...)) opens it")
    if isinstance(error, FileNotFoundError) and type(error) is not FileNotFoundError:
        return _not_found(name, source)
    if isinstance(error, KeyError) and isinstance(group, str) and group.strip("/").split("/")[-1] in str(error):
        return KeyError(f"{name} has no group {group!r}: it has {_within(source) or 'no groups'}")
    if isinstance(error, ValueError) and str(error).startswith((".zmetadata", "Consolidated metadata requested")):
        return ValueError(f"{name} has no consolidated metadata: leave consolidated=True out")
    if isinstance(error, AttributeError) and isinstance(group, str) and "'Array' object" in str(error):
        return ValueError(f"{group!r} in {name} is an array and no group: open the group that has it")
    if isinstance(error, TypeError) and (option := _OPTION.search(str(error))) and is_url(given):
        if option[1] in OPTIONS or not (hint := nearest(option[1], OPTIONS)):
            return None
        return TypeError(f"storage_options has the option {option[1]!r}, which no client knows{hint}")
    if isinstance(error, ValueError) and any(type(each).__name__ == "JSONDecodeError" for each in _chain(error)):
        return ValueError(f"{name} has metadata that are not JSON: is this the address of a web page or a login?")
    is_of_source = isinstance(error, OSError) or type(error).__module__.split(".")[0] not in _OF_ARGUMENTS
    return _of_server(error, name) if is_of_source else None


def hint_of_groups(store: CacheStore, given: object) -> str | None:
    """What to say of a root group without any variable, if there are groups within."""
    found = _within(store._store)
    return f"{_named(store, given)} has no arrays at its root: give group=, it has {found}" if found else None


def _named(store: CacheStore, given: object) -> str:
    """The source for people."""
    if is_url(given):
        return shown(str(given))
    if isinstance(given, str | os.PathLike):
        return os.path.abspath(os.path.expanduser(os.fspath(given)))
    return store.source.label


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    last: BaseException | None = error
    while last is not None and last not in seen:
        seen.append(last)
        yield last
        last = last.__cause__ or last.__context__


def _of_server(error: Exception, name: str) -> Exception | None:
    # compared by the names of classes, because the libraries of clouds may not be installed
    text = "\n".join(f"{kind.__name__} {each}" for each in _chain(error) for kind in type(each).__mro__[:3])
    if "://" not in name:
        # a path, whose own error names it
        return None
    for kind in _KINDS:
        if kind.words.search(text):
            code = _CODE.search(text)
            return kind.error(f"{name}: {kind.says.format(code=f' ({code[1] or code[2]})' if code else '')}")
    if "\n" in str(error):
        code = _CODE.search(text)
        return OSError(f"{name}: the server fails to answer{f' ({code[1] or code[2]})' if code else ''}")
    return None


def _not_found(name: str, source: Store) -> Exception | None:
    if said := format_by_name(name):
        return FileNotFoundError(f"{name}: {said}")
    try:
        if _has_root(source):
            return FileNotFoundError(f"{name} has a group at its root, but of another format: leave zarr_format out")
        found = _within(source, raises=True)
    except Exception as error:
        # the source cannot be listed, so an empty result proves nothing
        better = _of_server(error, name)
        return better if isinstance(better, FileNotFoundError) else None
    if found:
        return FileNotFoundError(f"{name} has no Zarr group at its root: it has {found}; give its path, or group=")
    if beside := neighbours(source):
        return FileNotFoundError(f"there is no Zarr group at {name}{beside}")
    return None


def neighbours(source: Store) -> str:
    """What lies beside a source that does not exist, for the end of a message; empty if that is unknown."""

    async def names(folder: Store) -> list[str]:
        return [name.strip("/") async for name in folder.list_dir("")]

    try:
        if (place := folder_of(source)) is None:
            return ""
        listed = sync(asyncio.wait_for(names(place[0]), _PATIENCE), timeout=2 * _PATIENCE)
    except Exception:
        # a hint must not replace the error
        return ""
    found = sorted(name for name in listed if name not in ("", place[1]) and name.isprintable())
    more = ", ..." if len(found) > _AT_MOST else ""
    beside = f"; its folder has {', '.join(map(repr, found[:_AT_MOST]))}{more}" if found else ""
    return nearest(place[1], found) or beside


def _within(source: Store, *, raises: bool = False) -> str:
    """The groups and arrays beneath the root of a source, for people; empty if there are none."""
    try:
        found: list[str] = sync(asyncio.wait_for(_first_of(source), _PATIENCE), timeout=2 * _PATIENCE)
    except Exception:
        if raises:
            raise
        return ""
    return ", ".join(map(repr, found[:_AT_MOST])) + (", ..." if len(found) > _AT_MOST else "")


def _has_root(source: Store) -> bool:
    """Whether there is a group at the root, of either format."""

    async def found() -> bool:
        return await source.exists("zarr.json") or await source.exists(".zgroup")

    return bool(sync(asyncio.wait_for(found(), _PATIENCE), timeout=2 * _PATIENCE))


async def _first_of(source: Store) -> list[str]:
    if isinstance(source, FsspecStore) and "s3" in source.fs.protocol:
        # s3fs lists a bucket that does not exist as an empty one
        bucket = source.path.strip("/").split("/")[0]
        if not await source.fs._exists(bucket):
            raise FileNotFoundError(f"NoSuchBucket: {bucket}")
    return [path async for path in _nodes(source, "", depth=2)][: _AT_MOST + 1]


async def _nodes(source: Store, path: str, depth: int) -> AsyncIterator[str]:
    names = []
    async for name in source.list_dir(path):
        if not name.startswith((".", "zarr.json")) and name != "c":
            names.append(name.strip("/"))
        # a large store must not be listed for one line of an error
        if len(names) > 4 * _AT_MOST:
            break
    for name in names:
        below = f"{path}/{name}".lstrip("/")
        documents = {each.strip("/") async for each in source.list_dir(below)} & {"zarr.json", ".zgroup"}
        if documents and await _is_group(source, below, documents):
            yield below
        elif not documents and depth > 1:
            async for each in _nodes(source, below, depth - 1):
                yield each


async def _is_group(source: Store, path: str, documents: set[str]) -> bool:
    from zarr.core.buffer import default_buffer_prototype

    if "zarr.json" not in documents:
        return True
    with suppress(Exception):
        document: Any = await source.get(f"{path}/zarr.json", default_buffer_prototype())
        return b'"group"' in document.to_bytes()
    return False
