"""A hook of MkDocs: pages and pictures that lie outside of `docs/`, and links as they are right in the repository.

Every link of a page is written for the repository, so that it works wherever the files are shown. Here it becomes a
link between pages of the site. A link to a file that is no page of the site loses its target.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "ARCHITECTURE.md": "contributing/architecture.md",
    "SECURITY.md": "contributing/security.md",
    "CHANGELOG.md": "contributing/changelog.md",
}
"""Files of the repository, and which page of the site each is."""
PICTURES: Final = "ci/benchmarks/results"

_LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie outside of `docs/`."""
    outside = {
        **PAGES,
        **{f"{PICTURES}/{each.name}": f"results/{each.name}" for each in (ROOT / PICTURES).glob("*.svg")},
    }
    for path, page in outside.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of the repository into those of the site."""
    here = page.file.src_uri
    outside = {name: path for path, name in PAGES.items()}
    source = outside[here] if page.file.generated_by is not None and here in outside else f"docs/{here}"

    def turned(link: re.Match[str]) -> str:
        target, _, anchor = link[3].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith(f"{PICTURES}/") and path.endswith(".svg"):
            path = f"docs/results/{posixpath.basename(path)}"
        name = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None:
            if not (ROOT / path).exists():
                raise ValueError(f"{source}: there is no {path}")
            return link[2]
        relative = posixpath.relpath(name, posixpath.dirname(here) or ".")
        return f"{link[1]}[{link[2]}]({relative}{'#' + anchor if anchor else ''})"

    if not os.path.exists(ROOT / source):
        raise ValueError(f"{here} has no source")
    return _LINK.sub(turned, markdown)
