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
_STAMP: Final = struct.Struct("<B16sIQqq")
_VERSION: Final = 1

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
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

    def encode(self) -> bytes:
        return _STAMP.pack(_VERSION, self.digest, self.crc, self.size, self.start, self.stop) + self.key.encode()

    @property
    def entry(self) -> Entry:
        return Entry(self.key, self.start, self.stop)


def stamp_of(entry: Entry, data: Data) -> Stamp:
    """The stamp of a file that will hold `data` at the entry's own key."""
    return Stamp(entry.digest(), checksum(data), len(data), entry.start, entry.stop, "")


def _attribute(file: int | str) -> bytes:
    # a link is not one of our files, whatever it leads to
    return (
        os.getxattr(file, _ATTRIBUTE) if isinstance(file, int) else os.getxattr(file, _ATTRIBUTE, follow_symlinks=False)
    )


def read_stamp(file: int | str) -> Stamp | None:
    """The stamp of a file, by descriptor or path; None where it has none that we can read."""
    try:
        raw = _attribute(file)
        version, digest, crc, size, start, stop = _STAMP.unpack_from(raw)
        if version != _VERSION:
            return None
        return Stamp(digest, crc, size, start, stop, raw[_STAMP.size :].decode())
    except (OSError, AttributeError, struct.error, UnicodeDecodeError):
        return None


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
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
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
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
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


def ours(path: str, entry: Entry) -> bool | None:
    """Whether the file at a path is the one that we wrote for an entry; None where its file system cannot tell us.

    A copy of one of our files that lies elsewhere is its maker's.
    """
    if (stamp := read_stamp(path)) is not None:
        return stamp.digest == entry.digest()
    return None if not has_stamps(path) and not os.path.islink(path) else False


def discard_ours(path: str, entry: Entry) -> None:
    """Unlink a file if it is the one that we wrote for an entry, as far as its file system can tell."""
    if os.path.lexists(path) and ours(path, entry) is not False:
        discard(path)


def blocked(path: str, entry: Entry | None) -> bool:
    """Whether something keeps an entry from `path`: what is no regular file, or, given the entry, is not its file."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return not stat.S_ISREG(status.st_mode) or (entry is not None and not ours(path, entry))


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


class Opened(NamedTuple):
    """A file that was found and is open: whoever holds it closes the descriptor."""

    fd: int
    size: int
    mtime_ns: int
    inode: int

    @property
    def signature(self) -> tuple[int, int, int]:
        """What stays the same for as long as nobody replaces or writes the file."""
        return self.inode, self.mtime_ns, self.size


def open_file(path: str) -> Opened | None:
    """Open a regular file; None where there is no file of that name.

    Raises
    ------
    NotADirectoryError, IsADirectoryError
        Something else is there: a file where the path has a directory, a directory, a link, a pipe.
    OSError
        Anything but absence: EIO, EACCES, EMFILE, ESTALE, ...
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise IsADirectoryError(error.errno, error.strerror, path) from None
        raise
    try:
        status = os.fstat(fd)
    except OSError:
        os.close(fd)
        raise
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return Opened(fd, status.st_size, status.st_mtime_ns, status.st_ino)


def read(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes `first` up to `last` of a file; None where it turns out to be shorter."""
    data = os.pread(fd, last - first, first)
    while len(data) < last - first:
        more = os.pread(fd, last - first - len(data), first + len(data))
        if not more:
            return None
        data += more
    return memoryview(data)


def read_resident(fd: int, first: int, last: int) -> memoryview | None:
    """Bytes of a file if they are in memory, so that reading them cannot block; else None."""
    data = np.empty(last - first, dtype=np.uint8)
    try:
        if os.preadv(fd, [data], first, os.RWF_NOWAIT) != last - first:
            return None
    except AttributeError:
        return None
    except OSError as error:
        # a file system that is memory does not know the flag
        return read(fd, first, last) if error.errno == errno.EOPNOTSUPP else None
    return memoryview(data).toreadonly()
