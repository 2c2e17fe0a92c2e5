import os

import duckdb
import pytest

from jobs.data.object_store import open_store
from jobs.data.parts import write_part
from jobs.data.snapshots import LabelTable, next_snapshot
from jobs.files import main


@pytest.fixture
def labels(tmp_path, label_rows) -> str:
    """A table of two snapshots: a; then a and b."""
    table = LabelTable(str(tmp_path / "my labels"))
    parent = None
    for run_id, uri in (("r1", "a"), ("r2", "b")):
        part = write_part(
            label_rows({uri: 2}, run_id=run_id),
            store=open_store(table.uri),
            labels_uri=table.uri,
            model_id="m1",
            run_id=run_id,
        )
        files = [*(parent.files if parent else ()), part]
        parent = table.commit(next_snapshot(parent, files=files, run_id=run_id, model_id="m1", inventory_digest="d"))
    return table.uri


def test_the_files_are_what_a_plain_engine_reads(labels, capsys):
    assert main([labels]) == 0
    files = capsys.readouterr().out.splitlines()
    assert all(os.path.isabs(file) for file in files)
    assert duckdb.execute("SELECT count(*) FROM read_parquet($1)", [files]).fetchall() == [(4,)]


def test_an_older_snapshot_keeps_its_files(labels, capsys):
    assert main([labels, "--snapshot", "1"]) == 0
    [file] = capsys.readouterr().out.splitlines()
    assert "/model=m1/run=r1/part-" in file


def test_a_relative_path_gives_absolute_uris(labels, capsys, monkeypatch):
    monkeypatch.chdir(os.path.dirname(labels))
    assert main(["my labels"]) == 0
    assert all(os.path.isfile(file) for file in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["typo"], "'typo': there is no label table"),
        ([], "LABELS"),
        (["{labels}", "--snapshot", "9"], "snapshot 9"),
        (["{labels}", "--snapshot", "0"], "--snapshot: '0'"),
    ],
)
def test_a_mistake_is_named_on_stderr(labels, capsys, arguments, message):
    assert main([argument.format(labels=labels) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
