"""Where the file of an entry lies below the cache directory."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

from xzcache.model import META, Entry

# the limit of names on nearly all file systems, in bytes
_LONGEST_COMPONENT: Final = 255
# names and characters that Windows reserves
_RESERVED: Final = re.compile(r'[<>:"\\|?*\x00-\x1f]|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)|[. ](/|$)', re.I)
_SIMPLE: Final = re.compile(r"[\w\-][\w.\-]*(/[\w\-][\w.\-]*)*", re.ASCII)


def is_plain(key: str, *, folds: bool = False) -> bool:
    """Whether a key can be used as a path below the cache directory; `folds` for file systems that fold case."""
    # nearly every key of a Zarr array leaves here
    if _SIMPLE.fullmatch(key) and len(key) < _LONGEST_COMPONENT and not folds and os.name != "nt":
        return True
    components = key.split("/")
    return not (
        any(c in ("", ".", "..") or len(os.fsencode(c)) > _LONGEST_COMPONENT for c in components)
        or "\0" in key
        or components[0] == META
        # on a file system that folds case, two keys could share one file: all others than plain lower case are hashed
        or (folds and (not key.isascii() or key != key.lower()))
        or (sys.platform == "win32" and _RESERVED.search(key) is not None)
    )


def relative_path(entry: Entry, *, hashed: bool) -> str:
    """Where the file of an entry lies below the cache directory.

    A whole object lies at its own key, so that a namespace opens as an ordinary Zarr `LocalStore`. Byte ranges of one
    object share a directory, so that they are found without the index; `hashed` keys, which cannot be paths, lie under
    their digest.
    """
    if not entry.is_whole:
        return f"{range_directory(entry.key)}/{entry.start}_{entry.stop}"
    if hashed:
        name = entry.digest().hex()
        return f"{META}/odd/{name[:2]}/{name}"
    return entry.key


def range_directory(key: str) -> str:
    """The directory of all byte ranges of one object."""
    name = Entry(key).digest().hex()
    # two digits of the hash between, because many file systems are slow in directories of a million names
    return f"{META}/ranges/{name[:2]}/{name}"
