"""Vacuum as a program; above all: of a picture that was withdrawn nothing is left."""

import itertools
import json
from datetime import timedelta
from pathlib import Path

import boto3
import duckdb
import pyarrow.parquet as pq
import pytest

from jobs import compact, files, query, snapshots
from jobs.data.lease import LeaseSettings, held
from jobs.data.object_store import open_store
from jobs.data.parts import write_part
from jobs.data.retention import plan_sweep
from jobs.data.schema import image_id
from jobs.data.snapshots import LabelTable, next_snapshot
from jobs.vacuum import VacuumSettings, duration, main, run
from mgmtn.errors import ConfigError

WITHDRAWN = "withdrawn/picture.jpg"


@pytest.fixture
def labels(tmp_path) -> str:
    return str(tmp_path / "labels")


def fill(uri: str, add_night, label_rows) -> None:
    """Three nights; the picture comes with the first and is withdrawn before the third. A dead run had it too."""
    add_night(uri, {WITHDRAWN: 2, **{f"kept/{number}": 1 for number in range(5)}}, run_id="r1")
    add_night(uri, {"kept/6": 1}, run_id="r2")
    table = LabelTable(uri)
    write_part(label_rows({WITHDRAWN: 2}), store=table.store, labels_uri=uri, model_id="m1", run_id="dead")
    add_night(uri, {"kept/7": 1}, drop=[WITHDRAWN], run_id="r3")


def objects_with(uri: str) -> list[str]:
    """Everything under the table that has the picture: a row of it, or its name or id anywhere in the bytes."""
    store = open_store(uri)
    found = []
    for info in store.list(uri):
        data = store.get(info.uri)
        named = WITHDRAWN.encode() in data or image_id(WITHDRAWN).encode() in data
        with store.open(info.uri) as source:
            listed = info.uri.endswith(".parquet") and WITHDRAWN in pq.read_table(source)["uri"].to_pylist()
        if named or listed:
            found.append(info.uri)
    return found


def test_no_file_anywhere_holds_a_withdrawn_picture_after_compaction_and_vacuum(labels, add_night, label_rows):
    fill(labels, add_night, label_rows)
    assert len([uri for uri in objects_with(labels) if uri.endswith(".parquet")]) == 2
    compact.run(compact.CompactSettings(labels=labels))
    run(VacuumSettings(labels=labels, older_than="0s"))
    assert objects_with(labels) == []
    assert [row[0] for row in _uris(labels)] == sorted(f"kept/{number}" for number in (0, 1, 2, 3, 4, 6, 7))


@pytest.mark.integration
def test_nor_does_any_object_of_a_table_in_s3_or_a_part_of_a_torn_upload(bucket, add_night, label_rows):
    uri = f"{bucket}/labels"
    fill(uri, add_night, label_rows)
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("labels/model=m1/run=r9/part-0.parquet", "elsewhere/part"):
        upload = client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
        client.upload_part(Bucket=name, Key=key, UploadId=upload, PartNumber=1, Body=WITHDRAWN.encode())
    compact.run(compact.CompactSettings(labels=uri))
    summary = run(VacuumSettings(labels=uri, dry_run=True))
    assert (summary["deleted"]["snapshots"], summary["deleted"]["files"]) == ([], 0)
    summary = run(VacuumSettings(labels=uri, older_than="0s"))
    assert summary["deleted"]["torn"] == 1
    assert objects_with(uri) == []
    [left] = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert left["Key"] == "elsewhere/part"
    table = LabelTable(uri)
    assert table.read(table.current(), columns=["uri"]).read_all().num_rows == 7


@pytest.mark.integration
def test_a_prefix_may_end_in_a_slash(bucket, add_night, label_rows):
    fill(f"{bucket}/labels", add_night, label_rows)
    assert run(VacuumSettings(labels=f"{bucket}/labels/", dry_run=True))["kept"]["files"] == 4
    assert run(VacuumSettings(labels=f"{bucket}/labels/", older_than="0s"))["deleted"]["files"] == 2
    assert run(VacuumSettings(labels=f"{bucket}/labels", older_than="0s"))["deleted"]["files"] == 0
    assert [uri for uri in objects_with(f"{bucket}/labels") if uri.endswith(".parquet")] == []


@pytest.mark.integration
def test_a_bucket_that_keeps_versions_is_warned_of(bucket, add_night, caplog):
    add_night(f"{bucket}/labels", {"a": 1})
    run(VacuumSettings(labels=f"{bucket}/labels", older_than="0s"))
    assert "versioned" not in caplog.text
    status = {"Status": "Enabled"}
    boto3.client("s3").put_bucket_versioning(Bucket=bucket.removeprefix("s3://"), VersioningConfiguration=status)
    run(VacuumSettings(labels=f"{bucket}/labels", older_than="0s"))
    assert "bucket=versioned" in caplog.text


def _uris(labels: str) -> list[tuple[str]]:
    table = LabelTable(labels)
    listed = list(table.files(table.current()))
    return duckdb.execute("SELECT uri FROM read_parquet($1) ORDER BY uri", [listed]).fetchall()


def test_with_an_age_what_is_newer_stays_and_old_snapshots_answer(labels, add_night, label_rows, capsys):
    fill(labels, add_night, label_rows)
    assert main([labels]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["deleted"]["files"] == 0
    assert summary["kept"] == {
        "snapshots": [1, 2, 3],
        "files": 4,
        "files_of_unfinished_runs": 0,
        "recent_files": 1,
        "foreign_files": 0,
    }
    assert query.main([labels, f"uri = '{WITHDRAWN}'", "--snapshot", "2", "--format", "csv"]) == 0
    assert capsys.readouterr().out.count(WITHDRAWN) == 2


def test_a_vacuumed_snapshot_is_named_to_whoever_asks_for_it(labels, add_night, label_rows, capsys):
    fill(labels, add_night, label_rows)
    run(VacuumSettings(labels=labels, older_than="0s", keep=2))
    for program in (query, files):
        assert program.main([labels, "--snapshot", "1"]) == 2
        assert "snapshot 1 has been vacuumed; those that are left begin with 2" in capsys.readouterr().err
        assert program.main([labels, "--snapshot", "5"]) == 2
        assert "snapshot 5 is not there yet; the latest is 4" in capsys.readouterr().err
    assert files.main([labels, "--snapshot", "2"]) == 0


def test_a_dry_run_deletes_nothing_and_takes_no_lease(labels, add_night, label_rows):
    fill(labels, add_night, label_rows)
    before = sorted(Path(labels).rglob("*"))
    summary = run(VacuumSettings(labels=labels, older_than="0s", dry_run=True))
    assert summary["deleted"]["snapshots"] == [1, 2]
    assert summary["deleted"]["files"] == 2
    assert sorted(Path(labels).rglob("*")) == before


def test_the_folders_of_what_went_go_too(labels, add_night, label_rows):
    fill(labels, add_night, label_rows)
    compact.run(compact.CompactSettings(labels=labels))
    run(VacuumSettings(labels=labels, older_than="0s"))
    [left] = Path(labels, "model=m1").iterdir()
    assert "-compact-" in left.name


def test_who_writes_to_the_table_keeps_vacuum_out(labels, add_night, label_rows, capsys):
    fill(labels, add_night, label_rows)
    with held(labels, holder="night", settings=LeaseSettings()):
        assert main([labels, "--older-than", "0s"]) == 75
    assert "run night" in capsys.readouterr().err
    assert len(LabelTable(labels).history()) == 3


@pytest.mark.parametrize("sleeper", ["label", "restore"])
def test_a_run_that_sleeps_in_its_commit_cannot_publish_what_vacuum_deletes(labels, add_night, label_rows, sleeper):
    fill(labels, add_night, label_rows)
    table = LabelTable(labels)
    before = table.current()
    files = before.files if sleeper == "label" else table.at(1).files
    if sleeper == "label":
        own = write_part(label_rows({"late": 1}), store=table.store, labels_uri=labels, model_id="m1", run_id="late")
        files = (*files, own)
    late = next_snapshot(before, files=files, run_id="late", model_id="m1", inventory_digest="late")
    table.verify(late.files)  # the last that it does before it sleeps
    assert run(VacuumSettings(labels=labels, older_than="0s"))["kept"]["snapshots"] == [3, 4]
    with pytest.raises(ConfigError, match="missing"):
        table.verify(late.files)
    assert not table.store.put_if_absent(table.snapshot_uri(late.number), late.model_dump_json().encode())
    table.verify(table.current().files)


def test_a_run_that_commits_before_the_fence_keeps_its_files(labels, add_night, label_rows, monkeypatch, capsys):
    fill(labels, add_night, label_rows)
    plans = itertools.count()

    def plan(table, retention):
        sweep = plan_sweep(table, retention)
        if next(plans) == 1:  # that under the lease
            add_night(labels, {"late": 1}, run_id="late")
        return sweep

    monkeypatch.setattr("jobs.vacuum.plan_sweep", plan)
    assert main([labels, "--older-than", "0s"]) == 75
    assert "another run committed snapshot 4 first" in capsys.readouterr().err
    table = LabelTable(labels)
    assert [snapshot.number for snapshot in table.history()] == [1, 2, 3, 4]
    for snapshot in table.history():
        table.verify(snapshot.files)


def test_the_state_is_committed_again_as_it_is_and_only_where_files_go(labels, add_night, label_rows, capsys):
    fill(labels, add_night, label_rows)
    before = LabelTable(labels).current()
    assert run(VacuumSettings(labels=labels))["kept"]["snapshots"] == [1, 2, 3]
    assert run(VacuumSettings(labels=labels, older_than="0s"))["kept"]["snapshots"] == [3, 4]
    assert run(VacuumSettings(labels=labels, older_than="0s"))["kept"]["snapshots"] == [3, 4]
    after = LabelTable(labels).current()
    own = {"number", "parent", "created_at", "run_id"}
    assert after.model_dump(exclude=own) == before.model_dump(exclude=own)
    assert (after.parent, after.planned, after.pace) == (3, {}, None)
    assert snapshots.main([labels, "--snapshot", "4", "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["planned"], row["seconds"], "-vacuum-" in row["run_id"]) == ({}, None, True)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("0s", timedelta(0)),
        ("90m", timedelta(minutes=90)),
        ("12 h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("1.5w", timedelta(days=10.5)),
    ],
)
def test_ages_have_a_unit(text, span):
    assert duration(text) == span


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7y", "", "7d 3h", "1e3s"])
def test_an_age_that_is_none_is_a_wrong_setting(labels, capsys, text):
    assert main([labels, f"--older-than={text}"]) == 2
    assert "--older-than: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["999999d", "9999999999d", "9" * 400 + "s"])
def test_an_age_that_is_longer_than_the_calendar_is_a_wrong_setting(labels, capsys, text):
    assert main([labels, f"--older-than={text}"]) == 2
    assert f"'{text}' is longer than the calendar" in "".join(capsys.readouterr().err.splitlines())


def test_no_table_is_a_mistake_and_leaves_nothing_behind(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no label table" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
