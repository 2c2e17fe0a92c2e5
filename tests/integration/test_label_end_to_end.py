"""Photographs, broken files among them, through the real flow: Ray, detector, network, Parquet."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image

from jobs import demo, label
from jobs.data.object_store import local_path
from jobs.data.schema import TABLE_SCHEMA
from jobs.data.snapshots import LabelTable
from jobs.label import LabelSettings
from jobs.outcomes import ErrorBudgetExceeded
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network with random weights: it answers, though it knows nothing."""
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    card = Card(name="random", kind="attributes", network=network)
    return str(Checkpoint.of(MGMTN(network), card).save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One picture for each outcome that a folder can hold."""
    folder = tmp_path / "photos"
    demo.run(demo.DemoSettings(output=folder))
    face = Image.open(folder / "astronaut.png").convert("RGB")
    face.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    face.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif)
    frames = [face.resize((256, 256)), face.resize((256, 256)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (9, 9)).save(folder / "tiny.png")
    Image.new("L", (4000, 4000)).save(folder / "huge.png")
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder


def settings(photos: Path, output: Path, model: str, **more: Any) -> LabelSettings:
    limits = {"max_pixels": 8_000_000}
    return LabelSettings(inputs=(str(photos),), output=str(output), model=model, limits=limits, **more)


def rows(labels: Path, columns: str) -> list[tuple[Any, ...]]:
    """Read the table as anybody would: the listed files, in plain DuckDB."""
    table = LabelTable(str(labels))
    current = table.current()
    assert current is not None
    files = [local_path(uri) for uri in table.files(current)]
    return duckdb.sql(f"SELECT {columns} FROM read_parquet({files!r}) ORDER BY uri, face_index").fetchall()


@pytest.mark.usefixtures("local_ray")
def test_every_file_gets_one_honest_outcome(photos: Path, tmp_path: Path, model: str) -> None:
    summary = label.run(settings(photos, tmp_path / "labels", model))

    outcomes = {Path(uri).name: status for uri, status in rows(tmp_path / "labels", "uri, status")}
    assert outcomes == {
        "admiral.jpg": "ok",
        "animated.gif": "ok",
        "astronaut.png": "ok",
        "cat.png": "no_face",
        "cmyk.jpg": "ok",
        "coffee.png": "no_face",
        "collage.jpg": "ok",
        "empty.jpg": "decode_error",
        "flower.jpg": "no_face",
        "huge.png": "too_large",
        "motorcycle.png": "no_face",
        "page.jpg": "unsupported",
        "palace.jpg": "no_face",
        "rocket.jpg": "no_face",
        "tiny.png": "too_small",
        "torn.jpg": "decode_error",
        "turned.jpg": "ok",
    }
    assert summary["planned"]["new"] == sum(summary["images"].values()) == len(list(photos.iterdir()))
    assert summary["images"]["ok"] == 6
    assert summary["faces"] == 7  # the collage has two
    assert summary["snapshot"] == 1


@pytest.mark.usefixtures("local_ray")
def test_the_table_is_as_the_contract_says(photos: Path, tmp_path: Path, model: str) -> None:
    label.run(settings(photos, tmp_path / "labels", model))
    table = LabelTable(str(tmp_path / "labels"))
    current = table.current()
    assert current is not None
    files = [local_path(uri) for uri in table.files(current)]
    columns = {
        name: kind for name, kind, *_ in duckdb.sql(f"DESCRIBE SELECT * FROM read_parquet({files!r})").fetchall()
    }
    assert [name for name in columns if name not in ("model", "run")] == TABLE_SCHEMA.names
    assert columns["labels"] == "UBIGINT"
    assert columns["labelled_at"] == "TIMESTAMP WITH TIME ZONE"
    assert columns["landmarks"].startswith("FLOAT[")
    assert {columns[name] for name in ATTRIBUTES} == {"FLOAT"}

    values = np.array(rows(tmp_path / "labels", f"{', '.join(ATTRIBUTES)}"), dtype=float)
    bits = [row[0] for row in rows(tmp_path / "labels", "labels")]
    index = np.array([row[0] for row in rows(tmp_path / "labels", "face_index")])
    for probabilities, labels, face in zip(values, bits, index, strict=True):
        if face < 0:
            assert labels is None
            assert np.isnan(probabilities).all()
        else:
            assert ((probabilities >= 0) & (probabilities <= 1)).all()
            assert labels == sum(1 << k for k, value in enumerate(probabilities) if value >= 0.5)


@pytest.mark.usefixtures("local_ray")
def test_boxes_and_landmarks_lie_in_the_upright_image(photos: Path, tmp_path: Path, model: str) -> None:
    label.run(settings(photos, tmp_path / "labels", model))
    found = rows(tmp_path / "labels", "uri, width, height, box_x1, box_y1, box_x2, box_y2, landmarks, face_index")
    boxes = {Path(row[0]).name: row[1:7] for row in found if row[8] == 0}
    np.testing.assert_allclose(boxes["turned.jpg"], boxes["astronaut.png"], atol=4)  # JPEG moves them a little
    for _, width, height, x1, y1, x2, y2, landmarks, index in found:
        if index < 0:
            continue
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        points = np.array(landmarks).reshape(68, 2)
        assert (points[36:48].mean(0) > [x1, y1]).all()
        assert (points[36:48].mean(0) < [x2, y2]).all()


@pytest.mark.usefixtures("local_ray")
def test_the_same_folder_gives_the_same_probabilities_whatever_the_batch(
    photos: Path, tmp_path: Path, model: str
) -> None:
    columns = ", ".join(("uri", "face_index", *ATTRIBUTES))
    for name, batch_size in (("first", 64), ("again", 64), ("single", 1)):
        label.run(settings(photos, tmp_path / name, model, batch_size=batch_size))
    first, again, single = (rows(tmp_path / name, columns) for name in ("first", "again", "single"))
    assert first == again
    for one, other in zip(first, single, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(np.array(one[2:], float), np.array(other[2:], float), atol=1e-5)


@pytest.mark.usefixtures("local_ray")
def test_a_second_run_labels_only_what_changed(photos: Path, tmp_path: Path, model: str) -> None:
    labels = tmp_path / "labels"
    label.run(settings(photos, labels, model))
    (photos / "torn.jpg").write_bytes((photos / "admiral.jpg").read_bytes())
    (photos / "cat.png").unlink()
    summary = label.run(settings(photos, labels, model))
    assert summary["planned"] == {"new": 0, "changed": 1, "new_model": 0, "retry": 0, "relabel": 0, "deleted": 1}
    assert summary["snapshot"] == 2
    statuses = {Path(uri).name: status for uri, status in rows(labels, "uri, status")}
    assert statuses["torn.jpg"] == "ok"
    assert "cat.png" not in statuses
    assert len(statuses) == 16
    nothing = label.run(settings(photos, labels, model))
    assert nothing["snapshot"] == 2
    assert nothing["images"] == {}


@pytest.mark.usefixtures("local_ray")
def test_a_run_over_its_error_budget_publishes_nothing(photos: Path, tmp_path: Path, model: str) -> None:
    labels = tmp_path / "labels"
    with pytest.raises(ErrorBudgetExceeded, match="3 of 17 images failed") as refusal:
        label.run(settings(photos, labels, model, max_failed_fraction=0.1))
    assert refusal.value.exit_code == 4
    assert LabelTable(str(labels)).current() is None


@pytest.mark.usefixtures("local_ray")
def test_landmark_masks_change_the_answers_and_whole_images_need_no_detection(
    photos: Path, tmp_path: Path, model: str
) -> None:
    label.run(settings(photos, tmp_path / "learned", model))
    label.run(settings(photos, tmp_path / "drawn", model, masks="landmarks"))
    assert rows(tmp_path / "learned", "smiling") != rows(tmp_path / "drawn", "smiling")
    summary = label.run(settings(photos, tmp_path / "whole", model, faces="whole-image"))
    assert "no_face" not in summary["images"]
    assert summary["faces"] == summary["images"]["ok"] == 12


def test_the_command_ends_in_one_json_line_and_says_what_is_wrong(photos: Path, tmp_path: Path, model: str) -> None:
    command = [sys.executable, "-m", "jobs.label", str(photos), "--output", str(tmp_path / "labels"), "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"]["ok"] == 6
    assert "nanobind" not in done.stderr

    refused = subprocess.run([*command, "--model-workers", "50"], capture_output=True, text=True, check=False)
    assert refused.returncode == 0  # nothing is due, so nothing needs to fit
    (photos / "astronaut.png").touch()
    refused = subprocess.run([*command, "--model-workers", "50"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "model_workers" in refused.stderr
