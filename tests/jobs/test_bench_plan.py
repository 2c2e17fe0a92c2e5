import json

import pytest

from jobs.bench_plan import check, main, markdown, ratios


def row(order: str, side: str, **figures: float) -> dict[str, object]:
    return {"order": order, "side": side, "due": 1, "gone": 1, "cpu_seconds": 1.0, "peak_mb": 1.0} | figures


MEASURED = [
    *(row("uri", "plain", seconds=seconds, peak_mb=1000) for seconds in (1.0, 2.0, 9.0)),
    *(row("uri", "plain, limited", seconds=4.0) for _ in range(3)),
    *(row("uri", "plan", seconds=seconds, peak_mb=250) for seconds in (3.0, 3.0, 8.0)),
]


def test_a_ratio_is_the_plan_by_the_plain_join():
    assert ratios(MEASURED) == {"uri": {"seconds": 1.5, "cpu_seconds": 1.0, "peak_mb": 0.25}}
    assert "| uri | plan / plain | **1.50** | **1.00** | **0.25** |" in markdown(MEASURED)


def test_sides_that_disagree_measure_nothing():
    with pytest.raises(AssertionError, match="the sides disagree"):
        check([*MEASURED, row("uri", "plan", seconds=1.0) | {"due": 2}])


def test_both_sides_find_the_same_images_in_the_same_files(tmp_path, capsys):
    output = tmp_path / "bench.json"
    command = ["--images", "3000", "--repeats", "1", "--threads", "1", "--orders", "uri", "--output", str(output)]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = json.loads(output.read_text())["measured"]
    assert {(side["due"], side["gone"]) for side in measured} == {(30 + 59, 30)}  # new and changed, gone
    assert [side["side"] for side in measured] == ["plain", "plain, limited", "plan"]
    assert set(summary["ratios"]) == {"uri"}
