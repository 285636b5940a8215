"""Which byte ranges of an object are cached, told by the names of their files.

What is remembered is only a hint: a file may have left since, or another one have come. So it is listed anew before
anybody goes to the source.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from xzcache._keys import END, Entry, range_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_REMEMBERED: Final = 65536
_LARGEST: Final = 1 << 63
_TICK_NS: Final = 20_000_000


class Listed:
    """The pieces of one object: those from a beginning, in order, and those that are its end.

    Parameters
    ----------
    key : str
    spans : iterable of (int, int)
        Starts and stops as entries have them.
    """

    def __init__(self, key: str, spans: Iterable[tuple[int, int]]) -> None:
        spans = list(spans)
        ordered = sorted((start, _LARGEST if stop == END else stop) for start, stop in spans if start >= 0)
        self.starts = [start for start, _ in ordered]
        self.stops = [stop for _, stop in ordered]
        # how far any piece reaches that begins here or before
        self.reach = list(accumulate(self.stops, max))
        self.suffixes = sorted(start for start, _ in spans if start < 0)
        self._key = key

    def __len__(self) -> int:
        return len(self.starts) + len(self.suffixes) + 1

    def __iter__(self) -> Iterator[Entry]:
        """Those from a beginning."""
        return map(self._piece, range(len(self.starts)))

    def _piece(self, at: int) -> Entry:
        return Entry(self._key, self.starts[at], END if self.stops[at] == _LARGEST else self.stops[at])

    def by_size(self) -> list[Entry]:
        """Those whose names tell how long they are, the shortest first."""
        pieces = [piece for piece in self if piece.stop != END] + [Entry(self._key, at, END) for at in self.suffixes]
        return sorted(pieces, key=lambda piece: -piece.start if piece.start < 0 else piece.stop - piece.start)

    def any(self) -> Entry | None:
        """One of them."""
        if self.suffixes:
            return Entry(self._key, self.suffixes[0], END)
        return self._piece(0) if self.starts else None

    def covering(self, entry: Entry) -> Iterator[Entry]:
        """Those that hold a byte range."""
        if entry.start < 0:
            yield from (Entry(self._key, start, END) for start in self.suffixes if start <= entry.start)
            return
        stop = _LARGEST if entry.stop == END else entry.stop
        at = bisect_right(self.starts, entry.start) - 1
        while at >= 0 and self.reach[at] >= stop:
            if self.stops[at] >= stop:
                yield self._piece(at)
            at -= 1

    def overlapping(self, start: int, stop: int) -> Iterator[Entry]:
        """Those that hold a part of a span."""
        at = bisect_right(self.starts, stop - 1) - 1
        while at >= 0 and self.reach[at] > start:
            if self.stops[at] > start:
                yield self._piece(at)
            at -= 1


class Pieces:
    """The byte ranges of objects that lie in one cache directory. Safe for threads.

    Parameters
    ----------
    root : str
        The cache directory.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._remembered: dict[str, tuple[Listed, int]] = {}
        self._count = 0

    def remembered(self, key: str) -> Listed | None:
        """The pieces of an object as they were when they were last listed."""
        known = self._remembered.get(key)
        return None if known is None else known[0]

    def listed(self, key: str) -> Listed:
        """The pieces of an object.

        Raises
        ------
        OSError
            Anything but absence.
        """
        directory = f"{self._root}/{range_directory(key)}"
        try:
            changed = os.stat(directory).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return Listed(key, ())
        known = self._remembered.get(key)
        if known is not None and known[1] == changed:
            return known[0]
        now = time.time_ns()
        spans = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(directory):
                start, _, stop = name.partition("_")
                with suppress(ValueError):
                    spans.append((int(start), int(stop)))
        listed = Listed(key, spans)
        # a change within the same tick of the file system's clock would not show
        self._remember(key, listed, changed if now - changed > _TICK_NS else -1)
        return listed

    def _remember(self, key: str, listed: Listed, changed: int) -> None:
        before = self._remembered.pop(key, None)
        self._count += len(listed) - (0 if before is None else len(before[0]))
        self._remembered[key] = listed, changed
        while self._count > _REMEMBERED and len(self._remembered) > 1:
            # another thread may be doing the same
            with suppress(KeyError, StopIteration, RuntimeError):
                self._count -= len(self._remembered.pop(next(iter(self._remembered)))[0])
