"""Sweeps: tests that try one position after the other of a long series, such as each call that can fail.

CI tries a slice of the positions, `ci/test -m soak` all of them.
"""

from __future__ import annotations

import pytest


def sweep(every: int) -> pytest.MarkDecorator:
    """Gives a test `every`, the distance of its positions: 1, or that of the slice, which divides no cycle of calls."""
    whole = pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1800)], id="all")
    return pytest.mark.parametrize("every", [pytest.param(every, id="slice"), whole])
