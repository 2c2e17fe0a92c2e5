"""What may go, and that a deletion which stops anywhere leaves every remaining snapshot whole."""

import itertools
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.parts import write_part
from jobs.data.plan import DUE_SCHEMA
from jobs.data.resume import RunNote, adopt, announce, refuse, unfinished_runs
from jobs.data.retention import Retention, delete, fence, plan_sweep
from jobs.data.schema import image_id
from jobs.data.snapshots import LabelTable, Snapshot
from jobs.outcomes import LeaseHeld
from mgmtn.errors import ConfigError

DAY = 86_400
WEEK = timedelta(days=7)
NOW = timedelta(0)


@pytest.fixture
def table(tmp_path, add_night) -> LabelTable:
    """Five nights, 20, 10, 8, 3 and 0 days ago: each adds an image and takes away that of the night before."""
    uri = str(tmp_path / "labels")
    for number, age in enumerate([20, 10, 8, 3, 0], start=1):
        add_night(uri, {f"{number}": 1, "always": 1}, drop=[str(number - 1)], run_id=f"r{number}")
        _age(uri, number, days=age)
    return LabelTable(uri)


def _age(uri: str, number: int, *, days: int) -> None:
    """Make a snapshot and its run's files so many days old."""
    moment = datetime.now(UTC) - timedelta(days=days)
    path = Path(uri, "_snapshots", f"{number:020d}.json")
    snapshot = Snapshot.model_validate_json(path.read_bytes())
    path.write_text(snapshot.model_copy(update={"created_at": moment}).model_dump_json())
    for file in Path(uri).glob(f"model=*/run=r{number}/*"):
        old(file, days=days)


def old(path: Path, *, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))


def leftover(table: LabelTable, rows, run_id: str, *, days: float) -> Path:
    part = write_part(rows, store=table.store, labels_uri=table.uri, model_id="m1", run_id=run_id)
    old(Path(table.uri, part.path), days=days)
    return Path(table.uri, part.path)


def note(table: LabelTable, run_id: str, *, days: float) -> None:
    started = datetime.now(UTC) - timedelta(days=days)
    announce(table, RunNote(run_id=run_id, started_at=started, parent=5, model_id="m1", work={}))


def whole(table: LabelTable) -> list[int]:
    """The snapshots that are there, each read to its last row."""
    return [s.number for s in table.history() if table.read(s, columns=["uri"]).read_all().num_rows == s.rows]


@pytest.mark.parametrize(
    ("older_than", "keep", "gone"),
    [
        (WEEK, 1, [1, 2]),  # the third was the current one until three days ago
        (timedelta(days=30), 1, []),
        (timedelta(days=1), 1, [1, 2, 3]),
        (timedelta(days=1), 4, [1]),
        (NOW, 1, [1, 2, 3, 4]),
        (NOW, 9, []),
    ],
)
def test_a_snapshot_goes_when_it_was_replaced_long_ago(table, older_than, keep, gone):
    sweep = plan_sweep(table, Retention.of(older_than, keep=keep))
    assert sweep.snapshots == gone
    assert sweep.kept_snapshots == [number for number in range(1, 6) if number not in gone]
    delete(table, sweep, check=lambda: None)
    assert whole(table) == sweep.kept_snapshots
    kept = {uri for snapshot in table.history() for uri in table.files(snapshot)}
    assert {str(path) for path in Path(table.uri).rglob("*.parquet")} == kept


def test_a_fence_counts_as_one_with_the_state_that_it_repeats(table):
    [four, five] = table.history()[3:]
    for number in (6, 7):
        sweep = plan_sweep(table, Retention.of(NOW, keep=2))
        assert sweep.kept_snapshots == list(range(4, number))
        fenced = fence(table, sweep, run_id="v")
        assert (fenced.current, fenced.kept_snapshots) == (number, list(range(4, number + 1)))
        delete(table, fenced, check=lambda: None)
    assert whole(table) == [4, 5, 6, 7]
    assert table.at(4).files == four.files
    assert table.current().files == five.files
    assert plan_sweep(table, Retention.of(NOW)).kept_snapshots == [5, 6, 7]


def test_a_file_that_a_kept_snapshot_needs_stays_however_old(tmp_path, add_night):
    uri = str(tmp_path / "labels")
    add_night(uri, {"old": 1}, run_id="r1")
    for number in (2, 3):
        add_night(uri, {str(number): 1}, run_id=f"r{number}")
    for number in (1, 2, 3):
        _age(uri, number, days=100)
    table = LabelTable(uri)
    sweep = plan_sweep(table, Retention.of(WEEK))
    assert (sweep.snapshots, sweep.files, sweep.kept_files) == ([1, 2], [], 3)


def test_what_a_dead_run_left_goes_at_the_age_and_no_sooner(table, label_rows):
    gone = leftover(table, label_rows({"x": 1}), "dead", days=8)
    stays = leftover(table, label_rows({"y": 1}), "dead", days=6)
    torn = gone.parent / f".{'0a' * 16}.tmp"
    fresh = Path(table.uri, "_snapshots", f".{'0b' * 16}.tmp")
    for path, days in ((torn, 8), (fresh, 1)):
        path.write_bytes(b"half")
        old(path, days=days)
    sweep = plan_sweep(table, Retention.of(WEEK, keep=9))
    assert [info.uri for info in sweep.files] == [str(gone)]
    assert [info.uri for info in sweep.torn] == [str(torn)]
    assert (sweep.recent, sweep.bytes) == (1, gone.stat().st_size + 4)
    delete(table, sweep, check=lambda: None)
    assert (gone.exists(), torn.exists(), stays.exists(), fresh.exists()) == (False, False, True, True)


def test_work_that_may_be_taken_up_waits_as_long_as_its_model_is_worked_for(table, label_rows):
    first = leftover(table, label_rows({"x": 1}), "night1", days=12)
    note(table, "night1", days=12)
    note(table, "night2", days=2)
    sweep = plan_sweep(table, Retention.of(WEEK, keep=9))
    assert (sweep.files, sweep.notes, sweep.waiting) == ([], [], 1)
    later = plan_sweep(table, Retention.of(timedelta(days=1), keep=9))
    assert [info.uri for info in later.files] == [str(first)]
    assert sorted(Path(uri).name for uri in later.notes) == ["night1.json", "night2.json"]


def test_a_discarded_file_of_a_run_that_waits_does_not(table, label_rows, tmp_path):
    """A picture of it was withdrawn: the next run of the model wrote the file's other rows again."""
    first = leftover(table, label_rows({"x": 1, "withdrawn": 1}), "night1", days=12)
    stays = leftover(table, label_rows({"y": 1}), "night1", days=12)
    note(table, "night1", days=12)
    due = tmp_path / "due.parquet"
    rows = [{"image_id": image_id(name), "uri": name, "etag": "v1", "attempts": 1, "reason": "new"} for name in "xy"]
    pq.write_table(pa.Table.from_pylist(rows, schema=DUE_SCHEMA), due)
    note(table, "night2", days=2)
    note2 = unfinished_runs(table)[0].note
    adopt(table, note2, current=table.current(), due=[due], discard=True)
    sweep = plan_sweep(table, Retention.of(WEEK, keep=9))
    assert ([info.uri for info in sweep.files], sweep.notes, sweep.waiting) == ([str(first)], [], 2)
    delete(table, sweep, check=lambda: None)
    assert stays.exists()
    later = plan_sweep(table, Retention.of(NOW, keep=9))
    assert "night2.discarded.json" in {Path(uri).name for uri in later.notes}


@pytest.mark.parametrize("sign", ["file", "refusal"])
def test_a_run_that_began_long_ago_lives_by_what_it_did_since(table, label_rows, sign):
    kept = leftover(table, label_rows({"x": 1}), "long", days=9)
    note(table, "long", days=9)
    assert plan_sweep(table, Retention.of(WEEK, keep=9)).files
    if sign == "file":
        leftover(table, label_rows({"y": 1}), "long", days=1)
    else:
        refuse(table, "long", reason="too many failed")
    assert plan_sweep(table, Retention.of(WEEK, keep=9)).files == []
    delete(table, plan_sweep(table, Retention.of(NOW, keep=9)), check=lambda: None)
    assert not kept.exists()
    assert not list(Path(table.uri, "_runs").iterdir())


def test_what_is_not_ours_stays(table):
    strange = [Path(table.uri, name) for name in ("README.md", "model=m1/notes.txt", "report.html", "a/part-1.parquet")]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        old(path, days=100)
    sweep = plan_sweep(table, Retention.of(NOW))
    assert sweep.foreign == 4
    delete(table, sweep, check=lambda: None)
    assert all(path.exists() for path in strange)


def test_a_deletion_that_stops_anywhere_leaves_whole_snapshots_and_is_finished_by_the_next(table, label_rows):
    leftover(table, label_rows({"x": 1}), "dead", days=8)
    note(table, "dead", days=8)
    total = _objects(plan_sweep(table, Retention.of(WEEK)))
    assert total >= 6
    for allowed in range(total):
        sweep = plan_sweep(table, Retention.of(WEEK))
        with pytest.raises(ConfigError, match="power cut"):
            delete(_cut_short(table, after=1 if allowed else 0), sweep, check=lambda: None)
        assert whole(table)[-3:] == [3, 4, 5]
        assert whole(table) == [snapshot.number for snapshot in table.history()]
    delete(table, plan_sweep(table, Retention.of(WEEK)), check=lambda: None)
    assert whole(table) == [3, 4, 5]
    assert not plan_sweep(table, Retention.of(WEEK)).files


def _objects(sweep) -> int:
    return len([*sweep.snapshots, *sweep.notes, *sweep.files, *sweep.torn])


def _cut_short(table: LabelTable, *, after: int) -> LabelTable:
    """The same table on a store that deletes so many objects and then nothing."""
    calls = itertools.count()  # one step of it is atomic: the deletions come from several threads

    class Failing(type(table.store)):
        def delete(self, uri: str) -> None:
            if next(calls) >= after:
                raise ConfigError("power cut")
            super().delete(uri)

    failing = LabelTable(table.uri)
    failing.store = Failing()
    return failing


def test_nothing_goes_once_the_lease_is_lost_or_the_table_has_moved_on(table, add_night):
    sweep = plan_sweep(table, Retention.of(NOW))
    before = sorted(Path(table.uri).rglob("*.*"))

    def lost() -> None:
        raise LeaseHeld("lost")

    with pytest.raises(LeaseHeld, match="lost"):
        delete(table, sweep, check=lost)
    assert sorted(Path(table.uri).rglob("*.*")) == before
    add_night(table.uri, {"late": 1}, run_id="r6")
    with pytest.raises(LeaseHeld, match="another run committed a snapshot after 5"):
        delete(table, sweep, check=lambda: None)
    assert whole(table) == [1, 2, 3, 4, 5, 6]
