"""Keys that may not be served from a cache directory, because what lies there could not be seen to be true."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


EVERYTHING: Final = "/"
"""The name of all keys."""

_MOST: Final = 4096


class Quarantine:
    """Names of keys in doubt, for one process. Safe for threads.

    A name is a key, or a prefix that ends in a slash and stands for all keys beneath it. Several invalidations may
    hold the same name: each lets go of its own hold.

    Parameters
    ----------
    before : Quarantine, optional
        What another one knows of directories that were taken away.

    Attributes
    ----------
    is_empty : bool
        Whether no key is in doubt: all that a hit asks.
    """

    def __init__(self, before: Quarantine | None = None) -> None:
        self._held: Counter[str] = Counter()
        self._suspect: dict[str, None] = {} if before is None else before._suspect.copy()
        self._away: dict[str, None] = {} if before is None else before._away.copy()
        self._returned: set[str] = set()
        self.is_empty = True
        self._update()

    def _update(self) -> None:
        self.is_empty = not (self._held or self._suspect or self._away)

    def hold(self, names: Iterable[str]) -> None:
        """Have nothing of some keys served."""
        self._held.update(names)
        self._update()

    def free(self, names: Iterable[str]) -> None:
        """Undo one `hold`."""
        for name in names:
            self._held[name] -= 1
            if self._held[name] <= 0:
                del self._held[name]
        self._update()

    def suspect(self, names: Iterable[str]) -> None:
        """Have some keys served only where the index vouches for the very file.

        Their files were not where they had to be when they were to be removed: a directory was taken away, and may
        come back.
        """
        _remember(self._suspect, names)
        self._update()

    def record_returned(self, key: str) -> None:
        """Take note of a key in suspicion of which a file was found that the index does not vouch for."""
        self._returned.add(key)

    @property
    def has_returned(self) -> bool:
        """Whether such keys were found that nobody has seen to."""
        return bool(self._returned)

    def take_returned(self) -> list[str]:
        """Those keys; they are the caller's to see to."""
        found, self._returned = self._returned, set()
        return list(found)

    @property
    def suspected(self) -> list[str]:
        """The names that are in suspicion."""
        return list(self._suspect)

    def record_away(self, names: Iterable[str]) -> None:
        """Remember what was written while another cache directory, which may come back, was not at its path."""
        _remember(self._away, names)
        self._update()

    def written_while_away(self) -> list[str]:
        """The names that `record_away` was given."""
        return list(self._away)

    def forget_away(self) -> None:
        """Forget those names: the directory that was away is true again."""
        self._away.clear()
        self._update()

    def holds(self, key: str) -> bool:
        """Whether nothing of a key may be served."""
        return any(name in self._held for name in _names(key))

    def suspects(self, key: str) -> bool:
        """Whether the index has to vouch for what is served of a key."""
        return any(name in self._suspect for name in _names(key))

    def is_away(self, key: str) -> bool:
        """Whether a key was written while another directory was away."""
        return any(name in self._away for name in _names(key))

    def concerns(self, key: str) -> bool:
        """Whether there is any doubt about a key."""
        return not self.is_empty and (self.holds(key) or self.suspects(key) or self.is_away(key))

    @property
    def held(self) -> list[str]:
        """The names that are held."""
        return list(self._held)

    @property
    def holds_everything(self) -> bool:
        return EVERYTHING in self._held


def _names(key: str) -> Iterator[str]:
    """A key, and all that stands for it."""
    yield key
    yield EVERYTHING
    end = key.find("/")
    while end >= 0:
        yield key[: end + 1]
        end = key.find("/", end + 1)


def _remember(names: dict[str, None], more: Iterable[str]) -> None:
    names.update(dict.fromkeys(more))
    if len(names) > _MOST:
        # too many to tell apart: each source stands for its keys
        sources = dict.fromkeys(name.partition("/")[0] + "/" for name in names)
        names.clear()
        names.update(sources if len(sources) <= _MOST else {EVERYTHING: None})


def beneath(prefix: str) -> str:
    """The name of all keys beneath a prefix."""
    return f"{prefix}/" if prefix else EVERYTHING
