"""What the parts of the peers have in common. Nothing here has state of its own, and a `Latest` has no lock."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

import google_crc32c
import numpy as np

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


class Latest(Generic[K, V]):
    """A dictionary of the latest items, whose sizes (by default 1 each) add up to `most`, or of the last one."""

    def __init__(self, most: int, size: Callable[[V], int] = lambda _: 1) -> None:
        self._most, self._size, self._total = most, size, 0
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        with suppress(KeyError):
            self._items.move_to_end(key)
            return self._items[key]
        return None

    def made(self, key: K, make: Callable[[], V]) -> V:
        """The item of a key, made if there is none."""
        if (found := self.get(key)) is None:
            found = make()
            self.put(key, found)
        return found

    def put(self, key: K, value: V) -> None:
        self.drop(key)
        self._items[key] = value
        self._total += self._size(value)
        while self._total > self._most and len(self._items) > 1:
            self.drop(next(iter(self._items)))

    def drop(self, key: K) -> None:
        with suppress(KeyError):
            self._total -= self._size(self._items.pop(key))


def start(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Future[T]:
    """Run a coroutine on another thread's event loop; raises `RuntimeError` if that is closed."""
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        # Python warns of coroutines that nothing awaits
        coroutine.close()
        raise


def crc_of(data: memoryview) -> int:
    """The CRC-32C of bytes."""
    return int(google_crc32c.value(np.frombuffer(data, np.uint8))) if len(data) else 0
