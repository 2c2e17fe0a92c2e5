"""Logits to probabilities that mean what they say: Platt scaling per attribute, fitted on a validation cut.

Platt, "Probabilistic outputs for support vector machines" (1999), with the logit of a neural network as the score.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Calibration


def calibrate(logits: np.ndarray, calibration: Mapping[str, Calibration]) -> np.ndarray:
    """Apply the scaling; an attribute without one keeps the plain sigmoid.

    Args:
        logits: shape `(N, 40)`.

    Returns:
        float32 in [0, 1], shape `(N, 40)`.
    """
    scalings = [calibration.get(name, Calibration()) for name in ATTRIBUTES]
    slope = np.array([scaling.slope for scaling in scalings], np.float32)
    intercept = np.array([scaling.intercept for scaling in scalings], np.float32)
    return torch.sigmoid(torch.from_numpy(logits * slope + intercept).float()).numpy()


def fit_calibration(logits: np.ndarray, labels: np.ndarray, known: np.ndarray) -> dict[str, Calibration]:
    """Fit slope and intercept of each attribute by maximum likelihood, with a weak pull towards the identity.

    An attribute with fewer than 20 labels of either kind keeps the identity: it would be fitted to chance.

    Args:
        logits: shape `(N, 40)`.
        labels: 0 or 1, shape `(N, 40)`; ignored where `known` is False.
        known: bool, shape `(N, 40)`.
    """
    x, y = torch.from_numpy(logits).double(), torch.from_numpy(labels).double()
    weight = torch.from_numpy(known).double()
    slope = torch.ones(x.shape[1], dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([slope, intercept], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(x * slope + intercept, y, reduction="none")
        loss: torch.Tensor = (losses * weight).sum() + ((slope - 1) ** 2).sum() + (intercept**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    positives, negatives = (labels * known).sum(0), ((1 - labels) * known).sum(0)
    return {
        name: Calibration(slope=round(slope[k].item(), 4), intercept=round(intercept[k].item(), 4))
        for k, name in enumerate(ATTRIBUTES)
        if min(positives[k], negatives[k]) >= 20 and slope[k].item() > 0
    }
