"""What the parts of the peers have in common. Nothing here has state of its own, and a `Latest` has no lock."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

import google_crc32c
import numpy as np

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class Latest(Generic[K, V]):
    """A dictionary of the latest items."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        with suppress(KeyError):
            self._items.move_to_end(key)
            return self._items[key]
        return None

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        while len(self._items) > self._most:
            self._items.popitem(last=False)

    def drop(self, key: K) -> None:
        self._items.pop(key, None)


def start(call: Callable[[], Coroutine[Any, Any, T]], loop: asyncio.AbstractEventLoop) -> Any:
    """Run a coroutine on an event loop, to its end even if the waiter gives up."""

    async def run() -> T:
        task = asyncio.ensure_future(call())
        # a late exception is nobody's
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    return asyncio.run_coroutine_threadsafe(run(), loop)


def crc_of(data: memoryview) -> int:
    """The CRC-32C of bytes."""
    return int(google_crc32c.value(np.frombuffer(data, np.uint8))) if len(data) else 0
