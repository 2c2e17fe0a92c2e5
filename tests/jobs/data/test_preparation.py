"""What is kept of an unfinished training table, and what is thrown away."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.data.datasets import DATASET_SCHEMA
from jobs.data.preparation import (
    RECORD_FILE,
    SHEET_FILE,
    SHEET_SAMPLES,
    Preparation,
    count_outcomes,
    dataset_digest,
    take_up,
    write_part,
)
from jobs.data.training_table import DESCRIPTION_FILE, TRAINING_SCHEMA, encode_face
from mgmtn.masks import pack_masks

PREPARATION = Preparation(
    dataset_sha256="d1",
    images=5,
    rows_per_file=2,
    image_size=24,
    margin=4,
    detector={"kind": "mediapipe"},
    limits={},
)
FACE = encode_face(np.full((32, 32, 3), 90, np.uint8))
MASKS = np.zeros((8, 64, 64), bool)


def rows(*statuses: str) -> pa.Table:
    made = [
        {"image": f"{k}.jpg", "status": status, "face_found": status == "ok", "labels": [1] * 40}
        | ({} if status == "decode_error" else {"face": FACE, "masks": pack_masks(MASKS)})
        for k, status in enumerate(statuses)
    ]
    return pa.Table.from_pylist(made, schema=TRAINING_SCHEMA)


@pytest.fixture
def begun(tmp_path: Path) -> str:
    """A table of three files, the first and the last of which are written."""
    folder = str(tmp_path / "data")
    assert take_up(folder, PREPARATION) == set()
    write_part(rows("ok", "no_face"), 0, folder=folder)
    write_part(rows("decode_error"), 2, folder=folder)
    return folder


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_finished_files_are_kept_and_named(begun):
    before = Path(begun, "part-00000.parquet").stat()
    assert take_up(begun, PREPARATION) == {0, 2}
    after = Path(begun, "part-00000.parquet").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    "other",
    [
        {"dataset_sha256": "d2"},
        {"images": 6},
        {"rows_per_file": 3},
        {"image_size": 32},
        {"margin": 0},
        {"detector": {"kind": "fan"}},
        {"limits": {"max_bytes": 1}},
        {"version": "0"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_dataset_or_setting_starts_anew(begun, other):
    assert take_up(begun, PREPARATION.model_copy(update=other)) == set()
    assert names(begun) == {RECORD_FILE}
    assert take_up(begun, PREPARATION) == set()  # and what was there is not taken for finished later


def test_anew_keeps_nothing(begun):
    assert take_up(begun, PREPARATION, anew=True) == set()
    assert names(begun) == {RECORD_FILE}


@pytest.mark.parametrize("record", ["", "{}", "[1]"])
def test_a_record_that_cannot_be_understood_starts_anew(begun, record):
    Path(begun, RECORD_FILE).write_text(record)
    assert take_up(begun, PREPARATION) == set()


def test_files_without_a_record_start_anew(begun):
    Path(begun, RECORD_FILE).unlink()
    assert take_up(begun, PREPARATION) == set()
    assert "part-00000.parquet" not in names(begun)


def test_a_table_that_lacks_a_file_is_not_whole(begun):
    Path(begun, DESCRIPTION_FILE).write_text("{}")
    take_up(begun, PREPARATION)
    assert DESCRIPTION_FILE not in names(begun)
    write_part(rows("ok", "ok"), 1, folder=begun)
    Path(begun, DESCRIPTION_FILE).write_text("{}")
    assert take_up(begun, PREPARATION) == {0, 1, 2}
    assert DESCRIPTION_FILE in names(begun)


def test_a_damaged_file_and_one_of_other_length_are_made_again(begun):
    write_part(rows("ok"), 0, folder=begun)
    path = Path(begun, "part-00002.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    assert take_up(begun, PREPARATION) == set()


def test_what_a_killed_run_was_writing_is_swept_away_and_other_files_are_left_alone(begun):
    Path(begun, "." + "0f" * 16 + ".tmp").write_text("half a file")
    Path(begun, "notes.txt").write_text("mine")
    take_up(begun, PREPARATION)
    assert names(begun) == {RECORD_FILE, SHEET_FILE, "part-00000.parquet", "part-00002.parquet", "notes.txt"}


def test_outcomes_are_counted_over_all_files(begun):
    write_part(rows("ok", "ok"), 1, folder=begun)
    assert count_outcomes(begun, PREPARATION) == {"ok": 3, "no_face": 1, "decode_error": 1}


def test_a_file_holds_its_rows_in_order_and_nothing_else(begun):
    table = pq.read_table(Path(begun, "part-00000.parquet"))
    assert table.schema.equals(TRAINING_SCHEMA)
    assert table["image"].to_pylist() == ["0.jpg", "1.jpg"]


def test_a_first_file_of_torn_pictures_alone_has_no_sheet(tmp_path):
    write_part(rows("decode_error"), 0, folder=str(tmp_path))
    assert names(str(tmp_path)) == {"part-00000.parquet"}


def test_the_sheet_shows_twenty_four_faces_at_most(tmp_path):
    write_part(rows(*["ok"] * 30), 0, folder=str(tmp_path / "many"))
    write_part(rows(*["ok"] * SHEET_SAMPLES), 0, folder=str(tmp_path / "all"))
    with Image.open(tmp_path / "many" / SHEET_FILE) as many, Image.open(tmp_path / "all" / SHEET_FILE) as all_of_them:
        assert many.tobytes() == all_of_them.tobytes()


def test_the_digest_speaks_of_every_column(tmp_path):
    row = {"image": "a.jpg", "uri": "/a.jpg", "split": "train", "labels": [1] * 40}
    others = [{"image": "b.jpg"}, {"uri": "/b.jpg"}, {"split": "test"}, {"labels": [1] * 39 + [-1]}]
    tables = [pa.Table.from_pylist([row | other], schema=DATASET_SCHEMA) for other in [{}, {}, *others]]
    first, second, *rest = [dataset_digest(table) for table in tables]
    assert first == second
    assert len({first, *rest}) == 5


def test_the_digest_does_not_depend_on_how_a_table_is_stored():
    made = [{"image": f"{k}", "uri": f"/{k}", "split": "train", "labels": [k % 2] * 40} for k in range(6)]
    table = pa.Table.from_pylist(made, schema=DATASET_SCHEMA)
    assert dataset_digest(table.slice(2, 3)) == dataset_digest(pa.Table.from_pylist(made[2:5], schema=DATASET_SCHEMA))
    assert dataset_digest(pa.concat_tables([table.slice(0, 2), table.slice(2)])) == dataset_digest(table)
