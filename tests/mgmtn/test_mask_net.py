"""AML's network: shapes, what it refuses, and how its masks are compared."""

import pytest
import torch
from pydantic import ValidationError

from mgmtn.errors import ConfigError
from mgmtn.mask_net import MaskNet, MaskNetSettings, overlaps


@pytest.fixture(scope="module")
def mask_net():
    torch.manual_seed(0)
    return MaskNet(MaskNetSettings()).eval()


@pytest.mark.parametrize("side", [32, 64, 128, 227])
@torch.inference_mode()
def test_a_square_of_any_size_gives_masks_of_the_networks_resolution(mask_net, side):
    assert mask_net(torch.zeros(2, 3, side, side)).shape == (2, 8, 64, 64)


@torch.inference_mode()
def test_bytes_and_floats_of_the_same_pixels_give_the_same_masks(mask_net):
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(mask_net(images), mask_net(images.float()), rtol=0, atol=0)


@torch.inference_mode()
def test_faces_of_a_batch_do_not_meet(mask_net):
    images = torch.rand(2, 3, 64, 64) * 255
    both = mask_net(images)
    changed = mask_net(torch.cat([images[:1], 255 - images[1:]]))
    torch.testing.assert_close(both[0], changed[0], rtol=1e-4, atol=1e-5)
    assert (both[1] - changed[1]).abs().max() > 1e-3


@torch.inference_mode()
def test_a_larger_picture_is_averaged_down_not_sampled(mask_net):
    fine = torch.zeros(1, 3, 256, 256)
    fine[..., ::2] = 254
    torch.testing.assert_close(mask_net(fine), mask_net(torch.full((1, 3, 64, 64), 127.0)), rtol=0, atol=0.05)


def test_every_parameter_is_trained():
    net = MaskNet(MaskNetSettings(resolution=32)).train()
    net(torch.rand(2, 3, 32, 32) * 255).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_shallower_network_is_built_from_settings():
    settings = MaskNetSettings(depth=3, decoder_channels=(32, 24, 16), resolution=40)
    assert MaskNet(settings).eval()(torch.zeros(1, 3, 40, 40)).shape == (1, 8, 40, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 4}, "depth is 4, but decoder_channels has 5 entries"),
        ({"resolution": 80}, "resolution 80 is no multiple of 2\\^depth = 32"),
        ({"resolution": 16}, "greater than or equal to 32"),
        ({"encoder": "tu-hf-hub:someone/something"}, "encoder"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MaskNetSettings(**settings)


@pytest.mark.parametrize("encoder", ["tu-no_such_network", "no_such_encoder"])
def test_an_unknown_encoder_is_an_error_that_names_it(encoder):
    with pytest.raises(ConfigError, match=encoder):
        MaskNet(MaskNetSettings(encoder=encoder))


def test_overlap_counts_cells_in_both_and_in_either():
    logits, masks = torch.full((1, 2, 4, 4), -5.0), torch.zeros(1, 2, 4, 4)
    logits[0, 0, :2], masks[0, 0, 1:3] = 5.0, 1.0
    assert overlaps(logits, masks).tolist() == [[[4.0, 12.0], [0.0, 0.0]]]
