"""State that is reset in a forked child: locks of other threads, missing threads, pending futures."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class Renewable(Protocol):
    """An object with state that a fork must not carry over."""

    def after_fork_in_child(self) -> None:
        """Reset the state of the parent."""


_all: Final[weakref.WeakSet[Renewable]] = weakref.WeakSet()


def renew_after_fork(what: Renewable) -> None:
    """Call `after_fork_in_child` in every forked child while the object lives."""
    _all.add(what)


def _after_fork_in_child() -> None:
    for what in list(_all):
        what.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
