"""How a training face may stray from its stored self; its masks move with it.

Each face's changes follow from its own row of random numbers, so that they are the same however a batch is divided
among workers. One affine map moves a face and its masks together, each sampled at its own resolution.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

# Shapes: B faces, 3 colours, S x S the model's square, G groups, M x M masks, K random numbers of a face.


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
    randaugment: int = Field(0, ge=0, le=8, description="RandAugment's operations on each face, on top of the others")
    magnitude: int = Field(9, ge=0, le=30, description="strength of RandAugment's operations")


_MOVE, _COLOUR, _SOFTEN, _ERASE = 5, 3, 2, 6  # random numbers that each part takes


def random_numbers(count: int, augment: AugmentSettings, generator: torch.Generator) -> Tensor:
    """What decides the changes of `count` faces: in [0, 1), shape `(B, K)`."""
    size = _MOVE + _COLOUR + _SOFTEN + _ERASE + 2 * augment.randaugment
    return torch.rand(count, size, generator=generator)


def augmented(
    images: Tensor, masks: Tensor, *, image_size: int, augment: AugmentSettings, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Move, mirror, recolour, soften and erase.

    Args:
        images: stored faces with their margin, float pixels of 0 to 255, `(B, 3, P, P)`.
        masks: over the whole stored faces, `(B, G, M, M)`.
        image_size: S.
        augment: how far.
        numbers: of `random_numbers`, a row for each face.

    Returns:
        Images `(B, 3, S, S)` and masks `(B, G, M, M)` over their square.
    """
    move, colour, soften, erase, chosen = numbers.split([_MOVE, _COLOUR, _SOFTEN, _ERASE, 2 * augment.randaugment], 1)
    operations = _chosen_operations(chosen.unflatten(1, (-1, 2)) if augment.randaugment else chosen[..., None])
    theta = _random_affine(move, augment, image_size / images.shape[-1])
    theta = _moved_by_operations(theta, operations, augment.magnitude)
    images, masks = resample(images, theta, image_size), resample(masks, theta, masks.shape[-1])
    images = _recolour(images, colour, augment.colour)
    images = _recoloured_by_operations(images, operations, augment.magnitude)
    images = _soften(images, soften, augment.soften)
    return _erase(images, erase, augment.erase), masks


def resample(maps: Tensor, theta: Tensor, size: int) -> Tensor:
    """Maps under affine maps of the square's coordinates in [-1, 1] to theirs, `(B, 2, 3)`."""
    grid = nn.functional.affine_grid(theta, [len(maps), 1, size, size], align_corners=False)
    return nn.functional.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _between(numbers: Tensor, low: float, high: float) -> Tensor:
    return numbers * (high - low) + low


def _random_affine(numbers: Tensor, augment: AugmentSettings, extent: float) -> Tensor:
    """Maps of the square's coordinates in [-1, 1] to the stored face's, shape `(B, 2, 3)`."""
    turn, size, side, right, down = numbers.unbind(1)
    angle = _between(turn, -augment.rotation, augment.rotation) * math.pi / 180
    scale = extent * (1 + _between(size, -augment.scale, augment.scale))
    mirror = torch.where(side < (0.5 if augment.flip else 0.0), -1.0, 1.0)
    shift_x = 2 * extent * _between(right, -augment.shift, augment.shift)
    shift_y = 2 * extent * _between(down, -augment.shift, augment.shift)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([mirror * cos, -sin, shift_x], 1), torch.stack([mirror * sin, cos, shift_y], 1)]
    return torch.stack(rows, 1)


def _recolour(images: Tensor, numbers: Tensor, strength: float) -> Tensor:
    brightness, contrast, saturation = (1 + _between(numbers, -strength, strength))[:, :, None, None, None].unbind(1)
    weights = torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    images = grey + (images - grey) * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean * brightness).clamp(0, 255)


def _soften(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Reduce some of the faces and enlarge them again, as the small pictures of a corpus arrive."""
    size = images.shape[-1]
    for index in torch.nonzero(numbers[:, 0] < share).flatten().tolist():
        small = int(size * _between(numbers[index, 1], 0.5, 0.9))
        face = images[index : index + 1]
        reduced = nn.functional.interpolate(face, (small, small), mode="bilinear", antialias=True)
        images[index] = nn.functional.interpolate(reduced, (size, size), mode="bilinear")[0]
    return images


def _erase(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Fill one rectangle of some of the faces with noise (Zhong et al., arXiv 1708.04896)."""
    size = images.shape[-1]
    for image, draw in zip(images, numbers.tolist(), strict=True):
        if draw[0] >= share:
            continue
        height, width = (int(size * (0.1 + 0.25 * part)) for part in draw[1:3])
        top, left = int((size - height) * draw[3]), int((size - width) * draw[4])
        noise = torch.Generator().manual_seed(int(draw[5] * 2**24))
        image[:, top : top + height, left : left + width] = torch.rand(3, height, width, generator=noise) * 255
    return images


# RandAugment (Cubuk et al., arXiv 1909.13719), its operations and their strengths as torchvision has them, in bins of 0
# to 30. torchvision's own class takes no masks, hence the split: what moves pixels becomes part of the affine map of
# face and masks, and the rest is torchvision's functions on the face alone. Names, signs: +1 or -1.

_Moves = dict[str, Callable[[float], list[list[float]]]]
_Looks = dict[str, Callable[[Tensor, float, int], Tensor]]

_MOVES: Final[_Moves] = {
    "shear_x": lambda amount: [[1, 0.3 * amount, 0], [0, 1, 0]],
    "shear_y": lambda amount: [[1, 0, 0], [0.3 * amount, 1, 0]],
    "translate_x": lambda amount: [[1, 0, 2 * 150 / 331 * amount], [0, 1, 0]],
    "translate_y": lambda amount: [[1, 0, 0], [0, 1, 2 * 150 / 331 * amount]],
    "rotate": lambda amount: _rotation(30 * amount),
}
_LOOKS: Final[_Looks] = {
    "identity": lambda image, amount, sign: image,
    "brightness": lambda image, amount, sign: transforms.adjust_brightness(image, 1 + 0.9 * sign * amount),
    "colour": lambda image, amount, sign: transforms.adjust_saturation(image, 1 + 0.9 * sign * amount),
    "contrast": lambda image, amount, sign: transforms.adjust_contrast(image, 1 + 0.9 * sign * amount),
    "sharpness": lambda image, amount, sign: transforms.adjust_sharpness(image, 1 + 0.9 * sign * amount),
    "posterize": lambda image, amount, sign: transforms.posterize(image, 8 - round(4 * amount)),
    "solarize": lambda image, amount, sign: transforms.solarize(image, 255 * (1 - amount)),
    "autocontrast": lambda image, amount, sign: transforms.autocontrast(image),
    "equalize": lambda image, amount, sign: transforms.equalize(image),
}
OPERATIONS: Final = (*_MOVES, *_LOOKS)

_Chosen = list[list[tuple[str, int]]]  # name and sign of each operation of each face


def _rotation(degrees: float) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin, 0], [sin, cos, 0]]


def _chosen_operations(numbers: Tensor) -> _Chosen:
    """The operations that random numbers of shape `(B, operations, 2)` choose."""
    return [
        [(OPERATIONS[int(which * len(OPERATIONS))], 1 if sign < 0.5 else -1) for which, sign in face]
        for face in numbers.tolist()
    ]


def _moved_by_operations(theta: Tensor, operations: _Chosen, magnitude: int) -> Tensor:
    last_row = torch.tensor([[0.0, 0.0, 1.0]])
    moved = []
    for affine, chosen in zip(theta, operations, strict=True):
        for name, sign in chosen:
            if name in _MOVES:
                affine = affine @ torch.cat([torch.tensor(_MOVES[name](sign * magnitude / 30)), last_row])
        moved.append(affine)
    return torch.stack(moved)


def _recoloured_by_operations(images: Tensor, operations: _Chosen, magnitude: int) -> Tensor:
    for index, chosen in enumerate(operations):
        for name, sign in chosen:
            if name in _LOOKS:
                face = images[index].round().to(torch.uint8)
                images[index] = _LOOKS[name](face, magnitude / 30, sign).float()
    return images
