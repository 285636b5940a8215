"""Every SQL statement on the shared books.

An `Index` is one connection to one SQLite file. It knows no lock and no file but its own: whoever calls it holds the
guard.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final

from xzcache._documents import is_document
from xzcache._errors import Damaged
from xzcache._history import BIRTH, History, hash_of
from xzcache._keys import Entry, namespace_of
from xzcache._notes import Notes, range_of
from xzcache._schema import SCHEMA, UPGRADES, VERSION, Dying, Row, Totals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

logger = logging.getLogger("xzcache")

_MAGIC: Final = b"SQLite format 3\0"
_LARGEST_JOURNAL: Final = 1 << 20
_PATIENCE: Final = 1.0
_PAUSE: Final = 0.002

_COLUMNS: Final = "id, key, start, stop, odd, size, crc, used, rank, owner, seq, tick"


def _row(values: tuple[int, str, int, int, int, int, int, int, int, int, int, int]) -> Row:
    id_, key, start, stop, odd, *rest = values
    return Row(id_, Entry(key, start, stop), bool(odd), *rest)


class Index:
    """One open index file.

    Parameters
    ----------
    path : str
        The SQLite file.
    create : bool
        Whether to make it. An index that should be there and is not is damage, never a fresh start.

    Notes
    -----
    Not safe for threads, and no method but `close` may be called without the guard: not even reads, which would keep
    others from writing.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self._log = path + "-wal"
        self._namespaces: dict[str, int] = {}
        if create:
            # SQLite gives its other files the mode of this one
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        elif _is_logged(path) or self.is_logged:
            _leave_log(path)
        self.connection = _connect(path)
        try:
            # A rollback journal maps no memory, so a file that somebody truncates is an error and not the end of the
            # process; it costs a miss 20 us more than a write-ahead log. A kill cannot hurt without any waiting for the
            # disk, and after the machine was restarted the index is checked.
            # 2 MB hold the inner pages of the index of a million entries; more is memory in each process for nothing
            for pragma in ("synchronous=OFF", "cache_size=-2000", f"journal_size_limit={_LARGEST_JOURNAL}"):
                self.connection.execute(f"PRAGMA {pragma}")
            self.connection.execute("PRAGMA journal_mode=PERSIST")
            if create:
                self.connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
            self._upgrade(self.connection.execute("PRAGMA user_version").fetchone()[0])
        except BaseException:
            self.connection.close()
            raise
        self._do = self.connection.execute
        self.notes = Notes(self.connection)
        self.history = History(self.connection)

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
        logger.info("an index of version %d is one of version %d now: %s", version, VERSION, self._log[:-4])

    # -- transactions

    def begin(self, patience: float = _PATIENCE) -> None:
        """Begin a transaction that nothing can keep from its end: no other program may even read until then."""
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
        if self.connection.in_transaction:
            self._do("COMMIT")

    def rollback(self) -> None:
        if self.connection.in_transaction:
            self._do("ROLLBACK")

    def close(self) -> None:
        self.connection.close()

    # -- totals

    def totals(self) -> Totals:
        return Totals(*self._do("SELECT n, bytes, lease, dying, max_size FROM total").fetchone())

    def serial(self) -> int:
        """A number that grows with every entry that comes or goes.

        Raises
        ------
        Damaged
            There is none.
        """
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
        """What SQLite's own check finds wrong with the file; a second for a million entries."""
        return [text for (text,) in self._do("PRAGMA integrity_check(20)") if text != "ok"]

    def wrong_totals(self) -> list[tuple[str, int, int]]:
        """Each total that differs from its rows: its name, the number that is written down, and the true one."""
        count, size = self._do("SELECT count(*), coalesce(sum(size), 0) FROM entry").fetchone()
        (dying,) = self._do("SELECT coalesce(sum(size), 0) FROM dying").fetchone()
        (lease,) = self._do("SELECT coalesce(sum(lease), 0) FROM owner").fetchone()
        shares = self._do("SELECT coalesce(sum(n), 0), coalesce(sum(bytes), 0) FROM ns").fetchone()
        totals = self.totals()
        pairs = [
            ("entries", totals.entries, count),
            ("bytes", totals.size, size),
            ("leases", totals.lease, lease),
            ("tombstones", totals.dying, dying),
            ("entries by source", shares[0], count),
            ("bytes by source", shares[1], size),
        ]
        return [(name, says, true) for name, says, true in pairs if says != true]

    def is_sound(self) -> bool:
        """Whether every table and every index of the file is whole; a second for a million entries."""
        return bool(self._do("PRAGMA integrity_check(1)").fetchone()[0] == "ok")

    def last_entry(self) -> int:
        """The highest id of an entry: about as many entries as there have been."""
        return int(self._do("SELECT coalesce(max(id), 0) FROM entry").fetchone()[0])

    def mend_totals(self) -> bool:
        """Compare the totals with the rows that they sum up, and make them right; whether they were wrong.

        Raises
        ------
        Damaged
            The rows themselves make no sense.
        """
        count, size, least = self._do(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(min(size), 0) FROM entry"
        ).fetchone()
        (dying,) = self._do("SELECT coalesce(sum(size), 0) FROM dying").fetchone()
        (lease,) = self._do("SELECT coalesce(sum(lease), 0) FROM owner").fetchone()
        if not isinstance(size, int) or least < 0:
            raise Damaged("an entry of the index has a size that no file can have")
        shares = self._do("SELECT coalesce(sum(n), 0), coalesce(sum(bytes), 0), coalesce(min(n), 0) FROM ns").fetchone()
        if self.totals()[:4] == (count, size, lease, dying) and shares[:2] == (count, size) and shares[2] >= 0:
            return False
        self._do("UPDATE total SET n = ?, bytes = ?, lease = ?, dying = ?", (count, size, lease, dying))
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
        """A negative pid is one that is about to go."""
        self._do("UPDATE owner SET pid = -abs(pid) WHERE id = ?", (owner,))

    def staying_owners(self) -> list[int]:
        """Owners that have not said that they are leaving."""
        return [id_ for (id_,) in self._do("SELECT id FROM owner WHERE pid >= 0")]

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
        """Give the next row of a table (of owners, of the dying) a number above `last`."""
        self._do("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
        self._do("INSERT INTO sqlite_sequence(name, seq) VALUES(?, ?)", (table, last))

    # -- entries

    def find(self, entry: Entry) -> Row | None:
        row = self._do(f"SELECT {_COLUMNS} FROM entry WHERE key = ? AND start = ? AND stop = ?", entry).fetchone()
        return None if row is None else _row(row)

    def add(self, entry: Entry, *, odd: bool, size: int, crc: int, used: int, owner: int, seq: int) -> None:
        """Give an entry a row, which remembers what its ghost does."""
        self._do(
            "INSERT INTO entry(ns, key, start, stop, odd, size, crc, used, rank, owner, seq, tick, gap) "
            f"VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {BIRTH})",
            (self._namespace(entry.key), *entry, odd, size, crc, used, used, owner, seq, hash_of(entry)),
        )

    def _namespace(self, key: str) -> int:
        name = namespace_of(key)
        id_ = self._namespaces.get(name)
        if id_ is None:
            self._do("INSERT OR IGNORE INTO ns(name) VALUES(?)", (name,))
            id_ = int(self._do("SELECT id FROM ns WHERE name = ?", (name,)).fetchone()[0])
            self._namespaces[name] = id_
        return id_

    def forget_uncommitted(self) -> None:
        """After a rollback, what was remembered of the transaction is not true."""
        self._namespaces.clear()

    def remove(self, id_: int) -> None:
        self._do("DELETE FROM entry WHERE id = ?", (id_,))

    def touch(self, uses: Mapping[Entry, int]) -> None:
        """Record the last use of entries, in ns since the epoch; those that are gone are passed over."""
        self.connection.executemany(
            "UPDATE entry SET used = max(used, ?), tick = (SELECT tick FROM total) "
            "WHERE key = ? AND start = ? AND stop = ?",
            [(used, *entry) for entry, used in uses.items()],
        )

    def by_rank(self, limit: int) -> list[Row]:
        """The entries of lowest rank, lowest first."""
        return [_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry ORDER BY rank LIMIT ?", (limit,))]

    def set_rank(self, ranks: Iterable[tuple[int, int]]) -> None:
        """Set `(rank, id)` pairs."""
        self.connection.executemany("UPDATE entry SET rank = ? WHERE id = ?", ranks)

    def of_ids(self, ids: Sequence[int]) -> dict[int, Row]:
        """By their ids, the entries that are there."""
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
        """Entries whose key begins with ``prefix + "/"``; every entry for an empty prefix."""
        where, bounds = range_of(prefix)
        return [_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry{where} LIMIT ?", (*bounds, limit))]

    def has_data_beneath(self, prefix: str) -> bool:
        """Whether anything but metadata documents is beneath a prefix."""
        where, bounds = range_of(prefix)
        return any(not is_document(key) for (key,) in self._do(f"SELECT DISTINCT key FROM entry{where}", bounds))

    def in_flight(self, owner: int, numbers: Iterable[int]) -> list[Row]:
        """Entries whose file may still lie among the owner's files in flight, under one of these numbers."""
        wanted = set(numbers)
        if not wanted:
            return []
        # a scan, but only for a process that died between two steps of a publication
        rows = (_row(r) for r in self._do(f"SELECT {_COLUMNS} FROM entry WHERE owner = ?", (owner,)))
        return [row for row in rows if row.seq in wanted]

    def odd_keys(self, prefix: str) -> list[str]:
        """Whole objects beneath a prefix that do not lie at their own key."""
        where, bounds = range_of(prefix)
        where = f"{where} AND" if where else " WHERE"
        query = f"SELECT key FROM entry{where} odd = 1 AND start = 0 AND stop = -1"
        return [key for (key,) in self._do(query, bounds)]

    def rows_after(self, id_: int, limit: int) -> list[Row]:
        """The entries of the next higher ids."""
        rows = self._do(f"SELECT {_COLUMNS} FROM entry WHERE id > ? ORDER BY id LIMIT ?", (id_, limit))
        return [_row(r) for r in rows]

    def rows(self) -> Iterator[Row]:
        for row in self._do(f"SELECT {_COLUMNS} FROM entry"):
            yield _row(row)

    # -- files that are on their way out

    def add_dying(self, row: Row, owner: int) -> Dying:
        cursor = self._do(
            "INSERT INTO dying(key, start, stop, odd, size, owner) VALUES(?, ?, ?, ?, ?, ?)",
            (*row.entry, row.odd, row.size, owner),
        )
        assert cursor.lastrowid is not None
        return Dying(cursor.lastrowid, row.entry, row.odd, row.size)

    def dying_of(self, owner: int) -> list[Dying]:
        return self._dying("owner = ?", owner)

    def dying_of_nobody(self) -> list[Dying]:
        """Files whose owner has signed off."""
        return self._dying("owner != 0 AND owner NOT IN (SELECT id FROM owner)")

    def _dying(self, where: str, *values: int | str) -> list[Dying]:
        rows = self._do(f"SELECT id, key, start, stop, odd, size FROM dying WHERE {where}", values)
        return [Dying(id_, Entry(key, start, stop), bool(odd), size) for id_, key, start, stop, odd, size in rows]

    def disown_lost(self) -> None:
        """Give to nobody what belongs to owners that are not there: the rows may be of different transactions."""
        self._do("UPDATE dying SET owner = 0 WHERE owner NOT IN (SELECT id FROM owner)")

    def disown_dying(self, ids: Iterable[int]) -> None:
        """Leave files that could not be seen to be gone to whoever recovers next."""
        self.connection.executemany("UPDATE dying SET owner = 0 WHERE id = ?", [(id_,) for id_ in ids])

    def left_dying(self, limit: int = -1) -> list[Dying]:
        """Those files, or some of them: their bytes stay counted."""
        return self._dying("owner = 0 ORDER BY random() LIMIT ?", limit)

    def is_dying(self, entry: Entry) -> bool:
        """Whether a tombstone speaks of a file of an entry."""
        return bool(self._dying("key = ? AND start = ? AND stop = ?", *entry))

    def dying_ids(self) -> set[int]:
        return {id_ for (id_,) in self._do("SELECT id FROM dying")}

    def drop_dying(self, ids: Iterable[int]) -> None:
        self.connection.executemany("DELETE FROM dying WHERE id = ?", [(id_,) for id_ in ids])


def _connect(path: str) -> sqlite3.Connection:
    uri = "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + "?mode=rw"
    # no waiting in SQLite: while it waits, every process waits for the guard
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0)


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another program has a lock on the index, which none of ours has without the guard."""
    return (getattr(error, "sqlite_errorname", "") or "").startswith(
        ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")
    )


def _is_logged(path: str) -> bool:
    """Whether an index says of itself that it has a write-ahead log, as those of older versions have.

    Damage is told from the outside: SQLite would wait for locks on a file that others have open and take it for new.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if (header := file.read(20)).startswith(_MAGIC):
            if os.path.isdir(path + "-journal"):
                raise Damaged(f"{path} cannot have a journal")
            return header[19:] == b"\2"
    raise Damaged(f"{path} is no SQLite file")


def _leave_log(path: str) -> None:
    """Fold a write-ahead log into its index, for good, with nothing mapped."""
    with closing(_connect(path)) as connection:
        # for one process alone, SQLite keeps in its own memory what else it maps from a file
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        (mode,) = connection.execute("PRAGMA journal_mode=DELETE").fetchone()
    if mode != "delete":
        raise Damaged(f"{path} cannot leave its write-ahead log")
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(path + suffix)
