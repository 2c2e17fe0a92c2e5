"""Faces in, probabilities out, on a small network with random weights."""

import numpy as np
import pytest
import torch

from mgmtn.attributes import ATTRIBUTES
from mgmtn.calibration import calibrate
from mgmtn.checkpoint import Calibration, Card, Checkpoint
from mgmtn.errors import CheckpointError, ConfigError
from mgmtn.labeller import Labeller
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

SETTINGS = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)


def tiny_checkpoint(**changes: object) -> Checkpoint:
    """Heads with weights large enough for probabilities that differ."""
    settings = SETTINGS.model_copy(update=changes)
    torch.manual_seed(0)
    network = MGMTN(settings).eval()
    torch.nn.init.normal_(network.heads.weight_AD, std=1.0)
    card = Card(
        name="tiny",
        kind="attributes",
        network=settings,
        thresholds={"young": 0.9, "male": 0.1},
        calibration={"young": Calibration(slope=2.0, intercept=1.0)},
    )
    return Checkpoint.of(network, card)


@pytest.fixture(scope="module")
def labeller():
    return Labeller(tiny_checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def faces():
    return np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def masks():
    return np.random.default_rng(1).random((70, 8, 64, 64)) < 0.3


def test_every_face_gets_forty_probabilities(labeller, faces):
    probabilities = labeller(faces)
    assert (probabilities.shape, probabilities.dtype) == ((70, 40), np.float32)
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert probabilities.std() > 0.05


def test_the_batch_size_does_not_change_answers(faces):
    checkpoint = tiny_checkpoint()
    single, many = (Labeller(checkpoint, device="cpu", batch_size=size)(faces) for size in (1, 64))
    np.testing.assert_allclose(single, many, atol=1e-5)


def test_the_same_faces_get_the_same_answers_to_the_bit(labeller, faces):
    np.testing.assert_array_equal(labeller(faces), labeller(faces))


def test_a_face_gets_the_same_answer_wherever_it_stands(labeller, faces):
    np.testing.assert_allclose(labeller(faces[::-1])[::-1], labeller(faces), atol=1e-5)


def test_answers_are_the_networks_calibrated_logits(labeller, faces):
    checkpoint = tiny_checkpoint()
    with torch.inference_mode():
        expected = checkpoint.network()(torch.from_numpy(faces).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(labeller.logits(faces), expected, atol=1e-4)
    np.testing.assert_array_equal(labeller(faces), calibrate(labeller.logits(faces), checkpoint.card.calibration))


def test_no_faces_give_no_rows(labeller):
    none = np.zeros((0, 64, 64, 3), np.uint8)
    assert labeller(none).shape == (0, 40)
    assert labeller.label_bits(labeller(none)).shape == (0,)


@pytest.mark.parametrize(
    "faces",
    [
        np.zeros((2, 65, 64, 3), np.uint8),
        np.zeros((2, 128, 128, 3), np.uint8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((2, 64, 64, 1), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((2, 64, 64, 3), np.int64),
    ],
)
def test_faces_of_another_size_or_type_are_refused_with_what_they_are(labeller, faces):
    with pytest.raises(ConfigError) as caught:
        labeller(faces)
    assert "expected uint8 of shape (N, 64, 64, 3)" in str(caught.value)
    assert f"{faces.dtype} {faces.shape}" in str(caught.value)


def test_arrays_may_be_read_only_or_strided_and_are_left_alone(labeller, faces, masks):
    frozen, frozen_masks = faces.copy(), masks.copy()
    frozen.flags.writeable = frozen_masks.flags.writeable = False
    np.testing.assert_array_equal(labeller(frozen, frozen_masks), labeller(faces, masks))
    strided = np.ascontiguousarray(faces.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(labeller(strided), labeller(faces), atol=1e-6)
    np.testing.assert_array_equal(frozen, faces)


def test_given_masks_guide_each_its_own_face_across_batches(faces, masks):
    checkpoint = tiny_checkpoint(masks="landmarks")
    together = Labeller(checkpoint, device="cpu", batch_size=64)(faces, masks)
    apart = Labeller(checkpoint, device="cpu", batch_size=1)(faces, masks)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(Labeller(checkpoint, device="cpu")(faces, masks[::-1]) - together).max() > 0.01


def test_a_model_for_landmark_masks_says_so_when_it_gets_none(faces):
    with pytest.raises(ConfigError, match="landmark masks and got none"):
        Labeller(tiny_checkpoint(masks="landmarks"), device="cpu")(faces)


@pytest.mark.parametrize("shape", [(69, 8, 64, 64), (70, 7, 64, 64), (70, 64, 64)])
def test_masks_that_do_not_match_the_faces_are_refused(labeller, faces, shape):
    with pytest.raises(ConfigError, match=r"masks: expected shape \(70, 8, M, M\)"):
        labeller(faces, np.ones(shape, bool))


def test_a_mask_networks_checkpoint_is_refused():
    settings = MaskNetSettings()
    checkpoint = Checkpoint.of(MaskNet(settings), Card(name="tiny-masks", kind="masks", network=settings))
    with pytest.raises(CheckpointError, match="predicts masks, not attributes"):
        Labeller(checkpoint, device="cpu")


@pytest.mark.parametrize("attribute", [0, 1, 31, 32, 39])
def test_bit_k_is_attribute_k(labeller, attribute):
    probabilities = np.zeros((2, 40), np.float32)
    probabilities[1, attribute] = 1.0
    bits = labeller.label_bits(probabilities)
    assert bits.dtype == np.uint64
    assert bits.tolist() == [0, 2**attribute]


def test_all_attributes_set_all_forty_bits(labeller):
    assert labeller.label_bits(np.ones((1, 40), np.float32)).tolist() == [2**40 - 1]


def test_a_label_is_set_from_its_own_threshold_on(labeller):
    young, male, smiling = (ATTRIBUTES.index(name) for name in ("young", "male", "smiling"))
    for attribute, threshold in ((young, 0.9), (male, 0.1), (smiling, 0.5)):
        at, below = np.float32(threshold), np.nextafter(np.float32(threshold), np.float32(0))
        probabilities = np.zeros((2, 40), np.float32)
        probabilities[:, attribute] = (at, below)
        assert labeller.label_bits(probabilities).tolist() == [2**attribute, 0]


def test_a_probability_that_is_no_number_sets_no_label(labeller):
    assert labeller.label_bits(np.full((1, 40), np.nan, np.float32)).tolist() == [0]


@pytest.mark.parametrize("masks_given", [False, True])
def test_a_model_that_averages_with_the_mirror_image_says_the_same_of_both(faces, masks, masks_given):
    checkpoint = tiny_checkpoint(masks="landmarks" if masks_given else "learned")
    one_sided = Labeller(checkpoint, device="cpu")
    card = checkpoint.card.model_copy(update={"average_flip": True})
    both = Labeller(Checkpoint(card, checkpoint.weights), device="cpu")
    some, drawn = faces[:4], masks[:4] if masks_given else None
    mirrored, drawn_mirrored = some[:, :, ::-1], None if drawn is None else drawn[..., ::-1]
    expected = (one_sided.logits(some, drawn) + one_sided.logits(mirrored, drawn_mirrored)) / 2
    np.testing.assert_allclose(both.logits(some, drawn), expected, atol=1e-5)
    np.testing.assert_allclose(both.logits(mirrored, drawn_mirrored), both.logits(some, drawn), atol=1e-5)
    assert card.model_id != checkpoint.card.model_id
