"""What can go wrong inside the cache itself.

None of these reaches somebody who reads data: a read that meets one is served from the source. `Replaced` is what a
reader gets of what the source does.

    CacheFault
    ├── Busy       another process held the guard, or rebuilds, for longer than we wait
    ├── Damaged    the index is not ours, not whole, or gone
    ├── NoRoom     the bound, the free-disk reserve or the disk itself leaves no space
    └── Unusable   the directory cannot be opened for writing
        └── Foreign   it was made by another version of this package, or by another user
"""

from __future__ import annotations

import errno
import sqlite3
from typing import Final

_DAMAGE: Final = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_SCHEMA"}


class CacheFault(Exception):
    """Base of all trouble with the cache itself."""


class Busy(CacheFault):
    """Somebody else held a lock for longer than this process was willing to wait."""


class Damaged(CacheFault):
    """The index cannot be trusted; it has to be rebuilt."""

    generation: int | None = None
    """Which index it was."""


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


def translated(error: sqlite3.Error) -> CacheFault:
    """The cache's own word for what SQLite says."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):
        return NoRoom(f"no room for the index: {error}")
    damaged = any(name.startswith(code) for code in _DAMAGE) or "no such " in str(error)
    if damaged or (isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)):
        return Damaged(f"the index is damaged: {error}")
    return CacheFault(f"the index cannot be used: {error}")
