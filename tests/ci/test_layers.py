"""The check of the rooms sees each kind of offence, and the package commits none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "ci" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers = load_check()

TABLE = {"__init__": "store", "store _helper": "upper", "upper": "lower", "lower": "", "_errors": ""}
SOUND = {
    "__init__.py": "from .store import Store\nfrom pkg import _errors\n",
    "store.py": "import os\nfrom pkg import upper\nfrom pkg import _helper\nupper.left\n",
    "_helper.py": "from pkg.upper import left\n",
    "upper/__init__.py": "from ._left import left\n__all__ = ['left']\n",
    "upper/_left.py": "import pkgother\nfrom other import pkg\nfrom . import _right\nfrom pkg.lower import low\n",
    "upper/_right.py": "from pkg._errors import Wrong\n",
    "lower/__init__.py": "from pkg.lower._low import low\n__all__ = ['low']\n",
    "lower/_low.py": "",
    "_errors.py": "",
}


def check(
    tmp_path: Path,
    changed: Mapping[str, str] = SOUND,
    table: Mapping[str, str] = TABLE,
    exceptions: Mapping[tuple[str, str], str] | None = None,
) -> list[str]:
    """Return the offences of the sound tree with some of its files replaced or added."""
    package = tmp_path / "pkg"
    for name, source in {**SOUND, **changed}.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return list(layers.offences(package, table, exceptions or {}))


def test_a_sound_tree_has_no_offences(tmp_path: Path) -> None:
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        pytest.param("lower/_low.py", "from pkg.upper import left", "lower may not import upper", id="from-door"),
        pytest.param("lower/_low.py", "from pkg import upper", "lower may not import upper", id="door"),
        pytest.param("lower/_low.py", "import pkg.store", "lower may not import store", id="module"),
        pytest.param("lower/_low.py", "from ..store import Store", "lower may not import store", id="relative"),
        pytest.param("lower/_low.py", "import pkg", "lower may not import __init__", id="front-door"),
        pytest.param("lower/_low.py", "from pkg import Store", "lower may not import __init__", id="its-name"),
        pytest.param("_errors.py", "from .store import Store", "_errors may not import store", id="shared"),
        pytest.param("store.py", "from pkg.lower import low", "store may not import lower", id="not-in-row"),
        pytest.param("lower/_low.py", "def f():\n    import pkg.store", "lower may not import store", id="in-function"),
        pytest.param(
            "lower/_low.py", "if TYPE_CHECKING:\n    import pkg.store", "lower may not import store", id="for-types"
        ),
        pytest.param(
            "store.py", "from pkg.upper._left import left", "_left.left is not a name in the door of upper", id="inside"
        ),
        pytest.param("store.py", "from pkg.upper import x", "x is not a name in the door of upper", id="not-named"),
        pytest.param(
            "store.py", "from pkg import upper as u\nu.x", "x is not a name in the door of upper", id="not-named-use"
        ),
    ],
)
def test_an_import_that_is_not_allowed(tmp_path: Path, file: str, source: str, message: str) -> None:
    line = 1 + source.count("\n")
    assert check(tmp_path, {file: source}) == [f"pkg/{file}:{line}: {message}"]


def test_a_cycle_in_a_room(tmp_path: Path) -> None:
    (line,) = check(tmp_path, {"upper/_right.py": "if TYPE_CHECKING:\n    from pkg.upper._left import left\n"})
    assert line.startswith("pkg: a cycle: upper._")


def test_a_module_of_a_room_goes_round_its_door(tmp_path: Path) -> None:
    (line,) = check(tmp_path, {"upper/_right.py": "from pkg.upper import left\n"})
    assert line.startswith("pkg: a cycle: upper")


def test_a_module_in_no_row(tmp_path: Path) -> None:
    assert check(tmp_path, {"_new.py": ""}) == ["pkg/_new.py: _new is in no row of the table"]


def test_a_row_without_a_room(tmp_path: Path) -> None:
    offences = check(tmp_path, table={"gone": "", **TABLE})
    assert offences == ["pkg: the table has a row for gone, which is not there"]


def test_an_exception(tmp_path: Path) -> None:
    changed = {"lower/_low.py": "from pkg.upper import left"}
    assert check(tmp_path, changed, exceptions={("lower._low", "upper"): "because"}) == []


def test_an_exception_that_nothing_needs(tmp_path: Path) -> None:
    offences = check(tmp_path, exceptions={("lower._low", "upper"): "because"})
    assert offences == ["pkg: lower._low imports nothing of upper: the exception can go"]


def test_the_package_itself() -> None:
    assert list(layers.offences(ROOT / "xzcache")) == []
