from typing import Any

import pytest

from jobs.data.forecast import expected_seconds
from jobs.data.parts import write_part
from jobs.data.snapshots import LabelTable, Pace, Snapshot, next_snapshot


@pytest.fixture
def table(tmp_path) -> LabelTable:
    return LabelTable(str(tmp_path))


@pytest.fixture
def commit(table, label_rows) -> Any:
    """Commits a snapshot of one image: `commit(pace, model_id)`."""
    facts = write_part(label_rows({"a": 1}), store=table.store, labels_uri=table.uri, model_id="m1", run_id="r1")

    def after(pace: Pace | None, model_id: str = "m1") -> Snapshot:
        snapshot = next_snapshot(
            table.current(), files=[facts], run_id="r", model_id=model_id, inventory_digest="d", pace=pace
        )
        return table.commit(snapshot)

    return after


def test_nothing_is_known_before_a_run_has_labelled_anything(table, commit):
    assert expected_seconds(table, None, images=10, model_id="m1") is None
    assert expected_seconds(table, commit(None), images=10, model_id="m1") is None


def test_the_last_five_runs_that_labelled_count_by_their_images(table, commit):
    commit(Pace(images=1, seconds=1000))  # long ago
    for images, seconds in [(100, 50), (300, 50), (100, 50), (100, 50)]:
        commit(Pace(images=images, seconds=seconds))
        commit(None)
    current = commit(Pace(images=400, seconds=50))
    assert expected_seconds(table, current, images=2000, model_id="m1") == pytest.approx(2000 * 250 / 1000)


def test_runs_of_the_same_model_count_where_there_are_any(table, commit):
    commit(Pace(images=10, seconds=10))
    current = commit(Pace(images=10, seconds=50), "m2")
    assert expected_seconds(table, current, images=1, model_id="m1") == 1
    assert expected_seconds(table, current, images=1, model_id="m2") == 5
    assert expected_seconds(table, current, images=1, model_id="m3") == 3


def test_a_history_that_was_vacuumed_ends_where_it_ends(table, commit, tmp_path):
    commit(Pace(images=1, seconds=1000))
    current = commit(Pace(images=1, seconds=2))
    (tmp_path / "_snapshots" / f"{1:020d}.json").unlink()
    assert expected_seconds(table, current, images=1, model_id="m1") == 2
