"""Which parts of an object fit together. Pure functions.

What tells two states of an object apart is its *validator*: an ETag, a time of modification, as RFC 9110 has it. A part
whose source tells none gets one of its own, made of a *session* and a name. Parts of one session may be cached side by
side: when the later one came, the object was still what it had been. But bytes of two answers make no range.

The rules that reads in parts keep:

1. The reader of ranges has read before where in the object they are, maybe from the cache. So an object counts as
   replaced once a part of it that was cached before is known not to be of the state that the source has now.
2. That is known in two cases: the source names both states, in the same way, and the names differ; or bytes of the two
   were compared, and differ. The call then fails with `Replaced`, and what was cached is forgotten.
3. Nothing else is a replacement. An entry that was evicted or forgotten, a state that nothing names or that was named
   in another way, a failed look: these say that nobody can tell.
4. Where nobody can tell, all ranges of the call are asked for anew, together, past the cache, and served as they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


_ONCE: Final = "once "

FIXED: Final = "fixed"
"""The validator of all parts of a source that can never change."""


def session_validator(session: str, number: int = 0) -> str:
    """The validator of an answer whose source tells none; the session is a name that no other has."""
    return f"{_ONCE}{session}#{session[:12]}.{number}"


def is_from_source(validator: str) -> bool:
    """Whether a validator is the source's own word, so that bytes that have the same one are of one state."""
    return bool(validator) and not validator.startswith(_ONCE)


def from_source(validators: Iterable[str]) -> set[str]:
    """Those validators that are the source's own word."""
    return {validator for validator in validators if is_from_source(validator)}


def differ(validators: Iterable[str]) -> bool:
    """Whether validators are certainly of different states: two of one kind, an ETag and a time are none."""
    words = from_source(validators)
    return len({word.partition(" ")[0] for word in words}) < len(words)


def are_compatible(validator: str, other: str) -> bool:
    """Whether parts with these validators may be cached side by side. An empty one, of an unknown state, fits none."""
    return bool(validator) and _session(validator) == _session(other)


def adopt_session(validator: str, cached: str) -> str:
    """The validator of an answer that is to be cached beside what it was found to fit."""
    if is_from_source(validator) or is_from_source(cached) or not cached:
        return validator
    return f"{_session(cached)}#{validator.partition('#')[2]}"


def _session(validator: str) -> str:
    return validator.partition("#")[0] if validator.startswith(_ONCE) else validator
