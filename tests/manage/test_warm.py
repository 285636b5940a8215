"""`xzcache.warm`: from real servers, what is missing and no more, in scripts, event loops and clusters."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from clusters import nodes
from processes import PATIENCE, run_command, until
from servers import Delayed, Web, delayed_server, needs_obstore, nobody, s3_server, web_server
from zarr.storage import LocalStore

import xzcache

__all__ = ["nobody"]

DAYS, CHUNK = 24, 2


def make(path: Path, *, zarr_format: Any = 3, **encoding: Any) -> xr.Dataset:
    """Two variables over days and places, in chunks of two days and half the places; days are strings of time."""
    rng = np.random.default_rng(0)
    dataset = xr.Dataset(
        {
            name: (("time", "place"), rng.integers(1, 250, (DAYS, 8), dtype="u1"), {"scale_factor": 0.5})
            for name in ("t2m", "u10")
        },
        {"time": np.arange("2020-01-01", "2020-01-25", dtype="M8[D]"), "place": [float(9 - i) for i in range(8)]},
    )
    each = {"chunks": (CHUNK, 4), **encoding}
    if zarr_format == 3:
        each.setdefault("compressors", ())
    dataset.to_zarr(path, encoding={"t2m": each, "u10": each}, zarr_format=zarr_format, consolidated=True)
    return dataset


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "web").mkdir()
    make(tmp_path / "web/era5.zarr")
    with web_server(tmp_path / "web") as web:
        yield web


def asked(web: Web, name: str = "") -> list[str]:
    """The chunks that were asked for, without the array's name if there is one, in order."""
    found = [request.path.partition("era5.zarr/")[2] for request in web.requests]
    return sorted(path.removeprefix(f"{name}/c/") for path in found if path.startswith(f"{name}/c/" if name else ""))


def chunks(web: Web) -> list[str]:
    return [path for path in asked(web) if "/c/" in path]


def warm(web: Web, tmp_path: Path, *args: Any, **options: Any) -> Any:
    return xzcache.warm(f"{web.url}/era5.zarr", *args, directory=tmp_path / "cache", **options)


def opened(web: Web, tmp_path: Path, **options: Any) -> xr.Dataset:
    return xzcache.open_zarr(f"{web.url}/era5.zarr", cache_store=tmp_path / "cache", **options)


def test_what_is_missing_and_no_more(web: Web, tmp_path: Path) -> None:
    opened(web, tmp_path).t2m.isel(time=slice(4, 6)).compute()
    web.requests.clear()
    found = warm(web, tmp_path, "t2m", {"time": slice("2020-01-03", "2020-01-08")})
    # days 3 and 4 are chunk 1; 5 and 6 are cached; 7 and 8 are chunk 3
    assert asked(web, "t2m") == ["1/0", "1/1", "3/0", "3/1"]
    assert (found.ok, found.cached - 2, found.fetched, found.absent, found.failed) == (True, 2, 4, 0, ())
    assert found.size == 4 * 8
    assert len(chunks(web)) == 4
    web.requests.clear()
    again = warm(web, tmp_path, "t2m", {"time": slice("2020-01-03", "2020-01-08")})
    assert (again.fetched, again.size, again.cached) == (0, 0, again.objects)
    assert chunks(web) == []


def test_what_was_warmed_is_read_when_the_source_is_away(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    make(tmp_path / "web/era5.zarr")
    source = xr.open_zarr(tmp_path / "web/era5.zarr")
    with web_server(tmp_path / "web") as web:
        assert warm(web, tmp_path, ["t2m"], ["time=2020-01-03:2020-01-08", "place=9:6"]).ok
        # each chunk of the half of the places, and nothing of the other variable
        assert asked(web, "t2m") == ["1/0", "2/0", "3/0"]
        assert asked(web, "u10") == []
    found = opened(web, tmp_path, revalidate=False).t2m.sel(time=slice("2020-01-03", "2020-01-08"), place=slice(9, 6))
    xr.testing.assert_equal(found, source.t2m.sel(time=slice("2020-01-03", "2020-01-08"), place=slice(9, 6)))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_all_of_a_store(tmp_path: Path, zarr_format: int) -> None:
    make(tmp_path / "era5.zarr", zarr_format=zarr_format)
    found = xzcache.warm(tmp_path / "era5.zarr", directory=tmp_path / "cache")
    assert (found.objects, found.fetched) == (50, 50)
    arrays = {array.name: array.fraction for array in xzcache.ls("era5.zarr", tmp_path / "cache")}
    assert arrays == {"t2m": 1.0, "u10": 1.0, "time": 1.0, "place": 1.0}


@pytest.mark.parametrize("chunks_", [None, {}, {"time": 4}])
def test_selections_that_were_made_of_a_dataset(web: Web, tmp_path: Path, chunks_: Any) -> None:
    dataset = opened(web, tmp_path, chunks=chunks_)
    web.requests.clear()
    assert dataset[["t2m"]].isel(time=[3, 9], place=slice(0, 2)).zcache.warm().ok
    # with Dask, all of its chunks: days 0 to 3 and 8 to 11
    expected = ["1/0", "4/0"] if chunks_ != {"time": 4} else ["0/0", "1/0", "4/0", "5/0"]
    assert asked(web, "t2m") == expected
    assert asked(web, "u10") == []


@pytest.mark.parametrize("chunks_", [None, {}])
def test_selections_of_an_opened_dataset(web: Web, tmp_path: Path, chunks_: Any) -> None:
    dataset = opened(web, tmp_path, chunks=chunks_)
    web.requests.clear()
    assert xzcache.warm(dataset, "u10", isel={"time": slice(None, None, 8), "place": -1}).ok
    assert asked(web, "u10") == ["0/1", "4/1", "8/1"]
    assert xzcache.warm(dataset.u10, sel={"time": "2020-01-03"}).fetched == 2
    assert xzcache.warm(dataset.isel(time=0), "t2m").fetched == 2
    assert asked(web, "t2m") == ["0/0", "0/1"]


KB = 20_000


def sharded(path: Path, **options: Any) -> np.ndarray[Any, Any]:
    """An array of 4 shards with 8 chunks of 20 kB each; the fifth chunk is empty, and the last shard is not full."""
    values = np.random.default_rng(0).integers(1, 250, 31 * KB + 5, dtype="u1")
    values[4 * KB : 5 * KB] = 0
    group = zarr.create_group(LocalStore(path))
    options = {"shards": (8 * KB,), "chunks": (KB,), "compressors": None, "dimension_names": ["x"], **options}
    group.create_array("a", shape=len(values), dtype="u1", fill_value=0, **options)[:] = values
    zarr.consolidate_metadata(LocalStore(path))
    return values


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_chunks_of_shards(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    values = sharded(tmp_path / "web/era5.zarr")
    with delayed_server(tmp_path / "web", tmp_path, 0) as web:
        url = f"{web.url}/era5.zarr"

        def warmed(first: int, last: int) -> Any:
            web.forget()
            return xzcache.warm(url, "a", isel={"x": slice(first, last)}, directory=tmp_path / "cache")

        index = 8 * 16 + 4
        # the first shard, and of the second one two chunks, with the index
        found = warmed(0, 10 * KB - 5)
        assert (found.ok, found.fetched, found.size) == (True, 2, 7 * KB + index + index + 2 * KB)
        assert Counter(web.chunks()) == {"/era5.zarr/a/c/0": 1, "/era5.zarr/a/c/1": 2}
        # of these, nothing again
        assert warmed(5, 9 * KB).cached == 2
        assert web.chunks() == []
        # one chunk more of the second, and the empty one of the first
        assert warmed(4 * KB, 11 * KB).size == KB
        # the rest of the second, in which the place of the index is known only now
        assert warmed(0, 16 * KB).size == 5 * KB + index
        # the last two chunks
        assert warmed(30 * KB, 31 * KB + 5).size == 2 * KB + index
        store = xzcache.CacheStore(url, cache_store=tmp_path / "cache", read_only=True)
        array = zarr.open_array(store, path="a", mode="r")
        web.forget()
        np.testing.assert_array_equal(array[: 16 * KB], values[: 16 * KB])
        np.testing.assert_array_equal(array[30 * KB :], values[30 * KB :])
        assert web.chunks() == []


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_without_dimension_names(tmp_path: Path, zarr_format: Any) -> None:
    group = zarr.create_group(LocalStore(tmp_path / "x.zarr"), zarr_format=zarr_format)
    group.create_array("deep/a", shape=(4, 4), chunks=(2, 2), dtype="u1")[:] = 1
    group.create_array("deep/b", shape=(), dtype="u1")[...] = 1
    group.create_array("sparse", shape=(4, 4), chunks=(2, 2), dtype="u1")[:2, :2] = 1
    where = {"directory": tmp_path / "cache"}
    assert xzcache.warm(tmp_path / "x.zarr", "deep/b", **where).fetched == 1
    assert xzcache.warm(tmp_path / "x.zarr", "deep", **where).fetched == 4
    found = xzcache.warm(tmp_path / "x.zarr", **where)
    assert (found.objects, found.cached, found.fetched, found.absent, found.ok) == (9, 5, 1, 3, True)
    store = xzcache.CacheStore(tmp_path / "x.zarr", cache_store=tmp_path / "cache", read_only=True)
    assert xzcache.warm(zarr.open_group(store, mode="r")["deep"]["a"]).cached == 4
    assert xzcache.warm(zarr.open_group(store, mode="r")["deep"]).cached == 5


async def test_in_a_running_event_loop(web: Web, tmp_path: Path) -> None:
    assert warm(web, tmp_path).fetched == 50
    assert (await asyncio.to_thread(warm, web, tmp_path)).cached == 50


def test_a_dry_run(web: Web, tmp_path: Path) -> None:
    found = warm(web, tmp_path, "t2m", dry_run=True)
    assert (found.missing, found.fetched, found.dry_run) == (24, 0, True)
    assert chunks(web) == ["place/c/0", "time/c/0"]
    assert "24 to be fetched" in repr(found)


def test_a_notebook_without_ipywidgets_has_a_bar_and_no_warning(tmp_path: Path) -> None:
    make(tmp_path / "era5.zarr")
    # as in the kernel of a notebook
    code = """
import builtins, sys, warnings
class ZMQInteractiveShell:
    pass
builtins.get_ipython = ZMQInteractiveShell
sys.modules["ipywidgets"] = None
warnings.simplefilter("error", UserWarning)
import xzcache
print(xzcache.warm(sys.argv[1], directory=sys.argv[2]).ok)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "era5.zarr"), str(tmp_path / "cache")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "True\n", done.stderr
    assert "warm: 50/50 objects" in done.stderr


# -- what does not fit, and what fails


def test_refused_up_front_where_it_cannot_fit(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    store = LocalStore(tmp_path / "web/era5.zarr")
    group = zarr.create_group(store)
    rng = np.random.default_rng(0)
    big = group.create_array("big", shape=3_000_000, chunks=100_000, dtype="u1", compressors=None)
    big[:] = rng.integers(0, 255, 3_000_000)
    # a hundredth of its size, when compressed
    small = group.create_array("small", shape=3_000_000, chunks=100_000, dtype="u1")
    small[:] = 1
    with web_server(tmp_path / "web") as web:
        url, where = f"{web.url}/era5.zarr", {"cache_store": tmp_path / "cache", "max_size": "2 MB"}
        with pytest.raises(ValueError, match=r"about 3 MB are asked for, .*has room for 2 MB.*resize"):
            xzcache.warm(url, "big", **where)
        # a question is answered and not refused
        found = xzcache.warm(url, "big", dry_run=True, **where)
        assert (found.missing, found.needed, found.ok) == (30, 3_000_000, True)
        assert "about 3 MB are asked for" in found.refusal
        assert repr(found).splitlines()[1] == f"does not fit: {found.refusal}"
        with command(web.url, tmp_path, "--variable", "big", "--dry-run", "--json") as process:
            assert json.loads(process.communicate(timeout=PATIENCE)[0])["refusal"] == found.refusal
        assert process.returncode == 0
        assert not any(request.method == "GET" for request in web.requests if "/c/" in request.path)
        assert xzcache.warm(url, "small", dry_run=True, **where).refusal == ""
        assert xzcache.warm(url, "small", **where).fetched == 30


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Delayed]:
    """A server that takes 20 ms for each answer."""
    (tmp_path / "web").mkdir()
    make(tmp_path / "web/era5.zarr")
    (tmp_path / "refused").write_text("")
    with delayed_server(tmp_path / "web", tmp_path, 0.02, str(tmp_path / "refused")) as web:
        yield web


def command(url: str, tmp_path: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    words = ("-m", "xzcache", "warm", f"{url}/era5.zarr", "--directory", str(tmp_path / "cache"), *words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], preexec_fn=heed, **{**pipes, **options})


def heed() -> None:
    """Let SIGINT do what it does by default, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_failed_objects_are_retried_and_listed(slow: Delayed, tmp_path: Path) -> None:
    refused = ["t2m/c/3/0", "t2m/c/4/1", "t2m/c/5/0", "t2m/c/6/0", "t2m/c/7/1"]
    (tmp_path / "refused").write_text(" ".join(refused))
    with command(slow.url, tmp_path, "--retries", "1") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    # one reason is said once
    assert "failed: 5\n  t2m/c/3/0, t2m/c/4/1, t2m/c/5/0 and 2 more: " in out
    assert out.partition("failed: ")[2].count("\n") == 2, out
    assert "45 fetched" in out
    (tmp_path / "refused").write_text("")
    slow.forget()
    with command(slow.url, tmp_path, "--json") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out)["fetched"] == 5
    assert sorted(slow.chunks()) == [f"/era5.zarr/{key}" for key in refused]


@pytest.mark.parametrize("by_module", [True, False])
def test_interrupted_and_started_again(slow: Delayed, tmp_path: Path, by_module: bool) -> None:
    arguments = f"{slow.url + '/era5.zarr'!r}, directory={str(tmp_path / 'cache')!r}, concurrency=2"
    if by_module:
        started = command(slow.url, tmp_path, "--concurrency", "2")
    else:
        started = subprocess.Popen(
            [sys.executable, "-c", f"import xzcache; xzcache.warm({arguments})"],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed,
        )
    with started as process:
        until(lambda: len(slow.chunks()) >= 20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    if by_module:
        assert process.returncode == 130
        assert err == "xzcache: interrupted; what was fetched is cached, the same command fetches the rest\n"
    else:
        assert "KeyboardInterrupt" in err
    half = len(slow.chunks())
    assert 20 <= half < 45
    with command(slow.url, tmp_path, "--json") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out)["cached"] == half
    # no chunk was sent twice
    assert set(Counter(slow.chunks()).values()) == {1}
    assert len(slow.chunks()) == 50


# -- clusters


@pytest.mark.slow
def test_on_a_cluster(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/era5.zarr"

    def counts() -> list[dict[str, int]]:
        return [{a.name: a.cached for a in xzcache.ls(url, tmp_path / f"node{n}")} for n in range(2)]

    with nodes(tmp_path, 2) as client:
        found = xzcache.warm(url, "t2m", client=client)
        assert (found.ok, found.fetched, len(found.directories)) == (True, 28, 2), repr(found)
        # each its share, and all of the coordinates
        assert [count["t2m"] for count in counts()] == [12, 12]
        assert [(count["time"], count["place"]) for count in counts()] == [(1, 1), (1, 1)]
        assert sorted(asked(web, "t2m")) == sorted(set(asked(web, "t2m")))
        web.requests.clear()
        assert xzcache.warm(url, "t2m", client=client).fetched == 0
        assert xzcache.warm(url, "t2m", client=client, every_node=True).fetched == 24
        assert [count["t2m"] for count in counts()] == [24, 24]
        assert len(asked(web, "t2m")) == 24
        done = subprocess.run(
            [sys.executable, "-m", "xzcache", "warm", url, "--scheduler", client.scheduler.address, "--every-node"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert "on 2 nodes" in done.stdout, done.stderr
        assert done.returncode == 0


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variables": "t2n"}, "variables='t2n' is not accepted.*did you mean t2m"),
        ({"variables": []}, "variables="),
        ({"variables": 3}, "variables=|iterable"),
        ({"sel": {"tme": "2020"}}, "sel='tme' is not accepted.*did you mean time"),
        ({"sel": {"time": "2031-01-01"}}, "sel=time=2031-01-01 is not accepted.*runs from 2020-01-01"),
        ({"sel": {"time": slice("2031", "2032")}}, "selects nothing.*runs from 2020-01-01"),
        ({"sel": ["place=2:9"]}, "selects nothing.*runs from 9.0 to 2.0"),
        ({"sel": ["time=yesterday"]}, "sel=time=yesterday is not accepted"),
        ({"sel": ["time"]}, "sel='time' is not accepted"),
        ({"sel": "time=3"}, "sel='time=3' is not accepted"),
        ({"isel": ["time=a:b"]}, "isel=time=a:b is not accepted"),
        ({"isel": {"time": 100}}, "isel=time=100 is not accepted.*'time' runs"),
        ({"concurrency": 0}, "concurrency=0 is not accepted"),
        ({"concurrency": "8"}, "concurrency='8' is not accepted"),
        ({"retries": -1}, "retries=-1 is not accepted"),
        ({"every_node": True}, "every_node=True is not accepted"),
        ({"client": 3}, "client=3 is not accepted"),
        ({"pin": "7"}, "pin='7' is not accepted"),
        ({"max_size": "much"}, "max_size='much' is not accepted"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    make(tmp_path / "era5.zarr")
    with pytest.raises((ValueError, TypeError), match=message) as error:
        xzcache.warm(tmp_path / "era5.zarr", directory=tmp_path / "cache", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given", [3, None, "", xr.Dataset({"a": ("x", [1, 2])}), "nowhere.zarr", "ftps://nobody@127.0.0.1/x"]
)
def test_bad_sources(tmp_path: Path, given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, LookupError, OSError)) as error:
        xzcache.warm(given)
    assert "\n" not in str(error.value)


def test_points_are_no_boxes(web: Web, tmp_path: Path) -> None:
    points = {"time": xr.DataArray([0, 9], dims="point"), "place": xr.DataArray([0, 7], dims="point")}
    with pytest.raises(ValueError, match="points is not accepted"):
        xzcache.warm(opened(web, tmp_path, chunks=None), isel=points)


@pytest.mark.slow
def test_commands_with_bad_input(web: Web, tmp_path: Path) -> None:
    secret = "sesame"
    url = web.url.replace("http://", f"http://user:{secret}@")
    for words in (
        ["--concurrency", "0"],
        ["--concurrency", "many"],
        ["--variable", "t2n"],
        ["--sel", "time=2031"],
        ["--sel", "tim=2020"],
        ["--every-node"],
        ["--for", "7d"],
        ["-o", secret],
    ):
        place = url if "-o" not in words else web.url
        code, out, err = run_command("warm", f"{place}/era5.zarr", "--directory", tmp_path / "cache", *words)
        assert (code, out) == (2, ""), (words, err)
        assert err.count("\n") == 1, err
        assert secret not in err or words[0] == "-o", err
    with command(f"{url}/nowhere", tmp_path) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "there is no Zarr array or group at" in err
    assert secret not in err


@needs_obstore
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["-o", "region_name=us-east-1"],
            "no credentials were found: give -o anon=true for public data, else -o key=...",
        ),
        (["-o", "key=me", "-o", "secret=wrong"], "the server refuses the credentials"),
    ],
)
def test_a_command_without_the_right_credentials(options: list[str], said: str, tmp_path: Path) -> None:
    make(tmp_path / "s3" / "bucket" / "era5.zarr")
    with s3_server(tmp_path / "s3") as server:
        words = [*options, "-o", f"endpoint_url={server.endpoint}"]
        environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}
        with command("s3://bucket", tmp_path, *words, env=environment) as process:
            out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"xzcache: s3://bucket/era5.zarr: {said}"), err
    assert "storage_options" not in err
