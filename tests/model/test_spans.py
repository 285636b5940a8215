"""The arithmetic of spans, against sets of bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest

from xzcache.model import spans
from xzcache.model.entry import END, Entry, within
from xzcache.model.spans import Listed

SPANS = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def covered(*of: spans.Span) -> set[int]:
    return {place for first, last in of for place in range(first, last)}


@given(st.lists(SPANS, max_size=6), SPANS)
def test_cover(of: list[spans.Span], span: spans.Span) -> None:
    cover = spans.IntervalSet(of)
    assert covered(*cover.spans) == covered(*of)
    assert all(a[1] < b[0] for a, b in pairwise(cover.spans))
    for parts, bytes_ in (
        (list(cover.parts(span)), covered(span) & covered(*of)),
        (cover.missing(span), covered(span) - covered(*of)),
    ):
        assert covered(*parts) == bytes_
        assert parts == sorted(parts)
        assert all(first < last for first, last in parts)


@given(st.integers(1, 90), st.lists(SPANS, max_size=8), st.lists(SPANS, min_size=1, max_size=4))
def test_a_mosaic_is_what_was_put_into_it(size: int, tiles: list[spans.Span], wanted: list[spans.Span]) -> None:
    whole = bytes(range(size))
    buffer = spans.SparseBuffer()
    for first, last in tiles:
        buffer.add((first, last), memoryview(whole[first:last]))
    for span in wanted:
        missing = buffer.missing(span)
        assert covered(*missing) == covered(span) - covered(*tiles)
        for part in [span] if not missing else spans.IntervalSet(missing).missing(span):
            assert buffer.of(part) == whole[slice(*part)]


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


@given(st.lists(SPANS, min_size=1, max_size=8), st.lists(SPANS, max_size=4))
def test_what_is_worth_a_request_is_not_asked_for_again(wanted: list[spans.Span], excluded: list[spans.Span]) -> None:
    large = spans.NEGLIGIBLE
    wanted, excluded = ([(large * a, large * b) for a, b in some] for some in (wanted, excluded))
    needs = [part for span in wanted for part in spans.IntervalSet(excluded).missing(span)]
    merged = spans.merged(needs, gap=1 << 40, most=1 << 40, excluded=spans.IntervalSet(excluded))
    again = [b - a for span in merged for a, b in spans.IntervalSet(excluded).parts(span)]
    assert all(size <= spans.NEGLIGIBLE for size in again)
    assert all(not spans.IntervalSet(merged).missing(span) for span in needs)


@given(SPANS, st.lists(st.integers(0, 90), max_size=12), st.integers(1, 30))
def test_cut(span: spans.Span, boundaries: list[int], most: int) -> None:
    parts = spans.cut(span, boundaries, most)
    assert [part[0] for part in parts[1:]] == [part[1] for part in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == span
    inner = {part[1] for part in parts[:-1]}
    assert inner <= set(boundaries)
    for first, last in parts:
        assert last - first <= most or not [
            boundary for boundary in boundaries if first < boundary < last and boundary - first <= most
        ]


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
