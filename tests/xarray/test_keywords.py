"""The keywords of `open_zarr` and `open_mfdataset`, as types and in `help`, are those of xarray and the cache."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
import xarray as xr
from xarray.backends.zarr import ZarrBackendEntrypoint

import xzcache
from xzcache.xarray._keywords import CacheKeywords, OpenMfdatasetKeywords, OpenZarrKeywords

VERSION = tuple(int(part) for part in xr.__version__.split(".")[:3] if part.isdecimal())
needs_newest = pytest.mark.skipif(VERSION < (2026, 9), reason="the types are those of the newest xarray")
THEIR_OPEN_ZARR = inspect.unwrap(xr.open_zarr)


def keywords(*functions: Callable[..., Any]) -> set[str]:
    """The parameters of functions that may be given by name, but what they open and with which engine."""
    found = {
        name
        for function in functions
        for name, each in inspect.signature(function).parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    return found - {"self", "store", "paths", "filename_or_obj", "engine", "mode"}


def typed(kind: Any) -> dict[str, str]:
    return {name: each.__forward_arg__ for name, each in kind.__annotations__.items()}


OURS = keywords(xzcache.CacheStore)
PASSED_ON = keywords(xr.open_mfdataset, xr.open_dataset, ZarrBackendEntrypoint.open_dataset)


def test_the_types_of_the_caches_keywords_are_those_of_cache_store() -> None:
    expected = {name: str(inspect.signature(xzcache.CacheStore).parameters[name].annotation) for name in OURS}
    assert typed(CacheKeywords) == {**expected, "pipeline": "bool | Unset"}


@needs_newest
def test_types_know_every_keyword_of_xarray() -> None:
    ours = {*OURS, "pipeline", "engine"}
    assert set(OpenZarrKeywords.__annotations__) == keywords(THEIR_OPEN_ZARR) | ours
    # `store` and `cache_members` are between xarray and its engine
    assert set(OpenMfdatasetKeywords.__annotations__) == (PASSED_ON - {"cache_members"}) | ours


@pytest.mark.parametrize(
    ("ours", "theirs"), [(xzcache.open_zarr, keywords(THEIR_OPEN_ZARR)), (xzcache.open_mfdataset, PASSED_ON)]
)
def test_help_tells_everything(ours: Callable[..., Any], theirs: set[str]) -> None:
    parameters = inspect.signature(ours).parameters
    assert parameters.keys() - {"store", "paths"} == theirs | OURS | {"pipeline", "engine"}
    assert parameters["max_size"].default == inspect.signature(xzcache.CacheStore).parameters["max_size"].default
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS - theirs)
    documented = pydoc.render_doc(ours, renderer=pydoc.plaintext)
    entries = {
        line.split(":")[0].strip() for line in documented.splitlines() if line.startswith("    ") and ":" in line
    }
    assert parameters.keys() - entries <= {"cache_members", "use_zarr_fill_value_as_mask", "zarr_version"}
    assert "Returns" in documented


def test_arguments_by_position_are_xarrays() -> None:
    theirs = list(inspect.signature(THEIR_OPEN_ZARR).parameters.values())
    ours = list(inspect.signature(xzcache.open_zarr).parameters.values())
    by_position = [each.name for each in theirs if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each.name for each in ours if each.kind is each.POSITIONAL_OR_KEYWORD] == by_position


def test_the_plugin_takes_every_setting_but_those_of_one_process() -> None:
    assert keywords(xzcache.CachePlugin) == {*xzcache.config.to_dict(), "affinity", "peers", "remove_on_close"} - {
        "trace"
    }


def test_a_class_shows_its_own_keywords() -> None:
    for kind in (xzcache.CacheStore, xzcache.LockedLocalStore, xzcache.CachePlugin):
        assert "max_size" in inspect.signature(kind).parameters
