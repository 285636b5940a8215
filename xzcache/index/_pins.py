"""Pins: sources and arrays whose entries are not evicted.

A pinned entry has the rank `PINNED`, after all others in the order of eviction, so that the choice of victims does not
depend on the number of pins. Triggers give new entries beneath a pin that rank while a share of the bound has room for
them, and count them. Tables and triggers are made with the first pin and dropped with the last one: a cache without
pins has no work with them, and its index is the same as before there were any.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

PINNED: Final = 1 << 62
"""The rank of a pinned entry; all others have a time in ns since the epoch."""
PINNED_SHARE: Final = 0.8
"""The part of the bound that pinned entries may take, so that other sources can still be cached."""

_EVERY: Final = 10.0
"""Seconds between two looks for pins that have ended."""
# entries of one transaction, for which other processes wait
_AT_ONCE: Final = 5000

_TABLES: Final = """
CREATE TABLE pin(
  name TEXT NOT NULL, low TEXT NOT NULL, high TEXT NOT NULL, until INTEGER, PRIMARY KEY(name, low)) WITHOUT ROWID;
CREATE TABLE pinned(
  one INTEGER PRIMARY KEY CHECK(one = 1), n INTEGER NOT NULL, bytes INTEGER NOT NULL, share REAL NOT NULL);
"""
_ROOM: Final = (
    "(SELECT total.max_size IS NULL OR pinned.bytes + {size} <= pinned.share * total.max_size FROM total, pinned)"
)
_TRIGGERS: Final = f"""
CREATE TRIGGER pinned_comes AFTER INSERT ON entry
  WHEN EXISTS(SELECT 1 FROM pin WHERE NEW.key >= low AND NEW.key < high) AND {_ROOM.format(size="NEW.size")} BEGIN
  UPDATE entry SET rank = {PINNED} WHERE id = NEW.id; END;
CREATE TRIGGER pinned_changes AFTER UPDATE OF rank ON entry WHEN (OLD.rank = {PINNED}) != (NEW.rank = {PINNED}) BEGIN
  UPDATE pinned SET n = n + iif(NEW.rank = {PINNED}, 1, -1),
    bytes = bytes + iif(NEW.rank = {PINNED}, NEW.size, -NEW.size); END;
CREATE TRIGGER pinned_goes AFTER DELETE ON entry WHEN OLD.rank = {PINNED} BEGIN
  UPDATE pinned SET n = n - 1, bytes = bytes - OLD.size; END;
"""
_NAMES: Final = ("TRIGGER pinned_comes", "TRIGGER pinned_changes", "TRIGGER pinned_goes", "TABLE pin", "TABLE pinned")

Span = tuple[str, str]
"""Keys from the first text on, and before the second."""


class Pin(NamedTuple):
    """One pin: the path of a source or an array in the cache, and its end in ns since the epoch, None for no end."""

    name: str
    until: int | None


class PinRow(NamedTuple):
    """One row of a pin: keys from `low` on, and before `high`."""

    name: str
    low: str
    high: str
    until: int | None


class Pins:
    """The pins of one open index; within a section only, as all of the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._do = connection.execute
        self._connection = connection
        self._looked = 0.0

    @property
    def is_made(self) -> bool:
        return is_made(self._connection)

    def add(self, name: str, spans: Sequence[Span], until: int | None) -> None:
        """Pin spans of keys under a name, in place of an earlier pin of that name; `mark` then ranks their entries."""
        if not self.is_made:
            # one by one, because `executescript` would commit the transaction of the section
            for statement in _TABLES.split(";\n"):
                self._do(statement)
            self._do("INSERT INTO pinned VALUES(1, 0, 0, ?)", (PINNED_SHARE,))
            for statement in _TRIGGERS.split("END;\n"):
                if statement.strip():
                    self._do(f"{statement}END")
        self._connection.executemany(
            "INSERT OR REPLACE INTO pin(name, low, high, until) VALUES(?, ?, ?, ?)",
            [(name, low, high, until) for low, high in spans],
        )

    def mark(self, low: str, high: str, limit: int) -> str | None:
        """Rank some entries from a key on, and before another; returns the key to go on from, or None at the end."""
        rows = self._do(
            f"SELECT id, key, size FROM entry WHERE key >= ? AND key < ? AND rank < {PINNED} ORDER BY key LIMIT ?",
            (low, high, limit),
        ).fetchall()
        for id_, _, size in rows:
            changed = self._do(
                f"UPDATE entry SET rank = {PINNED} WHERE id = ? AND {_ROOM.format(size='?')}", (id_, size)
            )
            # the share is used up: the other entries stay unpinned
            if changed.rowcount == 0:
                return None
        return rows[-1][1] if len(rows) == limit else None

    def end(self, name: str | None) -> int:
        """End a pin, or all pins; returns their number. `release` then ranks their entries like all others."""
        if not self.is_made:
            return 0
        where, values = ("", ()) if name is None else (" WHERE name = ?", (name,))
        (count,) = self._do(f"SELECT count(DISTINCT name) FROM pin{where}", values).fetchone()
        # only marked as ended: entries are released in batches, and a process that dies in
        # between leaves the rest to others
        self._do(f"UPDATE pin SET until = 0{where}", values)
        return int(count)

    def release(self, limit: int) -> bool:
        """Rank some entries of ended pins like all others; returns whether there are more."""
        if not self.is_made:
            return False
        now = time.time_ns()
        for name, low, high in self._do("SELECT name, low, high FROM pin WHERE until <= ?", (now,)).fetchall():
            released = self._do(
                # an entry that another pin covers stays pinned
                "UPDATE entry SET rank = used WHERE id IN (SELECT id FROM entry INDEXED BY entry_rank "
                f"WHERE rank = {PINNED} AND key >= ? AND key < ? AND NOT EXISTS(SELECT 1 FROM pin "
                "WHERE entry.key >= low AND entry.key < high AND (until IS NULL OR until > ?)) LIMIT ?)",
                (low, high, now, limit),
            ).rowcount
            if released >= limit:
                return True
            self._do("DELETE FROM pin WHERE name = ? AND low = ?", (name, low))
        # the last pin has gone: without the triggers, storing an entry costs what it did before
        if self._do("SELECT 1 FROM pin").fetchone() is None:
            for what in _NAMES:
                self._do(f"DROP {what}")
        return False

    def release_ended(self) -> None:
        """Release some entries of pins that have ended, if there was no look for them lately."""
        if time.monotonic() >= self._looked + _EVERY and not self.release(_AT_ONCE):
            self._looked = time.monotonic()

    def surplus(self) -> int:
        """The bytes by which the pinned entries exceed their share, for example after the bound was lowered."""
        if not self.is_made:
            return 0
        query = "SELECT pinned.bytes - CAST(pinned.share * total.max_size AS INTEGER) FROM pinned, total"
        (size,) = self._do(query).fetchone()
        return max(0, size or 0)

    def mend(self) -> bool:
        """Correct the number and bytes of the pinned entries; returns whether they were wrong."""
        if not self.is_made:
            return False
        sums = f"SELECT count(*), coalesce(sum(size), 0) FROM entry WHERE rank = {PINNED}"
        count, size = self._do(sums).fetchone()
        update = "UPDATE pinned SET n = ?, bytes = ? WHERE n != ? OR bytes != ?"
        return self._do(update, (count, size, count, size)).rowcount > 0

    def rows(self) -> list[PinRow]:
        """All rows of the pins."""
        return rows_of(self._connection)

    def restore(self, rows: Sequence[PinRow]) -> None:
        """Pin again, in a new index."""
        for row in rows:
            self.add(row.name, [(row.low, row.high)], row.until)
        for row in rows:
            while (low := self.mark(row.low, row.high, _AT_ONCE)) is not None:
                row = row._replace(low=low)


def is_made(connection: sqlite3.Connection) -> bool:
    """Whether an index has the tables of the pins."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'pinned'").fetchone() is not None


def rows_of(connection: sqlite3.Connection) -> list[PinRow]:
    """All rows of the pins that have not ended, without changing the index."""
    if not is_made(connection):
        return []
    query = "SELECT name, low, high, until FROM pin WHERE until IS NULL OR until > ? ORDER BY name, low"
    return [PinRow(*row) for row in connection.execute(query, (time.time_ns(),))]


def usage_of(connection: sqlite3.Connection) -> tuple[int, int]:
    """Number and bytes of the pinned entries."""
    if not is_made(connection):
        return 0, 0
    count, size = connection.execute("SELECT n, bytes FROM pinned").fetchone()
    return count, size
