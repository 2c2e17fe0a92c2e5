"""What training minimises: that what is unknown does not count, and that better predictions cost less."""

import pytest
import torch

from mgmtn.losses import attribute_loss, mask_loss, positive_weights


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_unknown_labels_do_not_matter(kind):
    torch.manual_seed(0)
    logits = torch.randn(6, 40, requires_grad=True)
    labels, known = torch.randint(0, 2, (6, 40)), torch.rand(6, 40) < 0.5
    loss = attribute_loss(logits, labels, known, kind=kind)
    loss.backward()
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    for unknown in (0, 1, -1):
        other = torch.where(known, labels, torch.tensor(unknown))
        torch.testing.assert_close(attribute_loss(logits, other, known, kind=kind), loss)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_the_loss_is_the_mean_over_known_labels(kind):
    logits, labels = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[1, 1, 0]])
    each = [attribute_loss(logits, labels, torch.eye(3, dtype=torch.bool)[[k]], kind=kind).item() for k in range(3)]
    both = attribute_loss(logits, labels, torch.tensor([[True, False, True]]), kind=kind).item()
    assert both == pytest.approx((each[0] + each[2]) / 2)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_a_batch_without_a_known_label_costs_nothing(kind):
    logits = torch.randn(2, 40, requires_grad=True)
    loss = attribute_loss(logits, torch.zeros(2, 40), torch.zeros(2, 40, dtype=torch.bool), kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_focal_loss_spares_the_easy_more_than_the_hard():
    known, positive = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1)

    def share(logit: float) -> float:
        focal, plain = (
            attribute_loss(torch.tensor([[logit]]), positive, known, kind=kind).item() for kind in ("focal", "bce")
        )
        return focal / plain

    assert share(4.0) < 0.001  # (1 - p)^2 of Lin et al.
    assert share(0.0) == pytest.approx(0.25)
    assert share(-4.0) > 0.95


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_extreme_logits_stay_finite(kind):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    loss = attribute_loss(logits, torch.tensor([[1, 0, 0, 1]]), torch.ones(1, 4, dtype=torch.bool), kind=kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_positives_weight_multiplies_the_cost_of_positives_alone():
    logits, labels = torch.zeros(1, 2), torch.tensor([[1, 0]])
    weight = torch.tensor([3.0, 5.0])
    plain, weighted = (
        [attribute_loss(logits, labels, torch.tensor([[k == 0, k == 1]]), positive_weight_A=w).item() for k in range(2)]
        for w in (None, weight)
    )
    assert weighted == pytest.approx([3 * plain[0], plain[1]])


def test_weights_are_the_square_root_of_negatives_by_positives_among_the_known():
    labels = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, -1], [0, 1, 1]])
    known = torch.ones(5, 3, dtype=torch.bool)
    known[3:, 2] = False
    torch.testing.assert_close(positive_weights(labels, known), torch.tensor([2.0, 0.5, 3**0.5]))


def test_perfect_masks_cost_almost_nothing_and_worse_ones_more():
    torch.manual_seed(0)
    masks = torch.rand(2, 8, 16, 16) < 0.4
    sure = torch.where(masks, 30.0, -30.0)
    perfect = mask_loss(sure, masks).item()
    half_wrong = mask_loss(torch.cat([sure[:1], -sure[1:]]), masks).item()
    assert perfect == pytest.approx(0, abs=1e-3)
    assert perfect < mask_loss(torch.zeros_like(sure), masks).item() < half_wrong < mask_loss(-sure, masks).item()


def test_groups_that_no_face_has_leave_the_mask_loss_finite():
    logits = torch.zeros(2, 8, 16, 16, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(2, 8, 16, 16))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_dice_makes_a_small_groups_miss_cost_more_than_its_pixels():
    masks = torch.zeros(1, 8, 32, 32)
    masks[:, 0, :2, :2] = 1
    masks[:, 1:, :16] = 1
    found = torch.where(masks > 0, 20.0, -20.0)
    missed = found.clone()
    missed[:, 0] = -20.0
    pixels = torch.nn.functional.binary_cross_entropy_with_logits(missed, masks).item()
    assert mask_loss(missed, masks).item() - pixels > 0.1
