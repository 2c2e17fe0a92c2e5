"""The two stages of the labelling flow, called as Ray's actors call them, on photographs and on what is none."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jobs import demo
from jobs.data.object_store import ObjectInfo, open_store
from jobs.data.parts import conform
from jobs.data.plan import DUE_SCHEMA
from jobs.data.schema import ERROR_LENGTH, TABLE_SCHEMA, image_id
from jobs.data.stages import FACE_SCHEMA, FaceWork, FindFaces, PredictAttributes, image_outcomes, predict
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.images import ImageLimits
from mgmtn.labeller import Labeller
from mgmtn.landmarks import MediaPipeSettings
from mgmtn.masks import unpack_masks
from mgmtn.network import MGMTN, NetworkSettings

SIZE = 64
NETWORK = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16)
WORK = FaceWork(
    detector=MediaPipeSettings(),
    limits=ImageLimits(max_pixels=1_000_000, max_bytes=3_000_000),
    mode="detect",
    image_size=SIZE,
    draw_masks=False,
    model_id="m1",
    run_id="r1",
)
OUTCOMES = {
    "animated.gif": "ok",
    "astronaut.png": "ok",
    "cat.png": "no_face",
    "cmyk.jpg": "ok",
    "empty.jpg": "decode_error",
    "heavy.bmp": "too_large",
    "huge.png": "too_large",
    "missing.jpg": "fetch_error",
    "page.jpg": "unsupported",
    "tiny.png": "too_small",
    "torn.jpg": "decode_error",
    "turned.jpg": "ok",
    "twins.png": "ok",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture for each outcome that a file can have."""
    source, folder = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("photos")
    demo.run(demo.DemoSettings(output=source))
    for name in ("astronaut.png", "cat.png", "torn.jpg"):
        (folder / name).write_bytes((source / name).read_bytes())
    face = Image.open(source / "astronaut.png").convert("RGB")
    face.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    face.crop((0, 0, 512, 400)).rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    face.resize((256, 256)).save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (256, 256))])
    twins = Image.new("RGB", (912, 512))
    twins.paste(face.resize((400, 400)), (0, 60))  # the smaller one comes first from the left
    twins.paste(face, (400, 0))
    twins.save(folder / "twins.png")
    Image.new("RGB", (9, 90)).save(folder / "tiny.png")
    Image.new("L", (1001, 1000)).save(folder / "huge.png")
    (folder / "heavy.bmp").write_bytes(bytes(3_000_001))
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder


def due(folder: Path, *names: str) -> pa.Table:
    """A plan's rows; what does not exist is in it without etag, as a list may name it."""
    rows = []
    for name in names:
        uri = str(folder / name)
        info = open_store(uri).stat(uri) or ObjectInfo(uri, None, None)
        rows.append(dataclasses.asdict(info) | {"image_id": image_id(uri), "attempts": 2, "reason": "retry"})
    return pa.Table.from_pylist(rows, schema=DUE_SCHEMA)


def find(folder: Path, *names: str, **changes: Any) -> pa.Table:
    return FindFaces(dataclasses.replace(WORK, **changes))(due(folder, *names))


@pytest.fixture(scope="module")
def found(photos: Path) -> pa.Table:
    """The faces of all the pictures."""
    return find(photos, *OUTCOMES)


@pytest.fixture(scope="module")
def by_name(found: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """The rows of each picture."""
    rows = found.to_pylist()
    return {name: [row for row in rows if row["uri"].endswith("/" + name)] for name in OUTCOMES}


def make_checkpoint(network: NetworkSettings = NETWORK, *, damage: bool = False, **card: Any) -> Checkpoint:
    torch.manual_seed(0)
    module = MGMTN(network)
    if damage:
        list(module.parameters())[-1].data.fill_(float("nan"))
    return Checkpoint.of(module, Card(name="tiny", kind="attributes", network=network, **card))


def labeller(checkpoint: Checkpoint) -> Labeller:
    torch.set_num_threads(1)
    return Labeller(checkpoint, device="cpu")


def probabilities(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in ATTRIBUTES], axis=1)


def test_each_image_that_is_read_is_a_step_of_the_work_however_long_the_block(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    monkeypatch.setattr("jobs.data.stages.still_working", lambda: steps.append(None))
    find(photos, *OUTCOMES, *OUTCOMES)
    assert len(steps) > 2 * len(OUTCOMES)  # and one between two groups


@pytest.mark.parametrize("name", OUTCOMES)
def test_each_file_gets_one_honest_outcome(by_name, name):
    rows = by_name[name]
    assert {row["status"] for row in rows} == {OUTCOMES[name]}
    if OUTCOMES[name] == "ok":
        assert all(row["error"] is None and len(row["face"]) == SIZE * SIZE * 3 for row in rows)
    else:
        [row] = rows
        assert (row["face_index"], row["face_count"]) == (-1, 0)
        assert row["face"] is row["landmarks"] is row["box_x1"] is row["detection_score"] is None
        assert (row["error"] is None) == (row["status"] == "no_face")
        assert len(row["error"] or "") <= ERROR_LENGTH


def test_rows_keep_the_plans_columns_and_say_who_made_them(by_name, found):
    assert found.schema == FACE_SCHEMA
    [missing] = by_name["missing.jpg"]
    assert (missing["etag"], missing["size"], missing["width"]) == (None, None, None)
    [cat] = by_name["cat.png"]
    assert (cat["width"], cat["height"]) == (451, 300)
    assert cat["size"] == Path(cat["uri"]).stat().st_size
    assert (cat["image_id"], cat["attempts"]) == (image_id(cat["uri"]), 2)
    assert (cat["model_id"], cat["run_id"]) == ("m1", "r1")
    assert abs((datetime.now(UTC) - cat["labelled_at"]).total_seconds()) < 600


def test_the_faces_of_a_picture_come_largest_first(by_name):
    large, small = by_name["twins.png"]
    assert [row["face_index"] for row in (large, small)] == [0, 1]
    assert large["face_count"] == small["face_count"] == 2
    assert small["box_x2"] < 400 < large["box_x1"]
    assert small["face_size"] == pytest.approx(400 / 512 * large["face_size"], rel=0.1)
    assert large["face_size"] ** 2 == pytest.approx(
        (large["box_x2"] - large["box_x1"]) * (large["box_y2"] - large["box_y1"]), rel=1e-4
    )


def test_boxes_and_landmarks_are_in_the_upright_picture(by_name):
    [plain], [turned] = by_name["astronaut.png"], by_name["turned.jpg"]
    assert (turned["width"], turned["height"]) == (512, 400)
    corners = ["box_x1", "box_y1", "box_x2", "box_y2"]
    np.testing.assert_allclose([turned[c] for c in corners], [plain[c] for c in corners], atol=6)
    np.testing.assert_allclose(turned["landmarks"], plain["landmarks"], atol=6)


def test_a_file_that_changed_since_the_inventory_is_a_fetch_error(photos, tmp_path):
    (tmp_path / "a.png").write_bytes((photos / "cat.png").read_bytes())
    plan = due(tmp_path, "a.png")
    (tmp_path / "a.png").write_bytes((photos / "tiny.png").read_bytes())
    [row] = FindFaces(WORK)(plan).to_pylist()
    assert row["status"] == "fetch_error"
    assert "changed" in row["error"]


def test_more_images_than_are_decoded_at_once_keep_their_order_and_results(photos):
    names = ["cat.png", "missing.jpg", "astronaut.png"] * 7
    rows = find(photos, *names).to_pylist()
    assert [Path(row["uri"]).name for row in rows] == names
    assert [row["status"] for row in rows] == ["no_face", "fetch_error", "ok"] * 7


def test_a_whole_image_without_a_face_is_one_face_without_landmarks(photos):
    cat, person = find(photos, "cat.png", "astronaut.png", mode="whole-image", draw_masks=True).to_pylist()
    assert (cat["status"], cat["face_index"], cat["face_count"]) == ("ok", 0, 1)
    assert cat["landmarks"] is cat["detection_score"] is None
    assert [cat[name] for name in ("box_x1", "box_y1", "box_x2", "box_y2")] == [0, 0, 451, 300]
    assert unpack_masks(cat["masks"]).all()
    assert len(cat["face"]) == SIZE * SIZE * 3
    assert len(person["landmarks"]) == 136
    assert not unpack_masks(person["masks"]).all()


def test_a_whole_image_that_is_broken_is_still_a_failure(photos):
    assert find(photos, "torn.jpg", mode="whole-image")["status"].to_pylist() == ["decode_error"]


def test_masks_are_drawn_when_the_model_asks_for_them(photos):
    [row] = find(photos, "astronaut.png", draw_masks=True).to_pylist()
    masks = unpack_masks(row["masks"])
    assert masks.shape == (len(GROUPS), 64, 64)
    assert masks.any(axis=(1, 2)).all()
    [row] = find(photos, "astronaut.png").to_pylist()
    assert row["masks"] is None


def test_prediction_fills_the_label_table(found):
    table = predict(found, labeller(make_checkpoint()))
    assert table.schema == TABLE_SCHEMA
    conform(table)
    has_face = found["face"].is_valid().to_numpy()
    values = probabilities(table)
    np.testing.assert_array_equal(np.isfinite(values), np.repeat(has_face[:, None], 40, axis=1))
    assert ((values[has_face] > 0) & (values[has_face] < 1)).all()
    assert table["labels"].is_valid().to_pylist() == has_face.tolist()
    for name in set(TABLE_SCHEMA.names) - {*ATTRIBUTES, "labels"}:
        assert table[name].to_pylist() == found[name].to_pylist(), name


def test_labels_are_the_probabilities_that_reach_the_thresholds(found):
    thresholds = {name: 0.3 + 0.01 * k for k, name in enumerate(ATTRIBUTES)}
    table = predict(found, labeller(make_checkpoint(thresholds=thresholds)))
    limits = np.array(list(thresholds.values()), np.float32)
    seen = set()
    for row, labels in zip(probabilities(table), table["labels"].to_pylist(), strict=True):
        if labels is not None:
            assert labels == sum(1 << k for k in range(40) if row[k] >= limits[k])
            seen |= {bool(labels >> k & 1) for k in range(40)}
    assert seen == {True, False}


def test_drawn_masks_reach_the_model(photos):
    landmarks = labeller(make_checkpoint(NETWORK.model_copy(update={"masks": "landmarks"})))
    drawn = find(photos, "astronaut.png", draw_masks=True)
    everywhere = find(photos, "astronaut.png", draw_masks=True).to_pydict()
    everywhere["masks"] = [b"\xff" * len(everywhere["masks"][0])]
    whole = pa.Table.from_pydict(everywhere, schema=FACE_SCHEMA)
    assert not np.allclose(probabilities(predict(drawn, landmarks)), probabilities(predict(whole, landmarks)))


def test_an_answer_that_is_not_finite_is_a_model_error(found):
    table = predict(found, labeller(make_checkpoint(damage=True)))
    has_face = found["face"].is_valid().to_pylist()
    for before, row, face in zip(found["status"].to_pylist(), table.to_pylist(), has_face, strict=True):
        assert row["status"] == ("model_error" if face else before)
        assert row["labels"] is row["young"] is None
    errors = [row["error"] for row in table.to_pylist() if row["status"] == "model_error"]
    assert set(errors) == {"the model's probabilities are not finite"}
    conform(table)


def test_a_block_without_any_face_is_predicted_too(photos):
    table = predict(find(photos, "cat.png", "torn.jpg"), labeller(make_checkpoint()))
    assert table["status"].to_pylist() == ["no_face", "decode_error"]
    assert table["labels"].null_count == 2


def test_the_answers_do_not_depend_on_the_block(found):
    model = labeller(make_checkpoint())
    whole = probabilities(predict(found, model))
    parts = [probabilities(predict(found.slice(index, 1), model)) for index in range(len(found))]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_outcomes_count_images_once_and_every_face(found):
    counts = image_outcomes(found)
    assert counts.pop("faces") == 6
    assert counts == {
        "decode_error": 2,
        "fetch_error": 1,
        "no_face": 1,
        "ok": 5,
        "too_large": 2,
        "too_small": 1,
        "unsupported": 1,
    }
    assert sum(counts.values()) == len(OUTCOMES)


def test_images_that_are_given_up_are_crashed_rows_of_both_stages(photos: Path):
    plan = due(photos, "astronaut.png", "cat.png")
    rows = FindFaces(WORK).give_up(plan)
    assert rows.schema.equals(FACE_SCHEMA)
    assert rows["status"].to_pylist() == ["crashed"] * 2
    assert rows["attempts"].to_pylist() == plan["attempts"].to_pylist()
    stage = PredictAttributes.__new__(PredictAttributes)  # its weights do not matter
    stage.progress = None
    table = stage.give_up(find(photos, "twins.png"))
    conform(table)
    assert [(row["status"], row["face_index"], row["young"], row["labels"]) for row in table.to_pylist()] == [
        ("crashed", 0, None, None),
        ("crashed", 1, None, None),
    ]
    assert all("died" in error for error in [*rows["error"].to_pylist(), *table["error"].to_pylist()])
