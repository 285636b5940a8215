"""A name for what is read that no other source has.

A source's *identity* is where its bytes come from: protocol, endpoint, account, bucket, path. It holds no credential
and no setting that leaves the bytes alone, so that it is the same in every process and after every restart.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from xzcache._remembered import Remembered

_SECRET: Final = re.compile(r"key|secret|token|passw|credential|sas|auth|signature|session|cert|cookie|header", re.I)
_TRANSPARENT: Final = ("zarr.storage", "zarr.testing")
_NOT_LOCATING: Final = ("asynchronous", "loop", "max_concurrency", "anon", "skip_instance_cache", "use_listings_cache")


class Identity(NamedTuple):
    """What makes a source this source."""

    label: str
    """Readable, without credentials."""
    digest: str
    """What tells it from all others, told to nobody: there may be a credential in it after all."""
    lasting: bool
    """Whether another process, or a later one, would find the same bytes under it."""

    @property
    def namespace(self) -> str:
        """A directory name that a person recognizes and no other source has."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")[-80:].strip("-") or "source"
        return f"{slug}-{self.digest}"


def identity(label: str, parts: Iterable[str], *, lasting: bool) -> Identity:
    """An identity from a readable label and all that tells a source from others."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return Identity(label, blake2b(text, digest_size=10).hexdigest(), lasting)


_remembered: Final = Remembered[Identity]()


def identify(store: Store) -> Identity:
    """The identity of a source. The same object has the same one for its lifetime."""
    return _remembered.of(store, _identify)


def remember(store: Store, known: Identity) -> None:
    """Give a store the identity of the one that it is a copy of."""
    _remembered.of(store, lambda _: known)


def _identify(store: Store) -> Identity:
    inner = getattr(store, "source", None)
    if isinstance(inner, Identity):
        # what the inner one holds may be older than what the source has
        return identity(inner.label, ("through a cache", inner.digest), lasting=inner.lasting)
    if (describe := _KINDS.get(type(store))) is not None:
        return describe(store)
    if isinstance(store, MemoryStore) and type(store).__module__.startswith(_TRANSPARENT):
        return _of_memory(store)
    if type(store).__module__.startswith(_TRANSPARENT) and isinstance(store, WrapperStore):
        return identify(store._store)
    if type(store).__name__ == "ObjectStore" and hasattr(store, "store"):
        return _of_obstore(store)
    if type(store).__module__.partition(".")[0] == "icechunk" and hasattr(store, "session"):
        return _of_icechunk(store)
    if isinstance(store, WrapperStore | LocalStore | FsspecStore):
        return _of_variant(store)
    return _of_lifetime(store, store)


def _of_lifetime(store: Store, contents: object) -> Identity:
    token = _remembered.lifetime(store, contents)
    return identity(type(store).__name__, ("lifetime", token), lasting=False)


def _of_variant(store: WrapperStore[Any] | LocalStore | FsspecStore) -> Identity:
    """Of a user's own wrapper or subclass, which may change what passes through it: its attributes may say how."""
    attributes = {name: value for name, value in vars(store).items() if name not in ("_is_open", "_read_only")}
    try:
        described = tuple(described_value(attributes))
    except _Indescribable:
        return _of_lifetime(store, store)
    if isinstance(store, WrapperStore):
        inner = identify(store._store)
    else:
        inner = _of_fsspec(store) if isinstance(store, FsspecStore) else _of_local(store)
    kind = f"{type(store).__module__}.{type(store).__qualname__}"
    return identity(inner.label, ("variant", kind, *described, inner.digest), lasting=inner.lasting)


class _Indescribable(Exception):
    """Nobody can tell from the outside what an object does."""


_BOOKKEEPING: Final = ("_thread", "threading", "asyncio", "multiprocessing", "logging", "collections.Counter")


def described_value(value: Any) -> Iterator[str]:
    """A value as text that is the same in every process, without what might be a credential.

    Locks, events and loggers are nothing but their type: they change when bytes arrive, not which.

    Raises
    ------
    _Indescribable
        It holds an object that could be anything.
    """
    if isinstance(value, str):
        yield repr(_without_user(value))
    elif isinstance(value, bytes | int | float | bool | os.PathLike) or value is None:
        yield repr(value)
    elif isinstance(value, Mapping):
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            if not _SECRET.search(str(name)):
                yield f"{name}="
                yield from described_value(item)
    elif isinstance(value, list | tuple | set | frozenset):
        yield "["
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from described_value(item)
        yield "]"
    elif isinstance(value, Store):
        yield identify(value).digest
    elif hasattr(value, "storage_options") and hasattr(value, "protocol"):
        yield from _filesystem_parts(value)
    elif type(value).__module__.startswith(_BOOKKEEPING):
        yield type(value).__qualname__
    elif getattr(value, "__qualname__", "<").isidentifier() and getattr(value, "__closure__", None) is None:
        # a function or class that can be imported
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        raise _Indescribable


def _of_local(store: LocalStore) -> Identity:
    path = os.path.realpath(store.root)
    return identity(path, ("file", path), lasting=True)


def _of_memory(store: MemoryStore) -> Identity:
    return _of_lifetime(store, store._store_dict)


def _of_zip(store: ZipStore) -> Identity:
    path = os.path.realpath(str(store.path))
    try:
        status = os.stat(path)
    except OSError:
        return _of_lifetime(store, store)
    if not store.read_only:
        return _of_lifetime(store, store)
    return identity(path, ("zip", path, str(status.st_size), str(status.st_mtime_ns)), lasting=True)


def _of_fsspec(store: FsspecStore) -> Identity:
    protocol = _protocol(store.fs)
    if protocol in ("file", "local"):
        path = os.path.realpath(store.path)
        return identity(path, ("file", path), lasting=True)
    if protocol == "memory":
        return identity(f"memory {store.path}", ("memory", str(os.getpid()), store.path), lasting=False)
    try:
        where = tuple(_filesystem_parts(store.fs))
    except _Indescribable:
        return _of_lifetime(store, store)
    path = _without_user(str(store.path))
    return identity(f"{protocol} {_without_secrets(path)}", (path, *where), lasting=True)


def _protocol(fs: Any) -> str:
    while hasattr(fs, "sync_fs"):
        fs = fs.sync_fs
    return str(fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0])


def _filesystem_parts(fs: Any) -> Iterator[str]:
    """What tells an fsspec file system from others of its kind."""
    while hasattr(fs, "sync_fs"):
        fs = fs.sync_fs
    yield f"{type(fs).__module__}.{type(fs).__qualname__}"
    names = list(inspect.signature(type(fs).__init__).parameters)[1:]
    given = dict(zip(names, getattr(fs, "storage_args", ()), strict=False))
    options = {**given, **(getattr(fs, "storage_options", None) or {})}
    # references are data, and any of their keys may look like a credential's name
    references = options.pop("fo", None)
    if isinstance(references, Mapping):
        yield blake2b(repr(sorted(references.items())).encode(), digest_size=16).hexdigest()
    elif references is not None:
        yield from described_value(references)
    yield from described_value({name: value for name, value in options.items() if name not in _NOT_LOCATING})
    if _protocol(fs) in ("s3", "s3a") and "endpoint_url" not in str(options):
        yield from _endpoint_of_environment()


def _endpoint_of_environment() -> Iterator[str]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        yield f"{name}={_without_secrets(os.environ.get(name, ''))}"


def _of_obstore(store: Any) -> Identity:
    inner = store.store
    kind = type(inner).__name__
    if kind == "MemoryStore":
        return _of_lifetime(store, inner)
    config = dict(getattr(inner, "config", None) or {})
    prefix = str(getattr(inner, "prefix", None) or "")
    if kind == "LocalStore":
        path = os.path.realpath(prefix or "/")
        return identity(path, ("file", path), lasting=True)
    url = _without_user(str(getattr(inner, "url", "") or ""))
    bucket = str(config.get("bucket") or config.get("container_name") or _without_secrets(url))
    label = f"{kind.removesuffix('Store')} {bucket} {prefix}".strip()
    where = list(described_value(config))
    if kind == "S3Store" and not any("endpoint" in name for name in config):
        where += _endpoint_of_environment()
    return identity(label, (kind, url, prefix, *where), lasting=True)


def _of_icechunk(store: Any) -> Identity:
    session = store.session
    if not session.read_only:
        # what is not committed has no name
        return _of_lifetime(store, store)
    snapshot = str(session.snapshot_id)
    # snapshot ids are random, but for the first, empty one of every repository
    return identity(f"icechunk {snapshot}", ("icechunk", snapshot), lasting=True)


def _without_user(url: str) -> str:
    """A URL, or the path of one, without user and password."""
    scheme, separator, rest = url.rpartition("://") if "://" in url else ("", "", url)
    first, slash, path = rest.partition("/")
    return scheme + separator + first.rpartition("@")[2] + slash + path


def _without_secrets(url: str) -> str:
    """A URL, or the path of one, without user, password and query."""
    return _without_user(url).partition("?")[0]


_KINDS: Final[Mapping[type, Callable[[Any], Identity]]] = {
    LocalStore: _of_local,
    MemoryStore: _of_memory,
    ZipStore: _of_zip,
    FsspecStore: _of_fsspec,
}
