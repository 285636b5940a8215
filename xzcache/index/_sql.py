"""All SQL statements on the index.

An `Index` is one connection to one SQLite file. It takes no lock: the caller must hold the guard.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache.index._history import BIRTH, History, hash_of
from xzcache.index._pins import PINNED, PinRow, Pins, rows_of
from xzcache.index._statistics import Statistics
from xzcache.model import Damaged, Entry, is_document, namespace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


# -- The tables of the index, and their rows.
#
# Triggers keep the totals in the transaction that changes the rows, so they cannot drift. Time is counted in ticks: one
# for each new entry, and one for each use that the adaptive policy records.

VERSION: Final = 5

_HEARD: Final = """
CREATE TABLE heard(
  tick INTEGER PRIMARY KEY, key INTEGER NOT NULL, size INTEGER NOT NULL, id INTEGER NOT NULL);
"""

_ABSENT: Final = """
CREATE TABLE absent(key TEXT PRIMARY KEY, noted REAL NOT NULL, ticket INTEGER NOT NULL) WITHOUT ROWID;
"""

_OF_THE_PAST: Final = f"""{_HEARD}
CREATE TABLE ghost(key INTEGER PRIMARY KEY, tick INTEGER NOT NULL, gap INTEGER NOT NULL);
CREATE TABLE learned(
  one INTEGER PRIMARY KEY CHECK(one = 1), serial INTEGER NOT NULL, state BLOB NOT NULL);
"""

_ENTRY_COMES: Final = """
CREATE TRIGGER entry_comes AFTER INSERT ON entry BEGIN
  UPDATE total SET n = n + 1, bytes = bytes + NEW.size, serial = serial + 1, tick = tick + 1;
  UPDATE ns SET n = n + 1, bytes = bytes + NEW.size WHERE id = NEW.ns; END;
"""

SCHEMA: Final = f"""{_OF_THE_PAST}
CREATE TABLE ns(
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, n INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE entry(
  id INTEGER PRIMARY KEY, ns INTEGER NOT NULL, key TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  odd INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, used INTEGER NOT NULL, rank INTEGER NOT NULL,
  owner INTEGER NOT NULL, seq INTEGER NOT NULL, tick INTEGER NOT NULL DEFAULT 0, gap INTEGER NOT NULL DEFAULT 0,
  UNIQUE(key, start, stop));
CREATE INDEX entry_rank ON entry(rank);
CREATE INDEX entry_odd ON entry(key) WHERE odd = 1;
CREATE TABLE dying(
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  odd INTEGER NOT NULL, size INTEGER NOT NULL, owner INTEGER NOT NULL);
CREATE TABLE owner(
  id INTEGER PRIMARY KEY AUTOINCREMENT, lease INTEGER NOT NULL DEFAULT 0 CHECK(lease >= 0), pid INTEGER NOT NULL);
CREATE TABLE node(path TEXT PRIMARY KEY, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE seen(document TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE writing(id INTEGER PRIMARY KEY, key TEXT NOT NULL, beneath INTEGER NOT NULL, owner INTEGER NOT NULL);
{_ABSENT}CREATE TABLE total(
  one INTEGER PRIMARY KEY CHECK(one = 1), n INTEGER NOT NULL, bytes INTEGER NOT NULL, lease INTEGER NOT NULL,
  dying INTEGER NOT NULL, max_size INTEGER, serial INTEGER NOT NULL, tick INTEGER NOT NULL DEFAULT 0);
INSERT INTO total VALUES(1, 0, 0, 0, 0, NULL, 0, 0);{_ENTRY_COMES}CREATE TRIGGER entry_goes AFTER DELETE ON entry BEGIN
  UPDATE total SET n = n - 1, bytes = bytes - OLD.size, serial = serial + 1;
  UPDATE ns SET n = n - 1, bytes = bytes - OLD.size WHERE id = OLD.ns; END;
CREATE TRIGGER dying_comes AFTER INSERT ON dying BEGIN UPDATE total SET dying = dying + NEW.size; END;
CREATE TRIGGER dying_goes AFTER DELETE ON dying BEGIN UPDATE total SET dying = dying - OLD.size; END;
CREATE TRIGGER lease_changes AFTER UPDATE OF lease ON owner BEGIN
  UPDATE total SET lease = lease + NEW.lease - OLD.lease; END;
CREATE TRIGGER lease_goes AFTER DELETE ON owner BEGIN UPDATE total SET lease = lease - OLD.lease; END;
"""

_WITHOUT_PIECES: Final = f"""DROP TABLE absent;{_ABSENT}
INSERT INTO dying(key, start, stop, odd, size, owner)
  SELECT key, start, stop, odd, size, -1 FROM entry WHERE start != 0 OR stop != -1;
DELETE FROM entry WHERE start != 0 OR stop != -1;
"""
"""Byte ranges are not kept in an upgrade: their length and their state are not certain."""

UPGRADES: Final = {
    2: f"""{_OF_THE_PAST}
ALTER TABLE entry ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entry ADD COLUMN gap INTEGER NOT NULL DEFAULT 0;
ALTER TABLE total ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
DROP TRIGGER entry_comes;{_ENTRY_COMES}{_WITHOUT_PIECES}""",
    3: f"""DELETE FROM ghost; DROP TABLE heard;{_HEARD}DROP TRIGGER entry_comes;{_ENTRY_COMES}{_WITHOUT_PIECES}""",
    4: _WITHOUT_PIECES,
}
"""SQL that upgrades an index, by its old version."""


class Totals(NamedTuple):
    """The totals of a directory; sizes in bytes."""

    entries: int
    size: int
    lease: int
    tombstones: int
    max_size: int | None

    @property
    def room(self) -> int | None:
        """Bytes that may still be promised (negative after the bound was lowered); None where there is no bound."""
        return None if self.max_size is None else self.max_size - self.size - self.lease - self.tombstones


class Row(NamedTuple):
    """The row of an entry in the index."""

    id: int
    entry: Entry
    hashed: bool
    size: int
    crc: int
    used: int
    rank: int
    owner: int
    seq: int
    tick: int

    @property
    def is_pinned(self) -> bool:
        """Whether the entry is passed over by eviction."""
        return self.rank >= PINNED


class Tombstone(NamedTuple):
    """A file that has left the index, and whose size is still counted."""

    id: int
    entry: Entry
    hashed: bool
    size: int
    is_unlinked: bool = False


# -- The small tables of the index: metadata fingerprints, writes under way and the negative cache.


_UNKNOWN: Final = 0
"""Id and owner of the row for writes whose own rows were lost; no other write and no process has this number."""
_OF_NOBODY: Final = f" WHERE owner != {_UNKNOWN} AND owner NOT IN (SELECT id FROM owner)"


class Writings(NamedTuple):
    """Keys that are being written, and prefixes of keys."""

    keys: set[str]
    prefixes: list[str]

    def concern(self, key: str) -> bool:
        """Whether a key is one of them, or beneath one."""
        return key in self.keys or any(map(key.startswith, self.prefixes))


class Tables:
    """The small tables of one open index; within a section only, as all of the index."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._do = connection.execute
        self._do_many = connection.executemany

    # -- the documents under which the entries of an array were filled

    def node(self, path: str) -> bytes | None:
        row = self._do("SELECT digest FROM node WHERE path = ?", (path,)).fetchone()
        return None if row is None else bytes(row[0])

    def set_node(self, path: str, digest: bytes) -> None:
        self._do("INSERT OR REPLACE INTO node(path, digest) VALUES(?, ?)", (path, digest))

    def seen(self, document: str) -> bytes | None:
        """The fingerprint of a document when the arrays that it describes were cached."""
        row = self._do("SELECT state FROM seen WHERE document = ?", (document,)).fetchone()
        return None if row is None else bytes(row[0])

    def set_seen(self, document: str, state: bytes) -> None:
        self._do("INSERT OR REPLACE INTO seen(document, state) VALUES(?, ?)", (document, state))

    def nodes_beneath(self, prefix: str) -> list[str]:
        """Paths of the nodes beneath a path."""
        where, bounds = range_of(prefix, column="path")
        return [path for (path,) in self._do(f"SELECT path FROM node{where}", bounds)]

    def drop_nodes(self, prefix: str, *, documents: bool = True) -> None:
        """Delete the fingerprints of a node and of all nodes beneath it, and those of their documents."""
        where, bounds = range_of(prefix, column="path")
        self._do(f"DELETE FROM node{where}", bounds)
        self._do("DELETE FROM node WHERE path = ?", (prefix,))
        if documents:
            where, bounds = range_of(prefix, column="document")
            self._do(f"DELETE FROM seen{where}", bounds)

    # -- writes under way

    def add_writing(self, id_: int, key: str, owner: int, *, beneath: bool) -> None:
        """Record that a key, or everything beneath it, is being written; the id must be unique."""
        self._do(
            "INSERT OR REPLACE INTO writing(id, key, beneath, owner) VALUES(?, ?, ?, ?)", (id_, key, beneath, owner)
        )

    def drop_writings(self, ids: Iterable[int]) -> None:
        self._do_many("DELETE FROM writing WHERE id = ?", [(id_,) for id_ in ids])

    def writings(self) -> Writings:
        """The writes under way in all processes."""
        rows = self._do("SELECT key, beneath FROM writing").fetchall()
        # all rows, since there are few of them: the writes of this moment
        prefixes = [f"{key}/" if key else "" for key, beneath in rows if beneath]
        return Writings({key for key, beneath in rows if not beneath}, prefixes)

    def is_written(self, key: str) -> bool:
        """Whether a key, or a prefix of it, is being written."""
        return self.writings().concern(key)

    def writing_of(self, owner: int) -> list[tuple[int, str, bool]]:
        """Ids and keys of an owner's writes, and whether each covers everything beneath the key."""
        rows = self._do("SELECT id, key, beneath FROM writing WHERE owner = ?", (owner,)).fetchall()
        return [(id_, key, bool(beneath)) for id_, key, beneath in rows]

    def writings_of_nobody(self) -> list[str]:
        """Keys and prefixes whose writer has left."""
        return [key for (key,) in self._do(f"SELECT key FROM writing{_OF_NOBODY}")]

    def drop_writings_of_nobody(self) -> None:
        self._do(f"DELETE FROM writing{_OF_NOBODY}")

    def add_unknown_writes(self) -> None:
        """Record that any key may be being written, because the rows of writes under way were lost."""
        self.add_writing(_UNKNOWN, "", _UNKNOWN, beneath=True)

    def has_unknown_writes(self) -> bool:
        return bool(self.writing_of(_UNKNOWN))

    def drop_unknown_writes(self) -> None:
        self.drop_writings([_UNKNOWN])

    # -- the negative cache

    def set_absent(self, key: str, noted: float, version: int) -> None:
        """Record that a key is missing, for as long as its write version has this digest.

        A write that could not use the index has removed no row, but it has changed the version.
        """
        self._do("INSERT OR REPLACE INTO absent(key, noted, ticket) VALUES(?, ?, ?)", (key, noted, version))

    def absent_since(self, key: str, version: int) -> float | None:
        """When a key was recorded as missing; None if it was not, or was written since."""
        row = self._do("SELECT noted FROM absent WHERE key = ? AND ticket = ?", (key, version)).fetchone()
        return None if row is None else float(row[0])

    def absent_beneath(self, prefix: str, after: str, limit: int) -> list[tuple[str, float, int]]:
        """Missing keys beneath a prefix, in order: key, time of the record, and digest of the write version."""
        where, (first, last) = range_of(prefix)
        return self._do(
            f"SELECT key, noted, ticket FROM absent{where} AND key > ? ORDER BY key LIMIT ?",
            (first, last, after, limit),
        ).fetchall()

    def keep_absent(self, most: int) -> None:
        """Delete the oldest rows if there are more than `most`."""
        surplus = self._do("SELECT count(*) FROM absent").fetchone()[0] - most
        if surplus > 0:
            oldest = "SELECT key FROM absent ORDER BY noted LIMIT ?"
            # an eighth more, so that the next records need no deletion
            self._do(f"DELETE FROM absent WHERE key IN ({oldest})", (surplus + most // 8,))

    def drop_absent(self, keys: Iterable[str]) -> None:
        self._do_many("DELETE FROM absent WHERE key = ?", [(key,) for key in keys])

    def drop_absent_beneath(self, prefix: str) -> None:
        where, bounds = range_of(prefix)
        self._do(f"DELETE FROM absent{where}", bounds)


def range_of(prefix: str, column: str = "key") -> tuple[str, tuple[str, ...]]:
    """The SQL condition, and its values, for keys beneath a prefix."""
    # "0" is the character after "/": the two bounds enclose every key that starts with the prefix and a slash
    return (f" WHERE {column} >= ? AND {column} < ?", (prefix + "/", prefix + "0")) if prefix else ("", ())


# -- The index.

logger = logging.getLogger("xzcache.index")

_MAGIC: Final = b"SQLite format 3\0"
# a large transaction enlarges the journal, which stays: it is cut back to this
_LARGEST_JOURNAL: Final = 1 << 20
_PATIENCE: Final = 1.0
_PAUSE: Final = 0.002

_COLUMNS: Final = "id, key, start, stop, odd, size, crc, used, rank, owner, seq, tick"


def _row(values: tuple[int, str, int, int, int, int, int, int, int, int, int, int]) -> Row:
    id_, key, start, stop, hashed, *rest = values
    return Row(id_, Entry(key, start, stop), bool(hashed), *rest)


class Index:
    """One open index file.

    Not safe for threads. Every method but `close` requires the guard: even a read would block the writes of others.
    With `create`, the file is created; without it, a missing file is damage and never a fresh start.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self._log = path + "-wal"
        self._namespaces: dict[str, int] = {}
        if create:
            # SQLite gives its other files the mode of this one
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        elif is_write_ahead(path) or self.is_logged:
            _leave_log(path)
        self.connection = connect(path)
        try:
            # A rollback journal maps no memory, so that a file truncated by another program is an error and does not
            # end the process; a miss takes 20 us more than with a write-ahead log. A kill is harmless without a sync,
            # and after a reboot the index is checked. 2 MB hold the inner pages of an index of a million entries; a
            # larger page cache wastes memory in each process
            for pragma in ("synchronous=OFF", "cache_size=-2000", f"journal_size_limit={_LARGEST_JOURNAL}"):
                self.connection.execute(f"PRAGMA {pragma}")
            self.connection.execute("PRAGMA journal_mode=PERSIST")
            if create:
                # in one transaction: a process that is killed here leaves no half schema with a version
                self.connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
            self._upgrade(self.connection.execute("PRAGMA user_version").fetchone()[0])
        except BaseException:
            self.connection.close()
            raise
        self._do = self.connection.execute
        self._changes = -1
        self.committed_serial = 0
        self.tables = Tables(self.connection)
        self.history = History(self.connection)
        self.statistics = Statistics(self.connection)
        self.when_committed: list[Callable[[], None]] = []
        """Called once, after the transaction is committed; dropped if it is rolled back."""
        self.pins = Pins(self.connection)

    @property
    def is_logged(self) -> bool:
        """Whether another program gave the index a write-ahead log: the connection must not be used any more."""
        return os.path.lexists(self._log)

    def _upgrade(self, version: int) -> None:
        if version == VERSION:
            return
        if version not in UPGRADES:
            raise Damaged(f"the index is not of version {VERSION}")
        self.connection.executescript(f"BEGIN IMMEDIATE; {UPGRADES[version]} PRAGMA user_version={VERSION}; COMMIT;")
        logger.info("an index was upgraded from version %d to %d: %s", version, VERSION, self._log[:-4])

    # -- transactions

    def begin(self, patience: float = _PATIENCE) -> None:
        """Begin an exclusive transaction, so that no other program can read the index and block the commit."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._do("BEGIN EXCLUSIVE")
                return
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE)

    def commit(self) -> None:
        connection = self.connection
        if connection.in_transaction:
            # read in the transaction: afterwards, SQLite would take its locks and look for a journal once more
            serial = self.serial() if connection.total_changes != self._changes else self.committed_serial
            self._do("COMMIT")
            self._changes, self.committed_serial = connection.total_changes, serial
            while self.when_committed:
                self.when_committed.pop()()

    def rollback(self) -> None:
        self.when_committed.clear()
        if self.connection.in_transaction:
            self._do("ROLLBACK")

    def close(self) -> None:
        self.connection.close()

    # -- totals

    def turnover(self) -> tuple[int, int, int]:
        """The numbers of entries and of owners, and a number that grows by 1 with each entry that is removed."""
        # the serial counts arrivals and removals, the number of entries is their difference
        statement = "SELECT n, (SELECT count(*) FROM owner), (serial - n) / 2 FROM total"
        entries, owners, removals = self._do(statement).fetchone()
        return entries, owners, removals

    def totals(self) -> Totals:
        return Totals(*self._do("SELECT n, bytes, lease, dying, max_size FROM total").fetchone())

    def serial(self) -> int:
        """A number that grows with each entry that is added or removed; raises `Damaged` if it is missing."""
        row = self._do("SELECT serial FROM total").fetchone()
        if row is None or not isinstance(row[0], int):
            raise Damaged("the totals of the index are not there")
        return row[0]

    def set_max_size(self, max_size: int | None) -> None:
        self._do("UPDATE total SET max_size = ?", (max_size,))

    def share(self, namespace: str) -> tuple[int, int]:
        """Number and bytes of the entries of one source."""
        row = self._do("SELECT n, bytes FROM ns WHERE name = ?", (namespace,)).fetchone()
        return row if row is not None else (0, 0)

    def problems(self) -> list[str]:
        """The problems that SQLite's integrity check finds; takes a second for a million entries."""
        return [text for (text,) in self._do("PRAGMA integrity_check(20)") if text != "ok"]

    def wrong_totals(self) -> list[tuple[str, int, int]]:
        """Each total that differs from its rows: its name, the number that is written down, and the true one."""
        count, size = self._do("SELECT count(*), coalesce(sum(size), 0) FROM entry").fetchone()
        (tombstones,) = self._do("SELECT coalesce(sum(size), 0) FROM dying").fetchone()
        (lease,) = self._do("SELECT coalesce(sum(lease), 0) FROM owner").fetchone()
        shares = self._do("SELECT coalesce(sum(n), 0), coalesce(sum(bytes), 0) FROM ns").fetchone()
        totals = self.totals()
        pairs = [
            ("entries", totals.entries, count),
            ("bytes", totals.size, size),
            ("leases", totals.lease, lease),
            ("tombstones", totals.tombstones, tombstones),
            ("entries by source", shares[0], count),
            ("bytes by source", shares[1], size),
        ]
        return [(name, says, true) for name, says, true in pairs if says != true]

    def is_sound(self) -> bool:
        """Whether every table and every index of the file is whole; a second for a million entries."""
        return bool(self._do("PRAGMA integrity_check(1)").fetchone()[0] == "ok")

    def last_entry(self) -> int:
        """The highest id of an entry, an upper bound for the number of entries."""
        return int(self._do("SELECT coalesce(max(id), 0) FROM entry").fetchone()[0])

    def mend_totals(self) -> bool:
        """Correct totals that differ from their rows; returns whether any did. Raises `Damaged` for invalid rows."""
        are_pins_wrong = self.pins.mend()
        count, size, least = self._do(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(min(size), 0) FROM entry"
        ).fetchone()
        (tombstones,) = self._do("SELECT coalesce(sum(size), 0) FROM dying").fetchone()
        (lease,) = self._do("SELECT coalesce(sum(lease), 0) FROM owner").fetchone()
        # SQLite stores a value of any kind in any column, so damage can put text there
        if not isinstance(size, int) or least < 0:
            raise Damaged("an entry of the index has a size that no file can have")
        shares = self._do("SELECT coalesce(sum(n), 0), coalesce(sum(bytes), 0), coalesce(min(n), 0) FROM ns").fetchone()
        if self.totals()[:4] == (count, size, lease, tombstones) and shares[:2] == (count, size) and shares[2] >= 0:
            return are_pins_wrong
        self._do("UPDATE total SET n = ?, bytes = ?, lease = ?, dying = ?", (count, size, lease, tombstones))
        self._do("UPDATE ns SET n = 0, bytes = 0")
        sums = self._do("SELECT count(*), sum(size), ns FROM entry GROUP BY ns").fetchall()
        self.connection.executemany("UPDATE ns SET n = ?, bytes = ? WHERE id = ?", sums)
        return True

    # -- owners and their leases

    def add_owner(self, pid: int) -> int:
        cursor = self._do("INSERT INTO owner(pid) VALUES(?)", (pid,))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def owners(self) -> list[int]:
        return [id_ for (id_,) in self._do("SELECT id FROM owner")]

    def announce_leaving(self, owner: int) -> None:
        """Record that a process is about to leave, by a negative pid."""
        # a column of its own would change the format of the index
        self._do("UPDATE owner SET pid = -abs(pid) WHERE id = ?", (owner,))

    def staying_owners(self) -> list[int]:
        """Owners that have not announced to leave, or are writing at the source."""
        rows = self._do("SELECT id FROM owner WHERE pid >= 0 OR id IN (SELECT owner FROM writing)")
        return [id_ for (id_,) in rows]

    def lease_of(self, owner: int) -> int | None:
        row = self._do("SELECT lease FROM owner WHERE id = ?", (owner,)).fetchone()
        return None if row is None else row[0]

    def change_lease(self, owner: int, by: int) -> None:
        self._do("UPDATE owner SET lease = lease + ? WHERE id = ?", (by, owner))

    def drop_leases(self) -> None:
        self._do("UPDATE owner SET lease = 0 WHERE lease != 0")

    def drop_owner(self, owner: int) -> None:
        self._do("DELETE FROM owner WHERE id = ?", (owner,))

    def number_from(self, table: str, last: int) -> None:
        """Give the next row of a table, `owner` or `dying`, a number above `last`."""
        self._do("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
        self._do("INSERT INTO sqlite_sequence(name, seq) VALUES(?, ?)", (table, last))

    # -- entries

    def find(self, entry: Entry) -> Row | None:
        row = self._do(f"SELECT {_COLUMNS} FROM entry WHERE key = ? AND start = ? AND stop = ?", entry).fetchone()
        return None if row is None else _row(row)

    def add(self, entry: Entry, *, hashed: bool, size: int, crc: int, used: int, owner: int, seq: int) -> None:
        """Add the row of an entry, continuing from its ghost."""
        self._do(
            "INSERT INTO entry(ns, key, start, stop, odd, size, crc, used, rank, owner, seq, tick, gap) "
            f"VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {BIRTH})",
            (
                self.number_of(namespace_of(entry.key)),
                *entry,
                hashed,
                size,
                crc,
                used,
                used,
                owner,
                seq,
                hash_of(entry),
            ),
        )

    def _namespace(self, key: str) -> int:
        return self.number_of(namespace_of(key))

    def number_of(self, name: str) -> int:
        """The number of a namespace, which gets one if it has none."""
        # kept for the connection: nearly all entries of a process are of a few namespaces
        id_ = self._namespaces.get(name)
        if id_ is None:
            self._do("INSERT OR IGNORE INTO ns(name) VALUES(?)", (name,))
            id_ = int(self._do("SELECT id FROM ns WHERE name = ?", (name,)).fetchone()[0])
            self._namespaces[name] = id_
        return id_

    def forget_uncommitted(self) -> None:
        """Clear the memory of namespaces and tables that a rolled back transaction added."""
        self._namespaces.clear()
        self.statistics.forget_uncommitted()

    def remove(self, id_: int) -> None:
        self._do("DELETE FROM entry WHERE id = ?", (id_,))

    def touch(self, uses: Mapping[Entry, int]) -> None:
        """Record the last use of entries, in ns since the epoch; missing entries are skipped."""
        self.connection.executemany(
            "UPDATE entry SET used = max(used, ?), tick = (SELECT tick FROM total) "
            "WHERE key = ? AND start = ? AND stop = ?",
            [(used, *entry) for entry, used in uses.items()],
        )

    def by_rank(self, limit: int) -> list[Row]:
        """The entries of lowest rank, lowest first; pinned ones only if all are and exceed their share."""
        # the index on ranks ends with the pinned entries, so this reads only as many rows as it returns
        query = f"SELECT {_COLUMNS} FROM entry WHERE rank < {PINNED} ORDER BY rank LIMIT ?"
        rows = [_row(r) for r in self._do(query, (limit,))]
        if not rows and (surplus := self.pins.surplus()) > 0:
            for row in self._do(f"SELECT {_COLUMNS} FROM entry WHERE rank = {PINNED} LIMIT ?", (limit,)):
                if surplus <= 0:
                    break
                rows.append(_row(row))
                surplus -= rows[-1].size
        return rows

    def set_rank(self, ranks: Iterable[tuple[int, int]]) -> None:
        """Set `(rank, id)` pairs."""
        self.connection.executemany("UPDATE entry SET rank = ? WHERE id = ?", ranks)

    def of_ids(self, ids: Sequence[int]) -> dict[int, Row]:
        """The entries with these ids that exist, by id."""
        places = ", ".join("?" * len(ids))
        return {r[0]: _row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry WHERE id IN ({places})", ids)}

    def of_key(self, key: str) -> list[Row]:
        """The whole object and all byte ranges of one key."""
        return [_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry WHERE key = ?", (key,))]

    def knows(self, key: str) -> bool:
        """Whether there is any entry of a key."""
        return self._do("SELECT 1 FROM entry WHERE key = ? LIMIT 1", (key,)).fetchone() is not None

    def piece_of(self, key: str) -> Row | None:
        """One byte range of a key."""
        row = self._do(
            f"SELECT {_COLUMNS} FROM entry WHERE key = ? AND (start != 0 OR stop != -1) LIMIT 1", (key,)
        ).fetchone()
        return None if row is None else _row(row)

    def beneath(self, prefix: str, limit: int) -> list[Row]:
        """Entries whose key starts with ``prefix + "/"``; every entry for an empty prefix."""
        where, bounds = range_of(prefix)
        return [_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry{where} LIMIT ?", (*bounds, limit))]

    def has_data_beneath(self, prefix: str) -> bool:
        """Whether any entry beneath a prefix is not a metadata document."""
        where, bounds = range_of(prefix)
        return any(not is_document(key) for (key,) in self._do(f"SELECT DISTINCT key FROM entry{where}", bounds))

    def in_flight(self, owner: int, numbers: Iterable[int]) -> list[Row]:
        """Entries of an owner whose file may still be temporary, under one of these numbers."""
        wanted = set(numbers)
        if not wanted:
            return []
        # a scan, but only for a process that died between two steps of a publication
        rows = (_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry WHERE owner = ?", (owner,)))
        return [row for row in rows if row.seq in wanted]

    def hashed_keys(self, prefix: str) -> list[str]:
        """Whole objects beneath a prefix that do not lie at their own key."""
        where, bounds = range_of(prefix)
        where = f"{where} AND" if where else " WHERE"
        query = f"SELECT key FROM entry{where} odd = 1 AND start = 0 AND stop = -1"
        return [key for (key,) in self._do(query, bounds)]

    def rows_after(self, id_: int, limit: int) -> list[Row]:
        """The next entries after an id, in the order of ids."""
        rows = self._do(f"SELECT {_COLUMNS} FROM entry WHERE id > ? ORDER BY id LIMIT ?", (id_, limit))
        return [_row(r) for r in rows]

    def unused_since(self, time_: int, namespace: str | None, after: int, limit: int) -> tuple[list[Row], int]:
        """The next entries by id whose last use was before a time, in ns; and the id after which to continue.

        Pinned entries are passed over.
        """
        columns = _COLUMNS.replace(", ", ", e.")
        window = f"SELECT {_COLUMNS}, ns FROM entry WHERE id > ? ORDER BY id LIMIT ?"
        where, values = (" AND ns.name = ?", (namespace,)) if namespace is not None else ("", ())
        where = f"e.used < ? AND e.rank < {PINNED}{where}"
        # the window is taken first, so that one section looks at a limited number of rows even if none matches
        rows = self._do(
            f"SELECT e.{columns} FROM ({window}) e JOIN ns ON ns.id = e.ns WHERE {where}",
            (after, limit, time_, *values),
        ).fetchall()
        (end,) = self._do(
            "SELECT coalesce(max(id), -1) FROM (SELECT id FROM entry WHERE id > ? ORDER BY id LIMIT ?)", (after, limit)
        ).fetchone()
        return [_row(row) for row in rows], end

    def rows(self) -> Iterator[Row]:
        for row in self._do(f"SELECT {_COLUMNS} FROM entry"):
            yield _row(row)

    # -- files that are on their way out

    def add_tombstone(self, row: Row, owner: int) -> Tombstone:
        cursor = self._do(
            "INSERT INTO dying(key, start, stop, odd, size, owner) VALUES(?, ?, ?, ?, ?, ?)",
            (*row.entry, row.hashed, row.size, owner),
        )
        assert cursor.lastrowid is not None
        return Tombstone(cursor.lastrowid, row.entry, row.hashed, row.size)

    def tombstones_of(self, owner: int) -> list[Tombstone]:
        return self._tombstones("owner = ?", owner)

    def orphaned_tombstones(self) -> list[Tombstone]:
        """Tombstones whose owner has signed off."""
        return self._tombstones("owner != 0 AND owner NOT IN (SELECT id FROM owner)")

    def _tombstones(self, where: str, *values: int | str) -> list[Tombstone]:
        rows = self._do(f"SELECT id, key, start, stop, odd, size FROM dying WHERE {where}", values)
        return [
            Tombstone(id_, Entry(key, start, stop), bool(hashed), size) for id_, key, start, stop, hashed, size in rows
        ]

    def disown_lost(self) -> None:
        """Clear the owner of rows whose owner is missing: the rows may come from different transactions.

        The namespaces of their writes are invalidated anyway.
        """
        self._do("UPDATE dying SET owner = 0 WHERE owner NOT IN (SELECT id FROM owner)")
        self._do("DELETE FROM writing WHERE owner NOT IN (SELECT id FROM owner)")

    def disown_tombstones(self, ids: Iterable[int]) -> None:
        """Leave tombstones whose files may still exist to the next recovery."""
        self.connection.executemany("UPDATE dying SET owner = 0 WHERE id = ?", [(id_,) for id_ in ids])

    def unowned_tombstones(self, limit: int = -1) -> list[Tombstone]:
        """Tombstones without an owner, or some of them; their bytes stay counted."""
        # in random order, so that a file that cannot be removed does not take the turn of all others
        return self._tombstones("owner = 0 ORDER BY random() LIMIT ?", limit)

    def has_tombstone(self, entry: Entry) -> bool:
        """Whether there is a tombstone for an entry."""
        return bool(self._tombstones("key = ? AND start = ? AND stop = ?", *entry))

    def tombstone_ids(self) -> set[int]:
        return {id_ for (id_,) in self._do("SELECT id FROM dying")}

    def drop_tombstones(self, ids: Iterable[int]) -> None:
        self.connection.executemany("DELETE FROM dying WHERE id = ?", [(id_,) for id_ in ids])


def connect(path: str, mode: str = "rw") -> sqlite3.Connection:
    """A connection that neither waits nor creates a file; `mode` is ``"rw"`` or ``"ro"``."""
    # a URI, because only its mode forbids to create a missing file
    uri = "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + f"?mode={mode}"
    # no waiting in SQLite: while it waits, every process waits for the guard
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0)


def salvaged(path: str) -> list[PinRow]:
    """The pins of a damaged index, if they can be read."""
    try:
        # to read it, SQLite would map shared memory beside the damaged index
        if is_write_ahead(path):
            return []
        with closing(connect(path, "ro")) as connection:
            rows = rows_of(connection)
    except (sqlite3.Error, OSError, Damaged, ValueError, TypeError):
        return []
    return rows if all(isinstance(text, str) for row in rows for text in row[:3]) else []


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another program has the index locked; a process of xzcache locks it only under the guard."""
    return (getattr(error, "sqlite_errorname", "") or "").startswith(
        ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")
    )


def is_write_ahead(path: str) -> bool:
    """Whether the header of an index file names a write-ahead log, as in older versions.

    Damage is detected by reading the header: SQLite would wait for locks, or treat the file as new.
    """
    with suppress(FileNotFoundError), open(path, "rb", opener=_file) as file:
        if (header := file.read(20)).startswith(_MAGIC):
            for suffix in ("-journal", "-wal", "-shm"):
                # SQLite waits for ever for a pipe
                if os.path.lexists(path + suffix) and not stat.S_ISREG(os.lstat(path + suffix).st_mode):
                    raise Damaged(f"{path}{suffix} is no file")
            return header[19:] == b"\2"
    raise Damaged(f"{path} is no SQLite file")


def _file(path: str, flags: int) -> int:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged(f"{path} is no file")
    return os.open(path, flags | os.O_CLOEXEC)


def _leave_log(path: str) -> None:
    """Merge a write-ahead log into its index permanently, without mapping memory."""
    with closing(connect(path)) as connection:
        # in exclusive mode, SQLite keeps its shared memory on the heap instead of in a mapped file
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        (mode,) = connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    if mode != "delete":
        raise Damaged(f"{path} cannot leave its write-ahead log")
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(path + suffix)
