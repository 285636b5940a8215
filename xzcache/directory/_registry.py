"""The cache directories of this process: closed at exit, and started anew after a fork."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Final

from xzcache import _threads as pool
from xzcache._config import (
    UNSET,
    Unset,
    allowed,
    chosen,
    config,
    parse_min_free,
    parse_policy,
    parse_seconds,
    parse_size,
)
from xzcache.directory._directory import CacheDirectory
from xzcache.directory._writebehind import departures
from xzcache.files import resolve_directory

_directories: Final[dict[str, CacheDirectory]] = {}
_lock = threading.Lock()


def open_directory(
    root: str,
    max_size: int | Unset | None = UNSET,
    min_free: float | int | Unset = UNSET,
    policy: str | Unset = UNSET,
) -> CacheDirectory:
    """The object of a cache directory, which all stores of this process share.

    Parameters
    ----------
    root : str
        An absolute path. The cache is there, or in this user's folder in it; see `resolve_directory`.
    max_size : int, None or UNSET
        The requested bound in bytes.
    min_free : float, int or UNSET
        The requested reserve of free disk; else the configured one.
    policy : str or UNSET
        The requested policy; else the configured one.
    """
    path = resolve_directory(root)
    max_size, min_free, policy = allowed("max_size", max_size), allowed("min_free", min_free), allowed("policy", policy)
    with _lock:
        directory = _directories.get(path)
        if directory is None:
            _forget_removed()
            reserve = config.get("min_free") if isinstance(min_free, Unset) else min_free
            directory = _directories[path] = CacheDirectory(
                path,
                max_size=max_size,
                default_max_size=parse_size("max_size", config.get("max_size")),
                min_free=parse_min_free("min_free", reserve),
                lock_timeout=parse_seconds("lock_timeout", config.get("lock_timeout")),
                policy=chosen("policy", policy, parse_policy),
            )
        else:
            directory.reopen()
            if not isinstance(max_size, Unset):
                directory.set_bound(max_size)
            if not isinstance(min_free, Unset):
                directory.set_min_free(min_free)
            if not isinstance(policy, Unset):
                directory.set_policy(policy)
    return directory


def opened_directory(root: str) -> CacheDirectory | None:
    """The object of a cache directory that this process has opened already, else None."""
    with _lock:
        return _directories.get(resolve_directory(root))


def _forget_removed() -> None:
    """Forget removed and unused directories from time to time: test suites create thousands of them."""
    if len(_directories) % 64 == 63:
        for path, directory in list(_directories.items()):
            if not directory.is_used and not os.path.lexists(path):
                del _directories[path]


def cleanup_resources(timeout: float = 30.0) -> None:
    """Leave all cache directories and end all threads of this package; the next use opens them again.

    For programs that count descriptors or threads, as test suites do. The end of the process does the same. A directory
    through which this process is writing to a source stays open: other processes would take the write for ended.

    Parameters
    ----------
    timeout : float, optional
        Seconds to wait for the threads to finish their work.
    """
    # closing waits for the disk and for other threads, so it happens outside of the lock
    with _lock:
        directories = list(_directories.values())
    for _ in range(2):
        for directory in directories:
            directory.close()
        departures.wait(timeout)
        pool.stop(timeout)
        # a busy thread may have joined a directory after it was closed
        directories = [directory for directory in directories if directory.session.current is not None]
        if not directories:
            break


def _before_fork() -> None:
    # held over the fork, so that the child inherits no directory that is half made
    _lock.acquire()
    for directory in _directories.values():
        # each waits until no thread is in a transaction: the child would inherit half of one
        directory.session.before_fork()


def _after_fork_in_parent() -> None:
    for directory in _directories.values():
        directory.session.after_fork_in_parent()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for directory in _directories.values():
        directory.after_fork_in_child()


# daemon threads are ended without notice at exit, with what they have not stored
atexit.register(cleanup_resources)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
