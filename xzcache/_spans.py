"""Arithmetic of spans of bytes, `(first, last + 1)`, within one object. Pure functions.

The rule by which spans are merged into one request is Zarr's own (`zarr.core._coalesce`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Span = tuple[int, int]


def without(span: Span, others: Iterable[Span]) -> list[Span]:
    """The parts of a span that none of the others covers."""
    at, end = span
    left = []
    for first, last in sorted(others):
        if first >= end or last <= at:
            continue
        if first > at:
            left.append((at, first))
        at = max(at, last)
    if at < end:
        left.append((at, end))
    return left


def merged(spans: Iterable[Span], *, gap: int, most: int) -> list[Span]:
    """Spans that are asked for together, as one.

    Parameters
    ----------
    spans : iterable of (int, int)
    gap : int
        Bytes that may lie between two of them, and are asked for as well.
    most : int
        Bytes that are asked for at once, unless a single span has more.
    """
    together: list[Span] = []
    for first, last in sorted(spans):
        if together:
            begin, end = together[-1]
            if first - end <= gap and max(end, last) - begin <= most:
                together[-1] = begin, max(end, last)
                continue
        together.append((first, last))
    return together


def cut(span: Span, seams: Iterable[int], most: int) -> list[Span]:
    """A span in parts of at most `most` bytes where its seams allow, each ending at one."""
    begin, end = span
    parts: list[Span] = []
    last = begin
    for seam in sorted({seam for seam in seams if begin < seam < end} | {end}):
        if seam - begin > most and last > begin:
            parts.append((begin, last))
            begin = last
        last = seam
    return [*parts, (begin, end)] if end > begin else parts
