"""An earlier snapshot comes back as a new one; nothing is lost on the way."""

import json
from pathlib import Path

import pytest

from jobs import vacuum
from jobs.data.lease import LeaseSettings, held
from jobs.data.object_store import local_path
from jobs.data.snapshots import LabelTable
from jobs.outcomes import LeaseHeld
from jobs.restore import RestoreSettings, main, run


@pytest.fixture
def labels(tmp_path, add_night) -> str:
    """Three nights; the last replaced an image's rows by another model's."""
    uri = str(tmp_path / "labels")
    add_night(uri, {"a": 2, "b": "no_face"}, run_id="r1")
    add_night(uri, {"c": 1}, run_id="r2")
    add_night(uri, {"a": 3}, run_id="r3", model_id="m2")
    return uri


def rows(labels: str, number: int) -> list[dict[str, object]]:
    table = LabelTable(labels)
    return table.read(table.at(number), columns=("image_id", "face_index", "model_id")).read_all().to_pylist()


def test_the_earlier_rows_are_current_again_and_the_later_ones_in_the_history(labels, capsys):
    before = rows(labels, 2)
    assert main([labels, "--snapshot", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["snapshot"], summary["restored"], summary["model_id"]) == (4, 2, "m1")
    current = LabelTable(labels).current()
    assert (current.number, current.parent, current.model_id, current.inventory_digest) == (4, 3, "m1", "of r2")
    assert rows(labels, 4) == before
    assert run(RestoreSettings(labels=labels, snapshot=3))["snapshot"] == 5  # and back
    assert rows(labels, 5) == rows(labels, 3)


def test_the_current_state_needs_no_commit(labels):
    assert run(RestoreSettings(labels=labels, snapshot=3))["snapshot"] == 3
    assert len(LabelTable(labels).history()) == 3


def test_a_dry_run_commits_nothing(labels):
    summary = run(RestoreSettings(labels=labels, snapshot=1, dry_run=True))
    assert (summary["restored"], summary["rows"]) == (1, {"before": 5, "after": 3})
    assert len(LabelTable(labels).history()) == 3


def test_a_snapshot_whose_file_is_damaged_is_not_restored(labels, capsys):
    table = LabelTable(labels)
    path = Path(local_path(table.files(table.at(1))[0]))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main([labels, "--snapshot", "1"]) == 2
    assert path.name in capsys.readouterr().err
    assert table.current().number == 3


def test_what_was_vacuumed_cannot_come_back(labels, capsys):
    vacuum.run(vacuum.VacuumSettings(labels=labels, older_than="0s"))
    assert main([labels, "--snapshot", "1"]) == 2
    assert "1" in capsys.readouterr().err


def test_no_snapshot_and_no_table_are_wrong_settings(labels, tmp_path, capsys):
    assert main([labels, "--snapshot", "9"]) == 2
    assert main([str(tmp_path / "nothing"), "--snapshot", "1"]) == 2
    assert main([labels]) == 2
    assert "--snapshot: required" in capsys.readouterr().err


def test_while_a_run_writes_nothing_is_restored(labels):
    with held(LabelTable(labels).uri, holder="night", settings=LeaseSettings()), pytest.raises(LeaseHeld):
        run(RestoreSettings(labels=labels, snapshot=1))
