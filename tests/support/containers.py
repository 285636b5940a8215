"""A container as an orchestrator makes it, as far as files go: other users, volumes that are not theirs, an odd HOME.

Commands run as another user in a mount namespace of their own, in which the interpreter can be read by all.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import processes
import pytest

import xzcache

USER = 54321
"""Somebody who has no line in /etc/passwd."""
PATIENCE = 120.0
_CLONE_NEWNS = 0x20000

_PACKAGE = Path(xzcache.__file__).parent.parent
_HERE = Path(__file__).parent


@cache
def _can_be() -> bool:
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "mount"))):
        return False
    attempt = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


needs_containers = pytest.mark.skipif(not _can_be(), reason="to be another user, and to mount, takes root")


@contextmanager
def reachable() -> Iterator[Path]:
    """A directory of this user's that others can read, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="xzcache-test-"))
    try:
        path.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


def _hidden() -> Iterator[str]:
    """Directories above the interpreter and the package that others cannot pass."""
    for place in {sys.base_prefix, sys.prefix, str(_PACKAGE)}:
        for above in reversed(Path(place).parents):
            if not above.stat().st_mode & 0o001:
                yield f"{above}\0{place}"
                break


def container(
    words: Sequence[str],
    *,
    mounts: Mapping[str | Path, str] | None = None,
    before: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    uid: int = USER,
    umask: int = 0o022,
    wrapper: Sequence[str] = (),
) -> list[str]:
    """The command line that runs a program as another user.

    Parameters
    ----------
    words : sequence of str
        Arguments of this Python.
    mounts : mapping
        Directories and the options of the memory file system that is mounted there, as ``"uid=0,mode=777"``; or
        ``"ro"``, which makes what is there read-only.
    before : sequence of str
        Shell commands that root runs in the container first.
    env : mapping
        Variables that are set; None takes one away.
    uid, umask : int
    wrapper : sequence of str
        What Python is started by.
    """
    script = _made(mounts, before)
    script.append(f"umask {umask:03o}")
    for name, value in (env or {}).items():
        script.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    script.append("cd /")
    user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    script.append("exec " + shlex.join([*user, *wrapper, sys.executable, *words]))
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", "\n".join(script)]


def _made(mounts: Mapping[str | Path, str] | None, before: Sequence[str]) -> list[str]:
    """The shell commands by which root makes the container that it is in."""
    script = ["set -e"]
    for number, pair in enumerate(sorted(_hidden())):
        above, place = map(shlex.quote, pair.split("\0"))
        keep = f"/mnt/{number}"
        script += [] if number else ["mount -t tmpfs -o mode=755 tmpfs /mnt"]
        script += [f"mkdir {keep}", f"mount --bind {place} {keep}"]
        script += [f"mount -t tmpfs -o mode=755 tmpfs {above}", f"mkdir -p {place}", f"mount --bind {keep} {place}"]
    for place, options in (mounts or {}).items():
        where = shlex.quote(str(place))
        if options == "ro":
            script += [f"mount --bind {where} {where}", f"mount -o remount,bind,ro {where}"]
        else:
            script.append(f"mount -t tmpfs -o {options} tmpfs {where}")
    return [*script, *before]


def environment() -> dict[str, str]:
    """Nothing that says where a cache might be."""
    out = ("XZCACHE_DIRECTORY", "XDG_CACHE_HOME", "TMPDIR")
    kept = {name: value for name, value in os.environ.items() if name not in out}
    path = os.pathsep.join(map(str, (_PACKAGE, _HERE, _HERE.parent / "files")))
    return {**kept, "PYTHONPATH": path, "XZCACHE_MIN_FREE": "0"}


def run(words: Sequence[str], **how: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a container, to its end."""
    line = container(words, **how)  # type: ignore[arg-type]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)


def run_forked(
    text: str,
    *arguments: object,
    mounts: Mapping[str | Path, str] | None = None,
    before: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    umask: int = 0o022,
) -> tuple[str, str]:
    """Run the text of a program in a container, to its end, in a process that has imported the package already.

    For what does not depend on the environment in which an interpreter starts. Returns what it wrote.
    """
    variables = environment() | {name: value for name, value in (env or {}).items() if value is not None}
    for name in [name for name, value in (env or {}).items() if value is None]:
        variables.pop(name, None)
    words = [str(argument) for argument in arguments]
    return processes.run(_contained, "\n".join(_made(mounts, before)), variables, umask, text, words)


def _contained(
    link: Connection, script: str, variables: dict[str, str], umask: int, text: str, arguments: list[str]
) -> tuple[str, str]:
    # os.unshare came with Python 3.12
    assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["sh", "-c", script], check=True)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    # those of another environment
    tempfile.tempdir = None
    xzcache.config.refresh()
    return processes.execute(link, text, arguments)
