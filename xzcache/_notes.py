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

    def add_writing(self, id_: int, key: str, owner: int, *, beneath: bool) -> None:
        """Say that a key, or everything beneath it, is being written; the id is one that no other write has."""
        self._do(
            "INSERT OR REPLACE INTO writing(id, key, beneath, owner) VALUES(?, ?, ?, ?)", (id_, key, beneath, owner)
        )

    def drop_writings(self, ids: Iterable[int]) -> None:
        self._do_many("DELETE FROM writing WHERE id = ?", [(id_,) for id_ in ids])

    def writings(self) -> Writings:
        """What is being written, whoever does it."""
        rows = self._do("SELECT key, beneath FROM writing").fetchall()
        return Writings({key for key, beneath in rows if not beneath}, [f"{key}/" for key, beneath in rows if beneath])

    def is_written(self, key: str) -> bool:
        """Whether somebody is writing a key, or something above it."""
        return self.writings().concern(key)

    def writing_of(self, owner: int) -> list[tuple[int, str, bool]]:
        """Ids of the writes of an owner, their keys, and whether each is of all that is beneath the key."""
        rows = self._do("SELECT id, key, beneath FROM writing WHERE owner = ?", (owner,)).fetchall()
        return [(id_, key, bool(beneath)) for id_, key, beneath in rows]

    def writings_of_nobody(self) -> list[str]:
        """Keys, and prefixes of keys, whose writer has left."""
        rows = self._do("SELECT key FROM writing WHERE owner NOT IN (SELECT id FROM owner)").fetchall()
        return [key for (key,) in rows]

    def drop_writings_of_nobody(self) -> None:
        self._do("DELETE FROM writing WHERE owner NOT IN (SELECT id FROM owner)")

    # -- what the source does not have

    def set_absent(self, key: str, noted: float, ticket: int) -> None:
        """Note that a key is absent, for as long as its ticket has this digest.

        A write that could not use the index has removed no row, but it was counted.
        """
        self._do("INSERT OR REPLACE INTO absent(key, noted, ticket) VALUES(?, ?, ?)", (key, noted, ticket))

    def absent_since(self, key: str, ticket: int) -> float | None:
        """When a key was found to be absent, None where it was not, or was written since."""
        row = self._do("SELECT noted FROM absent WHERE key = ? AND ticket = ?", (key, ticket)).fetchone()
        return None if row is None else float(row[0])

    def absent_beneath(self, prefix: str, after: str, limit: int) -> list[tuple[str, float, int]]:
        """Keys beneath a prefix, in order, when they were found to be absent, and the digests of their tickets."""
        where, (first, last) = range_of(prefix)
        return self._do(
            f"SELECT key, noted, ticket FROM absent{where} AND key > ? ORDER BY key LIMIT ?",
            (first, last, after, limit),
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
