"""Locks that are taken in two orders make threads wait for each other until one of them gives up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import zarr
from zarr.storage import MemoryStore

import xzcache

LOOKS = 200
LONG = 4.0
"""Seconds: less than `lock_timeout` has by default."""


def test_who_leaves_a_directory_and_who_joins_it_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store = xzcache.CacheStore(MemoryStore(), cache_store=tmp_path / "cache")
    zarr.create_array(store, name="x", shape=8, chunks=2, dtype="i4")[:] = 1
    took: list[float] = []

    def look() -> None:
        while len(took) < LOOKS:
            began = time.monotonic()
            store.cache_info()
            took.append(time.monotonic() - began)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        # this process leaves the directory; the next look joins it again
        xzcache.cleanup_resources()
    assert max(took) < LONG
