"""The index of a cache directory, its counters of writes, and the locks between processes.

Protects the SQLite database, the registration of each process, its lease as the index has it, and the room that is
left, all by the guard: a mutex and the `flock` of the file ``lock``, which is held for one transaction (a section).
What is left of a lease in this process has a mutex; joining a directory has another. The storing lock keeps leases
valid while they are spent. Write counters are raised under the guard, but for invalidations that cannot have it, and
read without. The locks of keys and byte ranges are never waited for. Knows no content of any entry file.
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
