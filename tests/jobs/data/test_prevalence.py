import pyarrow as pa
import pytest

from jobs.data.parts import write_part
from jobs.data.prevalence import LabelCounts, count_labels, label_counts, prevalence, sum_counts
from jobs.data.snapshots import LabelTable
from mgmtn.attributes import ATTRIBUTES


def write(table: LabelTable, rows: pa.Table):
    return write_part(rows, store=table.store, labels_uri=table.uri, model_id="m1", run_id="r1")


@pytest.fixture
def table(tmp_path) -> LabelTable:
    return LabelTable(str(tmp_path))


def test_each_bit_is_its_attribute():
    for bit, name in enumerate(ATTRIBUTES):
        counts = count_labels(pa.chunked_array([[1 << bit, None], [0, 1 << bit]], pa.uint64()))
        assert counts.faces == 3
        assert {name: count for name, count in counts.positives.items() if count} == {name: 2}


def test_a_column_without_labels_has_no_prevalence():
    assert count_labels(pa.chunked_array([], pa.uint64())).shares == {}
    assert count_labels(pa.array([None, None], pa.uint64())).faces == 0


def test_a_file_keeps_its_counts_and_images_without_labels_do_not_count(table, label_rows):
    rows = pa.concat_tables(
        [label_rows({"a": 2, "b": "no_face"}, labels=None), label_rows({"c": 1}, labels=1), label_rows({"d": 3})]
    )
    facts = write(table, rows)
    assert facts.labels is not None
    assert facts.labels.faces == 4
    assert {name: count for name, count in facts.labels.positives.items() if count} == {
        "five_o_clock_shadow": 4,
        "young": 3,
    }


def test_prevalence_weighs_files_by_their_faces(table, label_rows):
    files = [write(table, label_rows({"a": 3}, labels=1)), write(table, label_rows({"b": 1}, labels=2**39))]
    found = prevalence(table, files)
    assert list(found) == list(ATTRIBUTES)
    assert (found["five_o_clock_shadow"], found["young"], found["smiling"]) == (0.75, 0.25, 0)


def test_counted_files_are_not_read_and_uncounted_ones_are(table, tmp_path, label_rows):
    counted, uncounted = write(table, label_rows({"a": 3})), write(table, label_rows({"b": 2}, labels=2**39))
    (tmp_path / counted.path).unlink()
    found = label_counts(table, [counted, uncounted.model_copy(update={"labels": None})])
    assert (found.faces, found.positives["five_o_clock_shadow"], found.positives["young"]) == (5, 3, 5)


def test_nothing_has_no_prevalence(table):
    assert prevalence(table, []) == {}
    assert sum_counts([]) == LabelCounts(faces=0, positives=dict.fromkeys(ATTRIBUTES, 0))
