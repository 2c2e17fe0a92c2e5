import json
from datetime import datetime

import pytest

from jobs.data.object_store import open_store
from jobs.data.parts import write_part
from jobs.data.snapshots import LabelTable, Pace, next_snapshot
from jobs.snapshots import SnapshotsSettings, main, run


@pytest.fixture
def labels(tmp_path, label_rows) -> str:
    """A table of two snapshots."""
    table = LabelTable(str(tmp_path / "labels"))
    parent = None
    for run_id, images in (("r1", {"a": 2, "b": "no_face"}), ("r2", {"c": 1, "d": "crashed"})):
        part = write_part(
            label_rows(images, run_id=run_id),
            store=open_store(table.uri),
            labels_uri=table.uri,
            model_id="m1",
            run_id=run_id,
        )
        files = [*(parent.files if parent else ()), part]
        parent = table.commit(
            next_snapshot(
                parent,
                files=files,
                run_id=run_id,
                model_id="m1",
                inventory_digest="d",
                planned={"new": len(images), "deleted": 0},
                pace=Pace(images=2, seconds=12.345) if run_id == "r2" else None,
            )
        )
    return table.uri


def test_a_pipe_gets_tab_separated_rows_oldest_first(labels, capsys):
    assert main([labels]) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert (first["number"], first["run_id"], first["model_id"], first["files"]) == ("1", "r1", "m1", "1")
    assert (second["number"], second["rows"], second["faces"]) == ("2", "5", "3")
    assert second["images"] == "crashed=1 no_face=1 ok=2"
    assert (second["models"], second["planned"], second["seconds"]) == ("m1=4", "new=2", "12.35")
    assert first["seconds"] == ""


def test_json_is_one_object_a_line(labels, capsys):
    assert main([labels, "--format", "json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["images"] == {"no_face": 1, "ok": 1}
    assert (second["number"], second["files"], second["bytes"] > first["bytes"]) == (2, 2, True)
    assert (first["seconds"], second["seconds"], second["planned"]) == (None, 12.35, {"new": 2})
    assert datetime.fromisoformat(first["created_at"]) <= datetime.fromisoformat(second["created_at"])


def test_a_terminal_gets_a_table(labels, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run(SnapshotsSettings(labels=labels, format="table"))
    printed = capsys.readouterr().out
    assert "created (UTC)" in printed
    assert "crashed=1" in printed
    assert "12.35" in printed
    assert "\t" not in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_one_snapshot_can_be_asked_for(labels, capsys):
    assert main([labels, "--snapshot", "1", "--format", "json"]) == 0
    [row] = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["number"] == 1
    assert main([labels, "--snapshot", "5"]) == 2
    assert "snapshot 5 is not there yet; the latest is 2" in capsys.readouterr().err


def test_images_of_two_models_are_told_apart(labels, add_night, capsys):
    add_night(labels, {"e": 1}, run_id="r3", model_id="m2")
    assert main([labels, "--snapshot", "3"]) == 0
    header, row = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert dict(zip(header, row, strict=True))["models"] == "m1=4 m2=1"


def test_no_table_is_a_mistake(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "there is no label table" in capsys.readouterr().err
