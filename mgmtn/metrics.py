"""How good 40 probabilities are, attribute by attribute; the figures themselves come from torchmetrics.

An attribute's unknown labels are left out. A figure that says nothing of an attribute (average precision and balanced
accuracy without both kinds of label, F1 without a positive) is None, and means leave it out.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
    binary_stat_scores,
)

from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class AttributeMetrics:
    """One attribute's figures, all in [0, 1] but `known`.

    Attributes:
        known: labels that there are.
        prevalence: share of positives among them.
        majority: accuracy of always answering with the commoner label.
        accuracy, balanced_accuracy, f1: at the model's threshold.
        average_precision: over all thresholds.
        ece: expected calibration error, 15 bins.
    """

    known: int
    prevalence: float | None = None
    majority: float | None = None
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    f1: float | None = None
    average_precision: float | None = None
    ece: float | None = None


def attribute_metrics(probabilities: np.ndarray, labels: np.ndarray, *, threshold: float) -> AttributeMetrics:
    """Figures of one attribute from its known labels.

    Args:
        probabilities: shape `(N,)`.
        labels: 0 or 1, shape `(N,)`.
        threshold: probability from which the label is set.
    """
    count, positives = len(labels), int(labels.sum())
    if count == 0:
        return AttributeMetrics(known=0)
    scores, truth = torch.from_numpy(probabilities.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    decided = (scores >= threshold).long()
    true_positive, _, true_negative, *_ = binary_stat_scores(decided, truth).tolist()
    both = 0 < positives < count
    return AttributeMetrics(
        known=count,
        prevalence=positives / count,
        majority=max(positives, count - positives) / count,
        accuracy=binary_accuracy(decided, truth).item(),
        balanced_accuracy=(true_positive / positives + true_negative / (count - positives)) / 2 if both else None,
        f1=binary_f1_score(decided, truth).item() if positives else None,
        average_precision=binary_average_precision(scores, truth).item() if both else None,
        ece=binary_calibration_error(scores, truth, n_bins=CALIBRATION_BINS).item(),
    )


@dataclass(frozen=True)
class Report:
    """Figures of all attributes, by name, and their means."""

    attributes: dict[str, AttributeMetrics]

    def mean(self, figure: str, names: tuple[str, ...] = ATTRIBUTES) -> float | None:
        """Mean of one figure over those attributes for which it is defined; None where there are none."""
        values = [getattr(self.attributes[name], figure) for name in names]
        defined = [value for value in values if value is not None]
        return float(np.mean(defined)) if defined else None

    def group_means(self, figure: str) -> dict[str, float | None]:
        """Mean of one figure over each facial group's attributes."""
        return {group: self.mean(figure, names) for group, names in GROUP_ATTRIBUTES.items()}

    def as_dict(self) -> dict[str, Any]:
        return {name: asdict(figures) for name, figures in self.attributes.items()}


def report(probabilities: np.ndarray, labels: np.ndarray, known: np.ndarray, *, thresholds: np.ndarray) -> Report:
    """Figures of all attributes.

    Args:
        probabilities: shape `(N, 40)`, in the order of `ATTRIBUTES`.
        labels: 0 or 1, shape `(N, 40)`; ignored where `known` is False.
        known: bool, shape `(N, 40)`.
        thresholds: shape `(40,)`.
    """
    figures = {}
    for k, name in enumerate(ATTRIBUTES):
        rows = known[:, k]
        figures[name] = attribute_metrics(probabilities[rows, k], labels[rows, k], threshold=float(thresholds[k]))
    return Report(figures)
