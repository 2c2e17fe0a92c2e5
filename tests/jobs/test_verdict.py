from collections import Counter

import pytest

from jobs.data.gate import Finding
from jobs.outcomes import ErrorBudgetExceeded, GateRefused
from jobs.verdict import check_budget, pass_gate


@pytest.mark.parametrize(
    ("outcomes", "fraction"),
    [
        ({}, 0.0),
        ({"ok": 1, "crashed": 1}, 0.5),  # exactly what is allowed
        ({"no_face": 5, "too_large": 3, "too_small": 2}, 0.0),  # answers, not failures
        ({"decode_error": 5}, 1.0),
    ],
)
def test_failures_within_the_budget_pass(outcomes, fraction):
    check_budget(Counter(outcomes), fraction, {})


@pytest.mark.parametrize("status", ["fetch_error", "decode_error", "unsupported", "model_error", "crashed"])
def test_failures_beyond_the_budget_are_refused_with_their_numbers(status):
    with pytest.raises(ErrorBudgetExceeded, match=rf"3 of 4 images failed \(75\.0%\).* 0\.5 .*{status}=3") as refusal:
        check_budget(Counter({"ok": 1, status: 3}), 0.5, {"run_id": "r"})
    assert refusal.value.exit_code == 4
    assert refusal.value.summary == {"run_id": "r"}


def test_as_many_failures_as_images_are_tried_again_are_no_surprise():
    check_budget(Counter({"crashed": 3}), 0.0, {}, retried=3)
    check_budget(Counter({"fetch_error": 3, "ok": 9, "decode_error": 1}), 0.1, {}, retried=3)
    with pytest.raises(
        ErrorBudgetExceeded, match=r"2 of 10 images failed \(20\.0%\), besides 3 that had failed before"
    ):
        check_budget(Counter({"fetch_error": 3, "ok": 8, "decode_error": 2}), 0.1, {}, retried=3)
    with pytest.raises(ErrorBudgetExceeded, match=r"1 of 1 images failed \(100\.0%\), more"):
        check_budget(Counter({"decode_error": 1}), 0.5, {})  # a night of one new picture, which is damaged


def test_what_the_gate_found_is_told_and_refused_unless_it_is_accepted(caplog):
    finding = Finding("no_face", value=0.9, before=0.1, limit=0.5)
    with pytest.raises(GateRefused, match="no_face") as refusal:
        pass_gate([finding], {"run_id": "r"}, accept=False)
    assert refusal.value.summary is not None
    assert refusal.value.summary["refused"][0]["check"] == "no_face"
    pass_gate([finding], {}, accept=True)
    pass_gate([], {}, accept=False)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["accepted=False", "accepted=True"]
