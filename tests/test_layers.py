"""The check of the import layers sees each kind of offence, and the package commits none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "ci" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layers = load_check()

FLOORS = {"__init__": 3, "store": 2, "parts": 1, "parts._left": 0, "parts._right": 0, "_errors": 0}
SOUND = {
    "__init__.py": "from .store import Store\nfrom pkg import _errors\n",
    "store.py": "import os\nimport pkg.parts\nfrom pkg.parts import _left, anything\nfrom . import parts\n",
    "parts/__init__.py": "from ._left import x\nfrom . import _right\n",
    "parts/_left.py": "import pkgother\nfrom other import pkg\n",
    "parts/_right.py": "",
    "_errors.py": "",
}


def check(tmp_path: Path, changed: Mapping[str, str] = SOUND, floors: Mapping[str, int] = FLOORS) -> list[str]:
    """Return the offences of the sound tree with some of its files replaced or added."""
    package = tmp_path / "pkg"
    for name, source in {**SOUND, **changed}.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return list(layers.offences(package, floors))


def test_a_sound_tree_has_no_offences(tmp_path: Path) -> None:
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "source", "imported"),
    [
        pytest.param("_errors.py", "import pkg.store", "store", id="above"),
        pytest.param("_errors.py", "from pkg.store import Store", "store", id="from-module"),
        pytest.param("_errors.py", "from .store import Store, x", "store", id="relative"),
        pytest.param("_errors.py", "from . import store", "store", id="relative-to-package"),
        pytest.param("_errors.py", "import pkg", "__init__", id="front-door"),
        pytest.param("_errors.py", "from pkg import Store", "__init__", id="name-of-front-door"),
        pytest.param("_errors.py", "from pkg.parts import _right", "parts._right", id="module-of-subpackage"),
        pytest.param("parts/_left.py", "from . import _right", "parts._right", id="same-floor"),
        pytest.param("parts/_left.py", "from . import anything", "parts", id="own-subpackage"),
        pytest.param("parts/_left.py", "from .. import store", "store", id="parent"),
        pytest.param("parts/__init__.py", "from ..store import Store", "store", id="parent-from-subpackage"),
        pytest.param("_errors.py", "def f():\n    import pkg.store", "store", id="in-function"),
        pytest.param("_errors.py", "if TYPE_CHECKING:\n    import pkg.store", "store", id="for-types"),
    ],
)
def test_an_import_that_does_not_run_downwards(tmp_path: Path, file: str, source: str, imported: str) -> None:
    (line,) = check(tmp_path, {file: source})
    assert line.startswith(f"pkg/{file}:{1 + source.count(chr(10))}: floor ")
    assert line.endswith(f" imports {imported} of floor {FLOORS[imported]}")


def test_a_module_without_a_floor(tmp_path: Path) -> None:
    offences = check(tmp_path, {"parts/_new.py": ""})
    assert offences == ["pkg/parts/_new.py: parts._new has no floor in the table"]


def test_a_floor_without_a_module(tmp_path: Path) -> None:
    offences = check(tmp_path, floors=FLOORS | {"_gone": 0})
    assert offences == ["pkg: the table has a floor for _gone, which is no module"]


@pytest.mark.parametrize("file", ["utils.py", "_common.py", "parts/_utils.py", "utils/__init__.py"])
def test_an_attic(tmp_path: Path, file: str) -> None:
    assert any(line.startswith(f"pkg/{file}: a module named") for line in check(tmp_path, {file: ""}))


def test_the_package_itself() -> None:
    assert list(layers.offences(ROOT / "xzcache", layers.FLOORS)) == []
