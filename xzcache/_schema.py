"""The tables of the shared books, and what a row of them is.

The totals are kept by triggers, in the transaction that changes what they sum up, so they cannot drift. Time, for the
policies, is counted in ticks: one for each entry that comes, and for each use that a policy that learns tells of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from xzcache._keys import Entry

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
CREATE INDEX writing_key ON writing(beneath, key);
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
"""Pieces of objects are not taken over: they may be longer than they should, and of states that nobody told."""

UPGRADES: Final = {
    2: f"""{_OF_THE_PAST}
ALTER TABLE entry ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entry ADD COLUMN gap INTEGER NOT NULL DEFAULT 0;
ALTER TABLE total ADD COLUMN tick INTEGER NOT NULL DEFAULT 0;
DROP TRIGGER entry_comes;{_ENTRY_COMES}{_WITHOUT_PIECES}""",
    3: f"""DELETE FROM ghost; DROP TABLE heard;{_HEARD}DROP TRIGGER entry_comes;{_ENTRY_COMES}{_WITHOUT_PIECES}""",
    4: _WITHOUT_PIECES,
}
"""What makes an index of an older version, which is the key, one of this version."""


class Totals(NamedTuple):
    """What the directory holds and has promised; sizes in bytes."""

    entries: int
    size: int
    lease: int
    dying: int
    max_size: int | None

    @property
    def room(self) -> int | None:
        """Bytes that may still be promised (negative after the bound was lowered); None where there is no bound."""
        return None if self.max_size is None else self.max_size - self.size - self.lease - self.dying


class Row(NamedTuple):
    """One entry as the index knows it."""

    id: int
    entry: Entry
    odd: bool
    size: int
    crc: int
    used: int
    rank: int
    owner: int
    seq: int
    tick: int


class Dying(NamedTuple):
    """A file that has left the index and still takes space."""

    id: int
    entry: Entry
    odd: bool
    size: int
