import pytest
import torch
from torch import nn

from jobs.optimisation import (
    OptimisationSettings,
    averaged,
    freeze_unreached,
    parameter_groups,
    rate_at,
    set_rate,
    to_training,
)
from mgmtn.mask_net import MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

TINY_MASKS = MaskNetSettings(decoder_channels=(16, 8, 8, 8, 8), resolution=32)
TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16, mask_net=TINY_MASKS)
OPTIMISATION = OptimisationSettings(learning_rate=0.01, trunk_rate=0.5)


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [rate_at(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_short_trainings_have_a_rate_too():
    assert rate_at(0, 1, 0.0) == 1.0
    assert rate_at(0, 0, 0.5) == 1.0
    assert rate_at(500, 100, 0.1) == pytest.approx(0)


def test_every_parameter_that_learns_is_in_one_group():
    module = MGMTN(TINY)
    assert module.mask_net is not None
    module.mask_net.requires_grad_(False)
    groups = parameter_groups(module, OPTIMISATION)
    given = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in given}) == len(given)
    assert {id(p) for p in given} == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_trunk_learns_slower_and_vectors_do_not_decay():
    module = MGMTN(TINY)
    trunk = {id(parameter) for parameter in module.trunk.parameters()}
    for group in parameter_groups(module, OPTIMISATION):
        assert len({(id(parameter) in trunk, parameter.ndim > 1) for parameter in group["params"]}) == 1
        assert group["lr"] == (0.005 if id(group["params"][0]) in trunk else 0.01)
        assert ("weight_decay" in group) == (group["params"][0].ndim < 2)
    assert len(parameter_groups(module, OPTIMISATION)) == 4
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), OPTIMISATION)) == 1


def test_each_groups_rate_is_a_share_of_its_own_peak():
    optimizer = torch.optim.AdamW(parameter_groups(MGMTN(TINY), OPTIMISATION))
    set_rate(optimizer, 0.25)
    set_rate(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.0025, 0.005]


def test_the_moving_average_is_tensorflows():
    """average = d * average + (1 - d) * value with d = min(decay, (1 + n) / (10 + n)) at the n-th update."""
    module = nn.Linear(1, 1, bias=False)
    average, expected = averaged(module, 0.5), None
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    for step, value in enumerate(values):
        nn.init.constant_(module.weight, value)
        average.update_parameters(module)
        if expected is None:  # the first values are taken whole
            expected = value
        else:
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(sum(v * 0.5 ** (40 - i) for i, v in enumerate(values)), rel=1e-3)


def test_statistics_are_averaged_and_counters_copied():
    module = nn.BatchNorm1d(2)
    average = averaged(module, 0.9)
    for number in range(3):
        module.running_mean.fill_(number)
        module.num_batches_tracked.fill_(7 * number)
        average.update_parameters(module)
    assert average.module.num_batches_tracked == 14
    assert 0 < average.module.running_mean[0] < 2


def test_what_a_loss_does_not_reach_is_frozen_and_no_gradient_is_left():
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    freeze_unreached(module, module[0](torch.ones(1, 2)).sum())
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, True, False, False]
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_frozen_norms_keep_their_statistics_and_learn_their_weights(freeze_norm):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    to_training(module, freeze_norm=freeze_norm)
    module(torch.rand(2, 3, 4, 4) + 1).sum().backward()
    assert (module[1].running_mean.abs().sum() == 0) == freeze_norm
    assert module[1].weight.grad.abs().sum() > 0
    assert module[2].training
