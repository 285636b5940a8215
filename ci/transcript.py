"""Runs the session of a page of the documentation in a clean home and environment, and compares what it prints.

A page with the line `<!-- transcript -->` is one session of one shell: each `$ ` line of its blocks is run, in their
order, and must print what follows it there. Sizes, times, rates and digests may differ. A comment
`<!-- file: NAME -->` before a block makes the block a file, and `<!-- the server is stopped -->` does that.
`--write` puts what was printed into the page. The S3 server has a bucket with one dataset.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from _s3 import S3Server, s3_server  # noqa: E402

MARK: Final = "<!-- transcript -->"
_STOP: Final = "<!-- the server is stopped -->"
_PIECE: Final = re.compile(
    rf"{re.escape(_STOP)}|(?:<!-- file: (?P<file>\S+) -->\s*)?^```\w*[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
)
_HOME: Final = "/home/ann"
_SERVER: Final = "http://127.0.0.1:9000"
_MAKE: Final = """
import sys, numpy as np, xarray as xr
values = np.random.default_rng(1).standard_normal((64, 60, 120)).astype("f4")
dims = ("time", "latitude", "longitude")
coords = {
    "time": np.arange("2020-01-01", "2020-03-05", dtype="datetime64[D]").astype("datetime64[ns]"),
    "latitude": np.linspace(88.5, -88.5, 60),
    "longitude": np.arange(0, 360, 3.0),
}
data = xr.Dataset({"t2m": (dims, values), "u10": (dims, -values)}, coords)
data.to_zarr(sys.argv[1], encoding=dict.fromkeys(("t2m", "u10"), {"chunks": (4, 60, 120)}), zarr_format=3)
"""


class Piece(NamedTuple):
    """A block of a page, or the end of the server, where `text` is None."""

    start: int
    end: int
    text: str | None
    file: str | None


def pieces(page: str) -> list[Piece]:
    """The blocks of a page that the session needs, and the places where the server stops."""
    found = []
    for match in _PIECE.finditer(page):
        if match[0] == _STOP:
            found.append(Piece(match.start(), match.end(), None, None))
        elif match["file"] or match["text"].startswith("$ "):
            found.append(Piece(match.start("text"), match.end("text"), match["text"], match["file"]))
    return found


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of a block, each with what it prints."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


class Shell:
    """One shell that runs the commands of a session."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self._shown = {str(home): _HOME, environment["AWS_ENDPOINT_URL"]: _SERVER}
        self._process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=home,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[str, int]:
        """Run a command; returns what it printed, and its exit code."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        quoted = command.replace("'", "'\\''")
        into.write(f"eval '{quoted}' </dev/null 2>&1; printf '\\n=== %d\\n' $?\n")
        into.flush()
        lines: list[str] = []
        while not (lines and re.fullmatch(r"=== \d+\n", lines[-1])):
            line = out.readline()
            if not line:
                raise SystemExit(f"the shell ended in: {command}\n{''.join(lines)}")
            lines.append(line)
        code = int(lines.pop().split()[1])
        # the mark begins on a line of its own
        printed = "".join(lines)[:-1]
        if printed and not printed.endswith("\n"):
            printed += "\n"
        for real, shown in self._shown.items():
            printed = printed.replace(real, shown)
        return printed, code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def settled(printed: str) -> list[str]:
    """The words and counts of objects that two runs must share, without sizes, times, digests and widths of columns."""
    for pattern, by in (
        (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "NODE"),
        (r"-[0-9a-f]{20}\b", "-DIGEST"),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d\+00:00| UTC)", "MOMENT"),
        (r"\d+ of \d+ reads|after \d+ retries", "COUNT"),
        (r"(?m)^\d+ process(?:es)?\b.*", "PROCESSES"),
        (r"\d+(?:\.\d+)? ?(?:[kMG]?B)(?:/s)?(?![A-Za-z])", "SIZE"),
        (r"(?:just now|\d+ \w+ ago)(?: +\d+(?= ))?", "LATELY"),
        (r"\d+(?:\.\d+)? ?(?:s|ms|min|us)\b", "TIME"),
        (r"\d+\.\d+", "NUMBER"),
        (r"\d{4,}", "NUMBER"),
        (r"\d+%", "SHARE"),
        (r"[ \t]+", " "),
    ):
        printed = re.sub(pattern, by, printed)
    return [line.strip() for line in printed.splitlines()]


def session(page: str, server: ExitStack, shell: Shell) -> tuple[str, list[str]]:
    """Run a page; returns the page with what was printed, and the differences."""
    written, at, differences = [], 0, []
    for piece in pieces(page):
        if piece.text is None:
            server.close()
            continue
        if piece.file is not None:
            shell.run(f"cat >{piece.file} <<'END'\n{piece.text}END")
            continue
        shown = []
        for command, expected in commands(piece.text):
            printed, code = shell.run(command)
            if code:
                raise SystemExit(f"$ {command}\n{printed}ended with {code}")
            shown.append(f"$ {command}\n{printed}")
            differences += [
                f"$ {command}: {line}" for line in difflib.ndiff(settled(expected), settled(printed)) if line[0] in "+-"
            ]
        written += [page[at : piece.start], "".join(shown)]
        at = piece.end
    return "".join([*written, page[at:]]), differences


def environment(server: S3Server, home: Path, wheel: Path) -> dict[str, str]:
    """That of a user who has Python and an account, and knows of no other settings."""
    constraints = home.parent / "constraints.txt"
    # nothing else of this name, wherever it may come from
    constraints.write_text(f"xzcache=={wheel.name.split('-')[1]}\n")
    kept = re.compile(r"PATH|LANG|LC_ALL|TMPDIR|PIP_.*|SSL_.*|.*_proxy", re.IGNORECASE)
    return {
        **{name: value for name, value in os.environ.items() if kept.fullmatch(name)},
        "HOME": str(home),
        "PIP_CONSTRAINT": f"{constraints} {ROOT / 'ci' / 'constraints-newest.txt'}",
        "PIP_FIND_LINKS": f"{wheel.resolve().parent} {os.environ.get('PIP_FIND_LINKS', '')}".strip(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONWARNINGS": "ignore",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel that `pip install xzcache` finds")
    parser.add_argument("--python", default=sys.executable, help="one with xarray and zarr, which makes the dataset")
    parser.add_argument("--write", action="store_true", help="put what was printed into the pages")
    options = parser.parse_args()
    failed = 0
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if MARK not in page:
            continue
        with tempfile.TemporaryDirectory(prefix="xzcache-session-") as folder, ExitStack() as stack:
            bucket, home = Path(folder) / "s3" / "bucket", Path(folder) / "home"
            bucket.mkdir(parents=True)
            home.mkdir()
            subprocess.run([options.python, "-W", "ignore", "-c", _MAKE, bucket / "era5.zarr"], check=True, cwd=folder)
            server = stack.enter_context(ExitStack())
            shell = Shell(home, environment(server.enter_context(s3_server(bucket.parent)), home, options.wheel))
            stack.callback(shell.close)
            new, differences = session(page, server, shell)
        if options.write:
            path.write_text(new, encoding="utf-8")
        elif differences:
            failed += 1
            print(f"{path.relative_to(ROOT)} is not what its session prints:", *differences, sep="\n", file=sys.stderr)
        print(f"{path.relative_to(ROOT)}: {len(pieces(page))} blocks", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
