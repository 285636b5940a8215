"""The guard is held for short times, however many entries are evicted and however slow the disk is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from zarr.core.buffer import default_buffer_prototype

import xzcache

ENTRIES = 240
PACKAGE = Path(xzcache.__file__).parents[1]
EVICT = "import sys, xzcache; print(xzcache.resize(1000, sys.argv[1]))"


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    attempt = ["strace", "-qq", "-o", os.devnull, "-e", "inject=getppid:delay_enter=1", "true"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_trace(), reason="system calls are made to take long by strace")
def test_on_a_slow_disk_few_entries_are_evicted_at_a_time(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    store = xzcache.LockedLocalStore(root, max_size=1_000_000)
    for number in range(ENTRIES):
        store.set_sync(f"a/c/{number}", default_buffer_prototype().buffer.from_bytes(bytes(1000)))
    store.directory.close()
    slow = ["-e", "trace=flock,unlink", "-e", "inject=unlink:delay_enter=2000"]
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), *slow, sys.executable, "-c", EVICT, str(root)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts = [0]
    for line in log.read_text().splitlines():
        if re.search(r"flock\(\d+, LOCK_EX\|LOCK_NB\) += 0", line):
            counts.append(0)
        elif f'"{root}/a/c/' in line:
            counts[-1] += 1
    assert ENTRIES - 1 <= sum(counts) <= ENTRIES
    # the first ones show how long it takes
    assert max(counts) <= 64
    late = [count for place, count in enumerate(counts) if count and sum(counts[:place]) > ENTRIES // 2]
    assert late
    assert max(late) <= 10, counts
