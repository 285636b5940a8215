"""Which parts of an object fit together. Pure functions.

What tells two states of an object apart is its *validator*: an ETag, a time of modification, as RFC 9110 has it. A part
whose source tells none gets one of its own, made of a *session* and a name. Parts of one session may be cached side by
side: when the later one came, the object was still what it had been. But bytes of two answers make no range.
"""

from __future__ import annotations

from typing import Final

_ONCE: Final = "once "

FIXED: Final = "fixed"
"""The validator of all parts of a source that can never change."""


def once(session: str, number: int = 0) -> str:
    """The validator of an answer whose source tells none; the session is a name that no other has."""
    return f"{_ONCE}{session}#{session[:12]}.{number}"


def tells(validator: str) -> bool:
    """Whether a validator is the source's own word, so that bytes that have the same one are of one state."""
    return bool(validator) and not validator.startswith(_ONCE)


def fits(validator: str, other: str) -> bool:
    """Whether parts with these validators may be cached side by side. An empty one, of an unknown state, fits none."""
    return bool(validator) and _session(validator) == _session(other)


def beside(validator: str, cached: str) -> str:
    """The validator of an answer that is to be cached beside what it was found to fit."""
    if tells(validator) or tells(cached) or not cached:
        return validator
    return f"{_session(cached)}#{validator.partition('#')[2]}"


def _session(validator: str) -> str:
    return validator.partition("#")[0] if validator.startswith(_ONCE) else validator
