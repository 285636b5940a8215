"""What is answered without an object: its absence, its existence, its size; and which stores are equal."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import obstore.store
import pytest
import xarray as xr
import zarr
from servers import nobody, tidy, web_server
from sources import CountingStore, again, buffer, cached, local_source, neighbours, read, read_now
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, ObjectStore, WrapperStore

import xzcache
from xzcache.sources import reach_of

__all__ = ["nobody", "tidy"]

pytestmark = [pytest.mark.usefixtures("tidy", "nobody"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

MB = 1 << 20


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """What sets the clock forward, or back."""
    real = time.time
    shift = 0.0

    def move(seconds: float) -> None:
        nonlocal shift
        shift += seconds

    monkeypatch.setattr(time, "time", lambda: real() + shift)
    return move


# -- chunks that the source does not have


def sparse(root: Path, **layout: Any) -> np.ndarray[Any, Any]:
    """A dataset of which one chunk, or shard, is not stored."""
    values = np.ones((4, 20, 20), "f4")
    values[:, :10, :10] = np.nan
    encoding = {"sst": {"chunks": (1, 10, 10), **layout}}
    xr.Dataset({"sst": (("time", "y", "x"), values)}).to_zarr(root, encoding=encoding)
    return values


@contextmanager
def served_and_read(tmp_path: Path, **options: Any) -> Iterator[Callable[[], np.ndarray[Any, Any]]]:
    with web_server(tmp_path / "web") as web:

        def opened() -> np.ndarray[Any, Any]:
            url = f"{web.url}/data.zarr"
            ds = xr.open_zarr(url, engine="zcache", cache_store=tmp_path / "cache", chunks=None, **options)
            found: np.ndarray[Any, Any] = ds["sst"].values
            return found

        yield opened


@pytest.mark.parametrize("layout", [{}, {"shards": (1, 10, 10), "chunks": (1, 5, 5)}], ids=["chunks", "shards"])
def test_an_absent_chunk_is_read_while_the_source_is_down(
    layout: dict[str, Any], later: Callable[[float], None], tmp_path: Path
) -> None:
    (tmp_path / "web").mkdir()
    values = sparse(tmp_path / "web" / "data.zarr", **layout)
    with served_and_read(tmp_path, revalidate=False) as opened:
        for _ in range(2):
            np.testing.assert_array_equal(opened(), values)
    for passes in (0, 62, 86400):
        later(passes)
        np.testing.assert_array_equal(opened(), values)


async def test_an_absent_chunk_is_read_by_a_process_that_comes_later(
    later: Callable[[float], None], tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    source = ObjectStore(obstore.store.LocalStore(tmp_path / "source"))
    store = cached("directory", source, tmp_path, revalidate=False)
    later(-3600)
    assert await read(store, "x/c/0") is None
    store.cache_info()
    later(3600)
    # a look at the source would show this
    await source.set("x/c/0", buffer(b"new"))
    assert neighbours.run(read_now, again(store, revalidate=False), "x/c/0") is None
    assert neighbours.run(read_now, again(store), "x/c/0") == b"new"


@pytest.mark.parametrize("revalidate", ["open", 60, False])
async def test_an_absence_that_is_too_old_is_asked_about(
    revalidate: Any, cache_kind: str, later: Callable[[float], None], tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path, revalidate=revalidate, missing_max_age_seconds=30)
    for key in ("c/0", "c/1"):
        assert await read(store, key) is None
    later(31)
    source.errors["get"] = ConnectionError("the source is down")
    if revalidate is False:
        assert await read(store, "c/0") is None
        assert source.count("get", "c/0") == 2
    else:
        with pytest.raises(ConnectionError, match="the source is down"):
            await read(store, "c/0")
    # of this one nothing is known
    with pytest.raises(ConnectionError, match="the source is down"):
        await read(store, "c/2")
    source.errors.clear()
    await source.set("c/1", buffer(b"new"))
    assert await read(store, "c/1") == b"new"


async def test_what_is_too_old_for_one_store_is_not_for_another(
    cache_kind: str, later: Callable[[float], None], tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path, missing_max_age_seconds=30)
    patient = again(store, missing_max_age_seconds="infinity")
    assert await read(patient, "c/0") is None
    later(31)
    source.errors["get"] = ConnectionError()
    with pytest.raises(ConnectionError):
        await read(store, "c/0")
    assert await read(patient, "c/0") is None


async def test_whether_an_absent_chunk_exists_is_known(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    store = cached(cache_kind, source, tmp_path, missing_max_age_seconds=30)
    assert await read(store, "c/0") is None
    source.forget()
    assert not await store.exists("c/0")
    with pytest.raises(FileNotFoundError, match="c/0"):
        await store.getsize("c/0")
    assert source.calls == []
    await store.set("c/0", buffer(b"123"))
    assert await store.exists("c/0")
    assert await store.getsize("c/0") == 3


def test_an_absent_chunk_of_a_snapshot_is_never_asked_about(later: Callable[[float], None], tmp_path: Path) -> None:
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="x", shape=(8,), chunks=(4,), dtype="i4")[:4] = 1
    session.commit("half of it")
    store = xzcache.CacheStore(repository.readonly_session("main").store, cache_store=tmp_path / "cache")
    array = zarr.open_array(store, path="x", mode="r", zarr_format=3)
    assert array[:].tolist() == [1] * 4 + [0] * 4
    before = store.cache_stats()["misses"]
    later(3600)
    assert array[:].tolist() == [1] * 4 + [0] * 4
    assert store.cache_stats()["misses"] == before


async def test_what_comes_from_the_future_is_asked_about(
    cache_kind: str, later: Callable[[float], None], tmp_path: Path
) -> None:
    source = local_source(tmp_path)
    await source.set("x/.zarray", buffer(b'{"zarr_format": 2}'))
    ages: dict[str, Any] = {"max_age_seconds": 60, "missing_max_age_seconds": 60}
    store = cached(cache_kind, source, tmp_path, revalidate=False, **ages)
    assert await read(store, "x/.zarray") is not None
    for key in ("x/.zattrs", "x/0"):
        assert await read(store, key) is None
        assert await read(store, key) is None
        assert source.count("get", key) == 1
        await source.set(key, buffer(b"{}"))
    # the clock was wrong, and is set right
    later(-3600)
    for key in ("x/.zattrs", "x/0"):
        assert await read(store, key) == b"{}"


# -- whether a key exists, and its size


def bytes_read() -> int:
    """What this process has read from files and sockets."""
    return int(Path("/proc/self/io").read_text().split()[1])


async def sized(store: xzcache.CacheStore, key: str) -> tuple[bool, int]:
    return await store.exists(key), await store.getsize(key)


@pytest.mark.parametrize("age", [60, "infinity"])
async def test_the_size_of_what_is_cached_is_told_without_reading_it(age: Any, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source.set("c/0", buffer(bytes(16 * MB)))
    store = cached("directory", source, tmp_path, max_age_seconds=age)
    assert await read(store, "c/0") is not None
    store.cache_info()
    source.forget()
    before = bytes_read()
    for _ in range(4):
        assert await sized(store, "c/0") == (True, 16 * MB)
    assert bytes_read() - before < MB
    assert source.calls == []
    # nor by a process that has not seen it before
    assert neighbours.run(size_and_bytes, again(store, max_age_seconds=age), "c/0") == ((True, 16 * MB), True)


def size_and_bytes(store: xzcache.CacheStore, key: str) -> tuple[tuple[bool, int], bool]:
    import asyncio

    before = bytes_read()
    found = asyncio.run(sized(store, key))
    return found, bytes_read() - before < MB


async def test_the_size_of_what_is_too_old_is_the_sources(cache_kind: str, tmp_path: Path, later: Any) -> None:
    source = local_source(tmp_path)
    await source.set("c/0", buffer(bytes(100)))
    store = cached(cache_kind, source, tmp_path, max_age_seconds=60)
    for _ in range(2):
        assert await read(store, "c/0") == bytes(100)
    await source.set("c/0", buffer(bytes(50)))
    assert await sized(store, "c/0") == (True, 100)
    later(61)
    source.forget()
    assert await sized(store, "c/0") == (True, 50)
    await source.delete("c/0")
    assert not await store.exists("c/0")
    with pytest.raises(FileNotFoundError):
        await store.getsize("c/0")
    # it was asked in its own words, and sent nothing
    assert source.reads == 0
    assert [method for method, _ in source.calls if method != "delete"] == ["exists", "getsize"] * 2


async def test_the_size_of_what_is_not_cached_is_the_sources(cache_kind: str, tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source.set("a/c/0", buffer(bytes(100)))
    store = cached(cache_kind, source, tmp_path)
    assert await sized(store, "a/c/0") == (True, 100)
    assert await store.getsize_prefix("a") == 100
    assert not await store.is_empty("a")
    assert source.reads == 0


async def test_a_damaged_entry_has_no_size_of_its_own(tmp_path: Path) -> None:
    source = local_source(tmp_path)
    await source.set("c/0", buffer(bytes(100)))
    store = cached("directory", source, tmp_path, max_age_seconds=60)
    assert await read(store, "c/0") == bytes(100)
    store.cache_info()
    os.truncate(tmp_path / "cache" / store.namespace / "c" / "0", 10)
    source.forget()
    assert await sized(store, "c/0") == (True, 100)
    assert source.reads == 0


# -- equality


def test_sources_in_memory_are_equal_if_they_are_the_same(cache_kind: str, tmp_path: Path) -> None:
    def over(source: Store) -> xzcache.CacheStore:
        cache = tmp_path / "cache" if cache_kind == "directory" else MemoryStore()
        return xzcache.CacheStore(source, cache_store=cache)  # type: ignore[arg-type]

    first, second = MemoryStore(), MemoryStore()
    one, other = over(first), over(second)
    assert one != other
    made = zarr.create_array(one, name="a", data=np.arange(4.0))
    zarr.create_array(other, name="a", data=np.arange(4.0))
    assert one != other
    assert zarr.from_array(other, name="a", data=made, overwrite=True)[:].tolist() == [0, 1, 2, 3]
    if cache_kind == "directory":
        assert one == over(first)
        assert one == over(MemoryStore(first._store_dict))
        assert one != over(MemoryStore(first._store_dict, read_only=True))
        objects = obstore.store.MemoryStore()
        assert over(ObjectStore(objects)) == over(ObjectStore(objects))
        assert over(ObjectStore(objects)) != over(ObjectStore(obstore.store.MemoryStore()))


def test_an_array_is_not_written_over_itself(tmp_path: Path) -> None:
    source = MemoryStore()
    store = xzcache.CacheStore(source, cache_store=tmp_path / "cache")
    made = zarr.create_array(store, name="a", data=np.arange(4.0))
    for data in (made, zarr.open_array(store, path="a", mode="r")):
        for target in (store, xzcache.CacheStore(source, cache_store=tmp_path / "cache")):
            if hasattr(zarr.core.array, "_stores_share_data"):
                with pytest.raises(ValueError, match="overlap"):
                    zarr.from_array(target, name="a", data=data, overwrite=True)
    assert made[:].tolist() == [0, 1, 2, 3]


def test_equal_stores_have_the_same_rights_and_settings(tmp_path: Path) -> None:
    def over(source: Store, **options: Any) -> xzcache.CacheStore:
        return xzcache.CacheStore(source, cache_store=tmp_path / "cache", **options)

    root = tmp_path / "source"
    store = over(LocalStore(root))
    assert store == over(LocalStore(root)) == pickle.loads(pickle.dumps(store))
    reader = store.with_read_only(True)
    assert reader == over(LocalStore(root), read_only=True) == over(LocalStore(root, read_only=True))
    assert store.with_read_only(True).with_read_only(False) == store
    different = [over(LocalStore(root), read_only=True), over(LocalStore(tmp_path / "other")), over(MemoryStore())]
    different += [over(LocalStore(root), **{name: 5}) for name in ("max_age_seconds", "revalidate")]
    different += [over(LocalStore(root), namespace="mine"), over(CountingStore(LocalStore(root)))]
    assert not [one for one in different if one == store or store == one]
    assert store != "a store"


def test_another_account_is_another_source(tmp_path: Path) -> None:
    def over(secret: str, *, read_only: bool = False) -> xzcache.CacheStore:
        bucket = obstore.store.S3Store("bucket", access_key_id="me", secret_access_key=secret, region="eu-west-1")
        source = ObjectStore(bucket, read_only=read_only)
        return xzcache.CacheStore(source, cache_store=tmp_path / "cache", read_only=True)

    # the rights of one are not those of the other
    assert over("one") == over("one") == pickle.loads(pickle.dumps(over("one"))) != over("two")
    assert over("one", read_only=True) == over("one")


def test_a_pickled_store_in_memory_is_equal_until_either_is_written(cache_kind: str, tmp_path: Path) -> None:
    store = cached(cache_kind, MemoryStore({"k": buffer(b"1")}), tmp_path)
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store == pickle.loads(pickle.dumps(copy))
    copy._store._store_dict["k"] = buffer(b"2")
    assert copy != store


def test_equal_cache_directories_have_the_same_rights(tmp_path: Path) -> None:
    store = xzcache.LockedLocalStore(tmp_path / "cache")
    assert store == xzcache.LockedLocalStore(tmp_path / "cache") == pickle.loads(pickle.dumps(store))
    assert store.with_read_only(True) == xzcache.LockedLocalStore(tmp_path / "cache", read_only=True) != store
    assert store != LocalStore(tmp_path / "cache")
    assert store != xzcache.LockedLocalStore(tmp_path / "other")


class Refusing(WrapperStore[Store]):
    """A source that raises an exception, once it is told which."""

    error: Exception | None = None

    async def get(self, *args: Any, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return await super().get(*args, **options)


@pytest.mark.parametrize(("error", "is_down"), [(PermissionError("refused"), False), (ConnectionError("gone"), True)])
async def test_an_absent_chunk_stays_absent_and_only_an_outage_is_recorded_as_one(
    error: Exception, is_down: bool, later: Callable[[float], None], tmp_path: Path
) -> None:
    source = Refusing(MemoryStore())
    store = xzcache.CacheStore(
        source, cache_store=tmp_path, read_only=True, revalidate=False, missing_max_age_seconds=60, namespace="refusing"
    )
    assert await read(store, "a/c/0") is None
    later(3600)
    source.error = error
    assert await read(store, "a/c/0") is None
    assert reach_of(store.namespace).is_suspect is is_down
    reach_of(store.namespace).answered()
