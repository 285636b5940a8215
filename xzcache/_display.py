"""Displays of a store and of a cache: lines for consoles and messages, tables for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from xzcache._config import shown_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
        saved, fetched = (shown_size(stats[name]) for name in ("bytes_from_cache", "bytes_from_source"))
        given = f" and {stats['peer_hits']:,} from other nodes" if stats["peer_hits"] else ""
        return {
            "source": self.source,
            "cache": self.cache,
            "used": self._used(),
            "hits": f"{stats['hits']:,}{given} ({stats['hit_rate']:.0%} of reads), {saved} saved",
            "misses": f"{stats['misses']:,}, {fetched} from the source",
        }

    def _used(self) -> str:
        if "total_size" not in self.info:
            return "not known at the moment" if self.is_open else "not opened yet"
        bound = self.info["max_size"]
        limit = "without bound" if bound is None else f"of {shown_size(bound)}"
        return f"{shown_size(self.info['total_size'])} {limit}, {shown_size(self.info['current_size'])} by this source"

    def html(self) -> str:
        """An HTML table for notebooks, in their colours."""
        rows = self._rows()
        bound = self.info["max_size"] if "total_size" in self.info else None
        share = min(1.0, self.info["total_size"] / bound) if bound else None
        return Table(f"xzcache.{self.name}", pairs=rows, bar=share).html()


class Table(NamedTuple):
    """Rows under columns, or names with values; `bar` is shown before the value of "used"."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pairs: Mapping[str, str] | None = None
    bar: float | None = None
    note: str = ""

    def text(self) -> str:
        """Aligned lines, without colours."""
        rows = [self.columns, *self.rows] if self.rows else []
        rows += [list(pair) for pair in (self.pairs or {}).items()]
        lines = []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [one_line(cell).ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def html(self) -> str:
        """An HTML table for notebooks, in their colours."""
        bar = ""
        if self.bar is not None:
            bar = (
                f"<span style='{_BAR}{_GROOVE}'>"
                f"<span style='display:block;height:100%;width:{self.bar:.1%};background:currentColor'></span></span>"
            )
        cells = "".join(
            f"<div style='{_QUIET}'>{escape(name)}</div><div>{bar if name == 'used' else ''}{escape(value)}</div>"
            for name, value in (self.pairs or {}).items()
        )
        style = _STYLE
        if self.rows:
            style = _STYLE.replace("auto auto", f"repeat({len(self.columns)},auto)")
            cells = "".join(f"<div style='{_QUIET}'>{escape(name)}</div>" for name in self.columns)
            cells += "".join(f"<div>{escape(cell)}</div>" for row in self.rows for cell in row)
        grid = f"<div style='{style}'>{cells}</div>" if cells else ""
        note = f"<div>{escape(self.note)}</div>" if self.note else ""
        return f"<div class='xzcache'><div><b>{escape(self.title)}</b></div>{grid}{note}</div>"
