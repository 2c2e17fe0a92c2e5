"""What the report's charts show, and numbers and texts as a reader sees them; the page itself is tested as a whole."""

import numpy as np
import pytest

from jobs.data.prevalence import LabelCounts
from jobs.data.table_statistics import Histogram
from jobs.report_page import attributes, bars, clean, in_bytes, outcomes, percent, points
from mgmtn.attributes import ATTRIBUTES


def _counts(faces: int, **positives: int) -> LabelCounts:
    return LabelCounts(faces=faces, positives=dict.fromkeys(ATTRIBUTES, 0) | positives)


def test_a_change_is_notable_when_chance_would_seldom_make_it():
    small = {each.name: each for each in attributes(_counts(10, young=6), _counts(10, young=4))}
    large = {each.name: each for each in attributes(_counts(1000, young=600), _counts(1000, young=400))}
    assert not small["young"].is_notable
    assert large["young"].is_notable
    assert large["young"].change == pytest.approx(0.2)
    assert not large["bald"].is_notable
    assert len(large) == 40


def test_without_faces_or_without_a_snapshot_before_there_is_no_change():
    assert attributes(_counts(0), None) == []
    [young] = [each for each in attributes(_counts(4, young=1), None) if each.name == "young"]
    assert (young.share, young.before, young.change, young.is_notable) == (0.25, None, 0.0, False)
    [young] = [each for each in attributes(_counts(4, young=1), _counts(0)) if each.name == "young"]
    assert young.before is None


def test_a_status_that_is_no_longer_there_is_still_compared():
    [ok, gone] = outcomes({"ok": 4}, {"ok": 3, "crashed": 1})
    assert (ok.share, ok.before) == (1.0, 0.75)
    assert (gone.status, gone.count, gone.before, gone.kind) == ("crashed", 0, 0.25, "failed")
    assert outcomes({}, None) == []


def test_bars_fill_the_chart():
    made = Histogram("x", "px", np.array([0.0, 1.0, 2.0]))
    made.add(np.array([0.5, 0.5, 1.5]))
    assert [bar["height"] for bar in bars(made)] == [100, 50]
    assert bars(made)[0]["title"] == "0 to 1 px: 2"


def test_numbers_and_texts_for_a_reader():
    assert [percent(share) for share in (None, 0, 0.001, 0.5, 1)] == ["–", "0.0 %", "0.10 %", "50.0 %", "100.0 %"]
    assert [points(change) for change in (0.123, -0.05, 0)] == ["+12.3", "−5.0", "+0.0"]
    assert [in_bytes(count) for count in (5, 2048, 3 * 2**30, 2**50)] == [
        "5 bytes",
        "2 KB",
        "3 GB",
        "1,024 TB",
    ]
    assert clean("a\nb\x00\u202ec") == "a\ufffdb\ufffd\ufffdc"
    assert clean(None) == ""
