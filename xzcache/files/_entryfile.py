"""Entry files: write, stamp, check and move them. Blocking functions without index and locks.

An entry file holds exactly the bytes of its object. Its *stamp*, an extended attribute that is set before the file gets
its name, identifies the entry and holds the checksum. On file systems without extended attributes, the index replaces
the stamp.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import struct
import tempfile
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import google_crc32c
import numpy as np

from xzcache.model import END, META, Data, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator


# -- Properties of a file system and of a directory: owner, free space, case folding.

_NUMBER: Final = re.compile(r"\\([0-7]{3})")
# the names that Linux gives file systems in `mountinfo`
_LOCAL: Final = frozenset(
    [
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "jfs", "nilfs2", "reiserfs", "ubifs"),
        *("ntfs", "ntfs3", "exfat", "vfat", "msdos", "hfs", "hfsplus", "apfs", "ufs"),
        *("overlay", "aufs", "ecryptfs", "fuseblk"),
        *("fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs", "fuse.gocryptfs", "fuse.encfs"),
    ]
)
"""Kinds of file systems that keep their bytes on disks of this machine, or on top of others that do."""
_OF_THE_KERNEL: Final = frozenset(["proc", "sysfs", "cgroup", "cgroup2", "devtmpfs", "debugfs", "tracefs"])
"""Kinds that keep no files of anyone."""
_IN_MEMORY: Final = frozenset(["tmpfs", "ramfs", "rootfs"])


class Medium(Enum):
    """The kind of medium that a file system keeps its bytes on."""

    DISK = "a disk of this machine"
    MEMORY = "the memory of this machine"
    ELSEWHERE = "another machine, or a program that may ask one"
    UNKNOWN = "the platform does not report it"


def folds_case(directory: str) -> bool:
    """Whether a file system takes names that differ in case for the same."""
    head, tail = os.path.split(directory)
    # the folder of the cache exists under its own name; under a changed one only if case is folded
    return os.path.exists(os.path.join(head, tail.swapcase()))


def user() -> int:
    """The user id under which this process creates files; -1 if the platform has none."""
    return os.geteuid() if hasattr(os, "geteuid") else -1


def private_name() -> str:
    """The name of this user's folder in a directory that other users share."""
    return f"xzcache-{user() if hasattr(os, 'geteuid') else os.environ.get('USERNAME', 'user')}"


def temporary() -> str | None:
    """The system's directory of temporary files; None where there is none."""
    with suppress(OSError):
        return os.path.abspath(tempfile.gettempdir())
    return None


def resolve_directory(path: str) -> str:
    """The directory of the cache for a path: the path itself, or this user's folder in it if the path is shared.

    A directory is shared if it belongs to another user or if others may write it, as container volumes are. An empty
    directory of this user that others may write is made private before its use. One that holds a cache already is
    refused until its mode is fixed: a second cache in it would leave the files of the first uncounted. The result has
    no links, except that the user's folder itself may be one.
    """
    parent, name = os.path.split(path)
    if name == private_name():
        # the folder itself may be a link: the user has set it
        return os.path.join(os.path.realpath(parent), name)
    real = os.path.realpath(path)
    try:
        return os.path.join(real, private_name()) if os.path.isdir(real) and _is_shared(real) else real
    except OSError:
        # the error is reported when the directory is used
        return real


def _is_shared(path: str) -> bool:
    status = os.stat(path)
    if _is_another(status):
        return True
    if not _others_may_write(status):
        return False
    names = os.listdir(path)
    return bool(names) and (META not in names or _is_another(os.lstat(os.path.join(path, META))))


def can_be_made(path: str) -> bool:
    """Whether this user may write a directory, or can create it, as far as can be checked without trying."""
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.R_OK | os.W_OK | os.X_OK)


def make_private(path: str) -> None:
    """Create a directory that only this user can enter; no other user can write the parents that are created.

    An existing directory is left alone unless it is empty: no program relies on the mode of an empty directory. Raises
    `OSError` if it cannot be created.
    """
    parent = os.path.dirname(path)
    if parent != path and not os.path.isdir(parent):
        _make_above(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode) and not _is_another(status) and status.st_mode & 0o77:
            with suppress(OSError):
                if not os.listdir(path):
                    os.chmod(path, 0o700)


def _make_above(path: str) -> None:
    parent = os.path.dirname(path)
    if parent != path and not os.path.isdir(parent):
        _make_above(parent)
    with suppress(FileExistsError):
        # 0o755, since the parents are ordinary folders: other users may enter them, but not write
        os.mkdir(path, 0o755)


def unsafe(path: str) -> str | None:
    """The reason why a directory must not be used; None if it belongs to this user and no other user may write it.

    Raises `OSError` if the directory is missing or cannot be checked.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a link"
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is a file, where a directory should be", path)
    if _is_another(status):
        return f"{path} belongs to another user (uid {status.st_uid})"
    if _others_may_write(status):
        return f"{path} may be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _is_another(status: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and status.st_uid != user()


def _others_may_write(status: os.stat_result) -> bool:
    # with an access control list, the group bits are the upper limit for every other user
    return hasattr(os, "geteuid") and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def free_bytes(path: str) -> tuple[int, int]:
    """Bytes that are free to this user on the file system of `path`, and bytes in all."""
    status = os.statvfs(path)
    # of blocks that are free to this user: those that are reserved for root cannot be written
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def sync(path: str) -> None:
    """Sync a file, or the names in a directory, to the disk; raises `OSError` if that fails."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(fd: int) -> None:
    """Sync the file system of an open file to the disk; raises `OSError` if that fails."""
    # Python has no `syncfs`; `os.sync` would wait for all disks of the machine
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if os.name == "posix" else None
    if call is None:
        os.sync()
    elif call(fd) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _sign(number: re.Match[str]) -> str:
    return chr(int(number[1], 8))


def medium_of(path: str) -> tuple[Medium, str]:
    """The medium of the file system that a path is on, and the name of its kind, empty if it is unknown.

    New kinds of network file systems appear faster than local ones, so all that are not known to be local count as
    elsewhere.
    """
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            # a blank in a name is written as its number
            mounts = [[_NUMBER.sub(_sign, field) for field in line.split()] for line in file]
    except OSError:
        return Medium.UNKNOWN, ""
    real = os.path.realpath(path)
    above = [
        (len(fields[4]), fields[fields.index("-") + 1])
        for fields in mounts
        if real == fields[4] or real.startswith(fields[4].rstrip("/") + "/")
    ]
    # of mounts at one place the last one counts
    kind = max(enumerate(above), key=lambda item: (item[1][0], item[0]), default=(0, (0, "")))[1][1]
    if not kind or kind in _OF_THE_KERNEL:
        return Medium.UNKNOWN, kind
    if kind in _IN_MEMORY:
        return Medium.MEMORY, kind
    return (Medium.DISK if kind in _LOCAL else Medium.ELSEWHERE), kind


# -- Entry files.

_ATTRIBUTE: Final = "user.xzcache"
_NO_ATTRIBUTE: Final = getattr(errno, "ENODATA", None)
# the order and sizes are those of version 0.1.0, which reads the stamps of whole objects
_STAMP: Final = struct.Struct("<B16sIQqq")
_OF_A_PIECE: Final = 60
_OF_A_WHOLE: Final = 2
"""The stamp version of whole objects, which xzcache 0.1.0 knows. It does not know the version of byte ranges.

A process of version 0.1.0 that writes without the index unlinks only files that it recognizes, so it must recognize
whole objects. It removes byte ranges unchecked, but must not read them, because it cannot compare their states.
"""
_WITHOUT_VALIDATOR: Final = 1
_CHECKED: Final = "\1"
"""Starts the checksum of a stamp; stamps of version 0.1.0 have none."""
_VALIDATORS_OF_OLD: Final = ("etag ", "time ", "file ")
_LONGEST_VALIDATOR: Final = 200
OF_NOBODY: Final = bytes(16)
"""The digest in the stamp of a file that no entry has any more."""

_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Whose(Enum):
    """The file at the path of an entry. There is no value for "unknown": that is an `OSError`."""

    GONE = "nothing is there"
    OURS = "the file of the entry"
    DISOWNED = "a deleted file of the cache that could not be unlinked"
    MARKED = "a file with a stamp that is damaged or of another entry"
    UNMARKED = "a file on a file system without stamps: the index identifies it"
    FOREIGN = "a file or directory that does not belong to the cache"


def checksum(data: Data) -> int:
    """CRC-32C of some bytes."""
    # the library takes bytes and arrays without a copy, but no memoryview
    return int(google_crc32c.value(np.frombuffer(data, dtype=np.uint8))) if len(data) else 0


class Stamp(NamedTuple):
    """The stamp of an entry file."""

    digest: bytes
    crc: int
    size: int
    start: int
    stop: int
    key: str
    """The key, for an entry whose path does not contain it; else empty."""
    validator: str = ""
    """The validator of the object; may be empty."""

    def encode(self) -> bytes:
        version = _OF_A_WHOLE if (self.start, self.stop) == (0, END) else _OF_A_PIECE
        head = _STAMP.pack(version, self.digest, self.crc, self.size, self.start, self.stop)
        check = checksum(head + f"{self.key}\0{self.validator}".encode())
        return head + f"{self.key}\0{_CHECKED}{check:08x}\0{self.validator}".encode()

    @property
    def entry(self) -> Entry:
        return Entry(self.key, self.start, self.stop)


def stamp_of(entry: Entry, data: Data, validator: str = "") -> Stamp:
    """The stamp of a file that will hold `data` at the entry's own key."""
    # an unknown state is safe: it costs a request where a state would have been compared
    if len(validator) > _LONGEST_VALIDATOR or "\0" in validator or not validator.isascii():
        validator = ""
    return Stamp(entry.digest(), checksum(data), len(data), entry.start, entry.stop, "", validator)


def _attribute(file: int | str) -> bytes:
    # a link is never an entry file, even if it leads to one
    return (
        os.getxattr(file, _ATTRIBUTE) if isinstance(file, int) else os.getxattr(file, _ATTRIBUTE, follow_symlinks=False)
    )


def read_stamp(file: int | str) -> Stamp | None:
    """The stamp of a file, by descriptor or path; None if there is no valid stamp."""
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
    if version in (_OF_A_WHOLE, _OF_A_PIECE):
        # a key may hold a zero as well
        rest, _, validator = text.rpartition("\0")
        key, _, check = rest.rpartition("\0")
        stamp = Stamp(digest, crc, size, start, stop, key, validator)
        if check.startswith(_CHECKED) and stamp.encode() == raw:
            return stamp
    # a stamp of an older version, unless damage makes it look so: version 1 had a key, version 2 a validator as well
    if version == _WITHOUT_VALIDATOR:
        key, validator = text, ""
    elif version == _OF_A_WHOLE:
        key, _, validator = text.rpartition("\0")
    else:
        return None
    if validator and not validator.startswith(_VALIDATORS_OF_OLD):
        return None
    stamp = Stamp(digest, crc, size, start, stop, key, validator)
    if key and stamp.entry.digest() != digest:
        return None
    # those versions stored answers of any length as byte ranges, and had no validators through fsspec
    return stamp if (start, stop) == (0, END) else stamp._replace(digest=OF_NOBODY)


def stamp_of_open(fd: int) -> tuple[Stamp | None, bool]:
    """The stamp of an open file, or None; and whether that is conclusive.

    It is not conclusive if the file system has no stamps or if the stamp is garbage: then only the index identifies the
    file. Raises `OSError` if the stamp cannot be read.
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
    """Create a file with some data, with a stamp if the file system supports it; removes the file if that fails."""
    try:
        fd = os.open(path, _WRITE, 0o600)
    except FileNotFoundError:
        # usually the directory is there: a look before each write would be one more system call
        make_directories(os.path.dirname(path))
        fd = os.open(path, _WRITE, 0o600)
    try:
        # the stamp first: an invalidation without the index finds temporary files by their stamps
        attach(fd, stamp)
        view = memoryview(data)
        while view:
            # Linux writes at most 2 GiB in one call
            view = view[os.write(fd, view) :]
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def attach(file: int | str, stamp: Stamp) -> None:
    """Set the stamp of a temporary file."""
    if not hasattr(os, "setxattr"):
        return
    try:
        os.setxattr(file, _ATTRIBUTE, stamp.encode())
    except OSError as error:
        # a file system without stamps goes without; on all others, a file without a stamp would not be recognized
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
    """Rename a file over an existing target, creating missing directories."""
    try:
        # atomic on one file system: a reader sees the old file or the new one, never a part
        os.replace(source, target)
    except FileNotFoundError:
        # `prune` of another process may remove an empty directory at any moment, so it is made only when it is missing
        make_directories(os.path.dirname(target))
        os.replace(source, target)


def inside(root: str, relative: str, seen: set[str] | None = None) -> str:
    """The absolute path of a name in a cache directory, if no directory above it is a link.

    Every path that is unlinked, renamed or written is checked here, because a link leads to files outside of the cache.
    Directories in `seen` were checked before in the same section; the checked ones are added. Raises `OSError`, with
    ``ELOOP`` for a link.
    """
    path = root
    for name in ["", *relative.split("/")[:-1]]:
        path = f"{path}/{name}" if name else path
        if seen is not None and path in seen:
            continue
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            # what is missing is made by this process, as directories
            break
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "a link is in the place of a directory of the cache", path)
        if seen is not None:
            seen.add(path)
    return f"{root}/{relative}"


def discard(path: str) -> None:
    """Unlink a file that may be gone."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)


def prune(path: str, root: str) -> None:
    """Remove the empty directories above `path`, up to `root`."""
    directory = os.path.dirname(path)
    while len(directory) > len(root):
        try:
            os.rmdir(directory)
        except OSError:
            return
        directory = os.path.dirname(directory)


def look(path: str, entry: Entry) -> Whose:
    """Identify the file at the path of an entry.

    A copy of an entry file at another path belongs to the user who copied it. Raises `OSError` if the file cannot be
    identified, which is neither "gone" nor "foreign": the caller must not act on it.
    """
    try:
        raw = _attribute(path)
    except (FileNotFoundError, NotADirectoryError):
        return Whose.GONE
    except AttributeError:
        # this platform has no extended attributes
        return _look_without_stamps(path)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENAMETOOLONG):
            return Whose.FOREIGN if error.errno == errno.ENODATA else Whose.GONE
        if error.errno == errno.ENOTSUP:
            return _look_without_stamps(path)
        raise
    stamp = _decode(raw)
    if stamp is not None and stamp.digest in (entry.digest(), OF_NOBODY):
        return Whose.OURS if stamp.digest != OF_NOBODY else Whose.DISOWNED
    # a copy that the user made, or damage: only the index can tell which
    return Whose.MARKED


def _look_without_stamps(path: str) -> Whose:
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return Whose.GONE
    return Whose.UNMARKED if stat.S_ISREG(mode) else Whose.FOREIGN


def exists(path: str) -> bool:
    """Whether a file or a link is at a path; raises `OSError` if that is unknown."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def discard_ours(path: str, entry: Entry) -> Whose:
    """Unlink the file of an entry; returns the kind of file that was found. Raises `OSError` if it may still exist."""
    found = look(path, entry)
    if found in (Whose.OURS, Whose.DISOWNED):
        try:
            discard(path)
        except OSError:
            # every process would go on serving it otherwise
            disown(path)
            raise
    return found


def open_own(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a small regular file of the cache; a pipe, which could hang, and a link are refused.

    Raises
    ------
    OSError
        It cannot be opened, or is something else.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0), 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no regular file", path)
    return fd


def remove_strangers(folder: str) -> None:
    """Remove links, pipes and devices, which are neither files nor folders, from a folder of the cache."""
    with suppress(OSError), os.scandir(folder) as found:
        for each in found:
            if not (each.is_file(follow_symlinks=False) or each.is_dir(follow_symlinks=False)):
                os.unlink(each.path)


def disown(path: str) -> bool:
    """Make an entry file that cannot be unlinked unreadable as an entry; returns whether that succeeded.

    Its stamp names no entry any more, and its new time of modification makes every process check it again.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        try:
            attach(fd, Stamp(OF_NOBODY, 0, 0, 0, 0, ""))
            os.utime(fd)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def make_directories(path: str) -> None:
    """Create a directory and its missing parents, for this user only."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        make_directories(os.path.dirname(path))
        make_directories(path)


def walk(directory: str) -> Iterator[str]:
    """Paths of all files beneath a directory, except those in its `.xzcache`; links are not followed."""
    if os.path.islink(directory):
        return
    stack = [directory]
    while stack:
        here = stack.pop()
        try:
            with os.scandir(here) as found:
                for item in found:
                    if item.is_dir(follow_symlinks=False):
                        if item.name != META or here != directory:
                            stack.append(item.path)
                    elif _is_file(item):
                        yield item.path
        except (FileNotFoundError, NotADirectoryError):
            continue


def _is_file(item: os.DirEntry[str]) -> bool:
    """Whether this is a file, or a link to one; a link in a circle, or to a place that is forbidden, is none."""
    try:
        return item.is_file()
    except OSError:
        if item.is_symlink():
            return False
        raise


def empty(directory: str) -> None:
    """Remove everything in a directory of the cache; raises `OSError` if a file remains."""
    with suppress(FileNotFoundError), os.scandir(directory) as found:
        for item in found:
            if item.is_dir(follow_symlinks=False):
                remove_tree(item.path)
            else:
                discard(item.path)


def remove_tree(directory: str) -> None:
    """Remove a directory of the cache with everything in it; raises `OSError` if a file remains."""
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
