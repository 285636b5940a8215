"""Look up entries by path, and verify their bytes."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from xzcache.files import _entryfile as files
from xzcache.files._entryfile import Whose, user
from xzcache.files._health import LONG, Health, allowance
from xzcache.files._paths import is_plain, range_directory, relative_path
from xzcache.files._quarantine import EVERYTHING, Quarantine
from xzcache.model import END, Damaged, Entry, Listed, Unusable, place_within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from xzcache.model import Array, Extent, Span


# -- Opening, reading and closing entry files.
#
# Blocking functions without index and locks. A failed system call means absence, or is an `OSError` that is raised or
# passed to `on_fault`. Descriptors are always closed.

# without O_NONBLOCK, opening a pipe in the place of an entry would wait for its other end
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
_NO_FLAG: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system, or of a kernel, without support for `RWF_NOWAIT`."""
_NOT_THERE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""Errors of a path where there is nothing, or a directory, a link or a pipe."""
_BYTE: Final = np.dtype(np.uint8)
_WHOLE: Final = 0, END

Signature = tuple[int, int, int]
"""Inode, time of modification in ns, and size: unchanged unless the file is replaced or written."""

OnFault = Callable[[BaseException], None]
"""Gets each exception that is not absence."""


_user = user()


def is_ours(owner: int) -> bool:
    """Whether a file that belongs to `owner` belongs to this user."""
    global _user
    if owner == _user or _user == -1:
        return True
    # the process may have changed its user: check again, but only for files that do not match
    _user = user()
    return owner == _user


def let_go(fd: int, on_fault: OnFault) -> None:
    """Close a descriptor; an error is recorded only, as the bytes that were read are right."""
    try:
        os.close(fd)
    except OSError as error:
        on_fault(error)


class Opened:
    """An open file; closed by `close` or with its last reference."""

    __slots__ = ("_on_fault", "_stamp", "fd", "is_ours", "mtime_ns", "signature", "size")

    def __init__(self, fd: int, status: os.stat_result, on_fault: OnFault) -> None:
        self.fd = fd
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.signature: Signature = (status.st_ino, self.mtime_ns, self.size)
        self.is_ours = is_ours(status.st_uid)
        self._stamp: tuple[files.Stamp | None, bool] | None = None
        self._on_fault = on_fault

    def stamp(self) -> tuple[files.Stamp | None, bool]:
        """The stamp of the file and whether that is conclusive, as `stamp_of_open`; read once. Raises `OSError`."""
        if self._stamp is None:
            self._stamp = files.stamp_of_open(self.fd)
        return self._stamp

    def close(self) -> None:
        """Close the file; once is enough."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            let_go(fd, self._on_fault)

    __del__ = close


def open_file(path: str, on_fault: OnFault) -> Opened | None:
    """Open a regular file; None if it does not exist.

    Raises
    ------
    NotADirectoryError, IsADirectoryError
        The path is taken: a parent is a file, or the path is a directory, a link or a pipe.
    OSError
        Any other error: EIO, EACCES, EMFILE, ESTALE, ...
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        # O_NOFOLLOW reports a link as ELOOP, a socket gives ENXIO
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise IsADirectoryError(error.errno, error.strerror, path) from None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    except BaseException:
        let_go(fd, on_fault)
        raise
    return Opened(fd, status, on_fault)


def _fill(fd: int, place: Array, first: int, *, patient: bool) -> bool:
    """Fill `place` with bytes of a file; False if the file is too short, or would have to be waited for."""
    try:
        # one system call, straight into the array of the caller
        count = os.preadv(fd, [place], first, 0 if patient else os.RWF_NOWAIT)
        if count == len(place) or not patient:
            return count == len(place)
    except BlockingIOError:
        return False
    except AttributeError:
        # the platform lacks this call or its flag
        if not patient:
            return False
    except OSError as error:
        # a file system that is memory may not know the flag, and never blocks
        if error.errno not in _NO_FLAG:
            raise
    # after a short read, or where the call or its flag is missing
    data = read(fd, first, first + len(place))
    if data is None:
        return False
    place[:] = np.frombuffer(data, dtype=np.uint8)
    return True


def read(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes `first` to `last` of a file; None if it is shorter. Raises `OSError`."""
    data = os.pread(fd, last - first, first)
    while len(data) < last - first:
        more = os.pread(fd, last - first - len(data), first + len(data))
        if not more:
            return None
        data += more
    return memoryview(data)


def read_resident(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes of a file if they are in the page cache, so that the read cannot block; else None. Raises `OSError`."""
    # not zeroed first, as a bytearray would be
    data = np.empty(last - first, _BYTE)
    if not _fill(fd, data, first, patient=False):
        return None
    data.setflags(False)  # type: ignore[call-arg]  # by its name, it would take twice the time
    return memoryview(data)


# -- The cached byte ranges of an object, listed by the names of their files.
#
# The remembered list is only a hint, because files come and go. So the directory is listed again before a request to
# the source.

# spans in memory, of all objects together, so that one object with very many pieces is limited as well
_REMEMBERED_PIECES: Final = 65536
# longer than a tick of Linux's clock for files, which is 10 ms at the most
_TICK_NS: Final = 20_000_000


class Pieces:
    """The cached byte ranges of the objects in one cache directory. Safe for threads."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._remembered: dict[str, tuple[Listed, int, str]] = {}
        self._count = 0

    def remembered(self, key: str) -> Listed | None:
        """The pieces of an object as they were when they were last listed."""
        known = self._remembered.get(key)
        return None if known is None else known[0]

    def holding(self, key: str, start: int, stop: int) -> tuple[str, Span] | None:
        """The path and the span of a piece that is remembered to hold a byte range of an object."""
        if (known := self._remembered.get(key)) is None:
            return None
        listed, _, directory = known
        for piece in listed.spans_covering(start, stop):
            return f"{directory}/{piece[0]}_{piece[1]}", piece
        return None

    def listed(self, key: str) -> Listed:
        """The cached byte ranges of an object; raises `OSError` for any error, except where there is none."""
        directory = f"{self._root}/{range_directory(key)}"
        try:
            changed = os.stat(directory).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return Listed(key, ())
        known = self._remembered.get(key)
        if known is not None and known[1] == changed:
            return known[0]
        now = time.time_ns()
        spans = []
        # the directory may go between the two calls, with its last piece
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(directory):
                start, _, stop = name.partition("_")
                # a file of another program
                with suppress(ValueError):
                    spans.append((int(start), int(stop)))
        listed = Listed(key, spans)
        # a change within the same tick of the file system's clock would not show
        self._remember(key, listed, changed if now - changed > _TICK_NS else -1, directory)
        return listed

    def _remember(self, key: str, listed: Listed, changed: int, directory: str) -> None:
        before = self._remembered.pop(key, None)
        self._count += len(listed) - (0 if before is None else len(before[0]))
        self._remembered[key] = listed, changed, directory
        while self._count > _REMEMBERED_PIECES and len(self._remembered) > 1:
            # another thread may be doing the same
            with suppress(KeyError, StopIteration, RuntimeError):
                self._count -= len(self._remembered.pop(next(iter(self._remembered)))[0])


# -- Finding and checking entry files.

# checked files in memory: one that is forgotten is checked again, at the cost of its checksum
_REMEMBERED: Final = 65536
_DESCRIPTORS: Final = "/proc/self/fd"
_SHOWS_PATHS: Final = os.path.isdir(_DESCRIPTORS)
"""Whether the platform shows the path of an open file."""


class Found(NamedTuple):
    """The open file of an entry; the caller must read or close it."""

    entry: Entry
    path: str
    opened: Opened
    known: bool
    """Whether this process has checked this very file before."""

    @property
    def size(self) -> int:
        return self.opened.size


P = ParamSpec("P")
T = TypeVar("T")


class Row(Protocol):
    """The size and checksum of a file in the index."""

    @property
    def size(self) -> int: ...
    @property
    def crc(self) -> int: ...


class Rows(Protocol):
    """The index, in a transaction."""

    def find(self, entry: Entry, /) -> Row | None:
        """The row of an entry."""


class Session(Protocol):
    """The part of the index session that the lookup uses."""

    root: str

    def is_stand_in(self) -> bool:
        """Whether the directory at the path is the one that this process uses."""

    def section(self) -> AbstractContextManager[tuple[object, Rows]]:
        """A transaction of the index."""


class Barrier(Protocol):
    """The part of the fault barrier that the lookup uses."""

    @property
    def session(self) -> Session: ...
    @property
    def health(self) -> Health: ...

    def try_or(self, action: Callable[[], T], otherwise: T) -> T:
        """The result of an action; `otherwise` if the cache fails."""

    def with_rebuild(self, action: Callable[[], T]) -> T:
        """The result of an action, after a rebuild of a damaged index; raises if the cache fails."""

    def record_fault(self, error: BaseException) -> None:
        """Count a fault."""


def _timed(method: Callable[Concatenate[Reader, P], T]) -> Callable[Concatenate[Reader, P], T]:
    """Decorate a method to report slow operations of the disk."""

    @wraps(method)
    def timed(self: Reader, /, *args: P.args, **kwargs: P.kwargs) -> T:
        began = time.monotonic()
        try:
            return method(self, *args, **kwargs)
        finally:
            if (took := time.monotonic() - began) > LONG:
                found = args[0] if args and isinstance(args[0], Found) else None
                if found is None or took > allowance(found.size):
                    self._is_slow("" if found is None else found.path, took)

    return timed


class Reader:
    """Reads the entries of one cache directory without the index.

    No method raises for an error on an entry file: the entry counts as missing, the fault is recorded, and the file is
    closed. Only `read_foreign` raises. Safe for threads. Verified files are remembered by inode, time of modification
    and size, up to a limit.

    `folds` tells that the file system folds case. `quarantine` holds the keys whose invalidation is pending.
    `slow_path` is the path of the latest slow file.
    """

    def __init__(self, barrier: Barrier, *, folds: bool, quarantine: Quarantine | None = None) -> None:
        self._barrier = barrier
        self._on_fault = barrier.record_fault
        self._root = barrier.session.root
        self._folds = folds
        self._pieces = Pieces(self._root)
        self._checked: dict[str, Signature] = {}
        self._damaged: dict[str, Signature] = {}
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self._refuses_all = False
        self.slow_path = ""

    def open_entry(self, entry: Entry, *, anyones: bool = False) -> Found | None:
        """Open a file that contains an entry: its own, or one with more of the object.

        A file that this process has not verified yet may be damaged, which `read` detects. `anyones` accepts files of
        other users, which are not entries.
        """
        return next(self.open_covering(entry, anyones=anyones), None)

    def open_covering(self, entry: Entry, *, anyones: bool = False) -> Iterator[Found]:
        """Open one file after another that holds an entry."""
        if not self.quarantine.is_empty and self.quarantine.holds(entry.key):
            return
        try:
            if entry.is_whole:
                if (found := self._open(entry, anyones=anyones)) is not None:
                    yield found
                return
            tried = set()
            # remembered ranges need no listing of the directory; the listing finds the others
            remembered = self._pieces.remembered(entry.key)
            for piece in remembered.covering(entry) if remembered is not None else ():
                tried.add(piece)
                if (found := self._open_if_possible(piece)) is not None:
                    yield found
            # then the whole object, which needs no listing either
            if (found := self._open_if_possible(entry.whole)) is not None:
                yield found
            for piece in self._pieces.listed(entry.key).covering(entry):
                if piece not in tried and (found := self._open_if_possible(piece)) is not None:
                    yield found
        except OSError as error:
            self._on_fault(error)

    def get_nowait(
        self, extent: Extent, max_age_ns: int | None, place: Array | None = None, *, most: int, patient: bool = False
    ) -> tuple[Array, Extent, float] | None:
        """The bytes of an entry, if this process has verified the file that holds it, and they are in memory.

        This is the way of a hit: one function, and four system calls. After None, the caller takes the long way.

        Parameters
        ----------
        extent : (str, int, int)
        max_age_ns : int or None
        place : array of bytes, optional
            Where to read the bytes to, if there are as many; undefined after None.
        most : int
            The most bytes to read without a place and without patience.
        patient : bool
            Whether the disk may be waited for.

        Returns
        -------
        (array of bytes, (str, int, int), float)
            The bytes, the entry whose file holds them, and the time, by `time.monotonic`.
        """
        key, start, stop = extent
        path, outer = f"{self._root}/{key}", _WHOLE
        # read without a lock: a stale signature only leads to the long way
        signature = self._checked.get(path)
        if signature is None and (start or stop != END):
            if (piece := self._pieces.holding(key, start, stop)) is None:
                return None
            path, outer = piece
            signature = self._checked.get(path)
        if signature is None or (not self.quarantine.is_empty and self.quarantine.concerns(key)):
            return None
        # a time in the future, from a clock that was set back, says nothing about the age
        if max_age_ns is not None and not 0 <= time.time_ns() - signature[1] < max_age_ns:
            return None
        first, last = 0, signature[2]
        if start or stop != END:
            first, last = place_within(start, stop, outer[0], last)
        size, data = last - first, place
        if data is None:
            if size > most and not patient:
                return None
            data = np.empty(size, _BYTE)
        elif len(data) != size:
            return None
        began = time.monotonic()
        is_there = is_read = False
        try:
            fd = os.open(path, _READ)
            try:
                status = os.fstat(fd)
                # compared on the open file: another one may get the name at any moment
                is_there = (status.st_ino, status.st_mtime_ns, status.st_size) == signature
                if is_there and (status.st_uid == _user or is_ours(status.st_uid)):
                    is_read = _fill(fd, data, first, patient=patient)
            finally:
                # as `let_go`; one more call would be noticeable in a hit
                try:
                    os.close(fd)
                except OSError as error:
                    self._on_fault(error)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                self._on_fault(error)
        now = time.monotonic()
        if now - began > LONG and now - began > allowance(size):
            self._is_slow(path, now - began)
        if not is_read:
            if not is_there:
                # the next reader does not try this path again
                self._checked.pop(path, None)
            return None
        if place is None:
            data.setflags(False)  # type: ignore[call-arg]  # as above
        return data, (key, *outer), now

    def is_at_hand(self, key: str, max_age_ns: int | None) -> bool:
        """Whether the file of a whole object is there; if this process has not verified it, it may still be damaged."""
        if not self.quarantine.is_empty and self.quarantine.concerns(key):
            return False
        path = f"{self._root}/{key}"
        began = time.monotonic()
        try:
            status = os.stat(path)
        except OSError:
            return False
        if (took := time.monotonic() - began) > LONG:
            # the event loop that waited is not to wait for the next file as well
            self._is_slow(path, took)
            return False
        signature = status.st_ino, status.st_mtime_ns, status.st_size
        if self._checked.get(path) != signature and (
            self._damaged.get(path) == signature or not stat.S_ISREG(status.st_mode) or not is_ours(status.st_uid)
        ):
            return False
        return max_age_ns is None or 0 <= time.time_ns() - status.st_mtime_ns < max_age_ns

    def _is_slow(self, path: str, took: float) -> None:
        self.slow_path = path
        self._barrier.health.record_slow(f"{path or 'an operation'} took {took:.1f} s")

    @_timed
    def listed(self, key: str) -> Listed:
        """The cached byte ranges of an object, as far as they can be listed."""
        try:
            held = not self.quarantine.is_empty and self.quarantine.holds(key)
            return Listed(key, ()) if held else self._pieces.listed(key)
        except OSError as error:
            self._on_fault(error)
            return Listed(key, ())

    def lacks(self, key: str) -> bool:
        """Whether there certainly is neither a whole object nor a byte range of a key."""
        name = key if is_plain(key, folds=self._folds) else relative_path(Entry(key), hashed=True)
        for path in (name, range_directory(key)):
            try:
                os.stat(f"{self._root}/{path}")
                return False
            except FileNotFoundError:
                pass
            except OSError:
                # it cannot be told, so the caller looks for parts in the usual way
                return False
        return True

    def quarantine_all(self) -> None:
        """Serve nothing more from this directory."""
        if not self._refuses_all:
            self._refuses_all = True
            self.quarantine.hold([EVERYTHING])

    def lift_quarantine(self) -> None:
        """Undo `quarantine_all`: the directory was found to be this user's."""
        if self._refuses_all:
            self._refuses_all = False
            self.quarantine.free([EVERYTHING])

    def _open_if_possible(self, entry: Entry) -> Found | None:
        """Like `_open`, but a fault is only recorded: another file may hold the same bytes."""
        try:
            return self._open(entry)
        except OSError as error:
            self._on_fault(error)
            return None

    @_timed
    def _open(self, entry: Entry, *, anyones: bool = False) -> Found | None:
        hashed = entry.is_whole and not is_plain(entry.key, folds=self._folds)
        path = f"{self._root}/{entry.key}" if entry.is_whole and not hashed else self._path(entry, hashed=hashed)
        try:
            opened = open_file(path, self._on_fault)
        except (NotADirectoryError, IsADirectoryError):
            # the path is taken, so the entry may lie under its digest
            path = self._path(entry, hashed=True)
            opened = open_file(path, self._on_fault)
        if opened is None:
            return None
        known = opened.is_ours and self._checked.get(path) == opened.signature
        if not known and not hashed and entry.is_whole and not (opened.is_ours and opened.stamp()[0] is not None):
            # a foreign file takes the path of the entry, or this file system has no stamps
            elsewhere = open_file(self._path(entry, hashed=True), self._on_fault)
            if elsewhere is not None:
                opened.close()
                path, opened = self._path(entry, hashed=True), elsewhere
                known = opened.is_ours and self._checked.get(path) == opened.signature
        # a file that was found damaged is not read again until it is replaced
        if not (opened.is_ours or anyones) or (not known and self._damaged.get(path) == opened.signature):
            opened.close()
            return None
        if not self.quarantine.is_empty:
            # the file is open already, so this check holds for it
            if self.quarantine.is_away(entry.key) and not self._barrier.session.is_stand_in():
                opened.close()
                return None
            known = known and not self.quarantine.suspects(entry.key)
        return Found(entry, path, opened, known)

    def _path(self, entry: Entry, *, hashed: bool) -> str:
        return f"{self._root}/{relative_path(entry, hashed=hashed)}"

    @_timed
    def read(self, found: Found, first: int, last: int) -> memoryview | None:
        """Read and close an opened entry; None if its bytes are not those that were stored.

        The checksum of the whole file is verified when this process reads it for the first time.
        """
        try:
            # its bytes never change under one signature, so they are not checked again
            if found.known:
                return read(found.opened.fd, first, last)
            crc = self._expected(found, *found.opened.stamp())
            if crc is None:
                return None
            return self._checked_part(found, crc, read(found.opened.fd, 0, found.size), first, last)
        except OSError as error:
            self._on_fault(error)
            return None
        finally:
            found.opened.close()

    @_timed
    def read_now(self, found: Found, first: int, last: int) -> tuple[bool, memoryview | None]:
        """Like `read`, if no wait is needed; else `(False, None)`, and the file stays open."""
        waits = False
        try:
            if found.known:
                data = read_resident(found.opened.fd, first, last)
                waits = data is None
                return not waits, data
            stamp, conclusive = found.opened.stamp()
            if (stamp is None and not conclusive) or self.quarantine.suspects(found.entry.key):
                # the index has to be asked
                waits = True
                return False, None
            if (crc := self._expected(found, stamp, conclusive)) is None:
                return True, None
            data = read_resident(found.opened.fd, 0, found.size)
            waits = data is None
            return not waits, None if waits else self._checked_part(found, crc, data, first, last)
        except OSError as error:
            self._on_fault(error)
            return True, None
        finally:
            if not waits:
                found.opened.close()

    def _expected(self, found: Found, stamp: files.Stamp | None, conclusive: bool) -> int | None:
        """The expected checksum of a file, from its stamp or the index; None if the file is not that of the entry."""
        if not found.opened.is_ours:
            return None
        suspect = self.quarantine.suspects(found.entry.key)
        if stamp is not None:
            sound = stamp.size == found.size and stamp.digest == found.entry.digest()
            if sound and not suspect:
                return stamp.crc
        elif conclusive:
            # not the cache's
            _remember(self._damaged, found)
            return None
        if stamp is None or suspect:
            # one transaction for each file and process: on file systems without stamps, or after a directory was away
            row = self._barrier.try_or(lambda: self._row(found.entry), None)
            if row is not None and row.size == found.size and (stamp is None or (sound and row.crc == stamp.crc)):
                return row.crc
            if suspect:
                self.quarantine.record_returned(found.entry.key)
                return None
        self._is_damaged(found)
        return None

    def _checked_part(
        self, found: Found, crc: int, data: memoryview | None, first: int, last: int
    ) -> memoryview | None:
        if data is None or files.checksum(data) != crc:
            self._is_damaged(found)
            return None
        if not self._lies_there(found):
            self._on_fault(Unusable(f"{found.path} is reached through a link, so it is not read as an entry"))
            return None
        # only after all checks, because a remembered file is served without any
        _remember(self._checked, found)
        return data[first:last]

    def _is_damaged(self, found: Found) -> None:
        _remember(self._damaged, found)
        # it may have been sound when it was checked before
        self._checked.pop(found.path, None)
        self._on_fault(Damaged(f"{found.path} is not what was stored there"))

    def _lies_there(self, found: Found) -> bool:
        """Whether no folder above a file is a link: files behind a link are neither counted nor evicted."""
        if self._folds:
            # the same file has more than one path
            return True
        if _SHOWS_PATHS:
            with suppress(FileNotFoundError):
                # one call instead of one for each folder; it shows the path without links
                if os.readlink(f"{_DESCRIPTORS}/{found.opened.fd}") == found.path:
                    return True
        # a file that was evicted since it was opened has another path, or none
        directory = os.path.dirname(found.path)
        return os.path.realpath(directory) == directory

    @_timed
    def is_foreign(self, found: Found) -> bool:
        """Whether an opened file does not belong to the cache; if that is unknown, `read` decides."""
        if found.known:
            return False
        try:
            stamp, conclusive = found.opened.stamp()
        except OSError as error:
            self._on_fault(error)
            return False
        if stamp is not None:
            return stamp.digest not in (found.entry.digest(), files.OF_NOBODY)
        if not found.opened.is_ours:
            return True
        return conclusive or self._barrier.try_or(lambda: self._row(Entry(found.entry.key)), None) is None

    def is_foreign_file(self, path: str, key: str) -> bool:
        """Whether the file at a path does not belong to the cache; raises if that is unknown."""
        found = files.look(path, Entry(key))
        if found is Whose.UNMARKED:
            return self._barrier.with_rebuild(lambda: self._row(Entry(key))) is None
        return found in (Whose.FOREIGN, Whose.MARKED)

    def read_foreign(self, found: Found, first: int, last: int) -> memoryview | None:
        """Read and close a file that does not belong to the cache; raises `OSError` if it cannot be read."""
        try:
            return read(found.opened.fd, first, last)
        finally:
            found.opened.close()

    def validator(self, entry: Entry) -> str:
        """The validator of a cached entry; empty if there is none."""
        return "" if (found := self.open_entry(entry)) is None else self._validator(found)

    def states_of(self, key: str) -> set[str]:
        """The validators of the whole object and of one byte range, if cached; empty strings for unknown states."""
        states = set()
        for entry in (Entry(key), self.listed(key).any()):
            if entry is None:
                continue
            try:
                found = self._open(entry)
            except OSError as error:
                # a state that cannot be read is unknown, not the same
                self._on_fault(error)
                states.add("")
                continue
            if found is not None:
                is_foreign = entry.is_whole and self.is_foreign(found)
                state = self._validator(found)
                # a file of the user at the key has no state of this cache
                if state or not is_foreign:
                    states.add(state)
            elif any(self._path(entry, hashed=hashed) in self._damaged for hashed in (False, True)):
                # a damaged part may be of another state, until it is removed
                states.add("")
        return states

    @_timed
    def _validator(self, found: Found) -> str:
        try:
            stamp, _ = found.opened.stamp()
        except OSError as error:
            self._on_fault(error)
            return ""
        finally:
            found.opened.close()
        return stamp.validator if stamp is not None and stamp.digest == found.entry.digest() else ""

    @_timed
    def size(self, found: Found) -> int | None:
        """The size of an opened entry, which is closed; None if only its contents can identify it."""
        try:
            if found.known:
                return found.size
            stamp, _ = found.opened.stamp()
            sound = stamp is not None and stamp.size == found.size and stamp.digest == found.entry.digest()
            return found.size if sound else None
        except OSError as error:
            self._on_fault(error)
            return None
        finally:
            found.opened.close()

    @_timed
    def mark_validated(self, entry: Entry) -> None:
        """Restart the age of an entry."""
        if (found := self.open_entry(entry)) is not None:
            try:
                # The time of modification is the age that all processes see. It is part of the signature, so
                # each checks the file once more
                os.utime(found.opened.fd)
            except OSError as error:
                self._on_fault(error)
            finally:
                found.opened.close()

    def close(self, found: Found) -> None:
        """Close an opened entry without reading it."""
        found.opened.close()

    def _row(self, entry: Entry) -> Row | None:
        with self._barrier.session.section() as (_, index):
            return index.find(entry)


def _remember(files_seen: dict[str, Signature], found: Found) -> None:
    if len(files_seen) >= _REMEMBERED:
        # another thread may be doing the same
        with suppress(KeyError, StopIteration, RuntimeError):
            del files_seen[next(iter(files_seen))]
    files_seen[found.path] = found.opened.signature
