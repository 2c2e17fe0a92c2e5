"""The view over Parquet files, and rows as text for a reader; the file formats are tested with the program."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.faces_view import columns_of, open_faces, rows_of, table_text
from jobs.data.schema import TABLE_SCHEMA
from mgmtn.errors import ConfigError


def test_a_snapshot_without_files_has_the_columns_and_no_row():
    connection = open_faces([])
    assert list(columns_of(connection, "FROM faces")) == TABLE_SCHEMA.names
    assert rows_of(connection, "SELECT uri FROM faces") == []


def test_the_folders_of_a_file_are_no_columns_and_its_path_no_pattern(tmp_path):
    folder = tmp_path / "model=x" / "it's [1] *"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"uri": ["a"]}), folder / "part.parquet")
    connection = open_faces([folder / "part.parquet"])
    assert rows_of(connection, "FROM faces") == [{"uri": "a"}]


def test_files_of_an_older_schema_lack_only_the_newer_columns(tmp_path):
    for name, columns in (("old", {"uri": ["a"]}), ("new", {"young": [0.5], "uri": ["b"]})):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    connection = open_faces([tmp_path / "old.parquet", tmp_path / "new.parquet"])
    rows = rows_of(connection, "FROM faces ORDER BY uri")
    assert rows == [{"uri": "a", "young": None}, {"uri": "b", "young": 0.5}]


def test_a_time_with_a_zone_comes_back_in_utc(tmp_path):
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    pq.write_table(pa.table({"at": pa.array([moment], pa.timestamp("us", "UTC"))}), tmp_path / "a.parquet")
    assert rows_of(open_faces([tmp_path / "a.parquet"]), "FROM faces") == [{"at": moment}]


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_a_file_that_is_missing_or_no_parquet_is_named(tmp_path, content):
    path = Path(tmp_path, "part.parquet")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"part\.parquet"):
        open_faces([path])


def test_a_table_aligns_numbers_right_and_shows_neither_lists_nor_control_characters():
    rows = [
        {"uri": "a\x1b[31m.jpg", "young": 0.12345, "landmarks": [0.0] * 136},
        {"uri": "[bold]b[/bold].jpg", "young": None, "landmarks": None},
    ]
    header, _, first, second = table_text(rows, columns=["uri", "young", "landmarks"]).splitlines()
    assert header.split() == ["uri", "young", "landmarks"]
    assert first.split() == ["a?[31m.jpg", "0.123", "[136", "values]"]
    assert second == "[bold]b[/bold].jpg"


def test_a_terminal_cuts_a_long_uri_at_its_start_and_a_pipe_cuts_nothing():
    row = {"uri": f"s3://bucket/{'x' * 300}/face.jpg"}
    assert table_text([row], columns=["uri"]).splitlines()[-1] == row["uri"]
    cut = table_text([row], columns=["uri"], width=80).splitlines()[-1]
    assert len(cut) <= 80
    assert cut.startswith("…")
    assert cut.endswith("/face.jpg")


def test_no_row_leaves_the_header():
    assert table_text([], columns=["uri", "young"]).splitlines()[0].split() == ["uri", "young"]
