"""Which bytes an entry holds, and where in the cache directory it lies.

An entry is `(key, start, stop)`. Its key is the namespace of the source and the Zarr key, joined by a slash.
"""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest

META: Final = ".xzcache"
"""The one name in a cache directory that is ours alone."""

END: Final = -1
"""A `stop` of END reads to the end of the object; a negative `start` counts back from there."""

_LONGEST_COMPONENT: Final = 255
_LONGEST_PATH: Final = 3000
_RESERVED: Final = re.compile(r'[<>:"\\|?*\x00-\x1f]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[. ](/|$)', re.I)
_SIMPLE: Final = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)*", re.ASCII)
_SLOTS: Final = 62
_LARGEST: Final = 1 << 62


class Entry(NamedTuple):
    """One immutable cached value: the whole of an object, or one byte range of it."""

    key: str
    start: int = 0
    stop: int = END

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
        return int.from_bytes(self.digest()[:8], "little") & ((1 << _SLOTS) - 1)


@lru_cache(maxsize=4096)
def _digest(key: str, start: int, stop: int) -> bytes:
    # asked for several times in the life of a fetch
    return blake2b(f"{key}\0{start}\0{stop}".encode(), digest_size=16).digest()


def span(byte_range: ByteRequest | None) -> tuple[int, int] | None:
    """`(start, stop)` of a Zarr byte request; None for one that makes no sense, which is the source's to answer."""
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
    if entry.start < 0 or outer.start < 0:
        # counted from the end, which both have
        return clip(entry.start, END, size)
    stop = END if entry.stop == END else entry.stop - outer.start
    return clip(entry.start - outer.start, stop, size)


def is_cacheable(key: str) -> bool:
    """Whether a key can be written down at all: as UTF-8, in the stamp of a file."""
    try:
        return len(key.encode()) <= _LONGEST_PATH
    except UnicodeEncodeError:
        return False


def is_plain(key: str, *, folds: bool = False) -> bool:
    """Whether a key may be used as a path below the cache directory, as it is.

    Parameters
    ----------
    key : str
    folds : bool
        Whether the file system takes names that differ in case or Unicode form for the same.
    """
    # nearly every key of a Zarr array leaves here
    if _SIMPLE.fullmatch(key) and len(key) < _LONGEST_COMPONENT and not folds and os.name != "nt":
        return True
    components = key.split("/")
    return not (
        any(c in ("", ".", "..") or len(os.fsencode(c)) > _LONGEST_COMPONENT for c in components)
        or "\0" in key
        or components[0] == META
        or (folds and (not key.isascii() or key != key.lower()))
        or (sys.platform == "win32" and _RESERVED.search(key) is not None)
    )


def relative_path(entry: Entry, *, odd: bool) -> str:
    """Where the file of an entry lies below the cache directory.

    A whole object lies at its own key, so that a namespace opens as an ordinary Zarr `LocalStore`. Byte ranges of one
    object share a directory, so that they are found without the index; `odd` keys, which cannot be paths, lie under
    their digest.
    """
    if not entry.is_whole:
        name = Entry(entry.key).digest().hex()
        return f"{META}/ranges/{name[:2]}/{name}/{entry.start}_{entry.stop}"
    if odd:
        name = entry.digest().hex()
        return f"{META}/odd/{name[:2]}/{name}"
    return entry.key


def range_directory(key: str) -> str:
    """The directory of all byte ranges of one object."""
    return os.path.dirname(relative_path(Entry(key, 0, 0), odd=False))


def namespace_of(key: str) -> str:
    """The part of an entry's key that names its source; "" for a key at the top."""
    return key.partition("/")[0] if "/" in key else ""


def write_slot(key: str) -> int:
    """The number of the counter of writes of a key."""
    return Entry(key).lock_offset()


def prefix_slot(prefix: str) -> int:
    """The number of the counter of writes that concern everything beneath a prefix."""
    return Entry(prefix + "/").lock_offset()


def data_slot(prefix: str) -> int:
    """The number of the counter of what concerns all that is beneath a prefix but metadata documents."""
    return Entry(prefix + "//").lock_offset()


def absence_slot(array: str) -> int:
    """The number of the counter of what was found to be absent of an array."""
    return Entry(array + "///").lock_offset()


def all_slots(key: str, *, data: bool) -> tuple[int, ...]:
    """The numbers of all counters that a write of a key, or of anything above it, raises.

    Parameters
    ----------
    key : str
    data : bool
        Whether it is something else than a metadata document.
    """
    return (write_slot(key), *_slots_above(key[: key.rfind("/") + 1], data=data))


@lru_cache(maxsize=1024)
def _slots_above(directory: str, *, data: bool) -> tuple[int, ...]:
    # the same for all chunks of an array; a directory ends in a slash
    above = [directory[:end] for end, character in enumerate(directory) if character == "/"]
    slots = tuple(map(prefix_slot, above))
    return (*slots, *map(data_slot, above)) if data else slots
