"""Entry files: writing, stamping, checking and moving them. Plain blocking functions that know no index and no lock.

An entry file holds exactly the bytes of its object. What else there is to know of it (that it is ours, which entry it
is, its checksum) is its *stamp*, an extended attribute set before the file gets its name. Where the file system has no
extended attributes, the index answers instead.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import google_crc32c
import numpy as np

from xzcache._keys import META, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

_ATTRIBUTE: Final = "user.xzcache"
_NO_ATTRIBUTE: Final = getattr(errno, "ENODATA", None)
_STAMP: Final = struct.Struct("<B16sIQqq")
_VERSION: Final = 2
_WITHOUT_VALIDATOR: Final = 1
_LONGEST_VALIDATOR: Final = 200

_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

Data = bytes | bytearray | memoryview


def checksum(data: Data) -> int:
    """CRC-32C of some bytes."""
    # the library takes bytes and arrays without a copy, but no memoryview
    return int(google_crc32c.value(np.frombuffer(data, dtype=np.uint8))) if len(data) else 0


class Stamp(NamedTuple):
    """What an entry file says of itself."""

    digest: bytes
    crc: int
    size: int
    start: int
    stop: int
    key: str
    """The key of an entry whose path does not tell it; else empty."""
    validator: str = ""
    """What tells this state of the object from others, as its source has it; may be empty."""

    def encode(self) -> bytes:
        head = _STAMP.pack(_VERSION, self.digest, self.crc, self.size, self.start, self.stop)
        return head + f"{self.key}\0{self.validator}".encode()

    @property
    def entry(self) -> Entry:
        return Entry(self.key, self.start, self.stop)


def stamp_of(entry: Entry, data: Data, validator: str = "") -> Stamp:
    """The stamp of a file that will hold `data` at the entry's own key."""
    if len(validator) > _LONGEST_VALIDATOR or "\0" in validator or not validator.isascii():
        validator = ""
    return Stamp(entry.digest(), checksum(data), len(data), entry.start, entry.stop, "", validator)


def _attribute(file: int | str) -> bytes:
    # a link is not one of our files, whatever it leads to
    return (
        os.getxattr(file, _ATTRIBUTE) if isinstance(file, int) else os.getxattr(file, _ATTRIBUTE, follow_symlinks=False)
    )


def read_stamp(file: int | str) -> Stamp | None:
    """The stamp of a file, by descriptor or path; None where it has none that can be read, for whatever reason."""
    try:
        return _decode(_attribute(file))
    except (OSError, AttributeError):
        return None


def _decode(raw: bytes) -> Stamp | None:
    try:
        version, digest, crc, size, start, stop = _STAMP.unpack_from(raw)
        text = raw[_STAMP.size :].decode()
    except (struct.error, UnicodeDecodeError):
        return None
    if version == _WITHOUT_VALIDATOR:
        return Stamp(digest, crc, size, start, stop, text)
    key, _, validator = text.rpartition("\0")
    return Stamp(digest, crc, size, start, stop, key, validator) if version == _VERSION else None


def stamp_of_open(fd: int) -> tuple[Stamp | None, bool]:
    """The stamp of an open file, None where it has none that we can read; and whether that settles whose it is.

    It does not where the file system has no stamps, or where the stamp is garbage: then only the index can tell.

    Raises
    ------
    OSError
        Nobody can tell.
    """
    try:
        stamp = _decode(_attribute(fd))
    except AttributeError:
        return None, False
    except OSError as error:
        if error.errno not in (_NO_ATTRIBUTE, errno.ENOTSUP):
            raise
        return None, error.errno == _NO_ATTRIBUTE
    return stamp, stamp is not None


def write(path: str, data: Data, stamp: Stamp) -> None:
    """Make a new file of `data`, stamped where the file system can.

    Raises
    ------
    OSError
        The file is gone again then.
    """
    try:
        fd = os.open(path, _WRITE, 0o600)
    except FileNotFoundError:
        make_directories(os.path.dirname(path))
        fd = os.open(path, _WRITE, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        attach(fd, stamp)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def attach(file: int | str, stamp: Stamp) -> None:
    """Set the stamp of a file in flight."""
    if not hasattr(os, "setxattr"):
        return
    try:
        os.setxattr(file, _ATTRIBUTE, stamp.encode())
    except OSError as error:
        # a file system that has no stamps at all goes without; on any other, a file without one would not be ours
        if error.errno != errno.ENOTSUP or has_stamps(file):
            raise


def has_stamps(file: int | str) -> bool:
    """Whether the file system of a file has extended attributes."""
    try:
        _attribute(file)
    except AttributeError:
        return False
    except OSError as error:
        return error.errno != errno.ENOTSUP
    return True


def move(source: str, target: str) -> None:
    """Rename a file over whatever is at `target`, making the directories above it as needed."""
    try:
        os.replace(source, target)
    except FileNotFoundError:
        make_directories(os.path.dirname(target))
        os.replace(source, target)


def discard(path: str) -> None:
    """Unlink a file that may be gone."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)


def prune(path: str, root: str) -> None:
    """Remove the directories above `path` that have become empty, up to `root`."""
    directory = os.path.dirname(path)
    while len(directory) > len(root):
        try:
            os.rmdir(directory)
        except OSError:
            return
        directory = os.path.dirname(directory)


def marked(path: str) -> bool | None:
    """Whether the file at a path bears a mark of ours, whosever it is by now; None where nothing can bear one."""
    try:
        _attribute(path)
    except (OSError, AttributeError):
        return None if not has_stamps(path) and not os.path.islink(path) else False
    return True


def ours(path: str, entry: Entry) -> bool | None:
    """Whether the file at a path is the one that we wrote for an entry; None where only the index can tell.

    A copy of one of our files that lies elsewhere is its maker's.
    """
    if (stamp := read_stamp(path)) is not None:
        return stamp.digest == entry.digest()
    return None if marked(path) is not False else False


def discard_ours(path: str, entry: Entry) -> None:
    """Unlink a file if it is the one that we wrote for an entry, as far as its file system can tell."""
    if os.path.lexists(path) and ours(path, entry) is not False:
        discard(path)


def blocked(path: str, entry: Entry, *, known: bool) -> bool:
    """Whether something keeps an entry from lying at `path`.

    Parameters
    ----------
    path : str
    entry : Entry
    known : bool
        Whether the index has the entry there: then any file with a mark of ours is in its place, however damaged.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    if not stat.S_ISREG(status.st_mode):
        return True
    return marked(path) is False if known else not ours(path, entry)


def is_regular(path: str) -> bool:
    """Whether there is nothing at a path but perhaps a file."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def make_directories(path: str) -> None:
    """Make a directory and all that is missing above it, for this user only."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        make_directories(os.path.dirname(path))
        make_directories(path)


def walk(directory: str) -> Iterator[str]:
    """Paths of all files beneath a directory, ours apart (`.xzcache` at its top is passed over)."""
    stack = [directory]
    while stack:
        here = stack.pop()
        try:
            with os.scandir(here) as found:
                for item in found:
                    if item.is_dir(follow_symlinks=False):
                        if item.name != META or here != directory:
                            stack.append(item.path)
                    elif item.is_file():
                        yield item.path
        except (FileNotFoundError, NotADirectoryError):
            continue


def empty(directory: str) -> None:
    """Remove all that is in a directory of ours."""
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        for item in found:
            if item.is_dir(follow_symlinks=False):
                shutil.rmtree(item.path, ignore_errors=True)
            else:
                discard(item.path)
