"""What a benchmark says: tables on the terminal and in Markdown, and pictures for light and dark pages."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# each stands out from white and from nearly black by 3 to 1 or more
TEXT = "#747b86"
OURS = "#d9534f"
OTHERS = ["#3b82c4", "#2f9e6e", "#a07cc5", "#b8860b", "#8a8d2f", "#c2699f", "#5f9ea0"]


def arguments(
    description: str | None, *, can_be_outside: bool = False, can_count_cpu: bool = False
) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="where the table and the pictures go")
    parser.add_argument("--full", action="store_true", help="every combination, however long it takes")
    if can_be_outside:
        parser.add_argument("--outside", type=Path, metavar="DIRECTORY", help="measure with this Zarr data instead")
    parser.set_defaults(clock=time.perf_counter)
    if can_count_cpu:
        parser.add_argument(
            "--cpu",
            dest="clock",
            action="store_const",
            const=time.process_time,
            help="compare the CPU time of the process, which other work on the machine disturbs less",
        )
    return parser


class Report:
    """The results of one benchmark; leaving the block writes them to ``NAME.md`` and ``NAME-*.svg``.

    Parameters
    ----------
    name : str
    out : Path
        The folder; it is made.
    """

    def __init__(self, name: str, out: Path) -> None:
        self.name = name
        self.out = out
        self._console = Console(width=None if sys.stdout.isatty() else 120)
        self._markdown: list[str] = []

    def __enter__(self) -> Self:
        self.say(f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"{self.name}.md"
            path.write_text("\n\n".join(self._markdown) + "\n", encoding="utf-8")
            self._console.print(f"written to {path}", style="dim")

    def say(self, text: str) -> None:
        """One paragraph."""
        self._console.print(text)
        self._markdown.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: its first column is text, the others are numbers."""
        shown = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in rows:
            shown.add_row(*row)
        self._console.print(shown)
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        self._markdown.append(f"**{title}**")
        self._markdown.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def bars(self, name: str, title: str, groups: Mapping[str, Mapping[str, float]], unit: str) -> None:
        """Horizontal bars: for each group, a value for each contestant; ours, and limits, are told by their names."""
        with _picture(self._path(name), height=0.5 + 0.26 * sum(len(g) + 1 for g in groups.values())) as axes:
            names = list(dict.fromkeys(contestant for group in groups.values() for contestant in group))
            colours = {name: OURS if "xzcache" in name else TEXT if "limit" in name else OTHERS[0] for name in names}
            labels: list[tuple[float, str]] = []
            place = 0.0
            for group, values in groups.items():
                axes.text(0, place, group, color=TEXT, va="center", weight="bold")
                place -= 1
                for contestant, value in values.items():
                    axes.barh(place, value, color=colours[contestant], height=0.8)
                    axes.annotate(
                        f" {_rounded(value)}",
                        (value, place),
                        color=TEXT,
                        va="center",
                        annotation_clip=False,
                        fontsize=8,
                    )
                    labels.append((place, contestant))
                    place -= 1
            axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
            axes.set_ylim(place + 0.5, 0.7)
            axes.set_title(title, loc="left")
            axes.set_xlabel(unit)
        self._show(name, title)

    def lines(
        self,
        name: str,
        title: str,
        series: Mapping[str, Mapping[float, float]],
        x: str,
        y: str,
        *,
        logarithmic: tuple[bool, bool] = (False, False),
    ) -> None:
        """One line for each contestant."""
        with _picture(self._path(name), height=3.4) as axes:
            colours = _colours(list(series))
            for contestant, points in series.items():
                axes.plot(list(points), list(points.values()), marker="o", color=colours[contestant], label=contestant)
            if logarithmic[0]:
                axes.set_xscale("log")
            if logarithmic[1]:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.08 * max(max(points.values()) for points in series.values()))
            axes.set_title(title, loc="left")
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.legend(frameon=False, labelcolor=TEXT, fontsize=8)
        self._show(name, title)

    def panels(self, name: str, title: str, panels: Mapping[str, Mapping[str, Mapping[float, float]]]) -> None:
        """Many small pictures of the same contestants, with shares on both axes."""
        across = 4
        down = math.ceil((len(panels) + 1) / across)
        with _pictures(self._path(name), height=0.6 + 1.5 * down, down=down, across=across) as grid:
            colours = _colours(list(next(iter(panels.values()))))
            for axes, (panel, series) in zip(grid, panels.items(), strict=False):
                for contestant, points in series.items():
                    style = {"linestyle": ":"} if "limit" in contestant else {}
                    shown = TEXT if style else colours[contestant]
                    axes.plot(
                        list(points), list(points.values()), color=shown, label=contestant, linewidth=1.4, **style
                    )
                axes.set_title(panel, loc="left", fontsize=7)
                axes.set_ylim(-0.02, 1.02)
                axes.set_xticks([0, 0.5, 1])
                axes.tick_params(labelsize=6)
            for axes in grid[len(panels) :]:
                axes.axis("off")
            grid[-1].legend(*grid[0].get_legend_handles_labels(), frameon=False, labelcolor=TEXT, fontsize=8)
        self._show(name, title)

    def _path(self, name: str) -> Path:
        return self.out / f"{self.name}-{name}.svg"

    def _show(self, name: str, title: str) -> None:
        self._markdown.append(f"![{title}]({self.name}-{name}.svg)")


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _colours(names: Sequence[str]) -> dict[str, str]:
    theirs = [name for name in names if "xzcache" not in name]
    return {name: OTHERS[theirs.index(name) % len(OTHERS)] if name in theirs else OURS for name in names}


@contextmanager
def _picture(path: Path, *, height: float) -> Iterator[Axes]:
    """One picture, as of `_pictures`."""
    with _pictures(path, height=height) as (axes,):
        yield axes


@contextmanager
def _pictures(path: Path, *, height: float, down: int = 1, across: int = 1) -> Iterator[list[Axes]]:
    """Pictures without a background, in colours that can be read on any; leaving the block writes them to one file."""
    # slow to import, and not needed by who only reads the help
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    coloured = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "text.color")
    style: dict[str, Any] = dict.fromkeys(coloured, TEXT)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "font.family": "sans-serif"}
    # text stays text, and the same picture is the same file
    style |= {"svg.fonttype": "none", "svg.hashsalt": path.stem}
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(style):
        figure, grid = plt.subplots(down, across, figsize=(7.6, height), layout="constrained", squeeze=False)
        try:
            yield list(grid.flat)
            figure.savefig(path, transparent=True, metadata={"Date": None})
        finally:
            plt.close(figure)
