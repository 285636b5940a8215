"""What tells a path on an fsspec file system from all others."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

from xzcache import _locations as locations
from xzcache._described import described
from xzcache._locations import Location
from xzcache._urls import shown, without_user

_NOT_LOCATING: Final = (
    *("asynchronous", "loop", "max_concurrency", "anon", "skip_instance_cache", "use_listings_cache"),
    *("listings_expiry_time", "max_paths", "default_block_size", "default_cache_type", "default_fill_cache"),
)
_OBJECT_STORES: Final[Mapping[str, Callable[[str, dict[str, Any]], Location]]] = {
    **dict.fromkeys(("s3", "s3a"), locations.of_s3),
    **dict.fromkeys(("gs", "gcs"), locations.of_google),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), locations.of_azure),
    **dict.fromkeys(("http", "https"), lambda path, _: locations.of_web(path)),
}


def is_filesystem(value: object) -> bool:
    """Whether an object is an fsspec file system, by its looks."""
    return hasattr(value, "storage_options") and hasattr(value, "protocol")


def protocol_of(fs: Any) -> str:
    fs = _inmost(fs)
    return str(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def is_object_store(fs: Any) -> bool:
    """Whether a file system is a client of an object store, and not of a web server."""
    return _is_known(fs) and protocol_of(fs) in _OBJECT_STORES.keys() - {"http", "https"}


def label_of(fs: Any, path: str) -> str:
    """A URL without credentials, for people."""
    if (location := _location(fs, path)) is not None:
        return location.label
    return shown(f"{protocol_of(fs)}::{path}" if "://" in path else f"{protocol_of(fs)}://{path}")


def parts_of(fs: Any, path: str) -> Iterator[str]:
    """What tells a path on a file system from all others, as text.

    Raises
    ------
    Indescribable
        It was given an object that could be anything.
    """
    if (location := _location(fs, path)) is not None:
        yield from location
        if _options(_inmost(fs)).get("version_aware"):
            yield "version_aware"
        return
    yield without_user(path)
    yield from described_filesystem(fs)


def described_filesystem(fs: Any) -> Iterator[str]:
    """What tells a file system from others of its kind, and those that lie behind it."""
    fs = _inmost(fs)
    if (location := _location(fs, "")) is not None:
        yield from location
        return
    yield f"{type(fs).__module__}.{type(fs).__qualname__}"
    options = _options(fs)
    yield from _references(fs, options.pop("fo", None))
    shown = {name: value for name, value in options.items() if name not in _NOT_LOCATING}
    yield from described(shown, lambda value: described_filesystem(value) if is_filesystem(value) else None)
    behind = getattr(fs, "fss", None)
    inner = [*(behind.values() if isinstance(behind, Mapping) else ()), getattr(fs, "fs", None)]
    inner.append(getattr(getattr(fs, "fo", None), "fs", None))
    for other in inner:
        # credentials among the options were left out; whose objects those read was not
        if other is not fs and is_filesystem(other):
            yield from described_filesystem(other)


def _references(fs: Any, given: object) -> Iterator[str]:
    """References are data: another set of them is another source, under whatever name it is found."""
    table = getattr(fs, "references", given)
    if not isinstance(table, dict):
        table = given
    if isinstance(table, Mapping):
        # as it is given: any of their keys may look like a credential's name
        yield blake2b(repr(sorted(table.items())).encode(), digest_size=16).hexdigest()
    elif isinstance(given, str):
        path = given.removeprefix("file://")
        yield repr(without_user(os.path.realpath(path) if os.path.exists(path) else given))
        yield from _state(path)
    elif given is not None:
        yield from described(given, lambda _: None)


def _state(path: str) -> Iterator[str]:
    for name in (path, os.path.join(path, ".zmetadata")):
        if os.path.isfile(name):
            status = os.stat(name)
            yield f"{status.st_size} {status.st_mtime_ns}"


def _location(fs: Any, path: str) -> Location | None:
    fs = _inmost(fs)
    if not _is_known(fs):
        return None
    return _OBJECT_STORES[protocol_of(fs)](path, _options(fs)) if protocol_of(fs) in _OBJECT_STORES else None


def _is_known(fs: Any) -> bool:
    # a subclass of a user's may read something else
    return type(_inmost(fs)).__module__.startswith(("s3fs", "gcsfs", "adlfs", "fsspec.implementations.http"))


def _inmost(fs: Any) -> Any:
    """The file system that an asynchronous face was put on."""
    while hasattr(fs, "sync_fs"):
        fs = fs.sync_fs
    return fs


def _options(fs: Any) -> dict[str, Any]:
    names = list(inspect.signature(type(fs).__init__).parameters)[1:]
    given = dict(zip(names, getattr(fs, "storage_args", ()), strict=False))
    return {**given, **(getattr(fs, "storage_options", None) or {})}
