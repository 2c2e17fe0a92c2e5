"""Distributions and examples of a table's rows, in one pass."""

import numpy as np
import pyarrow as pa
import pytest

from jobs.data.table_statistics import STATISTICS_COLUMNS, Histogram, measure


def histogram(values: list[float], *, edges: list[float], whole: bool = False) -> Histogram:
    made = Histogram("x", "", np.array(edges, float), whole=whole)
    made.add(np.array(values, float))
    return made


def test_values_outside_are_counted_in_the_outer_bins_and_nan_nowhere():
    assert histogram([-5, 0, 0.5, 1, 1.5, 2, 99, np.nan], edges=[0, 1, 2]).counts.tolist() == [3, 4]


def test_quantiles_lie_within_the_bin_that_holds_them():
    made = histogram([0.5] * 10 + [1.5] * 30, edges=[0, 1, 2, 3])
    assert made.quantile(0.125) == pytest.approx(0.5)
    assert made.quantile(0.5) == pytest.approx(1 + 1 / 3)
    assert made.quantile(1.0) == pytest.approx(2.0)
    assert histogram([], edges=[0, 1]).quantile(0.5) is None


def test_quantiles_of_whole_numbers_are_whole():
    made = histogram([1, 1, 1, 2, 4], edges=[0, 1, 2, 3, 4, 5], whole=True)
    assert [made.quantile(share) for share in (0.1, 0.5, 0.7, 0.95)] == [1, 1, 2, 4]
    assert made.last == 4


def test_a_table_is_counted_by_face_and_by_image(label_rows):
    rows = pa.concat_tables(
        [
            label_rows({"a": 3}, detection_score=0.9, sharpness=100.0, face_size=50.0),
            label_rows({"b": 1}, detection_score=0.3),
            label_rows({"c": "no_face"}, width=1000, height=500),
            label_rows({f"d{number}": "decode_error" for number in range(9)}),
        ]
    )
    found = measure(rows.select(list(STATISTICS_COLUMNS)).to_batches(max_chunksize=4), examples=2)
    assert {name: made.total for name, made in found.histograms.items()} == {
        "detection_score": 4,
        "sharpness": 3,
        "face_size": 3,
        "face_count": 3,
        "pixels": 3,
        "size": 12,
    }
    assert found.histograms["face_count"].counts[:4].tolist() == [1, 1, 0, 1]
    assert [problem["uri"] for problem in found.problems["no_face"]] == ["c"]
    assert len(found.problems["decode_error"]) == 2
    assert found.problems["decode_error"][0]["error"] == "why"
    assert found.problems["ok"] == []
