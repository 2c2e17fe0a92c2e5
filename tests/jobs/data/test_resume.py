"""What a run takes over from runs that died: no Ray here, only the files that they leave."""

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.data.parts import FileFacts, write_part
from jobs.data.plan import DUE_SCHEMA, PlanLimits
from jobs.data.resume import RunNote, adopt, announce, conclude, discarded_files, refuse, unfinished_runs
from jobs.data.schema import TABLE_SCHEMA, image_id
from jobs.data.snapshots import LabelTable, next_snapshot
from mgmtn.errors import ConfigError

STARTED = datetime(2026, 1, 2, tzinfo=UTC)
Due = Callable[..., tuple[Path, ...]]


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    return LabelTable(str(tmp_path / "labels"))


@pytest.fixture
def due(tmp_path: Path) -> Due:
    """`due("ab", c={"etag": "v2"})`: a plan's files, in which images are as `label_rows` makes them, unless told."""

    def write(names: str = "", **others: Mapping[str, Any]) -> tuple[Path, ...]:
        rows = [row(name) for name in names] + [row(name) | changes for name, changes in others.items()]
        path = tmp_path / f"due-{len(list(tmp_path.iterdir()))}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=DUE_SCHEMA).sort_by("image_id"), path)
        return (path,)

    return write


def row(name: str) -> dict[str, Any]:
    return {"image_id": image_id(name), "uri": name, "etag": "v1", "size": 10, "attempts": 1, "reason": "new"}


def note(run_id: str, *, after: int = 0, **changes: Any) -> RunNote:
    work = {"faces": "detect", "limits": {"min_side": 16}}
    started = STARTED + timedelta(minutes=after)
    return RunNote(run_id=run_id, started_at=started, parent=0, model_id="m1", work=work).model_copy(update=changes)


def died(table: LabelTable, run_id: str, *files: pa.Table, **changes: Any) -> list[FileFacts]:
    """A run that wrote these files and was seen no more."""
    announce(table, note(run_id, **changes))
    return [
        write_part(rows, store=table.store, labels_uri=table.uri, model_id="m1", run_id=run_id, thresholds_id="t1")
        for rows in files
    ]


def left(adopted: Any, files: tuple[Path, ...]) -> list[str]:
    """Names of the images that are still to be done."""
    tables = adopted.remaining(pq.read_table(path) for path in files)
    return sorted(name for rows in tables for name in rows["uri"].to_pylist())


def images(table: LabelTable, files: tuple[FileFacts, ...]) -> list[tuple[str, int]]:
    rows = table.read_files(files, columns=["uri", "face_index"]).read_all().to_pylist()
    return sorted((row["uri"], row["face_index"]) for row in rows)


def test_nothing_is_taken_over_where_no_run_died(table, due):
    files = due("abc")
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert (adopted.files, adopted.images, adopted.runs) == ((), 0, ())
    assert left(adopted, files) == ["a", "b", "c"]


def test_finished_files_are_taken_over_as_they_are_and_the_rest_is_left(table, due, label_rows):
    written = died(table, "r1", label_rows({"a": 2, "b": "no_face"}), label_rows({"c": 1}))
    files = due("abdef", c={"reason": "changed"})
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert sorted(file.path for file in adopted.files) == sorted(file.path for file in written)
    assert (adopted.images, adopted.reasons, adopted.runs) == (3, {"changed": 1, "new": 2}, ("r1",))
    assert left(adopted, files) == ["d", "e", "f"]
    assert adopted.ids.hold(pa.array(list(map(image_id, "abcd")))).to_pylist() == [True, True, True, False]


@pytest.mark.parametrize("changes", [{"etag": "v2"}, {"etag": None}, {"attempts": 2}])
def test_an_image_that_is_due_otherwise_than_it_was_done_is_done_again(table, due, label_rows, changes):
    [written] = died(table, "r1", label_rows({"a": 2, "b": 1}))
    files = due("a", b=changes)
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert left(adopted, files) == ["b"]
    [rewritten] = adopted.files
    assert rewritten.path != written.path
    assert rewritten.run_id == "r2"
    assert images(table, adopted.files) == [("a", 0), ("a", 1)]
    [run_id] = set(table.read_files(adopted.files, columns=["run_id"]).read_all()["run_id"].to_pylist())
    assert run_id == "r1"  # of the run that labelled them


def test_an_image_without_an_etag_can_be_taken_over(table, due, label_rows):
    died(table, "r1", label_rows({"a": "fetch_error"}, etag=None))
    assert adopt(table, note("r2"), current=None, due=due(a={"etag": None})).images == 1


def test_images_that_are_no_longer_due_are_not_taken_over(table, due, label_rows):
    died(table, "r1", label_rows({"a": 1, "b": 1}), label_rows({"c": 1}))
    adopted = adopt(table, note("r2"), current=None, due=due("b"))
    assert images(table, adopted.files) == [("b", 0)]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": "m2"},
        {"thresholds_id": "t2"},
        {"work": {"faces": "whole-image"}},
        {"schema_version": 2},
    ],
)
def test_another_models_or_settings_work_is_no_use(table, due, label_rows, changes):
    died(table, "r1", label_rows({"a": 1}))
    adopted = adopt(table, note("r2", **changes), current=None, due=due("a"))
    assert (adopted.files, adopted.runs) == ((), ())


def test_an_image_in_two_files_is_taken_once_and_from_the_later_run(table, due, label_rows):
    died(table, "r1", label_rows({"a": 1, "b": 1}, run_id="r1"))
    died(table, "r2", label_rows({"a": 2}, run_id="r2"), after=1)
    adopted = adopt(table, note("r3", after=2), current=None, due=due("ab"))
    assert images(table, adopted.files) == [("a", 0), ("a", 1), ("b", 0)]
    assert adopted.images == 2
    assert adopted.runs == ("r2", "r1")
    # The file written for b alone is now the newest, and complete.
    announce(table, note("r3", after=2))
    again = adopt(table, note("r4", after=3), current=None, due=due("ab"))
    assert sorted(file.path for file in again.files) == sorted(file.path for file in adopted.files)


def test_a_retried_write_does_not_double_its_rows(table, due, label_rows):
    died(table, "r1", label_rows({"a": 1, "b": 1}), label_rows({"a": 1, "b": 1}, labelled_at=STARTED))
    adopted = adopt(table, note("r2"), current=None, due=due("ab"))
    assert images(table, adopted.files) == [("a", 0), ("b", 0)]


def test_a_damaged_file_is_passed_over_and_its_images_are_done_again(table, due, label_rows, caplog):
    torn, _ = died(table, "r1", label_rows({"a": 1}), label_rows({"b": 1}))
    path = Path(table.uri, torn.path)
    os.truncate(path, torn.bytes // 2)
    Path(path.parent, ".0a1b.tmp").write_bytes(b"half a file")
    files = due("ab")
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert left(adopted, files) == ["a"]
    assert torn.path in caplog.text


def test_an_image_is_not_taken_over_without_all_its_faces(table, due, label_rows):
    split, whole = label_rows({"a": 2}), label_rows({"b": 2})
    died(table, "r1", pa.concat_tables([split.filter(pc.equal(split["face_index"], 0)), whole]))
    files = due("ab")
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert left(adopted, files) == ["a"]
    assert images(table, adopted.files) == [("b", 0), ("b", 1)]


def test_files_of_the_current_snapshot_are_not_taken_again(table, due, label_rows):
    [written] = died(table, "r1", label_rows({"a": 1}))
    snapshot = next_snapshot(None, files=[written], run_id="r1", model_id="m1", inventory_digest="d")
    adopted = adopt(table, note("r2"), current=table.commit(snapshot), due=due("a"))
    assert adopted.files == ()
    assert adopted.runs == ("r1",)  # it died before it could say that it had ended


def test_passing_failures_of_a_refused_run_are_tried_again_unless_they_are_accepted(table, due, label_rows):
    outcomes = {"a": 1, "b": "fetch_error", "c": "decode_error", "d": "model_error", "e": "crashed"}
    died(table, "r1", label_rows(outcomes))
    files = due("abcde")
    assert left(adopt(table, note("r2"), current=None, due=files), files) == []
    refuse(table, "r1", reason="too many failures")
    assert left(adopt(table, note("r2"), current=None, due=files), files) == ["b", "d", "e"]
    assert left(adopt(table, note("r2"), current=None, due=files, accept_failures=True), files) == []


def test_a_run_that_ended_is_forgotten(table, label_rows):
    died(table, "r1", label_rows({"a": 1}))
    died(table, "r2", after=1)
    refuse(table, "r2", reason="drift")
    assert [(run.note.run_id, run.refusal is None) for run in unfinished_runs(table)] == [("r2", False), ("r1", True)]
    conclude(table, ["r1", "r2", "never was"])
    assert unfinished_runs(table) == ()


def test_two_runs_of_one_id_are_refused_and_a_damaged_note_is_named(table):
    announce(table, note("r1"))
    with pytest.raises(ConfigError, match="run_id 'r1'"):
        announce(table, note("r1"))
    Path(table.uri, "_runs", "r1.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"r1\.json.*note"):
        unfinished_runs(table)


def test_runs_are_taken_up_in_s3(bucket, due, label_rows):
    table = LabelTable(f"{bucket}/labels")
    [written] = died(table, "r1", label_rows({"a": 2}))
    files = due("ab")
    adopted = adopt(table, note("r2"), current=None, due=files)
    assert adopted.files == (written,)
    assert left(adopted, files) == ["b"]
    assert table.read_files(adopted.files, columns=TABLE_SCHEMA.names).read_all().num_rows == 2


def test_work_of_many_images_is_shared_out_bucket_by_bucket(table, due, label_rows, tmp_path):
    names = [str(number) for number in range(200)]
    died(table, "r1", label_rows(dict.fromkeys(names[:120], 2), run_id="r1"))
    died(table, "r2", *(label_rows(dict.fromkeys(names[some::4], 1), run_id="r2") for some in range(3)), after=1)
    expected = set(names[:150]) & {*names[0::4], *names[1::4], *names[2::4], *names[:120]}
    files = due(**{name: {"etag": "v2"} if name == "7" else {} for name in names[:150]})
    scratch = tmp_path / "scratch"
    limits = PlanLimits(images_per_bucket=10, folder=scratch)
    adopted = adopt(table, note("r3", after=2), current=None, due=files, limits=limits)
    found = images(table, adopted.files)
    assert {name for name, _ in found} == expected - {"7"}
    # Of an image in both runs' files, the later one's rows.
    assert found == sorted((name, face) for name in expected - {"7"} for face in range(2 if int(name) % 4 == 3 else 1))
    assert left(adopted, files) == sorted({*names[:150]} - expected | {"7"})
    assert adopted.images == len(expected) - 1
    del adopted
    assert not list(scratch.iterdir())


def test_a_file_that_is_not_taken_as_it_is_is_discarded_and_never_looked_at_again(table, due, label_rows):
    part, gone, whole = died(table, "r1", label_rows({"a": 1, "b": 1}), label_rows({"c": 1}), label_rows({"d": 1}))
    announce(table, note("r2", after=1))
    adopted = adopt(table, note("r2", after=1), current=None, due=due("ad"), discard=True)
    assert images(table, adopted.files) == [("a", 0), ("d", 0)]
    assert discarded_files(table) == {part.path, gone.path}
    # What was there of b and c is not taken up, even when they are back; the others are found where they are now.
    again = adopt(table, note("r3", after=2), current=None, due=due("abcd"), discard=True)
    assert sorted(file.path for file in again.files) == sorted(file.path for file in adopted.files)
    assert whole.path in {file.path for file in again.files}
    assert [run.note.run_id for run in unfinished_runs(table)] == ["r2", "r1"]
    conclude(table, ["r1", "r2"])
    assert (discarded_files(table), unfinished_runs(table)) == (frozenset(), ())


def test_nothing_is_discarded_unless_it_is_asked_for_or_where_a_file_could_not_be_read(table, due, label_rows):
    torn, _ = died(table, "r1", label_rows({"a": 1}), label_rows({"b": 1, "c": 1}))
    os.truncate(Path(table.uri, torn.path), torn.bytes // 2)
    adopt(table, note("r2"), current=None, due=due("b"))
    assert discarded_files(table) == frozenset()
    adopt(table, note("r2"), current=None, due=due("b"), discard=True)
    assert torn.path not in discarded_files(table)
    Path(table.uri, "_runs", "r2.discarded.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"r2\.discarded\.json.*list of files"):
        discarded_files(table)
