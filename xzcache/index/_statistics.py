"""The statistics that last: reads by source and time, prices of sources, and a sample of the uses.

The first process with something to report creates the tables. Older processes of the same format ignore them, so one
index serves both. The tables hold no entry, and no total depends on them.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from operator import add, sub
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping, Sequence

HOUR: Final = 3600
DAY: Final = 86_400
_OF_HOURS, _OF_DAYS, _OF_MONTHS = range(3)
_HOURS_KEPT: Final = DAY
_DAYS_KEPT: Final = 90 * DAY
# the table must not grow with every source that was ever read
_MOST_SOURCES: Final = 1000
"""The most sources with rows of their own; the least recently read ones are added up in `OTHERS`."""
OTHERS: Final = 0
"""The number of all sources that have no rows of their own; SQLite numbers namespaces from 1."""

SAMPLED: Final = struct.Struct("<qIII")
"""A sampled use: its time in ns since the epoch; `lot_of` the entry; the size in bytes, 0 if unknown; and the
microseconds since the first use of the entry after the last report of the same process."""
USES: Final = np.dtype([("at", "<i8"), ("key", "<u4"), ("size", "<u4"), ("span", "<u4")])
"""The numpy type of packed sampled uses."""
MOST_USES: Final = 1 << 16
"""The sampled uses that are kept, the latest: 20 bytes each."""
_NOT_WHOLE: Final = 1 << 40
"""The first number of uses in a cache that had entries before there were statistics."""
_MOST_GONE: Final = 1 << 16
_MOST_PROCESSES: Final = 4096

_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS stat(
  unit INTEGER NOT NULL, time INTEGER NOT NULL, ns INTEGER NOT NULL, hits INTEGER NOT NULL, misses INTEGER NOT NULL,
  cached INTEGER NOT NULL, fetched INTEGER NOT NULL, saved REAL NOT NULL, evicted INTEGER NOT NULL,
  evicted_size INTEGER NOT NULL, again INTEGER NOT NULL, again_size INTEGER NOT NULL,
  PRIMARY KEY(unit, time, ns)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS price(ns INTEGER PRIMARY KEY, sums TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS lately(one INTEGER PRIMARY KEY CHECK(one = 1), saved TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS sample("
    "id INTEGER PRIMARY KEY, shift INTEGER NOT NULL, reads INTEGER NOT NULL, unstored INTEGER NOT NULL, "
    "repeats INTEGER NOT NULL, uses BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS gone(key INTEGER PRIMARY KEY, at INTEGER NOT NULL)",
)
# a table of its own, made with the first name: caches of older versions do not have it
_TABLE_OF_PROCESSES: Final = (
    "CREATE TABLE IF NOT EXISTS process(id TEXT PRIMARY KEY, at INTEGER NOT NULL, counts TEXT NOT NULL)"
)
# so has this one, made with the first read from another node
_TABLE_OF_PEERS: Final = """CREATE TABLE IF NOT EXISTS peer(
  unit INTEGER NOT NULL, time INTEGER NOT NULL, ns INTEGER NOT NULL, given INTEGER NOT NULL, passed INTEGER NOT NULL,
  PRIMARY KEY(unit, time, ns)) WITHOUT ROWID"""
_COLUMNS: Final = {
    "stat": ("hits", "misses", "cached", "fetched", "saved", "evicted", "evicted_size", "again", "again_size"),
    "peer": ("given", "passed"),
}
"""The tables that reads are counted in, with columns that together are those of `Counts`, in its order."""
_OF_STAT: Final = len(_COLUMNS["stat"])


class Counts(NamedTuple):
    """What was read through a cache; sizes in bytes.

    `refetched` are entries that were evicted and then fetched again; in a cache of more than 4096 entries, their number
    is estimated from a sample.
    """

    hits: int = 0
    misses: int = 0
    bytes_from_cache: int = 0
    bytes_from_source: int = 0
    seconds_saved: float = 0.0
    evictions: int = 0
    evicted_size: int = 0
    refetched: int = 0
    refetched_size: int = 0
    peer_hits: int = 0
    bytes_from_peers: int = 0

    @property
    def reads(self) -> int:
        """Hits, reads that the cache of another node answered, and misses."""
        return self.hits + self.peer_hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """The part of all reads that a cache answered, of this node or of another one; None without reads."""
        return (self.hits + self.peer_hits) / self.reads if self.reads else None

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(*map(add, self, other))

    def minus(self, other: Counts) -> Counts:
        """The difference of both."""
        return Counts(*map(sub, self, other))


class UsesRow(NamedTuple):
    """The sampled uses of one report, packed as `SAMPLED`; one key of ``2**shift`` is sampled.

    `reads` are all reads of the process since its report before, `unstored` how many more misses there were than new
    entries, and `repeats` how many more hits than used entries.
    """

    number: int
    """How many uses there are up to this one."""
    shift: int
    reads: int
    unstored: int
    repeats: int
    uses: bytes


class Statistics:
    """The statistics in one open index; within a section only, as all of the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._do = connection.execute
        self._do_many = connection.executemany
        self._is_made = False
        self._has_processes = False
        self._compacted = -1
        self._gone = 0

    def make(self, arrived: int) -> None:
        """Create the tables, unless they are there; `arrived` entries are of this transaction."""
        if self._is_made:
            return
        # `gone` is the last table of the list, so with it all are there
        if not _has(self._do, "gone"):
            for statement in _TABLES:
                self._do(statement)
            (entries,) = self._do("SELECT n FROM total").fetchone()
            # a row without uses
            first = 0 if entries <= arrived else _NOT_WHOLE
            self._do("INSERT INTO sample VALUES(?, 0, 0, 0, 0, x'')", (first,))
        self._is_made = True

    def forget_uncommitted(self) -> None:
        """Forget tables that a rolled back transaction may have created."""
        self._is_made = self._has_processes = False

    # -- reads

    def add(self, now: int, counts: Mapping[int, Counts]) -> None:
        """Add counts of sources, by their number, at a time in seconds since the epoch."""
        hour = now - now % HOUR
        rows = {"stat": [(_OF_HOURS, hour, source, *count[:_OF_STAT]) for source, count in counts.items()]}
        if any(count.peer_hits for count in counts.values()):
            self._do(_TABLE_OF_PEERS)
            rows["peer"] = [(_OF_HOURS, hour, source, *count[_OF_STAT:]) for source, count in counts.items()]
        for table, some in rows.items():
            marks = ", ".join("?" for _ in _COLUMNS[table])
            self._do_many(f"INSERT INTO {table} VALUES(?, ?, ?, {marks}) {_added(table)}", some)
        # once an hour in each process is enough, and keeps the scan out of ordinary reports
        if hour != self._compacted:
            self._compacted = hour
            self._compact(now)

    def _compact(self, now: int) -> None:
        """Add up old hours by day, old days by month, and old sources."""
        today = now - now % DAY
        tables = [table for table in _COLUMNS if _has(self._do, table)]
        month = "CAST(strftime('%s', time, 'unixepoch', 'start of month') AS INTEGER)"
        for unit, coarser, start, before in (
            (_OF_HOURS, _OF_DAYS, f"time - time % {DAY}", today - _HOURS_KEPT),
            (_OF_DAYS, _OF_MONTHS, month, today - _DAYS_KEPT),
        ):
            if self._do("SELECT 1 FROM stat WHERE unit = ? AND time < ? LIMIT 1", (unit, before)).fetchone():
                for table in tables:
                    self._do(
                        f"INSERT INTO {table} SELECT {coarser}, {start}, ns, {_sums(table)} FROM {table} "
                        f"WHERE unit = ? AND time < ? GROUP BY 2, 3 {_added(table)}",
                        (unit, before),
                    )
                    self._do(f"DELETE FROM {table} WHERE unit = ? AND time < ?", (unit, before))
        old = self._do(
            "SELECT ns FROM stat WHERE ns != ? GROUP BY ns ORDER BY max(time) DESC LIMIT -1 OFFSET ?",
            (OTHERS, _MOST_SOURCES),
        ).fetchall()
        for (source,) in old:
            for table in tables:
                self._do(
                    f"INSERT INTO {table} SELECT unit, time, {OTHERS}, {_sums(table)} FROM {table} WHERE ns = ? "
                    f"GROUP BY 1, 2 {_added(table)}",
                    (source,),
                )
                self._do(f"DELETE FROM {table} WHERE ns = ?", (source,))
            self._do("DELETE FROM price WHERE ns = ?", (source,))

    def ever(self) -> Counts:
        """The sums of all sources, of all time."""
        if not _has(self._do, "stat"):
            return Counts()
        sums = self._do(f"SELECT {_sums(*_COLUMNS)} FROM {_all_rows(self._do)}").fetchone()
        return Counts() if sums[0] is None else _counts(sums)

    # -- the counts of processes

    def set_process(self, name: str, now: int, counts: Counts) -> None:
        """Store the counts of a process up to now, under its name."""
        if not self._has_processes:
            self._do(_TABLE_OF_PROCESSES)
            self._do(
                "DELETE FROM process WHERE id IN (SELECT id FROM process ORDER BY at DESC LIMIT -1 OFFSET ?)",
                (_MOST_PROCESSES,),
            )
            self._has_processes = True
        self._do("INSERT OR REPLACE INTO process VALUES(?, ?, ?)", (name, now, json.dumps(counts)))

    def processes(self, names: Iterable[str]) -> dict[str, Counts]:
        """The counts of processes at their last reports, by name."""
        if not _has(self._do, "process"):
            return {}
        found = {}
        for name in names:
            numbers = _numbers(self._do("SELECT counts FROM process WHERE id = ?", (name,)).fetchone())
            # an older release counts fewer things
            if numbers is not None and _OF_STAT <= len(numbers) <= len(Counts._fields):
                found[name] = _counts(numbers)
        return found

    # -- prices

    def prices(self, source: int) -> list[float] | None:
        """The sums from which the price of a read from a source is estimated; None if there are none."""
        return _numbers(self._do("SELECT sums FROM price WHERE ns = ?", (source,)).fetchone())

    def set_prices(self, source: int, sums: Sequence[float]) -> None:
        self._do("INSERT OR REPLACE INTO price(ns, sums) VALUES(?, ?)", (source, json.dumps(sums)))

    def lately_saved(self) -> list[float]:
        """The seconds that were saved lately, as `set_lately_saved` stored them."""
        return _numbers(self._do("SELECT saved FROM lately").fetchone()) or []

    def set_lately_saved(self, numbers: Sequence[float]) -> None:
        self._do("INSERT OR REPLACE INTO lately(one, saved) VALUES(1, ?)", (json.dumps(numbers),))

    # -- the sample

    def add_uses(self, row: UsesRow) -> None:
        """Add sampled uses; the row gets another number."""
        (last,) = self._do("SELECT max(id) FROM sample").fetchone()
        # the number of a row is that of its last use, so that the numbers tell how many there are
        number = (last or 0) + max(1, len(row.uses) // SAMPLED.size)
        self._do("INSERT INTO sample VALUES(?, ?, ?, ?, ?, ?)", (number, *row[1:]))
        (first,) = self._do("SELECT min(id) FROM sample").fetchone()
        # an eighth more than is kept, so that few reports delete rows
        if number - first > MOST_USES * 9 // 8:
            self._do("DELETE FROM sample WHERE id <= ?", (number - MOST_USES,))

    def add_gone(self, key: int, at: int) -> None:
        """Record that a sampled entry was evicted."""
        self._do("INSERT OR REPLACE INTO gone(key, at) VALUES(?, ?)", (key, at))
        self._gone -= 1
        if self._gone < 0:
            # counted only now and then, because it scans the table
            self._gone = _MOST_GONE // 8
            (surplus,) = self._do("SELECT count(*) - ? FROM gone", (_MOST_GONE,)).fetchone()
            if surplus > 0:
                self._do("DELETE FROM gone WHERE key IN (SELECT key FROM gone ORDER BY at LIMIT ?)", (surplus,))

    def take_gone(self, key: int) -> bool:
        """Whether a sampled entry was evicted before; forgets that eviction."""
        return self._do("DELETE FROM gone WHERE key = ?", (key,)).rowcount > 0


def _sums(*tables: str) -> str:
    return ", ".join(f"sum({column})" for table in tables for column in _COLUMNS[table])


def _added(table: str) -> str:
    """The end of an INSERT that adds to a row that is there."""
    return f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _COLUMNS[table])}"


def _all_rows(do: Callable[..., sqlite3.Cursor]) -> str:
    """The rows of both tables, as one with the columns of both."""
    given = ", ".join(_COLUMNS["peer"])
    nothing = ", ".join("0" for _ in _COLUMNS["stat"])
    more = f"UNION ALL SELECT unit, time, ns, {nothing}, {given} FROM peer" if _has(do, "peer") else ""
    return f"(SELECT *, {', '.join(f'0 AS {name}' for name in _COLUMNS['peer'])} FROM stat {more}) AS stat"


def _has(do: Callable[..., sqlite3.Cursor], table: str) -> bool:
    return do("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


def _numbers(row: tuple[str] | None) -> list[float] | None:
    """A list of numbers; None where there is none, or garbage."""
    if row is not None:
        with suppress(ValueError, TypeError):
            return [float(number) for number in json.loads(row[0])]
    return None


class Looked(NamedTuple):
    """The statistics as an `Inspector` finds them: of sources by name, the others under an empty one."""

    of_sources: dict[str, Counts]
    of_the_day: dict[str, Counts]
    """Of the last 24 hours."""
    since: int | None
    """The beginning of the first hour, day or month, in seconds since the epoch."""


def is_whole(rows: Sequence[UsesRow]) -> bool:
    """Whether a sample begins with the first use of a cache."""
    return bool(rows) and rows[0].number == 0


def look(index: sqlite3.Connection, now: int) -> Looked:
    """The sums by source, of all time and of the last day."""
    if not _is_there(index):
        return Looked({}, {}, None)
    (since,) = index.execute("SELECT min(time) FROM stat").fetchone()
    return Looked(_by_name(index, ""), _by_name(index, f"WHERE unit = {_OF_HOURS} AND time > {now - DAY}"), since)


def by_day(index: sqlite3.Connection, now: int) -> dict[int, dict[str, Counts]]:
    """By the beginning of each of the last 90 days (UTC), the counts of each source."""
    found: dict[int, dict[str, Counts]] = {}
    if _is_there(index):
        query = (
            f"SELECT time - time % {DAY}, ns.name, {_sums(*_COLUMNS)} FROM {_all_rows(index.execute)} "
            f"LEFT JOIN ns ON ns.id = stat.ns WHERE unit IN ({_OF_HOURS}, {_OF_DAYS}) AND time > ? "
            "GROUP BY 1, stat.ns ORDER BY 1"
        )
        for day, name, *sums in index.execute(query, (now - _DAYS_KEPT,)):
            of_day = found.setdefault(day, {})
            of_day[name or ""] = of_day.get(name or "", Counts()).plus(_counts(sums))
    return found


def sampled(index: sqlite3.Connection) -> list[UsesRow]:
    """The sampled uses, oldest first."""
    if not _is_there(index):
        return []
    kinds = (int, int, int, int, int, bytes)
    rows = index.execute("SELECT * FROM sample ORDER BY id")
    # garbage is left out: the sample holds no entry
    return [UsesRow(*row) for row in rows if all(map(isinstance, row, kinds))]


def _is_there(index: sqlite3.Connection) -> bool:
    return _has(index.execute, "gone")


def _by_name(index: sqlite3.Connection, where: str) -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    query = (
        f"SELECT ns.name, {_sums(*_COLUMNS)} FROM {_all_rows(index.execute)} LEFT JOIN ns ON ns.id = stat.ns {where} "
        "GROUP BY stat.ns"
    )
    for name, *sums in index.execute(query):
        found[name or ""] = found.get(name or "", Counts()).plus(_counts(sums))
    return found


def _counts(sums: Iterable[float]) -> Counts:
    """Counts of sums, which are no whole numbers where garbage was added."""
    pairs = zip(Counts._fields, sums, strict=False)
    values = [value if field == "seconds_saved" else int(value) for field, value in pairs]
    return Counts._make([*values, *Counts()[len(values) :]])
