"""Compares what is said of a release in several files, and the contents of the wheel and of the source distribution."""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONDA = {"dask": "dask-core"}
"""Packages that conda-forge calls otherwise."""


def differences(built: Path | None = None) -> list[str]:
    """One line for each thing that two files say differently."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    recipe = yaml.safe_load((ROOT / "ci/recipe/recipe.yaml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    found = []
    for name, version in {"CITATION.cff": citation["version"], "ci/recipe": recipe["context"]["version"]}.items():
        if str(version) != project["version"]:
            found.append(f"{name} has version {version}, pyproject.toml {project['version']}")
    wanted = {tuple(re.split("(?=>=)", each)) for each in project["dependencies"]}
    wanted = {(CONDA.get(name, name), bound) for name, bound in wanted} | {("python", project["requires-python"])}
    run = {tuple(each.split()) for each in recipe["requirements"]["run"] if not each.startswith("__")}
    found += [f"ci/recipe: {' '.join(each)} differs from pyproject.toml" for each in sorted(wanted ^ run)]
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    if recipe["build"]["python"]["entry_points"] != scripts:
        found.append(f"ci/recipe has other scripts than {scripts}")
    extras = set(project["optional-dependencies"]) - {"all"}
    of_all = re.fullmatch(r"xzcache\[(.*)\]", project["optional-dependencies"]["all"][0])
    if of_all is None or set(of_all[1].split(",")) != extras:
        found.append(f"the extra all lacks one of {sorted(extras)}")
    return found + (_differences_of_files(built) if built is not None else [])


def _differences_of_files(built: Path) -> list[str]:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        wheels = {name for name in archive.namelist() if name.startswith("xzcache/")}
    with tarfile.open(source) as tar:
        sources = {name.partition("/")[2] for name in tar.getnames()}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "xzcache").rglob("*")
        if path.suffix in (".html", ".py", ".typed")
    }
    found = [f"the wheel lacks or adds {name}" for name in sorted(wheels ^ here)]
    wanted = here | {"README.md", "LICENSE", "CITATION.cff", "ci/smoke.py", "mkdocs.yml", "tests/conftest.py"}
    return found + [f"the source distribution lacks {name}" for name in sorted(wanted - sources)]


def faults_of_recipe() -> list[str]:
    """Why the tool that builds for conda-forge cannot make a package of the recipe; building it needs their channel."""
    from rattler_build import RattlerBuildError, Stage0Recipe, VariantConfig

    try:
        rendered = Stage0Recipe.from_file(ROOT / "ci/recipe/recipe.yaml").render(VariantConfig())
    except RattlerBuildError as error:
        return [f"ci/recipe: {error}"]
    return [] if len(rendered) == 1 else [f"ci/recipe makes {len(rendered)} packages"]


if __name__ == "__main__":
    lines = differences(Path(sys.argv[1])) + faults_of_recipe()
    print("\n".join(lines) or "the files of the release agree")
    sys.exit(bool(lines))
