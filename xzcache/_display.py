"""Displays of a store: one line for consoles and messages, a table for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dask.utils import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping


_STYLE: Final = (
    "display:inline-grid;grid-template-columns:auto auto;gap:.15em 1.2em;padding:.5em .8em;"
    "border:1px solid color-mix(in srgb,currentColor 25%,transparent);border-radius:4px"
)
_QUIET: Final = "opacity:.65"
_BAR: Final = "display:inline-block;width:8em;height:.6em;vertical-align:middle;margin-right:.6em;"
_GROOVE: Final = "background:color-mix(in srgb,currentColor 15%,transparent);border-radius:3px;overflow:hidden"


def one_line(text: str) -> str:
    """A text on one line, with control characters escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


class Display(NamedTuple):
    """The contents of a table."""

    name: str
    source: str
    cache: str
    is_open: bool
    """Whether this process has opened the cache already."""
    info: Mapping[str, Any]
    """The result of `CacheStore.cache_info`, without sizes if they are not available at once."""
    stats: Mapping[str, Any]
    """As `CacheStore.cache_stats`."""

    def _rows(self) -> dict[str, str]:
        stats = self.stats
        return {
            "source": self.source,
            "cache": self.cache,
            "used": self._used(),
            "hits": f"{stats['hits']:,} ({stats['hit_rate']:.0%} of reads), {_bytes(stats['bytes_from_cache'])} saved",
            "misses": f"{stats['misses']:,}, {_bytes(stats['bytes_from_source'])} from the source",
        }

    def _used(self) -> str:
        if "total_size" not in self.info:
            return "not known at the moment" if self.is_open else "not opened yet"
        bound = self.info["max_size"]
        limit = "without bound" if bound is None else f"of {_bytes(bound)}"
        return f"{_bytes(self.info['total_size'])} {limit}, {_bytes(self.info['current_size'])} by this source"

    def html(self) -> str:
        """An HTML table for notebooks, in their colours."""
        rows = self._rows()
        bound = self.info["max_size"] if "total_size" in self.info else None
        share = min(1.0, self.info["total_size"] / bound) if bound else 0.0
        bar = (
            f"<span style='{_BAR}{_GROOVE}'>"
            f"<span style='display:block;height:100%;width:{share:.1%};background:currentColor'></span></span>"
        )
        cells = "".join(
            f"<div style='{_QUIET}'>{name}</div><div>{bar if name == 'used' and bound else ''}{escape(value)}</div>"
            for name, value in rows.items()
        )
        return f"<div class='xzcache'><div><b>xzcache.{self.name}</b></div><div style='{_STYLE}'>{cells}</div></div>"


def _bytes(size: int) -> str:
    return str(format_bytes(size))
