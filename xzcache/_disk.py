"""What a file system and a directory on it are like: whose, how full, how names compare."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import tempfile
from contextlib import suppress
from typing import Final

from xzcache._keys import META

_NUMBER: Final = re.compile(r"\\([0-7]{3})")
_NETWORK: Final = frozenset(
    [
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "ceph-fuse", "glusterfs", "afs"),
        *("9p", "pvfs2", "orangefs", "panfs", "sshfs", "s3fs", "juicefs", "rclone", "gcsfuse", "goofys", "wekafs"),
    ]
)


def folds_case(directory: str) -> bool:
    """Whether a file system takes names that differ in case for the same."""
    head, tail = os.path.split(directory)
    return os.path.exists(os.path.join(head, tail.swapcase()))


def user() -> int:
    """The number of the user whose files this process makes; -1 where the platform has none."""
    return os.geteuid() if hasattr(os, "geteuid") else -1


def private_name() -> str:
    """What the folder of this user's is called in a directory that other users share."""
    return f"xzcache-{user() if hasattr(os, 'geteuid') else os.environ.get('USERNAME', 'user')}"


def temporary() -> str | None:
    """The system's directory of temporary files; None where there is none."""
    with suppress(OSError):
        return os.path.abspath(tempfile.gettempdir())
    return None


def settled(path: str) -> str:
    """Where the cache lies that is to be at a path: there, or in a folder of this user's in what is shared there.

    A directory is shared if it belongs to another user or others may write it, as volumes of containers are. Of those
    that others may write, an empty one of this user's is made private before it is used, and one that is a cache
    already is refused until its mode is right: a second cache in it would leave the first one's files to nobody.

    Parameters
    ----------
    path : str
        An absolute path.

    Returns
    -------
    str
        A path without links, but for its last component where that is the folder of this user's.
    """
    parent, name = os.path.split(path)
    if name == private_name():
        return os.path.join(os.path.realpath(parent), name)
    real = os.path.realpath(path)
    try:
        return os.path.join(real, private_name()) if os.path.isdir(real) and _is_shared(real) else real
    except OSError:
        # what is the matter with it shows when it is used
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
    """Whether a directory is there that this user may write, or can be made, as far as can be told without trying."""
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.R_OK | os.W_OK | os.X_OK)


def make_private(path: str) -> None:
    """Make a directory that only this user can enter; what is missing above it, nobody else can write.

    An existing directory is left as it is, unless it is empty: then nobody relies on its mode yet.

    Raises
    ------
    OSError
        It cannot be made.
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
        os.mkdir(path, 0o755)


def unsafe(path: str) -> str | None:
    """Why nothing may be read from a directory, nor written to it; None where it is this user's and only this user's.

    Raises
    ------
    OSError
        Nobody can tell, or it is not there.
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
    # with an access control list, the bits of the group are the most that it gives to anybody
    return hasattr(os, "geteuid") and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def free_bytes(path: str) -> tuple[int, int]:
    """Bytes that are free to this user on the file system of `path`, and bytes in all."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def sync(path: str) -> None:
    """Have a file, or the names in a directory, be on the disk.

    Raises
    ------
    OSError
        They may not be.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(fd: int) -> None:
    """Have all that was changed on the file system of an open file be on the disk.

    Raises
    ------
    OSError
        It may not be.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if os.name == "posix" else None
    if call is None:
        os.sync()
    elif call(fd) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _sign(number: re.Match[str]) -> str:
    return chr(int(number[1], 8))


def is_on_network(path: str) -> bool:
    """Whether a path is on a file system that other machines share, as far as the system tells."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            # a blank in a name is written as its number
            mounts = [[_NUMBER.sub(_sign, field) for field in line.split()] for line in file]
    except OSError:
        return False
    real = os.path.realpath(path)
    above = [
        (len(fields[4]), fields[fields.index("-") + 1])
        for fields in mounts
        if real == fields[4] or real.startswith(fields[4].rstrip("/") + "/")
    ]
    # of mounts at one place the last one counts
    kind = max(enumerate(above), key=lambda item: (item[1][0], item[0]), default=(0, (0, "")))[1][1]
    return kind.removeprefix("fuse.") in _NETWORK
