"""`xzcache pin` and `unpin` as users run them, in a pipe."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import zarr
from zarr.storage import LocalStore

import xzcache
from xzcache.cli import main


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    array = zarr.create_array(LocalStore(tmp_path / "one.zarr"), name="a", shape=4, chunks=2, dtype="u1")
    array[:] = 1
    store = xzcache.CacheStore(tmp_path / "one.zarr", cache_store=tmp_path / "cache", read_only=True)
    zarr.open_array(store, path="a", mode="r", zarr_format=3)[:]
    return tmp_path / "cache"


def done(cache: Path, *words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([*words, "--directory", str(cache)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def test_pinned_shown_and_unpinned(cache: Path) -> None:
    assert done(cache, "pin") == (0, f"nothing is pinned in {cache}\n", "")
    code, out, _ = done(cache, "pin", "one.zarr", "a", "--for", "7d")
    assert code == 0
    assert "/a  20" in out
    assert "that may be pinned" in out
    assert "by 1 pin" in done(cache, "info")[1]
    assert "pinned" in done(cache, "ls")[1].splitlines()[0]
    assert json.loads(done(cache, "pin", "--json")[1])["pins"][0]["path"].endswith("/a")
    assert done(cache, "unpin", "one.zarr") == (0, "1 pin ended\n", "")
    code, _, err = done(cache, "unpin", "one.zarr")
    assert (code, "is not pinned: nothing is" in err) == (2, True)
    assert done(cache, "unpin", "--all") == (0, "0 pins ended\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pin", "--for", "7d"], "SOURCE"),
        (["pin", "one.zarr", "--for", "7"], "--for '7'"),
        (["pin", "two.zarr"], "two.zarr"),
        (["pin", "one.zarr", "b"], "'b'"),
        (["unpin"], "--all"),
        (["unpin", "one.zarr", "--all"], "--all"),
    ],
    # the path of the cache has the name of the test
    ids=range(6),
)
def test_bad_input(cache: Path, words: list[str], named: str) -> None:
    code, out, err = done(cache, *words)
    assert (code, out, err.count("\n"), named in err) == (2, "", 1, True), err
