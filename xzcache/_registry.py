"""The cache directories of this process: one object each, closed at exit, begun anew after a fork."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Final

from xzcache._config import UNSET, Unset
from xzcache._directory import CacheDirectory

_directories: Final[dict[str, CacheDirectory]] = {}
_lock = threading.Lock()


def open_directory(
    root: str,
    *,
    max_size: int | Unset | None = UNSET,
    default_max_size: int | None,
    min_free: float | int,
    lock_timeout: float,
) -> CacheDirectory:
    """The object of a cache directory: the same one, however many stores use it and whatever path leads there."""
    path = os.path.realpath(root)
    with _lock:
        directory = _directories.get(path)
        if directory is None:
            directory = _directories[path] = CacheDirectory(
                path,
                max_size=max_size,
                default_max_size=default_max_size,
                min_free=min_free,
                lock_timeout=lock_timeout,
            )
        elif not isinstance(max_size, Unset):
            directory.set_bound(max_size)
    return directory


def _close_all() -> None:
    for directory in list(_directories.values()):
        directory.close()


def _before_fork() -> None:
    _lock.acquire()
    for directory in _directories.values():
        directory.books.before_fork()


def _after_fork_in_parent() -> None:
    for directory in _directories.values():
        directory.books.after_fork_in_parent()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for directory in _directories.values():
        directory.after_fork_in_child()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
