"""The history that a policy learns from: uses of watched keys, ghosts of evicted entries, and the learned state.

A key is identified by 62 bits of its hash. A ghost is a row without a file; no total counts it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

from xzcache.index._pins import PINNED

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from xzcache.model import Entry


# a scan of all ghosts at once would keep the guard for too long
_GHOSTS_FOR_EACH: Final = 20
"""How many ghosts are looked at for each new one: more than there are at most for each entry of the cache."""
_MOST: Final = 1 << 62
_NEXT_GAP: Final = (
    "CASE WHEN tick = 0 THEN 0 WHEN gap = 0 THEN max(1, ? - tick) ELSE max(1, gap + (? - tick - gap) / 4) END"
)
BIRTH: Final = (
    "(SELECT tick + 1 FROM total), coalesce((SELECT max(1, CASE WHEN gap = 0 THEN total.tick + 1 - ghost.tick "
    "ELSE gap + (total.tick + 1 - ghost.tick - gap) / 4 END) FROM ghost, total WHERE key = ?), 0)"
)
"""SQL for the tick and gap of a new entry, given its hash; continues from the entry's ghost, as `_NEXT_GAP`."""


def lot_of(entry: Entry) -> int:
    """The upper 32 bits of `hash_of`: whether a key is watched is asked for each use, so it has to cost little."""
    # the sum of keys that differ in a digit follows a pattern, which the factor breaks
    return crc32(entry.key.encode(), entry.start & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF


def hash_of(entry: Entry) -> int:
    """The number that identifies an entry to the policy."""
    return lot_of(entry) << 30 | int.from_bytes(entry.digest()[:4], "little") >> 2


class Learned(NamedTuple):
    """The learned state of a policy, and the serial number of its last write."""

    serial: int
    state: bytes


class History:
    """The past, in one open index; within a section only, as all of the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._do = connection.execute
        self._do_many = connection.executemany
        # each process begins somewhere else
        self._at = secrets.randbits(62)

    # -- uses

    def pass_time(self, uses: int) -> tuple[int, int]:
        """Advance the tick by a number of uses; returns the old tick and the number of entries."""
        self._do("UPDATE total SET tick = tick + ?", (uses,))
        tick, entries = self._do("SELECT tick, n FROM total").fetchone()
        return tick - uses, entries

    def now(self) -> int:
        """The current tick: the number of uses so far, of any entry."""
        return int(self._do("SELECT tick FROM total").fetchone()[0])

    def touch(self, uses: Iterable[tuple[int, Entry, int]]) -> None:
        """Record uses: tick, entry, and ns since the epoch."""
        self._do_many(
            f"UPDATE entry SET used = max(used, ?), gap = {_NEXT_GAP}, tick = ? "
            "WHERE key = ? AND start = ? AND stop = ?",
            ((used, tick, tick, tick, *entry) for tick, entry, used in uses),
        )

    def queue_uses(self, uses: Iterable[tuple[int, Entry]]) -> None:
        """Queue uses of watched keys, `(hash, entry)`, until a process learns from them."""
        self._do_many(
            "INSERT OR IGNORE INTO heard(tick, key, size, id) "
            "SELECT tick, ?, size, id FROM entry WHERE key = ? AND start = ? AND stop = ? AND tick > 0",
            ((key, *entry) for key, entry in uses),
        )

    def queued_uses(self, most: int) -> int:
        """The number of queued uses, counted up to `most`."""
        return int(self._do("SELECT count(*) FROM (SELECT 1 FROM heard LIMIT ?)", (most,)).fetchone()[0])

    def take_queued(self, most: int) -> list[tuple[int, int, int, int]]:
        """Take the latest queued uses, latest first: `(tick, hash, size, id)`."""
        # the latest ones: after a pause, older uses are of no help in learning what comes next
        rows = self._do("SELECT tick, key, size, id FROM heard ORDER BY tick DESC LIMIT ?", (most,)).fetchall()
        if rows:
            self._do("DELETE FROM heard WHERE tick >= ?", (rows[-1][0],))
        return rows

    def drop_queued(self) -> None:
        """Delete all queued uses."""
        self._do("DELETE FROM heard")

    # -- the learned state

    def learned_serial(self) -> int:
        """The serial number of the learned state; 0 if there is none."""
        row = self._do("SELECT serial FROM learned").fetchone()
        return 0 if row is None else int(row[0])

    def learned(self) -> Learned | None:
        row = self._do("SELECT serial, state FROM learned").fetchone()
        return None if row is None else Learned(int(row[0]), bytes(row[1]))

    def set_learned(self, state: bytes) -> int:
        """Store the learned state; returns its serial number."""
        self._do(
            "INSERT INTO learned(one, serial, state) VALUES(1, 1, ?) "
            "ON CONFLICT DO UPDATE SET serial = serial + 1, state = excluded.state",
            (state,),
        )
        return self.learned_serial()

    # -- eviction candidates

    def entries_from(self, id_: int, over: int, most: int) -> list[tuple[int, int, int]]:
        """`(id, tick, gap)` of entries in the order of their ids, from an id on, after skipping some.

        Of the `most` entries, pinned ones are left out.
        """
        window = "SELECT id, tick, gap, rank FROM entry WHERE id >= ? ORDER BY id LIMIT ? OFFSET ?"
        statement = f"SELECT id, tick, gap FROM ({window}) WHERE rank < {PINNED}"
        return self._do(statement, (id_, most, over)).fetchall()

    def present(self, ids: Sequence[int]) -> list[int]:
        """The ids that still belong to an entry."""
        places = ", ".join("?" * len(ids))
        return [id_ for (id_,) in self._do(f"SELECT id FROM entry WHERE id IN ({places})", ids)]

    def last_id(self) -> int:
        """The greatest id; 0 where there is no entry."""
        return max(0, self._do("SELECT max(id) FROM entry").fetchone()[0] or 0)

    # -- ghosts

    def add_ghosts(self, leaving: Iterable[tuple[Entry, int]]) -> None:
        """Record ghosts of entries, `(entry, id)`, before they are evicted."""
        self._do_many(
            "INSERT OR REPLACE INTO ghost(key, tick, gap) SELECT ?, tick, gap FROM entry WHERE id = ? AND tick > 0",
            [(hash_of(entry), id_) for entry, id_ in leaving],
        )

    def forget_ghosts(self, before: int, come: int) -> None:
        """Delete the ghosts that were last used before a tick, of the next few, given how many new ones have come."""
        if before <= 0:
            return
        query = "SELECT key FROM ghost WHERE key > ? ORDER BY key LIMIT 1 OFFSET ?"
        last = self._do(query, (self._at, _GHOSTS_FOR_EACH * come)).fetchone()
        # at the end, the next call goes on from the first one
        end = _MOST if last is None else last[0]
        self._do("DELETE FROM ghost WHERE key > ? AND key <= ? AND tick < ?", (self._at, end, before))
        self._at = -1 if last is None else end

    def ghosts(self) -> int:
        return int(self._do("SELECT count(*) FROM ghost").fetchone()[0])
