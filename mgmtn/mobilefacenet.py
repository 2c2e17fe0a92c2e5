"""MobileFaceNet (Chen et al., arXiv 1804.07573, table 1) as a trunk for timm: a small face-recognition network.

Ours: ReLU6 where the paper has PReLU, as the public MS1M weights do, and no embedding layers: the last map is the one
that the global depth-wise convolution would read. Importing this module adds "mobilefacenet" to timm's registry.
"""

from typing import Any, Final

from timm.models import register_model
from torch import Tensor, nn

# Shapes: B faces, 3 colours, S x S the model's square, C channels, H x W feature cells.

# Expansion, output channels, blocks, stride of the first one.
_BOTTLENECKS: Final = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
_LAST_CHANNELS: Final = 512


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _conv_norm_act(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = _conv(inputs, outputs, kernel, stride=stride, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class DepthwiseSeparable(nn.Module):
    """A depth-wise and a point-wise convolution, each with norm and activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = _conv(channels, channels, 3, groups=channels)
        self.pointwise = _conv(channels, channels, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)  # not ReLU6: so the public weights were trained

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.act(self.bn1(self.depthwise(x_BCHW)))
        return self.act(self.bn2(self.pointwise(x_BCHW)))


class Bottleneck(nn.Module):
    """Expand, filter depth-wise, project; added to the input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds_input = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            _conv_norm_act(inputs, hidden, 1),
            _conv_norm_act(hidden, hidden, 3, stride=stride, groups=hidden),
            _conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW)
        return x_BCHW + y_BCHW if self.adds_input else y_BCHW


class MobileFaceNet(nn.Module):
    """Image to a map of 512 channels at stride 16; features at strides 2, 4, 8 and 16 on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = _LAST_CHANNELS
        self.conv1 = _conv_norm_act(3, 64, 3, stride=2)
        self.dw_conv = DepthwiseSeparable(64)
        blocks: list[nn.Module] = []
        self.feature_info: list[dict[str, Any]] = [{"num_chs": 64, "reduction": 2, "module": "dw_conv"}]
        channels, reduction = 64, 2
        for expansion, outputs, count, stride in _BOTTLENECKS:
            for index in range(count):
                step = stride if index == 0 else 1
                reduction *= step
                blocks.append(Bottleneck(channels, outputs, expansion=expansion, stride=step))
                channels = outputs
                info = {"num_chs": channels, "reduction": reduction, "module": f"features.{len(blocks) - 1}"}
                same_stride = self.feature_info[-1]["reduction"] == reduction
                self.feature_info[-1:] = [info] if same_stride else [self.feature_info[-1], info]
        self.features = nn.Sequential(*blocks)
        self.conv2 = _conv_norm_act(channels, _LAST_CHANNELS, 1)

    def forward_intermediates(self, images_B3SS: Tensor, *, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The last map, and those of the chosen entries of `feature_info`, shallow first."""
        wanted = {self.feature_info[index]["module"] for index in indices}
        x_BCHW = self.dw_conv(self.conv1(images_B3SS))
        maps = [x_BCHW] if "dw_conv" in wanted else []
        for index, block in enumerate(self.features):
            x_BCHW = block(x_BCHW)
            if f"features.{index}" in wanted:
                maps.append(x_BCHW)
        return self.conv2(x_BCHW), maps

    def forward_features(self, images_B3SS: Tensor) -> Tensor:
        last_BCHW, _ = self.forward_intermediates(images_B3SS, indices=[])
        return last_BCHW

    def forward(self, images_B3SS: Tensor) -> Tensor:
        return self.forward_features(images_B3SS)


@register_model
def mobilefacenet(pretrained: bool = False, **unused: object) -> MobileFaceNet:
    """For timm's registry; its weights are given by path (`mgmtn train attributes --trunk-weights`).

    Raises:
        RuntimeError: asked for pretrained weights, which no hub of timm has.
    """
    if pretrained:
        raise RuntimeError("mobilefacenet has no weights on timm's hub")
    return MobileFaceNet()


def fill(trunk: MobileFaceNet, state: dict[str, Tensor]) -> None:
    """Load a face-recognition checkpoint without its embedding layers, in place."""
    trunk.load_state_dict({name: state[name] for name in trunk.state_dict()})


__all__ = ["Bottleneck", "DepthwiseSeparable", "MobileFaceNet", "fill", "mobilefacenet"]
