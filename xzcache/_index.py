"""Every SQL statement on the shared books.

An `Index` is one connection to one SQLite file. It knows no lock and no file but its own: whoever calls it holds the
guard.
"""

from __future__ import annotations

import logging
import os
import sqlite3
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
    Not safe for threads, and no method may be called without the guard: not even reads, whose open transactions would
    keep SQLite from truncating its log.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self._wal = path + "-wal"
        self._namespaces: dict[str, int] = {}
        if create:
            # SQLite gives its other files the mode of this one
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        else:
            _check_magic(path)
        uri = "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + "?mode=rw"
        self.connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=1)
        try:
            # 2 MB hold the inner pages of the index of a million entries; more is memory in each process for nothing
            for pragma in ("synchronous=NORMAL", "wal_autocheckpoint=0", "cache_size=-2000"):
                self.connection.execute(f"PRAGMA {pragma}")
            if create:
                self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
            self._upgrade(self.connection.execute("PRAGMA user_version").fetchone()[0])
        except BaseException:
            self.connection.close()
            raise
        self._do = self.connection.execute
        self.notes = Notes(self.connection)
        self.history = History(self.connection)

    def _upgrade(self, version: int) -> None:
        if version == VERSION:
            return
        if version not in UPGRADES:
            raise Damaged(f"the index is not of version {VERSION}")
        self.connection.executescript(f"BEGIN IMMEDIATE; {UPGRADES[version]} PRAGMA user_version={VERSION}; COMMIT;")
        logger.info("an index of version %d is one of version %d now: %s", version, VERSION, self._wal[:-4])

    # -- transactions

    def begin(self) -> None:
        self._do("BEGIN IMMEDIATE")

    def commit(self) -> None:
        if self.connection.in_transaction:
            self._do("COMMIT")

    def rollback(self) -> None:
        if self.connection.in_transaction:
            self._do("ROLLBACK")

    def checkpoint(self, wal_limit: int = 1 << 20) -> None:
        """Fold the write-ahead log into the file once it is larger than `wal_limit` bytes."""
        try:
            if os.stat(self._wal).st_size > wal_limit:
                self._do("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except FileNotFoundError:
            pass

    def close(self) -> None:
        self.connection.close()

    # -- totals

    def totals(self) -> Totals:
        return Totals(*self._do("SELECT n, bytes, lease, dying, max_size FROM total").fetchone())

    def serial(self) -> int:
        """A number that grows with every entry that comes or goes."""
        return int(self._do("SELECT serial FROM total").fetchone()[0])

    def set_max_size(self, max_size: int | None) -> None:
        self._do("UPDATE total SET max_size = ?", (max_size,))

    def share(self, namespace: str) -> tuple[int, int]:
        """Number and bytes of the entries of one source."""
        row = self._do("SELECT n, bytes FROM ns WHERE name = ?", (namespace,)).fetchone()
        return row if row is not None else (0, 0)

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

    def _dying(self, where: str, *values: int) -> list[Dying]:
        rows = self._do(f"SELECT id, key, start, stop, odd, size FROM dying WHERE {where}", values)
        return [Dying(id_, Entry(key, start, stop), bool(odd), size) for id_, key, start, stop, odd, size in rows]

    def disown_dying(self, ids: Iterable[int]) -> None:
        """Leave files that could not be seen to be gone to whoever recovers next."""
        self.connection.executemany("UPDATE dying SET owner = 0 WHERE id = ?", [(id_,) for id_ in ids])

    def left_dying(self, limit: int = -1) -> list[Dying]:
        """Those files, or some of them: their bytes stay counted."""
        return self._dying("owner = 0 ORDER BY random() LIMIT ?", limit)

    def dying_ids(self) -> set[int]:
        return {id_ for (id_,) in self._do("SELECT id FROM dying")}

    def drop_dying(self, ids: Iterable[int]) -> None:
        self.connection.executemany("DELETE FROM dying WHERE id = ?", [(id_,) for id_ in ids])


def _check_magic(path: str) -> None:
    """Tell damage from the outside: SQLite would wait for locks on a file that others have open and take it for new."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return
    except FileNotFoundError:
        pass
    raise Damaged(f"{path} is no SQLite file")
