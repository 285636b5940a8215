"""`xarray.open_zarr(..., engine="zcache")`: adds a keyword to a function that has no engine parameter.

`xarray.open_dataset` selects engines; `xarray.open_zarr` always uses the engine ``"zarr"``. So `xarray.open_zarr` is
replaced by a function that adds one engine and passes all other calls on. A version of xarray whose `open_zarr` has an
engine parameter is not changed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any, Final

from xzcache._config import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


_HOME: Final = "xarray.backends.zarr"
_ORIGINAL: Final = "__xzcache_original__"
_ENGINE: Final = """
engine : {"zcache"}, optional
    Reads through this machine's cache, and takes all keywords of `xzcache.CacheStore`. Added by xzcache, whose own
    name is accepted as well."""


_opener: dict[str, Callable[..., Any]] = {}


def is_ours(engine: object) -> bool:
    """Whether an engine, by its name, the name of the package or its class, is the cache."""
    return engine in ("zcache", "xzcache") or getattr(engine, "is_zcache", False) is True


def original() -> Callable[..., Any]:
    """`xarray.open_zarr` as xarray has it."""
    import xarray.backends.zarr as home

    function: Callable[..., Any] = getattr(home.open_zarr, _ORIGINAL, home.open_zarr)
    return function


def attribute_warnings_to(function: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Make warnings of a function name the line of the user's call, as for a function of xarray."""
    # xarray passes over frames whose file begins with its directory; the path leads on to the file of the function, so
    # that a traceback shows its lines
    home, own = os.path.dirname(theirs.__code__.co_filename), os.path.realpath(function.__code__.co_filename)
    name = os.path.join(home, os.path.relpath(own, os.path.realpath(home)))
    function.__code__ = function.__code__.replace(co_filename=name)


def install(cached: Callable[..., Any]) -> None:
    """Add the engine to `xarray.open_zarr`, now or when xarray is imported; a second call has no effect.

    `cached` opens a dataset through the cache, with the parameters of `xarray.open_zarr`.
    """
    _opener["zcache"] = cached
    home = sys.modules.get(_HOME)
    if home is not None and hasattr(home, "open_zarr"):
        _teach(home)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        # importing xarray takes longer than importing this package, so do not import it here
        sys.meta_path.insert(0, _Watch())


def _teach(home: ModuleType) -> None:
    current = home.open_zarr
    if hasattr(current, _ORIGINAL) or "engine" in inspect.signature(current).parameters:
        return
    ours = _with_engine(current)
    globals()[ours.__name__] = ours
    # only names that still have xarray's function: another package may have replaced it
    for namespace in (home, sys.modules.get("xarray")):
        if getattr(namespace, "open_zarr", None) is current:
            vars(namespace)["open_zarr"] = ours


def _with_engine(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def open_zarr(store: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("engine") is None:
            kwargs.pop("engine", None)
        if not is_ours(kwargs.get("engine")):
            try:
                return theirs(store, *args, **kwargs)
            except TypeError as error:
                if (engine := kwargs.get("engine")) is None:
                    raise
                hint = nearest(engine, ("zcache",)) if isinstance(engine, str) else ""
                hint = hint or "; xr.open_dataset has the other engines"
                said = f'open_zarr() knows no engine but "zcache", not {engine!r}{hint}'
                raise TypeError(said) from error
        return _opener["zcache"](store, *args, **kwargs)

    signature = inspect.signature(theirs)
    engine = inspect.Parameter("engine", inspect.Parameter.KEYWORD_ONLY, default=None)
    *positional, last = signature.parameters.values()
    keywords = (last,) if last.kind is last.VAR_KEYWORD else ()
    parameters = (*positional, *(() if keywords else (last,)), engine, *keywords)
    vars(open_zarr).update({"__signature__": signature.replace(parameters=parameters), _ORIGINAL: theirs})
    for function in (open_zarr, _opener["zcache"]):
        attribute_warnings_to(function, theirs)
    # pickled by this name, a function that was sent to a worker brings the engine along
    open_zarr.__module__ = __name__
    before, returns, after = inspect.cleandoc(theirs.__doc__ or "").partition("\n\nReturns\n")
    open_zarr.__doc__ = before + _ENGINE + returns + after
    return open_zarr


def __getattr__(name: str) -> Any:
    if name == "open_zarr":
        import xarray

        return xarray.open_zarr
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Watch(MetaPathFinder):
    """Waits for the import of xarray's module, and then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOME:
            return None
        # removed first, because `find_spec` below asks all finders again
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Teaching(spec.loader)
        return spec


class _Teaching(Loader):
    """Loads the module with its own loader, then adds the engine."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            # the module's source is read through its loader
            module.__spec__.loader = module.__loader__ = self._loader
        _teach(module)
