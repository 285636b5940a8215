"""Runs the tests of zarr, xarray and dask with every store that Zarr opens read and written through the cache.

The same tests without the cache say what has to happen. What differs has to be in differences.toml, with its reason;
a difference that is not there fails the command, and so does an entry of the file for a test that no longer differs.

The tests come from the source distributions of the installed versions, which pip fetches once.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

PIPELINES = {
    "batched": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "fused": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "ours": "xzcache.pipeline.CachePipeline",
}
"""Zarr's default, its synchronous one, and the one of this package."""

STORES = {
    "plain": None,
    "lru": "through_cache:lru",
    "adaptive": "through_cache:adaptive",
    "locked": "through_cache:locked",
    # only to show that such stores are noticed
    "forgetful": "broken:forgetful",
    "stale": "broken:stale",
    "flipping": "broken:flipping",
}
"""What makes the stores that Zarr reads and writes of those that a test gives it."""

CACHES = ("lru", "adaptive")
BROKEN = ("forgetful", "stale", "flipping")

SLICE = {"ours": "adaptive"}
"""What a run of a few minutes compares: the store for each pipeline. The first one runs what takes long as well."""


@dataclass(frozen=True)
class Suite:
    """Tests of another project."""

    project: str
    tests: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    slice: tuple[str, ...] = ()
    """The tests that a run of a few minutes is made of, and arguments that leave some of them out."""
    long: tuple[str, ...] = ()
    """More of them, with the first pipeline only."""


_THOUSANDS = "--deselect=tests/test_resize.py::test_resize_bounds_pending_deletions"
"""It deletes thousands of chunks, to count the tasks that do."""

SUITES = [
    Suite(
        "zarr",
        ("tests",),
        (
            # they measure, or run what is fetched from the network
            *("--ignore=tests/benchmarks", "--ignore=tests/test_regression/scripts", "--ignore=tests/test_examples.py"),
            *("--ignore=tests/test_docs.py", "--ignore=tests/test_regression/test_v2_dtype_regression.py"),
            # they compare docstrings
            "--ignore=tests/test_api/test_synchronous.py",
        ),
        (
            *("tests/test_metadata/test_repair.py", "tests/test_metadata/test_io.py", "tests/test_api.py"),
            *("tests/test_resize.py", f"{_THOUSANDS}[1]", f"{_THOUSANDS}[None]"),
        ),
        # how the other pipeline reads shards through a cache, tests/store/test_pipeline.py compares
        (
            "tests/test_codecs/test_sharding.py",
            # shards within shards, and many partial writes: a third of the time, and no other difference
            "--deselect=tests/test_codecs/test_sharding.py::test_nested_sharding",
            "--deselect=tests/test_codecs/test_sharding.py::test_sharding_partial_readwrite",
        ),
    ),
    Suite(
        "xarray",
        tuple(
            f"xarray/tests/test_{part}.py"
            for part in (
                "backends",
                "backends_api",
                "backends_datatree",
                "distributed",
            )
        ),
        ("-k", "zarr or Zarr"),
        # a part of these is in tests/test_xarray_suite.py
        (),
    ),
    Suite(
        "dask",
        ("dask/array/tests/test_array_core.py", "dask/tests/test_distributed.py", "dask/tests/test_sizeof.py"),
        ("-k", "zarr"),
        ("dask/array/tests/test_array_core.py",),
    ),
]


@dataclass(frozen=True)
class Variant:
    """A suite, what decodes chunks, and which stores are read."""

    suite: str
    pipeline: str
    store: str = "plain"

    def __str__(self) -> str:
        return f"{self.suite} {self.pipeline} {self.store}"


class Outcome(NamedTuple):
    """How a test ended, and what it said."""

    end: str
    message: str = ""


Outcomes = dict[str, Outcome]


class Difference(NamedTuple):
    """A test that ends in another way with the cache than without it."""

    variant: Variant
    test: str
    without: Outcome
    through: Outcome

    def __str__(self) -> str:
        said = (self.through.message.strip().splitlines() or [""])[0][:300]
        return f"{self.variant}: {self.test}\n    {self.without.end}, with the cache {self.through.end}: {said}"


@dataclass
class Reason:
    """An entry of differences.toml: tests, by patterns in which only ``*`` means something, and why they differ."""

    tests: list[str]
    reason: str
    variants: list[str] = field(default_factory=lambda: ["*"])
    sometimes: bool = False
    """Whether the tests do not differ each time, as where processes race."""
    open: bool = False
    """Whether this is a fault of the cache, still to be mended."""

    def __post_init__(self) -> None:
        patterns = "|".join(re.escape(test).replace(r"\*", ".*") for test in self.tests)
        self._names = re.compile(f"(?:{patterns})\\Z", re.DOTALL)

    def covers(self, variant: Variant, test: str) -> bool:
        return any(fnmatch.fnmatchcase(str(variant), wanted) for wanted in self.variants) and bool(
            self._names.match(test)
        )


def read_reasons(path: Path) -> list[Reason]:
    table = tomllib.loads(path.read_text())
    return [Reason(**entry) for entry in table.get("difference", [])]


def source_of(project: str, sources: Path) -> Path:
    """The source distribution of the installed version, unpacked."""
    name = f"{project}-{version(project)}"
    if not (sources / name / "PKG-INFO").exists():
        sources.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=sources) as fetched:
            wanted = f"{project}=={version(project)}"
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--no-binary", ":all:", "--dest", fetched, wanted], check=True)
            (archive,) = Path(fetched).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(fetched, filter="data")
            (Path(fetched) / name).rename(sources / name)
    return sources / name


class Runner:
    """Runs suites, each in a process of its own.

    Parameters
    ----------
    sources : Path
        Where the source distributions are kept.
    jobs : int
        How many tests run at once.
    whole : bool
        Whether all tests are run, and not the slice of them.
    """

    def __init__(self, sources: Path, jobs: int, *, whole: bool) -> None:
        self._sources = sources
        self._jobs = jobs
        self._whole = whole
        self._ends: dict[Variant, Outcomes] = {}

    def run_together(self, runs: Sequence[tuple[Suite, Variant]]) -> None:
        """Run whole variants side by side, each in one process: workers of one variant import all of it as well."""
        for project in {suite.project for suite, _ in runs}:
            source_of(project, self._sources)
        apart = Runner(self._sources, 1, whole=self._whole)
        with ThreadPoolExecutor(self._jobs) as threads:
            ended = threads.map(lambda run: apart.run(*run), runs)
            self._ends.update({variant: ends for (_, variant), ends in zip(runs, ended, strict=True)})

    def run(self, suite: Suite, variant: Variant, only: Sequence[str] = ()) -> Outcomes:
        """How the tests end, or some of them; whole variants run once."""
        if only:
            return self._run(suite, variant, only)
        if variant not in self._ends:
            self._ends[variant] = self._run(suite, variant)
        return self._ends[variant]

    def _run(self, suite: Suite, variant: Variant, only: Sequence[str] = ()) -> Outcomes:
        begun = time.monotonic()
        source = source_of(suite.project, self._sources)
        some = suite.slice + (suite.long if variant.pipeline == next(iter(SLICE)) else ())
        tests = only or (suite.tests if self._whole else some)
        with tempfile.TemporaryDirectory(prefix="xzcache-suites-", ignore_cleanup_errors=True) as scratch:
            ends, cache = Path(scratch) / "ends.json", Path(scratch) / "cache"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "through_cache", "-p", "no:cacheprovider"]
            # what their own configuration adds asks for plugins that measure
            command += ["-o", "addopts=", "-o", "log_cli=false", "-o", "asyncio_default_fixture_loop_scope=function"]
            command += ["--timeout", "300", "--outcomes", str(ends)]
            command += ["--pipeline", PIPELINES[variant.pipeline]]
            if self._jobs > 1:
                command += ["-n", str(self._jobs), "--dist", "worksteal"]
            if wrapping := STORES[variant.store]:
                command += ["--wrapping", wrapping, "--cache", str(cache)]
            names = Path(scratch) / "tests"
            names.write_text("\n".join(tests))
            command += [*suite.arguments, f"@{names}"]
            done = subprocess.run(
                command,
                cwd=source,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith(("XZCACHE_", "ZARR_"))},
                    "PYTHONPATH": str(HERE),
                    "TMPDIR": scratch,
                    "HYPOTHESIS_PROFILE": "ci",
                    # no test may touch the cache of this user, nor find it turned off where a disk is nearly full
                    "XZCACHE_DIRECTORY": str(Path(scratch) / "default"),
                    "XZCACHE_MIN_FREE": "0",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            if done.returncode not in (0, 1) or not ends.exists():
                sys.exit(f"{variant}: pytest gave up with {done.returncode}\n{done.stdout[-3000:]}")
            if variant.store in CACHES and not any(cache.rglob("*")):
                sys.exit(f"{variant}: nothing was cached, so that nothing was compared")
            outcomes = {test: Outcome(*ended) for test, ended in json.loads(ends.read_text()).items()}
        if not only:
            counted = Counter(outcome.end for outcome in outcomes.values()).most_common()
            told = ", ".join(f"{count} {end}" for end, count in counted)
            print(f"{variant}: {len(outcomes)} tests, {told}; {time.monotonic() - begun:.0f} s", flush=True)
        return outcomes


def differences(variant: Variant, without: Outcomes, through: Outcomes) -> list[Difference]:
    missing = Outcome("not run")
    pairs = [(test, without.get(test, missing), through.get(test, missing)) for test in sorted({*without, *through})]
    return [Difference(variant, test, *ends) for test, *ends in pairs if ends[0].end != ends[1].end]


@dataclass
class Comparison:
    """What differs, and each test that ran in each variant."""

    differing: list[Difference] = field(default_factory=list)
    ran: list[tuple[Variant, str]] = field(default_factory=list)

    def of(self, runner: Runner, suite: Suite, pipeline: str, stores: Sequence[str]) -> None:
        """Run the tests of a suite as they are, and then with other stores."""
        plain = Variant(suite.project, pipeline)
        without = runner.run(suite, plain)
        for store in stores:
            variant = Variant(suite.project, pipeline, store)
            through = runner.run(suite, variant)
            found = differences(variant, without, through)
            if found and store not in BROKEN:
                # a test that does not always end in the same way without the cache says nothing about the cache
                again = runner.run(suite, plain, [difference.test for difference in found])
                steady = [d for d in found if again.get(d.test, d.without).end == d.without.end]
                print(f"    {len(steady)} differ, {len(found) - len(steady)} are not steady without it", flush=True)
                found = steady
            self.differing += found
            self.ran += [(variant, test) for test, outcome in through.items() if outcome.end != "skipped"]

    def without_reason(self, reasons: Sequence[Reason]) -> list[Difference]:
        return [d for d in self.differing if not any(reason.covers(d.variant, d.test) for reason in reasons)]

    def no_longer(self, reasons: Sequence[Reason]) -> list[str]:
        """Entries for tests that ran and did not differ."""
        differing = {(difference.variant, difference.test) for difference in self.differing}
        same = [pair for pair in self.ran if pair not in differing]
        return [
            f"{variant}: {test} does not differ; its entry says: {reason.reason}"
            for reason in reasons
            if not reason.sometimes
            for variant, test in same
            if reason.covers(variant, test)
        ]

    def names_no_test(self, reasons: Sequence[Reason]) -> list[str]:
        """Entries for tests that did not run, which matters once all were run."""
        return [
            f"no test differs of those of the entry that says: {reason.reason}"
            for reason in reasons
            if not reason.sometimes and not any(reason.covers(d.variant, d.test) for d in self.differing)
        ]


_NOTICING = (
    *("tests/test_resize.py", _THOUSANDS),
    "tests/test_metadata/test_repair.py::test_stale_handle_write_after_resize_keeping_zero",
)


def check_that_it_notices(sources: Path, jobs: int) -> list[str]:
    """Compare with stores that are broken on purpose; what was not noticed."""
    suite = replace(SUITES[0], slice=_NOTICING, long=())
    runner = Runner(sources, jobs, whole=False)
    runner.run_together([(suite, Variant(suite.project, "batched", store)) for store in ("plain", *BROKEN)])
    unnoticed = []
    for store in BROKEN:
        found = Comparison()
        found.of(runner, suite, "batched", [store])
        everything = [Reason(["*"], "all tests")]
        if not found.without_reason([]):
            unnoticed.append(f"no test noticed the store {store}, which is broken on purpose")
        elif found.without_reason(everything) or not found.no_longer(everything):
            unnoticed.append("reasons are not compared with what differs")
    return unnoticed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ci/suites", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, required=True, help="where the source distributions are kept")
    parser.add_argument("--slice", action="store_true", help="a part of the tests, in one variant: minutes")
    parser.add_argument("--suite", action="append", choices=[suite.project for suite in SUITES], help="only this suite")
    parser.add_argument("--pipeline", action="append", choices=list(PIPELINES), help="only this codec pipeline")
    parser.add_argument("--store", action="append", choices=[*CACHES, "locked"], help="only this kind of store")
    parser.add_argument("-n", "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests at once")
    parser.add_argument("--report", type=Path, help="where the differences are written, with their messages, as JSON")
    parser.add_argument("--self-test", action="store_true", help="only show that stores broken on purpose are noticed")
    options = parser.parse_args()

    faults = check_that_it_notices(options.sources, options.jobs) if options.slice or options.self_test else []
    found = Comparison()
    reasons = read_reasons(HERE / "differences.toml")
    if not options.self_test:
        runner = Runner(options.sources, options.jobs, whole=not options.slice)
        if options.slice and not (options.suite or options.pipeline or options.store):
            # those that take long first
            runner.run_together(
                [
                    (suite, Variant(suite.project, pipeline, store))
                    for suite in SUITES
                    for pipeline in SLICE
                    for store in (SLICE[pipeline], "plain")
                    if suite.slice
                ]
            )
        for suite in SUITES:
            if (options.suite and suite.project not in options.suite) or (options.slice and not suite.slice):
                continue
            for pipeline in options.pipeline or (SLICE if options.slice else PIPELINES):
                stores = options.store or ([SLICE[pipeline]] if options.slice else CACHES)
                if pipeline == "batched" and not (options.store or options.slice):
                    # what decodes makes no difference to it
                    stores = [*stores, "locked"]
                found.of(runner, suite, pipeline, stores)
    if options.report:
        told = [(str(d.variant), d.test, d.without, d.through) for d in found.differing]
        options.report.write_text(json.dumps(told, indent=1))
    faults += [f"without a reason: {difference}" for difference in found.without_reason(reasons)]
    faults += found.no_longer(reasons)
    if not (options.self_test or options.slice or options.suite or options.pipeline or options.store):
        faults += found.names_no_test(reasons)
    for reason in reasons:
        covered = [d for d in found.differing if reason.covers(d.variant, d.test)]
        if covered:
            print(f"{len(covered)} differ{', OUR FAULT' if reason.open else ''}: {reason.reason}")
    for fault in faults:
        print(fault)
    print(f"{len(found.differing)} differences, {len(faults)} to look into")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
