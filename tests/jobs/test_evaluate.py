import json
import shlex
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
from mgmtn.errors import CheckpointError, ConfigError
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


def write_labels(folder: Path, labels: list[list[int]]) -> None:
    """Put other labels into a table, row by row."""
    path = folder / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows = [row | {"labels": given} for row, given in zip(rows, labels, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), path)


def sheet_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[np.ndarray], list[str]]]:
    """Where each contact sheet's tiles and captions will be, drawn all the same."""
    drawn: list[tuple[list[np.ndarray], list[str]]] = []
    draw = evaluate.contact_sheet

    def listen(tiles: list[np.ndarray], captions: list[str]) -> Any:
        drawn.append((tiles, captions))
        return draw(tiles, captions)

    monkeypatch.setattr(evaluate, "contact_sheet", listen)
    return drawn


def test_the_sheet_shows_the_firmest_errors_of_the_right_pictures_when_tables_share_names(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    right = [1] + [0] * 39
    write_labels(data, [right] * 3 + [[*right[:7], 1, *right[8:]]] + [right] * 7)  # 3.jpg: a no at 0.12 that is a yes
    rows = pq.read_table(other / "part-00000.parquet").to_pylist()
    black = encode_face(np.zeros((SIZE + 2 * MARGIN, SIZE + 2 * MARGIN, 3), np.uint8))
    rows = [row | {"face": row["face"] and black} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), other / "part-00000.parquet")
    drawn = sheet_of(monkeypatch)
    evaluate.run(EvaluateSettings(model=str(model), data=(data, other), output=tmp_path / "out", device="cpu"))
    ((tiles, captions),) = drawn
    assert captions == ["3.jpg\nbig_nose\n0.119, label yes"]
    assert tiles[0].any()  # not the other table's black 3.jpg
    assert (tmp_path / "out/worst.png").stat().st_size > 1000


def test_the_firmest_error_comes_first(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.load(model)
    card = checkpoint.card.model_copy(update={"thresholds": {"young": 0.9}})
    Checkpoint(card, checkpoint.weights).save(model)
    right = [1] + [0] * 39
    write_labels(data, [right] * 4 + [[*right[:7], 1, *right[8:]]] + [[*right[:39], 1]] + [right] * 5)
    drawn = sheet_of(monkeypatch)
    evaluate.run(settings(model, data, tmp_path / "out"))
    assert [caption.split("\n")[:2] for caption in drawn[0][1]] == [["5.jpg", "young"], ["4.jpg", "big_nose"]]


def test_answers_that_are_not_finite_are_refused_not_counted_as_no(model: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(model)
    module = checkpoint.network()
    with torch.no_grad():
        module.heads.bias_A[3] = torch.nan
    Checkpoint.of(module, checkpoint.card).save(model)
    with pytest.raises(CheckpointError, match=r"not finite for 0\.jpg"):
        evaluate.run(settings(model, data, tmp_path / "out"))


def test_a_limit_takes_the_first_pictures_and_unreadable_ones_last(model: Path, data: Path, tmp_path: Path) -> None:
    assert evaluate.run(settings(model, data, tmp_path / "out", limit=3))["images"] == 3
    everything = evaluate.run(settings(model, data, tmp_path / "out", limit=11))
    assert (everything["images"], everything["unreadable"]) == (11, 1)


def test_the_recorded_command_runs_as_it_stands(model: Path, data: Path, tmp_path: Path) -> None:
    evaluate.run(settings(model, data, tmp_path / "an out", record=True))
    measured = Checkpoint.load(model).card.accuracy["data/test"]
    assert evaluate.main(shlex.split(measured["command"])[2:]) == 0
    assert sorted(path.name for path in model.iterdir()) == ["card.json", "model.safetensors"]


def test_recording_without_a_folder_is_refused_before_any_work(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.load(model)
    monkeypatch.setattr(evaluate, "resolve_model", lambda name: checkpoint)
    with pytest.raises(ConfigError, match="record: 's3://bucket/model' is not a local folder"):
        evaluate.run(EvaluateSettings(model="s3://bucket/model", data=(data,), output=tmp_path / "out", record=True))
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_named(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--device"]
    assert evaluate.main([*arguments, "banana"]) == 2
    assert "banana" in capsys.readouterr().err
    assert evaluate.main([*arguments, "cuda:99"]) == 2
    assert "device: 'cuda:99'" in capsys.readouterr().err


def test_labels_that_nobody_gave_measure_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    write_labels(data, [[-1] * 40] * 11)
    summary = evaluate.run(settings(model, data, tmp_path / "out"))
    assert (summary["images"], summary["mean_accuracy"], summary["ece"]) == (11, None, None)
    json.loads((tmp_path / "out/metrics.json").read_text(), parse_constant=pytest.fail)  # no NaN
