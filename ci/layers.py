"""Checks that the imports inside the package run one way: from a floor to the floors below it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

# Every module of the package and its floor; subpackages as `folder`, their modules as `folder.module`.
FLOORS = {
    # the front door
    "__init__": 26,
    # what users hold: xarray's and Dask's ways in
    "xarray": 25,
    "dask": 24,
    "_cluster": 24,
    "_dashboard": 20,
    "_prometheus": 20,
    # what users hold: the store that reads through a cache
    "store": 23,
    "pipeline": 24,
    # between it and its cache: reading, writing, and everything that only the source can say
    "_writable": 19,
    "_writethrough": 18,
    "_ranges": 21,
    "_rangefetch": 20,
    "_rangeleads": 19,
    "_readable": 22,
    "_readthrough": 19,
    "_revalidation": 18,
    "_assembly": 18,
    "_reading": 17,
    "_sourceview": 17,
    "_places": 17,
    "_usage": 14,
    "_audit": 14,
    # the cache directory as a Zarr store by itself
    "local": 16,
    # what a process has of caches
    "_registry": 15,
    # the two kinds of cache, behind one interface
    "_shared": 14,
    "_anystore": 14,
    # the cache directory that processes share, blocking: whole, then part by part
    "_directory": 13,
    "_arrays": 12,
    "_writes": 11,
    "_doubts": 8,
    "_absences": 8,
    "_publisher": 10,
    "_background": 9,
    "_admission": 9,
    "_parcels": 8,
    "_leaders": 7,
    "_reader": 7,
    "_space": 6,
    "_keeper": 6,
    "_recovery": 5,
    "_books": 4,
    "_membership": 3,
    "_recency": 4,
    "_policies": 3,
    "_metering": 2,
    "_index": 2,
    # what a source is, and how it is read
    "_identity": 6,
    "_globs": 6,
    "_upstream": 6,
    "_sources": 5,
    "_filesystems": 4,
    "_objectstores": 4,
    "_manifests": 3,
    "_locations": 3,
    "_described": 2,
    "_urls": 1,
    "_credentials": 0,
    "_buckets": 0,
    # parts that do not know each other
    "_disk": 1,
    "_pieces": 1,
    "_spans": 0,
    "_states": 0,
    "_straight": 0,
    "_files": 1,
    "_looks": 0,
    "_opened": 2,
    "_flights": 1,
    "_nodes": 2,
    "_alone": 3,
    "_ledger": 1,
    "_freshness": 1,
    "_bytelocks": 2,
    "_locks": 1,
    "_notes": 1,
    "_history": 1,
    "_adaptive": 1,
    "_pool": 1,
    "_remembered": 1,
    "_schema": 1,
    "_open_zarr": 1,
    "_stats": 1,
    # values and exceptions
    "_config": 0,
    "_documents": 0,
    "_errors": 0,
    "_eviction": 0,
    "_reuse": 0,
    "_fork": 0,
    "_health": 1,
    "_keys": 0,
    "_quarantine": 0,
}
ATTICS = {"common", "utils"}


def offences(package: Path, floors: Mapping[str, int]) -> Iterator[str]:
    """Yield one line for each way in which the modules under `package` break the rules."""
    modules = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    for name in sorted(floors.keys() - modules.keys()):
        yield f"{package.name}: the table has a floor for {name}, which is no module"
    for name, path in modules.items():
        where = f"{package.name}/{path.relative_to(package).as_posix()}"
        source = path.read_text(encoding="utf-8")
        if ATTICS & {part.strip("_") for part in name.split(".")}:
            yield f"{where}: a module named utils or common has no subject; name it for its one idea"
        if name not in floors:
            yield f"{where}: {name} has no floor in the table"
            continue
        imports = _imports(ast.parse(source, where), path, package)
        for line, target in sorted({(line, _module(imported, modules)) for line, imported in imports}):
            # A target without a floor is reported by itself.
            if floors.get(target, -1) >= floors[name]:
                yield f"{where}:{line}: floor {floors[name]} imports {target} of floor {floors[target]}"


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def _imports(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import from the package, also inside functions."""
    folder = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package.name:
                yield node.lineno, name


def _module(imported: str, modules: Collection[str]) -> str:
    """Return the module that holds the imported name: itself, or the nearest package above it."""
    parts = imported.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts) or "__init__"


def main() -> int:
    """Check this checkout's package against the table."""
    found = list(offences(Path(__file__).resolve().parents[1] / "xzcache", FLOORS))
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"layers: {len(FLOORS)} modules, imports run one way")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
