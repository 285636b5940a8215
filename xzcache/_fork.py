"""What starts anew in a forked child: locks that another thread held, threads that are not there, futures of no one."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class Renewable(Protocol):
    """Something with state that a fork must not carry over."""

    def after_fork_in_child(self) -> None:
        """Drop what belongs to the parent."""


_all: Final[weakref.WeakSet[Renewable]] = weakref.WeakSet()


def renew_after_fork(what: Renewable) -> None:
    """Have `after_fork_in_child` called in every forked child, for as long as the object lives."""
    _all.add(what)


def _after_fork_in_child() -> None:
    for what in list(_all):
        what.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
