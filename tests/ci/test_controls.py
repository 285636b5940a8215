"""The negative controls of the soaks: each changes a line that is still in the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "ci" / "soaks"))

from control import CONTROLS, broken


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_changes_the_package(name: str, tmp_path: Path) -> None:
    assert broken(CONTROLS[name], tmp_path) is None
