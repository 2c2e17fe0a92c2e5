"""AML against drawn masks: a network whose answer is known, and tables whose masks are."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import evaluate
from jobs.data.training_table import TRAINING_SCHEMA, Description, encode_face
from jobs.evaluate import EvaluateSettings
from jobs.mask_agreement import mask_agreement
from mgmtn.attributes import GROUPS
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.masks import MASK_SIZE, pack_masks

SIZE = 64
SETTINGS = MaskNetSettings(resolution=64)


@pytest.fixture
def everywhere() -> MaskNet:
    """A mask network that sees every group everywhere, but ears nowhere."""
    net = MaskNet(SETTINGS).eval()
    with torch.no_grad():
        last = net.unet.segmentation_head[0]
        last.weight.zero_()
        last.bias.fill_(9.0)
        last.bias[GROUPS.index("ear")] = -9.0
    return net


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Four faces with masks over their upper halves, and a faceless picture with none."""
    folder = tmp_path / "data"
    folder.mkdir()
    upper = np.zeros((len(GROUPS), MASK_SIZE, MASK_SIZE), bool)
    upper[:, : MASK_SIZE // 2] = True
    rows = [
        {
            "image": f"{number}.png",
            "uri": f"/{number}.png",
            "split": "test",
            "status": "ok",
            "face_found": number < 4,
            "face": encode_face(np.full((SIZE, SIZE, 3), 40 * number, np.uint8)),
            "masks": pack_masks(upper if number < 4 else ~upper),
            "labels": [0] * 40,
        }
        for number in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), folder / "part-00000.parquet")
    Description(
        dataset="made up",
        image_size=SIZE,
        margin=0,
        mask_size=MASK_SIZE,
        detector="mediapipe",
        images=5,
        faces=4,
        no_face=1,
        failed=0,
        splits={"test": 5},
    ).save(folder)
    return folder


@pytest.mark.parametrize("limit", [0, 2])
def test_agreement_is_intersection_over_union_over_faces_alone(everywhere: MaskNet, table: Path, limit: int) -> None:
    found = mask_agreement(everywhere, (table,), split="test", limit=limit)
    assert found.pop("ear") == 0
    assert set(found.values()) == {0.5}


def test_a_split_without_a_face_is_named(everywhere: MaskNet, table: Path) -> None:
    with pytest.raises(ConfigError, match="no face of split 'validation'"):
        mask_agreement(everywhere, (table,), split="validation")


def test_a_mask_network_is_evaluated_by_its_masks_and_its_card_remembers(
    everywhere: MaskNet, table: Path, tmp_path: Path
) -> None:
    model = Checkpoint.of(everywhere, Card(name="aml", kind="masks", network=SETTINGS)).save(tmp_path / "aml")
    settings = EvaluateSettings(model=str(model), data=(table,), output=tmp_path / "out", device="cpu", record=True)
    summary = evaluate.run(settings)
    assert summary["mask_iou"]["mouth"] == 0.5
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["mask_iou"] == summary["mask_iou"]
    assert Checkpoint.load(model).card.accuracy["data/test"]["mask_iou"] == summary["mask_iou"]


def test_tables_of_different_sizes_are_not_measured_as_one(everywhere: MaskNet, table: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    Description.load(table).model_copy(update={"image_size": SIZE + 32}).save(larger)
    with pytest.raises(ConfigError, match=r"data: .*64 pixels, .*larger.* of 96"):
        mask_agreement(everywhere, (table, larger), split="test")
