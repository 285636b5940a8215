"""xarray's own tests of Zarr, as they come with xarray, through the engine and through the store.

What passes with ``engine="zarr"`` has to pass here. Where a test of xarray's opens something, it is directed at the
engine ``"zcache"``; or else the store that it writes to and reads from is a `CacheStore`.
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

import xzcache

with warnings.catch_warnings():
    # the modules import all that may be installed
    warnings.simplefilter("ignore")
    from xarray.tests import test_backends as backends
    from xarray.tests import test_backends_datatree as datatree
    from xarray.tests.conftest import create_test_datatree, simple_datatree, time_unit  # noqa: F401
    from xarray.tests.test_backends import default_zarr_format, tmp_store  # noqa: F401
    from xarray.tests.test_backends_datatree import unaligned_datatree_zarr_factory  # noqa: F401

try:
    from xarray.tests.conftest import use_dask  # noqa: F401
    from xarray.tests.test_backends import fsspec_memory_zarr_stores  # noqa: F401
except ImportError:  # an older suite has no such fixtures, nor tests that want them
    pass

# xarray decides for itself which warnings its tests may raise, and that varies with its version and with Zarr's.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]

OPENERS = ("open_dataset", "open_dataarray", "open_mfdataset", "open_datatree", "open_groups", "open_zarr")
OPENERS += tuple(name.replace("open", "load") for name in OPENERS[:4])


@pytest.fixture(autouse=True)
def skip_if_param(request: pytest.FixtureRequest) -> None:
    """What the marker of this name means to xarray: it is carried out by a file that no wheel has."""
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    for mark in request.node.iter_markers("skip_if_param"):
        wanted = dict(mark.kwargs)
        reason, condition = wanted.pop("reason"), wanted.pop("condition", True)
        if condition and all(given.get(name) == value for name, value in wanted.items()):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; and what it writes by a relative path, it writes to its own directory."""
    monkeypatch.chdir(tmp_path)
    xzcache.config.set(directory=str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache):
    return [p for p in cache.rglob("*") if p.is_file() and ".xzcache" not in p.parts]


@pytest.fixture
def the_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that opens Zarr does it with the engine, and what was opened has left something in the cache."""

    def directed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("engine", "zarr") == "zarr":
                kwargs["engine"] = "zcache"
            opened = function(*args, **kwargs)
            assert entries(cache)
            return opened

        return call

    for module in (xr, backends, datatree):
        for name in OPENERS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, directed(getattr(xr, name)))


@pytest.mark.usefixtures("the_engine")
class ThroughTheEngine:
    pass


class ThroughTheStore:
    @contextlib.contextmanager
    def create_zarr_target(self) -> Iterator[xzcache.CacheStore]:
        with super().create_zarr_target() as target:
            store = xzcache.CacheStore(target)
            yield store
            used.append(store.cache_stats()["total_requests"])


used = []

for n, v in list(vars(backends).items()) + list(vars(datatree).items()):
    if isinstance(v, type) and n.startswith("Test") and "Zarr" in n and not n == "TestNCZar":
        globals()["TestEngine" + n[4:]] = type("TestEngine" + n[4:], (ThroughTheEngine, v), {"engine": "zcache"})
        if hasattr(v, "create_zarr_target"):
            globals()["TestStore" + n[4:]] = type("TestStore" + n[4:], (ThroughTheStore, v), {})


class TestEngineFunctions(ThroughTheEngine):
    for n, v in list(vars(backends).items()):
        if n.startswith("test_") and ("zarr" in n or "fsspec" in n):
            locals()[n] = staticmethod(v)
