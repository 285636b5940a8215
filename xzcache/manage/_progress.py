"""Show the reads of this process from the source and from the cache while a block of code runs.

A thread polls the counters of `reading/`, so a read costs no more while it is watched.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Protocol, TextIO

from xzcache._config import parse_flag, parse_seconds, shown_size
from xzcache._display import Table
from xzcache.manage._results import _Shown
from xzcache.reading import process

_WINDOW: Final = 3.0
"""Seconds over which the rates of now are averaged."""
_shown: Final = threading.Lock()
"""Held by the block that is shown: one line has room for one."""


@dataclass(repr=False)
class Progress(_Shown):
    """The reads of this process while a block of code ran; sizes in bytes, times in seconds."""

    hits: int = 0
    misses: int = 0
    bytes_from_cache: int = 0
    bytes_from_source: int = 0
    seconds: float = 0.0
    is_done: bool = False

    @property
    def hit_rate(self) -> float:
        """The part of the reads that the cache answered, from 0 to 1."""
        return self.hits / reads if (reads := self.hits + self.misses) else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures for programs."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "bytes_from_cache": self.bytes_from_cache,
            "bytes_from_source": self.bytes_from_source,
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return _table(self, self._average())

    def _average(self) -> tuple[float, float]:
        seconds = max(self.seconds, 1e-9)
        return self.bytes_from_cache / seconds, self.bytes_from_source / seconds


def _parts(done: Progress, rates: tuple[float, float]) -> tuple[str, str]:
    counts = (done.hits, done.bytes_from_cache), (done.misses, done.bytes_from_source)
    shown = [
        f"{count:,} read{'s' * (count != 1)}, {shown_size(size)}, {shown_size(rate)}/s"
        for (count, size), rate in zip(counts, rates, strict=True)
    ]
    return shown[0], shown[1]


def _table(done: Progress, rates: tuple[float, float]) -> Table:
    cache, source = _parts(done, rates)
    state = "took" if done.is_done else "running for"
    pairs = {"from the cache": cache, "from the source": source, state: f"{done.seconds:.1f} s"}
    return Table("xzcache.progress", pairs=pairs, note=_note(done))


def _note(done: Progress) -> str:
    if not done.is_done or done.hits or done.misses:
        return ""
    return "nothing was read in this process; xzcache.cluster_info(client) counts what the workers of a cluster read"


class _Face(Protocol):
    """A place where progress is shown."""

    def update(self, done: Progress, rates: tuple[float, float]) -> None: ...

    def close(self, done: Progress) -> None: ...


class progress:
    """Show what comes from the source and what from the cache while a block runs, like Dask's ``ProgressBar``.

    In a terminal one line is kept up to date, in a notebook a small table; elsewhere, in a pipe or a log, one line is
    written at the end. Counted is what this process reads through any `CacheStore`, in all of its threads.

    Parameters
    ----------
    interval : float, optional
        The time between two updates, in seconds.
    file : text file, optional
        Where the line is written. Default is the standard error output.
    display : bool, optional
        False to show nothing and only count.

    Examples
    --------
    >>> with xzcache.progress(display=False) as done:
    ...     pass
    >>> done.misses
    0
    """

    def __init__(self, *, interval: float = 0.25, file: TextIO | None = None, display: bool = True) -> None:
        self._interval = parse_seconds("interval", interval)
        self._file = file
        self._display = parse_flag("display", display)

    def __enter__(self) -> Progress:
        self._done = Progress()
        self._first = process.as_dict()
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._ended = threading.Event()
        self._thread = None
        self._is_shown = self._display and _shown.acquire(blocking=False)
        if self._is_shown:
            # created here, because a notebook shows it beneath the cell of the calling thread
            self._face: _Face | None = _Notebook() if self._file is None and _is_notebook() else None
            # a child of a fork has no such thread, and shows nothing
            self._thread = threading.Thread(target=self._show, name="xzcache-progress", daemon=True)
            self._thread.start()
        return self._done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count()
        self._done.is_done = True
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_shown:
            _shown.release()

    def _count(self) -> tuple[float, float]:
        """Bring the figures up to date; returns the rates of now, from the cache and from the source."""
        now, done = time.monotonic(), self._done
        figures = process.as_dict()
        for name in ("hits", "misses", "bytes_from_cache", "bytes_from_source"):
            # never below zero: the counters begin anew in a forked child
            setattr(done, name, max(0, figures[name] - self._first[name]))
        done.seconds = now - self._began
        self._recent.append((now, done.bytes_from_cache, done.bytes_from_source))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW:
            self._recent.popleft()
        then, cached, fetched = self._recent[0]
        seconds = max(now - then, 1e-9)
        return (done.bytes_from_cache - cached) / seconds, (done.bytes_from_source - fetched) / seconds

    def _show(self) -> None:
        """Keep the display up to date; a failure here must not disturb the block."""
        # a stream may be closed, a notebook gone
        with suppress(Exception):
            face = self._face or _face(self._file)
            try:
                while not self._ended.wait(self._interval):
                    face.update(self._done, self._count())
            finally:
                face.close(self._done)


def _face(file: TextIO | None) -> _Face:
    stream = sys.stderr if file is None else file
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return _Plain(stream)
    try:
        return _Rich(stream)
    except ImportError:
        return _Terminal(stream)


def _line(done: Progress, rates: tuple[float, float]) -> str:
    cache, source = _parts(done, rates)
    return f"cache: {cache} | source: {source} | {done.seconds:.1f} s"


class _Plain:
    """One line at the end, for pipes and logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, done: Progress, rates: tuple[float, float]) -> None:
        pass

    def close(self, done: Progress) -> None:
        self._stream.write(f"{_note(done) or _line(done, done._average())}\n")
        self._stream.flush()


class _Terminal(_Plain):
    """A line that is written anew in its place."""

    def update(self, done: Progress, rates: tuple[float, float]) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r{_line(done, rates)[:width].ljust(width)}")
        self._stream.flush()

    def close(self, done: Progress) -> None:
        self._stream.write(f"\r{' ' * (shutil.get_terminal_size().columns - 1)}\r")
        super().close(done)


class _Rich:
    """As `_Terminal`, in colours, and with the output of the block above the line."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def update(self, done: Progress, rates: tuple[float, float]) -> None:
        from rich.text import Text

        cache, source = _parts(done, rates)
        parts = ("cache: ", "dim"), (cache, "green"), (" | source: ", "dim"), (source, "yellow")
        self._live.update(Text.assemble(*parts, (f" | {done.seconds:.1f} s", "dim"), overflow="ellipsis", no_wrap=True))
        self._live.refresh()

    def close(self, done: Progress) -> None:
        try:
            self.update(done, done._average())
        finally:
            self._live.stop()
        if note := _note(done):
            self._live.console.print(note, highlight=False)


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(ipython, "kernel")


class _Notebook:
    """A small table that is updated in its place."""

    def __init__(self) -> None:
        ipython = import_module("IPython.display")
        self._html = ipython.HTML
        self._handle: Any = ipython.display(ipython.HTML(""), display_id=True)

    def update(self, done: Progress, rates: tuple[float, float]) -> None:
        self._handle.update(self._html(_table(done, rates).html()))

    def close(self, done: Progress) -> None:
        self._handle.update(self._html(done._repr_html_()))
