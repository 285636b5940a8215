"""Identities: a unique name for each source.

An *identity* is the origin of the bytes: protocol, endpoint, account, bucket, path. It holds no credential and no
setting that does not change the bytes. So it is the same in every process, after every restart, and with every library.
"""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Final, Generic, NamedTuple, TypeVar

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from xzcache._fork import renew_after_fork
from xzcache.sources import _locations as locations
from xzcache.sources._credentials import PROVIDERS, AwsCredentials
from xzcache.sources._locations import (
    Unidentifiable,
    filesystem_token,
    is_filesystem,
    is_object_store,
    label_of,
    parts_of,
    protocol_of,
    stable_token,
)
from xzcache.sources._open import WebStore
from xzcache.sources._urls import shown, without_user

# -- A map of identities that keeps no store alive.

T = TypeVar("T")


class IdentityMap(Generic[T]):
    """The identities of stores, by object: a store keeps its first identity for its lifetime.

    Attributes of a store may change while it is used. Two stores over the same dictionary are one source while either
    of them lives.
    """

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)
        self._known: dict[int, tuple[weakref.ref[Any], T]] = {}
        self._shared: dict[int, tuple[set[int], str]] = {}

    def after_fork_in_child(self) -> None:
        """Start with a new lock, because a thread of the parent may hold the old one."""
        self._lock = threading.RLock()

    def of(self, store: Store, identify: Callable[[Store], T]) -> T:
        number = id(store)
        with self._lock:
            known = self._known.get(number)
            # an id may have been reused since, so the reference is compared as well
            if known is not None and known[0]() is store:
                return known[1]
            identity = identify(store)
            self._known[number] = (weakref.ref(store, lambda _: self._known.pop(number, None)), identity)
            return identity

    def lifetime(self, store: Store, contents: object) -> str:
        """A token for the contents of a store, valid while a known store holds them."""
        number, holder = id(contents), id(store)
        with self._lock:
            holders, token = self._shared.setdefault(number, (set(), uuid.uuid4().hex))
            if holder not in holders:
                holders.add(holder)
                weakref.finalize(store, self._let_go, number, holder)
            return token

    def _let_go(self, number: int, holder: int) -> None:
        # the id may be reused only after the last store has released these contents
        with self._lock:
            holders, _ = self._shared.get(number, (set(), ""))
            holders.discard(holder)
            if not holders:
                self._shared.pop(number, None)


# -- The references of a VirtualiZarr store, whose chunks are parts of other files.


def manifest_parts(store: Any, known: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    """The references of a `ManifestStore`, and the stores that they lead to.

    `known` returns the token of an object store. Raises `AttributeError` or `TypeError` for an unknown layout of the
    store.
    """
    yield "virtual"
    yield from _group(store._group)
    for (scheme, host), entry in sorted(store._registry.map.items(), key=lambda item: str(item[0])):
        yield f"{scheme}://{without_user(host)}"
        for each in entry.iter_stores():
            yield from known(each)


def _group(group: Any) -> Iterator[str]:
    yield json.dumps(group.metadata.to_dict(), sort_keys=True, default=str)
    for name, member in sorted(group.items()):
        yield name
        if (manifest := getattr(member, "manifest", None)) is None:
            yield from _group(member)
            continue
        yield json.dumps(member.metadata.to_dict(), sort_keys=True, default=str)
        references = blake2b(digest_size=16)
        for path in manifest._paths.flat:
            references.update(f"{path}\0".encode())
        references.update(manifest._offsets.tobytes() + manifest._lengths.tobytes())
        for where, data in sorted(manifest._inlined.items()):
            references.update(repr(where).encode() + bytes(data))
        yield references.hexdigest()


# -- Identities of sources.

_TRANSPARENT: Final = ("zarr.storage", "zarr.testing")


class Identity(NamedTuple):
    """The identity of a source."""

    label: str
    """Readable, without credentials."""
    digest: str
    """A digest that distinguishes the source; never shown, because it may depend on a credential."""
    lasting: bool
    """Whether another process, or a later one, would find the same bytes under it."""
    immutable: bool = False
    """Whether the source can never change, so that it needs no revalidation."""
    fickle: bool = False
    """Whether the source can undo changes without a trace, so that nothing of it may be cached."""

    @property
    def namespace(self) -> str:
        """A directory name that a person recognizes and no other source has."""
        return f"{slug_of(self.label)}-{self.digest}"

    @property
    def url(self) -> str | None:
        """The URL or path of a source that has one, without credentials."""
        return self.label if self.lasting and re.match(r"/|[\w+.-]+(://|::)", self.label) else None


def slug_of(label: str) -> str:
    """The readable part of a namespace."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[-80:].strip("-") or "source"


def identity(
    label: str, parts: Iterable[str], *, lasting: bool, immutable: bool = False, fickle: bool = False
) -> Identity:
    """An identity from a readable label and the parts that distinguish the source."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return Identity(label, blake2b(text, digest_size=10).hexdigest(), lasting, immutable, fickle)


_identities: Final = IdentityMap[Identity]()


def identify(store: Store) -> Identity:
    """The identity of a source; an object keeps its identity for its lifetime."""
    return _identities.of(store, _identify)


def remember(store: Store, known: Identity) -> None:
    """Give a copy of a store the identity of the original."""
    _identities.of(store, lambda _: known)


def is_same_source(one: Store, other: Store) -> bool:
    """Whether two stores read the same bytes in the same way, with or without write access.

    Stores in memory are compared by their dictionary; Zarr compares the contents.
    """
    if one is other:
        return True
    known = identify(one)
    if type(one) is not type(other) or known != identify(other):
        return False
    if not known.lasting:
        return True
    if one.read_only != other.read_only:
        # some stores differ only in `read_only`, which `CacheStore` sets by itself
        with suppress(NotImplementedError, TypeError, ValueError):
            one = one.with_read_only(other.read_only)
    return bool(one == other)


def must_identify_again(store: Store) -> bool:
    """Whether a copy of a store in another process should be identified again there.

    In another environment it may read other data, or identifying it is cheap.
    """
    if type(store) is LocalStore:
        return True
    kind = type(getattr(store, "store", None)).__name__
    if kind in ("S3Store", "GCSStore", "AzureStore"):
        return True
    return type(store) is FsspecStore and is_object_store(store.fs)


def _identify(store: Store) -> Identity:
    inner = getattr(store, "source", None)
    if isinstance(inner, Identity):
        # the cache of the inner store may be older than the source
        return identity(inner.label, ("through a cache", inner.digest), lasting=inner.lasting, fickle=inner.fickle)
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
    if type(store).__name__ == "ManifestStore" and type(store).__module__.startswith("virtualizarr"):
        return _of_manifests(store)
    if isinstance(store, WrapperStore | LocalStore | FsspecStore):
        return _of_variant(store)
    return _of_lifetime(store, store)


def _of_lifetime(store: Store, contents: object, *, fickle: bool = False) -> Identity:
    token = _identities.lifetime(store, contents)
    return identity(type(store).__name__, ("lifetime", token), lasting=False, fickle=fickle)


def _of_variant(store: WrapperStore[Any] | LocalStore | FsspecStore) -> Identity:
    """The identity of a user's wrapper or subclass, which may change the data: its attributes are included."""
    # both may differ between two stores of one source
    attributes = {name: value for name, value in vars(store).items() if name not in ("_is_open", "_read_only")}
    if isinstance(store, WrapperStore):
        inner = identify(store._store)
    else:
        inner = _of_fsspec(store) if isinstance(store, FsspecStore) else _of_local(store)
    try:
        parts = tuple(stable_token(attributes, _known))
    except Unidentifiable:
        return _of_lifetime(store, store, fickle=inner.fickle)
    kind = f"{type(store).__module__}.{type(store).__qualname__}"
    return identity(inner.label, ("variant", kind, *parts, inner.digest), lasting=inner.lasting, fickle=inner.fickle)


def _known(value: Any) -> Iterator[str] | None:
    if isinstance(value, Store):
        return iter((identify(value).digest,))
    return filesystem_token(value) if is_filesystem(value) else None


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
    # its contents can change under the same name while it is written
    if not store.read_only:
        return _of_lifetime(store, store)
    # size and time are part of the identity, because this store has no validators
    return identity(path, ("zip", path, str(status.st_size), str(status.st_mtime_ns)), lasting=True)


def _of_fsspec(store: FsspecStore) -> Identity:
    protocol, path = protocol_of(store.fs), str(store.path)
    if protocol in ("file", "local"):
        path = os.path.realpath(path)
        return identity(path, ("file", path), lasting=True)
    if protocol == "memory":
        # the pid, because each process has a file system of its own in memory
        return identity(f"memory {path}", ("memory", str(os.getpid()), path), lasting=False)
    try:
        return identity(label_of(store.fs, path), parts_of(store.fs, path), lasting=True)
    except Unidentifiable:
        return _of_lifetime(store, store)


def _of_web(store: WebStore) -> Identity:
    location = locations.of_web(store.url)
    return identity(location.label, location, lasting=True)


def _of_obstore(store: Any) -> Identity:
    inner = store.store
    if type(inner).__name__ == "MemoryStore":
        return _of_lifetime(store, inner)
    try:
        label, parts = _remote(inner)
    except Unidentifiable:
        return _of_lifetime(store, store)
    return identity(label, parts, lasting=True)


def _remote(store: Any) -> tuple[str, tuple[str, ...]]:
    """Label and parts of one of obstore's own stores."""
    kind, prefix = type(store).__name__, str(getattr(store, "prefix", None) or "")
    if kind == "LocalStore":
        path = os.path.realpath(prefix or "/")
        return path, ("file", path)
    if kind == "HTTPStore":
        location = locations.of_web(str(store.url))
        return location.label, location
    config = dict(getattr(store, "config", None) or {})
    bucket = str(config.pop("bucket", None) or config.pop("container_name", None) or "")
    describe = {"S3Store": locations.of_s3, "GCSStore": locations.of_google, "AzureStore": locations.of_azure}.get(kind)
    if describe is None:
        label = shown(f"{kind}://{bucket}/{prefix}")
        return label, (kind, bucket, prefix, *stable_token(config, _known))
    provider = getattr(store, "credential_provider", None)
    if isinstance(provider, AwsCredentials):
        config["profile"] = provider.profile
    location = describe(f"{bucket}/{prefix}", config, boto=False)
    if location.server and provider is not None and not isinstance(provider, PROVIDERS):
        return location.label, (*location, *stable_token(provider, _known))
    return location.label, location


def _of_icechunk(store: Any) -> Identity:
    session = store.session
    if not session.read_only:
        # uncommitted changes have no name, and can be discarded, rebased or merged outside of the store
        return _of_lifetime(store, store, fickle=True)
    snapshot = str(session.snapshot_id)
    # snapshot ids are random, but for the first, empty one of every repository
    return identity(f"icechunk {snapshot}", ("icechunk", snapshot), lasting=True, immutable=True)


def _of_manifests(store: Any) -> Identity:
    try:
        parts = tuple(manifest_parts(store, lambda inner: iter(_remote(inner)[1])))
    except (AttributeError, TypeError, Unidentifiable):
        # another version of that package lays it out in another way
        return _of_lifetime(store, store)
    return identity("virtual dataset", parts, lasting=True)


_KINDS: Final[Mapping[type, Callable[[Any], Identity]]] = {
    LocalStore: _of_local,
    MemoryStore: _of_memory,
    ZipStore: _of_zip,
    FsspecStore: _of_fsspec,
    WebStore: _of_web,
}
