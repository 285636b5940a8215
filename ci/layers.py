"""Checks which room of the package imports which, that it does so through the door, and that no room has a cycle.

A room is a subpackage, or some modules of the package itself. Its door is its `__init__`: what `__all__` names there,
other rooms may import. What is imported for types only, or within a function, counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Final, NamedTuple

TABLE: Final[Mapping[str, str]] = {
    # room: rooms, or modules of the package itself, that it may import
    "__init__": "store local manage _xarray_hook xarray dask directory",
    "cli __main__": "manage xarray dask",
    "xarray": "store pipeline manage _xarray_hook sources",
    "dask": "store _caches directory reading",
    "manage": "store local _caches _display reading sources directory anystore",
    "store local pipeline _caches _display _xarray_hook": "reading sources directory anystore",
    "reading": "sources",
    "directory": "files index eviction",
    "eviction": "index",
    "index": "files",
    "anystore": "",
    "sources": "",
    "files": "",
    "model _config _threads _fork": "",
}
"""Modules of the package itself that share a row are one room. Every room may import those of the last row."""

EXCEPTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("local", "files"): "reads and deletes what others put into a cache directory, which is no entry",
}
"""A module and a room that it imports although its row does not say so, and why."""


class Import(NamedTuple):
    """One name that a module imports from the package, or uses of a room that it imported as a whole."""

    line: int
    path: tuple[str, ...]


def offences(
    package: Path, table: Mapping[str, str] = TABLE, exceptions: Mapping[tuple[str, str], str] = EXCEPTIONS
) -> Iterator[str]:
    """Yield one line for each import under `package` that breaks the rules."""
    paths = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    rooms = {member: row for row in table for member in row.split()}
    shared = set(list(table)[-1].split())
    trees = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in paths.items()}
    doors = {name: _door(trees[name]) for name in paths if paths[name].name == "__init__.py"}
    unused = set(exceptions)
    graphs: dict[str, dict[str, set[str]]] = {}
    for room in sorted(rooms.keys() - {name.split(".")[0] for name in paths}):
        yield f"{package.name}: the table has a row for {room}, which is not there"
    for name, path in paths.items():
        where = f"{package.name}/{path.relative_to(package).as_posix()}"
        own = name.split(".")[0]
        if own not in rooms:
            yield f"{where}: {own} is in no row of the table"
            continue
        graph = graphs.setdefault(rooms[own], {}).setdefault(name, set())
        for line, parts in _imports(trees[name], path, package):
            target = parts[0] if parts and parts[0] in rooms else "__init__"
            if rooms[target] == rooms[own]:
                graph.add(_module(parts, paths))
                continue
            if (name, target) in exceptions:
                unused.discard((name, target))
            elif target not in shared and target not in table[rooms[own]].split():
                yield f"{where}:{line}: {own} may not import {target}"
            if target in doors and len(parts) > 1 and (len(parts) > 2 or parts[1] not in doors[target]):
                yield f"{where}:{line}: {'.'.join(parts[1:])} is not a name in the door of {target}"
    for name, target in sorted(unused):
        yield f"{package.name}: {name} imports nothing of {target}: the exception can go"
    for members in graphs.values():
        try:
            TopologicalSorter({name: used - {name} for name, used in members.items()}).prepare()
        except CycleError as error:
            yield f"{package.name}: a cycle: {' > '.join(reversed(error.args[1]))}"


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def _door(tree: ast.Module) -> frozenset[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def _imports(tree: ast.Module, path: Path, package: Path) -> Iterator[Import]:
    """Yield what is imported from the package; of a room that is imported as a whole, each name that is used."""
    folder = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.name.split("."), alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) + 1 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            imported = [([*base, alias.name], alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for parts, name in imported:
            if parts[0] != package.name:
                continue
            yield Import(node.lineno, tuple(parts[1:]))
            if len(parts) == 2 and (package / parts[1]).is_dir():
                for line, used in _uses(tree, name or parts[-1]):
                    yield Import(line, (parts[1], used))


def _uses(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name:
            yield node.lineno, node.attr


def _module(parts: Sequence[str], paths: Mapping[str, Path]) -> str:
    """The module that holds an imported name: itself, or the nearest package above it."""
    parts = list(parts)
    while parts and ".".join(parts) not in paths:
        parts.pop()
    return ".".join(parts) or "__init__"


def main() -> int:
    """Check this checkout's package against the table."""
    found = list(offences(Path(__file__).resolve().parents[1] / "xzcache"))
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"layers: {len(TABLE)} rows, {len(EXCEPTIONS)} exception(s), no cycle")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
