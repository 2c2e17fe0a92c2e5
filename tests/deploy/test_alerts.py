"""The alerts: that each fires when it should and not otherwise (promtool), and that each says what to do."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.data.schema import FAILED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RUNBOOK = ROOT / "deploy" / "README.md"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(FOLDER / "rules.yaml")["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool, of Debian's package prometheus, is not on this machine")
    return path


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")])
def test_promtool_finds_nothing_wrong(promtool, arguments):
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_seen_to_fire_and_to_stay_silent(alert):
    cases = [case for test in load(FOLDER / "rules_test.yaml")["tests"] for case in test.get("alert_rule_test", ())]
    expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert]
    assert set(expected) == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_where_to_read_on(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) - {"description"} == {"summary", "runbook"}
    path, anchor = rule["annotations"]["runbook"].split("#")
    assert ROOT / path == RUNBOOK
    if RUNBOOK.exists():
        titles = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_failed_images_are_those_of_the_error_budget():
    expression = ALERTS["MgmtnErrorShare"]["expr"]
    [statuses] = re.findall(r'status=~"([^"]+)"', expression)
    assert set(statuses.split("|")) == set(FAILED)


def test_the_operators_rules_are_the_same():
    manifest = load(ROOT / "k8s" / "base" / "prometheusrule.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert manifest["spec"] == load(FOLDER / "rules.yaml")
