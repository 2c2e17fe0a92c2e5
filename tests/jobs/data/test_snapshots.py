import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from jobs.data.buckets import ImageIds
from jobs.data.object_store import open_store
from jobs.data.parts import FileFacts, write_part
from jobs.data.schema import TABLE_SCHEMA, image_id
from jobs.data.snapshots import LabelTable, Snapshot, SnapshotConflict, next_snapshot
from mgmtn.errors import ConfigError

IDS = sorted("abcdefgh", key=image_id)


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    return LabelTable(str(tmp_path / "labels"))


def add(table: LabelTable, rows: pa.Table, *, run_id: str = "r1", model_id: str = "m1") -> FileFacts:
    store = open_store(table.uri)
    return write_part(rows, store=store, labels_uri=table.uri, model_id=model_id, run_id=run_id, thresholds_id="t1")


def after(parent: Snapshot | None, *files: FileFacts, run_id: str = "r1", model_id: str = "m1") -> Snapshot:
    return next_snapshot(
        parent, files=files, run_id=run_id, model_id=model_id, inventory_digest="d" * 64, planned={"new": 1}
    )


def faces(table: LabelTable, snapshot: Snapshot) -> list[tuple[str, int, str, str]]:
    """What any engine reads: uri, face, model, run."""
    query = "SELECT uri, face_index, model_id, run_id FROM read_parquet($files) ORDER BY ALL"
    return duckdb.execute(query, {"files": list(table.files(snapshot))}).fetchall()


def test_a_table_begins_with_no_snapshot(table):
    assert table.current() is None
    assert table.history() == ()
    assert table.read(None, columns=["uri"]).read_all().num_rows == 0


def test_a_committed_snapshot_is_read_back(table, label_rows):
    part = add(table, label_rows({"a": 2, "b": "no_face"}))
    committed = table.commit(after(None, part))
    assert table.current() == committed == table.at(1)
    assert (committed.number, committed.parent, committed.rows, committed.bytes) == (1, None, 3, part.bytes)
    assert (committed.images, committed.faces) == ({"ok": 1, "no_face": 1}, 2)
    assert table.files(committed) == (f"{table.uri}/{part.path}",)
    assert table.local_files(committed) == (Path(table.uri, part.path),)


def test_a_snapshot_is_one_json_file_that_any_program_reads(table, label_rows):
    part = add(table, label_rows({"a": 2}))
    table.commit(after(None, part))
    document = json.loads(Path(table.uri, "_snapshots", "00000000000000000001.json").read_text())
    assert document["number"] == 1
    assert document["parent"] is None
    assert document["inventory_digest"] == "d" * 64
    assert document["created_at"].endswith("Z")
    [file] = document["files"]
    assert file["path"] == part.path
    assert file["thresholds_id"] == "t1"


def test_every_state_stays_readable(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 1}))))
    second = table.commit(after(first, *first.files, add(table, label_rows({"b": 2}))))
    assert table.history() == (first, second)
    assert [row[:2] for row in faces(table, table.at(1))] == [("a", 0)]
    assert [row[:2] for row in faces(table, table.at(2))] == [("a", 0), ("b", 0), ("b", 1)]
    assert second.parent == 1


def test_a_table_can_be_moved(table, label_rows, tmp_path):
    table.commit(after(None, add(table, label_rows({"a": 1}))))
    os.rename(table.uri, tmp_path / "moved = elsewhere")
    moved = LabelTable(str(tmp_path / "moved = elsewhere"))
    assert [row[:2] for row in faces(moved, moved.current())] == [("a", 0)]


def test_one_of_two_runs_commits_and_the_other_is_told(table, label_rows):
    part = add(table, label_rows({"a": 1}))

    def commit(run_id: str) -> str:
        try:
            return table.commit(after(None, part, run_id=run_id)).run_id
        except SnapshotConflict as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(commit, [f"r{number}" for number in range(8)]))
    winner = table.current().run_id
    assert winner in told
    assert sum("another run committed snapshot 1 first" in line for line in told) == 7
    assert len(table.history()) == 1


def test_a_snapshot_of_missing_or_cut_files_is_not_committed(table, label_rows):
    whole, cut, missing = (add(table, label_rows({uri: 1})) for uri in "abc")
    os.truncate(Path(table.uri, cut.path), 10)
    os.unlink(Path(table.uri, missing.path))
    with pytest.raises(ConfigError, match="nothing is committed") as caught:
        table.commit(after(None, whole, cut, missing))
    assert f"has 10 bytes, not {cut.bytes}" in str(caught.value)
    assert f"{missing.path}' is missing" in str(caught.value)
    assert whole.path not in str(caught.value)
    assert table.current() is None


def test_new_files_are_checked_to_their_content_and_retained_ones_by_size(table, label_rows):
    retained, new = add(table, label_rows({"a": 1})), add(table, label_rows({"b": 1}))
    first = table.commit(after(None, retained))
    for part in (retained, new):
        path = Path(table.uri, part.path)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="another content") as caught:
        table.commit(after(first, retained, new))
    assert new.path in str(caught.value)
    assert retained.path not in str(caught.value)
    assert table.current() == first


def test_a_table_of_two_models_says_so(table, label_rows):
    old, new = add(table, label_rows({"a": 2, "b": 1})), add(table, label_rows({"c": 1}, model_id="m2"), model_id="m2")
    assert after(None, old, new).models == {"m1": 2, "m2": 1}


def test_a_snapshot_that_is_not_there_or_damaged_is_named(table, label_rows):
    table.commit(after(None, add(table, label_rows({"a": 1}))))
    with pytest.raises(ConfigError, match="snapshot 7 is not there yet; the latest is 1"):
        table.at(7)
    Path(table.uri, "_snapshots", f"{1:020d}.json").write_text('{"number": 1')
    with pytest.raises(ConfigError, match="not a snapshot"):
        table.current()


def test_other_files_beside_the_snapshots_are_no_snapshots(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 1}))))
    for name in (".x.tmp", "2.json", "00000000000000000002.json.bak", "lease.json"):
        Path(table.uri, "_snapshots", name).write_text("{}")
    assert table.history() == (first,)


def test_rows_are_streamed_in_the_columns_that_are_asked_for(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 2})), add(table, label_rows({"b": 1}))))
    reader = table.read(first, columns=["uri", "labels"])
    assert reader.schema.names == ["uri", "labels"]
    assert sorted(reader.read_all()["uri"].to_pylist()) == ["a", "a", "b"]


def test_files_without_dropped_images_are_carried_over_untouched(table, label_rows):
    # The ranges of the two files overlap, so it takes a look inside to know.
    outer, inner = (add(table, label_rows(dict.fromkeys(ids, 1))) for ids in (IDS[0::2], IDS[1::2]))
    first = table.commit(after(None, outer, inner))
    kept = table.carry_over(first, drop_ids=ImageIds.few(map(image_id, [IDS[3], "unknown"])), run_id="r2")
    assert kept[0] == outer
    assert kept[1].path.startswith("model=m1/run=r2/")
    assert (kept[1].thresholds_id, kept[1].rows) == ("t1", 3)


def test_nothing_is_rewritten_when_nothing_is_dropped(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 1, "b": 1}))))
    assert table.carry_over(first, drop_ids=ImageIds.few(), run_id="r2") == first.files
    assert table.carry_over(first, drop_ids=ImageIds.few([image_id("z")]), run_id="r2") == first.files
    assert table.carry_over(None, drop_ids=ImageIds.few([image_id("z")]), run_id="r2") == ()
    assert os.listdir(Path(table.uri, "model=m1")) == ["run=r1"]


def test_a_file_of_dropped_images_alone_is_left_out(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 3, "b": "no_face"}))))
    assert table.carry_over(first, drop_ids=ImageIds.few(map(image_id, "ab")), run_id="r2") == ()


def test_a_new_model_supersedes_the_old_rows_of_what_it_labels(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 2, "b": 1, "c": 1}))))
    new = add(table, label_rows({"a": 1, "b": "no_face"}, model_id="m2", run_id="r2"), run_id="r2", model_id="m2")
    kept = table.carry_over(first, drop_ids=ImageIds.few(map(image_id, "ab")), run_id="r2")
    second = table.commit(after(first, *kept, new, run_id="r2", model_id="m2"))
    assert faces(table, second) == [("a", 0, "m2", "r2"), ("b", -1, "m2", "r2"), ("c", 0, "m1", "r1")]
    assert (second.images, second.faces) == ({"ok": 2, "no_face": 1}, 2)
    # What was rewritten without a and b has the old model's folder, and its rows their own run.
    assert {file.path.split("/")[0] for file in kept} == {"model=m1"}
    assert faces(table, table.at(1)) == [
        ("a", 0, "m1", "r1"),
        ("a", 1, "m1", "r1"),
        ("b", 0, "m1", "r1"),
        ("c", 0, "m1", "r1"),
    ]


def test_rows_that_are_carried_over_are_not_changed(table, label_rows):
    first = table.commit(after(None, add(table, label_rows({"a": 2, "b": 1, "c": "crashed"}))))
    kept = table.carry_over(first, drop_ids=ImageIds.few([image_id("b")]), run_id="r2")
    second = table.commit(after(first, *kept, run_id="r2"))
    before = table.read(first, columns=TABLE_SCHEMA.names).read_all()
    expected = before.filter(pa.compute.not_equal(before["uri"], "b"))
    assert table.read(second, columns=TABLE_SCHEMA.names).read_all().equals(expected)
