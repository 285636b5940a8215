"""Write counters: whether a key, or a prefix of it, was written since a point in time."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from xzcache.index._locks import open_lock_file
from xzcache.model import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_MOST_SEEN: Final = 4096


def write_counter(key: str) -> int:
    """The number of the counter of writes of a key."""
    return Entry(key).lock_offset()


def prefix_counter(prefix: str) -> int:
    """The number of the counter of writes that concern everything beneath a prefix."""
    return Entry(prefix + "/").lock_offset()


def data_counter(prefix: str) -> int:
    """The number of the counter for everything beneath a prefix except metadata documents."""
    return Entry(prefix + "//").lock_offset()


def missing_counter(array: str) -> int:
    """The number of the counter for the negative cache of an array."""
    return Entry(array + "///").lock_offset()


def counters_of(key: str, *, data: bool) -> tuple[int, ...]:
    """The numbers of all counters that writes to a key or its prefixes increment; `data`: not a document."""
    return (write_counter(key), *_counters_above(key[: key.rfind("/") + 1], data=data))


@lru_cache(maxsize=1024)
def _counters_above(directory: str, *, data: bool) -> tuple[int, ...]:
    # the same for all chunks of an array; a directory ends in a slash
    above = [directory[:end] for end, character in enumerate(directory) if character == "/"]
    counters = tuple(map(prefix_counter, above))
    return (*counters, *map(data_counter, above)) if data else counters


class WriteCounters:
    """Counters in a file that show whether a key was written; they keep fetches from before a write out of the cache.

    Keys with the same hash share a counter: a false alarm costs one entry that is not cached. Increments require the
    guard, reads require no lock.

    One total behind all counters is incremented after any of them: while the total is unchanged, so are they. A second
    one counts the `lost` writes, whose own counter could not be incremented because the disk was full. The space of
    these two is allocated in advance.
    """

    COUNT: Final = 1 << 20

    def __init__(self, path: str) -> None:
        self.fd = open_lock_file(path)
        self._seen: tuple[bytes, dict[int, int]] = (b"", {})
        if hasattr(os, "posix_fallocate"):
            with suppress(OSError):
                os.posix_fallocate(self.fd, self.COUNT * 8, 16)

    def read(self, counter: int) -> int:
        return self._read(counter % self.COUNT)

    def current(self) -> tuple[int, dict[int, int]]:
        """The number of lost writes, and the counters that were read since the last write: one read of the file.

        A counter that is being incremented without the guard may still have its old value, as its total is incremented
        last. That is safe, because no file is unlinked before that: a publish that misses the increment comes before
        the invalidation.
        """
        totals = os.pread(self.fd, 16, self.COUNT * 8)
        seen, counts = self._seen
        if seen != totals or len(counts) > _MOST_SEEN:
            counts = {}
            self._seen = totals, counts
        return int.from_bytes(totals[8:], "little"), counts

    def values(self, counters: Sequence[int], counts: dict[int, int]) -> Iterator[int]:
        """The values of some counters; those that are not in `counts` are read and added to it."""
        for counter in counters:
            if (value := counts.get(counter)) is None:
                value = counts[counter] = self._read(counter % self.COUNT)
            yield value

    def before(self, counters: Sequence[int]) -> tuple[int, ...]:
        """The lost writes and the values of some counters; most calls need only one read of the file."""
        lost, counts = self.current()
        return (lost, *self.values(counters, counts))

    def increment(self, counter: int) -> None:
        """Count one write."""
        try:
            self._raise(counter % self.COUNT)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._raise(self.COUNT + 1)
        try:
            self._raise(self.COUNT)
        except OSError:
            # a counter that was raised counts only once the totals have changed
            self._raise(self.COUNT + 1)
            raise

    def _read(self, position: int) -> int:
        raw = os.pread(self.fd, 8, position * 8)
        return int.from_bytes(raw, "little") if len(raw) == 8 else 0

    def _raise(self, position: int) -> None:
        count = (self._read(position) + 1) & 0xFFFF_FFFF_FFFF_FFFF
        os.pwrite(self.fd, count.to_bytes(8, "little"), position * 8)

    def close(self) -> None:
        os.close(self.fd)
