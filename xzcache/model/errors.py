"""Errors of the cache itself.

A reader never sees them, because the read is served from the source instead. Only `Replaced`, which reports a
change of the source, and `SourceUnreachable` are raised to the reader.

    CacheFault
    ├── Busy       another process or program holds the guard or the index, or rebuilds the index, for too long
    ├── Damaged    the index is missing, incomplete or not an index of xzcache
    ├── NoRoom     the bound, the free-disk reserve or the disk itself leaves no space
    └── Unusable   the directory cannot be opened for writing
        └── Foreign   another version of this package, or another user, made the directory
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from contextlib import suppress
from typing import Final

logger = logging.getLogger("xzcache")

_DAMAGE: Final = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_SCHEMA", "SQLITE_READONLY_DBMOVED"}


class CacheFault(Exception):
    """The base class of all failures of the cache itself."""


class Busy(CacheFault):
    """Another process or thread held a lock for longer than this process may wait."""


class Damaged(CacheFault):
    """The index cannot be trusted; it has to be rebuilt."""

    generation: int | None = None
    """The number of the damaged index; None if it is unknown."""
    is_certain = True
    """Whether the contents are known to be wrong; if False, the system failed to read or write them."""


class NoRoom(CacheFault):
    """The bound, the reserve of free disk or the disk leaves no space for an entry."""

    bound: int | None = None
    """The bound of the cache, if it is smaller than the entry; else None."""


class Unusable(CacheFault):
    """The cache directory cannot be opened for writing."""


class Foreign(Unusable):
    """The cache directory was made by a version that lays it out in another way, or by another user."""


class Replaced(OSError):
    """An object was replaced at the source while its byte ranges were being read, so the ranges do not fit together.

    The cached ranges of the old object are invalidated. The next read gets the new object.
    """

    def __init__(self, key: str) -> None:
        super().__init__(errno.ESTALE, "replaced at the source while it was read in parts; read it again", key)

    # the arguments of the base class differ from those of this one, so pickle needs to be told
    def __reduce__(self) -> tuple[type[Replaced], tuple[str]]:
        return type(self), (self.filename,)


class SourceUnreachable(ConnectionError):
    """The source cannot be reached, and the cache cannot serve the request.

    The message names the missing key; the exception of the source is the `__cause__`.
    """


class Unclear(Exception):
    """The cached ranges of an object cannot be proved to be of one state, so all must be fetched again, together."""


_logged_lines: Final[set[tuple[str, int]]] = set()


def is_expected_fault(error: BaseException) -> bool:
    """Whether an exception is an expected failure of the cache; all others are bugs."""
    return isinstance(error, CacheFault | OSError | sqlite3.Error | MemoryError)


def report_bug(error: BaseException, where: str) -> bool:
    """Log a bug of the cache with its traceback, once for each line that raises; return whether it is a bug."""
    if is_expected_fault(error) or not isinstance(error, Exception):
        return False
    place = "", 0
    trace = error.__traceback__
    while trace is not None:
        # the innermost line: one bug that is met in several ways is logged once
        place, trace = (trace.tb_frame.f_code.co_filename, trace.tb_lineno), trace.tb_next
    if place not in _logged_lines:
        _logged_lines.add(place)
        logger.error("an error in xzcache itself, please report it (%s)", where, exc_info=error)
    return True


def without_frames(error: BaseException) -> BaseException:
    """Strip the tracebacks from an exception and its causes, so that a stored exception keeps no object alive."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        # causes and contexts may form a cycle
        if (each := todo.pop()) is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            todo += [each.__cause__, each.__context__]
    return error


def translated(error: sqlite3.Error) -> CacheFault:
    """Translate an SQLite error into a `CacheFault`."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_FULL" or (name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE") and _has_file_size_limit()):
        return NoRoom(f"no room for the index: {error}")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
        return Busy(f"another program uses the index: {error}")
    # sums overflow if damage gave a row a size that no file has
    shown = any(part in str(error) for part in ("no such ", "integer overflow"))
    damaged = any(name.startswith(code) for code in _DAMAGE) or shown
    if damaged or (isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)):
        damage = Damaged(f"the index is damaged: {error}")
        # a read error may pass; a short read means that the file is shorter than it says
        damage.is_certain = not name.startswith("SQLITE_IOERR") or name == "SQLITE_IOERR_SHORT_READ"
        return damage
    return CacheFault(f"the index cannot be used: {error}")


def _has_file_size_limit() -> bool:
    """Whether a file size limit is set: SQLite reports the limit as a disk error."""
    with suppress(ImportError, OSError):
        import resource

        return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return False
