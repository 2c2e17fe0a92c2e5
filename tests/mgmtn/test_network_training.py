"""What of MGMTN learns: frozen parts, the plain head that masks cannot reach, and both heads together."""

import pytest
import torch
from torch import nn

from mgmtn.errors import ConfigError
from mgmtn.network import MGMTN, NetworkSettings

TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16, masks="landmarks", dropout=0.0)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255


def masks(count: int = 4) -> torch.Tensor:
    return (torch.rand(count, 8, 64, 64, generator=torch.Generator().manual_seed(2)) < 0.3).float()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("level", [1, 3, 5])
def test_a_frozen_part_of_the_trunk_keeps_its_weights_and_statistics_while_the_rest_learns(level):
    torch.manual_seed(0)
    module = MGMTN(TINY)
    module.trunk.freeze(level)
    frozen = {name for name, parameter in module.trunk.net.named_parameters() if not parameter.requires_grad}
    assert frozen
    before = state(module)
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(images(), masks()).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    # A norm's statistics are frozen with its weights.
    norms = {name.rpartition(".")[0] for name in frozen}
    kept = {name for name in before if name.startswith("trunk.net.") and name[10:].rpartition(".")[0] in norms}
    assert not changed & kept
    assert any(name.startswith("fuse.") for name in changed)
    learns = {name for name in changed if name.startswith("trunk.net.") and name.endswith("running_mean")}
    assert bool(learns) == (level < 5)


def test_what_is_frozen_is_all_up_to_the_features_of_that_stride_and_nothing_after():
    module = MGMTN(TINY)
    module.trunk.freeze(3)
    image = images(1) / 255
    image.requires_grad_()
    (features,), _ = MGMTN(TINY.model_copy(update={"levels": (3,)})).trunk(image)
    assert features.shape[-1] == 8
    frozen = [name for name, parameter in module.trunk.net.named_parameters() if not parameter.requires_grad]
    last = max(int(name.split(".")[1]) for name in frozen if name.startswith("blocks."))
    info = next(info for info in module.trunk.net.feature_info if info["reduction"] == 8)
    assert info["module"] == f"blocks.{last}"


def test_freezing_at_a_level_that_the_trunk_lacks_is_an_error_that_lists_its_strides():
    with pytest.raises(ConfigError, match=r"freeze: the trunk has features of strides \[2, 4, .*none for level 7"):
        MGMTN(TINY).trunk.freeze(7)


def test_the_plain_head_ignores_masks_and_has_no_mask_network():
    torch.manual_seed(0)
    module = MGMTN(TINY.model_copy(update={"head": "plain", "masks": "learned"})).eval()
    assert module.mask_net is None
    assert not module.uses_masks
    assert not hasattr(module, "fuse")
    given, other = module(images(), masks()), module(images(), 1 - masks())
    assert torch.equal(given, other)
    assert torch.equal(given, module(images()))


def test_the_plain_head_is_one_linear_layer_on_the_pooled_last_map():
    torch.manual_seed(0)
    module = MGMTN(TINY.model_copy(update={"head": "plain"})).eval()
    _, last = module.trunk((images() - 127) / 128)
    expected = last.mean(dim=(2, 3)) @ module.head.weight.T + module.head.bias
    torch.testing.assert_close(module(images()), expected)


def test_both_heads_add_up_and_each_learns():
    torch.manual_seed(0)
    module = MGMTN(TINY.model_copy(update={"head": "both"})).eval()
    groups = MGMTN(TINY).eval()
    groups.load_state_dict({name: value for name, value in module.state_dict().items() if not name.startswith("head.")})
    plain = MGMTN(TINY.model_copy(update={"head": "plain"})).eval()
    own = plain.state_dict()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name in own})
    torch.testing.assert_close(module(images(), masks()), groups(images(), masks()) + plain(images()))
    module.train()(images(), masks()).square().sum().backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not [name for name in without if not name.startswith("trunk.")]
    assert module.uses_masks
