"""Reads the pages that stores and clusters are shown as, strictly."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script>&amp;'\"<b>é\u202e"
VOID = {"br", "hr", "img", "input", "meta", "link"}


class Page(HTMLParser):
    """Reads HTML strictly: every tag that is opened is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.styles += [value or "" for name, value in attrs if name == "style"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def row(self, name: str) -> str:
        """What stands beside a name."""
        return self.texts[self.texts.index(name) + 1]

    @property
    def filled(self) -> str | None:
        """How full the bar is, where there is one."""
        widths = [width for style in self.styles for width in re.findall(r"width:([\d.]+)%", style)]
        return widths[-1] if widths else None
