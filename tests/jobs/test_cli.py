"""The `mgmtn` command: which program runs, and what is said where none does."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "pydantic", "duckdb"}


def test_help_has_a_line_for_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in COMMANDS.items():
        assert any(shown.split(maxsplit=1) == [name, line] for shown in lines)
    assert max(map(len, lines)) <= 100


def test_help_imports_no_program():
    code = "import sys, jobs.cli; jobs.cli.main(['--help']); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & set(ended.stdout.splitlines()[-1].split())


def test_no_command_is_a_wrong_usage_that_shows_the_help(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: mgmtn COMMAND" in captured.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [("labl", "unknown command 'labl'; did you mean label?"), ("x", "unknown command 'x'; the commands are label, ")],
)
def test_an_unknown_command_is_refused_with_a_suggestion(capsys, typed, said):
    assert main([typed]) == 2
    assert said in capsys.readouterr().err


def test_a_module_that_is_no_command_cannot_be_run(capsys):
    assert main(["settings"]) == 2
    assert main(["../cli"]) == 2


def test_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mgmtn ")


def test_a_command_gets_the_rest_of_the_line_and_gives_its_exit_code(capsys, tmp_path):
    assert main(["query", str(tmp_path), "smiling"]) == 2
    assert "mgmtn query: " in capsys.readouterr().err
    assert main(["query", "--help"]) == 0
    assert "usage: mgmtn query LABELS [EXPRESSION]" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_program(name):
    assert importlib.util.find_spec(f"jobs.{name}") is not None


def test_a_closed_pipe_is_no_traceback():
    command = f"'{sys.executable}' -m jobs.cli --help | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "0\n"
    assert ended.stderr == ""
