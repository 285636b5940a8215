"""Every setting, its default, and how it is read: the one place for all of them.

`config` is a `donfig.Config <https://donfig.readthedocs.io>`_: settings come from the defaults below, then the section
``xzcache`` of Dask's configuration as it is at import (``DASK_XZCACHE__MAX_SIZE=50GB``), then YAML files
(``~/.config/xzcache/*.yaml``, ``/etc/xzcache``; at their top or in a section ``xzcache``), then the environment
(``XZCACHE_MAX_SIZE=50GB``), then ``xzcache.config.set(max_size="50 GB")``. The section ``enforced`` of files in
``/etc/xzcache`` stands above all of them, and above keywords.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
import operator
import os
import re
import stat
import time
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, SupportsIndex, TypeVar, cast, get_args

import dask.config
from dask.utils import parse_bytes
from donfig import Config
from donfig.config_obj import ConfigSet, collect_env, collect_yaml, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping


P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("xzcache")

DEFAULTS: Final[Mapping[str, Any]] = {
    # where the default cache of this node is; None: the platform's user cache directory
    "directory": None,
    # the most that a cache directory holds, in bytes or as "10 GiB"; None: no bound but min_free
    "max_size": "10 GiB",
    # free space to leave on the file system: "5%", a fraction below 1, or a size
    "min_free": "5%",
    # how long an entry is served, in seconds, or "infinity"
    "max_age_seconds": "infinity",
    # how long a missing chunk is not requested again, in seconds, or "infinity"
    "missing_max_age_seconds": 60,
    # when metadata documents are asked for again: "open", "strict", True, False, or a number of seconds
    "revalidate": "open",
    # whether values that are written through the cache are cached
    "cache_set_data": True,
    # which entries are evicted first: "adaptive", "lru", or "none", which evicts nothing
    "policy": "adaptive",
    # a file for a trace of all uses, under hashes of their keys; None: no trace
    "trace": None,
    # the library that reads URLs: "obstore", "fsspec", or "auto", obstore if it can
    "upstream": "auto",
    # whether `xzcache.pipeline.CachePipeline` reads arrays over a `CacheStore`, where Zarr has its default pipeline
    "pipeline": True,
    # an object of which so many bytes were read in byte ranges is fetched whole at the next one; None: never
    "promote_above": None,
    # seconds to wait for another process's fetch of the same object before fetching it ourselves
    "fetch_timeout": 30.0,
    # seconds to wait for the lock on the index before doing without the cache
    "lock_timeout": 5.0,
    # seconds without a sign of life from another node of a cluster before the source is asked
    "peer_timeout": 0.1,
    # threads that read large entries and write new ones
    "threads": 4,
}


def _of_dask() -> dict[str, Any]:
    """The section ``xzcache`` of Dask's configuration, which clusters pass on to their workers."""
    section = dask.config.get("xzcache", None)
    return {name.replace("-", "_"): value for name, value in section.items()} if isinstance(section, dict) else {}


def nearest(name: str, known: Iterable[str], least: float = 0.7) -> str:
    """A question that names the nearest known name, for the end of a message; empty if none is near."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), 1, cutoff=least)
    return f", did you mean {close[0]}?" if close else ""


def refuse_misspelled(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise `TypeError` for a keyword that is unknown, if a known one is near."""
    for name in given:
        if name not in known and (hint := nearest(name, known)):
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def with_hints(function: Callable[P, R]) -> Callable[P, R]:
    """The `__init__` of a class whose callers are told the nearest keyword for a misspelled one."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not kwargs.keys() <= known:
            refuse_misspelled(type(args[0]).__name__, kwargs, known)
        return function(*args, **kwargs)

    return called


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file, which are at its top, or in a section ``xzcache`` as in the files of Dask."""
    section = found.get("xzcache")
    rest = {name: value for name, value in found.items() if name != "xzcache" or not isinstance(value, dict | None)}
    return {**rest, **section} if isinstance(section, dict) else rest


SITE: Final = "/etc/xzcache"
"""Where an administrator enforces settings; no variable of the environment moves it."""


def _enforced() -> dict[str, tuple[Any, str]]:
    """What the section ``enforced`` of the site's files sets, and the file."""
    found: dict[str, tuple[Any, str]] = {}
    for path in _files_in(SITE):
        for each in collect_yaml([path]):
            section = _flat(each).get(_ENFORCED) if isinstance(each, dict) else None
            if isinstance(section, dict):
                found |= {str(name).replace("-", "_"): (value, path) for name, value in section.items()}
    return found


_ENFORCED: Final = "enforced"
_TIGHTENED: Final = ("max_size", "min_free")
"""Settings whose enforced value is a limit: users may ask for less of the disk."""


def _files_in(place: str) -> list[str]:
    """The configuration files of a place, a folder or a file, in the order in which they are read."""
    is_folder = os.path.isdir(place)
    names = sorted(os.listdir(place)) if is_folder and os.access(place, os.R_OK | os.X_OK) else []
    paths = [os.path.join(place, name) for name in names] if is_folder else [place]
    return [path for path in paths if path.lower().endswith((".json", ".yaml", ".yml"))]


def allowed(name: str, value: Any) -> Any:
    """A value of a setting as the site allows it: the enforced one, or a tighter one; UNSET stays unset."""
    if name not in config.enforced or value is UNSET:
        return value
    limit, path = config.enforced[name]
    if name not in _TIGHTENED:
        return limit
    try:
        if name == "max_size":
            size, most = parse_size(name, value), parse_size(name, limit)
            return size if most is None or (size is not None and size <= most) else most
        reserve, least = parse_min_free(name, value), parse_min_free(name, limit)
        # a share and a size cannot be compared without the disk
        return max(reserve, least) if isinstance(reserve, float) == isinstance(least, float) else least
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (from {origin_of(name)}, enforced by {path})") from None


class _Set(ConfigSet):  # type: ignore[misc]
    """Settings that were set, until the end of a ``with`` statement; displayed, they say which are no settings."""

    def __init__(self, config: Any, lines: list[str], given: Mapping[str, Any]) -> None:
        super().__init__(config.config, config.config_lock, config.deprecations, given)
        self._shown = "\n".join([f"xzcache.config.set({given!r})", *lines])

    def __repr__(self) -> str:
        return self._shown


class _Config(Config):  # type: ignore[misc]
    """A donfig configuration that warns of names that are no settings."""

    def collect(self, paths: list[str] | None = None, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """As `donfig.Config.collect`; the settings of a file may be in a section ``xzcache``."""
        self.enforced: dict[str, tuple[Any, str]] = _enforced()
        files = [_flat(each) for each in collect_yaml(self.paths if paths is None else paths)]
        found = dict(merge(*files, collect_env(self.env_prefix, self.env if env is None else env)))
        found.pop(_ENFORCED, None)
        return found

    def get(self, key: str, *default: Any, **options: Any) -> Any:
        """As `donfig.Config.get`; what the site enforces cannot be overridden."""
        value = super().get(key, *default, **options)
        return allowed(key, value) if key in self.enforced else value

    def set(self, arg: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Set settings, until the end of a ``with`` statement if there is one.

        Parameters
        ----------
        arg : mapping, optional
            Settings and their values.
        **kwargs
            Further ones, for example ``max_size="20 GB"``.

        Returns
        -------
        context manager
            It restores the settings at its end. Displayed, it says which names are no settings.
        """
        given = {**(arg or {}), **kwargs}
        lines = []
        for name in given:
            if name.replace("-", "_") not in DEFAULTS:
                lines.append(f"xzcache.config.set: {name} is no setting{_meant(name)}")
                warn_of_unknown(lines[-1])
        return _Set(self, lines, given)


def _meant(name: str) -> str:
    return nearest(name, DEFAULTS) or "; `xzcache config` lists all settings"


_warned: Final[set[str]] = set()


def warn_of_unknown(line: str) -> None:
    """Log that a configured name is no setting, once in a process."""
    if line not in _warned:
        _warned.add(line)
        logger.warning(line)


config: Final[Config] = _Config("xzcache", defaults=[_of_dask(), dict(DEFAULTS)])


class Unset(Enum):
    """The type of `UNSET`, an argument that was not given: the configuration decides."""

    UNSET = "unset"

    def __str__(self) -> str:
        return "unset"

    __repr__ = __str__


UNSET: Final = Unset.UNSET

AS_ZARR: Final[Mapping[str, Any]] = {
    "max_age_seconds": "infinity",
    "max_size": UNSET,
    "cache_set_data": True,
    "namespace": None,
    "revalidate": "open",
    "policy": UNSET,
    "missing_max_age_seconds": UNSET,
}
"""The settings that a pickle of a store omits."""

Infinity = Literal["infinity"]
Age = float | Infinity
Revalidate = bool | float | Literal["open", "strict"]
PolicyName = Literal["lru", "adaptive", "none"]
Upstream = Literal["auto", "obstore", "fsspec"]


def _refuse(name: str, value: object, accepted: str, error: type[Exception] = ValueError) -> Exception:
    return error(f"{name}={value!r} is not accepted: give {accepted}")


def parse_size(name: str, value: Any) -> int | None:
    """Bytes from an int, a string such as ``"20 GB"``, or None for no bound.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, the value and the accepted values.
    """
    accepted = 'a whole number of bytes, 0 or more, a string such as "20 GB" or "512 MiB", or None for no bound'
    if value is None:
        return None
    if isinstance(value, str):
        if not any(character.isdigit() for character in value):
            raise _refuse(name, value, accepted)
        try:
            size = parse_bytes(value)
        except (ValueError, KeyError, OverflowError):
            raise _refuse(name, value, accepted) from None
    elif isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise _refuse(name, value, accepted, TypeError)
    else:
        size = operator.index(value)
    if size < 0:
        raise _refuse(name, value, accepted)
    return size


_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_SMALL: Final = 1_000_000
_small_ones: Final[set[int]] = set()
"""The bounds that were logged as small in this process."""


def shown_size(size: float) -> str:
    """A size for people, in decimal units, as sizes are asked for: ``"20 GB"``, ``"1.23 MB"``."""
    unit = 0
    while abs(size) >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    text = f"{size:.0f}" if unit == 0 or abs(size) >= 99.95 else f"{size:.3g}"
    return f"{text} {_UNITS[unit]}"


def shown_duration(seconds: float) -> str:
    """A time span for people, in its largest unit: ``"3 d"``, ``"5 h"``, ``"2 min"``, ``"12 s"``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit != "d" and seconds >= length):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown_seconds(seconds: float) -> str:
    """A measured time for people, in its largest unit and with up to three digits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.995 * length or (unit == "s" and seconds >= 0.9995):
            amount = seconds / length
            return f"{amount:.0f} {unit}" if amount >= 99.5 else f"{amount:.3g} {unit}"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.0005 else "0 s"


def shown_bound(bound: int | Unset | None) -> str:
    """The bound of a cache for people."""
    return shown_size(bound) if isinstance(bound, int) else "no bound"


def parse_bound(name: str, value: Any) -> int | None:
    """As `parse_size`, for the bound of a cache: a bound that holds hardly any chunk is logged, once for each."""
    size = parse_size(name, value)
    if size is not None and size < _SMALL and size not in _small_ones:
        _small_ones.add(size)
        is_bare = isinstance(value, str) and value.strip().isdecimal()
        logger.warning(
            'max_size=%r is %s, a bound that holds hardly any chunk%s: sizes are given as "10 GB" or "500 MB"',
            value,
            shown_size(size),
            " (without a unit, it is a number of bytes)" if is_bare else "",
        )
    return size


def _number(value: Any) -> float | None:
    """A float from any number except bool, NaN and text; else None."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_fresh(since: float, max_age: Age) -> bool:
    """Whether a time, in seconds since the epoch, is within the maximum age.

    A time in the future is not fresh: the clock was set back, so its age is unknown.
    """
    return max_age == "infinity" or 0 <= time.time() - since < max_age


def parse_age(name: str, value: Any) -> Age:
    """Seconds as a number, 0 or more, or ``"infinity"``."""
    accepted = 'a number of seconds, 0 or more, or "infinity"'
    if isinstance(value, str):
        if value == "infinity":
            return "infinity"
        raise _refuse(name, value, accepted)
    number = _number(value)
    if number is None:
        raise _refuse(name, value, accepted, ValueError if _is_number(value) else TypeError)
    if number < 0:
        raise _refuse(name, value, accepted)
    if math.isinf(number):
        return "infinity"
    # the caller's own number comes back, as Zarr's cache_info() shows it
    return value if isinstance(value, int) else number


def parse_revalidate(name: str, value: Any) -> Revalidate:
    """``"open"``, ``"strict"``, True, False, or a number of seconds."""
    accepted = '"open", "strict", True, False, or a number of seconds, 0 or more'
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value == "open":
            return "open"
        if value == "strict":
            return "strict"
        raise _refuse(name, value, accepted)
    number = _number(value)
    if number is None:
        raise _refuse(name, value, accepted, ValueError if _is_number(value) else TypeError)
    if number < 0 or math.isinf(number):
        raise _refuse(name, value, accepted)
    return number


def parse_flag(name: str, value: Any) -> bool:
    """True or False, and no other type."""
    if not isinstance(value, bool):
        raise _refuse(name, value, "True or False", TypeError)
    return value


def parse_policy(name: str, value: Any) -> PolicyName:
    """The name of an eviction policy."""
    if not isinstance(value, str) or value not in get_args(PolicyName):
        error = ValueError if isinstance(value, str) else TypeError
        raise _refuse(name, value, '"lru" (least recently used), "adaptive" or "none"', error)
    return cast(PolicyName, value)


def parse_upstream(name: str, value: Any) -> Upstream:
    """The name of a library that reads URLs."""
    if not isinstance(value, str) or value not in get_args(Upstream):
        error = ValueError if isinstance(value, str) else TypeError
        raise _refuse(name, value, '"auto" (obstore where it can, else fsspec), "obstore" or "fsspec"', error)
    return cast(Upstream, value)


def parse_min_free(name: str, value: Any) -> float | int:
    """The reserve of free disk: a float below 1 is a fraction of the file system, an int is bytes."""
    accepted = 'a share such as "5%", a fraction below 1, or a size such as "20 GB"'
    share = value
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = float(value.strip()[:-1]) / 100
        except ValueError:
            raise _refuse(name, value, accepted) from None
    if isinstance(share, float):
        if not 0 <= share < 1:
            raise _refuse(name, value, accepted)
        return share
    try:
        size = parse_size(name, value)
    except (TypeError, ValueError) as error:
        raise _refuse(name, value, accepted, type(error)) from None
    if size is None:
        raise _refuse(name, value, accepted, TypeError)
    return size


def shown_min_free(reserve: float | int) -> str:
    """The reserve of free disk for people: ``"5%"`` or a size."""
    return f"{100 * reserve:.4g}%" if isinstance(reserve, float) else shown_size(reserve)


def parse_seconds(name: str, value: Any) -> float:
    """A positive, finite number of seconds."""
    number = _number(value)
    if number is None or not 0 < number < math.inf:
        raise _refuse(name, value, "a number of seconds above 0", ValueError if _is_number(value) else TypeError)
    return number


def parse_threads(name: str, value: Any) -> int:
    """A positive number of threads."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(name, value, "a whole number of threads, 1 or more", TypeError)
    if value < 1:
        raise _refuse(name, value, "a whole number of threads, 1 or more")
    return value


# a context variable, because a pickle may be loaded while another thread opens a store
_looks: Final[ContextVar[bool]] = ContextVar("_looks", default=True)


@contextmanager
def as_found() -> Iterator[None]:
    """A context in which `parse_root` does not check the path on the disk.

    For a root that was chosen on another machine (a copy) or by default: an error is then a fault of the cache, and
    reads continue.
    """
    token = _looks.set(False)
    try:
        yield
    finally:
        _looks.reset(token)


def parse_root(root: Any, name: str = "root") -> Path:
    """The root as an absolute path; raises `ValueError` or `TypeError` for other values and for files."""
    accepted = "a directory of this user's, or a path where one can be made"
    text = os.fspath(root) if isinstance(root, str | os.PathLike) else root
    if not isinstance(text, str):
        raise TypeError(f"{name}={root!r} is not accepted: give {accepted}")
    if "://" in text:
        # never with its value, which may hold a password
        raise ValueError(f"{name} is a URL, which is not accepted: give {accepted}")
    if not text:
        # an empty text is more likely an unset variable than the working directory
        raise _refuse(name, root, accepted)
    if "\0" in text:
        raise _refuse(name, root, accepted)
    path = Path(expanded(text)).absolute()
    if not _looks.get():
        return path
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise ValueError(f"{name}={str(root)!r} is a file: give {accepted}")
    except NotADirectoryError:
        raise ValueError(f"{name}={str(root)!r} lies beneath a file: give {accepted}") from None
    except UnicodeEncodeError:
        raise _refuse(name, root, accepted) from None
    except OSError:
        # the path is missing or inaccessible: reads must still work
        pass
    return path


def expanded(path: str) -> str:
    """A path with its ``~`` expanded; without a home, a path at the root, which only the superuser can create."""
    path = os.path.expanduser(path)
    return os.path.join(os.sep, path) if path.startswith("~") else path


_FLAGS: Final = {"true": True, "false": False}


def chosen(name: str, value: Any, parse: Callable[[str, Any], Any]) -> Any:
    """The given or configured value of a setting, parsed."""
    if not isinstance(value, Unset):
        return parse(name, allowed(name, value))
    warn_of_unknown_settings()
    value = config.get(name)
    if isinstance(value, str) and value.lower() in _FLAGS:
        # in an environment variable, as in YAML
        value = _FLAGS[value.lower()]
    return _configured(name, value, parse)


def _configured(name: str, value: Any, parse: Callable[[str, Any], Any]) -> Any:
    """A configured value, parsed; an error says where the value came from."""
    try:
        return parse(name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (from {origin_of(name)})") from None


def chosen_max_size() -> int | Unset | None:
    """The configured bound, or `UNSET` if it is the default.

    A directory keeps its bound; the default must not lower it.
    """
    value = config.get("max_size")
    return UNSET if value == DEFAULTS["max_size"] else _configured("max_size", value, parse_bound)


def origin_of(name: str) -> str:
    """Where the value of a setting came from, for people."""
    value, key = config.get(name, None), f"{config.env_prefix}{name.upper()}"
    if name in config.enforced and value == allowed(name, config.enforced[name][0]):
        path = config.enforced[name][1]
        return f"file {path}{_line_of(path, name)}, enforced"
    if key in config.env and _is_of_environment(key, value):
        return f"environment, {key}"
    for path, found in reversed(_yaml_files()):
        if found.get(name, found.get(name.replace("_", "-"), UNSET)) == value:
            return f"file {path}{_line_of(path, name)}"
    if name in (section := _of_dask()) and section[name] == value:
        return f"Dask's configuration, xzcache.{name}"
    return "default" if value == DEFAULTS.get(name) else "xzcache.config.set"


def _is_of_environment(key: str, value: Any) -> bool:
    collected = collect_env(config.env_prefix, {key: config.env[key]})
    return bool(collected == {key[len(config.env_prefix) :].lower(): value})


def _yaml_files() -> list[tuple[str, dict[str, Any]]]:
    """The configuration files in the order in which they are read, and their contents."""
    found = []
    for place in config.paths:
        for path in _files_in(place):
            found += [(path, _flat(each)) for each in collect_yaml([path]) if isinstance(each, dict)]
    return found


def _line_of(path: str, name: str) -> str:
    """The line of a configuration file that has a name, for people; empty if it is not found."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeError):
        return ""
    spelled = "[_-]".join(map(re.escape, re.split("[_-]", name)))
    found = [at for at, line in enumerate(lines, 1) if re.match(rf"[\s{{,]*[\"']?{spelled}[\"']?\s*:", line)]
    return f", line {found[-1]}" if found else ""


def unknown_settings() -> list[str]:
    """One line for each configured name that is no setting of xzcache."""
    prefix, ours = config.env_prefix, {"CONFIG", "ROOT_CONFIG", "INTERNAL_INHERIT_CONFIG"}
    named = [(f"environment, {key}", key[len(prefix) :]) for key in config.env if key.startswith(prefix)]
    named = [(where, key.lower()) for where, key in named if key not in ours]
    named += [(f"file {path}{_line_of(path, str(name))}", str(name)) for path, found in _yaml_files() for name in found]
    named = [(where, name) for where, name in named if name != _ENFORCED]
    named += [(f"file {path}{_line_of(path, name)}", name) for name, (_, path) in config.enforced.items()]
    named += [("Dask's configuration", name) for name in _of_dask()]
    lines = []
    for where, name in named:
        if name.replace("-", "_") not in DEFAULTS:
            lines.append(f"{where}: {name} is no setting{_meant(name)}")
    return lines


@functools.cache
def warn_of_unknown_settings() -> None:
    """Log each name in the environment and in files that is no setting; once in a process, as files take time."""
    # a file may have become unreadable since it was read
    with suppress(OSError, ValueError):
        for line in unknown_settings():
            warn_of_unknown(line)
