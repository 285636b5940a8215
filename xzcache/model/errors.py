"""What can go wrong inside the cache itself.

None of these reaches somebody who reads data: a read that meets one is served from the source. `Replaced` is what a
reader gets of what the source does.

    CacheFault
    ├── Busy       another process held the guard, or rebuilds, or a program has the index locked, for too long
    ├── Damaged    the index is not ours, not whole, or gone
    ├── NoRoom     the bound, the free-disk reserve or the disk itself leaves no space
    └── Unusable   the directory cannot be opened for writing
        └── Foreign   it was made by another version of this package, or by another user
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
    """Base of all trouble with the cache itself."""


class Busy(CacheFault):
    """Somebody else held a lock for longer than this process was willing to wait."""


class Damaged(CacheFault):
    """The index cannot be trusted; it has to be rebuilt."""

    generation: int | None = None
    """Which index it was."""
    is_certain = True
    """Whether its contents are known to be wrong; else the system could not read or write it."""


class NoRoom(CacheFault):
    """There is no space that this entry may take."""


class Unusable(CacheFault):
    """The cache directory cannot be opened for writing."""


class Foreign(Unusable):
    """The cache directory was made by a version that lays it out in another way, or by another user."""


class Replaced(OSError):
    """An object was replaced at the source while parts of what it was before were being read: they do not fit.

    What was cached of it is gone, so the next read sees the new one.
    """

    def __init__(self, key: str) -> None:
        super().__init__(errno.ESTALE, "replaced at the source while it was read in parts; read it again", key)

    def __reduce__(self) -> tuple[type[Replaced], tuple[str]]:
        return type(self), (self.filename,)


class Unclear(Exception):
    """Nobody can tell whether some parts of an object are of one state: they are to be asked for anew, together."""


_told: Final[set[tuple[str, int]]] = set()


def is_trouble(error: BaseException) -> bool:
    """Whether an exception tells of something that the cache expects to go wrong; any other is an error of its code."""
    return isinstance(error, CacheFault | OSError | sqlite3.Error | MemoryError)


def report_bug(error: BaseException, where: str) -> bool:
    """Log an error in the code of the cache with its traceback, once for each line that raises one.

    Parameters
    ----------
    error : BaseException
    where : str
        What was being done, or with what.

    Returns
    -------
    bool
        Whether it is one.
    """
    if is_trouble(error) or not isinstance(error, Exception):
        return False
    place = "", 0
    trace = error.__traceback__
    while trace is not None:
        place, trace = (trace.tb_frame.f_code.co_filename, trace.tb_lineno), trace.tb_next
    if place not in _told:
        _told.add(place)
        logger.error("an error in xzcache itself, please report it (%s)", where, exc_info=error)
    return True


def without_frames(error: BaseException) -> BaseException:
    """An exception that keeps nothing alive, to be remembered: not what its frames, or those of its causes, hold."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        if (each := todo.pop()) is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            todo += [each.__cause__, each.__context__]
    return error


def translated(error: sqlite3.Error) -> CacheFault:
    """The cache's own word for what SQLite says."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_FULL" or (name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE") and _has_file_size_limit()):
        return NoRoom(f"no room for the index: {error}")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
        return Busy(f"another program uses the index: {error}")
    # sums overflow where a row has a size that no file has
    shown = any(part in str(error) for part in ("no such ", "integer overflow"))
    damaged = any(name.startswith(code) for code in _DAMAGE) or shown
    if damaged or (isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)):
        damage = Damaged(f"the index is damaged: {error}")
        damage.is_certain = not name.startswith("SQLITE_IOERR") or name == "SQLITE_IOERR_SHORT_READ"
        return damage
    return CacheFault(f"the index cannot be used: {error}")


def _has_file_size_limit() -> bool:
    """Whether the process may not write large files: SQLite does not tell that from a broken disk."""
    with suppress(ImportError, OSError):
        import resource

        return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return False
