"""AML: the fully convolutional network that learns to predict the group masks, so that inference needs no landmarks.

The paper: a UNet-type network, one binary mask per group, independent pixel-wise problems. Ours: the encoder, and that
it looks at a reduced image, since the masks are consumed at 29 x 29 cells or less.
"""

from typing import Self

import segmentation_models_pytorch as smp
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from mgmtn.attributes import GROUPS
from mgmtn.errors import ConfigError

# Shapes: B faces, 3 colours, S x S the model's square, R x R the mask network's view, G facial groups.


class MaskNetSettings(BaseModel):
    """AML's architecture; part of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = Field(
        "tu-mobilenetv3_small_050",
        pattern=r"^[\w.-]+$",  # no colon: `tu-hf-hub:...` would be fetched from the network
        description="encoder's name in segmentation-models-pytorch",
    )
    depth: int = Field(5, ge=3, le=5, description="encoder stages, each half the size of the one before")
    decoder_channels: tuple[int, ...] = Field(
        (96, 64, 32, 24, 16), description="channels of each decoder block, deepest first"
    )
    resolution: int = Field(64, ge=32, description="side of the image and of the masks inside the network, pixels")

    @model_validator(mode="after")
    def _one_block_for_each_stage(self) -> Self:
        if len(self.decoder_channels) != self.depth:
            raise ValueError(f"depth is {self.depth}, but decoder_channels has {len(self.decoder_channels)} entries")
        if self.resolution % 2**self.depth:
            raise ValueError(f"resolution {self.resolution} is no multiple of 2^depth = {2**self.depth}")
        return self


class MaskNet(nn.Module):
    """Image to one mask per facial group.

    Raises:
        ConfigError: the settings name no encoder.
    """

    def __init__(self, settings: MaskNetSettings) -> None:
        super().__init__()
        self.settings = settings
        try:
            self.unet = smp.Unet(
                settings.encoder,
                encoder_depth=settings.depth,
                encoder_weights=None,
                decoder_channels=settings.decoder_channels,
                classes=len(GROUPS),
            )
        except (KeyError, RuntimeError) as error:  # the package's and timm's answers to an unknown name
            raise ConfigError(f"encoder: {settings.encoder!r} cannot be built: {error}") from error

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Predict mask logits.

        Args:
            images_B3SS: pixels of 0 to 255, any dtype, any square size.

        Returns:
            Logits, shape `(B, 8, R, R)`; their sigmoid is the soft mask of each group, over the whole square.
        """
        size = (self.settings.resolution, self.settings.resolution)
        images_B3RR = nn.functional.interpolate(images_B3SS.float(), size, mode="bilinear", antialias=True)
        return self.unet((images_B3RR - 127.5) / 127.5)


def overlaps(logits_BGRR: Tensor, masks_BGRR: Tensor) -> Tensor:
    """Cells in both, and cells in either, of each predicted mask (above one half) and the true one.

    Returns:
        Shape `(B, G, 2)`: summed over faces, the first by the second is the intersection over union.
    """
    predicted, true = logits_BGRR > 0, masks_BGRR > 0.5
    both_BG, either_BG = (predicted & true).sum(dim=(2, 3)), (predicted | true).sum(dim=(2, 3))
    return torch.stack([both_BG, either_BG], dim=2).float()
