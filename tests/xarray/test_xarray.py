"""The engine ``"zcache"`` behaves as ``"zarr"`` does: each test does the same with both, and compares."""

from __future__ import annotations

import importlib
import inspect
import linecache
import os
import pickle
import pydoc
import re
import shutil
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import fsspec
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from zarr.storage import LocalStore, MemoryStore, StorePath

import xzcache

# what workers are sent to do, they need not import the tests for
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ENGINES = ("zarr", "zcache")
FORMATS = ("2-plain", "3-consolidated")

needs_fsspec = [
    pytest.mark.skipif(
        importlib.util.find_spec("fsspec.implementations.asyn_wrapper") is None,
        reason="Zarr can read neither files nor memory through this fsspec",
    )
]

Attempt = Callable[[str], Any]


def said(value: object) -> str:
    """A parameter in words that are the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def dataset(seed: int = 0, year: int = 2000) -> xr.Dataset:
    """One with chunks, scales and missing values, times, text, and a variable that nothing is the matter with."""
    values = np.random.default_rng(seed).integers(0, 100, (6, 4)).astype("f8")
    values[0, 0] = np.nan
    made = xr.Dataset(
        {"t": (("time", "x"), values, {"units": "K"}), "n": ("x", np.arange(4)), "name": ("x", list("abcd"))},
        {"time": pd.date_range(f"{year}-01-01", periods=6, unit="ns"), "x": np.arange(4.0)},
        {"title": f"number {seed}"},
    )
    made["t"].encoding = {"chunks": (2, 3), "dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}
    return made


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets and a tree, in both formats, with consolidated metadata and without; several that make one."""
    folder = tmp_path_factory.mktemp("originals")
    tree = xr.DataTree.from_dict({"/": dataset(2), "/a": dataset(3), "/a/b": dataset(4)})
    with warnings.catch_warnings():
        # of what Zarr thinks of text
        warnings.simplefilter("ignore")
        for name in ("2-consolidated", *FORMATS):
            options: dict[str, Any] = {"zarr_format": int(name[0]), "consolidated": name.endswith("consolidated")}
            dataset().to_zarr(folder / f"{name}.zarr", **options)
            dataset(1).to_zarr(folder / f"{name}.zarr", group="g/h", mode="a", **options)
            tree.to_zarr(folder / f"tree-{name}.zarr", **options)
        for seed in range(3):
            dataset(seed, 2000 + seed).to_zarr(folder / "many" / f"{seed}.zarr")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Path:
    xzcache.config.set(directory=str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, originals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own in which they are, to be opened by relative names."""
    folder = tmp_path / "here"
    folder.mkdir()
    for original in originals.iterdir():
        (folder / original.name).symlink_to(original)
    (folder / "empty.zarr").mkdir()
    monkeypatch.chdir(folder)
    return folder


def opened(read: Attempt, engine: str) -> tuple[Any, list[tuple[str, str]]]:
    """What came of an attempt, an exception perhaps, and what it warned of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = read(engine)
        except Exception as error:
            result = error
    # the others are given once in a process, to whoever comes first
    kinds = (RuntimeWarning, UserWarning, FutureWarning)
    return result, sorted(
        (each.category.__name__, str(each.message)) for each in warned if issubclass(each.category, kinds)
    )


def assert_same(expected: Any, actual: Any) -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_same(expected[name], actual[name])
    elif isinstance(expected, xr.DataTree):
        xr.testing.assert_identical(expected, actual)
        assert_same(expected.to_dict(), actual.to_dict())
    elif isinstance(expected, xr.Dataset | xr.DataArray):
        xr.testing.assert_identical(expected, actual)
        assert actual.encoding == expected.encoding
        for name in [*expected.coords, *getattr(expected, "data_vars", ())]:
            assert actual[name].chunks == expected[name].chunks
            assert repr(actual[name].encoding) == repr(expected[name].encoding)
            assert type(actual[name].variable._data) is type(expected[name].variable._data)
    elif isinstance(expected, Exception):
        if str(expected) == "no files to open":
            # ours names the pattern
            assert (type(actual), str(actual).partition(": ")[0]) == (type(expected), str(expected))
            return
        if message(actual) != message(expected) and actual.__cause__ is not None:
            # ours says more, and is caught by what catches theirs by a built-in type
            assert isinstance(expected, type(actual))
            actual = actual.__cause__
        assert (type(actual), message(actual)) == (type(expected), message(expected))
    else:
        raise AssertionError(f"{expected!r} is nothing that xarray opens")


def message(error: object) -> str:
    # the address of a store in memory is another one each time
    return re.sub(r"memory://\d+", "memory://", str(error))


def check(read: Attempt) -> Any:
    """Both engines open the same, or raise the same, and warn of the same. What the engine ``"zarr"`` made of it."""
    expected, warned = opened(read, "zarr")
    actual, warned_too = opened(read, "zcache")
    if isinstance(actual, Exception) and not isinstance(expected, Exception):
        raise actual
    assert_same(expected, actual)
    assert warned_too == warned
    return expected


def open_zarr(given: Any, engine: str, *args: Any, **kwargs: Any) -> xr.Dataset:
    """`xarray.open_zarr`, which knows no engine ``"zarr"``."""
    return xr.open_zarr(given, *args, **kwargs, **({} if engine == "zarr" else {"engine": engine}))


def open_dataset(given: Any, engine: str, **kwargs: Any) -> xr.Dataset:
    return xr.open_dataset(given, engine=engine, **kwargs)


def open_datatree(given: Any, engine: str, **kwargs: Any) -> xr.DataTree:
    return xr.open_datatree(given, engine=engine, **kwargs)


def open_groups(given: Any, engine: str, **kwargs: Any) -> dict[str, xr.Dataset]:
    return xr.open_groups(given, engine=engine, **kwargs)


def open_mfdataset(given: Any, engine: str, **kwargs: Any) -> xr.Dataset:
    return xr.open_mfdataset(given, engine=engine, **{**NEW_DEFAULTS, **kwargs})


def our_open_mfdataset(given: Any, engine: str, **kwargs: Any) -> xr.Dataset:
    """xarray's with the engine ``"zarr"``, and ours otherwise."""
    if engine == "zarr":
        return open_mfdataset(given, engine, **kwargs)
    return xzcache.open_mfdataset(given, engine=engine, **{**NEW_DEFAULTS, **kwargs})


NEW_DEFAULTS: dict[str, Any] = {"data_vars": "all", "coords": "different", "compat": "no_conflicts", "join": "outer"}
"""xarray is about to change the defaults, and warns where it matters."""

SINGLE = [open_dataset, open_zarr, open_datatree, open_groups]
SEVERAL = [open_mfdataset, our_open_mfdataset]

COMMON: list[dict[str, Any]] = [
    {},
    {"decode_cf": False},
    {"decode_times": False},
    {"mask_and_scale": False},
    {"decode_coords": "all"},
    {"drop_variables": "t"},
    {"drop_variables": ["t", "x"]},
    {"group": "g/h"},
    {"group": "/g/h"},
    {"group": "/"},
    {"group": "nowhere"},
    {"consolidated": True},
    {"consolidated": False},
    {"consolidated": None},
    {"zarr_format": 2},
    {"zarr_format": 3},
    {"chunks": "auto"},
    {"chunks": {}},
    {"chunks": None},
    {"chunks": -1},
    {"chunks": {"time": 3}},
    {"use_zarr_fill_value_as_mask": True},
    {"chunked_array_type": "dask", "chunks": {}},
    {"from_array_kwargs": {"inline_array": True}, "chunks": {}},
    {"nonsense": 1},
]
FOR_DATASETS: list[dict[str, Any]] = [
    *({"mode": mode} for mode in ("r", "r+", "a", "a-", "nonsense")),
    {"cache": False},
    {"inline_array": True, "chunks": {}},
    {"overwrite_encoded_chunks": True, "chunks": {"time": 1}},
    {"mask_and_scale": {"t": False}},
    {"backend_kwargs": {"group": "g/h"}},
    {"backend_kwargs": {"consolidated": False}},
    {"backend_kwargs": {"nonsense": 1}},
]
FOR_TREES: list[dict[str, Any]] = [
    *({name: value} for name in ("decode_cf", "decode_times", "mask_and_scale") for value in (True, False)),
    *({"group": group} for group in ("a", "/a", "/a/b", "/", "nowhere")),
    *({"consolidated": consolidated} for consolidated in (True, False, None)),
    *({"zarr_format": form} for form in (2, 3)),
    *({"mode": mode} for mode in ("r", "r+", "a")),
    {},
    {"drop_variables": "t"},
    {"chunks": {}},
    {"chunks": "auto"},
    {"backend_kwargs": {"consolidated": False}},
    {"nonsense": 1},
]


# -- keywords


@pytest.mark.parametrize("kwargs", [*COMMON, *FOR_DATASETS], ids=said)
def test_keywords_of_open_dataset(kwargs: dict[str, Any]) -> None:
    for name in FORMATS:
        check(lambda engine, name=name: open_dataset(f"{name}.zarr", engine, **kwargs))


@pytest.mark.parametrize("kwargs", COMMON, ids=repr)
def test_keywords_of_open_zarr(kwargs: dict[str, Any]) -> None:
    for name in FORMATS:
        check(lambda engine, name=name: open_zarr(f"{name}.zarr", engine, **kwargs))


@pytest.mark.parametrize("kwargs", FOR_TREES, ids=repr)
# both reach the cache in the same way
@pytest.mark.parametrize("read", [open_datatree, pytest.param(open_groups, marks=pytest.mark.soak)])
def test_keywords_of_trees(read: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    for name in FORMATS:
        check(lambda engine, name=name: read(f"tree-{name}.zarr", engine, **kwargs))


def test_positional_arguments_of_open_zarr() -> None:
    name = "3-consolidated.zarr"
    check(lambda engine: open_zarr(name, engine, "g/h", None, False))
    check(lambda engine: open_zarr(name, engine, "g/h", group="g"))
    check(lambda engine: xr.open_zarr(store=name, **({} if engine == "zarr" else {"engine": engine})))
    check(lambda engine: xr.open_zarr(**({} if engine == "zarr" else {"engine": engine})))


def test_open_dataarray_and_what_loads() -> None:
    name = "3-consolidated.zarr"
    check(lambda engine: xr.open_dataarray(name, engine=engine, drop_variables=["n", "name"]))
    check(lambda engine: xr.load_dataset(name, engine=engine))
    check(lambda engine: xr.load_dataarray(name, engine=engine, drop_variables=["n", "name"]))


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize("options", [{}, {"anon": True}, "nonsense"])
def test_options_for_a_path_are_refused(read: Callable[..., Any], options: Any) -> None:
    for engine in ENGINES:
        with pytest.raises(TypeError, match="storage_options"):
            read("3-consolidated.zarr", engine, storage_options=options)


@pytest.mark.parametrize("read", [open_dataset, open_datatree])
@pytest.mark.parametrize("name", ["3-consolidated.zarr", "empty.zarr", "missing.zarr"])
@pytest.mark.parametrize("mode", ["r", "r+", "a", "a-", "w", "w-", "x"])
def test_modes_leave_the_same_behind(read: Callable[..., Any], mode: str, name: str) -> None:
    left: list[dict[Path, Any]] = []

    def attempt(engine: str) -> Any:
        shutil.rmtree("copy", ignore_errors=True)
        if os.path.exists(name):
            shutil.copytree(name, "copy")
        try:
            return read("copy", engine, mode=mode)
        finally:
            left.append(
                {path: path.is_file() and path.read_bytes() for path in [Path("copy"), *Path("copy").rglob("*")]}
            )
            left[-1][Path("copy")] = Path("copy").exists()

    check(attempt)
    assert left[0] == left[1]


# -- what there is to open


def memory() -> MemoryStore:
    store = MemoryStore()
    dataset().to_zarr(store, zarr_format=2)
    return store


def in_memory(name: str = "x.zarr") -> str:
    """The URL of a dataset that fsspec has in memory."""
    fsspec.filesystem("memory").store.clear()
    dataset().to_zarr(f"memory://{name}", zarr_format=2)
    return f"memory://{name}"


def as_upath(name: str) -> Any:
    return pytest.importorskip("upath").UPath(name)


KINDS: dict[str, Callable[[], Any]] = {
    "relative": lambda: "2-consolidated.zarr",
    "absolute": lambda: os.path.abspath("2-consolidated.zarr"),
    "slash": lambda: "2-consolidated.zarr/",
    "file": lambda: f"file://{os.path.abspath('2-consolidated.zarr')}",
    "Path": lambda: Path("2-consolidated.zarr"),
    "UPath": lambda: as_upath("2-consolidated.zarr"),
    "LocalStore": lambda: LocalStore("2-consolidated.zarr"),
    "LocalStore-read-only": lambda: LocalStore("2-consolidated.zarr", read_only=True),
    "StorePath": lambda: StorePath(LocalStore("2-consolidated.zarr"), "g/h"),
    "StorePath-root": lambda: StorePath(LocalStore("2-consolidated.zarr"), ""),
    "CacheStore": lambda: xzcache.CacheStore("2-consolidated.zarr"),
    "MemoryStore": memory,
    "dict": lambda: memory()._store_dict,
    "FSMap": lambda: fsspec.get_mapper(in_memory()),
    "FSMap-of-files": lambda: fsspec.get_mapper(os.path.abspath("2-consolidated.zarr")),
    "URL": in_memory,
    "chain": lambda: f"simplecache::{in_memory()}",
    "local": lambda: f"local://{os.path.abspath('2-consolidated.zarr')}",
    "UPath-of-a-URL": lambda: as_upath(in_memory()),
}
THROUGH_FSSPEC = ("FSMap", "FSMap-of-files", "URL", "chain", "local", "UPath-of-a-URL", "file")


def marked(kinds: dict[str, Any]) -> list[Any]:
    return [pytest.param(kind, marks=needs_fsspec * (kind in THROUGH_FSSPEC)) for kind in kinds]


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_kinds_of_places(kind: str, read: Callable[..., Any]) -> None:
    place = KINDS[kind]()
    assert check(lambda engine: read(place, engine)) is not None


def test_what_is_open_already() -> None:
    """`store=` is what xarray's engine calls a dataset that is open: there is nothing to put a cache before."""
    store = xr.backends.ZarrStore.open_group("2-consolidated.zarr", mode="r")
    check(lambda engine: open_dataset("anything", engine, store=store))
    check(lambda engine: open_dataset("anything", engine, backend_kwargs={"store": store}))


@needs_fsspec[0]
@pytest.mark.parametrize("read", SINGLE)
def test_options_for_a_url_are_used(read: Callable[..., Any], tmp_path: Path) -> None:
    url = f"simplecache::{in_memory()}"
    for engine in ENGINES:
        options = {"simplecache": {"cache_storage": str(tmp_path / engine)}}
        check(lambda engine, options=options: read(url, engine, storage_options=options))
        assert list((tmp_path / engine).iterdir())


MISSING: dict[str, Callable[[], Any]] = {
    "relative": lambda: "missing.zarr",
    "absolute": lambda: os.path.abspath("missing.zarr"),
    "Path": lambda: Path("missing.zarr"),
    "pattern": lambda: "many/*.zarr",
    "empty": lambda: "empty.zarr",
    "empty-absolute": lambda: os.path.abspath("empty.zarr"),
    "empty-Path": lambda: Path("empty.zarr"),
    "LocalStore": lambda: LocalStore("missing.zarr"),
    "LocalStore-read-only": lambda: LocalStore("missing.zarr", read_only=True),
    "MemoryStore": MemoryStore,
    "dict": dict,
    "URL": lambda: "memory://missing.zarr",
}


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize("kind", marked(MISSING))
def test_what_is_missing(kind: str, read: Callable[..., Any]) -> None:
    """The same exception, and nothing is made."""
    before = sorted(Path().rglob("*"))
    assert isinstance(check(lambda engine: read(MISSING[kind](), engine)), FileNotFoundError)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize(
    "place",
    [
        lambda: StorePath(LocalStore("2-consolidated.zarr"), "missing"),
        # read through fsspec by older Zarr
        pytest.param(lambda: f"file://{os.path.abspath('missing.zarr')}", marks=needs_fsspec),
    ],
    ids=["StorePath", "file"],
)
def test_what_is_missing_in_other_words(place: Callable[[], Any], read: Callable[..., Any]) -> None:
    before = sorted(Path().rglob("*"))
    for engine in ENGINES:
        with pytest.raises(FileNotFoundError, match="missing"):
            read(place(), engine)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize("given", [3, b"2-consolidated.zarr", ["2-consolidated.zarr"], object()], ids=said)
def test_what_is_no_place(given: Any, read: Callable[..., Any]) -> None:
    for engine in ENGINES:
        with pytest.raises(TypeError):
            read(given, engine)


# -- what was opened


@pytest.mark.parametrize("read", SINGLE)
def test_it_was_read_through_the_cache(read: Callable[..., Any]) -> None:
    shutil.copytree("2-consolidated.zarr", "gone.zarr")
    expected = loaded(read("gone.zarr", "zarr"))
    loaded(read("gone.zarr", "zcache"))
    shutil.rmtree("gone.zarr")
    assert_same(expected, loaded(read("gone.zarr", "zcache", revalidate=False)))


def loaded(made: Any) -> Any:
    return {name: each.load() for name, each in made.items()} if isinstance(made, dict) else made.load()


@pytest.mark.parametrize("read", SINGLE)
def test_settings_of_the_cache_are_keywords(read: Callable[..., Any], tmp_path: Path, cache: Path) -> None:
    settings: dict[str, Any] = {"cache_store": str(tmp_path / "other"), "namespace": "era5", "max_size": "1 MB"}
    actual = read("2-consolidated.zarr", "zcache", **settings)
    assert_same(read("2-consolidated.zarr", "zarr"), actual)
    assert (tmp_path / "other" / "era5" / ".zmetadata").exists()
    assert not cache.exists()
    assert xzcache.CacheStore(MemoryStore(), cache_store=tmp_path / "other").max_size == 1_000_000


@pytest.mark.parametrize("read", SINGLE)
@pytest.mark.parametrize(
    "setting", [{"max_size": "nonsense"}, {"revalidate": "nonsense"}, {"policy": "nonsense"}, {"namespace": "a/b"}]
)
def test_a_setting_that_makes_no_sense(read: Callable[..., Any], setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        read("2-consolidated.zarr", "zcache", **setting)


def test_a_store_keeps_its_settings_unless_there_are_others(tmp_path: Path, cache: Path) -> None:
    store = xzcache.CacheStore("2-consolidated.zarr", cache_store=tmp_path / "its-own")
    xr.open_dataset(store, engine="zcache").load()
    assert store.cache_info()["cached_keys"]
    assert not cache.exists()
    xr.open_dataset(store, engine="zcache", cache_store=tmp_path / "another").load()
    assert (tmp_path / "another").exists()


def test_copies() -> None:
    for read in (open_dataset, open_zarr):
        expected = read("2-consolidated.zarr", "zarr")
        made = read("2-consolidated.zarr", "zcache")
        for copy in (pickle.loads(pickle.dumps(made)), made.copy(deep=True), dask.persist(made)[0]):
            xr.testing.assert_identical(copy, expected)


def test_names_of_chunks_say_what_is_read_and_not_through_what() -> None:
    def names(made: xr.Dataset) -> set[str]:
        return {variable.data.name for variable in made.data_vars.values()}

    made = xr.open_zarr("2-consolidated.zarr", engine="zcache")
    assert names(made) == names(xr.open_zarr("2-consolidated.zarr", engine="zcache"))
    assert names(made) == names(xr.open_zarr(xzcache.CacheStore("2-consolidated.zarr")))
    assert names(made).isdisjoint(names(xr.open_zarr("3-consolidated.zarr", engine="zcache")))


@pytest.mark.parametrize("read", SINGLE)
def test_what_is_closed(read: Callable[..., Any]) -> None:
    def attempt(engine: str) -> Any:
        made = read("2-consolidated.zarr", engine)
        for each in made.values() if isinstance(made, dict) else [made]:
            each.close()
        return made

    check(attempt)


def test_a_tree_written_through_a_store() -> None:
    tree = xr.DataTree.from_dict({"/": dataset(2), "/a": dataset(3)})
    store = xzcache.CacheStore("written.zarr")
    tree.to_zarr(store, zarr_format=2)
    xr.testing.assert_identical(xr.open_datatree("written.zarr", engine="zarr"), xr.open_datatree(store, engine="zarr"))
    check(lambda engine: open_datatree("written.zarr", engine))


@pytest.mark.parametrize("read", SINGLE)
def test_a_warning_names_whoever_opens(read: Callable[..., Any]) -> None:
    for engine in ENGINES:
        with pytest.warns(RuntimeWarning, match="Failed to open Zarr store with consolidated metadata") as warned:
            read("2-plain.zarr", engine)
        assert {each.filename for each in warned} == {__file__}


@pytest.mark.parametrize("read", SINGLE)
def test_a_traceback_shows_the_lines_that_ran(read: Callable[..., Any]) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        read("none.zarr", "zcache")
    ran = [frame.f_code for frame, _ in traceback.walk_tb(raised.tb)]
    assert any(code.co_name.startswith("open") and code.co_filename.endswith("_engine.py") for code in ran)
    for code in ran:
        first = linecache.getline(code.co_filename, code.co_firstlineno).strip()
        assert code.co_name == "<lambda>" or first.startswith(("@", f"def {code.co_name}(")), (code, first)
        assert code.co_name != "<lambda>" or "lambda" in first, (code, first)


# -- several at once


def source_of(each: xr.Dataset) -> xr.Dataset:
    return each.assign_attrs(source=each.encoding["source"])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"parallel": True, "combine_attrs": "drop_conflicts"},
        {"chunks": {}},
        {"chunks": -1},
        {"chunks": "auto"},
        {"combine": "nested", "concat_dim": "time"},
        {"decode_cf": False, "combine": "nested", "concat_dim": "time"},
        {"preprocess": source_of},
        {"drop_variables": "t"},
        {"consolidated": False},
        {"group": "nowhere"},
        {"nonsense": 1},
    ],
    ids=said,
)
@pytest.mark.parametrize("read", SEVERAL)
def test_keywords_of_open_mfdataset(read: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    check(lambda engine: read("many/*.zarr", engine, **kwargs))


@pytest.mark.parametrize("read", SEVERAL)
@pytest.mark.parametrize("kind", [str, Path])
def test_whose_attributes_are_taken(read: Callable[..., Any], kind: Callable[[str], Any]) -> None:
    check(lambda engine: read("many/*.zarr", engine, attrs_file=kind(os.path.abspath("many/1.zarr"))))


PATHS = [f"many/{seed}.zarr" for seed in range(3)]

GIVEN: dict[str, Callable[[], Any]] = {
    "pattern": lambda: "many/*.zarr",
    "absolute-pattern": lambda: os.path.abspath("many/?.zarr"),
    "pattern-of-nothing": lambda: "many/*.nothing",
    "one": lambda: "many/1.zarr",
    "one-Path": lambda: Path("many/1.zarr"),
    "list": lambda: PATHS,
    "tuple": lambda: tuple(PATHS),
    "generator": lambda: (path for path in PATHS),
    "Paths": lambda: [Path(path) for path in PATHS],
    "stores": lambda: [LocalStore(path) for path in PATHS],
    "CacheStores": lambda: [xzcache.CacheStore(path) for path in PATHS],
    "mixed": lambda: [PATHS[0], Path(PATHS[1]), LocalStore(PATHS[2])],
    "nothing": list,
    "missing": lambda: ["missing.zarr"],
    "missing-absolute": lambda: [os.path.abspath("missing.zarr")],
    "one-missing": lambda: [PATHS[0], "missing.zarr"],
}


# in parallel, each place is opened as it is without
IN_PARALLEL = {"pattern", "stores", "mixed", "nothing", "one-missing"}


@pytest.mark.parametrize(
    ("parallel", "given"),
    [
        *(pytest.param(False, given, id=given) for given in GIVEN),
        *(
            pytest.param(
                *(True, given),
                id=f"parallel-{given}",
                marks=pytest.mark.slow if given in IN_PARALLEL else pytest.mark.soak,
            )
            for given in GIVEN
        ),
    ],
)
@pytest.mark.parametrize("read", SEVERAL)
def test_several_places(read: Callable[..., Any], given: str, parallel: bool) -> None:
    before = sorted(Path().rglob("*"))
    check(lambda engine: read(GIVEN[given](), engine, parallel=parallel))
    assert sorted(Path().rglob("*")) == before


def test_several_dimensions() -> None:
    nested = [[PATHS[0], PATHS[1]], [PATHS[0], PATHS[1]]]
    for read in SEVERAL:
        check(lambda engine, read=read: read(nested, engine, combine="nested", concat_dim=["run", "time"]))


@needs_fsspec[0]
@pytest.mark.parametrize(
    "pattern", ["memory://many/*.zarr", "memory://many/?.zarr", "memory://none/*", "file://{}/many/*.zarr"]
)
def test_patterns_of_urls(pattern: str) -> None:
    """Only ours knows them: xarray refuses them to any engine but its own."""
    fsspec.filesystem("memory").store.clear()
    for seed, path in enumerate(PATHS):
        dataset(seed, 2000 + seed).to_zarr(f"memory://{path}", zarr_format=2)
    pattern = pattern.format(os.getcwd())
    check(lambda engine: our_open_mfdataset(pattern, engine))
    with pytest.raises(ValueError, match="wild-card"):
        open_mfdataset(pattern, "zcache")


# -- in other processes


@contextmanager
def cluster(cache: Path) -> Iterator[Client]:
    """Workers that are processes of their own, and have imported nothing."""
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ.XZCACHE_DIRECTORY": str(cache)}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as made,
        Client(made) as client,
    ):
        yield client


def has_imported(name: str) -> bool:
    return name in sys.modules


def test_on_a_cluster(cache: Path) -> None:
    place, pattern = os.path.abspath("2-consolidated.zarr"), os.path.abspath("many/*.zarr")
    one, several = open_zarr(place, "zarr").load(), open_mfdataset(pattern, "zarr").load()
    with cluster(cache) as client:
        assert set(client.run(has_imported, "xzcache").values()) == {False}
        # the engine travels with the function
        made = client.compute(dask.delayed(xr.open_zarr)(place, engine="zcache")).result()
        assert True in client.run(has_imported, "xzcache").values()
        xr.testing.assert_identical(made.compute(), one)
        for read in SEVERAL:
            for parallel in (False, True):
                xr.testing.assert_identical(read(pattern, "zcache", parallel=parallel).compute(), several)
        xr.testing.assert_identical(
            xr.open_datatree(place, engine="zcache", chunks={})["g/h"].to_dataset().compute(),
            open_zarr(place, "zarr", group="g/h").load(),
        )
    assert list(cache.rglob(".zmetadata"))


def run(script: str, *words: str) -> str:
    """What a script prints that a new process runs."""
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import xarray, xzcache",
        "import xzcache, xarray",
        "import xzcache.xarray, xarray",
        "import xzcache; import importlib; importlib.reload(xzcache); import xarray; importlib.reload(xzcache)",
    ],
)
def test_whichever_is_imported_first(imports: str) -> None:
    said = run(
        f"""
        {imports}
        import sys, xarray.backends.zarr as home
        opened = xarray.open_zarr(sys.argv[1], engine="zcache")
        assert opened.identical(xarray.open_zarr(sys.argv[1]))
        assert home.open_zarr is xarray.open_zarr
        print(opened.title)
        """,
        "2-consolidated.zarr",
    )
    assert said == "number 0"


def test_the_engine_needs_no_import() -> None:
    said = run(
        """
        import sys, xarray
        print(xarray.open_dataset(sys.argv[1], engine="zcache").title)
        """,
        "2-consolidated.zarr",
    )
    assert said == "number 0"


def test_xarray_is_imported_by_those_who_use_it() -> None:
    assert run("import sys, xzcache; print('xarray' in sys.modules)") == "False"


# -- xarray.open_zarr


def test_a_second_time_changes_nothing() -> None:
    before = xr.open_zarr
    importlib.reload(xzcache)
    assert xr.open_zarr is before
    check(lambda engine: open_zarr("2-consolidated.zarr", engine))


def test_it_looks_as_before_but_for_the_engine() -> None:
    ours, theirs = xr.open_zarr, inspect.unwrap(xr.open_zarr)
    parameters = dict(inspect.signature(ours).parameters)
    engine = parameters.pop("engine")
    assert (engine.kind, engine.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert list(parameters.values()) == list(inspect.signature(theirs).parameters.values())
    assert ours.__name__ == theirs.__name__
    assert inspect.getsource(ours) == inspect.getsource(theirs)
    text, before = (inspect.cleandoc(each.__doc__ or "").splitlines() for each in (ours, theirs))
    added = [line for line in text if line not in before]
    assert [line for line in text if line not in added] == before
    assert added[0].startswith("engine :")
    assert added[0] in pydoc.render_doc(ours)


def test_no_engine_is_as_before() -> None:
    expected = inspect.unwrap(xr.open_zarr)("2-consolidated.zarr")
    assert_same(expected, xr.open_zarr("2-consolidated.zarr"))
    assert_same(expected, xr.open_zarr("2-consolidated.zarr", engine=None))


def test_the_engine_by_its_class() -> None:
    kind = type(xr.backends.list_engines()["zcache"])
    expected = xr.open_zarr("2-consolidated.zarr")
    assert_same(expected, xr.open_zarr("2-consolidated.zarr", engine=kind))
    assert_same(expected, xr.open_dataset("2-consolidated.zarr", engine=kind, chunks={}))


@pytest.mark.parametrize("engine", ["netcdf4", "zarr", "nonsense", 3])
def test_other_engines_of_open_zarr(engine: Any) -> None:
    with pytest.raises(TypeError, match=f'no engine but "zcache", not {engine!r}; xr.open_dataset has the') as raised:
        xr.open_zarr("2-consolidated.zarr", engine=engine)
    expected, _ = opened(lambda _: inspect.unwrap(xr.open_zarr)("2-consolidated.zarr", engine=engine), "")
    assert_same(expected, raised.value.__cause__)


@pytest.mark.parametrize("engine", ["zcach", "xcache", "zchache", "Zcache"])
def test_a_misspelled_engine_of_open_zarr(engine: str) -> None:
    with pytest.raises(TypeError, match=f"not '{engine}', did you mean zcache?"):
        xr.open_zarr("2-consolidated.zarr", engine=engine)


@pytest.mark.parametrize("read", [xzcache.open_zarr, xzcache.open_mfdataset])
def test_ours_know_one_engine(read: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="engine='zarr'"):
        read("2-consolidated.zarr", engine="zarr")


def test_ours_is_the_same() -> None:
    assert_same(xr.open_zarr("2-consolidated.zarr"), xzcache.open_zarr("2-consolidated.zarr"))
    assert_same(xr.open_zarr("2-consolidated.zarr"), xzcache.open_zarr("2-consolidated.zarr", engine="zcache"))


def test_unknown_keywords_of_open_zarr() -> None:
    check(lambda engine: open_zarr("2-consolidated.zarr", engine, nonsense=1, more=2))
    # without the engine, a setting of the cache is nothing that is known
    with pytest.raises(TypeError, match="max_size"):
        xr.open_zarr("2-consolidated.zarr", max_size="1 GB")


@pytest.mark.parametrize(
    "read",
    [
        xzcache.open_zarr,
        partial(xr.open_zarr, engine="zcache"),
        xzcache.open_mfdataset,
        partial(xr.open_dataset, engine="zcache"),
        partial(xr.open_datatree, engine="zcache"),
        partial(xr.open_groups, engine="zcache"),
    ],
)
def test_a_misspelled_keyword_of_open_zarr(read: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'maxsize', did you mean max_size\?$"):
        read("2-consolidated.zarr", maxsize="1 GB", nonsense=1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'decode_time', did you mean decode_times\?$"):
        read("2-consolidated.zarr", decode_time=False)


def test_it_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(xr.open_zarr)) is xr.open_zarr
    said = run(
        """
        import pickle, sys
        open_zarr = pickle.loads(bytes.fromhex(sys.argv[1]))
        print(open_zarr(sys.argv[2], engine="zcache").title)
        """,
        pickle.dumps(xr.open_zarr).hex(),
        "2-consolidated.zarr",
    )
    assert said == "number 0"


# -- the engine as such


def test_xarray_lists_it() -> None:
    engine = xr.backends.list_engines()["zcache"]
    assert getattr(engine, "supports_groups", True)
    assert "xzcache" in engine.description


@pytest.mark.parametrize("kind", marked(KINDS))
def test_it_is_never_guessed(kind: str) -> None:
    assert not xr.backends.list_engines()["zcache"].guess_can_open(KINDS[kind]())


def test_the_name_of_the_package_is_accepted() -> None:
    expected = xzcache.open_zarr("2-consolidated.zarr")
    assert_same(expected, xr.open_zarr("2-consolidated.zarr", engine="xzcache"))
    assert_same(expected, xzcache.open_zarr("2-consolidated.zarr", engine="xzcache"))
    assert_same(expected, xr.open_dataset("2-consolidated.zarr", engine="xzcache", chunks={}))


def test_it_knows_all_that_the_engine_zarr_knows() -> None:
    engines = xr.backends.list_engines()
    known = set(engines["zarr"].open_dataset_parameters or ())
    assert known
    assert known <= set(engines["zcache"].open_dataset_parameters or ())


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "x.nc").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"x\.nc' is a NetCDF or HDF5 file, not a Zarr store"):
        xr.open_zarr(tmp_path / "x.nc", engine="zcache", cache_store=tmp_path / "cache")
