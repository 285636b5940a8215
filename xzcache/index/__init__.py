"""The index of a cache directory, its counters of writes, and the locks between processes.

Protects the SQLite database, the registration and the lease of each process, and the room that is left: all by the
guard, a byte of the lock file and a mutex, which `IndexSession.section` holds for one transaction. The locks of keys
and byte ranges are never waited for. Knows no content of any entry file.
"""

from xzcache.index._history import History, hash_of, lot_of
from xzcache.index._session import IndexSession, Registration, written_notes
from xzcache.index._sql import Index, Row, Tombstone, Totals
from xzcache.index._writeclock import (
    WriteCounters,
    counters_of,
    data_counter,
    missing_counter,
    prefix_counter,
    write_counter,
)

__all__ = [
    "History",
    "Index",
    "IndexSession",
    "Registration",
    "Row",
    "Tombstone",
    "Totals",
    "WriteCounters",
    "counters_of",
    "data_counter",
    "hash_of",
    "lot_of",
    "missing_counter",
    "prefix_counter",
    "write_counter",
    "written_notes",
]
