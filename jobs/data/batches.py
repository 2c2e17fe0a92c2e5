"""Samples in memory to augmented batches: one worker's share of each epoch, the same on every run of a seed.

One affine map moves a face and its masks together, each sampled at its own resolution.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from jobs.data.training_table import Samples

# Shapes: B faces, 3 colours, P x P the stored face with its margin, S x S the model's square, G groups, M x M masks.


class AugmentSettings(BaseModel):
    """How far a training face may stray from its stored self; zeros switch a part off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flip: bool = Field(True, description="mirror half of the faces")
    rotation: float = Field(10.0, ge=0, description="largest rotation, degrees")
    scale: float = Field(0.12, ge=0, lt=1, description="largest change of scale, as a share")
    shift: float = Field(0.05, ge=0, description="largest shift, as a share of the square's side")
    colour: float = Field(
        0.3, ge=0, lt=1, description="largest change of brightness, contrast and saturation, as a share"
    )
    soften: float = Field(0.2, ge=0, le=1, description="share of faces that lose resolution, down to half")
    erase: float = Field(0.2, ge=0, le=1, description="share of faces with one rectangle erased")


@dataclass(frozen=True)
class Batch:
    """Tensors of one step.

    Attributes:
        images: `(B, 3, S, S)`, float pixels of 0 to 255.
        masks: `(B, 8, M, M)`, float in [0, 1], over the square.
        labels: `(B, 40)`, 0 or 1.
        known: `(B, 40)`, bool.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    known: Tensor

    def to(self, device: torch.device) -> "Batch":
        tensors = (self.images, self.masks, self.labels, self.known)
        images, *rest = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(images.contiguous(memory_format=torch.channels_last), *rest)


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of all samples in one epoch: the same for any number of workers."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def training_batches(
    samples: Samples,
    *,
    image_size: int,
    mask_size: int,
    batch_size: int,
    augment: AugmentSettings,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """One worker's batches of one epoch.

    Each global batch of `batch_size * world` consecutive samples of the epoch's order is dealt out in `world` parts;
    the incomplete last one is dropped, so that every worker takes as many steps.
    """
    order = epoch_order(len(samples), seed=seed, epoch=epoch)
    for step in range(len(samples) // (batch_size * world)):
        start = (step * world + rank) * batch_size
        chosen = samples.take(order[start : start + batch_size])
        state = int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(state)
        batch = as_batch(chosen, mask_size=mask_size)
        yield augmented(batch, image_size=image_size, augment=augment, generator=generator)


def plain_batches(samples: Samples, *, image_size: int, mask_size: int, batch_size: int) -> Iterator[Batch]:
    """All samples in order, their middles cut out, nothing changed."""
    for start in range(0, len(samples), batch_size):
        chosen = samples.take(np.arange(start, min(start + batch_size, len(samples))))
        yield centre(as_batch(chosen, mask_size=mask_size), image_size=image_size)


def as_batch(samples: Samples, *, mask_size: int) -> Batch:
    """Stored faces and masks, whole, as tensors."""
    return Batch(
        images=torch.from_numpy(samples.faces).permute(0, 3, 1, 2).float(),
        masks=torch.from_numpy(samples.unpacked_masks(mask_size)).float(),
        labels=torch.from_numpy(samples.labels == 1).float(),
        known=torch.from_numpy(samples.known),
    )


def centre(batch: Batch, *, image_size: int) -> Batch:
    """The middle square of each face, pixel by pixel, and of its masks."""
    stored = batch.images.shape[-1]
    margin = (stored - image_size) // 2
    images = batch.images[..., margin : margin + image_size, margin : margin + image_size]
    theta = torch.eye(2, 3)[None].repeat(len(images), 1, 1) * (image_size / stored)
    return Batch(images, _resample(batch.masks, theta, batch.masks.shape[-1]), batch.labels, batch.known)


def augmented(batch: Batch, *, image_size: int, augment: AugmentSettings, generator: torch.Generator) -> Batch:
    """Move, mirror, recolour, soften and erase at random."""
    theta = _random_affine(len(batch.images), augment, image_size / batch.images.shape[-1], generator)
    images = _resample(batch.images, theta, image_size)
    masks = _resample(batch.masks, theta, batch.masks.shape[-1])
    images = _recolour(images, augment.colour, generator)
    images = _soften(images, augment.soften, generator)
    images = _erase(images, augment.erase, generator)
    return Batch(images, masks, batch.labels, batch.known)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _random_affine(count: int, augment: AugmentSettings, extent: float, generator: torch.Generator) -> Tensor:
    """Maps of the square's coordinates in [-1, 1] to the stored face's, shape `(B, 2, 3)`."""
    angle = _uniform(count, -augment.rotation, augment.rotation, generator) * math.pi / 180
    scale = extent * (1 + _uniform(count, -augment.scale, augment.scale, generator))
    mirror = torch.where(_uniform(count, 0, 1, generator) < (0.5 if augment.flip else 0.0), -1.0, 1.0)
    shift_x = 2 * extent * _uniform(count, -augment.shift, augment.shift, generator)
    shift_y = 2 * extent * _uniform(count, -augment.shift, augment.shift, generator)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([mirror * cos, -sin, shift_x], 1), torch.stack([mirror * sin, cos, shift_y], 1)]
    return torch.stack(rows, 1)


def _resample(maps: Tensor, theta: Tensor, size: int) -> Tensor:
    grid = nn.functional.affine_grid(theta, [len(maps), 1, size, size], align_corners=False)
    return nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    count = len(images)
    brightness, contrast, saturation = (
        (1 + _uniform(count, -strength, strength, generator))[:, None, None, None] for _ in range(3)
    )
    weights = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    images = grey + (images - grey) * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean * brightness).clamp(0, 255)


def _soften(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Reduce some of the faces and enlarge them again, as the small pictures of a corpus arrive."""
    chosen = _uniform(len(images), 0, 1, generator) < share
    if not chosen.any():
        return images
    size = images.shape[-1]
    small = int(size * float(_uniform(1, 0.5, 0.9, generator)))
    reduced = nn.functional.interpolate(images[chosen], (small, small), mode="bilinear", antialias=True)
    images = images.clone()
    images[chosen] = nn.functional.interpolate(reduced, (size, size), mode="bilinear")
    return images


def _erase(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Fill one rectangle of some of the faces with noise (Zhong et al., arXiv 1708.04896)."""
    size = images.shape[-1]
    for image, draw in zip(images, torch.rand(len(images), 5, generator=generator), strict=True):
        if draw[0] >= share:
            continue
        height, width = (int(size * (0.1 + 0.25 * float(part))) for part in draw[1:3])
        top, left = int((size - height) * float(draw[3])), int((size - width) * float(draw[4]))
        image[:, top : top + height, left : left + width] = torch.rand(3, height, width, generator=generator) * 255
    return images
