import numpy as np
import pytest

from mgmtn.attributes import ATTRIBUTES
from mgmtn.metrics import attribute_metrics, report


def test_figures_agree_with_those_worked_out_by_hand() -> None:
    probabilities = np.array([0.9, 0.6, 0.4, 0.2, 0.1])
    labels = np.array([1, 0, 1, 0, 0])
    figures = attribute_metrics(probabilities, labels, threshold=0.5)
    assert figures.known == 5
    assert figures.prevalence == pytest.approx(2 / 5)
    assert figures.majority == pytest.approx(3 / 5)
    assert figures.accuracy == pytest.approx(3 / 5)  # the second and third are wrong
    assert figures.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert figures.f1 == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert figures.average_precision == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_the_threshold_decides_the_label() -> None:
    probabilities, labels = np.array([0.9, 0.6, 0.4]), np.array([1, 0, 0])
    assert attribute_metrics(probabilities, labels, threshold=0.5).accuracy == pytest.approx(2 / 3)
    assert attribute_metrics(probabilities, labels, threshold=0.7).accuracy == pytest.approx(1)


def test_probabilities_that_mean_what_they_say_have_no_calibration_error() -> None:
    sure = attribute_metrics(np.array([1.0, 0.0]), np.array([1, 0]), threshold=0.5)
    wrong = attribute_metrics(np.array([1.0, 0.0]), np.array([0, 1]), threshold=0.5)
    assert sure.ece == pytest.approx(0)
    assert wrong.ece == pytest.approx(1)


def test_an_undefined_figure_is_none_and_means_leave_it_out() -> None:
    probabilities = np.full((4, 40), 0.2)
    labels, known = np.zeros((4, 40)), np.ones((4, 40), bool)
    known[:, 0] = False
    labels[0, 1] = 1
    figures = report(probabilities, labels, known, thresholds=np.full(40, 0.5))
    assert figures.attributes[ATTRIBUTES[0]].accuracy is None
    assert figures.attributes[ATTRIBUTES[2]].average_precision is None
    assert figures.attributes[ATTRIBUTES[2]].balanced_accuracy is None
    assert figures.mean("average_precision") == pytest.approx(1 / 4)  # of the one attribute with a positive
    assert figures.mean("accuracy") == pytest.approx((38 + 0.75) / 39)


def test_unknown_labels_do_not_count() -> None:
    probabilities = np.full((2, 40), 0.9)
    labels, known = np.ones((2, 40)), np.ones((2, 40), bool)
    labels[1], known[1] = 0, False
    figures = report(probabilities, labels, known, thresholds=np.full(40, 0.5))
    assert figures.mean("accuracy") == 1
    assert set(figures.group_means("accuracy").values()) == {1.0}


def test_average_precision_needs_both_kinds_of_label() -> None:
    probabilities = np.array([0.9, 0.2])
    assert attribute_metrics(probabilities, np.array([1, 1]), threshold=0.5).average_precision is None
    assert attribute_metrics(probabilities, np.array([0, 0]), threshold=0.5).average_precision is None
    assert attribute_metrics(probabilities, np.array([1, 0]), threshold=0.5).average_precision == 1
