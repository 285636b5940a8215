"""Takes the power away at every point of recorded work, and looks at what is read after the machine is up again.

The system calls of a process that works through a cache are recorded with their data. Each point of the record becomes
a disk as it may be found after the power went there: what was synced is whole; of what was not, data is there, missing,
cut short or full of zeros, and the last changes of names and attributes may be missing, too, in the order of a
journaling file system. The source is elsewhere, so it is as it was at that point. A process of a later boot then reads
everything, and the audit looks at the directory.

    ci/soak power                  a sample of the points
    ci/soak power --points 0       every point
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import _scenarios as scenarios
from faults import Forked, attach, audit

CALLS = (
    "openat,open,creat,write,pwrite64,pwritev,pwritev2,writev,ftruncate,truncate,fallocate,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,fsetxattr,setxattr,lsetxattr,utimensat,fsync,fdatasync,syncfs,close,link,linkat"
)
VARIANTS = ("all", "no data", "cut", "zeros", "late names lost")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
APART = "SOAK_HAS_MOUNTS_OF_ITS_OWN"


class Op(NamedTuple):
    """One change: what, to which path, with what."""

    what: str
    path: str
    arguments: tuple[object, ...] = ()


# -- the record

_LINE = re.compile(r"^(\d+)\s+(\w+)\((.*)\)\s*= (-?\d+)")
_FD = re.compile(r"^(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*|[^>]*)>")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def parse(log: str) -> Iterator[Op]:
    """The changes that a trace tells of, in order. Calls that another thread interrupted are put together first."""
    pending: dict[str, str] = {}
    for raw in log.splitlines():
        pid, _, line = raw.partition(" ")
        line = line.strip()
        if line.endswith("<unfinished ...>"):
            pending[pid] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if (resumed := re.match(r"<\.\.\. \w+ resumed>\s?(.*)", line)) is not None:
            line = pending.pop(pid, "") + resumed[1]
        match = _LINE.match(f"{pid} {line}")
        if match is None or int(match[4]) < 0:
            continue
        yield from _ops(match[2], match[3], int(match[4]))


def _paths(text: str) -> list[str]:
    return [unhex(found).decode() for found in _TEXT.findall(text)]


def _fd(text: str) -> str:
    match = _FD.match(text)
    name = match[1] if match is not None else ""
    return (unhex(name).decode() if name.startswith("\\x") else name).removesuffix(" (deleted)")


def _joined(folder: str, name: str) -> str:
    return name if name.startswith("/") else f"{folder}/{name}"


def _ops(call: str, text: str, result: int) -> Iterator[Op]:
    names = _paths(text) if "write" not in call and "setxattr" not in call else []
    fd = _fd(text)
    if call in ("openat", "open", "creat"):
        if "O_CREAT" in text or call == "creat":
            yield Op("create", _joined(fd, names[0]), ("O_TRUNC" in text,))
    elif call in ("write", "pwrite64"):
        data = unhex(_TEXT.findall(text)[0])[:result]
        at = int(text.rsplit(",", 1)[1]) if call == "pwrite64" else None
        yield Op("write", fd, (at, data))
    elif call in ("pwritev", "writev", "pwritev2"):
        raise RuntimeError(f"{call} is not understood here")
    elif call == "ftruncate":
        yield Op("truncate", fd, (int(text.rsplit(",", 1)[1]),))
    elif call == "truncate":
        yield Op("truncate", names[0], (int(text.rsplit(",", 1)[1]),))
    elif call == "fallocate":
        mode, offset, length = (part.strip() for part in text.split(",")[1:])
        if mode == "0":
            yield Op("grow", fd, (int(offset) + int(length),))
    elif call.startswith("rename"):
        folders = [unhex(f).decode() if f.startswith("\\x") else f for f in re.findall(r"<([^>]*)>", text)]
        folders = [*folders, "", ""][:2]
        yield Op("rename", _joined(folders[0], names[0]), (_joined(folders[1], names[1]),))
    elif call in ("unlink", "unlinkat"):
        what = "rmdir" if "AT_REMOVEDIR" in text else "unlink"
        yield Op(what, _joined(fd, names[0]))
    elif call in ("mkdir", "mkdirat"):
        yield Op("mkdir", _joined(fd, names[0]))
    elif call == "rmdir":
        yield Op("rmdir", names[0])
    elif call in ("fsetxattr", "setxattr", "lsetxattr"):
        strings = [unhex(found) for found in _TEXT.findall(text)]
        path = fd if call == "fsetxattr" else strings.pop(0).decode()
        yield Op("attribute", path, (strings[0].decode(), strings[1]))
    elif call in ("fsync", "fdatasync"):
        yield Op("sync", fd)
    elif call == "syncfs":
        yield Op("sync all", fd)
    elif call == "close":
        yield Op("close", fd)


# -- the disk


@dataclass(slots=True)
class Inode:
    """A file: what it holds, and what of that is known to be on the platter."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    position: int = 0
    attributes: dict[str, bytes] = field(default_factory=dict)


class Disk:
    """A file system in memory, as far as the record needs one."""

    def __init__(self) -> None:
        self.names: dict[str, Inode] = {}
        self.folders: set[str] = set()
        self.open: dict[str, Inode] = {}

    @classmethod
    def of(cls, *places: Path) -> Disk:
        disk = cls()
        for place in places:
            for here, _, files in os.walk(place):
                disk.folders.add(here)
                for name in files:
                    path = f"{here}/{name}"
                    data = Path(path).read_bytes()
                    attributes = {a: os.getxattr(path, a) for a in os.listxattr(path)}
                    disk.names[path] = Inode(bytearray(data), data, 0, attributes)
        return disk

    def inode(self, path: str) -> Inode | None:
        return self.names.get(path) or self.open.get(path)

    def apply(self, op: Op, *, names: bool = True) -> None:
        """Do what a call did; without `names`, only what it did to the contents of files."""
        if op.what == "create":
            if op.path not in self.names and names:
                self.names[op.path] = Inode()
            inode = self.names.get(op.path)
            if inode is not None:
                inode.position = 0
                if op.arguments[0]:
                    inode.data.clear()
        elif op.what == "rename" and names:
            target = str(op.arguments[0])
            if op.path in self.names:
                self.open[op.path] = self.names[op.path]
                self.names[target] = self.names.pop(op.path)
            else:
                self._rename_folder(op.path, target)
        elif op.what == "sync all":
            for inode in [*self.names.values(), *self.open.values()]:
                inode.synced = bytes(inode.data)
        elif op.what == "unlink" and names:
            if op.path in self.names:
                self.open[op.path] = self.names.pop(op.path)
        elif op.what == "mkdir" and names:
            self.folders.add(op.path)
        elif op.what == "rmdir" and names:
            self.folders.discard(op.path)
        elif (inode := self.inode(op.path)) is not None:
            self._change(inode, op)

    def _rename_folder(self, old: str, new: str) -> None:
        for path in [path for path in self.names if path.startswith(f"{old}/")]:
            self.names[new + path[len(old) :]] = self.names.pop(path)
        for path in [path for path in self.folders if path == old or path.startswith(f"{old}/")]:
            self.folders.discard(path)
            self.folders.add(new + path[len(old) :])

    @staticmethod
    def _change(inode: Inode, op: Op) -> None:
        if op.what == "write":
            where, data = op.arguments
            assert isinstance(data, bytes)
            at = inode.position if where is None else int(str(where))
            inode.data.extend(bytes(max(0, at - len(inode.data))))
            inode.data[at : at + len(data)] = data
            if where is None:
                inode.position = at + len(data)
        elif op.what == "truncate":
            size = int(str(op.arguments[0]))
            del inode.data[size:]
            inode.data.extend(bytes(size - len(inode.data)))
        elif op.what == "grow":
            inode.data.extend(bytes(max(0, int(str(op.arguments[0])) - len(inode.data))))
        elif op.what == "attribute":
            name, value = op.arguments
            assert isinstance(value, bytes)
            inode.attributes[str(name)] = value
        elif op.what == "sync":
            inode.synced = bytes(inode.data)

    def put(self, place: Callable[[str], str | None]) -> None:
        """Write it to a real disk, each path where `place` has it."""
        for folder in sorted(self.folders):
            if (path := place(folder)) is not None:
                Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, inode in self.names.items():
            if (path := place(name)) is not None:
                Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                Path(path).write_bytes(inode.data)
                os.chmod(path, 0o600)
                for attribute, value in inode.attributes.items():
                    os.setxattr(path, attribute, value)


def crash(start: Disk, record: list[Op], point: int, variant: str, source: str, chance: random.Random) -> Disk:
    """The disk after the power went before the operation number `point`."""
    disk = deepcopy(start)
    # a journal keeps the order of names; all that a sync came after is there
    last_sync = max([n for n, op in enumerate(record[:point]) if op.what in ("sync", "sync all")], default=0)
    kept = chance.randint(last_sync, point) if variant == "late names lost" else point
    for number, op in enumerate(record[:point]):
        is_source = op.path.startswith(source)
        disk.apply(op, names=is_source or number < kept)
    for path, inode in disk.names.items():
        if path.startswith(source) or bytes(inode.data) == inode.synced:
            continue
        if variant == "no data" or (variant == "late names lost" and chance.random() < 0.5):
            inode.data = bytearray(inode.synced)
        elif variant == "cut":
            keep = chance.randrange(len(inode.data) + 1)
            inode.data = inode.data[:keep] + inode.synced[keep:]
        elif variant == "zeros":
            at = chance.randrange(len(inode.data) + 1)
            inode.data[at : at + 4096] = bytes(len(inode.data[at : at + 4096]))
    return disk


# -- trials


class Trial(NamedTuple):
    scenario: str
    point: int
    variant: str
    seed: int


class Recorded(NamedTuple):
    place: Path
    start: Disk
    record: list[Op]


_records: dict[str, Recorded] = {}
"""What was recorded, by scenario; forked children find it here."""


def record(scenario: str, template: Path, place: Path) -> Recorded:
    scenarios.copy(template, place)
    source, cache = place / "source", place / "cache"
    start = Disk.of(source, cache)
    log = place / "trace"
    child = Forked(scenarios.perform, scenario, source, cache, waits=True)
    tracer = attach(child.pid, str(log), "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}")
    child.go()
    if wrong := child.wait():
        raise RuntimeError(f"{scenario} fails by itself: {wrong}")
    tracer.wait()
    roots = (f"{source}/", f"{cache}/")
    ops = [op for op in parse(log.read_text()) if f"{op.path}/".startswith(roots)]
    return Recorded(place, start, ops)


def attempt(trial: Trial) -> tuple[Trial, list[str]]:
    """Make the disk of one trial, then read and audit it."""
    recorded = _records[trial.scenario]
    here = recorded.place.parent / f"ground-{os.getpid()}"
    shutil.rmtree(here, ignore_errors=True)
    old_source = str(recorded.place / "source")
    disk = crash(recorded.start, recorded.record, trial.point, trial.variant, old_source, random.Random(trial.seed))
    disk.put(lambda path: str(here) + path[len(str(recorded.place)) :])
    source, cache = here / "source", here / "cache"
    source.mkdir(exist_ok=True)
    wrong = Forked(scenarios.read_all, source, cache).wait() or []
    wrong += [f"the audit: {line}" for line in Forked(audit, cache).wait() or []]
    return trial, wrong


def enter_another_boot(folder: Path) -> bool:
    """Begin again in a mount namespace in which the machine has the id of another boot; False where that fails."""
    fake = folder / "boot_id"
    fake.write_text("00000000-1111-2222-3333-444444444444\n")
    mount = ["mount", "--bind", str(fake), BOOT_ID]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/soak power", description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", type=int, default=40, help="points of each scenario; 0: every one")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if shutil.which("strace") is None:
        print("ci/soak power: strace is not here, nothing was tried")
        return 0
    if APART not in os.environ and os.geteuid() == 0 and shutil.which("unshare"):
        # what is mounted there is gone with the process, and no other process sees it
        os.environ[APART] = "yes"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="power-") as folder:
        top = Path(folder).resolve()
        template = top / "template"
        scenarios.make_source(template / "source")
        if wrong := Forked(scenarios.perform, "reading", template / "source", template / "cache").wait():
            print("\n".join(wrong))
            return 1
        trials = []
        for scenario in scenarios.SCENARIOS:
            recorded = _records[scenario] = record(scenario, template, top / scenario)
            count = len(recorded.record)
            points = list(range(count + 1))
            if options.points and options.points < count:
                points = sorted(chance.sample(points, options.points))
            trials += [Trial(scenario, p, variant, chance.randrange(1 << 30)) for p in points for variant in VARIANTS]
            print(f"{scenario}: {count} changes recorded", flush=True)
        booted = APART in os.environ and enter_another_boot(top)
        print(
            f"seed {seed}: {len(trials)} trials; the readers see another boot: {'yes' if booted else 'no'}", flush=True
        )
        bad = 0
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            for trial, wrong in pool.imap_unordered(attempt, trials):
                if wrong:
                    bad += 1
                    print(f"WRONG {trial}", *wrong[:6], sep="\n    ", flush=True)
    print(f"{len(trials)} crashes replayed; {bad} went wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
