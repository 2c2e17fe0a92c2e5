"""Compaction as a program: one commit, the same rows, and who may do it."""

import json
from pathlib import Path

import duckdb
import pytest

from jobs import compact, vacuum
from jobs.compact import CompactSettings, main, run
from jobs.data.lease import LeaseSettings, held
from jobs.data.snapshots import LabelTable
from jobs.outcomes import LeaseHeld

ALL = "SELECT * FROM read_parquet($1, hive_partitioning = false) ORDER BY image_id, face_index"


@pytest.fixture
def labels(tmp_path, add_night) -> str:
    """Six nights: new images, one replaced, one removed, and the last by another model."""
    uri = str(tmp_path / "my labels")
    for number in range(5):
        add_night(uri, {f"{number}/a": 2, f"{number}/b": "no_face"}, run_id=f"r{number}")
    add_night(uri, {"0/a": 3, "9/a": 1}, drop=["1/a"], run_id="r5", model_id="m2")
    return uri


def rows(labels: str, number: int | None = None) -> list[tuple[object, ...]]:
    """What a plain engine reads of a snapshot."""
    table = LabelTable(labels)
    files = table.files(table.at(number) if number else table.current())
    return duckdb.execute(ALL, [list(files)]).fetchall()


def test_the_rows_are_the_same_in_one_file_of_each_model(labels, capsys):
    before = rows(labels)
    assert main([labels]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["files"] == {"before": 6, "after": 2}
    assert (summary["snapshot"], summary["rewritten"], summary["written"]) == (7, {"files": 5, "rows": 11}, 1)
    assert rows(labels) == before
    current = LabelTable(labels).current()
    assert sorted(file.path.split("/")[0] for file in current.files) == ["model=m1", "model=m2"]
    assert (current.parent, current.model_id, current.inventory_digest) == (6, "m2", "of r5")


def test_earlier_snapshots_read_as_before(labels):
    before = [rows(labels, number) for number in range(1, 7)]
    run(CompactSettings(labels=labels))
    assert [rows(labels, number) for number in range(1, 7)] == before


def test_a_second_time_there_is_nothing_to_do(labels):
    run(CompactSettings(labels=labels))
    summary = run(CompactSettings(labels=labels))
    assert (summary["run_id"], summary["snapshot"], summary["rewritten"]["files"]) == (None, 7, 0)
    assert len(LabelTable(labels).history()) == 7


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(labels):
    before = sorted(Path(labels).rglob("*"))
    summary = run(CompactSettings(labels=labels, dry_run=True))
    assert (summary["rewritten"]["files"], summary["written"], summary["files"]["after"]) == (5, 1, 6)
    assert sorted(Path(labels).rglob("*")) == before


def test_who_writes_to_the_table_keeps_compaction_out(labels, capsys):
    before = rows(labels)
    with held(labels, holder="night", settings=LeaseSettings()):
        assert main([labels]) == 75
    assert "run night" in capsys.readouterr().err
    assert len(LabelTable(labels).history()) == 6
    assert rows(labels) == before


def test_a_run_that_commits_without_the_lease_wins_and_nothing_is_overwritten(labels, add_night, monkeypatch):
    rewrite = compact.rewrite

    def overtaken(*arguments, **settings):
        add_night(labels, {"late": 1}, run_id="r6", model_id="m2")
        return rewrite(*arguments, **settings)

    monkeypatch.setattr(compact, "rewrite", overtaken)
    with pytest.raises(LeaseHeld, match="another run committed snapshot 7 first"):
        run(CompactSettings(labels=labels))
    assert LabelTable(labels).current().run_id == "r6"
    assert any("late" in row for row in rows(labels))


def test_a_death_before_the_commit_costs_nothing_and_the_next_vacuum_clears_up(labels, monkeypatch):
    before = rows(labels)

    def die(*arguments, **settings):
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(compact, "commit", die)
        with pytest.raises(SystemExit):
            run(CompactSettings(labels=labels))
    assert rows(labels) == before
    [left] = Path(labels).glob("model=m1/run=*-compact-*/part-*.parquet")
    run(CompactSettings(labels=labels))
    assert rows(labels) == before
    vacuum.run(vacuum.VacuumSettings(labels=labels, older_than="0s"))
    assert not left.exists()
    assert rows(labels) == before


def test_no_table_is_a_mistake_and_leaves_nothing_behind(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no label table" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.integration
def test_a_table_in_s3_is_compacted_like_a_local_one(bucket, add_night):
    uri = f"{bucket}/label tables/t+1"
    for number in range(5):
        add_night(uri, {f"{number}/{name}": 2 for name in "abc"}, run_id=f"r{number}")
    table = LabelTable(uri)
    before = table.read(table.current(), columns=["uri", "face_index", "run_id"]).read_all()
    summary = run(CompactSettings(labels=uri, rows_per_file=20, all_files=True))
    assert summary["files"] == {"before": 5, "after": 2}
    after = table.read(table.current(), columns=["uri", "face_index", "run_id"]).read_all()
    order = [("uri", "ascending"), ("face_index", "ascending")]
    assert after.sort_by(order).combine_chunks().equals(before.sort_by(order).combine_chunks())
