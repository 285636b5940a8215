"""The cache directory that processes share: publishing, room, invalidation, repair, and who fetches.

Protects what all processes rely on: an entry is committed before its file gets its name, and its row is gone before its
file is unlinked, but for invalidations that cannot use the index. The order of locks: preparing, storing and the guard
(of `index`), SQLite, lease; ARCHITECTURE.md has all of them. The table of the directories of a process
(`open_directory`) has a lock that a fork waits for. Pending invalidations, absent chunks and what is yet to be stored
have a mutex each, under which nothing is waited for.
"""

from xzcache.directory._audit import Audit, Finding, audit
from xzcache.directory._directory import CacheDirectory
from xzcache.directory._namespace import SharedBackend
from xzcache.directory._registry import cleanup_resources, open_directory, opened_directory
from xzcache.eviction import Sample, predicted
from xzcache.files import (
    Medium,
    can_be_made,
    free_bytes,
    is_plain,
    medium_of,
    private_name,
    resolve_directory,
    temporary,
)
from xzcache.index import DAY, PINNED_SHARE, Arrival, Counts, Inspector, Objects, Pin, Source, Totals, Uses

__all__ = [
    "DAY",
    "PINNED_SHARE",
    "Arrival",
    "Audit",
    "CacheDirectory",
    "Counts",
    "Finding",
    "Inspector",
    "Medium",
    "Objects",
    "Pin",
    "Sample",
    "SharedBackend",
    "Source",
    "Totals",
    "Uses",
    "audit",
    "can_be_made",
    "cleanup_resources",
    "free_bytes",
    "is_plain",
    "medium_of",
    "open_directory",
    "opened_directory",
    "predicted",
    "private_name",
    "resolve_directory",
    "temporary",
]
