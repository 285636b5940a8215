"""What the index remembers for a policy: uses of watched keys, ghosts of entries that left, and what was learned.

A key is known here by 62 bits of its hash. A ghost is a row without a file: it counts in no total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from xzcache.model import Entry


_SLICES: Final = 32
"""In how many steps all ghosts are looked at for old ones."""
_HASHES: Final = 1 << 62
_NEXT_GAP: Final = (
    "CASE WHEN tick = 0 THEN 0 WHEN gap = 0 THEN max(1, ?2 - tick) ELSE max(1, gap + (?2 - tick - gap) / 4) END"
)
_IS: Final = "key = ?3 AND start = ?4 AND stop = ?5"
BIRTH: Final = (
    "(SELECT tick + 1 FROM total), coalesce((SELECT max(1, CASE WHEN gap = 0 THEN total.tick + 1 - ghost.tick "
    "ELSE gap + (total.tick + 1 - ghost.tick - gap) / 4 END) FROM ghost, total WHERE key = ?), 0)"
)
"""Tick and gap of an entry that comes, given its hash: as `_NEXT_GAP`, after what its ghost has."""


def lot_of(entry: Entry) -> int:
    """The upper 32 bits of `hash_of`: whether a key is watched is asked for each use, so it has to cost little."""
    # the sum of keys that differ in a digit follows a pattern, which the factor breaks
    return crc32(entry.key.encode(), entry.start & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF


def hash_of(entry: Entry) -> int:
    """The number by which the policy knows an entry."""
    return lot_of(entry) << 30 | int.from_bytes(entry.digest()[:4], "little") >> 2


class Learned(NamedTuple):
    """What was learned: which writing of it this is, and the bytes."""

    serial: int
    state: bytes


class History:
    """The past, in one open index; within a section only, as all of the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._do = connection.execute
        self._do_many = connection.executemany

    # -- uses

    def pass_time(self, uses: int) -> tuple[int, int]:
        """Let so many uses pass: the tick before them, and how many entries there are."""
        self._do("UPDATE total SET tick = tick + ?", (uses,))
        tick, entries = self._do("SELECT tick, n FROM total").fetchone()
        return tick - uses, entries

    def now(self) -> int:
        """How many uses there have been, of anything."""
        return int(self._do("SELECT tick FROM total").fetchone()[0])

    def touch(self, uses: Iterable[tuple[int, Entry, int]]) -> None:
        """Record uses: tick, entry, and ns since the epoch."""
        self._do_many(
            f"UPDATE entry SET used = max(used, ?1), gap = {_NEXT_GAP}, tick = ?2 WHERE {_IS}",
            ((used, tick, *entry) for tick, entry, used in uses),
        )

    def hear(self, uses: Iterable[tuple[int, Entry]]) -> None:
        """Keep the latest uses of watched keys, `(hash, entry)`, until somebody learns from them."""
        self._do_many(
            "INSERT OR IGNORE INTO heard(tick, key, size, id) "
            "SELECT tick, ?, size, id FROM entry WHERE key = ? AND start = ? AND stop = ? AND tick > 0",
            ((key, *entry) for key, entry in uses),
        )

    def heard(self, most: int) -> int:
        """How many uses are kept, counted up to a number."""
        return int(self._do("SELECT count(*) FROM (SELECT 1 FROM heard LIMIT ?)", (most,)).fetchone()[0])

    def take_heard(self, most: int) -> list[tuple[int, int, int, int]]:
        """The latest of the uses that were kept, `(tick, hash, size, id)`; none is kept any longer."""
        rows = self._do("SELECT tick, key, size, id FROM heard ORDER BY tick DESC LIMIT ?", (most,)).fetchall()
        self._do("DELETE FROM heard")
        return rows[::-1]

    # -- what was learned

    def learned_serial(self) -> int:
        """Which writing of what was learned is there; 0 where there is none."""
        row = self._do("SELECT serial FROM learned").fetchone()
        return 0 if row is None else int(row[0])

    def learned(self) -> Learned | None:
        row = self._do("SELECT serial, state FROM learned").fetchone()
        return None if row is None else Learned(int(row[0]), bytes(row[1]))

    def set_learned(self, state: bytes) -> int:
        """Keep what was learned; which writing that is."""
        self._do(
            "INSERT INTO learned(one, serial, state) VALUES(1, 1, ?1) "
            "ON CONFLICT DO UPDATE SET serial = serial + 1, state = ?1",
            (state,),
        )
        return self.learned_serial()

    # -- who leaves next

    def entries_from(self, id_: int, over: int, most: int) -> list[tuple[int, int, int]]:
        """`(id, tick, gap)` of the first entries whose ids are not below one, after passing over some."""
        statement = "SELECT id, tick, gap FROM entry WHERE id >= ? ORDER BY id LIMIT ? OFFSET ?"
        return self._do(statement, (id_, most, over)).fetchall()

    def present(self, ids: Sequence[int]) -> list[int]:
        """Those of some ids that are of entries."""
        places = ", ".join("?" * len(ids))
        return [id_ for (id_,) in self._do(f"SELECT id FROM entry WHERE id IN ({places})", ids)]

    def last_id(self) -> int:
        """The greatest id; 0 where there is no entry."""
        return max(0, self._do("SELECT max(id) FROM entry").fetchone()[0] or 0)

    # -- ghosts

    def add_ghosts(self, leaving: Iterable[tuple[Entry, int]]) -> None:
        """Remember entries, `(entry, id)`, that are about to leave."""
        self._do_many(
            "INSERT OR REPLACE INTO ghost(key, tick, gap) SELECT ?, tick, gap FROM entry WHERE id = ? AND tick > 0",
            [(hash_of(entry), id_) for entry, id_ in leaving],
        )

    def forget_ghosts(self, before: int, turn: int) -> None:
        """Forget those of one slice of all ghosts that were last used before a tick."""
        width = _HASHES // _SLICES
        low = turn % _SLICES * width
        self._do("DELETE FROM ghost WHERE key >= ? AND key < ? AND tick < ?", (low, low + width, before))

    def ghosts(self) -> int:
        return int(self._do("SELECT count(*) FROM ghost").fetchone()[0])
