"""What a file system and a directory on it are like: whose, how full, how names compare."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from typing import Final

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


def make_private(path: str) -> None:
    """Make a directory that only this user can enter, with whatever is missing above it.

    An existing directory is left as it is, unless it is empty: then nobody relies on its mode yet.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        with suppress(OSError):
            if not os.listdir(path):
                os.chmod(path, 0o700)


def is_own_directory(path: str) -> bool:
    """Whether a path is a directory, and no link, of this user's."""
    status = os.lstat(path)
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def free_bytes(path: str) -> tuple[int, int]:
    """Bytes that are free to this user on the file system of `path`, and bytes in all."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


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
