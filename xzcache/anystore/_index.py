"""The index of a cache that one process keeps in memory: sizes, order, ages, byte ranges and write versions."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, NamedTuple

from xzcache._config import is_fresh
from xzcache._fork import renew_after_fork
from xzcache.model import Entry, Listed, is_document, metadata

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from xzcache._config import Age


WriteVersion = tuple[int, int]


class Record(NamedTuple):
    """An entry: its size in bytes, when it came (seconds since the epoch), its bytes if it is kept in memory."""

    size: int
    inserted: float
    data: memoryview | None
    validator: str = ""


class Taken(NamedTuple):
    """Whether space was promised, and if not, which entry has to go first."""

    taken: bool
    oldest: Entry | None


class MemoryIndex:
    """The index of a cache in this process, least recently used entries first. Safe for threads; each method is atomic.

    `size` is the number of bytes stored or reserved.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[Entry, Record] = OrderedDict()
        self._pieces: dict[str, dict[Entry, None]] = {}
        self.after_fork_in_child()
        renew_after_fork(self)
        self.in_memory = 0
        self._writes: Counter[str] = Counter()
        self._drops = 0

    def after_fork_in_child(self) -> None:
        """Start with a new lock, without the stores that only tasks of the parent would finish."""
        self._lock = threading.Lock()
        self._arriving: dict[str, Future[None]] = {}
        self.size = sum(record.size for record in self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._records

    # -- writes

    def write_version(self, key: str) -> WriteVersion:
        """The write version of a key; it changes with each write to the key or to a prefix of it."""
        return self._writes[key], self._drops

    def count_write(self, key: str) -> WriteVersion:
        """Count a write of a key; returns the new version."""
        with self._lock:
            self._writes[key] += 1
            return self.write_version(key)

    def count_drop(self) -> None:
        """Count a write of everything."""
        with self._lock:
            self._drops += 1

    # -- looking

    def may_serve(self, entry: Entry, max_age: Age) -> bool:
        """Whether an entry is fresh and not being stored; an unrecorded entry has an unknown age."""
        with self._lock:
            if entry.key in self._arriving:
                return False
            record = self._records.get(entry)
            return max_age == "infinity" or (record is not None and is_fresh(record.inserted, max_age))

    def data(self, entry: Entry) -> memoryview | None:
        """The bytes of an entry that is kept in memory."""
        with self._lock:
            record = self._records.get(entry)
            return None if record is None else record.data

    def validator(self, entry: Entry) -> str:
        """The validator of an entry; empty if there is none."""
        with self._lock:
            record = self._records.get(entry)
            return "" if record is None else record.validator

    def inserted(self, entry: Entry) -> float | None:
        """When an entry was stored or confirmed, in seconds since the epoch."""
        with self._lock:
            record = self._records.get(entry)
            return None if record is None else record.inserted

    def mark_validated(self, entry: Entry) -> None:
        """Restart the age of an entry."""
        with self._lock:
            if (record := self._records.get(entry)) is not None:
                self._records[entry] = record._replace(inserted=time.time())

    def used(self, entry: Entry, size: int, version: WriteVersion) -> bool:
        """Record a use, also of an entry of an earlier process; False if it was written since the version was read."""
        with self._lock:
            if version != self.write_version(entry.key) or entry.key in self._arriving:
                return False
            if entry in self._records:
                self._records.move_to_end(entry)
            else:
                # left by an earlier process; it is counted from its first use on
                self._records[entry] = Record(size, time.time(), None)
                self.size += size
            return True

    def size_of(self, entry: Entry) -> int | None:
        """The size of a recorded entry."""
        with self._lock:
            record = self._records.get(entry)
            return None if record is None else record.size

    def listed(self, key: str) -> Listed:
        """The byte ranges of a key."""
        with self._lock:
            return Listed(key, [(piece.start, piece.stop) for piece in self._pieces.get(key, ())])

    def of_key(self, key: str) -> list[Entry]:
        """The whole object and all byte ranges of a key."""
        with self._lock:
            whole = [entry] if (entry := Entry(key)) in self._records else []
            return [*whole, *self._pieces.get(key, ())]

    def beneath(self, prefix: str) -> list[Entry]:
        """Entries beneath a path; all for an empty one."""
        with self._lock:
            return [entry for entry in self._records if not prefix or entry.key.startswith(f"{prefix}/")]

    # -- space

    def take(self, size: int, limit: int | None) -> Taken:
        """Reserve space, or return the entry to evict first."""
        with self._lock:
            if limit is None or self.size + size <= limit:
                self.size += size
                return Taken(True, None)
            return Taken(False, next(iter(self._records), None))

    def give(self, size: int) -> None:
        """Free space after its value was deleted."""
        with self._lock:
            self.size -= size

    def arrive(self, key: str) -> Future[None] | None:
        """Mark a key as being stored until `arrived`; if another task is storing it, returns what ends with that.

        Meanwhile, the cache store may hold a value that must not be served.
        """
        with self._lock:
            if (under_way := self._arriving.get(key)) is None:
                self._arriving[key] = Future()
            return under_way

    def arrived(self, key: str) -> None:
        """Undo `arrive`."""
        with self._lock:
            done = self._arriving.pop(key, None)
        if done is not None:
            done.set_result(None)

    def record(self, entry: Entry, size: int, data: memoryview | None, version: WriteVersion, validator: str) -> bool:
        """Record an entry whose space was taken; False if its key was written since the version was read."""
        with self._lock:
            if version != self.write_version(entry.key) or entry in self._records:
                return False
            self._records[entry] = Record(size, time.time(), data, validator)
            self._record_piece(entry)
            self.in_memory += size if data is not None else 0
            return True

    def pop(self, entry: Entry) -> Record | None:
        """Take an entry out, its space still taken."""
        with self._lock:
            record = self._records.pop(entry, None)
            if not entry.is_whole and (pieces := self._pieces.get(entry.key)) is not None:
                pieces.pop(entry, None)
                if not pieces:
                    del self._pieces[entry.key]
            if record is not None and record.data is not None:
                self.in_memory -= record.size
            return record

    def put_back(self, entry: Entry, record: Record) -> None:
        """Undo a `pop`, as the first to go."""
        with self._lock:
            self._records[entry] = record
            self._records.move_to_end(entry, last=False)
            self._record_piece(entry)

    def _record_piece(self, entry: Entry) -> None:
        if not entry.is_whole:
            self._pieces.setdefault(entry.key, {})[entry] = None


# -- Metadata fingerprints and the negative cache.

_REMEMBERED: Final = 65536


class KnownDocuments:
    """The metadata documents under which entries were cached, and the missing documents and chunks."""

    def __init__(self, index: MemoryIndex) -> None:
        self._index = index
        self._digests: dict[str, bytes] = {}
        self._absent: dict[str, float] = {}
        self._missing: dict[str, tuple[float, WriteVersion]] = {}

    async def apply_document(
        self, key: str, document: bytes | None, version: WriteVersion | None, drop: Callable[[str], Awaitable[None]]
    ) -> WriteVersion | None:
        """Invalidate the arrays that a document shows to have changed; returns the version to publish it with."""

        def known_beneath(path: str) -> list[str]:
            return [node for node in self._digests if node.startswith(f"{path}/" if path else "")]

        expected = version
        described = metadata.describe(key, document)
        gone = document is None and Entry(key) in self._index
        for path in metadata.changed_arrays(key, described, self._digests.get, known_beneath, gone=gone):
            # values of an earlier process are not in this index; and the own drop must not count as another writer's
            expected = None if expected is None else (expected[0], expected[1] + 1)
            names = metadata.of_array(path)
            kept = {node: self._digests[node] for node in names if node in self._digests}
            await drop(path)
            if any(node in described.arrays | described.attributes for node in names):
                # an array and its attributes have separate documents
                self._digests.update(kept)
        if expected is None or expected != self._index.write_version(key):
            return None
        self._digests.update(described.arrays | described.attributes)
        if document is None:
            self._absent[key] = time.time()
        return expected

    def _is_document_missing(self, key: str, max_age: Age) -> bool:
        """Whether a document is known to be missing from a node that has other documents."""
        recorded = self._absent.get(key)
        return (
            recorded is not None
            and is_fresh(recorded, max_age)
            and any(Entry(sibling) in self._index for sibling in metadata.siblings(key))
        )

    def is_missing(self, key: str, max_age: Age) -> bool:
        """Whether a key is known to be missing at the source."""
        if is_document(key):
            return self._is_document_missing(key, max_age)
        at, version = self._missing.get(key, (0.0, None))
        return version == self._index.write_version(key) and is_fresh(at, max_age)

    def record_missing(self, key: str, version: WriteVersion) -> None:
        """Record that a chunk is missing at the source, until it is written."""
        if len(self._missing) >= _REMEMBERED:
            self._missing.clear()
        self._missing[key] = time.time(), version

    def record_document(self, key: str, document: bytes | None) -> None:
        """Remember the arrays of a document that was written through the cache."""
        described = metadata.describe(key, document)
        self._digests.update(described.arrays | described.attributes)

    def forget_absence(self, key: str) -> None:
        self._absent.pop(key, None)

    def forget(self, prefix: str) -> None:
        """Forget the fingerprints at a path and beneath it; all for an empty path."""
        for node in [n for n in self._digests if not prefix or n == prefix or n.startswith(f"{prefix}/")]:
            del self._digests[node]
        self._absent = {k: at for k, at in self._absent.items() if prefix and not k.startswith(f"{prefix}/")}
