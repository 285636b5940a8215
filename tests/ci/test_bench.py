"""The harness of the benchmarks: what takes turns, what is counted, and what comes out of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# last: a module of the tests has the name of a benchmark
sys.path.append(str(ROOT / "ci" / "benchmarks"))

from _measure import Samples, alternate  # noqa: E402

rich = pytest.importorskip("rich")
from _report import OTHERS, OURS, TEXT, Report  # noqa: E402


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def worker(self, *seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        """Takes so long at each call; at the last one's pace once there are no more."""
        left = list(seconds)

        def work() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if log is not None:
                log.append(name)

        return work


def test_every_round_somebody_else_goes_first() -> None:
    clock, log = Clock(), list[str]()
    contestants = {name: clock.worker(1.0, log=log, name=name) for name in "abc"}
    alternate(contestants, warm_up=0, least=3, most=3, clock=clock)
    assert log == [*"abc", *"bca", *"cab"]


def test_warm_up_is_not_counted() -> None:
    clock = Clock()
    taken = alternate({"a": clock.worker(100.0, 50.0, 2.0)}, warm_up=2, least=3, most=3, clock=clock)
    assert taken["a"].seconds == (2.0, 2.0, 2.0)


def test_what_is_done_before_a_turn_is_not_counted() -> None:
    clock, seen = Clock(), list[str]()

    def before(name: str) -> None:
        clock.now += 1000
        seen.append(name)

    taken = alternate({"a": clock.worker(2.0)}, warm_up=0, least=2, most=2, budget=1e9, before=before, clock=clock)
    assert taken["a"].seconds == (2.0, 2.0)
    assert seen == ["a", "a"]


@pytest.mark.parametrize(("budget", "rounds"), [(0, 3), (10, 5), (1e9, 8)])
def test_the_budget_ends_it_but_not_before_there_are_enough_rounds(budget: float, rounds: int) -> None:
    clock = Clock()
    taken = alternate({"a": clock.worker(2.0)}, warm_up=0, least=3, most=8, budget=budget, clock=clock)
    assert len(taken["a"].seconds) == rounds


def test_a_call_may_do_many_of_what_is_measured() -> None:
    clock = Clock()
    assert alternate({"a": clock.worker(8.0)}, calls=4, least=2, most=2, clock=clock)["a"].median == 2.0


def test_a_ratio_is_of_medians_and_its_spread_is_round_by_round() -> None:
    """A machine that slows down slows both: the rounds agree, though the times do not."""
    ours, theirs = Samples((1.0, 2.0, 3.0)), Samples((2.0, 4.0, 6.0))
    assert ours.over(theirs) == (0.5, 0.5, 0.5)
    assert Samples((1.0, 1.0, 9.0)).over(Samples((2.0, 2.0, 2.0))) == (0.5, 0.5, 2.5)
    assert Samples((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)
    with pytest.raises(ValueError, match="same rounds"):
        ours.over(Samples((1.0,)))


def test_a_report_is_a_table_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with Report("trial", tmp_path / "out") as report:
        report.table("Times", ["who", "ms"], [("xzcache", "1.0"), ("other", "2.0")])
        report.bars("bars", "Bars", {"group": {"xzcache": 1.0, "other": 2.0}}, "ms")
        report.lines("lines", "Lines", {"xzcache": {1: 1.0, 2: 2.0}}, "n", "ms")
    text = (tmp_path / "out" / "trial.md").read_text()
    assert "| who | ms |\n| --- | ---: |\n| xzcache | 1.0 |\n| other | 2.0 |" in text
    for name in ("bars", "lines"):
        assert f"](trial-{name}.svg)" in text
        picture = (tmp_path / "out" / f"trial-{name}.svg").read_text()
        assert "xzcache" in picture
        # on a transparent background, in no colour that only one kind of page shows
        assert "#ffffff" not in picture
        assert "#000000" not in picture


def test_a_report_of_what_failed_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Report("trial", tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("colour", [TEXT, OURS, *OTHERS])
@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_can_be_read_on_light_and_dark_pages(colour: str, page: str) -> None:
    """By the rule of the Web Content Accessibility Guidelines."""

    def luminance(code: str) -> float:
        parts = [int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(colour), luminance(page)))
    assert (light + 0.05) / (dark + 0.05) >= (4 if colour == TEXT else 3)


def test_an_unknown_benchmark_is_refused_before_anything_is_installed() -> None:
    refused = subprocess.run(["bash", "ci/bench", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "there is no benchmark 'nothing'; there are:" in refused.stderr
    assert " warm" in refused.stderr
