"""A cache that is the same on every machine, and an end to all that a test leaves open."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest

# Before xzcache is imported, and for every process that a test starts: a machine whose disk is nearly full must not
# turn caching off, and no test may touch the cache of whoever runs it.
_default_cache = tempfile.TemporaryDirectory(prefix="xzcache-tests-", ignore_cleanup_errors=True)
os.environ["XZCACHE_MIN_FREE"] = "0"
os.environ["XZCACHE_DIRECTORY"] = _default_cache.name

from clocks import Clock  # noqa: E402
from sources import neighbours  # noqa: E402

import xzcache  # noqa: E402
from xzcache.directory import _registry as registry  # noqa: E402


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """Close the directories that a test opened, and undo what it configured."""
    yield
    xzcache.config.refresh()
    for directory in list(registry._directories.values()):
        directory.close()


@pytest.fixture(params=["directory", "memory"])
def cache_kind(request: pytest.FixtureRequest) -> str:
    """Both kinds of cache store."""
    return str(request.param)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that xzcache sees, which the test moves on."""
    return Clock(monkeypatch)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most work first, so that no worker is left with a long one while the others are done.

    What takes half a minute where nothing else runs is given more time than the rest.
    """
    work = Counter[object]()
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(400))
        # those of Dask start clusters
        each = 20 if item.get_closest_marker("slow") else 1
        work[item.path] += 5 * each if item.path.parent.name == "dask" else each
    items.sort(key=lambda item: -work[item.path])


def pytest_unconfigure() -> None:
    neighbours.shut_down()
    _default_cache.cleanup()
