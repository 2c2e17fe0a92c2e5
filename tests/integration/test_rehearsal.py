"""The rehearsal of two nights, once, on this machine: `python -m deploy.rehearsal`."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.rehearsal.checks import CHECKS
from deploy.rehearsal.processes import ROOT, having

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]


@dataclass(frozen=True)
class Rehearsal:
    """One that has ended; `report` is its rehearsal.json."""

    folder: Path
    exit_code: int
    stdout: str
    stderr: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus, of Debian's package of that name, is not on this machine")
    folder = tmp_path_factory.mktemp("rehearsal") / "report"
    command = [sys.executable, "-m", "deploy.rehearsal", "--output", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = folder / "rehearsal.json"
    assert report.exists(), ended.stderr
    return Rehearsal(folder, ended.returncode, ended.stdout, ended.stderr, json.loads(report.read_text("utf-8")))


@pytest.mark.parametrize("check", [check.__name__.replace("_", " ") for check in CHECKS])
def test_it_holds_that(rehearsal, check):
    [found] = [each for each in rehearsal.report["checks"] if each["name"] == check]
    assert found["wrong"] == []


def test_the_exit_code_and_the_printed_list_say_the_same(rehearsal):
    *lines, summary = rehearsal.stdout.splitlines()
    assert lines == [f"ok      {check['name']}" for check in rehearsal.report["checks"]]
    assert json.loads(summary)["failed"] == []
    assert rehearsal.exit_code == 0


def test_nothing_of_it_is_left_running(rehearsal):
    assert having(str(rehearsal.folder)) == []
