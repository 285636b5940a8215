"""See, clear, size and check a cache directory: the Python side of the command ``xzcache``.

This room keeps no state and takes no lock of its own. All calls are synchronous and need no event loop, so they work in
a script and within a running event loop. Calls that only look create, repair and upgrade nothing, and work in a
directory that this process may only read.
"""

from xzcache.manage._change import check, clear, parse_since, resize
from xzcache.manage._look import info, ls, settings
from xzcache.manage._pin import pin, pin_namespace, pins, unpin
from xzcache.manage._progress import Progress, progress
from xzcache.manage._report import Report, report
from xzcache.manage._results import (
    Arrays,
    CacheUnavailable,
    Cleared,
    Failed,
    Info,
    Pins,
    Resized,
    Settings,
    Sources,
    TooLarge,
    UnknownSource,
    Warmed,
)
from xzcache.manage._statistics import Activity, Curve, Meter, curve, metrics, metrics_server
from xzcache.manage._warm import Part, Positions, progress_bar, warm_parts

__all__ = [
    "Activity",
    "Arrays",
    "CacheUnavailable",
    "Cleared",
    "Curve",
    "Failed",
    "Info",
    "Meter",
    "Part",
    "Pins",
    "Positions",
    "Progress",
    "Report",
    "Resized",
    "Settings",
    "Sources",
    "TooLarge",
    "UnknownSource",
    "Warmed",
    "check",
    "clear",
    "curve",
    "info",
    "ls",
    "metrics",
    "metrics_server",
    "parse_since",
    "pin",
    "pin_namespace",
    "pins",
    "progress",
    "progress_bar",
    "report",
    "resize",
    "settings",
    "unpin",
    "warm_parts",
]
