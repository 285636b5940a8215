"""The command through the door, in this process: each command answers, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from xzcache.cli import cli, main

LOOKING = {"info", "ls", "check", "config"}
COMMANDS = {*LOOKING, "clear", "pin", "report", "resize", "serve-metrics", "top", "unpin", "warm"}


def test_each_command_says_what_it_is_for() -> None:
    assert set(cli.commands) == COMMANDS
    for words in ([], *([command] for command in COMMANDS)):
        said = CliRunner().invoke(cli, [*words, "--help"])
        assert said.exit_code == 0
        assert said.output.startswith("Usage: ")


@pytest.mark.parametrize("command", sorted(LOOKING))
def test_what_only_looks_answers_programs_and_makes_nothing(command: str, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, [command, "--json", "--directory", str(tmp_path / "cache")])
    assert said.exit_code == 0, said.output
    assert json.loads(said.output) is not None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "code"), [(["--version"], 0), (["nonsense"], 2), (["clear", "--older-than", "7"], 2)]
)
def test_the_process_ends_with_a_code(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert (len(err.splitlines()) == 1, bool(out)) == (bool(code), not code)
