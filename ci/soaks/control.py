"""Breaks the order of steps on purpose, and sees whether the soaks notice.

Each control is a copy of the package with one line changed, so that a promise no longer holds. A soak that runs over
the copy has to fail. A control whose line is no longer there fails as well: then it has to be written anew.

    ci/soak control                 all of them
    ci/soak control --only NAME
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import xzcache

WHOLE = Path(xzcache.__file__).parents[1]
"""Where the package is as it is."""


class Control(NamedTuple):
    """A promise that is broken, and who has to notice.

    Attributes
    ----------
    what : str
    changes : tuple of (str, str, str)
        Module, what stands there, and what stands there instead.
    soaks : tuple of str
        Commands; each has to end with 1.
    """

    what: str
    changes: tuple[tuple[str, str, str], ...]
    soaks: tuple[str, ...]


CONTROLS = {
    "bytes-before-unlink": Control(
        "space is given back before the file is unlinked, on a disk that is slow to unlink",
        (
            (
                "directory/_space.py",
                "        erased = self.erase(tombstones)\n",
                "        self.free_tombstones(tombstones)\n        time.sleep(0.2)\n"
                "        erased = self.erase(tombstones)\n",
            ),
            # small files are unlinked under the guard already
            ("directory/_space.py", "_SMALL: Final = 64 << 10", "_SMALL: Final = -1"),
        ),
        ("storm --seconds 20 --seed 3 --steady --snapshots 10",),
    ),
    "name-before-row": Control(
        "a file gets its name before its row is committed",
        (
            (
                "directory/_publish.py",
                "        index.commit()\n        for item in items:\n            try:\n",
                "        for item in items:\n            try:\n",
            ),
            (
                "directory/_publish.py",
                "                item.failure = _cause(error)\n\n    def _undo",
                "                item.failure = _cause(error)\n        index.commit()\n\n    def _undo",
            ),
        ),
        ("faults --scenario evicting --what KILL --call pwrite64 --positions 40",),
    ),
    "unknown-is-no": Control(
        "a file that cannot be looked at is taken for one that is not there",
        (
            (
                "files/_entryfile.py",
                "            return _look_without_stamps(path)\n        raise\n",
                "            return _look_without_stamps(path)\n        return Whose.GONE\n",
            ),
        ),
        ("faults --scenario evicting --what EIO --call lgetxattr --positions 0",),
    ),
    "no-checksum": Control(
        "the checksum of a file is not compared",
        (("files/_lookup.py", "files.checksum(data) != crc", "files.checksum(data) == -1"),),
        ("damage --files 300",),
    ),
    "deaf-fill": Control(
        "a fill that began before a write is stored all the same",
        (
            ("directory/_publish.py", "pending.version != versions.of(key)", "False"),
            ("directory/_publish.py", "version == versions.of(entry.key)", "True"),
        ),
        ("storm --seconds 40 --seed 3",),
    ),
    "bound": Control(
        "an entry is stored that was given no room",
        (
            (
                "directory/_space.py",
                "        room = totals.room\n        # some more",
                "        room = None\n        # some more",
            ),
        ),
        ("storm --seconds 20 --seed 3 --steady --snapshots 10",),
    ),
}


def broken(control: Control, place: Path) -> str | None:
    """Make a broken copy of the package; what is wrong with the control, if anything is."""
    shutil.copytree(Path(xzcache.__file__).parent, place / "xzcache")
    for module, old, new in control.changes:
        path = place / "xzcache" / module
        text = path.read_text() if path.exists() else ""
        if text.count(old) != 1:
            return f"{module} has {text.count(old)} times what is to be changed: {old!r}"
        path.write_text(text.replace(old, new))
    return None


def ends_with(soak: str, place: Path) -> int:
    """The exit code of a soak over the package in a folder."""
    name, *arguments = soak.split()
    script = Path(__file__).with_name(f"{name}.py")
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/soak control", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=sorted(CONTROLS))
    options = parser.parse_args()
    bad = 0
    for name in options.only or CONTROLS:
        control = CONTROLS[name]
        with tempfile.TemporaryDirectory(prefix="control-") as folder:
            if why := broken(control, Path(folder)):
                print(f"{name}: cannot be tried: {why}", flush=True)
                bad += 1
                continue
            for soak in control.soaks:
                if ends_with(soak, WHOLE) != 0:
                    print(f"{name}: ci/soak {soak}: fails over the package as it is, which says nothing", flush=True)
                    bad += 1
                    continue
                # 1 is what a soak ends with that found something; any other code is one that did not run
                seen = ends_with(soak, Path(folder)) == 1
                bad += not seen
                print(f"{name} ({control.what}): ci/soak {soak}: {'noticed' if seen else 'NOT NOTICED'}", flush=True)
    print(f"{bad} not noticed" if bad else "all noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
