"""xarray's own tests of Zarr, which come with xarray, through the engine and through the store.

What passes with ``engine="zarr"`` has to pass here. In the classes ``TestEngine...``, all that opens something opens it
with the engine ``"zcache"``, and what writes writes past the cache. In the classes ``TestStore...``, what is written to
and read from is a `CacheStore`, and the engine is xarray's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from packaging.version import Version
from xarray.backends.zarr import ZarrBackendEntrypoint
from zarr.storage import StorePath

import xzcache

with warnings.catch_warnings(), xr.set_options(warn_for_unclosed_files=False):
    # they import whatever is installed, and set that option for all that runs afterwards
    warnings.simplefilter("ignore")
    from xarray.tests import conftest as fixtures
    from xarray.tests import has_scipy_or_netCDF4
    from xarray.tests import test_backends as arrays
    from xarray.tests import test_backends_datatree as trees

# The fixtures that the tests ask for by name. Older versions of xarray lack some, and the tests that ask for them.
for module, names in {
    fixtures: ("create_test_datatree", "simple_datatree", "time_unit", "use_dask"),
    arrays: ("default_zarr_format", "fsspec_memory_zarr_stores", "tmp_store"),
    trees: ("unaligned_datatree_zarr_factory",),
}.items():
    globals().update({name: vars(module)[name] for name in names if name in vars(module)})

# Which warnings its tests may raise xarray decides for itself, and differently for each version of its own and of Zarr.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

OPENERS = [
    *("open_dataset", "open_dataarray", "open_datatree", "open_groups", "open_zarr"),
    *("load_dataset", "load_dataarray", "load_datatree"),
]

BROKEN = {
    "test_concurrent_load_multiple_objects": "threads add to the count of calls without a lock, and lose one at times"
}
"""Tests that fail with the engine ``"zarr"`` as well, and why."""
if Version(xr.__version__) < Version("2025.7"):
    BROKEN |= {
        "test_non_existent_store": "knows another wording of Zarr's error",
        "test_append_string_length_mismatch_works": "was written before Zarr 3.1 had strings of a fixed length",
        "test_write_empty": "was written before Zarr 3.1.2 wrote the empty chunks that it is told to write",
        "test_to_zarr_zip_store": "opens a store that Zarr 3.1 cannot open for reading",
    }

REWRITING = (
    "test_append_with_append_dim_no_overwrite",
    "test_dataset_to_zarr_align_chunks_true",
    "test_write_region",
)
"""Tests that read chunks, write them anew past the cache, and read them again under the metadata that they had."""


@pytest.fixture(autouse=True)
def skip_if_param(request: pytest.FixtureRequest) -> None:
    """What xarray's marker of this name means: in xarray, a file that is in no wheel sees to that."""
    if (why := BROKEN.get(request.node.originalname)) is not None:
        pytest.skip(f"fails without the cache too: {why}")
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    for mark in request.node.iter_markers("skip_if_param"):
        wanted = dict(mark.kwargs)
        reason, condition = wanted.pop("reason"), wanted.pop("condition", True)
        if condition and all(given.get(name) == value for name, value in wanted.items()):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test. What it writes by a relative path, it writes to its own directory too."""
    monkeypatch.chdir(tmp_path)
    xzcache.config.set(directory=str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def only_through_the_cache(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads Zarr for xarray is given a `CacheStore`, and there is something in its cache when it has read."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guard(self: Any, *args: Any, **kwargs: Any) -> Any:
            opened = method(self, *args, **kwargs)
            # xarray passes it by position and by name
            given = args[0] if args else kwargs["filename_or_obj"]
            store = given.store if isinstance(given, StorePath) else given
            assert isinstance(store, xzcache.CacheStore), f"{store!r} was read, and not the cache"
            assert store.cache_info()["cached_keys"], f"{store!r} was read past the cache"
            return opened

        return guard

    for name in ("open_dataset", "open_groups_as_dict"):
        monkeypatch.setattr(ZarrBackendEntrypoint, name, guarded(getattr(ZarrBackendEntrypoint, name)))


@pytest.fixture
def the_engine(own_cache: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """All that opens Zarr does it with the engine ``"zcache"``."""
    if request.node.originalname in REWRITING:
        xzcache.config.set(revalidate=True)

    def directed(opener: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(opener)
        def through_the_engine(given: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("engine") is None and str(given).endswith(".nc"):
                return opener(given, *args, **kwargs)
            assert kwargs.pop("engine", "zarr") in ("zarr", "zcache")
            return opener(given, *args, engine="zcache", **kwargs)

        return through_the_engine

    for name in OPENERS:
        if name in vars(xr):
            opener = directed(vars(xr)[name])
            for module in (xr, arrays, trees):
                if name in vars(module):
                    monkeypatch.setattr(module, name, opener)
    # which URLs a pattern stands for xarray finds out with its own engine only
    monkeypatch.setattr(arrays, "open_mfdataset", directed(xzcache.open_mfdataset))


def part_of(suite: type, *words: str) -> type:
    """A class of xarray's, with those of its tests that it does not inherit, or whose names contain a word."""

    def belongs(test: str) -> bool:
        return test in vars(suite) or any(word in test for word in words)

    return type(suite.__name__, (suite,), {n: None for n in dir(suite) if n.startswith("test_") and not belongs(n)})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run with one format of Zarr what is the same with both: what asks for one, and what only writes and reads.

    The latter try how xarray encodes values, of which a cache sees the bytes. That the documents and chunks of both
    formats are cached as they should be, the tests show that xarray has for Zarr alone. Writes through the store take
    the same way with both formats. What only writes and reads does so through the store, and with the engine in a soak.
    """
    if "default_zarr_format" not in metafunc.fixturenames or metafunc.cls is None:
        return
    test = metafunc.function.__name__
    suite = next(kind for kind in metafunc.cls.__mro__ if test in vars(kind)).__name__
    only_writes_and_reads = suite in ("DatasetIOBase", "CFEncodedBase")
    is_of_the_store = issubclass(metafunc.cls, ThroughTheStore)
    if suite == "TestZarrDictStore" or only_writes_and_reads or is_of_the_store or test == "test_write_region":
        marks = [pytest.mark.soak] if only_writes_and_reads and not is_of_the_store else []
        given = [pytest.param(3, marks=marks)]
        metafunc.definition.add_marker(pytest.mark.parametrize("default_zarr_format", given, indirect=True))


# -- the engine


@pytest.mark.usefixtures("the_engine")
class ThroughTheEngine:
    engine = "zcache"


class TestEngineDirectory(ThroughTheEngine, arrays.TestZarrDirectoryStore):
    pass


class TestEngineWriteEmpty(ThroughTheEngine, part_of(arrays.TestZarrWriteEmpty)):
    pass


class TestEngineMemory(ThroughTheEngine, part_of(arrays.TestZarrDictStore, "roundtrip_test_data", "consolidated")):
    pass


class TestEngineInstrumented(ThroughTheEngine, arrays.TestInstrumentedZarrStore):
    pass


class TestEngineRegionAuto(ThroughTheEngine, arrays.TestZarrRegionAuto):
    pass


class TestEngineDataArray(ThroughTheEngine, arrays.TestDataArrayToZarr):
    pass


class TestEngineNCZarr(ThroughTheEngine, arrays.TestNCZarr):
    pass


class TestEngineDatatree(ThroughTheEngine, trees.TestZarrDatatreeIO):
    pass


FUNCTIONS = [
    "test_open_dataset_chunking_zarr",
    "test_raises_key_error_on_invalid_zarr_store",
    "test_roundtrip_stringdtype_zarr_v3",
    "test_stringdtype_with_na_object_uses_the_compatibility_path",
    "test_zarr_closing_internal_zip_store",
    "test_zarr_create_default_indexes",
]
if has_scipy_or_netCDF4:
    # what they write to Zarr comes from a netCDF file
    FUNCTIONS += ["test_open_fsspec", "test_open_mfdataset_fsspec"]

TestEngineFunctions = type(
    "TestEngineFunctions",
    (ThroughTheEngine,),
    {name: staticmethod(vars(arrays)[name]) for name in FUNCTIONS if name in vars(arrays)},
)


# -- the store


def through_the_cache(target: Any) -> xzcache.CacheStore:
    return target if isinstance(target, xzcache.CacheStore) else xzcache.CacheStore(target)


class ThroughTheStore:
    # these make paths of their own
    test_dataset_to_zarr_align_chunks_true = None
    test_default_zarr_fill_value = None
    test_non_existent_store = None
    test_write_empty = None

    @contextlib.contextmanager
    def create_zarr_target(self) -> Iterator[xzcache.CacheStore]:
        with super().create_zarr_target() as target:  # type: ignore[misc]
            yield through_the_cache(target)


class TestStoreDirectory(ThroughTheStore, arrays.TestZarrDirectoryStore):
    # some tests here make paths of their own too, but write and read them with these

    def save(self, dataset: Any, store_target: Any, **kwargs: Any) -> Any:
        return super().save(dataset, through_the_cache(store_target), **kwargs)

    def open(self, path: Any, **kwargs: Any) -> Any:
        return super().open(through_the_cache(path), **kwargs)


class TestStoreWriteEmpty(ThroughTheStore, part_of(arrays.TestZarrWriteEmpty)):
    pass


class TestStoreMemory(ThroughTheStore, part_of(arrays.TestZarrDictStore, "roundtrip_test_data", "consolidated")):
    pass


class TestStoreRegionAuto(ThroughTheStore, arrays.TestZarrRegionAuto):
    pass


class TestStoreInstrumented(ThroughTheStore, arrays.TestInstrumentedZarrStore):
    def make_patches(self, store: xzcache.CacheStore) -> Any:
        # they count what reaches the source
        return super().make_patches(store._store)


# -- what older versions of xarray have not

if hasattr(arrays, "TestZarrRectilinearChunksRead"):

    class TestEngineRectilinear(ThroughTheEngine, arrays.TestZarrRectilinearChunksRead):
        pass


if hasattr(arrays, "TestZarrNoConsolidatedMetadataSupport"):
    NoConsolidated = part_of(arrays.TestZarrNoConsolidatedMetadataSupport, "roundtrip_test_data", "consolidated")

    class TestEngineNoConsolidated(ThroughTheEngine, NoConsolidated):
        pass

    class TestStoreNoConsolidated(ThroughTheStore, NoConsolidated):
        pass
