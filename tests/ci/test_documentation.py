"""What the documentation lists is what there is; `ci/docs` runs its examples and builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import xzcache
from xzcache import _config
from xzcache.manage import _statistics as served

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci"))

from documentation import blocks, pages  # noqa: E402
from release_files import differences  # noqa: E402

DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_setting_has_its_row_its_variable_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", page("reference/configuration.md").split("## Settings")[1], re.M))
    assert rows.keys() == _config.DEFAULTS.keys()
    for name, default in _config.DEFAULTS.items():
        variable, said, meaning = (cell.strip() for cell in rows[name].split(" | ", 2))
        assert variable == f"`XZCACHE_{name.upper()}`"
        shown = f"{default:g}" if isinstance(default, float) else repr(default).replace("'", '"')
        assert name == "directory" or said.strip("`") == shown
        assert meaning.strip(" |")


def test_every_keyword_of_cache_store_has_its_row() -> None:
    import inspect

    text = page("reference/configuration.md").split("## Settings")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    assert rows == set(inspect.signature(xzcache.CacheStore).parameters) - {"store"}


def test_every_name_of_the_package_is_in_the_reference() -> None:
    text = page("reference/api.md")
    elsewhere = {"__version__"}
    missing = {name for name in xzcache.__all__ if not re.search(rf"\b{name}\b", text)}
    assert missing == elsewhere


def test_every_metric_is_listed() -> None:
    prometheus = pytest.importorskip("xzcache.dask._prometheus")
    text = page("reference/metrics.md")
    exported = {f"{name}_total" for name, _ in [*prometheus._COUNTERS.values(), *prometheus._EVER.values()]}
    exported |= {name for name, _ in prometheus._GAUGES.values()}
    exported |= {name for name, _ in [*served._COUNTERS.values(), *served._GAUGES.values()]} | {"xzcache_up"}
    assert set(re.findall(r"^\| `(xzcache_\w+)` \| (?:counter|gauge) \|", text, re.M)) == exported
    stats = xzcache.CacheStats.__annotations__
    assert [name for name in stats if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_every_example_can_be_compiled(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            compile("\n" * block.line + block.text, str(path), "exec")


def test_links_of_readme_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            # what is generated for the site lies elsewhere in the repository
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1200


def test_the_files_of_a_release_agree() -> None:
    assert differences() == []
