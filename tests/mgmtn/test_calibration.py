"""Platt scaling: that it undoes a known miscalibration, and keeps its hands off what it cannot know."""

import numpy as np
import pytest

from mgmtn.attributes import ATTRIBUTES
from mgmtn.calibration import calibrate, fit_calibration
from mgmtn.checkpoint import Calibration

FACES = 4000


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def true_logits():
    return np.random.default_rng(0).normal(0, 2, (FACES, 40)).astype(np.float32)


@pytest.fixture(scope="module")
def labels(true_logits):
    """Drawn with the probabilities that the true logits state."""
    return (np.random.default_rng(1).random((FACES, 40)) < sigmoid(true_logits)).astype(np.int8)


EVERYTHING = np.ones((FACES, 40), bool)


def test_a_known_miscalibration_is_undone(true_logits, labels):
    said = true_logits * 2 + 1  # so the truth is said / 2 - 1 / 2
    fitted = fit_calibration(said, labels, EVERYTHING)
    assert set(fitted) == set(ATTRIBUTES)
    slopes, intercepts = zip(*((each.slope, each.intercept) for each in fitted.values()), strict=True)
    np.testing.assert_allclose(slopes, 0.5, atol=0.06)
    np.testing.assert_allclose(intercepts, -0.5, atol=0.2)
    assert np.mean(slopes) == pytest.approx(0.5, abs=0.01)
    assert np.abs(calibrate(said, fitted) - sigmoid(true_logits)).mean() < 0.02


def test_logits_that_are_right_are_left_almost_alone(true_logits, labels):
    fitted = fit_calibration(true_logits, labels, EVERYTHING)
    assert np.abs(calibrate(true_logits, fitted) - sigmoid(true_logits)).max() < 0.05


def test_each_attribute_is_fitted_by_itself(true_logits, labels):
    said = true_logits.copy()
    said[:, 7] *= 3
    fitted = fit_calibration(said, labels, EVERYTHING)
    assert fitted[ATTRIBUTES[7]].slope == pytest.approx(1 / 3, abs=0.04)
    assert fitted[ATTRIBUTES[8]].slope == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("unknown", [-1, 0, 1])
def test_unknown_labels_do_not_matter(true_logits, labels, unknown):
    known = np.random.default_rng(2).random((FACES, 40)) < 0.5
    fitted = fit_calibration(true_logits, labels, known)
    assert fit_calibration(true_logits, np.where(known, labels, unknown).astype(np.int8), known) == fitted


@pytest.mark.parametrize("rare", [0, 1])
def test_an_attribute_with_fewer_than_20_labels_of_a_kind_keeps_the_identity(true_logits, labels, rare):
    labels = labels.copy()
    for attribute, count in ((0, 19), (1, 20)):
        ranked = np.argsort(true_logits[:, attribute])
        labels[:, attribute] = 1 - rare
        labels[ranked[-count:] if rare else ranked[:count], attribute] = rare
    fitted = fit_calibration(true_logits, labels, EVERYTHING)
    assert ATTRIBUTES[0] not in fitted
    assert ATTRIBUTES[1] in fitted
    np.testing.assert_allclose(calibrate(true_logits, fitted)[:, 0], sigmoid(true_logits[:, 0]), atol=1e-6)


def test_a_model_that_is_upside_down_is_not_turned(true_logits, labels):
    assert fit_calibration(-true_logits, labels, EVERYTHING) == {}


def test_without_labels_nothing_is_fitted(true_logits, labels):
    assert fit_calibration(true_logits, labels, ~EVERYTHING) == {}


def test_without_faces_nothing_is_fitted():
    empty = np.zeros((0, 40), np.float32)
    assert fit_calibration(empty, empty.astype(np.int8), empty.astype(bool)) == {}


def test_calibration_keeps_the_order_of_faces(true_logits, labels):
    fitted = fit_calibration(true_logits * 2 + 1, labels, EVERYTHING)
    ramp = np.tile(np.linspace(-15, 15, 200, dtype=np.float32)[:, None], (1, 40))
    probabilities = calibrate(ramp, fitted)
    assert (np.diff(probabilities, axis=0) >= 0).all()
    assert (np.diff(probabilities[60:140], axis=0) > 0).all()


def test_an_attribute_without_a_scaling_keeps_the_plain_sigmoid(true_logits):
    scaled = calibrate(true_logits, {"young": Calibration(slope=0.5, intercept=1)})
    np.testing.assert_allclose(scaled[:, :39], sigmoid(true_logits[:, :39]), atol=1e-6)
    np.testing.assert_allclose(scaled[:, 39], sigmoid(true_logits[:, 39] * 0.5 + 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_probabilities_are_float32_from_zero_to_one(dtype):
    logits = np.linspace(-1e4, 1e4, 80).reshape(2, 40).astype(dtype)
    probabilities = calibrate(logits, {})
    assert probabilities.dtype == np.float32
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_no_faces_give_no_probabilities():
    assert calibrate(np.zeros((0, 40), np.float32), {}).shape == (0, 40)
