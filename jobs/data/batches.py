"""Samples in memory to batches: one worker's share of each step, the same on every run of a seed.

What a step trains on follows from (seed, epoch, step) alone: a run may stop at any step and go on there, on any number
of workers.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from jobs.data.augmentation import AugmentSettings, augmented, random_numbers, resample
from jobs.data.training_table import Samples

# Shapes: B faces, 3 colours, P x P the stored face with its margin, S x S the model's square, G groups, M x M masks.


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

    def __len__(self) -> int:
        return len(self.images)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.masks, self.labels, self.known

    def to(self, device: torch.device) -> Self:
        images, *rest = (tensor.to(device, non_blocking=True) for tensor in self._tensors)
        return type(self)(images.contiguous(memory_format=torch.channels_last), *rest)

    def split(self, parts: int) -> list[Self]:
        """The faces in `parts` batches as equal as can be, none of them empty."""
        pieces = (tensor.tensor_split(min(parts, len(self))) for tensor in self._tensors)
        return [type(self)(*piece) for piece in zip(*pieces, strict=True)]


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of all samples in one epoch: the same for any number of workers."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_seed(seed: int, *, epoch: int, step: int, rank: int = 0) -> int:
    """A number of its own for each step of each worker."""
    return int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1)[0])


def training_batches(
    samples: Samples,
    *,
    image_size: int,
    mask_size: int,
    batch_size: int,
    augment: AugmentSettings,
    seed: int,
    epoch: int,
    first_step: int = 0,
    rank: int = 0,
    world: int = 1,
    loaders: int = 0,
) -> Iterator[Batch]:
    """One worker's batches of one epoch.

    Each `batch_size` consecutive samples of the epoch's order, a step, are dealt out in `world` parts as equal as can
    be; the incomplete last step is dropped. `loaders` threads prepare batches ahead; without any, the caller waits.
    """
    order = epoch_order(len(samples), seed=seed, epoch=epoch)
    share = slice(batch_size * rank // world, batch_size * (rank + 1) // world)

    def make(step: int) -> Batch:
        chosen = samples.take(order[step * batch_size : (step + 1) * batch_size][share])
        generator = torch.Generator().manual_seed(step_seed(seed, epoch=epoch, step=step))
        numbers = random_numbers(batch_size, augment, generator)[share]
        batch = as_batch(chosen, mask_size=mask_size)
        images, masks = augmented(batch.images, batch.masks, image_size=image_size, augment=augment, numbers=numbers)
        return Batch(images, masks, batch.labels, batch.known)

    yield from made_ahead(make, range(first_step, len(samples) // batch_size), threads=loaders)


def made_ahead(make: Callable[[int], Batch], steps: range, *, threads: int) -> Iterator[Batch]:
    """What `make` gives for each step, in order, made by threads up to two steps each ahead of its use."""
    if threads == 0:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Batch]] = deque()
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
    return Batch(images, resample(batch.masks, theta, batch.masks.shape[-1]), batch.labels, batch.known)
