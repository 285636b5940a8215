"""Runs every example of README.md and of the pages of `docs/` against servers of this machine.

Each page is one session: its blocks of Python run in their order, in one process, and its commands after `$ xzcache`
between them. The S3 server has a bucket with small datasets, so that the examples run as they are written. A block
after a comment `<!-- not run: ... -->` is compiled only.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from _s3 import s3_server  # noqa: E402

_FENCE: Final = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN: Final = re.compile(r"<!-- not run: [^>]*-->\s*\Z")


_LONGEST: Final = 150
"""Seconds for one page."""


class Block(NamedTuple):
    """One block of a page."""

    language: str
    line: int
    text: str
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of Python and of commands of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        language = "console" if fence[2].startswith("$ xzcache ") else fence[1]
        if language in ("python", "console"):
            before = text[: fence.start()]
            yield Block(language, before.count("\n") + 1, fence[2], _NOT_RUN.search(before) is None)


def pages() -> list[Path]:
    """All pages that have a block."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if any(blocks(page))]


def run(page: Path) -> None:
    """Run one page in this process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    text = "".join(block.text for block in blocks(page))
    if "client." in text and "client = " not in text:
        from distributed import Client

        names["client"] = Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)  # type: ignore[no-untyped-call]
    for block in blocks(page):
        if block.language == "python":
            # the lines of the page, for a traceback
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if block.runs:
                exec(code, names)
        elif block.runs:
            from click.testing import CliRunner

            from xzcache.cli import cli

            for command in re.findall(r"^\$ xzcache (.*)$", block.text, re.MULTILINE):
                words = command.split("#")[0].split()
                # there is no terminal to ask at
                done = CliRunner().invoke(cli, [*words, *(["--yes"] if words[0] == "clear" else [])])
                if done.exit_code != 0:
                    raise SystemExit(
                        f"{page}:{block.line}: xzcache {command} ended with {done.exit_code}\n{done.output}"
                    )
    if "client" in names and "client = " not in text:
        names["client"].close()


def make(folder: Path) -> None:
    """The datasets that the pages read."""
    import numpy as np
    import xarray as xr

    values = np.random.default_rng(1).standard_normal((64, 60, 120)).astype("f4")
    dims = ("time", "latitude", "longitude")
    times = np.arange("2020-01-01", "2020-03-05", dtype="datetime64[D]").astype("datetime64[ns]")
    data = xr.Dataset({"t2m": (dims, values), "u10": (dims, -values)}, {"time": times})
    chunks = {"chunks": (4, 60, 120)}
    data.to_zarr(folder / "era5.zarr", encoding=dict.fromkeys(data, chunks), zarr_format=3)
    sharded = {"chunks": (1, 60, 120), "shards": (8, 60, 120)}
    data.to_zarr(folder / "sharded.zarr", encoding=dict.fromkeys(data, sharded), zarr_format=3)
    data = data.isel(time=slice(16))
    for year in (2024, 2025):
        begin = np.datetime64(f"{year}-01-01") - np.datetime64("2020-01-01")
        part = data.assign_coords(time=data["time"].values + begin)
        part.to_zarr(folder / f"{year}.zarr", encoding=dict.fromkeys(data, chunks), zarr_format=3)


def forked(act: Callable[..., None], *arguments: Any, home: Path, log: Path) -> bool:
    """Do something in a process of its own, which has imported everything already; whether it ended well."""
    import xzcache

    if (child := os.fork()) == 0:
        code = 1
        try:
            with open(log, "wb") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            os.chdir(home)
            os.environ["HOME"] = str(home)
            # of this page alone, also where workers of Dask are threads of this process
            xzcache.config.set(directory=str(home / ".cache" / "xzcache"))
            faulthandler.dump_traceback_later(_LONGEST, exit=True)
            act(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="parts of the names of pages")
    only = parser.parse_args().only
    failed = 0
    for name in [name for name in os.environ if name.startswith(("AWS_", "XZCACHE_", "XDG_"))]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="xzcache-docs-") as folder:
        scratch = Path(folder)
        bucket, log = scratch / "s3" / "bucket", scratch / "log"
        bucket.mkdir(parents=True)
        with s3_server(bucket.parent, anonymous=True) as server:
            os.environ |= {
                "AWS_ENDPOINT_URL": server.endpoint,
                "AWS_ACCESS_KEY_ID": "a",
                "AWS_SECRET_ACCESS_KEY": "b",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "XZCACHE_MIN_FREE": "0",
            }
            import distributed  # noqa: F401
            import xarray  # noqa: F401

            import xzcache.xarray  # noqa: F401

            if not forked(make, bucket, home=scratch, log=log):
                raise SystemExit(log.read_text())
            for page in pages():
                name = page.relative_to(ROOT).as_posix()
                # the session of such a page needs an environment of its own: ci/package runs it
                if (only and not any(word in name for word in only)) or "<!-- transcript -->" in page.read_text():
                    continue
                home = scratch / name.replace("/", "-")
                shutil.copytree(bucket, home / "data")
                begin = time.monotonic()
                ended_well = forked(run, page, home=home, log=log)
                count = sum(block.runs for block in blocks(page))
                print(f"{name}: {count} blocks, {time.monotonic() - begin:.1f} s", flush=True)
                if not ended_well:
                    failed += 1
                    print(log.read_text(errors="replace"), file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
