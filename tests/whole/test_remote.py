"""What a real S3 server is asked for when datasets are opened through the cache, by its own count."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from processes import run
from servers import S3Server, nobody, s3_server, tidy, words
from sources import neighbours

import xzcache

__all__ = ["nobody", "tidy"]

pytestmark = [
    pytest.mark.usefixtures("tidy", "nobody"),
    # clients that fsspec leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BUCKET = "bucket"
formats = pytest.mark.parametrize("zarr_format", [3, 2])
upstreams = pytest.mark.parametrize("upstream", ["obstore", "fsspec"])


# -- helpers


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("buckets")
    (directory / BUCKET).mkdir()
    with s3_server(directory) as server:
        yield server


def weather() -> xr.Dataset:
    values = np.arange(6 * 4 * 5, dtype="f4").reshape(6, 4, 5)
    return xr.Dataset(
        {"t": (("time", "y", "x"), values), "wind": (("time", "y", "x"), -values)},
        coords={"time": np.arange(6), "y": np.linspace(0, 1, 4), "x": np.linspace(0, 1, 5)},
    )


CHUNKS = {"t": (2, 4, 3), "wind": (3, 2, 5)}
OBJECTS = 3 * 1 * 2 + 2 * 2 * 1 + 3
"""Chunks of all variables and coordinates."""


def put(s3: S3Server, name: str, zarr_format: Any = 3, *, consolidated: bool = True) -> str:
    """A dataset at the source; its URL."""
    encoding = {variable: {"chunks": chunks} for variable, chunks in CHUNKS.items()}
    weather().to_zarr(
        s3.store(BUCKET, name), mode="w", zarr_format=zarr_format, consolidated=consolidated, encoding=encoding
    )
    s3.reset()
    return f"s3://{BUCKET}/{name}"


def is_document(path: str) -> bool:
    return path.rpartition("/")[2] in ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


def asked(s3: S3Server, *, documents: bool | None = None) -> Counter[str]:
    """Requests so far, for documents, chunks or (as None) both: how often each was sent."""
    counted: Counter[str] = Counter()
    for tally in s3.counts().tallies:
        if documents in (None, is_document(tally.path)):
            counted[f"{tally.operation} {tally.path.removeprefix(BUCKET + '/')}"] += tally.requests
    return counted


def opened(url: str, **options: Any) -> xr.Dataset:
    return xr.open_zarr(url, engine="zcache", **options)


def check(url: str, **options: Any) -> None:
    """Open a dataset anew, and read all of it."""
    xr.testing.assert_identical(opened(url, **options).load(), weather())


def elsewhere(target: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a function in another process, in the environment of this one."""
    return neighbours.run(in_environment, dict(os.environ), target, args, named)


def in_environment(environment: dict[str, str], target: Callable[..., Any], args: Any, named: Any) -> Any:
    os.environ.clear()
    os.environ.update(environment)
    return target(*args, **named)


# -- one process after another


@formats
@upstreams
def test_the_second_opening_asks_for_metadata_only(
    s3: S3Server, upstream: str, zarr_format: int, tmp_path: Path
) -> None:
    url = put(s3, f"second-{upstream}-{zarr_format}", zarr_format)
    options = {"storage_options": words(s3), "upstream": upstream, "cache_store": tmp_path / "cache"}
    check(url, **options)
    assert asked(s3, documents=False).total() == OBJECTS
    for again in (partial(check, url, **options), partial(elsewhere, check, url, **options)):
        s3.reset()
        again()
        assert not asked(s3, documents=False)
        if zarr_format == 3:
            assert asked(s3) == {f"GET {url.rpartition('/')[2]}/zarr.json": 1}
        else:
            assert set(asked(s3).values()) == {1}
        if upstream == "obstore":
            # what was there is asked for on a condition, and was not sent again
            assert {tally.status for tally in s3.counts().tallies} <= {304, 404}
            assert s3.counts().objects == 0


@pytest.mark.slow
@formats
@upstreams
def test_what_is_cached_is_read_without_a_server(upstream: str, zarr_format: int, tmp_path: Path) -> None:
    (tmp_path / "buckets" / BUCKET).mkdir(parents=True)
    with s3_server(tmp_path / "buckets") as s3:
        url = put(s3, "data", zarr_format)
        options = {"storage_options": words(s3), "upstream": upstream, "cache_store": tmp_path / "cache"}
        check(url, **options)
        s3.reset()
        check(url, revalidate=False, **options)
        elsewhere(check, url, revalidate=False, **options)
        assert not s3.counts().tallies
    check(url, revalidate=False, **options)
    elsewhere(check, url, revalidate=False, **options)
    check(url, **options)
    for read in (partial(xr.open_zarr, engine="zcache"), xzcache.open_mfdataset):
        with pytest.raises(Exception, match=r"zarr\.json|\.zmetadata|\.zgroup|onnect") as raised:
            read(url, revalidate="strict", **options)
        assert raised.value.__notes__ == ["revalidate=False reads what is cached of this source without asking it"]


def test_a_process_that_starts_without_a_server_reads_what_is_cached(tmp_path: Path) -> None:
    (tmp_path / "buckets" / BUCKET).mkdir(parents=True)
    with s3_server(tmp_path / "buckets") as s3:
        url = put(s3, "data")
        options = {"storage_options": words(s3), "cache_store": tmp_path / "cache"}
        check(url, **options)
    run(start, dict(os.environ), url, {"revalidate": False, **options})


def start(link: Connection, environment: dict[str, str], url: str, options: dict[str, Any]) -> None:
    in_environment(environment, check, (url,), options)


@formats
@upstreams
@pytest.mark.parametrize("consolidated", [True, False])
def test_a_cold_read_asks_for_each_object_once(
    s3: S3Server, upstream: str, zarr_format: int, consolidated: bool, tmp_path: Path
) -> None:
    url = put(s3, f"cold-{upstream}-{zarr_format}-{consolidated}", zarr_format, consolidated=consolidated)
    options = {"storage_options": words(s3), "upstream": upstream, "cache_store": tmp_path / "cache"}
    check(url, consolidated=consolidated, **options)
    # where no document says what there is, it has to be listed
    objects = {name: times for name, times in asked(s3).items() if consolidated or not name.startswith("LIST ")}
    assert {name.split()[0] for name in objects} == {"GET"}
    assert set(objects.values()) == {1}
    assert sum(not is_document(name) for name in objects) == OBJECTS


def test_what_is_computed_reads_only_what_it_needs(s3: S3Server, tmp_path: Path) -> None:
    url = put(s3, "part")
    ds = opened(url, storage_options=words(s3), cache_store=tmp_path / "cache")
    s3.reset()
    assert float(ds["t"].isel(time=0, x=0).sum()) == float(weather()["t"].isel(time=0, x=0).sum())
    assert asked(s3) == {"GET part/t/c/0/0/0": 1}


def test_a_dataset_that_was_rewritten_is_read_anew(s3: S3Server, tmp_path: Path) -> None:
    url = put(s3, "rewritten")
    options = {"storage_options": words(s3), "cache_store": tmp_path / "cache"}
    check(url, **options)
    later = weather().isel(time=slice(4)) + 1
    later.to_zarr(s3.store(BUCKET, "rewritten"), mode="w", encoding={"t": {"chunks": (2, 4, 3)}})
    s3.reset()
    xr.testing.assert_identical(opened(url, **options).load(), later)
    assert set(asked(s3).values()) == {1}
    s3.reset()
    xr.testing.assert_identical(opened(url, **options).load(), later)
    assert not asked(s3, documents=False)


# -- several processes at once


def read_everything(store: xzcache.CacheStore) -> dict[str, Any]:
    group = zarr.open_group(store, mode="r", zarr_format=3)
    return {name: group[name][...].tolist() for name in group.array_keys()}


def test_two_processes_that_read_at_once_ask_for_each_chunk_once(s3: S3Server, tmp_path: Path) -> None:
    store = xzcache.CacheStore(put(s3, "together"), storage_options=words(s3), cache_store=tmp_path / "cache")
    expected = {name: variable.values.tolist() for name, variable in weather().variables.items()}
    there = neighbours.start(read_everything, store)
    assert read_everything(store) == there.result() == expected
    chunks = asked(s3, documents=False)
    assert chunks.total() == len(chunks) == OBJECTS


@formats
def test_a_cluster_asks_for_each_chunk_once_and_for_no_metadata(
    s3: S3Server, zarr_format: int, cluster: Any, tmp_path: Path
) -> None:
    url = put(s3, f"cluster-{zarr_format}", zarr_format)
    ds = opened(url, storage_options=words(s3), cache_store=tmp_path / "cache", chunks={})
    s3.reset()
    expected = weather()
    for statistic in ("mean", "max"):
        computed = cluster.compute(getattr(ds, statistic)("time"))
        xr.testing.assert_allclose(computed.result(), getattr(expected, statistic)("time"))
    assert not asked(s3, documents=True)
    chunks = asked(s3, documents=False)
    assert set(chunks.values()) == {1}
    # what has no chunks in dask was read where the dataset was opened
    assert len(chunks) == OBJECTS - 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    # not at the top: processes that run a function of this module would import it, too
    import clusters

    with clusters.cluster(3, threads_per_worker=2) as client:
        yield client
