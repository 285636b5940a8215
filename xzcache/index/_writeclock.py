"""Write counters: whether a key, or a prefix of it, was written since a point in time."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from xzcache.index._locks import open_lock_file
from xzcache.model import lock_offset

if TYPE_CHECKING:
    from collections.abc import Sequence


# 8 MiB of a sparse file, of which only the blocks with counters in use take room
_COUNT: Final = 1 << 20
_MOST_SEEN: Final = 4096
_LARGEST: Final = (1 << 64) - 1


def write_counter(key: str) -> int:
    """The number of the counter of writes of a key."""
    return lock_offset(key) % _COUNT


def prefix_counter(prefix: str) -> int:
    """The number of the counter of writes that concern everything beneath a prefix."""
    # no key ends with a slash, so the text of a prefix is never that of a key
    return write_counter(prefix + "/")


def data_counter(prefix: str) -> int:
    """The number of the counter for everything beneath a prefix except metadata documents."""
    return write_counter(prefix + "//")


def missing_counter(array: str) -> int:
    """The number of the counter for the negative cache of an array."""
    return write_counter(array + "///")


@lru_cache(maxsize=4096)
def counters_of(key: str, *, data: bool) -> tuple[int, ...]:
    """The numbers of all counters that writes to a key or its prefixes increment; `data`: not a document."""
    # asked for several times in the life of a fetch
    return (lock_offset(key) % _COUNT, *_counters_above(key[: key.rfind("/") + 1], data=data))


@lru_cache(maxsize=1024)
def _counters_above(directory: str, *, data: bool) -> tuple[int, ...]:
    # the same for all chunks of an array; a directory ends in a slash
    above = [directory[: end + 1] for end, character in enumerate(directory) if character == "/"]
    return tuple(counter for folder in above for counter in _counters_of_folder(folder)[: 2 if data else 1])


@lru_cache(maxsize=4096)
def _counters_of_folder(folder: str) -> tuple[int, int]:
    # those of `prefix_counter` and `data_counter`
    return lock_offset(folder) % _COUNT, lock_offset(folder + "/") % _COUNT


class WriteCounters:
    """Counters in a file that show whether a key was written; they keep fetches from before a write out of the cache.

    Keys with the same hash share a counter: a false alarm costs one entry that is not cached. Increments require the
    guard, reads require no lock.

    Behind all counters are two numbers, whose space is allocated in advance. The total is incremented after any
    counter. The other one is drawn anew by each `lost` write, which could not be counted and may have been to any key:
    without the guard, or on a full disk. While these two are unchanged, so are all counters.
    """

    def __init__(self, path: str) -> None:
        self.fd = open_lock_file(path)
        self._seen: tuple[bytes, dict[int, int]] = (b"", {})
        if hasattr(os, "posix_fallocate"):
            with suppress(OSError):
                # on a full disk, these two numbers can still be written
                os.posix_fallocate(self.fd, _COUNT * 8, 16)

    def current(self) -> tuple[int, dict[int, int]]:
        """The number of the last lost write, and the counters that are known to be unchanged: one read of the file."""
        totals, counts = self._current()
        return int.from_bytes(totals[8:], "little"), counts

    def totals(self) -> bytes:
        """The two numbers behind the counters: while they are equal, no counter has changed."""
        return os.pread(self.fd, 16, _COUNT * 8)

    def _current(self) -> tuple[bytes, dict[int, int]]:
        # both numbers in one read, so that they are of one moment
        totals = os.pread(self.fd, 16, _COUNT * 8).ljust(16, b"\0")
        # one tuple, replaced as a whole: threads that read it need no lock
        seen, counts = self._seen
        if seen != totals or len(counts) > _MOST_SEEN:
            counts = {}
            self._seen = totals, counts
        return totals, counts

    def values(self, counters: Sequence[int], counts: dict[int, int]) -> list[int]:
        """The values of some counters; those that are not in `counts` are read and added to it."""
        for counter in counters:
            if counter not in counts:
                raw = os.pread(self.fd, 8, counter * 8)
                counts[counter] = int.from_bytes(raw, "little") if len(raw) == 8 else 0
        return [counts[counter] for counter in counters]

    def before(self, counters: Sequence[int]) -> tuple[int, ...]:
        """The last lost write and the values of some counters; most calls need only one read of the file."""
        # as `_current` and `values`: a fetch asks several times
        totals = os.pread(self.fd, 16, _COUNT * 8)
        seen, counts = self._seen
        if seen != totals or len(counts) > _MOST_SEEN:
            totals, counts = self._current()
        lost = int.from_bytes(totals[8:], "little")
        try:
            return (lost, *[counts[counter] for counter in counters])
        except KeyError:
            return (lost, *self.values(counters, counts))

    def read(self, counter: int) -> int:
        return self.before([counter])[1]

    def increment(self, counter: int) -> None:
        """Count one write; under the guard. Raises `OSError` if it cannot even be counted as lost."""
        try:
            totals, counts = self._current()
            # read anew: a process that was killed here may have written the counter without the total
            count = (self.values([counter], {})[0] + 1) & _LARGEST
            total = ((int.from_bytes(totals[:8], "little") + 1) & _LARGEST).to_bytes(8, "little")
            # the counter first: a reader that sees the new total reads the counter again
            os.pwrite(self.fd, count.to_bytes(8, "little"), counter * 8)
            os.pwrite(self.fd, total, _COUNT * 8)
        except OSError:
            self.lose()
        else:
            counts[counter] = count
            self._seen = total + totals[8:], counts

    def increment_beneath(self, prefix: str) -> None:
        """Count one write to everything beneath a prefix, or to all keys if it is empty; otherwise as `increment`."""
        # no key looks at a counter of the empty prefix
        if prefix:
            self.increment(prefix_counter(prefix))
        else:
            self.lose()

    def lose(self) -> None:
        """Count one write, perhaps to any key; needs no guard, since concurrent ones cannot be mistaken for none."""
        # a random number, because without the guard two processes could both add one to the same number
        os.pwrite(self.fd, secrets.token_bytes(8), (_COUNT + 1) * 8)

    def close(self) -> None:
        os.close(self.fd)
