"""Checkpoints written and read back, and everything that may be wrong with the files of one."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from mgmtn import checkpoint as checkpoint_module
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import CARD_FILE, WEIGHTS_FILE, Calibration, Card, Checkpoint, shipped_models
from mgmtn.errors import CheckpointError
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)
CARD = Card(
    name="tiny",
    kind="attributes",
    network=TINY,
    thresholds={"young": 0.4, "smiling": 1 / 3},
    calibration={"young": Calibration(slope=0.9, intercept=-0.1)},
    training={"data": "none"},
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MGMTN(TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(network):
    return Checkpoint.of(network, CARD)


@pytest.fixture(scope="module")
def mask_checkpoint():
    torch.manual_seed(0)
    settings = MaskNetSettings()
    return Checkpoint.of(MaskNet(settings), Card(name="tiny-masks", kind="masks", network=settings))


@pytest.fixture
def folder(checkpoint, tmp_path):
    return checkpoint.save(tmp_path / "tiny")


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def edit_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps(card | changes))


# Round trips.


@torch.inference_mode()
def test_a_network_answers_the_same_to_the_bit_after_saving_and_loading(network, folder):
    loaded = Checkpoint.load(folder).network()
    assert not loaded.training
    torch.testing.assert_close(loaded(images()), network(images()), rtol=0, atol=0)


@torch.inference_mode()
def test_half_the_bytes_give_nearly_the_same_answers(network, checkpoint, tmp_path):
    half = Checkpoint.of(network, CARD, half=True)
    assert len(half.weights) < 0.6 * len(checkpoint.weights)
    loaded = Checkpoint.load(half.save(tmp_path)).network()
    torch.testing.assert_close(loaded(images()), network(images()), rtol=0.02, atol=0.02)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_half_leaves_vectors_and_whole_numbers_as_they_are():
    module = torch.nn.BatchNorm2d(4)
    module.register_buffer("table", torch.full((2, 2), 100_001))
    module.register_parameter("matrix", torch.nn.Parameter(torch.ones(2, 2)))
    stored = safetensors.torch.load(Checkpoint.of(module, CARD, half=True).weights)
    assert stored["running_var"].dtype == torch.float32
    assert stored["matrix"].dtype == torch.float16
    assert stored["table"].tolist() == [[100_001] * 2] * 2


@torch.inference_mode()
def test_a_mask_network_comes_back_too(mask_checkpoint, tmp_path):
    loaded = Checkpoint.load(mask_checkpoint.save(tmp_path))
    assert loaded.card == mask_checkpoint.card
    torch.testing.assert_close(loaded.mask_net()(images()), mask_checkpoint.mask_net()(images()), rtol=0, atol=0)


def test_a_checkpoint_comes_back_as_it_was(checkpoint, folder):
    assert Checkpoint.load(folder) == checkpoint
    assert Checkpoint.load(str(folder)) == checkpoint


def test_saving_over_a_checkpoint_replaces_it(folder, mask_checkpoint):
    assert Checkpoint.load(mask_checkpoint.save(folder)) == mask_checkpoint


def test_a_checkpoint_is_stamped_with_the_versions_that_made_it(checkpoint):
    assert set(checkpoint.card.versions) >= {"mgmtn", "torch", "timm"}


def test_the_weights_do_not_follow_later_training(network):
    module = torch.nn.Linear(3, 2)
    taken = Checkpoint.of(module, CARD)
    before = taken.tensors()["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    torch.testing.assert_close(taken.tensors()["weight"], before)


# Identity.


def test_the_models_id_survives_saving_and_loading(checkpoint, folder):
    loaded = Checkpoint.load(folder)
    assert loaded.card.model_id == checkpoint.card.model_id
    assert loaded.card.thresholds_id == checkpoint.card.thresholds_id
    assert checkpoint.card.model_id.startswith("tiny-")
    assert len(checkpoint.card.model_id) == len("tiny-") + 12


@pytest.mark.parametrize("remark", [{"accuracy": {"mean": 91.0}}, {"training": {}}, {"versions": {"torch": "9"}}])
def test_remarks_leave_the_models_id_alone(checkpoint, remark):
    assert checkpoint.card.model_copy(update=remark).model_id == checkpoint.card.model_id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"thresholds": {"young": 0.41, "smiling": 1 / 3}},
        {"calibration": {}},
        {"weights_sha256": "0" * 64},
        {"network": TINY.model_copy(update={"pixel_mean": 126.0})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_answers_changes_the_models_id(checkpoint, change):
    assert checkpoint.card.model_copy(update=change).model_id != checkpoint.card.model_id


def test_a_default_spelt_out_leaves_the_id(checkpoint):
    card = checkpoint.card.model_dump(mode="json")
    card["network"].pop("head")
    card.pop("average_flip")
    assert Card.model_validate(card).model_id == checkpoint.card.model_id


def test_other_weights_have_another_id(network, checkpoint):
    torch.manual_seed(1)
    assert Checkpoint.of(MGMTN(TINY), CARD).card.model_id != checkpoint.card.model_id
    assert Checkpoint.of(network, CARD).card.model_id == checkpoint.card.model_id


def test_the_order_in_which_thresholds_were_written_does_not_count(checkpoint):
    turned = dict(reversed(checkpoint.card.thresholds.items()))
    assert checkpoint.card.model_copy(update={"thresholds": turned}).model_id == checkpoint.card.model_id


def test_the_thresholds_id_is_of_the_thresholds_alone(checkpoint):
    card = checkpoint.card
    assert card.model_copy(update={"name": "other"}).thresholds_id == card.thresholds_id
    assert card.model_copy(update={"thresholds": {}}).thresholds_id != card.thresholds_id
    explicit = dict.fromkeys(ATTRIBUTES, 0.5) | card.thresholds
    assert card.model_copy(update={"thresholds": explicit}).thresholds_id == card.thresholds_id


@pytest.mark.parametrize("name", ["", "../up", "UPPER", "a b", "a/b", "-x"])
def test_a_name_that_is_no_safe_part_of_a_path_is_refused(name):
    with pytest.raises(ValidationError, match="name"):
        Card(name=name, kind="attributes", network=TINY)


# Damage.


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_byte_of_the_weights_is_found(folder, place):
    weights = bytearray((folder / WEIGHTS_FILE).read_bytes())
    weights[place] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"damaged or another model's: sha256 [0-9a-f]{64}, the card says"):
        Checkpoint.load(folder)


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_torn_weights_are_found(folder, length):
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.load(folder)


@pytest.mark.parametrize("file", [CARD_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"no checkpoint at .*{file}"):
        Checkpoint.load(folder)


def test_a_file_where_a_folder_should_be_is_no_checkpoint(folder):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Checkpoint.load(folder / CARD_FILE)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe\x00garbage", b"[" * 100_000, b'{"name": "x", "kind": "attributes"}'],
    ids=["empty", "torn", "null", "list", "nothing in it", "bytes", "deep", "half a card"],
)
def test_a_card_of_something_else_is_refused(folder, content):
    (folder / CARD_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{CARD_FILE} is not a model card"):
        Checkpoint.load(folder)


def test_a_card_with_an_unknown_entry_is_refused(folder):
    edit_card(folder, colour="red")
    with pytest.raises(CheckpointError, match="colour"):
        Checkpoint.load(folder)


def test_a_card_of_other_attributes_is_refused(folder):
    edit_card(folder, attributes=[*ATTRIBUTES[1:], ATTRIBUTES[0]])
    with pytest.raises(CheckpointError, match=r"another set of attributes: arched_eyebrows, .*five_o_clock_shadow"):
        Checkpoint.load(folder)


def test_a_card_of_another_partition_into_groups_is_refused(folder, mask_checkpoint, tmp_path):
    groups = json.loads((folder / CARD_FILE).read_text())["groups"]
    moved = groups | {"mouth": groups["mouth"][1:], "object": [groups["mouth"][0], *groups["object"]]}
    edit_card(folder, groups=moved)
    with pytest.raises(CheckpointError, match="another partition into groups"):
        Checkpoint.load(folder)
    masks = mask_checkpoint.save(tmp_path / "masks")
    edit_card(masks, groups=dict(reversed(groups.items())))
    with pytest.raises(CheckpointError, match="another partition into groups"):
        Checkpoint.load(masks)


def test_a_card_whose_network_the_weights_do_not_fit_is_refused(folder):
    card = json.loads((folder / CARD_FILE).read_text())
    edit_card(folder, network=card["network"] | {"width": 24})
    with pytest.raises(CheckpointError, match="the weights of tiny do not fit its card's network"):
        Checkpoint.load(folder).network()


class _Harmful:
    def __reduce__(self):
        return (Path("harmed").touch, ())


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(_Harmful()), b"PK\x03\x04" + bytes(100)):
        card = checkpoint.card.model_copy(update={"weights_sha256": hashlib.sha256(content).hexdigest()})
        loaded = Checkpoint.load(Checkpoint(card, content).save(tmp_path / "harmful"))
        with pytest.raises(CheckpointError, match="the weights of tiny are not safetensors"):
            loaded.network()
    assert not (tmp_path / "harmed").exists()


def test_one_kind_of_checkpoint_is_not_taken_for_the_other(checkpoint, mask_checkpoint):
    with pytest.raises(CheckpointError, match="tiny-masks predicts masks, not attributes"):
        mask_checkpoint.network()
    with pytest.raises(CheckpointError, match="tiny predicts attributes, not masks"):
        checkpoint.mask_net()


# Models that ship.


@pytest.mark.parametrize("name", ["no-such-model", "", "a/b/c"])
def test_an_unknown_name_lists_the_models_that_ship(name, tmp_path, checkpoint, monkeypatch):
    checkpoint.save(tmp_path / "weights" / "first")
    checkpoint.save(tmp_path / "weights" / "second")
    (tmp_path / "weights" / "unfinished").mkdir()
    monkeypatch.setattr(checkpoint_module, "MODELS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert shipped_models() == ["first", "second"]
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*models that ship: first, second"):
        Checkpoint.load(name)
    assert Checkpoint.load("second") == checkpoint


def test_a_package_without_models_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "MODELS", tmp_path)
    with pytest.raises(CheckpointError, match="models that ship: none"):
        Checkpoint.load("no-such-model")


@pytest.mark.parametrize("name", shipped_models())
def test_every_model_that_ships_loads(name):
    loaded = Checkpoint.load(name)
    assert loaded.card.name == name
    assert not (loaded.network() if loaded.card.kind == "attributes" else loaded.mask_net()).training


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("mgmtn-lite0-celeba", "mgmtn-lite0-celeba-870d6e623c66"),
        ("mgmtn-mobilefacenet-celeba", "mgmtn-mobilefacenet-celeba-bc56054b0fe2"),
        ("mgmtn-mobilefacenet-lfwa", "mgmtn-mobilefacenet-lfwa-406bc3d29749"),
    ],
)
def test_the_id_of_a_model_that_ships_stays_for_else_every_image_would_be_due_again(name, model_id):
    assert Checkpoint.load(name).card.model_id == model_id
