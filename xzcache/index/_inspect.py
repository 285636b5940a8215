"""A look at an index without joining its directory: nothing is created, repaired or upgraded.

So it works where this process may only read, and shows damage instead of mending it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache import files
from xzcache.index._locks import let_the_next_go_first, locked_objects, try_flock
from xzcache.index._pins import PINNED, Pin, rows_of, usage_of
from xzcache.index._session import FORMAT
from xzcache.index._sql import UPGRADES, VERSION, Totals, connect, is_write_ahead, range_of
from xzcache.index._statistics import Counts, Looked, UsesRow, by_day, look, sampled
from xzcache.model import META, Busy, CacheFault, Damaged, Foreign, Unusable, namespace_of, translated

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BATCH: Final = 4_000
"""The rows of one section: some 2 ms, for which the other processes wait for the guard."""
_PAUSE: Final = 0.001
_PATIENCE: Final = 5.0


class Source(NamedTuple):
    """One namespace of the index; the size in bytes."""

    id: int
    namespace: str
    entries: int
    size: int


class Uses(NamedTuple):
    """The uses of the entries of one source: the last use, in ns since the epoch, and the entries that are old.

    `pinned` are the bytes of its pinned entries, which are not counted as old.
    """

    last: int = 0
    old_entries: int = 0
    old_size: int = 0
    pinned: int = 0


class Objects(NamedTuple):
    """The cached objects beneath a prefix, without documents.

    `whole` counts objects that are cached whole, `partial` those of which only byte ranges are, and `missing` those
    that are known to be missing at the source. `pinned` are bytes of `size`.
    """

    whole: int = 0
    partial: int = 0
    missing: int = 0
    size: int = 0
    last: int = 0
    pinned: int = 0


class Arrival(NamedTuple):
    """An entry that was stored; `array` is the path of its array within the namespace, and the size is in bytes."""

    namespace: str
    array: str
    size: int


class Inspector:
    """The index of a cache directory, for reading only.

    Each method is one section, or several: they hold the guard for a short time each, so that a large index can be
    counted while other processes work. Their figures may then be of different moments.

    Raises
    ------
    FileNotFoundError
        There is no cache in the directory.
    Busy, Damaged, Foreign, Unusable
        By each method: the index cannot be read, and why.
    """

    def __init__(self, root: str, patience: float = _PATIENCE) -> None:
        self.root = root
        self.meta = f"{root}/{META}"
        self._patience = patience
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int, int] | None = None

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index."""
        connection, self._connection, self._opened = self._connection, None, None
        if connection is not None:
            connection.close()

    def note(self, name: str) -> str:
        """A small file of the cache; empty if it is missing."""
        with suppress(OSError), open(f"{self.meta}/{name}", errors="replace", opener=files.open_own) as file:
            return file.read(4096).strip()
        return ""

    @contextmanager
    def _section(self) -> Iterator[sqlite3.Connection]:
        """The index, under the guard: SQLite's own lock would make the others' transactions fail."""
        # before each section: the directory may have been replaced since the last one
        self._check_owner()
        try:
            guard = os.open(f"{self.meta}/lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise Damaged(f"the lock file of the cache in {self.root} is missing") from None
        except OSError as error:
            raise Unusable(f"the cache in {self.root} cannot be read: {error.strerror}") from error
        try:
            status = os.fstat(guard)
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"the lock file of the cache in {self.root} is no file")
            deadline = time.monotonic() + self._patience
            let_the_next_go_first(guard)
            # shared, which is enough for reading, and possible with a descriptor that may only read
            while not try_flock(guard, fcntl.LOCK_SH):
                if time.monotonic() >= deadline:
                    raise Busy(f"another process holds the lock of the cache in {self.root}")
                time.sleep(_PAUSE)
            try:
                yield self._open((status.st_dev, status.st_ino, int.from_bytes(os.pread(guard, 8, 0), "little")))
            except sqlite3.Error as error:
                self.close()
                raise translated(error) from error
            finally:
                # explicitly, because a child that was forked meanwhile has a copy of the descriptor
                fcntl.flock(guard, fcntl.LOCK_UN)
        finally:
            os.close(guard)

    def _check_owner(self) -> None:
        try:
            for place in (self.root, self.meta):
                if (why := files.unsafe(place)) is not None:
                    raise Foreign(why)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unusable(f"{place} cannot be used: {error.strerror}") from error
        written = self.note("format")
        if written.isdecimal() and written != str(FORMAT):
            raise Foreign(f"the cache in {self.root} has format {written}, but this xzcache uses format {FORMAT}")

    def _open(self, current: tuple[int, int, int]) -> sqlite3.Connection:
        if self._connection is not None and self._opened == current:
            return self._connection
        self.close()
        if not current[2]:
            raise Damaged(f"the cache in {self.root} has no index yet")
        path = f"{self.meta}/index-{current[2]}.db"
        try:
            if is_write_ahead(path):
                raise CacheFault(f"the index in {self.root} is of an older version, which the next read upgrades")
            connection = self._readable(path)
        except OSError as error:
            raise Unusable(f"the index in {self.root} cannot be read: {error.strerror}") from error
        try:
            connection.execute("PRAGMA cache_size=-16000")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        except BaseException:
            connection.close()
            raise
        if version != VERSION:
            connection.close()
            if version in UPGRADES:
                raise CacheFault(f"the index in {self.root} is of an older version, which the next read upgrades")
            raise Damaged(f"the index in {self.root} is not of version {VERSION}")
        self._connection, self._opened = connection, current
        return connection

    @staticmethod
    def _readable(path: str) -> sqlite3.Connection:
        connection = connect(path, "ro")
        try:
            connection.execute("SELECT 1 FROM total").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            if not (getattr(error, "sqlite_errorname", "") or "").startswith("SQLITE_READONLY"):
                raise
            # a process was killed in a transaction, which SQLite rolls back for the first one that may write
            connection = connect(path, "rw")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_numbers(self, *values: object) -> None:
        """Raise unless all values are whole numbers: SQLite stores a value of any kind in any column."""
        if not all(isinstance(value, int) for value in values):
            raise Damaged(f"the rows of the index in {self.root} make no sense")

    # -- the figures

    def totals(self) -> Totals:
        """The totals of the directory."""
        with self._section() as index:
            row = index.execute("SELECT n, bytes, lease, dying, max_size FROM total").fetchone()
        if row is None:
            raise Damaged(f"the totals of the index in {self.root} are missing")
        self._check_numbers(*row[:4], *(() if row[4] is None else row[4:]))
        return Totals(*row)

    def pins(self) -> tuple[list[Pin], int]:
        """The pins, by name, and the bytes of all pinned entries."""
        with self._section() as index:
            found = dict.fromkeys(Pin(row.name, row.until) for row in rows_of(index))
            size = usage_of(index)[1]
        self._check_numbers(size, *(pin.until for pin in found if pin.until is not None))
        return list(found), size

    def processes(self) -> list[int]:
        """The ids of the processes that have joined the directory."""
        with self._section() as index:
            pids = [pid for (pid,) in index.execute("SELECT pid FROM owner ORDER BY id")]
        self._check_numbers(*pids)
        return list(map(abs, pids))

    def fetching(self) -> int | None:
        """How many objects are being fetched, by all processes; None if the system does not tell."""
        return locked_objects(f"{self.meta}/writes")

    def latest(self) -> int:
        """The id of the latest entry; 0 without entries."""
        with self._section() as index:
            (latest,) = index.execute("SELECT coalesce(max(id), 0) FROM entry").fetchone()
        return int(latest)

    def arrivals(self, after: int) -> list[Arrival]:
        """The entries with higher ids than `after`, which arrived later; the latest 5,000 at the most."""
        arrays: dict[str, str] = {}
        found = []
        with self._section() as index:
            rows = index.execute("SELECT key, size FROM entry WHERE id > ? ORDER BY id DESC LIMIT 5000", (after,))
            for key, size in rows.fetchall():
                self._check_numbers(size)
                namespace, folder = namespace_of(key), key.rpartition("/")[0]
                if folder not in arrays:
                    arrays[folder] = _array_of(index, folder)[len(namespace) + 1 :]
                found.append(Arrival(namespace, arrays[folder], size))
        return found

    def statistics(self) -> Looked:
        """The reads of each source, ever and in the last day."""
        with self._section() as index:
            return look(index, int(time.time()))

    def by_day(self) -> dict[int, dict[str, Counts]]:
        """The reads of each source on each of the last days, by the beginning of the day in seconds since the epoch."""
        with self._section() as index:
            return by_day(index, int(time.time()))

    def sampled(self) -> list[UsesRow]:
        """The sampled uses, oldest first."""
        with self._section() as index:
            return sampled(index)

    def sources(self) -> list[Source]:
        """The sources that have entries, largest first."""
        query = "SELECT id, name, n, bytes FROM ns WHERE n > 0 ORDER BY bytes DESC, name"
        with self._section() as index:
            found = [Source(*row) for row in index.execute(query)]
        for source in found:
            self._check_numbers(source.id, source.entries, source.size)
        return found

    def uses(self, before: int = 0) -> dict[int, Uses]:
        """The uses of each source, by its id; entries whose last use is before a time, in ns, are counted."""
        found: dict[int, Uses] = {}
        after = -1
        while True:
            with self._section() as index:
                rows = index.execute(
                    f"SELECT ns, max(used), sum(used < ? AND rank < {PINNED}), "
                    f"sum((used < ? AND rank < {PINNED}) * size), sum((rank = {PINNED}) * size), max(id) FROM "
                    "(SELECT id, ns, used, size, rank FROM entry WHERE id > ? ORDER BY id LIMIT ?) GROUP BY ns",
                    (before, before, after, _BATCH),
                ).fetchall()
            if not rows:
                return found
            for ns, last, entries, size, pinned, latest in rows:
                self._check_numbers(ns, last, entries, size, pinned, latest)
                known = found.get(ns, Uses())
                old = known.old_entries + entries, known.old_size + size
                found[ns] = Uses(max(known.last, last), *old, known.pinned + pinned)
            after = max(row[5] for row in rows)

    def nodes(self, namespace: str) -> list[str]:
        """Paths, below a namespace, of the arrays whose documents were read."""
        where, bounds = range_of(namespace, column="path")
        with self._section() as index:
            paths = [path for (path,) in index.execute(f"SELECT path FROM node{where} ORDER BY path", bounds)]
        if not namespace:
            return [path for path in paths if not namespace_of(path)]
        return [path[len(namespace) + 1 :] for path in paths]

    def objects(self, prefix: str, documents: Sequence[str]) -> Objects:
        """The cached objects beneath a prefix, except the given documents directly beneath it."""
        where, bounds = range_of(prefix)
        besides = tuple(f"{prefix}/{name}" for name in documents)
        with self._section() as index:
            (missing,) = index.execute(
                f"SELECT count(*) FROM absent{where} AND key NOT IN ({', '.join('?' * len(besides))})",
                (*bounds, *besides),
            ).fetchone()
        counted = Objects(missing=missing)
        after: str | None = ""
        while after is not None:
            with self._section() as index:
                # the window is bounded by a key, not by an id: all parts of one object are counted together
                end = index.execute(
                    f"SELECT key FROM entry{where} AND key > ? ORDER BY key LIMIT 1 OFFSET ?", (*bounds, after, _BATCH)
                ).fetchone()
                until = ("", ()) if end is None else (" AND key <= ?", end)
                whole, partial, size, last, pinned = index.execute(
                    "SELECT coalesce(sum(start = 0 AND stop = -1), 0), "
                    "count(DISTINCT CASE WHEN start != 0 OR stop != -1 THEN key END), coalesce(sum(size), 0), "
                    f"coalesce(max(used), 0), coalesce(sum((rank = {PINNED}) * size), 0) "
                    f"FROM entry{where} AND key > ?{until[0]} "
                    f"AND key NOT IN ({', '.join('?' * len(besides))})",
                    (*bounds, after, *until[1], *besides),
                ).fetchone()
            self._check_numbers(whole, partial, size, last, pinned)
            counted = Objects(
                counted.whole + whole,
                counted.partial + partial,
                missing,
                counted.size + size,
                max(counted.last, last),
                counted.pinned + pinned,
            )
            after = None if end is None else end[0]
        return counted


def _array_of(index: sqlite3.Connection, folder: str) -> str:
    """The array that a folder of chunks belongs to: the deepest node at or above it; the folder if there is none."""
    parts = folder.split("/")
    above = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
    query = f"SELECT path FROM node WHERE path IN ({', '.join('?' * len(above))})"
    known = {path for (path,) in index.execute(query, above)}
    return next((path for path in above if path in known), folder)
