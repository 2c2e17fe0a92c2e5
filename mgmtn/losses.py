"""What training minimises, for attributes and for masks."""

from typing import Literal

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

AttributeLoss = Literal["bce", "focal"]


def attribute_loss(
    logits_BA: Tensor,
    labels_BA: Tensor,
    known_BA: Tensor,
    *,
    kind: AttributeLoss = "bce",
    positive_weight_A: Tensor | None = None,
) -> Tensor:
    """Mean loss over the labels that are known.

    Args:
        logits_BA: predictions.
        labels_BA: 0 or 1; ignored where unknown.
        known_BA: True where the label is known.
        kind: binary cross-entropy, or focal loss (Lin et al., arXiv 1708.02002) with gamma 2 and no alpha.
        positive_weight_A: for "bce", the weight of each attribute's positives, against class imbalance.
    """
    labels_BA = labels_BA.to(logits_BA.dtype)
    if kind == "focal":
        losses_BA = sigmoid_focal_loss(logits_BA, labels_BA, alpha=-1, gamma=2)
    else:
        losses_BA = nn.functional.binary_cross_entropy_with_logits(
            logits_BA, labels_BA, reduction="none", pos_weight=positive_weight_A
        )
    known_BA = known_BA.to(logits_BA.dtype)
    return (losses_BA * known_BA).sum() / known_BA.sum().clamp_min(1)


def mask_loss(logits_BGRR: Tensor, masks_BGRR: Tensor) -> Tensor:
    """Pixel-wise binary cross-entropy plus Dice, both over all groups.

    Args:
        logits_BGRR: AML's prediction.
        masks_BGRR: true masks in [0, 1], of the same size.
    """
    masks_BGRR = masks_BGRR.to(logits_BGRR.dtype)
    dice = smp.losses.DiceLoss(mode="multilabel", from_logits=True)
    return nn.functional.binary_cross_entropy_with_logits(logits_BGRR, masks_BGRR) + dice(logits_BGRR, masks_BGRR)


def positive_weights(labels_NA: Tensor, known_NA: Tensor) -> Tensor:
    """Square root of negatives per positive for each attribute: halfway between plain and balanced cross-entropy."""
    positives_A = (labels_NA.bool() & known_NA.bool()).sum(0).clamp_min(1)
    negatives_A = (~labels_NA.bool() & known_NA.bool()).sum(0).clamp_min(1)
    return torch.sqrt(negatives_A / positives_A)
