"""What every room relies on: entries, errors, documents, validators, and fetches under way."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import pickle
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from xzcache import model
from xzcache.model import END, Claims, Entry, LeaderCancelled, metadata

# -- entries

SPANS = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    st.integers(0, 40).map(lambda start: (start, END)),
    st.integers(1, 40).map(lambda size: (-size, END)),
)


def asked(start: int, stop: int) -> Any:
    if start < 0:
        return SuffixByteRequest(-start)
    return OffsetByteRequest(start) if stop == END else RangeByteRequest(start, stop)


@given(SPANS, st.integers(0, 50))
def test_a_span_is_what_zarr_asks_for(span: tuple[int, int], size: int) -> None:
    assert model.span(asked(*span)) == span
    data = bytes(range(size))
    start, stop = span
    first, last = model.clip(start, stop, size)
    assert 0 <= first <= last <= size
    assert data[first:last] == data[start if start >= -size else 0 : None if stop == END else stop]


def test_a_span_that_no_cache_can_answer_is_none_of_its_business() -> None:
    assert model.span(None) == (0, END)
    for request in (RangeByteRequest(5, 2), RangeByteRequest(-1, 2), OffsetByteRequest(1 << 63), SuffixByteRequest(0)):
        assert model.span(request) is None
    with pytest.raises(TypeError):
        model.span("1-2")  # type: ignore[arg-type]


def test_entries_are_told_apart() -> None:
    entries = [Entry("a/b"), Entry("a/b", 0, 1), Entry("a/b", 1), Entry("a/b", -1), Entry("a", 0, 1), Entry("a/b1")]
    assert len({entry.digest() for entry in entries}) == len(entries) == len({each.lock_offset() for each in entries})
    assert all(0 <= entry.lock_offset() < 1 << 62 and len(entry.digest()) == 16 for entry in entries)
    assert [entry.is_whole for entry in entries] == [True, False, False, False, False, True]
    assert {entry.whole for entry in entries[:4]} == {Entry("a/b")}
    assert [str(entry) for entry in entries[:4]] == ["a/b", "a/b[0:1]", "a/b[1:]", "a/b[-1:]"]


def test_what_a_stamp_cannot_hold_is_not_cacheable() -> None:
    assert model.is_cacheable("a/" + "k" * 2000)
    assert not model.is_cacheable("a/" + "k" * 4000)
    assert not model.is_cacheable("a/\ud800")
    assert (model.namespace_of("source/a/c/0"), model.namespace_of("c")) == ("source", "")


# -- errors


def failing(path: Path, statement: str, before: str = "") -> sqlite3.Error:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        connection.execute(before)
        with pytest.raises(sqlite3.Error) as caught:
            connection.execute(statement)
        return caught.value


def test_an_error_of_sqlite_becomes_the_fault_that_it_is(tmp_path: Path) -> None:
    path, garbage = tmp_path / "index", tmp_path / "garbage"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE entry(key)")
        other.execute("BEGIN EXCLUSIVE")
        assert type(model.translated(failing(path, "SELECT * FROM entry"))) is model.Busy
        other.execute("COMMIT")
    full = failing(path, "INSERT INTO entry VALUES(zeroblob(100000))", "PRAGMA max_page_count = 3")
    assert type(model.translated(full)) is model.NoRoom
    garbage.write_bytes(b"no index at all " * 256)
    for damage in (failing(garbage, "SELECT * FROM entry"), failing(path, "SELECT * FROM other")):
        fault = model.translated(damage)
        assert type(fault) is model.Damaged
        assert fault.is_certain
    assert all(model.is_expected_fault(error) for error in (full, model.Foreign(), OSError(), MemoryError()))
    assert not model.is_expected_fault(TypeError())


def test_a_bug_is_logged_once_for_each_line_and_a_fault_never(caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> Exception:
        try:
            return {}["missing"]  # type: ignore[no-any-return]
        except KeyError as error:
            return error

    with caplog.at_level(logging.ERROR, "xzcache"):
        assert not model.report_bug(model.Busy("locked"), "here")
        assert not model.report_bug(KeyboardInterrupt(), "here")
        assert [model.report_bug(bug(), "here") for _ in range(3)] == [True] * 3
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info


def test_what_a_reader_is_told_survives_a_pickle_and_keeps_nothing_alive() -> None:
    try:
        try:
            raise ValueError("first")
        except ValueError as error:
            raise model.Replaced("a/c/0") from error
    except model.Replaced as replaced:
        copy = pickle.loads(pickle.dumps(replaced))
        assert (type(copy), copy.errno, copy.filename) == (model.Replaced, errno.ESTALE, "a/c/0")
        bare = model.without_frames(replaced)
        assert bare.__traceback__ is None
        assert bare.__cause__ is not None
        assert bare.__cause__.__traceback__ is None


# -- metadata documents

ARRAY = {"zarr_format": 3, "node_type": "array", "shape": [4], "attributes": {"scale_factor": 1}}


def document(content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("key", "is_document", "is_chunk", "arrays"),
    [
        ("zarr.json", True, False, None),
        ("a/.zmetadata", True, False, None),
        ("c/0/1", False, True, ["c", ""]),
        ("a/c/0/1", False, True, ["a/c", "a"]),
        ("a/c.0.1", False, True, ["a"]),
        ("a/0.0", False, True, ["a"]),
        ("a/0/0", False, True, ["a"]),
        ("a/zarr.json.bak", False, False, None),
        ("a/b", False, False, None),
    ],
)
def test_what_kind_of_key_it_is(key: str, is_document: bool, is_chunk: bool, arrays: list[str] | None) -> None:
    assert (model.is_document(key), model.is_chunk(key)) == (is_document, is_chunk)
    if arrays is not None:
        assert model.arrays_of(key) == arrays


def test_a_document_of_format_3_overrides_its_node() -> None:
    assert model.overriding_document("a/.zarray") == "a/zarr.json"
    assert model.overriding_document(".zgroup") == "zarr.json"
    assert model.overriding_document("a/zarr.json") is model.overriding_document("a/c/0") is None
    assert set(model.array_documents("a")) == {f"a/{name}" for name in metadata.DOCUMENTS - {".zgroup"}}


def test_absent_is_not_empty_and_a_page_of_a_proxy_is_no_document() -> None:
    assert len({model.fingerprint(each) for each in (None, b"", b"absent", b"{}")}) == 4
    assert model.fingerprint(memoryview(b"{}")) == model.fingerprint(b"{}")
    assert model.is_json(b' {"a": 1}')
    assert not any(map(model.is_json, (b"", b"<html>", b'{"a": ', b"[1]", b"\xff", b"[" * 100_000)))


def changed(key: str, now: Any, before: dict[str, bytes], *, gone: bool = False) -> list[str]:
    described = metadata.describe(key, None if now is None else document(now))
    under = lambda path: [each for each in before if each.startswith(f"{path}/" if path else "")]  # noqa: E731
    return sorted(metadata.changed_arrays(key, described, before.get, under, gone=gone))


def test_which_arrays_a_document_shows_to_have_changed() -> None:
    group = {"node_type": "group", "consolidated_metadata": {"metadata": {"a": ARRAY, "b": ARRAY}}}
    known = dict(metadata.describe("zarr.json", document(group)).arrays)
    assert sorted(known) == ["a", "b"]
    # consolidated or by itself, in any order of its members
    assert not changed("a/zarr.json", dict(reversed(ARRAY.items())), known)
    assert not changed("zarr.json", group, known)
    assert changed("a/zarr.json", {**ARRAY, "shape": [5]}, known) == ["a"]
    assert changed("a/zarr.json", {**ARRAY, "attributes": {"scale_factor": 2}}, known) == ["a"]
    assert changed("a/zarr.json", None, known, gone=True) == ["a"]
    # a consolidated document names all arrays
    group["consolidated_metadata"] = {"metadata": {"b": ARRAY}}
    assert changed("zarr.json", group, known) == ["a"]
    assert changed("zarr.json", None, known, gone=True) == ["a", "b"]
    # one that is absent, where it never was, says nothing of format 3
    assert not changed("a/.zarray", None, known)


# -- validators

ETAG, OTHER, TIME, FILE = 'etag "1"', 'etag "2"', "time 2020 5", "file 1 2 3"
ONCE, LATER = model.session_validator("s" * 32, 0), model.session_validator("s" * 32, 1)
ELSE = model.session_validator("t" * 32)


def test_states_differ_only_if_that_is_certain() -> None:
    assert model.differ([ETAG, OTHER])
    for unknown in ([ETAG], [ETAG, ETAG], [ETAG, TIME], [ETAG, ONCE], [ONCE, ELSE], ["", ETAG], [], [TIME, FILE]):
        assert not model.differ(unknown), unknown
    assert model.from_source([ETAG, ONCE, ""]) == {ETAG}
    assert model.is_from_source(model.FIXED)


def test_parts_fit_only_if_that_is_certain() -> None:
    every = [ETAG, OTHER, TIME, FILE, ONCE, ELSE, model.FIXED, ""]
    for one in every:
        for other in every:
            assert model.are_compatible(one, other) == (one == other != "")
    assert ONCE != LATER
    assert model.are_compatible(ONCE, LATER)


def test_an_answer_joins_the_session_that_it_was_found_to_fit() -> None:
    joined = model.adopt_session(ELSE, ONCE)
    assert model.are_compatible(joined, ONCE)
    # but the bytes of two answers never form one range
    assert joined not in (ONCE, ELSE)
    assert model.adopt_session(ETAG, ONCE) == ETAG
    assert model.adopt_session(ELSE, ETAG) == model.adopt_session(ELSE, "") == ELSE


# -- fetches under way


VALUE = memoryview(b"value")
WAIT = 30.0


async def test_one_fetches_and_all_have_its_result() -> None:
    claims = Claims()
    claim, leads = claims.join("a")
    assert leads
    assert claim is not None
    others = [claims.join("a") for _ in range(3)]
    # a part of it is under way with it
    others.append(claims.join("a", (2, 5)))
    assert all(other is claim and not leads for other, leads in others)
    assert claims.join("b")[1]
    waiting = [asyncio.ensure_future(claim.outcome(WAIT)) for _ in others]
    claim.set_result(VALUE, "etag")
    claims.release("a", claim)
    assert [(each.data, each.validator) for each in await asyncio.gather(*waiting)] == [(VALUE, "etag")] * 4
    assert claims.join("a")[1]


def test_readers_in_several_event_loops_share_a_fetch() -> None:
    claims = Claims()
    claim, _ = claims.join("a")
    assert claim is not None
    joined = threading.Barrier(4)

    def reader() -> memoryview | None:
        other, leads = claims.join("a")
        assert not leads
        assert other is not None
        joined.wait(WAIT)
        return asyncio.run(other.outcome(WAIT)).data

    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(reader) for _ in range(3)]
        joined.wait(WAIT)
        claim.set_result(VALUE)
        assert [each.result(WAIT) for each in readers] == [VALUE] * 3


async def test_a_cancelled_fetch_ends_no_reader_and_an_error_reaches_all() -> None:
    claims = Claims()
    for error, seen in (
        (asyncio.CancelledError(), LeaderCancelled),
        (KeyError("k"), KeyError),
        (None, LeaderCancelled),
    ):
        claim, _ = claims.join("a")
        assert claim is not None
        waiting = asyncio.ensure_future(claim.outcome(WAIT))
        await asyncio.sleep(0)
        if error is not None:
            claim.set_exception(error)
        claims.release("a", claim)
        with pytest.raises(seen):
            await waiting
        assert not waiting.cancelled()
        # the claim keeps no exception for a reader that comes to wait afterwards: it fetches
        with pytest.raises(LeaderCancelled):
            await claim.outcome(WAIT)


def test_a_fetch_that_was_sent_before_a_change_is_not_joined() -> None:
    claims = Claims()
    old, _ = claims.join("a")
    assert old is not None
    assert claims.join("a", since=1e300) == (old, False)
    old.mark_sent()
    new, leads = claims.join("a", since=old.sent_at + 1)
    assert leads
    assert new is not old
    # the old one ends and leaves the new one
    claims.release("a", old)
    assert claims.join("a") == (new, False)


def test_a_reader_of_all_is_told_that_a_part_is_under_way() -> None:
    claims = Claims()
    part, _ = claims.join("a", (10, 20))
    assert claims.join("a", apart=False) == (None, False)
    assert claims.join("a", (20, 30), apart=False)[1]
    assert claims.join("a", (12, 18)) == (part, False)


async def test_no_byte_is_claimed_twice() -> None:
    claims = Claims()

    def rest(taken: list[Any]) -> list[Any]:
        return model.IntervalSet(taken).missing((0, 100))

    (first,), _ = claims.make("a", lambda taken: [(20, 40)])
    made, others = claims.make("a", rest)
    assert [claim.span for claim in made] == [(0, 20), (40, 100)]
    assert others == [first]
    assert claims.make("a", rest)[0] == []
    assert claims.make("b", rest)[0][0].span == (0, 100)
    claims.release("a", first)
    claims.release("a", first)
    with pytest.raises(LeaderCancelled):
        await first.outcome(WAIT)
    assert [claim.span for claim in claims.make("a", rest)[0]] == [(20, 40)]


async def test_work_that_must_end_ends_though_its_caller_is_cancelled() -> None:
    began, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> str:
        began.set()
        await go.wait()
        ended.set()
        return "done"

    caller = asyncio.ensure_future(model.run_to_completion(work()))
    await began.wait()
    caller.cancel()
    await asyncio.sleep(0)
    go.set()
    assert await caller == ("done", True)
    assert ended.is_set()
    assert (await model.run_to_completion(asyncio.sleep(0, "quick"))) == ("quick", False)
