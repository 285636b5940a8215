"""Which bytes of which object an entry holds.

An entry is `(key, start, stop)`. Its key is the namespace of the source and the Zarr key, joined by a slash.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest

Data = bytes | bytearray | memoryview

Extent = tuple[str, int, int]
"""The key, the start and the stop of an entry: an `Entry`, or a bare tuple, which equals it and is cheaper to make."""


META: Final = ".xzcache"
"""The reserved name in a cache directory; everything beneath it belongs to xzcache."""

END: Final = -1
"""A `stop` of END reads to the end of the object; a negative `start` counts back from there."""

_LONGEST_PATH: Final = 3000
_OFFSETS: Final = (1 << 62) - 1
_LARGEST: Final = 1 << 62


class Entry(NamedTuple):
    """One immutable cached value: the whole of an object, or one byte range of it."""

    key: str
    start: int = 0
    stop: int = END

    def __str__(self) -> str:
        """The key, and the byte range where it is one."""
        return self.key if self.is_whole else f"{self.key}[{self.start}:{'' if self.stop == END else self.stop}]"

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == END

    @property
    def whole(self) -> Entry:
        return self if self.is_whole else Entry(self.key)

    def digest(self) -> bytes:
        """16 bytes that stand for this entry wherever its name would be too long."""
        return _digest(self.key, self.start, self.stop)

    def lock_offset(self) -> int:
        """The byte of the lock files that stands for this entry."""
        return int.from_bytes(self.digest()[:8], "little") & _OFFSETS


@lru_cache(maxsize=4096)
def _digest(key: str, start: int, stop: int) -> bytes:
    # asked for several times in the life of a fetch
    return blake2b(f"{key}\0{start}\0{stop}".encode(), digest_size=16).digest()


@lru_cache(maxsize=4096)
def lock_offset(key: str) -> int:
    """The byte of the lock files that stands for a whole object."""
    return int.from_bytes(_digest(key, 0, END)[:8], "little") & _OFFSETS


def span(byte_range: ByteRequest | None) -> tuple[int, int] | None:
    """`(start, stop)` of a Zarr byte request; None for an invalid one, which the source must answer."""
    if byte_range is None:
        return 0, END
    if isinstance(byte_range, RangeByteRequest):
        start, stop = byte_range.start, byte_range.end
        return (start, stop) if 0 <= start <= stop <= _LARGEST else None
    if isinstance(byte_range, OffsetByteRequest):
        return (byte_range.offset, END) if 0 <= byte_range.offset <= _LARGEST else None
    if isinstance(byte_range, SuffixByteRequest):
        return (-byte_range.suffix, END) if 0 < byte_range.suffix <= _LARGEST else None
    raise TypeError(f"Unexpected byte_range, got {byte_range!r}.")


def clip(start: int, stop: int, size: int) -> tuple[int, int]:
    """The absolute `(first, last + 1)` of a span within an object of `size` bytes."""
    if start < 0:
        start = max(0, size + start)
    stop = size if stop == END else min(stop, size)
    return min(start, size), max(stop, min(start, size))


def within(entry: Entry, outer: Entry, size: int) -> tuple[int, int]:
    """Where an entry lies, as `(first, last + 1)`, within another one that holds it, of `size` bytes."""
    return place_within(entry.start, entry.stop, outer.start, size)


def place_within(start: int, stop: int, outer: int, size: int) -> tuple[int, int]:
    """Where a span lies, as `(first, last + 1)`, within `size` bytes that begin at the byte `outer` and hold it."""
    if start < 0 or outer < 0:
        # both are counted from the end of the object
        return clip(start, END, size)
    return clip(start - outer, END if stop == END else stop - outer, size)


@lru_cache(maxsize=1024)
def is_cacheable(key: str) -> bool:
    """Whether a key can be written down at all: as UTF-8, in the stamp of a file."""
    try:
        return len(key.encode()) <= _LONGEST_PATH
    except UnicodeEncodeError:
        return False


def namespace_of(key: str) -> str:
    """The part of an entry's key that names its source; "" for a key at the top."""
    return key.partition("/")[0] if "/" in key else ""
