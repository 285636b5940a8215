"""The arithmetic of spans, against sets of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest

from xzcache import _spans as spans
from xzcache._keys import END, Entry, within
from xzcache._pieces import Listed

SPANS = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def covered(*of: spans.Span) -> set[int]:
    return {place for first, last in of for place in range(first, last)}


@given(SPANS, st.lists(SPANS, max_size=6))
def test_without(span: spans.Span, others: list[spans.Span]) -> None:
    left = spans.without(span, others)
    assert covered(*left) == covered(span) - covered(*others)
    assert left == sorted(left)
    assert all(first < last for first, last in left)


@given(st.lists(SPANS, min_size=1, max_size=8), st.integers(0, 15), st.integers(1, 60))
def test_merged_is_what_zarr_does(wanted: list[spans.Span], gap: int, most: int) -> None:
    coalesce = pytest.importorskip("zarr.core._coalesce")
    groups, _ = coalesce.coalesce_ranges(
        [RangeByteRequest(*span) for span in wanted], max_gap_bytes=gap, max_coalesced_bytes=most
    )
    zarrs = sorted((min(r.start for _, r in group), max(r.end for _, r in group)) for group in groups)
    # spans with one beginning may come in either order
    merged = spans.merged(wanted, gap=gap, most=most)
    assert covered(*merged) >= covered(*wanted)
    if len({first for first, _ in wanted}) == len(wanted):
        assert merged == zarrs
    assert spans.merged(merged, gap=gap, most=most) == merged


@given(SPANS, st.lists(st.integers(0, 90), max_size=12), st.integers(1, 30))
def test_cut(span: spans.Span, seams: list[int], most: int) -> None:
    parts = spans.cut(span, seams, most)
    assert [part[0] for part in parts[1:]] == [part[1] for part in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == span
    inner = {part[1] for part in parts[:-1]}
    assert inner <= set(seams)
    for first, last in parts:
        assert last - first <= most or not [seam for seam in seams if first < seam < last and seam - first <= most]


PIECES = st.one_of(
    SPANS,
    st.integers(0, 40).map(lambda start: (start, END)),
    st.integers(1, 40).map(lambda size: (-size, END)),
)


@given(st.integers(0, 80), st.lists(PIECES, max_size=6), PIECES)
def test_a_piece_that_covers_holds_the_bytes(size: int, pieces: list[tuple[int, int]], wanted: tuple[int, int]) -> None:
    data = bytes(range(size))

    def of(entry: Entry) -> bytes:
        return data[slice(*within(entry, Entry("k"), size))]

    entry = Entry("k", *wanted)
    found = list(Listed("k", pieces).covering(entry))
    for piece in found:
        held = of(piece)
        assert held[slice(*within(entry, piece, len(held)))] == of(entry)
    assert len(found) == len(set(found)) or len(pieces) != len(set(pieces))
    if wanted in pieces:
        assert entry in found


@given(st.lists(SPANS, max_size=8), SPANS)
def test_overlapping(pieces: list[spans.Span], wanted: spans.Span) -> None:
    found = {(piece.start, piece.stop) for piece in Listed("k", pieces).overlapping(*wanted)}
    assert found == {piece for piece in pieces if covered(piece) & covered(wanted)}
