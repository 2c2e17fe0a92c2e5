import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate
from jobs.data.stages import EVERYWHERE
from jobs.data.training_table import TRAINING_SCHEMA, Description, encode_face
from jobs.evaluate import EvaluateSettings
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.masks import MASK_SIZE, pack_masks
from mgmtn.network import MGMTN, NetworkSettings

SIZE, MARGIN = 64, 8


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small network that answers no to everything but the first attribute."""
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, masks="ones")
    module = MGMTN(network)
    with torch.no_grad():
        module.heads.weight_AD.zero_()
        module.heads.bias_A.fill_(-2.0)
        module.heads.bias_A[0] = 2.0
    return Checkpoint.of(module, Card(name="constant", kind="attributes", network=network)).save(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten faces and an unreadable picture; the first attribute is true of every readable one."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(11):
        face = rng.integers(0, 255, (SIZE + 2 * MARGIN, SIZE + 2 * MARGIN, 3), dtype=np.uint8)
        row = {"image": f"{number}.jpg", "uri": f"/{number}.jpg", "split": "test", "labels": [1] + [0] * 39}
        seen = {"status": "ok", "face_found": number > 0, "face": encode_face(face), "masks": pack_masks(EVERYWHERE)}
        unseen = {"status": "decode_error", "face_found": False}
        rows.append(row | (unseen if number == 10 else seen))
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), folder / "part-00000.parquet")
    Description(
        dataset="made up",
        image_size=SIZE,
        margin=MARGIN,
        mask_size=MASK_SIZE,
        detector="mediapipe",
        images=11,
        faces=9,
        no_face=1,
        failed=1,
        splits={"test": 11},
    ).save(folder)
    return folder


def settings(model: Path, data: Path, output: Path, **more: Any) -> EvaluateSettings:
    return EvaluateSettings(model=str(model), data=(data,), output=output, device="cpu", **more)


def test_every_picture_of_the_split_counts(model: Path, data: Path, tmp_path: Path) -> None:
    summary = evaluate.run(settings(model, data, tmp_path / "out"))
    assert summary["images"] == 11
    assert summary["unreadable"] == 1
    assert summary["no_face"] == 1
    # Right but for one: the unreadable picture, whose first attribute is true and counts as denied.
    assert summary["mean_accuracy"] == pytest.approx(100 * (39 + 10 / 11) / 40, abs=0.01)
    assert summary["mean_accuracy_faces"] == 100


def test_the_figures_are_written_and_drawn(model: Path, data: Path, tmp_path: Path) -> None:
    summary = evaluate.run(settings(model, data, tmp_path / "out"))
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["mean_accuracy"] == summary["mean_accuracy"]
    assert written["attributes"]["five_o_clock_shadow"]["known"] == 11
    assert written["attributes"]["young"]["average_precision"] is None
    text = (tmp_path / "out/metrics.md").read_text()
    assert summary["model_id"] in text
    assert "MGMTN (paper) | 92.3 | 87.01" in text
    for name in ("reliability.png", "accuracy.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_recorded_figures_go_into_the_card_and_leave_the_id(model: Path, data: Path, tmp_path: Path) -> None:
    before = Checkpoint.load(model)
    summary = evaluate.run(settings(model, data, tmp_path / "out", record=True))
    after = Checkpoint.load(model)
    assert after.card.model_id == before.card.model_id == summary["model_id"]
    measured = after.card.accuracy["data/test"]
    assert measured["mean_accuracy"] == summary["mean_accuracy"]
    assert measured["command"].startswith("mgmtn evaluate --model")


def test_a_table_for_another_square_is_refused_with_the_remedy(model: Path, data: Path, tmp_path: Path) -> None:
    description = json.loads((data / "dataset.json").read_text()) | {"image_size": 128}
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"128 pixels.*looks at 64.*--image-size 64"):
        evaluate.run(settings(model, data, tmp_path / "out"))


def test_a_split_without_rows_and_a_missing_table_are_named(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'train'"):
        evaluate.run(settings(model, data, tmp_path / "out", split="train"))
    with pytest.raises(ConfigError, match="not a finished training table"):
        evaluate.run(settings(model, tmp_path / "nowhere", tmp_path / "out"))
