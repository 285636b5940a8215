"""Executes a notebook, checks what its cells show, and saves the pictures: run_notebook.py NOTEBOOK FOLDER."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(path: Path, folder: Path) -> None:
    """Run every cell; a cell that raises or warns is an error."""
    notebook = nbformat.read(path, as_version=4)
    with_outputs = [number for number, cell in enumerate(notebook.cells) if cell.get("outputs")]
    assert not with_outputs, f"{path}: save the notebook without outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = 0
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                assert output.name == "stdout", f"cell {number}: {output.text}"
                print(output.text, end="")
            elif (image := output.data.get("image/png")) is not None:
                (folder / f"{path.stem}-{number}.png").write_bytes(base64.b64decode(image))
                pictures += 1
    nbformat.write(notebook, folder / path.name)
    print(f"{len(notebook.cells)} cells, {pictures} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
