"""The small tables of the index: what is known of the arrays of a source, and which keys are being written."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable


class Writings(NamedTuple):
    """Keys that are being written, and prefixes of keys."""

    keys: set[str]
    prefixes: list[str]

    def concern(self, key: str) -> bool:
        """Whether a key is one of them, or beneath one."""
        return key in self.keys or any(map(key.startswith, self.prefixes))


class Notes:
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
        """The state of a document under which what it describes was filled."""
        row = self._do("SELECT state FROM seen WHERE document = ?", (document,)).fetchone()
        return None if row is None else bytes(row[0])

    def set_seen(self, document: str, state: bytes) -> None:
        self._do("INSERT OR REPLACE INTO seen(document, state) VALUES(?, ?)", (document, state))

    def nodes_beneath(self, prefix: str) -> list[str]:
        """Paths of the nodes beneath a path."""
        where, bounds = range_of(prefix, column="path")
        return [path for (path,) in self._do(f"SELECT path FROM node{where}", bounds)]

    def drop_nodes(self, prefix: str, *, documents: bool = True) -> None:
        """Forget the node at a path and all nodes beneath it, and in which state their documents were seen."""
        where, bounds = range_of(prefix, column="path")
        self._do(f"DELETE FROM node{where}", bounds)
        self._do("DELETE FROM node WHERE path = ?", (prefix,))
        if documents:
            where, bounds = range_of(prefix, column="document")
            self._do(f"DELETE FROM seen{where}", bounds)

    # -- writes that have begun and not ended

    def add_writing(self, key: str, owner: int, *, beneath: bool) -> int:
        cursor = self._do("INSERT INTO writing(key, beneath, owner) VALUES(?, ?, ?)", (key, beneath, owner))
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def drop_writing(self, id_: int, owner: int) -> None:
        self._do("DELETE FROM writing WHERE id = ? AND owner = ?", (id_, owner))

    def writings(self) -> Writings:
        """What is being written, whoever does it."""
        rows = self._do("SELECT key, beneath FROM writing").fetchall()
        return Writings({key for key, beneath in rows if not beneath}, [f"{key}/" for key, beneath in rows if beneath])

    def is_written(self, key: str) -> bool:
        """Whether somebody is writing a key, or something above it."""
        return self.writings().concern(key)

    def writing_of(self, owner: int) -> list[tuple[str, bool]]:
        """Keys, and prefixes of keys, that an owner is writing."""
        rows = self._do("SELECT key, beneath FROM writing WHERE owner = ?", (owner,)).fetchall()
        return [(key, bool(beneath)) for key, beneath in rows]

    def drop_writings_of(self, owner: int) -> None:
        self._do("DELETE FROM writing WHERE owner = ?", (owner,))

    def writings_of_nobody(self) -> list[str]:
        """Keys, and prefixes of keys, whose writer has left."""
        rows = self._do("SELECT key FROM writing WHERE owner NOT IN (SELECT id FROM owner)").fetchall()
        return [key for (key,) in rows]

    def drop_writings_of_nobody(self) -> None:
        self._do("DELETE FROM writing WHERE owner NOT IN (SELECT id FROM owner)")

    # -- what the source does not have

    def set_absent(self, key: str, noted: float) -> None:
        self._do("INSERT OR REPLACE INTO absent(key, noted) VALUES(?, ?)", (key, noted))

    def absent_since(self, key: str) -> float | None:
        row = self._do("SELECT noted FROM absent WHERE key = ?", (key,)).fetchone()
        return None if row is None else float(row[0])

    def absent_beneath(self, prefix: str, after: str, limit: int) -> list[tuple[str, float]]:
        """Keys beneath a prefix, in order, and when they were found to be absent."""
        where, (first, last) = range_of(prefix)
        return self._do(
            f"SELECT key, noted FROM absent{where} AND key > ? ORDER BY key LIMIT ?", (first, last, after, limit)
        ).fetchall()

    def keep_absent(self, most: int) -> None:
        """Forget the oldest of more rows than that."""
        surplus = self._do("SELECT count(*) FROM absent").fetchone()[0] - most
        if surplus > 0:
            oldest = "SELECT key FROM absent ORDER BY noted LIMIT ?"
            self._do(f"DELETE FROM absent WHERE key IN ({oldest})", (surplus + most // 8,))

    def drop_absent(self, keys: Iterable[str]) -> None:
        self._do_many("DELETE FROM absent WHERE key = ?", [(key,) for key in keys])

    def drop_absent_beneath(self, prefix: str) -> None:
        where, bounds = range_of(prefix)
        self._do(f"DELETE FROM absent{where}", bounds)


def range_of(prefix: str, column: str = "key") -> tuple[str, tuple[str, ...]]:
    """The condition, and its values, of lying beneath a prefix."""
    # "0" is the character after "/": together they enclose whatever begins with the prefix and a slash
    return (f" WHERE {column} >= ? AND {column} < ?", (prefix + "/", prefix + "0")) if prefix else ("", ())
