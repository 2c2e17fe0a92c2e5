"""Queries over a real label table: Parquet files and a snapshot, read back through the program."""

import csv
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import boto3
import moto
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.data.object_store import open_store
from jobs.data.parts import write_part
from jobs.data.schema import TABLE_SCHEMA, image_id
from jobs.data.snapshots import LabelTable, next_snapshot
from jobs.query import main
from mgmtn.attributes import ATTRIBUTES
from mgmtn.drawing import contact_sheet


def face(uri: str, *, face_index: int = 0, thresholds: float = 0.5, **probabilities: float) -> dict[str, object]:
    """A labelled face; attributes that are not given have probability 0."""
    values = dict.fromkeys(ATTRIBUTES, 0.0) | probabilities
    labels = sum(1 << bit for bit, name in enumerate(ATTRIBUTES) if values[name] >= thresholds)
    box = {"box_x1": 20.0, "box_y1": 10.0, "box_x2": 60.0, "box_y2": 60.0}
    place = {"face_index": face_index, "face_count": 2, "labels": labels, "sharpness": math.nan}
    return _row(uri) | values | box | place


def faceless(uri: str, *, status: str = "no_face", error: str | None = None) -> dict[str, object]:
    return _row(uri) | {"status": status, "error": error, "face_index": -1, "face_count": 0}


def _row(uri: str) -> dict[str, object]:
    required = {"status": "ok", "attempts": 1, "model_id": "tiny", "run_id": "r1", "labelled_at": datetime.now(UTC)}
    return {name: None for name in TABLE_SCHEMA.names} | required | {"image_id": image_id(uri), "uri": uri}


def commit(labels: Path, rows: list[dict[str, object]], *, run_id: str = "r1") -> None:
    """Add rows to a label table as its next snapshot."""
    table = LabelTable(str(labels))
    parent = table.current()
    part = write_part(
        pa.Table.from_pylist(rows, schema=TABLE_SCHEMA),
        store=open_store(table.uri),
        labels_uri=table.uri,
        model_id="tiny",
        run_id=run_id,
    )
    files = (*(parent.files if parent else ()), part)
    table.commit(next_snapshot(parent, files=files, run_id=run_id, model_id="tiny", inventory_digest="d"))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Three faces in two images, an image without a face, and one that could not be read."""
    folder = tmp_path / "labels [1]"  # a pattern, to whoever does not quote it
    picture = tmp_path / "b.jpg"
    Image.new("RGB", (100, 80), (0, 90, 200)).save(picture, quality=100)
    rows = [
        face("/photos/a.jpg", smiling=0.9, young=0.95),
        face(str(picture), smiling=0.8, eyeglasses=0.7, young=0.2, male=0.6),
        face(str(picture), face_index=1, young=0.85),
        faceless("/photos/c.jpg"),
        faceless("/photos/d.jpg", status="decode_error", error="damaged"),
    ]
    commit(folder, rows)
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    """The rows that a query prints, all columns."""
    assert main([str(argument) for argument in (*arguments, "--format", "json", "--columns", "*")]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def names(rows: list[dict[str, object]]) -> list[str]:
    return [f"{Path(str(row['uri'])).name}#{row['face_index']}" for row in rows]


@pytest.mark.parametrize(
    ("expression", "faces"),
    [
        ("smiling", {"a.jpg#0", "b.jpg#0"}),
        ("not smiling", {"b.jpg#1"}),
        ("smiling and not eyeglasses and young > 0.8", {"a.jpg#0"}),
        ("young > 0.8", {"a.jpg#0", "b.jpg#1"}),
        ("male or young > 0.9", {"a.jpg#0", "b.jpg#0"}),
        ("not (smiling or young > 0.9)", {"b.jpg#1"}),
        ("smiling is false", {"b.jpg#1"}),
        ("status = 'no_face'", {"c.jpg#-1"}),
        ("smiling or status = 'no_face'", {"a.jpg#0", "b.jpg#0", "c.jpg#-1"}),
        ("Smiling and uri like '%/b.jpg'", {"b.jpg#0"}),
    ],
)
def test_an_attribute_alone_is_a_label_and_in_a_comparison_a_probability(labels, capsys, expression, faces):
    assert set(names(found(capsys, labels, expression))) == faces


def test_the_label_follows_the_thresholds_of_the_model(tmp_path, capsys):
    strict = face("/a.jpg", thresholds=0.95, smiling=0.9)
    commit(tmp_path / "labels", [strict, face("/b.jpg", thresholds=0.1, smiling=0.2)])
    assert names(found(capsys, tmp_path / "labels", "smiling")) == ["b.jpg#0"]
    assert names(found(capsys, tmp_path / "labels", "smiling > 0.5")) == ["a.jpg#0"]


def test_the_highest_bit_is_read_from_the_unsigned_labels(tmp_path, capsys):
    commit(tmp_path / "labels", [face("/a.jpg", **{ATTRIBUTES[-1]: 1.0}), face("/b.jpg", **{ATTRIBUTES[0]: 1.0})])
    assert names(found(capsys, tmp_path / "labels", ATTRIBUTES[-1])) == ["a.jpg#0"]


def test_an_empty_expression_is_every_row_in_a_fixed_order(labels, capsys):
    rows = found(capsys, labels, "")
    assert [row["uri"] for row in rows] == sorted(str(row["uri"]) for row in rows)
    assert len(rows) == 5
    assert found(capsys, labels) == rows


def test_json_has_no_nan_and_the_digits_that_were_stored(labels, capsys):
    row = found(capsys, labels, "young > 0.9")[0]
    assert row["sharpness"] is None
    assert row["smiling"] == 0.9


def test_a_table_shows_the_face_and_what_was_asked_about_it(labels, capsys):
    assert main([str(labels), "young > 0.9 and not eyeglasses"]) == 0
    header, _, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["uri", "face_index", "young", "eyeglasses"]
    assert line.split() == ["/photos/a.jpg", "0", "0.950", "0.000"]


def test_a_table_is_cut_at_twenty_rows_and_says_so_and_a_file_format_is_not(tmp_path, capsys):
    commit(tmp_path / "labels", [face(f"/{number:03}.jpg", smiling=1.0) for number in range(25)])
    assert main([str(tmp_path / "labels"), "smiling"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 22
    assert "shown=20 found=25 more='--limit 0 shows all'" in captured.err
    assert len(found(capsys, tmp_path / "labels", "smiling")) == 25
    assert names(found(capsys, tmp_path / "labels", "smiling", "--limit", 2)) == ["000.jpg#0", "001.jpg#0"]


def test_csv_holds_the_columns_that_were_named_in_their_order(labels, capsys):
    assert main([str(labels), "smiling", "--format", "csv", "--columns", "Young,uri"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [["young", "uri"], ["0.95", "/photos/a.jpg"], ["0.2", str(labels.parent / "b.jpg")]]


def test_parquet_goes_to_a_file_with_its_types(labels, tmp_path):
    output = tmp_path / "faces.parquet"
    assert main([str(labels), "smiling", "--format", "parquet", "--columns", "*", "--output", str(output)]) == 0
    table = pq.read_table(output)
    assert table.num_rows == 2
    assert table.schema.field("labels").type == pa.uint64()
    assert table.schema.names == TABLE_SCHEMA.names


def test_sql_takes_any_select_over_the_view(labels, capsys):
    sql = "SELECT status, count(*) AS images FROM faces WHERE face_index < 0 GROUP BY status ORDER BY status DESC;"
    assert main([str(labels), "--sql", sql, "--format", "json", "--limit", "5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"status": "no_face", "images": 1}, {"status": "decode_error", "images": 1}]


@pytest.mark.parametrize("wanted", ["Path", "path"])
def test_a_column_that_sql_names_in_capitals_can_be_chosen(labels, capsys, wanted):
    sql = "SELECT uri AS Path, status FROM faces WHERE status = 'no_face'"
    assert main([str(labels), "--sql", sql, "--columns", wanted, "--format", "json"]) == 0
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(row) == ["Path"]


def test_an_earlier_snapshot_can_be_asked(labels, capsys):
    commit(labels, [face("/photos/new.jpg", smiling=1.0)], run_id="r2")
    assert len(found(capsys, labels, "smiling")) == 3
    assert len(found(capsys, labels, "smiling", "--snapshot", 1)) == 2


def test_a_contact_sheet_shows_faces_and_a_grey_tile_for_what_cannot_be_read(labels, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main([str(labels), "smiling", "--sheet", str(sheet)]) == 0
    pixels = np.asarray(Image.open(sheet)).astype(int)
    assert (np.abs(pixels - (0, 90, 200)).max(axis=-1) <= 3).sum() > 10_000
    assert (pixels == 205).all(axis=-1).sum() > 10_000  # a.jpg does not exist
    assert "faces=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "caption"),
    [
        (["smiling and young < 0.5"], "#0 b.jpg\nsmiling 0.80\nyoung 0.20"),
        (["smiling and young < 0.5", "--columns", "uri,Eyeglasses,male"], "#0 b.jpg\neyeglasses 0.70\nmale 0.60"),
        (["smiling and young < 0.5", "--columns", "uri,status"], "#0 b.jpg\nsmiling 0.80\nyoung 0.20"),
        (["smiling and young < 0.5", "--columns", "*"], "#0 b.jpg\nsmiling 0.80\nyoung 0.20"),
        (["male", "--columns", "young,male,young"], "#0 b.jpg\nyoung 0.20\nmale 0.60"),
        (["face_index = 1", "--columns", "uri"], "#1 b.jpg"),
        (["--sql", "SELECT * FROM faces WHERE male > 0.5"], "#0 b.jpg"),
        (["--sql", "SELECT * FROM faces WHERE male > 0.5", "--columns", "young"], "#0 b.jpg\nyoung 0.20"),
        (["status = 'no_face'", "--columns", "smiling"], "c.jpg\nno_face"),
    ],
)
def test_a_caption_names_the_attributes_that_were_asked_for(labels, tmp_path, monkeypatch, arguments, caption):
    captions = []
    monkeypatch.setattr(
        "jobs.query.contact_sheet",
        lambda tiles, texts, **more: captions.extend(texts) or contact_sheet(tiles, texts, **more),
    )
    assert main([str(labels), *arguments, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert captions == [caption]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["smilng"], "there is no column 'smilng'; did you mean smiling?"),
        (["smiling; young"], "one expression is wanted, this is 2"),
        (["drop table faces"], "not a condition on a face"),
        (["young + 1"], "the expression gives a FLOAT, where true or false is wanted"),
        (["nonsense(young)"], "nonsense"),
        (["young > 'much'"], "Could not convert string 'much'"),
        (["", "--columns", "age"], "--columns: there is no column 'age'"),
        (["", "--sql", "DROP VIEW faces"], "one SELECT is wanted"),
        (["", "--sql", "SELECT 1; SELECT 2"], "one SELECT is wanted"),
        (["", "--sql", "SELECT nope FROM faces"], '"nope" not found'),
        (["", "--sql", "SELECT uri FROM faces", "--sheet", "x.png"], "--sheet needs the columns etag, face_index"),
        (["smiling", "--sql", "SELECT 1"], "give one of them"),
        (["", "--output", "x.csv"], "a file needs --format csv, json or parquet"),
        (["", "--snapshot", "7"], "snapshot 7"),
        (["", "--sheet", "x.pdf"], "'x.pdf': name a .png, .jpg or .webp file"),
        (["", "--format", "csv", "--output", "folder/"], "'folder/': this names a folder, not a file"),
        (["", "--format", "csv", "--output", "/nowhere/x.csv"], "there is no folder '/nowhere'"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_name(labels, capsys, monkeypatch, tmp_path, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main([str(labels), *arguments]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_a_folder_without_a_snapshot_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "smiling"]) == 2
    assert "there is no label table with a snapshot yet" in capsys.readouterr().err


def test_a_file_that_is_gone_is_named(labels, capsys):
    for part in labels.rglob("*.parquet"):
        part.unlink()
    assert main([str(labels), "smiling"]) == 2
    assert "part-" in capsys.readouterr().err


def test_parquet_is_not_thrown_at_a_terminal(labels, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main([str(labels), "", "--format", "parquet"]) == 2
    assert "--format parquet is binary" in capsys.readouterr().err


def test_a_table_in_s3_is_asked_like_a_local_one(labels, capsys, monkeypatch, tmp_path):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("MGMTN_CACHE", str(tmp_path / "cache"))
    with moto.mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="faces")
        for path in labels.rglob("*.*"):
            client.upload_file(str(path), "faces", f"labels/{path.relative_to(labels)}")
        assert found(capsys, "s3://faces/labels", "smiling") == found(capsys, labels, "smiling")
