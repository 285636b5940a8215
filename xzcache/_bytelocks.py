"""Locks of single bytes, and of spans of them: thousands of things, each with a lock of its own, in a few files."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from xzcache._locks import open_lock_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xzcache._spans import Span

_FLOCK: Final = struct.Struct("hhqqi0q")
"""``struct flock``: type, whence, start, length, pid; native alignment, padded to a multiple of 8."""
_SPANS: Final = 1 << 62
"""Where the locks of spans begin; those of single bytes lie below."""
_ROOM: Final = 1 << 40
"""Bytes of one object that have locks of their own."""
_OBJECTS: Final = (1 << 22) - 1


class ByteLocks:
    """One exclusive lock a byte, spread over a few files; each protects whatever its number stands for.

    Open-file-description locks where the platform has them (Linux), else POSIX locks, which serve as well because each
    file is opened once a process. Threads of a process do not exclude each other here.

    Parameters
    ----------
    paths : sequence of str
        The lock files. The kernel searches a list per file, so thousands of locks want several.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._fds = [open_lock_file(path) for path in paths]
        self._mutex = threading.Lock()
        self._held: Counter[int] = Counter()

    def try_lock(self, offset: int) -> bool:
        """Take a lock; False while another process has it. The same process may take it several times."""
        with self._mutex:
            if not self._held[offset]:
                try:
                    self._control(offset, fcntl.F_WRLCK, offset)
                except BlockingIOError:
                    del self._held[offset]
                    return False
                except BaseException:
                    del self._held[offset]
                    raise
            self._held[offset] += 1
            return True

    def unlock(self, offset: int) -> None:
        """Undo one `try_lock`."""
        with self._mutex:
            self._held[offset] -= 1
            if self._held[offset] <= 0:
                del self._held[offset]
                self._control(offset, fcntl.F_UNLCK, offset)

    def try_lock_span(self, number: int, span: Span) -> Span | None:
        """Take the lock of a span of bytes of whatever a number stands for.

        Two numbers may come to share their locks, so what is locked need not be; the same process must not take a byte
        twice.

        Returns
        -------
        (int, int) or None
            None where it was taken; else a part of the span that another process has.
        """
        offset, length, base = _place_of(number, span)
        if length <= 0:
            return None
        try:
            self._control(number, fcntl.F_WRLCK, offset, length)
        except BlockingIOError:
            return self._conflict(number, offset, length, base) or span
        return None

    def unlock_span(self, number: int, span: Span) -> None:
        """Undo one `try_lock_span`."""
        offset, length, _ = _place_of(number, span)
        if length > 0:
            self._control(number, fcntl.F_UNLCK, offset, length)

    def _control(self, number: int, kind: int, offset: int, length: int = 1) -> None:
        fd = self._fds[number % len(self._fds)]
        if hasattr(fcntl, "F_OFD_SETLK"):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, length, 0))
        else:
            operation = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(fd, operation, length, offset, os.SEEK_SET)

    def _conflict(self, number: int, offset: int, length: int, base: int) -> Span | None:
        """What of a place another process has locked, as far as the platform tells."""
        if not hasattr(fcntl, "F_OFD_GETLK"):
            return None
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, length, 0)
        kind, _, start, size, _ = _FLOCK.unpack(
            fcntl.fcntl(self._fds[number % len(self._fds)], fcntl.F_OFD_GETLK, asked)
        )
        first, last = max(start, offset), min(start + size, offset + length)
        # it may have been let go of meanwhile
        return (first - base, last - base) if kind != fcntl.F_UNLCK and first < last else None

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def _place_of(number: int, span: Span) -> tuple[int, int, int]:
    """Offset and length of what a span is locked by, and the offset of its object's first byte."""
    base = _SPANS + (number & _OBJECTS) * _ROOM
    first, last = min(span[0], _ROOM), min(span[1], _ROOM)
    # the last byte of all that can be locked is not, as its end would be none
    return base + first, min(base + last, (1 << 63) - 1) - base - first, base
