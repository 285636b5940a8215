"""Remembering what was found out about an object for as long as it lives, and no longer."""

from __future__ import annotations

import threading
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from xzcache._fork import renew_after_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

T = TypeVar("T")


class Remembered(Generic[T]):
    """What was found out about stores, by object: a store keeps what was said of it first, for its lifetime.

    A store whose attributes change as it is used stays the same source; and two stores over the same dictionary are
    one source for as long as any of them lives.
    """

    def __init__(self) -> None:
        self.after_fork_in_child()
        renew_after_fork(self)
        self._known: dict[int, tuple[weakref.ref[Any], T]] = {}
        self._shared: dict[int, tuple[set[int], str]] = {}

    def after_fork_in_child(self) -> None:
        """Let go of a lock that a thread of the parent may hold."""
        self._lock = threading.RLock()

    def of(self, store: Store, identify: Callable[[Store], T]) -> T:
        number = id(store)
        with self._lock:
            known = self._known.get(number)
            if known is not None and known[0]() is store:
                return known[1]
            identity = identify(store)
            self._known[number] = (weakref.ref(store, lambda _: self._known.pop(number, None)), identity)
            return identity

    def lifetime(self, store: Store, contents: object) -> str:
        """A token for what a store holds, for as long as a store that we know of holds it."""
        number, holder = id(contents), id(store)
        with self._lock:
            holders, token = self._shared.setdefault(number, (set(), uuid.uuid4().hex))
            if holder not in holders:
                holders.add(holder)
                weakref.finalize(store, self._let_go, number, holder)
            return token

    def _let_go(self, number: int, holder: int) -> None:
        # the number may be given to other contents only after the last store has let go of these
        with self._lock:
            holders, _ = self._shared.get(number, (set(), ""))
            holders.discard(holder)
            if not holders:
                self._shared.pop(number, None)
