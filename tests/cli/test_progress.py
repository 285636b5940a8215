"""`xzcache.progress`: what comes from the source and what from the cache, shown where a person waits."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from sources import memory_source

import xzcache

SCRIPT = """
import sys, numpy, zarr, xzcache
source = zarr.storage.MemoryStore()
zarr.create_array(source, name="a", data=numpy.arange(1000), chunks=(10,))
array = zarr.open_array(xzcache.CacheStore(source, cache_store=sys.argv[1]), path="a", mode="r")
for part in array, array, None:
    with xzcache.progress(interval=0.01):
        part is None or part[:]
"""


def test_what_a_block_read_is_counted(cache_kind: str, tmp_path: Path) -> None:
    source = memory_source()
    zarr.create_array(source, name="a", data=np.arange(100), chunks=(10,), compressors=None)
    cache: Any = tmp_path / "cache" if cache_kind == "directory" else zarr.storage.MemoryStore()
    array = zarr.open_array(xzcache.CacheStore(source, cache_store=cache), path="a", mode="r")
    text = io.StringIO()
    with xzcache.progress(file=text) as cold:
        array[:50]
        with xzcache.progress(display=False) as inner:
            array[:50]
    array[:50]
    assert (cold.misses, cold.hits, cold.bytes_from_source, cold.bytes_from_cache) == (5, 5, 400, 400)
    assert (inner.misses, inner.hits, inner.hit_rate) == (0, 5, 1.0)
    assert 0 < inner.seconds < cold.seconds
    assert cold.as_dict()["bytes_from_source"] == 400
    (line,) = text.getvalue().splitlines()
    assert re.fullmatch(
        r"cache: 5 reads, 400 B, [\d.]+ k?B/s \| source: 5 reads, 400 B, [\d.]+ k?B/s \| [\d.]+ s", line
    )
    assert "5 reads, 400 B" in repr(cold)
    assert "from the source" in cold._repr_html_()


def test_a_block_that_raises_is_counted(tmp_path: Path) -> None:
    text = io.StringIO()
    with pytest.raises(KeyError), xzcache.progress(file=text) as done:
        raise KeyError
    assert done.is_done
    assert "nothing was read in this process" in text.getvalue()


def test_what_fails_to_show_disturbs_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    with xzcache.progress(file=closed) as done:
        pass
    assert done.is_done


@pytest.mark.parametrize("value", [0, -1, "1", None, float("nan")])
def test_a_bad_interval_is_named(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="interval="):
        xzcache.progress(interval=value)


def test_a_pipe_gets_one_line_for_a_block(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")], capture_output=True, text=True, check=True, timeout=120
    )
    assert not done.stdout
    cold, warm, nothing = done.stderr.splitlines()
    assert "source: 100 reads" in cold
    assert "cache: 100 reads" in warm
    assert "source: 0 reads" in warm
    assert nothing.startswith("nothing was read in this process")
    assert not {"\r", "\x1b"} & set(done.stderr)


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_has_a_line_that_is_kept_up_to_date(rich: bool, tmp_path: Path) -> None:
    if rich:
        pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    script = SCRIPT if rich else f"import sys; sys.modules['rich.console'] = None\n{SCRIPT}"
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "cache")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    told = b""
    try:
        while piece := os.read(ours, 1 << 16):
            told += piece
    except OSError:
        # the terminal is gone with the process
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0, told.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode())
    assert "source: 100 reads" in text
    assert "cache: 100 reads" in text
    assert ("\x1b[" in told.decode()) is rich
    if not rich:
        assert all(len(line) <= 120 for line in re.split(r"[\r\n]+", text))
