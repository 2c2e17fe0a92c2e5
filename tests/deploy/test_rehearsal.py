"""The checks of the rehearsal find what is planted, and its command is the RayJob's."""

import math
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from deploy.rehearsal import __main__ as rehearsal
from deploy.rehearsal import checks
from deploy.rehearsal.nights import Command
from deploy.rehearsal.processes import having, marked
from jobs import label
from jobs.data.schema import TABLE_SCHEMA
from jobs.settings import load
from mgmtn.errors import ConfigError

PICTURES = [f"s3://photos/faces/{number}.jpg" for number in range(4)]


def row(number: int, *, face_index: int = 0, faces: int = 1, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(TABLE_SCHEMA.names)
    found = {"image_id": f"{number:032x}", "uri": PICTURES[number], "status": "ok", "face_index": face_index}
    numbers = {"face_count": faces, "smiling": 0.25, "box_x1": 10.0, "labelled_at": datetime.now(UTC)}
    return empty | found | numbers | more


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TABLE_SCHEMA)


ROWS = [row(0), row(1, faces=2), row(1, face_index=1, faces=2), row(2, face_index=-1, faces=0, status="no_face")]


def seen(rows: list[dict[str, Any]], **more: Any) -> Any:
    """Evidence of the table alone."""
    good = {"uris": frozenset(PICTURES[:3]), "gone": frozenset(PICTURES[3:]), "fresh": SimpleNamespace(exit_code=0)}
    history = [{"rows": len(ROWS), "faces": 3}]
    return SimpleNamespace(**(good | {"rows": table(rows), "fresh_rows": table(ROWS), "history": history} | more))


ON_ROWS = (
    checks.nobody_is_missing_and_the_deleted_are_gone,
    checks.nobody_is_there_twice,
    checks.the_rows_are_those_of_a_fresh_run_on_one_machine,
    checks.plain_duckdb_counts_what_the_snapshot_says,
)


def test_a_table_as_it_should_be_passes():
    rows = [dict(each, run_id="another", smiling=each["smiling"] + 1e-6) for each in ROWS]
    assert [list(check(seen(rows))) for check in ON_ROWS] == [[]] * 4


@pytest.mark.parametrize(
    ("check", "rows", "words"),
    [
        (ON_ROWS[0], ROWS[1:], "missing: ['s3://photos/faces/0.jpg']"),
        (ON_ROWS[0], [*ROWS, row(3)], "deleted, and still there: ['s3://photos/faces/3.jpg']"),
        (ON_ROWS[1], [*ROWS, ROWS[0]], "count_all': 2"),
        (ON_ROWS[1], [ROWS[0], ROWS[1], ROWS[3]], "more or fewer rows than faces"),
        (ON_ROWS[2], [dict(ROWS[0], smiling=0.5), *ROWS[1:]], "smiling: up to 0.25 apart"),
        (ON_ROWS[2], [dict(ROWS[0], smiling=math.nan), *ROWS[1:]], "smiling: up to inf"),
        (ON_ROWS[2], [dict(ROWS[0], smiling=None), *ROWS[1:]], "smiling: up to inf"),
        (ON_ROWS[2], [dict(ROWS[0], box_x1=11.0), *ROWS[1:]], "box_x1: up to 1 apart"),
        (ON_ROWS[2], [dict(ROWS[0], status="crashed"), *ROWS[1:]], "status: 1 rows differ"),
        (ON_ROWS[2], [dict(ROWS[0], attempts=2), *ROWS[1:]], "attempts: 1 rows differ"),
        (ON_ROWS[3], ROWS[:3], "(3, 3) rows and faces, not (4, 3)"),
    ],
)
def test_a_fault_in_the_table_is_found(check: Callable[[Any], Any], rows, words):
    assert words in "; ".join(check(seen(rows)))


def test_a_night_is_the_rayjobs_command_with_a_port_of_this_machine():
    command = Command.of_the_rayjob()
    words = command.words()
    loaded = load(label.LabelSettings, words[1:], prog="mgmtn label")
    assert words[:4] == ["label", "s3://photos/faces/", "--output", "s3://labels/faces"]
    assert loaded.metrics.port not in (None, 8090)
    assert (loaded.max_failed_fraction, loaded.lease.wait_seconds) == (0.05, 600)
    pushed = load(label.LabelSettings, command.words(pushgateway="127.0.0.1:9091")[1:], prog="mgmtn label")
    assert (pushed.metrics.port, pushed.metrics.pushgateway) == (None, "http://127.0.0.1:9091")


def test_an_orphan_with_the_mark_does_not_outlive_the_rehearsal(tmp_path):
    """A child that was given a session of its own, by a parent that is gone."""
    parent = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True)"
    )
    with marked(str(tmp_path)) as environment:
        subprocess.run([sys.executable, "-c", parent], env=environment, check=True)
        assert len(having(str(tmp_path))) == 1
    assert having(str(tmp_path)) == []


def test_only_an_earlier_rehearsals_folder_is_cleared(tmp_path):
    mine, new = tmp_path / "mine", tmp_path / "new"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="mine' is not empty, and not an earlier rehearsal's"):
        rehearsal.emptied(mine)
    assert (mine / "thesis.txt").exists()
    (rehearsal.emptied(new) / "night-1.log").touch()
    assert [path.name for path in rehearsal.emptied(new).iterdir()] == [rehearsal.MARK]
