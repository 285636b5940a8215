"""The counters of writes: whether a key, or anything above it, was written since."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from xzcache.index._locks import open_lock_file
from xzcache.model import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence


_MOST_SEEN: Final = 4096


def write_counter(key: str) -> int:
    """The number of the counter of writes of a key."""
    return Entry(key).lock_offset()


def prefix_counter(prefix: str) -> int:
    """The number of the counter of writes that concern everything beneath a prefix."""
    return Entry(prefix + "/").lock_offset()


def data_counter(prefix: str) -> int:
    """The number of the counter of what concerns all that is beneath a prefix but metadata documents."""
    return Entry(prefix + "//").lock_offset()


def missing_counter(array: str) -> int:
    """The number of the counter of what was found to be absent of an array."""
    return Entry(array + "///").lock_offset()


def counters_of(key: str, *, data: bool) -> tuple[int, ...]:
    """The numbers of all counters that a write of a key, or of anything above it, raises.

    Parameters
    ----------
    key : str
    data : bool
        Whether it is something else than a metadata document.
    """
    return (write_counter(key), *_counters_above(key[: key.rfind("/") + 1], data=data))


@lru_cache(maxsize=1024)
def _counters_above(directory: str, *, data: bool) -> tuple[int, ...]:
    # the same for all chunks of an array; a directory ends in a slash
    above = [directory[:end] for end, character in enumerate(directory) if character == "/"]
    counters = tuple(map(prefix_counter, above))
    return (*counters, *map(data_counter, above)) if data else counters


class WriteCounters:
    """Counters in a file that tell whether a key was written since; protects the cache from fills that began before.

    A slot is shared by the keys that hash to it: a false alarm costs one entry that is not cached. Bumps happen under
    the guard; reads need no lock.

    Parameters
    ----------
    path : str
        The file of counters.

    Notes
    -----
    One more counter, behind all slots, is raised after any of them was: while it stands still, so do they. Beside it is
    the one of `lost` writes, whose own slot could not be raised for want of room; these two have their room from the
    beginning.
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

    def lost(self) -> int:
        """How many writes could not be counted: each may have been of any key."""
        return self._read(self.COUNT + 1)

    def before(self, counters: Sequence[int]) -> tuple[int, ...]:
        """How many were lost, and the counts of some slots: now, or from a moment ago, where somebody just raises one.

        Most need no look at the file. Older counts are safe for whoever begins something that may only be finished
        while `read` still says the same.
        """
        totals = os.pread(self.fd, 16, self.COUNT * 8)
        seen, counts = self._seen
        if seen != totals or len(counts) > _MOST_SEEN:
            counts = {}
            self._seen = totals, counts
        for counter in counters:
            if counter not in counts:
                counts[counter] = self.read(counter)
        return (int.from_bytes(totals[8:], "little"), *[counts[counter] for counter in counters])

    def increment(self, counter: int) -> None:
        """Count one write."""
        try:
            self._raise(counter % self.COUNT)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._raise(self.COUNT + 1)
        self._raise(self.COUNT)

    def _read(self, position: int) -> int:
        raw = os.pread(self.fd, 8, position * 8)
        return int.from_bytes(raw, "little") if len(raw) == 8 else 0

    def _raise(self, position: int) -> None:
        count = (self._read(position) + 1) & 0xFFFF_FFFF_FFFF_FFFF
        os.pwrite(self.fd, count.to_bytes(8, "little"), position * 8)

    def close(self) -> None:
        os.close(self.fd)
