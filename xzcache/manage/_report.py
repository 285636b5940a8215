"""The report: one page about the use of a cache, without scripts, that needs no network."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any, Final

from xzcache._config import shown_bound, shown_seconds, shown_size
from xzcache._display import Table, one_line
from xzcache.directory import DAY, Counts, Inspector
from xzcache.manage._look import info, ls
from xzcache.manage._results import Source, Sources, _Shown, display_names, shown_part
from xzcache.manage._statistics import OTHER_SOURCES, curve
from xzcache.manage._which import must, name_of, root_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from xzcache.manage._results import Info
    from xzcache.manage._statistics import Curve

_DAYS: Final = 90
_FEWEST_DAYS: Final = 14
_SHOWN: Final = 20
"""The sources that are shown at once."""
_FACTORS: Final = (0.125, 0.25, 0.5, 1, 2, 4, 8)
_SAID: Final = (0.25, 0.5, 1, 2, 4)
# a report must not take long, and `"adaptive"` is slower to simulate than the others
_MOST_USES: Final = 1 << 16
_OF_THE_OTHER: Final = 1 << 13


@dataclass(frozen=True, repr=False)
class Report(_Shown):
    """A report that was written.

    Attributes
    ----------
    path : str
        The page.
    directory : str
        The cache directory.
    sources : int
        The number of sources in it.
    size : int
        The bytes of the page.
    curves : tuple of Curve
        The misses with other bounds, by policy, the configured one first; empty if too little was read yet.
    """

    path: str
    directory: str
    sources: int
    size: int
    curves: tuple[Curve, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""
        return {**vars(self), "curves": [each.as_dict() for each in self.curves]}

    def __repr__(self) -> str:
        count = f"{self.sources:,} source{'s' * (self.sources != 1)}"
        lines = [f"{self.path}: a report of {self.directory}, {count}, {shown_size(self.size)}"]
        if self.curves:
            main = self.curves[0]
            said = [
                f"{_ratio(main, factor):.0%} with {shown_size(main.bound * factor)}{' (now)' * (factor == 1)}"
                for factor in _SAID
            ]
            lines.append(f"misses: {', '.join(said)}; of the reads since {_minute(main.since)}")
        return "\n".join(lines)

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return Table("xzcache", note=repr(self))


def report(path: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> Report:
    """Write a page about the use of a cache: by source and over time, hits, churn, and what other bounds would give.

    The page is one file of HTML without scripts, which needs no network.

    Parameters
    ----------
    path : str or Path
        The file, which is replaced.
    directory : str or Path, optional
        The cache directory. Default is this user's default cache on this machine.

    Returns
    -------
    Report

    Raises
    ------
    CacheUnavailable
        The cache cannot be read; the message says why. A cache that does not exist yet has an empty report.
    OSError
        The file cannot be written.
    ValueError
        The path is a directory, or its directory does not exist.
    """
    target = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if os.path.isdir(target) or not os.path.isdir(os.path.dirname(target)):
        raise ValueError(f"path={os.fspath(path)!r} is not accepted: give a file in a directory that exists")
    root = root_of(directory)
    # also brings the index up to date with the reads of this process
    found = info(root)
    curves: list[Curve] = []
    if found.state == "absent":
        page, count = _page(found, {}, {}, Sources(root), []), 0
    else:
        looked, days = must(root, lambda: _looked(root))
        sources = ls(None, root)
        curves = [curve(root, factors=_FACTORS, most=_uses_for(found.policy))]
        if curves[0].miss_ratios:
            other = "adaptive" if found.policy == "lru" else "lru"
            curves.append(curve(root, factors=_FACTORS, policy=other, most=min(_OF_THE_OTHER, _uses_for(other))))
        page, count = _page(found, looked, days, sources, curves), len(looked)
    try:
        _write(target, page)
    except OSError as error:
        # its own text names a temporary file
        raise type(error)(f"{target} cannot be written: {error.strerror}") from error
    return Report(target, root, count, len(page.encode()), tuple(each for each in curves if each.miss_ratios))


def _uses_for(policy: str) -> int:
    """How many uses the curve of a policy is made from."""
    return _MOST_USES // 2 if policy == "adaptive" else _MOST_USES


def _looked(root: str) -> tuple[dict[str, Counts], dict[int, dict[str, Counts]]]:
    with Inspector(root) as inspector:
        return inspector.statistics().of_sources, inspector.by_day()


def _write(path: str, text: str) -> None:
    """Replace a file as a whole."""
    # in the same directory, because a rename is atomic within one file system only
    fd, temporary = tempfile.mkstemp(prefix=".xzcache-", dir=os.path.dirname(path))
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        # `mkstemp` makes private files; the report gets the mode that any new file of the user has
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# -- the page


def _page(
    found: Info,
    by_source: dict[str, Counts],
    by_day: dict[int, dict[str, Counts]],
    sources: Sources,
    curves: Sequence[Curve],
) -> str:
    body = [] if found.state == "absent" else [_figures(found)]
    if found.ever.reads:
        days = _days(by_day)
        body += [_size(found, curves), _over_time(days), _churn(found, days)]
    if by_source or len(sources):
        body.append(_of_sources(by_source, sources))
    else:
        said = "There is no cache here yet." if found.state == "absent" else "Nothing was read through this cache yet."
        body.append(
            f"<section><h2>Nothing to report</h2><p>{said} The first read through xzcache begins it.</p></section>"
        )
    now = datetime.now(UTC)
    since = "" if found.since is None else f" · read since {datetime.fromtimestamp(found.since, UTC):%Y-%m-%d}"
    footer = (
        f"xzcache {version('xzcache')}. Days are in UTC. Time saved is an estimate of wall-clock time: what the hits "
        "would have taken at the prices that were observed of their source, less what they took; of processes that "
        "read at the same time, the one that saved the most counts."
    )
    template = (files("xzcache.manage") / "report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=f"xzcache {now:%Y-%m-%d}",
        subtitle=f"{_text(found.directory)} · {now:%Y-%m-%d %H:%M} UTC{since}",
        body="\n".join(body),
        footer=footer,
    )


def _text(text: str) -> str:
    return escape(one_line(text))


def _figures(found: Info) -> str:
    ever, day = found.ever, found.last_day
    share = (
        f"{shown_part(found.used / found.max_size)} of {shown_bound(found.max_size)}" if found.max_size else "no bound"
    )
    lately = f"{shown_part(day.hit_rate)} in the last day" if day.reads else "nothing in the last day"
    others = f"{shown_size(ever.bytes_from_source)} from sources"
    others += f", {shown_size(ever.bytes_from_peers)} from other nodes" if ever.peer_hits else ""
    figures = [
        ("Used", shown_size(found.used), share),
        ("Entries", f"{found.entries:,}", f"of {found.sources:,} source{'s' * (found.sources != 1)}"),
        ("Hits", shown_part(ever.hit_rate), lately),
        ("Time saved", shown_seconds(ever.seconds_saved), f"{shown_seconds(day.seconds_saved)} in the last day"),
        ("From the cache", shown_size(ever.bytes_from_cache), others),
        ("Fetched again", f"{ever.refetched:,}", f"of {ever.evictions:,} evicted entries"),
    ]
    cards = "".join(
        f'<div><span class="quiet">{name}</span><b>{_text(value)}</b><span class="note">{_text(more)}</span></div>'
        for name, value, more in figures
    )
    return f'<div class="figures">{cards}</div>'


# -- how large it should be


def _size(found: Info, curves: Sequence[Curve]) -> str:
    title = "<h2>How large should the cache be?</h2>"
    main = curves[0] if curves else None
    if main is None or not main.miss_ratios:
        return f"<section>{title}<p>Too little was read to tell what other bounds would give.</p></section>"
    ratios = dict(zip(_FACTORS, main.miss_ratios, strict=True))
    now, double, half = ratios[1], ratios[2], ratios[0.5]
    what = "bound" if found.max_size else "size"
    said = (
        f"Of the reads since {_minute(main.since)}, {now:.0%} are misses with the present {what} of "
        f"{shown_size(main.bound)}, {double:.0%} with twice as much, {half:.0%} with half."
    )
    rows = []
    for factor in _SAID:
        cells = [shown_size(main.bound * factor), f"{factor:g}", *(f"{_ratio(each, factor):.1%}" for each in curves)]
        rows.append(_row(cells, "now" if factor == 1 else ""))
    heads = [what.capitalize(), "Times", *(f"Misses, {each.policy}" for each in curves)]
    table = _table(heads, rows)
    legend = "".join(
        f'<span class="{kind}">policy {_text(each.policy)}{" (in use here)" * (kind == "cache")}</span>'
        for kind, each in zip(("cache", "other"), curves, strict=False)
    )
    note = (
        f"Predicted from {main.uses:,} sampled uses, as in a cache that was empty at their beginning. What was never "
        "read before is a miss with any bound."
    )
    return (
        f'<section>{title}<p>{said}</p><div class="legend">{legend}</div>{_curve_chart(curves)}'
        f'{table}<p class="note">{note}</p></section>'
    )


def _minute(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds or 0, UTC):%Y-%m-%d %H:%M} UTC"


def _ratio(each: Curve, factor: float) -> float:
    return each.miss_ratios[_FACTORS.index(factor)]


def _curve_chart(curves: Sequence[Curve]) -> str:
    width = math.log2(_FACTORS[-1] / _FACTORS[0])
    places = [100 * math.log2(factor / _FACTORS[0]) / width for factor in _FACTORS]
    lines = "".join(f'<line x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (25, 50, 75))
    for kind, each in list(zip(("cache", "other"), curves, strict=False))[::-1]:
        points = " ".join(f"{x:.2f},{100 * (1 - y):.2f}" for x, y in zip(places, each.miss_ratios, strict=True))
        lines += f'<polyline class="{"other" * (kind == "other")}" points="{points}"/>'
    main = curves[0]
    dots = "".join(
        f'<i{" class=now" * (factor == 1)} style="left:{x:.2f}%;bottom:{100 * y:.2f}%" '
        f'title="{shown_size(main.bound * factor)}: {y:.1%} misses"></i>'
        for factor, x, y in zip(_FACTORS, places, main.miss_ratios, strict=True)
    )
    labels = "".join(
        f'<span style="left:{x:.2f}%">{shown_size(main.bound * factor)}</span>'
        for number, (factor, x) in enumerate(zip(_FACTORS, places, strict=True))
        if number % 3 == 0
    )
    return (
        '<div class="chart"><div class="scale"><span>100%</span><span>50%</span><span>0%</span></div>'
        '<div class="plot tall"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Misses over the bound">{lines}</svg>{dots}</div><div class="places">{labels}</div></div>'
    )


# -- over time


def _days(by_day: dict[int, dict[str, Counts]]) -> dict[int, Counts]:
    """The counts of each day up to today, those without reads included."""
    today = int(time.time()) // DAY * DAY
    first = min([*by_day, today - (_FEWEST_DAYS - 1) * DAY])
    first = max(first, today - (_DAYS - 1) * DAY)
    return {day: reduce(Counts.plus, by_day.get(day, {}).values(), Counts()) for day in range(first, today + DAY, DAY)}


def _over_time(days: dict[int, Counts]) -> str:
    series = [
        ("cache", "from the cache", lambda counts: counts.bytes_from_cache),
        ("source", "from sources", lambda counts: counts.bytes_from_source),
    ]
    if any(counts.peer_hits for counts in days.values()):
        series.insert(1, ("other", "from other nodes", lambda counts: counts.bytes_from_peers))
    rate = [("cache", "hits, part of all reads", lambda counts: counts.hit_rate or 0.0)]
    return (
        f"<section><h2>Use over time</h2>{_bars('Bytes read by day', days, series, shown_size)}"
        f"{_bars('Hit rate by day', days, rate, shown_part, top=1.0)}</section>"
    )


def _churn(found: Info, days: dict[int, Counts]) -> str:
    title = "<h2>Churn</h2>"
    if not found.ever.evictions:
        return f"<section>{title}<p>Nothing was evicted yet.</p></section>"
    ever = found.ever
    said = (
        f"{ever.evictions:,} entries ({shown_size(ever.evicted_size)}) were evicted, and {ever.refetched:,} of them "
        f"({shown_size(ever.refetched_size)}) were fetched again: with a larger bound they would have been hits."
    )
    series = [
        ("churn", "evicted and fetched again", lambda counts: min(counts.refetched, counts.evictions)),
        ("other", "other evictions", lambda counts: max(0, counts.evictions - counts.refetched)),
    ]
    return f"<section>{title}<p>{said}</p>{_bars('Evictions by day', days, series, lambda n: f'{n:,.0f}')}</section>"


def _bars(
    title: str,
    days: dict[int, Counts],
    series: Sequence[tuple[str, str, Callable[[Counts], float]]],
    shown: Callable[[float], str],
    top: float | None = None,
) -> str:
    """Stacked bars, one for each day."""
    most = top or max((sum(value(counts) for *_, value in series) for counts in days.values()), default=0) or 1
    bars = []
    for number, (day, counts) in enumerate(days.items()):
        at, parts = 100.0, []
        for kind, _, value in series:
            height = 100 * value(counts) / most
            at -= height
            parts.append(
                f'<rect class="{kind}" x="{number + 0.1:.1f}" width="0.8" y="{at:.2f}" height="{height:.2f}"/>'
            )
        said = ", ".join(f"{shown(value(counts))} {name}" for _, name, value in series)
        bars.append(f"<g><title>{_date(day)}: {_text(said)}</title>{''.join(parts)}</g>")
    first, *_, last = days
    legend = "".join(f'<span class="{kind}">{name}</span>' for kind, name, _ in series)
    times = f"<span>{_date(first)}</span><span>{_date(last)}</span>"
    return (
        f'<div class="legend">{legend}</div>'
        f'<div class="chart"><div class="scale"><span>{_text(shown(most))}</span><span>0</span></div><div class="plot">'
        f'<svg viewBox="0 0 {len(days)} 100" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f'{"".join(bars)}</svg></div><div class="times">{times}</div></div>'
    )


def _date(day: int) -> str:
    return f"{datetime.fromtimestamp(day, UTC):%Y-%m-%d}"


# -- by source


def _of_sources(by_source: dict[str, Counts], sources: Sources) -> str:
    named = dict(zip([source.namespace for source in sources], display_names(sources.items), strict=True))
    held = {source.namespace: source for source in sources}
    order = sorted(
        {*by_source, *held},
        key=lambda name: (by_source.get(name, Counts()).bytes_from_cache, held[name].size if name in held else 0),
        reverse=True,
    )
    most = max((counts.bytes_from_cache for counts in by_source.values()), default=0) or 1
    rows = [
        _source_row(
            named.get(name) or (name_of(name) if name else OTHER_SOURCES),
            by_source.get(name, Counts()),
            held.get(name),
            most,
        )
        for name in order
    ]
    heads = ["Source", "Cached", "Hits", "Hit rate", "From cache", "From source", "Time saved", "Evicted", "Again"]
    table = _table(heads, rows[:_SHOWN])
    if len(rows) > _SHOWN:
        rest = _table(heads, rows[_SHOWN:])
        table += f"<details><summary>{len(rows) - _SHOWN:,} more sources</summary>{rest}</details>"
    return f"<section><h2>Sources</h2>{table}</section>"


def _source_row(name: str, counts: Counts, held: Source | None, most: int) -> str:
    share = 100 * counts.bytes_from_cache / most
    cells = [
        f'{_text(name)}<span class="back"><span class="share" style="width:{share:.1f}%"></span></span>',
        shown_size(held.size) if held is not None else "-",
        f"{counts.hits:,}",
        escape(shown_part(counts.hit_rate)),
        shown_size(counts.bytes_from_cache),
        shown_size(counts.bytes_from_source),
        shown_seconds(counts.seconds_saved),
        f"{counts.evictions:,}",
        f"{counts.refetched:,}",
    ]
    return _row(cells)


def _row(cells: Sequence[str], kind: str = "") -> str:
    """A row of a table, of cells in HTML."""
    return f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
