import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import demo
from jobs.data.datasets import DATASET_SCHEMA
from jobs.data.preparation import Preparation
from jobs.data.training_table import TRAINING_SCHEMA, decode_face
from jobs.prepare import MakeSamples, blocks_of, by_file, main, main_face
from mgmtn.images import ImageLimits, align_face
from mgmtn.landmarks import Faces, MediaPipeSettings
from mgmtn.masks import draw_masks, unpack_masks

SIZE, MARGIN = 96, 16
SIDE = SIZE + 2 * MARGIN
NAMES = ("admiral.jpg", "astronaut.png", "cat.png", "torn.jpg")


def faces_at(*boxes: tuple[float, float, float, float]) -> Faces:
    none = Faces.none()
    return dataclasses.replace(none, boxes=np.array(boxes, np.float32))


@pytest.mark.parametrize(
    ("boxes", "chosen"),
    [
        ([(10, 10, 50, 50)], 0),
        ([(0, 0, 80, 80), (20, 20, 60, 60)], 0),  # both in the middle: the larger
        ([(0, 0, 20, 20), (40, 40, 60, 60)], 1),  # both as large: the nearer
        ([(0, 0, 30, 30), (38, 38, 62, 62)], 1),  # a little larger, far out
        ([(0, 0, 60, 60), (45, 45, 55, 55)], 0),  # far larger, a little out
    ],
)
def test_the_main_face_is_large_and_near_the_middle(boxes, chosen):
    assert main_face(faces_at(*boxes), (100, 100, 3)) == chosen


def test_the_middle_is_that_of_wide_pictures_too():
    boxes = faces_at((40, 40, 60, 60), (140, 40, 160, 60))
    assert main_face(boxes, (100, 300, 3)) == 1
    assert main_face(boxes, (100, 100, 3)) == 0


def test_a_box_without_area_does_not_win():
    assert main_face(faces_at((50, 50, 50, 50), (0, 0, 20, 20)), (100, 100, 3)) == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of this machine's packages, a torn file among them."""
    folder = tmp_path_factory.mktemp("photos")
    demo.run(demo.DemoSettings(output=folder))
    return folder


@pytest.fixture(scope="module")
def samples(photos: Path) -> pa.Table:
    """The training rows of four pictures."""
    rows = [
        {"image": name, "uri": str(photos / name), "split": "train", "labels": [k - 1] * 40}
        for k, name in enumerate([*NAMES[:3]])
    ]
    rows.append({"image": NAMES[3], "uri": str(photos / NAMES[3]), "split": "test", "labels": [1] * 40})
    stage = MakeSamples(MediaPipeSettings(), ImageLimits(), SIZE, MARGIN)
    numbered = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA).append_column("row", pa.array([7, 8, 9, 10]))
    return stage(numbered)


def test_each_picture_becomes_one_row_that_says_what_it_is(samples):
    assert samples.drop_columns("row").schema == TRAINING_SCHEMA
    assert samples["row"].to_pylist() == [7, 8, 9, 10]
    assert samples["image"].to_pylist() == list(NAMES)
    assert samples["status"].to_pylist() == ["ok", "ok", "no_face", "decode_error"]
    assert samples["face_found"].to_pylist() == [True, True, False, False]
    assert samples["split"].to_pylist() == ["train", "train", "train", "test"]
    assert [labels[0] for labels in samples["labels"].to_pylist()] == [-1, 0, 1, 1]


def test_a_face_is_cut_with_its_margin_and_its_landmarks_and_masks_lie_on_it(samples, photos):
    row = samples.to_pylist()[1]
    face, points = decode_face(row["face"]), np.array(row["landmarks"], np.float32).reshape(68, 2)
    assert face.shape == (SIDE, SIDE, 3)
    # Eyes stand where the model expects them, within the margin's frame.
    left, right = points[36:42].mean(0) - MARGIN, points[42:48].mean(0) - MARGIN
    assert abs(left[1] - right[1]) < 4
    np.testing.assert_allclose((left + right) / 2, [SIZE * 0.5, SIZE * 0.47], atol=6)
    np.testing.assert_array_equal(unpack_masks(row["masks"]), draw_masks(points, crop_size=SIDE))
    # What training sees is what labelling cuts out of the photograph, up to a grey level.
    image = np.asarray(Image.open(photos / "astronaut.png").convert("RGB"))
    [found] = MediaPipeSettings().build().find([image])
    cut = align_face(image, found.landmarks[0], size=SIZE).astype(int)
    assert np.abs(cut - face[MARGIN:-MARGIN, MARGIN:-MARGIN]).max() <= 1


def test_a_picture_without_a_face_gives_its_centre_and_open_masks(samples):
    row = samples.to_pylist()[2]
    assert decode_face(row["face"]).shape == (SIDE, SIDE, 3)
    assert row["landmarks"] is None
    assert unpack_masks(row["masks"]).all()


def test_a_torn_file_costs_its_row_only(samples):
    row = samples.to_pylist()[3]
    assert row["face"] is row["masks"] is row["landmarks"] is None
    assert "damaged" in row["error"]


PREPARATION = Preparation(
    dataset_sha256="", images=150, rows_per_file=70, image_size=96, margin=16, detector={}, limits={}
)


def test_each_wanted_file_is_cut_into_blocks_of_its_own():
    numbered = pa.table({"row": range(150)})
    blocks = [block["row"].to_pylist() for block in blocks_of(numbered, [0, 2], PREPARATION)]
    assert [(block[0], block[-1]) for block in blocks] == [(0, 31), (32, 63), (64, 69), (140, 149)]
    assert [row for block in blocks for row in block] == [*range(70), *range(140, 150)]


def test_a_batch_that_ray_joined_is_parted_by_file():
    batch = pa.table({"row": [69, 70, 3, 140], "image": ["d", "e", "a", "f"]})
    parted = {number: rows["image"].to_pylist() for number, rows in by_file(batch, 70)}
    assert parted == {0: ["d", "a"], 1: ["e"], 2: ["f"]}


def test_every_wrong_setting_is_named_at_once(capsys):
    assert main(["photos", "--image-size", "8", "--margin", "-1"]) == 2
    problems = capsys.readouterr().err
    for name in ("image_size", "margin", "output"):
        assert name in problems.replace("-", "_")


def test_a_dataset_that_is_none_is_refused_before_ray_starts(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "data")]) == 2
    assert "neither labels.csv" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
