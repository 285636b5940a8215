"""Validators: which cached parts of an object fit together. Pure functions.

A *validator* identifies the state of an object: an ETag or a time of modification, as in RFC 9110. If the source gives
none, a part gets a validator of a *session* and a number. Parts of one session may be cached side by side, because the
object was verified to be unchanged when the later one came. But bytes of two such answers never form one range.

The rules for reads in parts:

1. The reader of ranges knows their offsets from an earlier read, perhaps from the cache. So an object counts as
   replaced if a part that was cached before is known to be of another state than the source has now.
2. Two cases are known: the source gives both validators, of the same kind, and they differ; or the bytes were compared
   and differ. The call then fails with `Replaced`, and the cached parts are invalidated.
3. Nothing else is a replacement. An evicted entry, a missing validator, a validator of another kind and a failed
   request all mean "unknown".
4. If the state is unknown, all ranges of the call are fetched again, together and past the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


_ONCE: Final = "once "

FIXED: Final = "fixed"
"""The validator of all parts of a source that can never change."""


def session_validator(session: str, number: int = 0) -> str:
    """The validator of an answer for which the source gives none; the session must be unique."""
    return f"{_ONCE}{session}#{session[:12]}.{number}"


def is_from_source(validator: str) -> bool:
    """Whether the source gave the validator, so that equal validators mean equal states."""
    return bool(validator) and not validator.startswith(_ONCE)


def from_source(validators: Iterable[str]) -> set[str]:
    """The validators that the source gave."""
    return {validator for validator in validators if is_from_source(validator)}


def differ(validators: Iterable[str]) -> bool:
    """Whether validators are certainly of different states: two of one kind, an ETag and a time are none."""
    words = from_source(validators)
    return len({word.partition(" ")[0] for word in words}) < len(words)


def are_compatible(validator: str, other: str) -> bool:
    """Whether parts with these validators may be cached side by side. An empty one, of an unknown state, fits none."""
    return bool(validator) and _session(validator) == _session(other)


def adopt_session(validator: str, cached: str) -> str:
    """The validator under which an answer is cached beside parts that it was found to fit."""
    if is_from_source(validator) or is_from_source(cached) or not cached:
        return validator
    return f"{_session(cached)}#{validator.partition('#')[2]}"


def _session(validator: str) -> str:
    return validator.partition("#")[0] if validator.startswith(_ONCE) else validator
