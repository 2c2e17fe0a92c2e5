from pathlib import Path

import pytest

from jobs.data.gate import GateSettings, check_drift, check_inventory, check_outcomes
from jobs.data.plan import REASONS, Plan
from jobs.data.prevalence import LabelCounts
from mgmtn.attributes import ATTRIBUTES

LIMITS = GateSettings()


def plan(*, known: int, deleted: int, listed: int) -> Plan:
    planned = dict.fromkeys(REASONS, 0) | {"deleted": deleted}
    empty: tuple[Path, ...] = ()
    return Plan(
        planned=planned, listed=listed, known=known, kept=known - deleted, bytes=0, due_files=empty, dropped_files=empty
    )


def counts(faces: int, **positives: int) -> LabelCounts:
    return LabelCounts(faces=faces, positives=dict.fromkeys(ATTRIBUTES, 0) | positives)


def named(findings) -> list[str]:
    return [finding.check for finding in findings]


def test_a_night_may_delete_a_fifth_of_the_table():
    assert check_inventory(plan(known=1000, deleted=200, listed=800), LIMITS) == ()
    [finding] = check_inventory(plan(known=1000, deleted=201, listed=799), LIMITS)
    assert str(finding) == "deleted: 20.1% (limit: 20.0%)"


def test_a_small_table_may_shrink_but_not_vanish():
    assert check_inventory(plan(known=10, deleted=9, listed=1), LIMITS) == ()
    assert named(check_inventory(plan(known=10, deleted=10, listed=0), LIMITS)) == ["deleted"]
    assert check_inventory(plan(known=0, deleted=0, listed=0), LIMITS) == ()


def test_a_wholly_new_inventory_is_refused_though_it_is_not_empty():
    assert named(check_inventory(plan(known=500, deleted=500, listed=600), LIMITS)) == ["deleted"]


def test_a_run_like_the_table_passes():
    before = {"ok": 9000, "no_face": 500, "fetch_error": 500}
    assert check_outcomes({"ok": 900, "no_face": 50, "fetch_error": 50}, before, retried=0, settings=LIMITS) == ()


@pytest.mark.parametrize("status", ["fetch_error", "decode_error", "unsupported", "model_error", "crashed"])
def test_more_failures_than_before_are_found_with_their_shares(status):
    before = {"ok": 9900, "decode_error": 100}
    [finding] = check_outcomes({"ok": 700, status: 300}, before, retried=0, settings=LIMITS)
    assert str(finding) == "failed: 30.0%, 1.0% before (limit: 10.0%)"


def test_images_that_are_retried_may_fail_again():
    before = {"ok": 9900, "fetch_error": 100}
    run = {"ok": 700, "fetch_error": 300}
    assert check_outcomes(run, before, retried=300, settings=LIMITS) == ()
    assert named(check_outcomes(run, before, retried=50, settings=LIMITS)) == ["failed"]


def test_fewer_failures_than_before_are_welcome():
    assert check_outcomes({"ok": 1000}, {"ok": 500, "crashed": 500}, retried=0, settings=LIMITS) == ()


@pytest.mark.parametrize("faceless", [0, 1000])
def test_a_detector_that_finds_faces_nowhere_or_everywhere_is_found(faceless):
    before = {"ok": 700, "no_face": 300}
    run = {"ok": 1000 - faceless, "no_face": faceless}
    assert named(check_outcomes(run, before, retried=0, settings=LIMITS)) == ["no_face"]


def test_failures_are_not_taken_for_images_without_a_face():
    before = {"ok": 500, "no_face": 500}
    run = {"ok": 500, "no_face": 500, "fetch_error": 5000}
    assert named(check_outcomes(run, before, retried=0, settings=LIMITS)) == ["failed"]


def test_an_attribute_that_drifts_is_named_the_largest_change_first():
    before = counts(10_000, smiling=4000, young=7000, male=5000)
    found = check_drift(counts(10_000, smiling=8000, young=1000, male=5500), before, LIMITS)
    assert named(found) == ["drift of young", "drift of smiling"]
    assert str(found[0]) == "drift of young: 10.0%, 70.0% before (limit: 15.0%)"


def test_the_same_shares_pass_in_a_small_run_and_fail_in_a_large_one():
    before = counts(100_000, smiling=50_000)
    assert check_drift(counts(120, smiling=84), before, LIMITS) == ()  # 70 % of 120 faces is chance and the limit
    assert named(check_drift(counts(12_000, smiling=8400), before, LIMITS)) == ["drift of smiling"]


@pytest.mark.parametrize(("faces", "faces_before"), [(99, 10_000), (10_000, 99), (0, 10_000), (10_000, 0)])
def test_too_few_faces_are_not_compared(faces, faces_before):
    assert check_drift(counts(faces, smiling=faces), counts(faces_before), LIMITS) == ()


def test_a_limit_of_one_is_none():
    open_gate = GateSettings(max_drift=1, max_no_face_change=1, max_failed_rise=1, max_deleted=1)
    assert check_drift(counts(1000, smiling=1000), counts(1000), open_gate) == ()
    assert check_outcomes({"crashed": 1000}, {"ok": 1000}, retried=0, settings=open_gate) == ()
    assert check_inventory(plan(known=500, deleted=500, listed=600), open_gate) == ()
