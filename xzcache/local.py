"""`LockedLocalStore`: a Zarr store in a directory that all processes of a machine share as one bounded cache."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore

from xzcache import _threads as pool
from xzcache import files
from xzcache._config import (
    UNSET,
    PolicyName,
    Unset,
    as_found,
    config,
    parse_bound,
    parse_flag,
    parse_min_free,
    parse_policy,
    parse_root,
    parse_threads,
    with_hints,
)
from xzcache._display import one_line
from xzcache.directory import Audit, audit, is_plain, open_directory
from xzcache.model import META, CacheFault, Entry, NoRoom, clip, is_cacheable, span

if TYPE_CHECKING:
    from zarr.core.common import AccessModeLiteral

    from xzcache.directory import CacheDirectory


class LockedLocalStore(LocalStore):
    """A `zarr.storage.LocalStore` whose entries, sizes, recency and locks are shared by every process that opens it.

    It is a complete Zarr store, made for data that can be fetched again: it never grows beyond its bound, and evicts
    entries for new ones. `CacheStore` keeps its entries in one.

    Parameters
    ----------
    root : str or Path
        The directory. It is created, for this user only, if it does not exist. It may hold other files, which are
        neither counted nor evicted. All state of xzcache is in its folder ``.xzcache``. If the directory belongs to
        another user or if others may write it, this user's folder in it (``xzcache-<uid>``) is the root.
    read_only : bool
        Whether this object refuses writes.
    max_size : int, str or None, optional
        The bound for all processes together, in bytes or as ``"20 GB"``; None for no bound. By default a directory
        keeps its bound, and a new one gets the configured bound (10 GiB). The latest request holds for every process; a
        smaller bound evicts at once, which is logged.
    min_free : float, int or str, optional
        The free space to leave on the file system: ``"5%"``, a fraction below 1, or a size. Configured: 5 %.
    policy : str, optional
        Which entries are evicted first: ``"adaptive"``, those least likely to be used soon; ``"lru"``, the least
        recently used; ``"none"``, no eviction. Default is the latest request in this process, or the configured policy
        (``"adaptive"``). Each process evicts by its own policy.

    Raises
    ------
    ValueError, TypeError
        The root is a file, or a parameter is invalid.

    Notes
    -----
    Safe for threads, event loops and processes, and after a fork. `set` returns when every process sees the new value.
    A file with other bytes than were stored counts as missing: its CRC-32C is checked the first time a process reads
    it. Pickling carries the root and the settings.
    """

    is_default = False
    """Whether this is the default cache of the machine, whose bound a `max_size` raises but never lowers."""

    @with_hints
    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        read_only: bool = False,
        max_size: int | str | Unset | None = UNSET,
        min_free: float | str | Unset = UNSET,
        policy: PolicyName | Unset = UNSET,
    ) -> None:
        place = parse_root(root)
        parse_flag("read_only", read_only)
        parse_threads("threads", config.get("threads"))
        self.max_size = max_size if isinstance(max_size, Unset) else parse_bound("max_size", max_size)
        self.min_free = min_free if isinstance(min_free, Unset) else parse_min_free("min_free", min_free)
        parse_policy("policy", config.get("policy") if isinstance(policy, Unset) else policy)
        self.policy = policy
        self._given_root = str(place)
        self._directory = open_directory(self._given_root, self.max_size, self.min_free, self.policy)
        is_there = os.path.realpath(place) == self._directory.root
        super().__init__(place if is_there else Path(self._directory.root), read_only=read_only)
        self._use = self._directory.used_by(self)

    @classmethod
    def of_default_cache(cls, root: str, max_size: int | Unset | None, policy: PolicyName | Unset) -> Self:
        """The default cache, for `CacheStore`, with a bound that was asked for there."""
        store = cls(root, policy=policy)
        store.is_default = True
        store.max_size = max_size
        if not isinstance(max_size, Unset):
            store._directory.set_bound(max_size, only_raise=True)
        return store

    @property
    def directory(self) -> CacheDirectory:
        """The shared directory, for `CacheStore`."""
        return self._directory

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same directory, with another `read_only`."""
        with as_found():
            return type(self)(self._given_root, **{**self._settings(), "read_only": read_only})

    def with_bound(self, max_size: int | Unset | None, policy: PolicyName | Unset) -> Self:
        """The same directory, for `CacheStore`, with a bound and a policy that were asked for there."""
        with as_found():
            if self.is_default:
                return self.of_default_cache(self._given_root, max_size, policy)
            return type(self)(self._given_root, max_size=max_size, policy=policy)

    @classmethod
    async def open(
        cls, root: Path | str, *, read_only: bool = False, mode: AccessModeLiteral | None = None, **settings: Any
    ) -> Self:
        """Create and open the store; keywords as for the class."""
        store = cls(root, read_only=read_only, **settings)
        await store._open()
        return store

    def _settings(self) -> dict[str, Any]:
        return {
            "read_only": self.read_only,
            "max_size": self.max_size,
            "min_free": self.min_free,
            "policy": self.policy,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_restore, type(self), **self._settings()), (self._given_root,)

    def __str__(self) -> str:
        return one_line(super().__str__())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        # the bound and the policy belong to the directory: the latest request sets them for all stores
        return (
            isinstance(other, type(self)) and self._directory is other._directory and self.read_only == other.read_only
        )

    __hash__ = None  # type: ignore[assignment]  # as all Zarr stores

    # -- reading

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """The value of a key, or a byte range of it; None where there is none."""
        prototype = prototype or default_buffer_prototype()
        wanted = span(byte_range)
        reader = self._directory.reader
        if wanted is None or not is_cacheable(key) or not self._may_read():
            return None
        found = reader.open_entry(Entry(key), anyones=True)
        if found is None:
            return None
        first, last = clip(*wanted, found.size)
        # a foreign file is part of the store, but not of the cache
        data = reader.read_foreign(found, first, last) if reader.is_foreign(found) else reader.read(found, first, last)
        # a read-only store must not create an index, as a flush would do
        if self._directory.recency.record_use(found.entry) and not self.read_only:
            pool.spawn(self._directory.flush)
        return None if data is None else prototype.buffer.from_bytes(data)

    def _may_read(self) -> bool:
        """Whether files are valid: after a loss of power, only once it was handled."""
        return self._directory.may_serve or (self._directory.prepare() and self._directory.may_serve)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """As `get_sync`."""
        return await pool.run(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """The values of several keys and byte ranges."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether a key has a value."""
        return await pool.run(self._size_of, key) is not None

    async def getsize(self, key: str) -> int:
        """The size of the value of a key, in bytes."""
        if (size := await pool.run(self._size_of, key)) is None:
            raise FileNotFoundError(key)
        return size

    def _size_of(self, key: str) -> int | None:
        reader = self._directory.reader
        found = reader.open_entry(Entry(key), anyones=True) if is_cacheable(key) and self._may_read() else None
        if found is None:
            return None
        # a file that looks like an entry but belongs to another user is not read either
        there = found.opened.is_ours or reader.is_foreign(found)
        reader.close(found)
        return found.size if there else None

    # -- writing

    def set_sync(self, key: str, value: Buffer) -> None:
        """Store a value.

        Raises
        ------
        OSError
            There is no room for it, or the directory cannot be written.
        """
        self._store(key, value, exclusive=False)

    def _store(self, key: str, value: Buffer, *, exclusive: bool) -> None:
        self._check_writable()
        if not isinstance(value, Buffer):
            raise TypeError(f"{type(self).__name__}.set(): `value` must be a Buffer, not a {type(value).__name__}")
        if not is_cacheable(key):
            raise ValueError(f"key={key!r} is not accepted: give text of at most 3000 bytes as UTF-8")
        self._use_again()
        self._directory.prepare()
        try:
            self._directory.publisher.store(Entry(key), memoryview(value.to_bytes()), exclusive=exclusive)
        except CacheFault as fault:
            raise OSError(errno.ENOSPC if isinstance(fault, NoRoom) else errno.EIO, str(fault), key) from fault

    async def set(self, key: str, value: Buffer) -> None:
        """As `set_sync`."""
        await pool.run(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Store a value unless the key has one, atomically for all processes."""
        await pool.run(self._store, key, value, exclusive=True)

    def delete_sync(self, key: str) -> None:
        """Remove a key and, if it is a directory, everything beneath it.

        Raises
        ------
        OSError
            It may still exist.
        """
        self._check_writable()
        if is_cacheable(key):
            self._directory.prepare()
            self._directory.writes.remove(key)
            self._delete_beneath(key)

    async def delete(self, key: str) -> None:
        """As `delete_sync`."""
        await pool.run(self.delete_sync, key)

    async def delete_dir(self, prefix: str) -> None:
        """Remove everything beneath a prefix.

        Raises
        ------
        OSError
            A key may still exist.
        """
        self._check_writable()
        await pool.run(self._delete_beneath, prefix.rstrip("/"))

    async def clear(self) -> None:
        """Remove everything, also files that do not belong to the cache, as clearing a store requires.

        Raises
        ------
        OSError
            A key may still exist.
        """
        await self.delete_dir("")

    def _delete_beneath(self, prefix: str) -> None:
        if not is_cacheable(prefix):
            return
        self._directory.prepare()
        self._directory.writes.remove_beneath(prefix)
        if prefix and not is_plain(prefix):
            return
        root = self._directory.root
        try:
            # the index has deleted the cache's own files. Foreign files are part of the store and deleted here, but
            # nothing behind a link
            top = files.inside(root, f"{prefix}/.").removesuffix("/.") if prefix else root
            paths = [top] if prefix and files.exists(top) and not os.path.isdir(top) else files.walk(top)
            for path in paths:
                if self._directory.reader.is_foreign_file(path, os.path.relpath(path, root)):
                    files.discard(path)
                    files.prune(path, root)
        except CacheFault as fault:
            raise OSError(errno.EIO, str(fault), prefix) from fault

    # -- listing

    def _keys(self, prefix: str) -> list[str]:
        """Keys beneath a prefix, which is a directory or empty."""
        if not is_cacheable(prefix):
            return []
        root = os.fspath(self.root)
        top = os.path.join(root, prefix) if prefix else root
        found = files.walk(top) if not prefix or is_plain(prefix) else ()
        plain = [os.path.relpath(path, root).replace(os.sep, "/") for path in found]
        # keys that are no paths need the index; without such files, a listing needs none
        has_hashed = os.path.isdir(os.path.join(root, META, "odd"))
        return plain + (self._directory.hashed_keys(prefix) if has_hashed else [])

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in await pool.run(self._keys, ""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin with a prefix."""
        for key in await pool.run(self._keys, prefix.rstrip("/")):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names of the keys and directories directly beneath a prefix."""
        prefix = prefix.rstrip("/")
        start = len(prefix) + 1 if prefix else 0
        for name in sorted({key[start:].partition("/")[0] for key in await pool.run(self._keys, prefix)}):
            yield name

    # -- the audit

    def check(self, *, repair: bool = False) -> Audit:
        """Compare the index with the files and the files with their checksums, and look for leftovers.

        Reads every entry of the directory. Other processes may use it meanwhile: entries that they store or evict are
        no findings. Files that do not belong to the cache are neither read nor changed.

        Parameters
        ----------
        repair : bool
            Whether to repair the findings: remove damaged entries, uncounted files and the leftovers of dead processes,
            and correct the totals.

        Returns
        -------
        Audit
            ``ok``, ``findings``, ``entries``, ``size`` (bytes), ``repaired``; printed, a line for each finding. A
            missing directory has no entries and no findings.

        Raises
        ------
        OSError
            The directory cannot be used: it belongs to another user, was made by a newer version, or is locked for too
            long.
        ValueError
            `repair` of a read-only store.
        """
        if parse_flag("repair", repair):
            self._check_writable()
        try:
            return audit(self._directory, repair=repair)
        except CacheFault as fault:
            raise OSError(errno.EIO, str(fault), self._directory.root) from fault

    # -- the life of the object

    async def _open(self, *, mode: AccessModeLiteral | None = None) -> None:
        if self._is_open:
            raise ValueError("store is already open")
        await self._ensure_open()

    async def _ensure_open(self) -> None:
        if not self._is_open:
            self._use_again()
            await pool.run(self._directory.prepare)
            self._is_open = True

    def _use_again(self) -> None:
        if not self._use.alive:
            self._use = self._directory.used_by(self)

    def close(self) -> None:
        """Write the latest uses to the index, and release the directory. The store can be used again."""
        self._directory.flush()
        self.let_go()
        super().close()

    def let_go(self) -> None:
        """Leave the directory soon, unless another store uses it; the next use joins again."""
        self._use()

    async def move(self, dest_root: Path | str) -> None:
        """Move the directory to another path, while no other process uses it."""
        # the index and the locks are opened by path: nothing may be open while the directory is moved
        self._directory.close()
        await super().move(dest_root)
        self.__init__(self.root, **self._settings())  # type: ignore[misc]  # the same store, at another root


def _restore(kind: type[LockedLocalStore], root: str, **settings: Any) -> LockedLocalStore:
    """A copy, perhaps on another machine."""
    with as_found():
        return kind(root, **settings)
