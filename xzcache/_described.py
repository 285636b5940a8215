"""Objects as text that is the same in every process, without what might be a credential."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Final

from xzcache._urls import sounds_secret, without_user

_WHOSE: Final = ("key", "username", "user", "access_key_id", "aws_access_key_id")
"""Names of options that say in whose name something is read: what is there may depend on it."""
_PASSING: Final = ("token", "session_token", "aws_session_token")
"""With one of these, the name is another one the next hour."""
_BOOKKEEPING: Final = ("_thread", "threading", "asyncio", "multiprocessing", "logging", "collections.Counter")


class Indescribable(Exception):
    """Nobody can tell from the outside what an object does."""


def described(value: Any, known: Callable[[Any], Iterator[str] | None]) -> Iterator[str]:
    """A value as text.

    Locks, events and loggers are nothing but their type: they change when bytes arrive, not which.

    Parameters
    ----------
    value : Any
    known : callable
        The text of a store or file system; None for anything else.

    Raises
    ------
    Indescribable
        It holds an object that could be anything.
    """
    if isinstance(value, str):
        yield repr(without_user(value))
    elif isinstance(value, bytes | int | float | bool | os.PathLike) or value is None:
        yield repr(value)
    elif isinstance(value, Mapping):
        yield "{"
        passing = any(value.get(name) for name in _PASSING)
        for name, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            if name in _WHOSE and isinstance(item, str) and not passing:
                yield f"{name}={blake2b(item.encode(), digest_size=16).hexdigest()}"
            elif isinstance(item, bool | int | float) or item is None or not sounds_secret(str(name)):
                yield f"{name}="
                yield from described(item, known)
        yield "}"
    elif isinstance(value, list | tuple | set | frozenset):
        yield "["
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from described(item, known)
        yield "]"
    elif (text := known(value)) is not None:
        yield from text
    elif type(value).__module__.startswith(_BOOKKEEPING):
        yield type(value).__qualname__
    elif getattr(value, "__qualname__", "<").isidentifier() and getattr(value, "__closure__", None) is None:
        # a function or class that can be imported
        yield f"{value.__module__}.{value.__qualname__}"
    else:
        raise Indescribable
