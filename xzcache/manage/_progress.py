"""Show the reads of this process from the source and from caches while a block of code runs.

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
_COUNTED: Final = ("hits", "misses", "peer_hits", "bytes_from_cache", "bytes_from_peers", "bytes_from_source")
_NODES: Final = "other nodes"
_Rates = tuple[float, float, float]
"""Bytes a second from the cache, from other nodes, and from the source."""


@dataclass(repr=False)
class Progress(_Shown):
    """The reads of this process while a block of code ran; sizes in bytes, times in seconds."""

    hits: int = 0
    misses: int = 0
    bytes_from_cache: int = 0
    bytes_from_source: int = 0
    peer_hits: int = 0
    """Reads that the cache of another node of a Dask cluster answered."""
    bytes_from_peers: int = 0
    seconds: float = 0.0
    is_done: bool = False

    @property
    def hit_rate(self) -> float:
        """The part of the reads that a cache answered, of this node or of another one, from 0 to 1."""
        hits = self.hits + self.peer_hits
        return hits / (hits + self.misses) if hits else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures for programs."""
        return {
            **{name: getattr(self, name) for name in _COUNTED},
            "hit_rate": self.hit_rate,
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> Table:
        """The figures as a table, for displays."""
        return _table(self, self._average())

    def _sizes(self) -> _Rates:
        return self.bytes_from_cache, self.bytes_from_peers, self.bytes_from_source

    def _average(self) -> _Rates:
        seconds = max(self.seconds, 1e-9)
        cached, passed, fetched = self._sizes()
        return cached / seconds, passed / seconds, fetched / seconds


def _parts(done: Progress, rates: _Rates) -> dict[str, str]:
    """What came from where; other nodes only if anything did."""
    counts = {"cache": done.hits, _NODES: done.peer_hits, "source": done.misses}
    return {
        place: f"{count:,} read{'s' * (count != 1)}, {shown_size(size)}, {shown_size(rate)}/s"
        for (place, count), size, rate in zip(counts.items(), done._sizes(), rates, strict=True)
        if count or place != _NODES
    }


def _table(done: Progress, rates: _Rates) -> Table:
    parts = _parts(done, rates).items()
    pairs = {f"from {'' if place == _NODES else 'the '}{place}": part for place, part in parts}
    pairs["took" if done.is_done else "running for"] = f"{done.seconds:.1f} s"
    return Table("xzcache.progress", pairs=pairs, note=_note(done))


def _note(done: Progress) -> str:
    if not done.is_done or done.hits or done.misses or done.peer_hits:
        return ""
    return "nothing was read in this process; xzcache.cluster_info(client) counts what the workers of a cluster read"


class _Face(Protocol):
    """A place where progress is shown."""

    def update(self, done: Progress, rates: _Rates) -> None: ...

    def close(self, done: Progress) -> None: ...


class progress:
    """Show what comes from the source and what from caches while a block runs, like Dask's ``ProgressBar``.

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
        self._recent: deque[tuple[float, _Rates]] = deque([(self._began, (0, 0, 0))])
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

    def _count(self) -> _Rates:
        """Bring the figures up to date; returns the rates of now."""
        now, done = time.monotonic(), self._done
        figures = process.as_dict()
        for name in _COUNTED:
            # never below zero: the counters begin anew in a forked child
            setattr(done, name, max(0, figures[name] - self._first[name]))
        done.seconds = now - self._began
        self._recent.append((now, done._sizes()))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW:
            self._recent.popleft()
        then, before = self._recent[0]
        seconds = max(now - then, 1e-9)
        cached, passed, fetched = ((size - less) / seconds for size, less in zip(done._sizes(), before, strict=True))
        return cached, passed, fetched

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


def _line(done: Progress, rates: _Rates) -> str:
    parts = (f"{place}: {part}" for place, part in _parts(done, rates).items())
    return f"{' | '.join(parts)} | {done.seconds:.1f} s"


class _Plain:
    """One line at the end, for pipes and logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, done: Progress, rates: _Rates) -> None:
        pass

    def close(self, done: Progress) -> None:
        self._stream.write(f"{_note(done) or _line(done, done._average())}\n")
        self._stream.flush()


class _Terminal(_Plain):
    """A line that is written anew in its place."""

    def update(self, done: Progress, rates: _Rates) -> None:
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

    def update(self, done: Progress, rates: _Rates) -> None:
        from rich.text import Text

        colours = {"cache": "green", _NODES: "blue", "source": "yellow"}
        parts = [
            piece
            for place, part in _parts(done, rates).items()
            for piece in ((f"{place}: ", "dim"), (part, colours[place]), (" | ", "dim"))
        ]
        self._live.update(Text.assemble(*parts, (f"{done.seconds:.1f} s", "dim"), overflow="ellipsis", no_wrap=True))
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

    def update(self, done: Progress, rates: _Rates) -> None:
        self._handle.update(self._html(_table(done, rates).html()))

    def close(self, done: Progress) -> None:
        self._handle.update(self._html(done._repr_html_()))
