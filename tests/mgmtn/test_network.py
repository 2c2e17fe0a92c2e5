"""MGMTN's parts on random weights: what each feature may and may not see, and the settings that cannot be built."""

import pytest
import torch
from pydantic import ValidationError

from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES, GROUPS
from mgmtn.errors import ConfigError
from mgmtn.network import (
    MGMTN,
    GroupGlobalFusion,
    GroupHeads,
    GroupLinear,
    NetworkSettings,
    Trunk,
    pool_by_group,
    resize_masks,
)

TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)


def tiny(**changes: object) -> MGMTN:
    torch.manual_seed(0)
    return MGMTN(TINY.model_copy(update=changes)).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks():
    return (torch.rand(3, 8, 64, 64, generator=torch.Generator().manual_seed(2)) < 0.3).float()


# Pooling.


def test_pixels_outside_a_group_do_not_reach_it():
    features, masks = torch.rand(1, 5, 6, 7), torch.zeros(1, 8, 6, 7)
    masks[:, 0, :2] = 1
    before = pool_by_group(features, masks)
    features[:, :, 2:] = 99.0
    torch.testing.assert_close(pool_by_group(features, masks), before)
    features[:, :, 1] += 1
    assert (pool_by_group(features, masks)[:, 0] > before[:, 0]).all()


def test_an_empty_mask_pools_to_zeros_and_its_gradient_is_finite():
    features, masks = torch.rand(2, 5, 6, 7, requires_grad=True), torch.zeros(2, 8, 6, 7, requires_grad=True)
    pooled = pool_by_group(features, masks)
    assert (pooled == 0).all()
    pooled.sum().backward()
    assert torch.isfinite(masks.grad).all()
    assert (features.grad == 0).all()


def test_masks_of_ones_pool_to_the_global_average():
    features = torch.rand(2, 5, 6, 7)
    pooled = pool_by_group(features, torch.ones(2, 8, 6, 7))
    torch.testing.assert_close(pooled, features.mean((2, 3))[:, None].expand(2, 8, 5))


def test_pooling_equals_the_masked_mean_written_out():
    features, masks = torch.randn(2, 5, 6, 7), torch.rand(2, 8, 6, 7)
    pooled = pool_by_group(features, masks)
    for face in range(2):
        for group in range(8):
            masked_maps = masks[face, group] * features[face]  # the paper's Gr
            expected = masked_maps.sum((1, 2)) / masks[face, group].sum()
            torch.testing.assert_close(pooled[face, group], expected)


def test_a_soft_mask_counts_by_its_shape_not_its_strength():
    features, masks = torch.randn(2, 5, 6, 7), torch.rand(2, 8, 6, 7)
    torch.testing.assert_close(pool_by_group(features, masks * 0.1), pool_by_group(features, masks))


@pytest.mark.parametrize(("mask_side", "cells"), [(64, 8), (64, 29), (227, 15), (1, 8), (8, 8)])
def test_resizing_masks_keeps_their_area(mask_side, cells):
    masks = torch.rand(2, 8, mask_side, mask_side)
    resized = resize_masks(masks, torch.zeros(2, 5, cells, cells))
    assert resized.shape == (2, 8, cells, cells)
    torch.testing.assert_close(resized.mean((2, 3)), masks.mean((2, 3)), rtol=0.05, atol=0.01)


def test_a_mask_smaller_than_a_cell_is_not_lost():
    masks = torch.zeros(1, 8, 64, 64)
    masks[..., 13, 50] = 1
    resized = resize_masks(masks, torch.zeros(1, 5, 4, 4))
    assert resized[..., 0, 3].tolist() == [[1 / 256] * 8]


# Fusion and heads.


@pytest.mark.parametrize("fusion", ["concat", "add", "gate", "none"])
def test_every_fusion_keeps_groups_apart_and_uses_the_global_feature_unless_told_not_to(fusion):
    torch.manual_seed(0)
    fuse = GroupGlobalFusion(group_channels=6, global_channels=5, width=8, fusion=fusion)
    groups, whole = torch.randn(2, 8, 6), torch.randn(2, 5)
    before = fuse(groups, whole)
    assert before.shape == (2, 8, 8)
    other_group = groups.clone()
    other_group[:, 3] += 1
    moved = (fuse(other_group, whole) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [group == 3 for group in range(8)]
    moved_by_global = (fuse(groups, whole + 1) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert moved_by_global.all() == (fusion != "none")


@pytest.mark.parametrize("fusion", ["concat", "add", "gate", "none"])
def test_every_parameter_gets_a_gradient_as_distributed_training_asks(fusion):
    torch.manual_seed(0)
    network = MGMTN(NetworkSettings(image_size=32, width=16, fusion=fusion)).train()
    network(torch.rand(2, 3, 32, 32) * 255).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_a_group_linear_layer_is_one_linear_layer_a_group():
    torch.manual_seed(0)
    layer = GroupLinear(6, 4)
    torch.nn.init.normal_(layer.bias_GO)
    inputs = torch.randn(3, 8, 6)
    for group in range(8):
        expected = inputs[:, group] @ layer.weight_GIO[group] + layer.bias_GO[group]
        torch.testing.assert_close(layer(inputs)[:, group], expected)


@pytest.mark.parametrize("group", GROUPS)
def test_a_groups_feature_moves_its_own_attributes_and_no_other(group):
    torch.manual_seed(0)
    heads = GroupHeads(8)
    fused = torch.randn(2, 8, 8)
    before = heads(fused)
    fused[:, GROUPS.index(group)] += 1
    moved = ((heads(fused) - before).abs() > 1e-6).all(0)
    assert {name for name, changed in zip(ATTRIBUTES, moved.tolist(), strict=True) if changed} == set(
        GROUP_ATTRIBUTES[group]
    )


@torch.inference_mode()
def test_in_the_whole_network_a_groups_mask_moves_its_own_attributes_and_no_other(images, masks):
    network = tiny(masks="landmarks")
    before = network(images, masks)
    masks[:, GROUPS.index("hair")] = 1 - masks[:, GROUPS.index("hair")]
    moved = (network(images, masks) - before).abs().amax(0) > 1e-6
    assert {name for name, changed in zip(ATTRIBUTES, moved.tolist(), strict=True) if changed} == set(
        GROUP_ATTRIBUTES["hair"]
    )


# Masks of the network.


@torch.inference_mode()
def test_learned_masks_are_the_mask_networks_own(images):
    network = tiny()
    soft = network.soft_masks(images.float())
    assert soft.shape == (3, 8, 64, 64)
    assert ((soft >= 0) & (soft <= 1)).all()
    torch.testing.assert_close(network(images), network(images, soft), rtol=0, atol=1e-6)


@torch.inference_mode()
def test_given_masks_stand_in_for_learned_ones(images, masks):
    network = tiny()
    assert (network(images, masks) - network(images)).abs().max() > 1e-4
    for parameter in network.mask_net.parameters():
        parameter.zero_()
    torch.testing.assert_close(network(images, masks), tiny()(images, masks))


@torch.inference_mode()
def test_boolean_masks_are_taken_as_they_are(images, masks):
    network = tiny(masks="landmarks")
    torch.testing.assert_close(network(images, masks.bool()), network(images, masks), rtol=0, atol=0)


@torch.inference_mode()
def test_a_network_with_masks_of_ones_pools_the_whole_square(images, masks):
    network = tiny(masks="ones")
    assert network.mask_net is None
    torch.testing.assert_close(network(images, masks), network(images), rtol=0, atol=0)


def test_a_network_for_landmark_masks_says_so_when_it_gets_none(images):
    with pytest.raises(ConfigError, match="landmark masks and got none"):
        tiny(masks="landmarks")(images)


def test_a_frozen_mask_network_keeps_its_statistics_in_training(images):
    network = tiny()
    network.mask_net.requires_grad_(False)
    before = {name: value.clone() for name, value in network.mask_net.state_dict().items()}
    network.train()
    network(images)
    assert network.trunk.training
    assert not any(module.training for module in network.mask_net.modules())
    for name, value in network.mask_net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_mask_network_that_learns_is_in_training_with_the_rest():
    assert tiny().train().mask_net.training
    assert not tiny().train().eval().mask_net.training


# The trunk.


@torch.inference_mode()
def test_bytes_and_floats_of_the_same_pixels_give_the_same_logits(images):
    network = tiny(masks="ones")
    torch.testing.assert_close(network(images.float()), network(images), rtol=0, atol=0)


@torch.inference_mode()
def test_pixels_are_normalised_with_the_settings_mean_and_deviation(images):
    plain, shifted = tiny(masks="ones", pixel_mean=0.0, pixel_std=1.0), tiny(masks="ones", pixel_mean=50, pixel_std=2)
    torch.testing.assert_close(shifted(images), plain((images.float() - 50) / 2))


@pytest.mark.parametrize(
    ("levels", "sides"), [((3, 4, 5), [8, 4, 2]), ((5,), [2]), ((3,), [8]), ((2, 3), [16, 8]), ((1, 5), [32, 2])]
)
@torch.inference_mode()
def test_maps_have_the_stride_of_their_level_and_the_channels_that_are_stated(levels, sides, images):
    network = tiny(masks="ones", levels=levels)
    maps, last = network.trunk(images.float())
    assert [tuple(each.shape[2:]) for each in maps] == [(side, side) for side in sides]
    assert [each.shape[1] for each in maps] == network.trunk.channels
    assert last.shape == (3, network.trunk.last_map_channels, 2, 2)
    assert network(images).shape == (3, 40)


@torch.inference_mode()
def test_the_papers_trunk_has_its_channels_and_cells():
    with torch.device("meta"):
        trunk = Trunk("resnest50d", (3, 4, 5))
        maps, last = trunk.eval()(torch.zeros(1, 3, 227, 227))
    assert [tuple(each.shape[1:]) for each in maps] == [(512, 29, 29), (1024, 15, 15), (2048, 8, 8)]
    assert trunk.channels == [512, 1024, 2048]
    assert last.shape == maps[-1].shape


@torch.inference_mode()
def test_the_default_networks_last_map_keeps_the_pretrained_head_convolution():
    with torch.device("meta"):
        trunk = Trunk("efficientnet_lite0", (3, 4, 5)).eval()
        maps, _ = trunk(torch.zeros(1, 3, 128, 128))
    assert [tuple(each.shape[1:]) for each in maps] == [(40, 16, 16), (112, 8, 8), (1280, 4, 4)]


@torch.inference_mode()
def test_faces_of_a_batch_do_not_meet(images):
    network = tiny()
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_only(images):
    network = tiny(masks="ones", dropout=0.5)
    torch.testing.assert_close(network(images), network(images), rtol=0, atol=0)
    network.dropout.train()
    assert (network(images) - network(images)).abs().max() > 1e-4


def test_an_unknown_backbone_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'no_such_net' is not a network of timm"):
        tiny(backbone="no_such_net")


@pytest.mark.parametrize("levels", [(6,), (0, 3), ()])
def test_a_level_that_the_trunk_lacks_is_an_error_that_lists_its_strides(levels):
    with pytest.raises(ConfigError, match=r"strides \[2, 4, 8, 16, 32\]"):
        tiny(levels=levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (3, 3)}, "must rise, each named once"),
        ({"levels": (5, 4)}, "must rise, each named once"),
        ({"backbone": "hf-hub:someone/something"}, "backbone"),
        ({"masks": "drawn"}, "masks"),
        ({"fusion": "product"}, "fusion"),
        ({"dropout": 1.0}, "dropout"),
        ({"pixel_std": 0}, "pixel_std"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        NetworkSettings(**settings)
