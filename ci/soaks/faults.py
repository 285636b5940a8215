"""Makes real system calls on a cache directory fail, one after the other, and looks at what comes of it.

A process does scripted work through a cache while strace makes one of its system calls on the cache directory return an
error, or kills or stops the process there. Which calls there are is found from a trace of the same work, not from a
list. After each trial: every byte that the process read is right, so is every byte that a process reads which was there
all the time, and one that comes later; the audit of the directory finds nothing; the user's own file is as it was.

    ci/soak faults                   a sample of some minutes, as CI runs it
    ci/soak faults --positions 0     every call of every kind (hours)
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import _scenarios as scenarios

import xzcache

ERRNOS = ("ENOSPC", "EIO", "EACCES", "EROFS", "EMFILE", "ESTALE", "EDQUOT", "ENOENT", "EINTR")
SIGNALS = ("KILL", "STOP")
PATIENCE = 60.0
QUICK = {"lock_timeout": 0.5, "fetch_timeout": 1.0, "min_free": 0}
"""Settings under which a process that waits for a stopped one does not wait for long."""

_CALL = re.compile(r"^(\d+)\s+([a-z0-9_]+)\(")
_UNTOUCHED = {"exit", "exit_group", "mmap", "munmap", "fcntl", "poll", "select", "epoll_wait"}
"""Calls whose failure says nothing of the disk. Locks are taken by `fcntl`: it fails by EINTR and by what it locks."""


class Fault(NamedTuple):
    """One call to make fail: of a scenario, by name and number."""

    scenario: str
    call: str
    what: str
    number: int

    @property
    def is_signal(self) -> bool:
        return self.what in SIGNALS

    def __str__(self) -> str:
        return f"{self.scenario}: {self.call} no. {self.number}: {self.what}"


class Outcome(NamedTuple):
    """What a trial came to; `hit` is whether the call was made at all."""

    fault: Fault
    hit: bool
    wrong: list[str]


# -- processes


class Forked:
    """A child of this process, forked from it, that runs a function and sends back what it returns.

    Parameters
    ----------
    function : callable
        Its result is JSON.
    *arguments
    waits : bool
        Whether it waits for `go` first.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, waits: bool = False) -> None:
        begin, self._begin = os.pipe()
        self._answer, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._begin)
            os.close(self._answer)
            code = 1
            try:
                xzcache.config.set(QUICK)
                if waits:
                    os.read(begin, 1)
                text = json.dumps(function(*arguments)).encode()
                # what an interpreter does at its end, without the parent's own exit functions
                xzcache.cleanup_resources()
                while text:
                    text = text[os.write(answer, text) :]
                code = 0
            except BaseException:
                # `_exit` below would end the process without a word of it
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(begin)
        os.close(answer)

    def go(self) -> None:
        os.write(self._begin, b"g")

    def is_over(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        return True

    def wait(self, patience: float = PATIENCE) -> Any:
        """What the function returned; None if the process was killed, a line that says so if it raised."""
        chunks: list[bytes] = []
        end = time.monotonic() + patience
        while True:
            ready, _, _ = select.select([self._answer], [], [], max(0, end - time.monotonic()))
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.close()
                return [f"process {self.pid} did not end within {patience:.0f} s"]
            if not (chunk := os.read(self._answer, 65536)):
                break
            chunks.append(chunk)
        _, status = os.waitpid(self.pid, 0)
        self.close()
        if os.WIFSIGNALED(status):
            return None if os.WTERMSIG(status) == signal.SIGKILL else [f"killed by signal {os.WTERMSIG(status)}"]
        return json.loads(b"".join(chunks)) if chunks else [f"the process raised, exit code {status >> 8}"]

    def close(self) -> None:
        os.close(self._begin)
        os.close(self._answer)


def watch(source: Path, cache: Path, ready: int, go: int) -> list[str]:
    """Read everything, say so, wait; then read everything again: nothing stale may be remembered."""
    wrong = scenarios.read_all(source, cache)
    os.write(ready, b"r")
    os.read(go, 1)
    return wrong + scenarios.read_all(source, cache)


def audit(cache: Path) -> list[str]:
    """What the cache's own audit finds."""
    return [str(finding) for finding in xzcache.LockedLocalStore(cache).check().findings]


# -- strace


def attach(pid: int, output: str, *options: str) -> subprocess.Popen[str]:
    """Begin to trace a process; returns when the tracer is there."""
    command = ["strace", "-f", "-o", output, *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    for line in tracer.stderr:
        if "attached" in line:
            return tracer
    raise RuntimeError(f"strace cannot trace process {pid}")


def _has_stopped(log: Path) -> bool:
    return "--- stopped by SIGSTOP" in log.read_text(errors="replace")


class Ground:
    """A folder in which one trial after the other takes place.

    Parameters
    ----------
    place : Path
    template : Path
        What each trial begins with.
    """

    def __init__(self, place: Path, template: Path) -> None:
        self.place = place
        self.template = template
        self.source = place / "source"
        self.cache = place / "cache"

    def prepare(self) -> None:
        scenarios.copy(self.template, self.place)

    def survey(self, scenario: str) -> tuple[Counter[str], list[str]]:
        """The system calls of a scenario on the cache directory, and the paths that they are made with."""
        self.prepare()
        log = self.place / "trace"
        child = Forked(scenarios.perform, scenario, self.source, self.cache, waits=True)
        tracer = attach(child.pid, str(log), "-y", "-s", "4096", "-e", "trace=%file,%desc")
        child.go()
        if wrong := child.wait():
            raise RuntimeError(f"{scenario} fails without a fault: {wrong}")
        tracer.wait()
        calls: Counter[tuple[str, str]] = Counter()
        paths: set[str] = set()
        path = re.compile(re.escape(str(self.cache)) + r'[^">]*')
        for line in log.read_text(errors="replace").splitlines():
            found = path.findall(line)
            match = _CALL.match(line)
            if found and match is not None and match[2] not in _UNTOUCHED:
                calls[match[1], match[2]] += 1
                paths.update(found)
        # strace counts the calls of each thread by itself
        most: Counter[str] = Counter()
        for (_, call), count in calls.items():
            most[call] = max(most[call], count)
        return most, [os.path.relpath(p.removesuffix(" (deleted)"), self.place) for p in sorted(paths)]

    def trial(self, fault: Fault, paths: Sequence[str]) -> Outcome:
        """Make one call fail, and see what comes of it."""
        self.prepare()
        keepsake = self.cache / scenarios.NAMESPACE / scenarios.TAKEN / "notes"
        ready, told = os.pipe()
        begin, we_say = os.pipe()
        fill_now, we_order = os.pipe()
        bystander = Forked(watch, self.source, self.cache, told, begin)
        os.read(ready, 1)
        if fault.what == "STOP":
            filler = Forked(scenarios.fill, self.source, self.cache, told, fill_now)
            os.read(ready, 1)
        child = Forked(scenarios.perform, fault.scenario, self.source, self.cache, waits=True)
        how = f"signal=SIG{fault.what}" if fault.is_signal else f"error={fault.what}"
        places = itertools.chain.from_iterable(("-P", str(self.place / path)) for path in paths)
        log = self.place / "trace"
        inject = f"inject={fault.call}:{how}:when={fault.number}"
        tracer = attach(child.pid, str(log), *places, "-e", f"trace={fault.call}", "-e", inject)
        child.go()
        wrong: list[str] = []
        if fault.what == "STOP":
            end = time.monotonic() + PATIENCE
            while not _has_stopped(log) and not child.is_over() and time.monotonic() < end:
                time.sleep(0.005)
            os.write(we_order, b"g")
            # the one that is there already comes first: one that joins tidies up
            for scenario in ("filling", "evicting", "writing"):
                other = filler
                if scenario != "filling":
                    other = Forked(scenarios.perform, scenario, self.source, self.cache)
                wrong += [f"beside the stopped process: {line}" for line in other.wait() or []]
                if (size := scenarios.entry_bytes(self.cache)) > scenarios.BOUND:
                    wrong.append(f"beside the stopped process: {size} bytes on disk, {scenarios.BOUND} is the bound")
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGCONT)
        found = child.wait()
        # while it was stopped, the source changed behind what the scenario believes
        wrong += [] if fault.what == "STOP" else found or []
        tracer.wait()
        hit = "(INJECTED)" in log.read_text(errors="replace") or found is None or _has_stopped(log)
        os.write(we_say, b"g")
        wrong += [f"a process that was there: {line}" for line in bystander.wait() or []]
        wrong += [
            f"a later process: {line}" for line in Forked(scenarios.read_all, self.source, self.cache).wait() or []
        ]
        wrong += [f"the audit: {line}" for line in Forked(audit, self.cache).wait() or []]
        if not keepsake.exists():
            wrong.append("the user's file is gone")
        for fd in (ready, told, begin, we_say, fill_now, we_order):
            os.close(fd)
        return Outcome(fault, hit, wrong)


# -- the sweep


def faults_of(scenario: str, calls: Counter[str], positions: int, chance: random.Random) -> Iterator[Fault]:
    """What is to be tried of a scenario: each call, each errno and signal, at some positions or at all."""
    for call, count in sorted(calls.items()):
        for what in (*ERRNOS, *SIGNALS):
            # a close that is interrupted has closed; the others return the file's own errors
            numbers = range(1, count + 1)
            chosen = numbers if not positions or positions >= count else sorted(chance.sample(numbers, positions))
            for number in chosen:
                yield Fault(scenario, call, what, number)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/soak faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--positions", type=int, default=1, help="calls of each kind that are tried; 0: every one")
    parser.add_argument("--most", type=int, default=0, help="trials at the most, drawn at random; 0: no limit")
    parser.add_argument("--seed", type=int, default=None, help="of the choice of positions; printed")
    parser.add_argument("--scenario", action="append", choices=sorted(scenarios.SCENARIOS), help="only this one")
    parser.add_argument("--call", action="append", help="only this system call")
    parser.add_argument("--what", action="append", choices=[*ERRNOS, *SIGNALS], help="only this error or signal")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at once")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if shutil.which("strace") is None:
        print("ci/soak faults: strace is not here, nothing was tried")
        return 0
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        top = Path(folder).resolve()
        template = top / "template"
        scenarios.make_source(template / "source")
        scenarios.make_users_file(template / "cache")
        if wrong := Forked(scenarios.perform, "reading", template / "source", template / "cache").wait():
            print("\n".join(wrong))
            return 1
        plan: list[tuple[Fault, list[str]]] = []
        for scenario in options.scenario or scenarios.SCENARIOS:
            calls, paths = Ground(top / "survey", template).survey(scenario)
            print(f"{scenario}: " + ", ".join(f"{call} {count}" for call, count in sorted(calls.items())), flush=True)
            wanted = Counter({call: count for call, count in calls.items() if not options.call or call in options.call})
            plan += [(fault, paths) for fault in faults_of(scenario, wanted, options.positions, chance)]
        plan = [(fault, paths) for fault, paths in plan if not options.what or fault.what in options.what]
        if options.most and options.most < len(plan):
            plan = chance.sample(plan, options.most)
        print(f"seed {seed}: {len(plan)} trials", flush=True)
        # processes, not threads: each of them forks, and only a process of one thread may
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            trials = [(top, fault, paths) for fault, paths in plan]
            return report(pool.imap_unordered(_try, trials))


def _try(trial: tuple[Path, Fault, list[str]]) -> Outcome:
    top, fault, paths = trial
    return Ground(top / f"ground-{os.getpid()}", top / "template").trial(fault, paths)


def report(outcomes: Iterable[Outcome]) -> int:
    """Print what went wrong as it comes, then the figures; returns the exit code."""
    tried, hits, bad = 0, 0, 0
    sites: set[tuple[str, str]] = set()
    kinds: set[str] = set()
    for outcome in outcomes:
        tried += 1
        hits += outcome.hit
        sites.add((outcome.fault.scenario, outcome.fault.call))
        kinds.add(outcome.fault.what)
        if outcome.wrong:
            bad += 1
            print(f"WRONG {outcome.fault}", *outcome.wrong[:8], sep="\n    ", flush=True)
    print(
        f"{tried} trials at {len(sites)} call sites with {len(kinds)} errors and signals; "
        f"{hits} calls were made to fail; {bad} trials went wrong"
    )
    return 1 if bad or not hits else 0


if __name__ == "__main__":
    sys.exit(main())
