"""What the index remembers for a policy: uses of watched keys, ghosts of entries that left, and what was learned.

A key is known here by 62 bits of its hash. A ghost is a row without a file: it counts in no total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from xzcache._keys import Entry

_SLICES: Final = 32
"""In how many steps all ghosts are looked at for old ones."""
_HASHES: Final = 1 << 62
_NEXT_GAP: Final = (
    "CASE WHEN tick = 0 THEN 0 WHEN gap = 0 THEN max(1, ?2 - tick) ELSE max(1, gap + (?2 - tick - gap) / 4) END"
)
_IS: Final = "key = ?3 AND start = ?4 AND stop = ?5"


def hash_of(entry: Entry) -> int:
    """The number by which the policy knows an entry."""
    return int.from_bytes(entry.digest()[:8], "little") % _HASHES


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

    def arrive(self, tick: int, entry: Entry, key: int) -> None:
        """Record that an entry has come, and what is known of it from when it was here before."""
        ghost, gap = self._do("SELECT tick, gap FROM ghost WHERE key = ?", (key,)).fetchone(), 0
        if ghost is not None:
            last, gap = ghost
            gap = max(1, gap + (tick - last - gap) // 4 if gap else tick - last)
        self._do(f"UPDATE entry SET tick = ?1, gap = ?2 WHERE {_IS}", (tick, gap, *entry))

    def hear(self, uses: Iterable[tuple[int, int, Entry]]) -> None:
        """Keep uses of watched keys, `(tick, hash, entry)`, until somebody learns from them."""
        self._do_many(
            f"INSERT OR IGNORE INTO heard(tick, key, size) SELECT ?1, ?2, size FROM entry WHERE {_IS}",
            ((tick, key, *entry) for tick, key, entry in uses),
        )

    def take_heard(self) -> list[tuple[int, int, int]]:
        """The uses that were kept, `(tick, hash, size)`; they are not kept any longer."""
        rows = self._do("SELECT tick, key, size FROM heard ORDER BY tick").fetchall()
        self._do("DELETE FROM heard")
        return rows

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

    def some_entries(self, most: int, places: Sequence[float]) -> list[tuple[int, int, int]]:
        """`(id, tick, gap)` of all entries; of more than `most`, runs from some places, numbers below 1.

        Runs may overlap: then what they have in common is there twice.
        """
        columns = "SELECT id, tick, gap FROM entry"
        last, count = self._do("SELECT (SELECT max(id) FROM entry), n FROM total").fetchone()
        if count <= most:
            return self._do(columns).fetchall()
        rows: list[tuple[int, int, int]] = []
        for place in places:
            begin, run = int(place * last), most // len(places)
            rows += self._do(f"{columns} WHERE id >= ? ORDER BY id LIMIT ?", (begin, run)).fetchall()
        return rows

    def let_leave(self, ids: Sequence[int], tick: int) -> None:
        """Rank entries before all others, in this order, unless they are used after a tick."""
        self._do_many("UPDATE entry SET rank = ? WHERE id = ?", [(n - len(ids), id_) for n, id_ in enumerate(ids)])
        self._do("UPDATE learned SET chosen = ?", (tick,))

    def chosen(self) -> int:
        """The tick at which entries were last ranked before all others."""
        row = self._do("SELECT chosen FROM learned").fetchone()
        return 0 if row is None else int(row[0])

    # -- ghosts

    def bury(self, leaving: Iterable[tuple[Entry, int]]) -> None:
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
