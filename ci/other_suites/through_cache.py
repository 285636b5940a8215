"""A pytest plugin for the tests of other projects: wraps each store that Zarr opens, writes down how tests end.

It is loaded by name (``-p through_cache``) into suites that know nothing of it. Without ``--wrapping`` nothing is
wrapped, so that the run with a cache and the run without one differ in the wrapping alone.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, StorePath

import xzcache


def lru(store: Store, directory: str) -> Store:
    """The store, read and written through a cache whose bound is small enough for entries to leave."""
    return _cached(store, directory, "lru")


def adaptive(store: Store, directory: str) -> Store:
    """The same, where other entries leave first."""
    return _cached(store, directory, "adaptive")


def locked(store: Store, directory: str) -> Store:
    """A directory as the store that caches are kept in; other stores as they are."""
    if type(store) is not LocalStore:
        return store
    return xzcache.LockedLocalStore(store.root, read_only=store.read_only)


def _cached(store: Store, directory: str, policy: Literal["lru", "adaptive"]) -> Store:
    return xzcache.CacheStore(store, cache_store=directory, policy=policy, max_size="500 kB", read_only=store.read_only)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("through_cache", "stores read through a cache")
    group.addoption("--wrapping", metavar="MODULE:FUNCTION", help="what makes one store of another and a directory")
    group.addoption("--cache", metavar="DIRECTORY", help="the directory that all wrapping stores share")
    group.addoption("--pipeline", metavar="NAME", help="the codec pipeline of all arrays")
    group.addoption("--outcomes", metavar="FILE", type=Path, help="where the outcome of each test is written, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # of a plugin that runs tests again, which would hide what is sought
    config.addinivalue_line("markers", "flaky: means nothing here")
    if config.option.pipeline:
        # tests go back to the defaults, and processes that they start need not know the one of xzcache
        zarr.config.defaults[0]["codec_pipeline"]["path"] = config.option.pipeline
        zarr.config.refresh()
    if config.option.wrapping:
        module, _, function = config.option.wrapping.partition(":")
        make = getattr(importlib.import_module(module), function)
        wrap_all(lambda store: make(store, config.option.cache))
    if config.option.outcomes and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.option.outcomes))


def wrap_all(make: Callable[[Store], Store]) -> None:
    """Have each `StorePath` refer to a wrapped store."""
    initialise = StorePath.__init__

    def wrapped(store: Any) -> Any:
        return store if isinstance(store, xzcache.CacheStore) or not isinstance(store, Store) else make(store)

    @functools.wraps(initialise)
    def through(self: StorePath, store: Store, path: str = "") -> None:
        initialise(self, wrapped(store), path)

    StorePath.__init__ = through  # type: ignore[method-assign]


class Outcomes:
    """Writes down how each test ended, and for a failure its message."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ended = self._ends.get(report.nodeid)
        expected_to_fail = hasattr(report, "wasxfail")
        if ended is not None and ended[0] == "failed":
            return
        if report.failed:
            self._ends[report.nodeid] = "failed", message_of(report)
        elif report.skipped:
            self._ends[report.nodeid] = "failed as expected" if expected_to_fail else "skipped", message_of(report)
        elif report.when == "call":
            self._ends[report.nodeid] = "passed against expectation" if expected_to_fail else "passed", ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._ends[report.nodeid] = "failed", message_of(report)

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._ends))


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """What failed, in a line or a few."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return f"{crash.message} ({crash.path}:{crash.lineno})"
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    return str(report.longrepr).strip().rpartition("\n")[-1]
