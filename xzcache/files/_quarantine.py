"""The quarantine: keys that must not be served because their invalidation is not certain."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


EVERYTHING: Final = "/"
"""The name of all keys."""

_MOST: Final = 4096


class Quarantine:
    """The quarantined keys of one process. Safe for threads.

    A name is a key, or a prefix with a trailing slash for all keys beneath it. Several invalidations may hold the same
    name; each releases its own hold. `before` hands over the names that concern removed directories. A hit checks only
    `is_empty`.
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
        """Quarantine some keys."""
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
        """Serve some keys only after the index has confirmed the file.

        Their files were missing when they were to be removed: a directory was moved away, and may come back.
        """
        _remember(self._suspect, names)
        self._update()

    def record_returned(self, key: str) -> None:
        """Record a suspected key with a file that the index does not confirm."""
        self._returned.add(key)

    @property
    def has_returned(self) -> bool:
        """Whether recorded files of suspected keys are still to be removed."""
        return bool(self._returned)

    def take_returned(self) -> list[str]:
        """Return and clear the keys of `record_returned`, for the caller to invalidate."""
        found, self._returned = self._returned, set()
        return list(found)

    @property
    def suspected(self) -> list[str]:
        """The names of `suspect`."""
        return list(self._suspect)

    def record_away(self, names: Iterable[str]) -> None:
        """Record names that were written while another cache directory was missing from the path."""
        _remember(self._away, names)
        self._update()

    def written_while_away(self) -> list[str]:
        """The names that `record_away` was given."""
        return list(self._away)

    def forget_away(self) -> None:
        """Forget the names of `record_away`, after the returned directory was invalidated."""
        self._away.clear()
        self._update()

    def holds(self, key: str) -> bool:
        """Whether a key is quarantined."""
        # one lookup for each folder of the key, however many names are held
        return bool(self._held) and any(name in self._held for name in _names(key))

    def suspects(self, key: str) -> bool:
        """Whether the index must confirm the file of a key."""
        # asked twice for each file that is read for the first time
        return bool(self._suspect) and any(name in self._suspect for name in _names(key))

    def is_away(self, key: str) -> bool:
        """Whether a key was written while another directory was away."""
        return bool(self._away) and any(name in self._away for name in _names(key))

    def concerns(self, key: str) -> bool:
        """Whether a key is quarantined, suspected or away."""
        return not self.is_empty and (self.holds(key) or self.suspects(key) or self.is_away(key))

    @property
    def held(self) -> list[str]:
        """The names of `hold`."""
        return list(self._held)

    @property
    def holds_everything(self) -> bool:
        return EVERYTHING in self._held


def _names(key: str) -> Iterator[str]:
    """A key, and all names that cover it."""
    yield key
    yield EVERYTHING
    end = key.find("/")
    while end >= 0:
        yield key[: end + 1]
        end = key.find("/", end + 1)


def _remember(names: dict[str, None], more: Iterable[str]) -> None:
    names.update(dict.fromkeys(more))
    if len(names) > _MOST:
        # too many names: replace them by one name for each source
        sources = dict.fromkeys(name.partition("/")[0] + "/" for name in names)
        names.clear()
        names.update(sources if len(sources) <= _MOST else {EVERYTHING: None})


def beneath(prefix: str) -> str:
    """The name of all keys beneath a prefix."""
    return f"{prefix}/" if prefix else EVERYTHING
