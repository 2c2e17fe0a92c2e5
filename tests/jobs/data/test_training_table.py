from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.training_table import (
    DESCRIPTION_FILE,
    TRAINING_SCHEMA,
    Description,
    Samples,
    decode_face,
    encode_face,
    load_samples,
)
from mgmtn.errors import ConfigError
from mgmtn.masks import pack_masks

DESCRIPTION = Description(
    dataset="photos",
    image_size=24,
    margin=4,
    mask_size=64,
    detector="mediapipe",
    images=3,
    faces=2,
    no_face=1,
    failed=0,
    splits={"train": 3},
)
RNG = np.random.default_rng(0)
FACES = RNG.integers(0, 256, (26, 32, 32, 3), dtype=np.uint8)
MASKS = RNG.random((26, 8, 64, 64)) < 0.5


def write_table(folder: Path, names: str, *, split: str = "train", **geometry: int) -> Path:
    """One file per two samples; each sample's letter says which face, masks and labels it has."""
    folder.mkdir()
    rows = [
        {
            "image": f"{name}.jpg",
            "split": split,
            "status": "ok",
            "face_found": name != "c",
            "face": encode_face(FACES[ord(name) - ord("a")]),
            "masks": pack_masks(MASKS[ord(name) - ord("a")]),
            "labels": [ord(name) % 3 - 1] * 40,
        }
        for name in names
    ]
    for start in range(0, len(rows), 2):
        pq.write_table(
            pa.Table.from_pylist(rows[start : start + 2], schema=TRAINING_SCHEMA), folder / f"{start}.parquet"
        )
    DESCRIPTION.model_copy(update=geometry).save(folder)
    return folder


def letters(samples: Samples) -> str:
    return "".join(name[0] for name in samples.names)


def test_a_face_comes_back_pixel_by_pixel():
    np.testing.assert_array_equal(decode_face(encode_face(FACES[0])), FACES[0])


def test_a_description_comes_back_as_it_was_saved(tmp_path):
    DESCRIPTION.save(tmp_path)
    assert Description.load(tmp_path) == DESCRIPTION


def test_a_table_without_a_description_is_not_finished(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path.name}' is not a finished training table"):
        Description.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", DESCRIPTION.model_dump_json()[:-1] + ',"colour":1}'])
def test_a_description_of_another_version_is_refused(tmp_path, text):
    (tmp_path / DESCRIPTION_FILE).write_text(text)
    with pytest.raises(ConfigError, match=DESCRIPTION_FILE):
        Description.load(tmp_path)


def test_samples_are_sorted_by_name_and_keep_together_what_belongs_together(tmp_path):
    samples = load_samples((write_table(tmp_path / "t", "dbca"),), split="train")
    assert letters(samples) == "abcd"
    np.testing.assert_array_equal(samples.faces, FACES[:4])
    np.testing.assert_array_equal(samples.unpacked_masks(64), MASKS[:4])
    np.testing.assert_array_equal(samples.labels[:, 0], [ord(name) % 3 - 1 for name in "abcd"])
    assert samples.found.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(samples.known, samples.labels != -1)


def test_tables_follow_one_another_and_a_limit_takes_the_first(tmp_path):
    folders = (write_table(tmp_path / "t", "db"), write_table(tmp_path / "u", "eca"))
    assert letters(load_samples(folders, split="train")) == "bdace"
    limited = load_samples(folders, split="train", limit=3)
    assert letters(limited) == "bda"
    np.testing.assert_array_equal(limited.labels[:, 39], [ord(name) % 3 - 1 for name in "bda"])


def test_taking_keeps_the_order_that_is_asked(tmp_path):
    samples = load_samples((write_table(tmp_path / "t", "abcd"),), split="train").take(np.array([3, 0]))
    assert letters(samples) == "da"
    np.testing.assert_array_equal(samples.faces, FACES[[3, 0]])
    assert len(samples) == 2


@pytest.mark.parametrize("geometry", [{"image_size": 32}, {"margin": 0}, {"mask_size": 32}])
def test_tables_of_another_geometry_do_not_mix(tmp_path, geometry):
    folders = (write_table(tmp_path / "t", "ab"), write_table(tmp_path / "u", "cd", **geometry))
    with pytest.raises(ConfigError, match=r"differ in \(image_size, margin, mask_size\).*24, 4, 64"):
        load_samples(folders, split="train")


def test_a_split_without_rows_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no usable row of split 'test'"):
        load_samples((write_table(tmp_path / "t", "ab"),), split="test")


def test_a_table_without_files_has_no_rows(tmp_path):
    with pytest.raises(ConfigError, match="no usable row of split 'train'"):
        load_samples((write_table(tmp_path / "t", ""),), split="train")


def test_rows_without_a_face_are_passed_over(tmp_path):
    folder = write_table(tmp_path / "t", "ab")
    failed = {"image": "aa.jpg", "split": "train", "status": "decode_error", "face_found": False, "labels": [0] * 40}
    pq.write_table(pa.Table.from_pylist([failed], schema=TRAINING_SCHEMA), folder / "part-00009.parquet")
    assert letters(load_samples((folder,), split="train")) == "ab"


def test_each_row_finds_its_place_and_nothing_past_the_limit_is_decoded(tmp_path, monkeypatch):
    folders = (write_table(tmp_path / "t", "hgfedcba"), write_table(tmp_path / "u", "zyx"))
    decoded = []
    monkeypatch.setattr("jobs.data.training_table.decode_face", lambda data: decoded.append(data) or decode_face(data))
    monkeypatch.setattr("jobs.data.training_table._ROWS_AT_ONCE", 3)
    samples = load_samples(folders, split="train", limit=5)
    assert letters(samples) == "abcde"
    np.testing.assert_array_equal(samples.faces, FACES[:5])
    assert len(decoded) == 5
    whole = load_samples(folders, split="train")
    assert letters(whole) == "abcdefghxyz"
    np.testing.assert_array_equal(whole.faces, FACES[[*range(8), 23, 24, 25]])
    np.testing.assert_array_equal(whole.unpacked_masks(64), MASKS[[*range(8), 23, 24, 25]])


def test_files_of_other_things_inside_the_folder_are_left_alone(tmp_path):
    folder = write_table(tmp_path / "t", "ab")
    write_table(folder / "another", "cd")
    assert letters(load_samples((folder,), split="train")) == "ab"
