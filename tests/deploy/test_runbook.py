"""The runbook's commands are ones that exist, and every alert leads to a section."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from jobs import cli, submit
from jobs.settings import load

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
LINES = [
    line.strip() for block in re.findall(r"```sh\n(.*?)```", RUNBOOK, flags=re.DOTALL) for line in block.splitlines()
]
OURS = [line for line in LINES if line.startswith("mgmtn ")]
ANCHORS = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", RUNBOOK, re.M)}


def load_only(monkeypatch, module):
    """Have a program read its settings and stop."""
    loaded = []

    def only_load(cls, run, argv=None, *, prog, description=""):
        loaded.append(load(cls, argv, prog=prog, description=description))
        return 0

    monkeypatch.setattr(module, "run_program", only_load)
    return loaded


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_the_runbook_is_understood(line, monkeypatch, tmp_path):
    _, name, *arguments = shlex.split(line)
    assert name in cli.COMMANDS
    if name == "submit":
        own, job = submit.split_arguments(arguments)
        assert load_only(monkeypatch, submit) == []
        assert submit.main([*own, *job]) == 0
        name, *arguments = job
    program = importlib.import_module(f"jobs.{name}")
    loaded = load_only(monkeypatch, program)
    assert program.main(arguments) == 0
    assert len(loaded) == 1


def test_there_are_commands_for_each_thing_that_happens():
    used = {shlex.split(line)[1] for line in OURS}
    assert {"label", "submit", "snapshots", "restore", "compact", "vacuum", "report", "query", "lint", "train"} <= used


@pytest.mark.parametrize("alert", ["rules.yaml"])
def test_every_alert_has_a_section(alert):
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / alert).read_text(encoding="utf-8"))["groups"]
    books = [rule["annotations"]["runbook"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(books) >= 6
    for book in books:
        path, _, anchor = book.partition("#")
        assert (ROOT / path).is_file()
        assert anchor in ANCHORS


def test_every_link_within_the_runbook_leads_somewhere():
    links = set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK))
    assert len(links) > 5
    assert links <= ANCHORS


def test_every_file_that_the_runbook_names_is_there():
    named = set(re.findall(r"(?:deploy|k8s)/[\w./-]*\w", RUNBOOK))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_costs_follow_from_the_rates():
    """Core-hours for a million images on two cores, and images on 32 cores in nine hours, from images a second."""
    rows = re.findall(r"\| `[\w-]+`.*? \| ([\d.]+) \| (\d+) \| ([\d.]+) million \|", RUNBOOK)
    assert len(rows) == 2
    for rate, hours, millions in rows:
        assert float(hours) == round(1e6 / float(rate) * 2 / 3600)
        assert float(millions) == pytest.approx(float(rate) * 16 * 9 * 3600 / 1e6, rel=0.02)
