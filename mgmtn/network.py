"""MGMTN: mask-guided pooling of a trunk's features, fusion of group and global features (G2FF), one head per group.

Known from the paper: the flow, `Gr_i^j = resize(P_j; F_i) * F_i` for mask j on feature level i, ResNeSt50's F3, F4, F5,
and that group and global features are fused. Ours: mask-normalised average pooling, the fusion's operators, soft masks.
"""

from typing import Any, Literal, Self, cast

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

import mgmtn.mobilefacenet  # noqa: F401  so that timm knows it
from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES, GROUPS
from mgmtn.errors import ConfigError
from mgmtn.mask_net import MaskNet, MaskNetSettings

# Shapes: B faces, 3 colours, S x S the model's square, C channels, H x W feature cells, M x M mask cells,
# G facial groups, D width of a group's feature, A attributes.

MaskSource = Literal["learned", "landmarks", "ones"]
Fusion = Literal["concat", "add", "gate", "none"]
Head = Literal["groups", "plain", "both"]


class NetworkSettings(BaseModel):
    """MGMTN's architecture; part of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # No colon: timm would fetch `hf-hub:...` from the network, and with it whatever a checkpoint's card names.
    backbone: str = Field(
        "efficientnet_lite0", pattern=r"^[\w.-]+$", description="trunk's name in timm; the paper's is resnest50d"
    )
    image_size: int = Field(128, ge=32, description="side of the model's square, pixels; the paper's is 227")
    levels: tuple[int, ...] = Field((3, 4, 5), description="feature levels that masks pool: level i has stride 2^i")
    masks: MaskSource = Field("learned", description="where group masks come from; ones: plain average pooling")
    fusion: Fusion = Field("concat", description="how a group's feature meets the global one (G2FF); none: it does not")
    head: Head = Field(
        "groups",
        description="a head per facial group; plain: one for all on the global feature, without masks; both: their sum",
    )
    width: int = Field(128, ge=8, description="channels of each group's fused feature")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of fused features dropped in training")
    pixel_mean: float = Field(127.0, description="subtracted from pixels of 0 to 255")
    pixel_std: float = Field(128.0, gt=0, description="pixels are divided by it, after the mean's subtraction")
    mask_net: MaskNetSettings = Field(default=MaskNetSettings(), description="AML's architecture, for learned masks")

    @field_validator("levels")
    @classmethod
    def _each_level_once(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"levels {levels} must rise, each named once")
        return levels


def pool_by_group(features_BCHW: Tensor, masks_BGHW: Tensor) -> Tensor:
    """Average the features under each facial group's mask; an empty mask pools to zeros.

    Equals the global average of the paper's `Gr^j`, rescaled by the mask's area, without building G masked maps.

    Returns:
        Shape `(B, G, C)`.
    """
    area_BG11 = masks_BGHW.sum(dim=(2, 3), keepdim=True)
    weights_BGHW = masks_BGHW / area_BG11.clamp_min(1e-6)
    return torch.einsum("bchw,bghw->bgc", features_BCHW, weights_BGHW)


class GroupLinear(nn.Module):
    """One linear layer per facial group, run as one batched product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_GIO = nn.Parameter(torch.empty(len(GROUPS), inputs, outputs))
        self.bias_GO = nn.Parameter(torch.zeros(len(GROUPS), outputs))
        nn.init.trunc_normal_(self.weight_GIO, std=inputs**-0.5)

    def forward(self, x_BGI: Tensor) -> Tensor:
        return torch.einsum("bgi,gio->bgo", x_BGI, self.weight_GIO) + self.bias_GO


class GroupGlobalFusion(nn.Module):
    """G2FF with our operators: project group and global features to one width, then fuse them per group."""

    def __init__(self, *, group_channels: int, global_channels: int, width: int, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.project_group = GroupLinear(group_channels, width)
        # Not made where it is not used: distributed training asks a gradient of every parameter.
        self.project_global = nn.Linear(global_channels, width) if fusion != "none" else None
        self.mix = GroupLinear(2 * width if fusion in ("concat", "gate") else width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, groups_BGC: Tensor, global_BC: Tensor) -> Tensor:
        """Fuse to shape `(B, G, D)`."""
        group_BGD = self.project_group(groups_BGC)
        if self.project_global is None:
            return nn.functional.silu(self.norm(self.mix(group_BGD)))
        global_BGD = self.project_global(global_BC)[:, None].expand_as(group_BGD)
        match self.fusion:
            case "add":
                fused = self.mix(group_BGD + global_BGD)
            case "concat":
                fused = self.mix(torch.cat([group_BGD, global_BGD], dim=2))
            case _:
                gate = torch.sigmoid(self.mix(torch.cat([group_BGD, global_BGD], dim=2)))
                fused = gate * group_BGD + (1 - gate) * global_BGD
        return nn.functional.silu(self.norm(fused))


class GroupHeads(nn.Module):
    """One linear head per group for its attributes: row a of the weights belongs to a's group."""

    group_of_A: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        owner = {name: GROUPS.index(group) for group, names in GROUP_ATTRIBUTES.items() for name in names}
        self.register_buffer("group_of_A", torch.tensor([owner[name] for name in ATTRIBUTES]), persistent=False)
        self.weight_AD = nn.Parameter(torch.empty(len(ATTRIBUTES), width))
        self.bias_A = nn.Parameter(torch.zeros(len(ATTRIBUTES)))
        nn.init.trunc_normal_(self.weight_AD, std=0.02)

    def forward(self, fused_BGD: Tensor) -> Tensor:
        return (fused_BGD[:, self.group_of_A] * self.weight_AD).sum(-1) + self.bias_A


class Trunk(nn.Module):
    """A timm network as a source of features at chosen levels; the deepest level is the trunk's last map.

    For an EfficientNet that map is the one after the 1x1 "head" convolution, whose ImageNet weights are worth keeping.
    """

    def __init__(self, name: str, levels: tuple[int, ...]) -> None:
        super().__init__()
        try:
            self.net: Any = cast(Any, timm.create_model(name, pretrained=False, num_classes=0, global_pool=""))
        except RuntimeError as error:  # timm's answer to an unknown name
            raise ConfigError(f"backbone: {name!r} is not a network of timm: {error}") from error
        position = {int(info["reduction"]): index for index, info in enumerate(self.net.feature_info)}
        missing = [level for level in levels if 2**level not in position]
        if missing or not levels:
            strides = sorted(position)
            raise ConfigError(f"levels: {name} has features of strides {strides}, so none for levels {missing}")
        self.last_map_channels = int(self.net.num_features)
        last_stride = max(position)
        self.positions = [position[2**level] for level in levels if 2**level != last_stride]
        self.uses_last_map = any(2**level == last_stride for level in levels)
        self.channels = [int(self.net.feature_info[index]["num_chs"]) for index in self.positions]
        if self.uses_last_map:
            self.channels.append(self.last_map_channels)

    def forward(self, images_B3SS: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of the chosen levels, shallow first, and the last map."""
        if not self.positions:  # which timm cannot be asked for
            last_BCHW = self.net.forward_features(images_B3SS)
            return [last_BCHW], last_BCHW
        last_BCHW, maps = self.net.forward_intermediates(images_B3SS, indices=self.positions)
        return [*maps, last_BCHW] if self.uses_last_map else maps, last_BCHW

    def freeze(self, level: int) -> None:
        """Keep the trunk as it is up to the features of stride 2^level: weights and statistics.

        Raises:
            ConfigError: the trunk has no features of that stride.
        """
        modules = {int(info["reduction"]): str(info["module"]) for info in self.net.feature_info}
        if 2**level not in modules:
            raise ConfigError(f"freeze: the trunk has features of strides {sorted(modules)}, none for level {level}")
        # In the order of definition, which is that of the forward pass; the level's own module may be an activation.
        modules_in_order = [name for name, _ in self.net.named_modules()]
        end = max(index for index, name in enumerate(modules_in_order) if _is_within(name, modules[2**level]))
        frozen = set(modules_in_order[: end + 1])
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] not in frozen)


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


class MGMTN(nn.Module):
    """Aligned faces to 40 attribute logits."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        self.trunk = Trunk(settings.backbone, settings.levels)
        self.dropout = nn.Dropout(settings.dropout)
        self.mask_net = MaskNet(settings.mask_net) if self.uses_masks and settings.masks == "learned" else None
        # A group that is the whole face loses by pooling and fusing what a plain head reads directly: both add up.
        self.head = None if settings.head == "groups" else nn.Linear(self.trunk.last_map_channels, len(ATTRIBUTES))
        if settings.head == "plain":
            return
        self.fuse = GroupGlobalFusion(
            group_channels=sum(self.trunk.channels),
            global_channels=self.trunk.last_map_channels,
            width=settings.width,
            fusion=settings.fusion,
        )
        self.heads = GroupHeads(settings.width)

    @property
    def uses_masks(self) -> bool:
        """Whether masks guide the pooling."""
        return self.settings.head != "plain" and self.settings.masks != "ones"

    def forward(self, images_B3SS: Tensor, masks_BGMM: Tensor | None = None) -> Tensor:
        """Predict attribute logits.

        Args:
            images_B3SS: pixels of 0 to 255, any dtype, S = `settings.image_size`.
            masks_BGMM: group masks in [0, 1], any size, over the whole square; required when `settings.masks` is
                "landmarks", and taken in place of AML's when given to a network with learned masks.

        Returns:
            Logits, shape `(B, 40)`, in the order of `ATTRIBUTES`.
        """
        images_B3SS = images_B3SS.float()
        maps, last_BCHW = self.trunk((images_B3SS - self.settings.pixel_mean) / self.settings.pixel_std)
        global_BC = last_BCHW.mean(dim=(2, 3))
        plain_BA = None if self.head is None else self.head(self.dropout(global_BC))
        if plain_BA is not None and self.settings.head == "plain":
            return plain_BA
        masks_BGMM = self.soft_masks(images_B3SS, masks_BGMM)
        pooled = [pool_by_group(features_BCHW, resize_masks(masks_BGMM, features_BCHW)) for features_BCHW in maps]
        fused_BGD = self.fuse(torch.cat(pooled, dim=2), global_BC)
        logits_BA = self.heads(self.dropout(fused_BGD))
        return logits_BA if plain_BA is None else logits_BA + plain_BA

    def train(self, mode: bool = True) -> Self:
        """As of any module, but frozen parts keep the statistics that they were trained with."""
        super().train(mode)
        if self.mask_net is not None and not any(p.requires_grad for p in self.mask_net.parameters()):
            self.mask_net.eval()
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def soft_masks(self, images_B3SS: Tensor, given_BGMM: Tensor | None = None) -> Tensor:
        """The masks that guide the pooling: those given, AML's prediction, or ones; in [0, 1]."""
        if self.settings.masks == "ones":
            return images_B3SS.new_ones(len(images_B3SS), len(GROUPS), 1, 1)
        if given_BGMM is not None:
            return given_BGMM.to(images_B3SS.dtype)
        if self.mask_net is None:
            raise ConfigError("masks: this network was built for landmark masks and got none")
        return torch.sigmoid(self.mask_net(images_B3SS))


def resize_masks(masks_BGMM: Tensor, features_BCHW: Tensor) -> Tensor:
    """Average masks down to a feature map's cells (nearest sampling loses small groups on a 4 x 4 grid)."""
    height, width = features_BCHW.shape[-2:]
    return nn.functional.adaptive_avg_pool2d(masks_BGMM, (height, width))
