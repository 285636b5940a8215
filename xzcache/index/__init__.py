"""The index of a cache directory, its counters of writes, and the locks between processes.

Protects the SQLite database, the registration of each process, its lease as the index has it, and the room that is
left, all by the guard: a mutex and the `flock` of the file ``lock``, which `IndexSession.section` holds for one
transaction. The rest of a lease in this process has a mutex; joining a directory has another. The storing lock keeps
leases valid while they are spent. Write counters are raised under the guard, except by invalidations that cannot have
it, and read without. The locks of keys and byte ranges are never waited for. Knows no content of any entry file.
"""

from xzcache.index._history import History, hash_of, lot_of
from xzcache.index._inspect import Arrival, Inspector, Objects, Source, Uses
from xzcache.index._pins import PINNED_SHARE, Pin
from xzcache.index._registration import Registration, written_notes
from xzcache.index._session import IndexSession
from xzcache.index._sql import Index, Row, Tombstone, Totals, salvaged
from xzcache.index._statistics import DAY, OTHERS, SAMPLED, USES, Counts, Looked, UsesRow, is_whole
from xzcache.index._writeclock import (
    WriteCounters,
    counters_of,
    data_counter,
    missing_counter,
    write_counter,
)

__all__ = [
    "DAY",
    "OTHERS",
    "PINNED_SHARE",
    "SAMPLED",
    "USES",
    "Arrival",
    "Counts",
    "History",
    "Index",
    "IndexSession",
    "Inspector",
    "Looked",
    "Objects",
    "Pin",
    "Registration",
    "Row",
    "Source",
    "Tombstone",
    "Totals",
    "Uses",
    "UsesRow",
    "WriteCounters",
    "counters_of",
    "data_counter",
    "hash_of",
    "is_whole",
    "lot_of",
    "missing_counter",
    "salvaged",
    "write_counter",
    "written_notes",
]
