"""The time that xzcache sees, which tests move on instead of waiting."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import xzcache


class Clock:
    """Stands for the module `time` in xzcache, and in the cache of the tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = 0.0
        self.steady = 0.0
        for name, module in list(sys.modules.items()):
            if (name.startswith("xzcache.") or name == "memory_cache") and getattr(module, "time", None) is time:
                monkeypatch.setattr(module, "time", self)

    def move(self, seconds: float, cache: xzcache.CacheStore | Path) -> None:
        """Let time pass, for a store and all that it has cached, or for a directory if there is one."""
        self.steady += seconds
        if isinstance(cache, xzcache.CacheStore):
            root = cache._cache.root if isinstance(cache._cache, xzcache.LockedLocalStore) else None
        else:
            root = cache if cache.exists() else None
        if root is None:
            self.wall += seconds
            return
        # files have their times from the kernel, so it is they that become older
        for path in root.rglob("*"):
            if path.is_file():
                status = path.stat()
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - int(seconds * 1e9)))

    def time(self) -> float:
        return time.time() + self.wall

    def time_ns(self) -> int:
        return time.time_ns() + int(self.wall * 1e9)

    def monotonic(self) -> float:
        return time.monotonic() + self.steady

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
