"""Arithmetic of spans of bytes, `(first, last + 1)`, within one object. Pure functions.

The rule by which spans are merged into one request is Zarr's own (`zarr.core._coalesce`).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from xzcache.model.entry import END, Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


Span = tuple[int, int]

LARGEST: Final = 1 << 62
"""Stands for the end of an object in arithmetic; no object reaches so far."""

WHOLE: Final = 0, LARGEST
"""The span of a whole object."""

NEGLIGIBLE: Final = 1 << 14
"""The most bytes that are fetched twice rather than in two requests."""


def placed(span: Span) -> Span:
    """A span whose end is a number: `LARGEST` for `END`."""
    return (span[0], LARGEST) if span[1] == END else span


def unplaced(span: Span) -> Span:
    """Undo `placed`."""
    return (span[0], END) if span[1] >= LARGEST else span


def covers(outer: Span, span: Span) -> bool:
    """Whether a placed span certainly holds another one; either may be a suffix, which begins at an unknown byte."""
    if span[0] < 0 or outer[0] < 0:
        return outer == WHOLE or (outer[0] <= span[0] < 0)
    return outer[0] <= span[0] and span[1] <= outer[1]


def overlap(span: Span, other: Span) -> bool:
    """Whether two placed spans have bytes in common; of a suffix that is unknown, so that it counts as no."""
    return min(span[0], other[0]) >= 0 and max(span[0], other[0]) < min(span[1], other[1])


def part(data: memoryview, outer: Span, span: Span) -> memoryview:
    """The bytes of a span within those of one that covers it; fewer where the object ends."""
    if span == outer:
        return data
    if span[0] < 0:
        return data[max(0, len(data) + span[0]) :]
    return data[span[0] - outer[0] : span[1] - outer[0]]


class IntervalSet:
    """The bytes of some spans, as few spans in order."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans: list[Span] = []
        for first, last in sorted(spans):
            if self.spans and first <= self.spans[-1][1]:
                self.spans[-1] = self.spans[-1][0], max(self.spans[-1][1], last)
            elif first < last:
                self.spans.append((first, last))

    def parts(self, span: Span) -> Iterator[Span]:
        """The covered parts of a span, in order."""
        for at in range(max(0, bisect_right(self.spans, (span[0], span[0])) - 1), len(self.spans)):
            first, last = self.spans[at]
            if first >= span[1]:
                return
            if last > span[0]:
                yield max(first, span[0]), min(last, span[1])

    def missing(self, span: Span) -> list[Span]:
        """The parts of a span that are not covered, in order."""
        # the usual case, asked several times for each request
        if not self.spans:
            return [span] if span[0] < span[1] else []
        at, end = span
        left = []
        for first, last in self.parts(span):
            if at < first:
                left.append((at, first))
            at = last
        return [*left, (at, end)] if at < end else left


def merged(spans: Iterable[Span], *, gap: int, most: int, excluded: IntervalSet | None = None) -> list[Span]:
    """Merge spans into the requests to send.

    Two spans are merged if at most `gap` bytes lie between them and the result has at most `most` bytes. Bytes in
    `excluded` are not requested again unless they are negligible.
    """
    together: list[Span] = []
    for first, last in sorted(spans):
        if together:
            begin, end = together[-1]
            near = first - end <= gap and max(end, last) - begin <= most
            between = (
                0
                if excluded is None or not near or not excluded.spans
                else sum(b - a for a, b in excluded.parts((end, first)))
            )
            if near and between <= NEGLIGIBLE:
                together[-1] = begin, max(end, last)
                continue
        together.append((first, last))
    return together


def cut(span: Span, boundaries: Iterable[int], most: int) -> list[Span]:
    """Cut a span at boundaries into parts of at most `most` bytes; a part between two boundaries may be larger."""
    begin, end = span
    parts: list[Span] = []
    last = begin
    # pieces end where requested ranges end, so that the same ranges are found in single files
    for boundary in sorted({boundary for boundary in boundaries if begin < boundary < end} | {end}):
        if boundary - begin > most and last > begin:
            parts.append((begin, last))
            begin = last
        last = boundary
    return [*parts, (begin, end)] if end > begin else parts


class SparseBuffer:
    """Bytes of one object, put together from spans of it."""

    def __init__(self) -> None:
        self._tiles: list[Span] = []
        self._data: list[memoryview] = []

    def add(self, span: Span, data: memoryview) -> None:
        """Add the bytes of a span; fewer bytes than its length if the object ends there."""
        for first, last in self.missing(span):
            at = bisect_right(self._tiles, (first, last))
            self._tiles.insert(at, (first, last))
            self._data.insert(at, data[first - span[0] : last - span[0]])

    def missing(self, span: Span) -> list[Span]:
        """The parts of a span that are not in the buffer."""
        if not self._tiles:
            return [span] if span[0] < span[1] else []
        return IntervalSet(tile for tile, _ in self._within(span)).missing(span)

    def of(self, span: Span) -> memoryview:
        """The bytes of a span that is there; fewer where the object ends."""
        # one tile is returned without a copy
        parts = [data[max(0, span[0] - first) : max(0, span[1] - first)] for (first, _), data in self._within(span)]
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def _within(self, span: Span) -> Iterator[tuple[Span, memoryview]]:
        for at in range(max(0, bisect_right(self._tiles, (span[0], span[0])) - 1), len(self._tiles)):
            if self._tiles[at][0] >= span[1]:
                return
            if self._tiles[at][1] > span[0]:
                yield self._tiles[at], self._data[at]


class Listed:
    """The cached pieces of one object: those counted from the start, in order, and the suffixes."""

    def __init__(self, key: str, spans: Iterable[tuple[int, int]]) -> None:
        self._key = key
        spans = list(spans)
        if not spans:
            self.starts: list[int] = []
            self.stops: list[int] = []
            self.reach: list[int] = []
            self.suffixes: list[int] = []
            return
        ordered = sorted((start, LARGEST if stop == END else stop) for start, stop in spans if start >= 0)
        self.starts = [start for start, _ in ordered]
        self.stops = [stop for _, stop in ordered]
        # for each piece, the largest end of all pieces up to it: a search backwards stops where none reaches far enough
        self.reach = list(accumulate(self.stops, max))
        self.suffixes = sorted(start for start, _ in spans if start < 0)

    def __len__(self) -> int:
        return len(self.starts) + len(self.suffixes) + 1

    def __iter__(self) -> Iterator[Entry]:
        """The pieces that are counted from the start."""
        return map(self._piece, range(len(self.starts)))

    def _piece(self, at: int) -> Entry:
        return Entry(self._key, self.starts[at], END if self.stops[at] == LARGEST else self.stops[at])

    def by_size(self) -> list[Entry]:
        """The pieces whose name gives their length, shortest first."""
        pieces = [piece for piece in self if piece.stop != END] + [Entry(self._key, at, END) for at in self.suffixes]
        return sorted(pieces, key=lambda piece: -piece.start if piece.start < 0 else piece.stop - piece.start)

    def any(self) -> Entry | None:
        """One of the pieces; None if there are none."""
        if self.suffixes:
            return Entry(self._key, self.suffixes[0], END)
        return self._piece(0) if self.starts else None

    def covering(self, entry: Entry) -> Iterator[Entry]:
        """The pieces that contain a byte range."""
        return (Entry(self._key, *span) for span in self.spans_covering(entry.start, entry.stop))

    def spans_covering(self, start: int, stop: int) -> Iterator[Span]:
        """The `(start, stop)` of the pieces that contain a byte range."""
        if start < 0:
            yield from ((suffix, END) for suffix in self.suffixes if suffix <= start)
            return
        stop = LARGEST if stop == END else stop
        at = bisect_right(self.starts, start) - 1
        while at >= 0 and self.reach[at] >= stop:
            if self.stops[at] >= stop:
                yield unplaced((self.starts[at], self.stops[at]))
            at -= 1

    def overlapping(self, start: int, stop: int) -> Iterator[Entry]:
        """The pieces that overlap a span."""
        at = bisect_right(self.starts, stop - 1) - 1
        while at >= 0 and self.reach[at] > start:
            if self.stops[at] > start:
                yield self._piece(at)
            at -= 1
