"""The index of a cache directory, its counters of writes, and the locks between processes.

Protects the SQLite database, the registration and the lease of each process, and the room that is left: all by the
guard, a byte of the lock file and a mutex, which `Books.section` holds for one transaction. The locks of keys and byte
ranges are never waited for. Knows no content of any entry file.
"""

from xzcache.index._history import History, hash_of, lot_of
from xzcache.index._session import Books, Membership, written_notes
from xzcache.index._sql import Dying, Index, Row, Totals
from xzcache.index._writeclock import WriteCounters, absence_slot, all_slots, data_slot, prefix_slot, write_slot

__all__ = [
    "Books",
    "Dying",
    "History",
    "Index",
    "Membership",
    "Row",
    "Totals",
    "WriteCounters",
    "absence_slot",
    "all_slots",
    "data_slot",
    "hash_of",
    "lot_of",
    "prefix_slot",
    "write_slot",
    "written_notes",
]
