"""How well AML's masks agree with those drawn from landmarks, on faces that it has not seen."""

from collections.abc import Sequence

import torch
from torch import nn

from jobs.data.batches import plain_batches
from jobs.data.training_table import Description, Folder, iterate_samples
from jobs.telemetry import progress_bar
from mgmtn.attributes import GROUPS
from mgmtn.errors import ConfigError
from mgmtn.mask_net import MaskNet, overlaps

_CHUNK = 256  # faces in memory at once


@torch.inference_mode()
def mask_agreement(
    mask_net: MaskNet, folders: Sequence[Folder], *, split: str, limit: int = 0, batch_size: int = 64
) -> dict[str, float]:
    """Intersection over union of each group's predicted and drawn mask, over all cells of all faces of a split.

    Pictures in which no face was found have no drawn masks and do not count.

    Raises:
        ConfigError: the split has no face, or the tables differ in size.
    """
    geometry, *others = map(Description.load, folders)
    for other, folder in zip(others, folders[1:], strict=True):
        if (other.image_size, other.mask_size) != (geometry.image_size, geometry.mask_size):
            raise ConfigError(
                f"data: {str(folders[0])!r} holds faces of {geometry.image_size} pixels, {str(folder)!r} of "
                f"{other.image_size}: measure them one by one"
            )
    device = next(mask_net.parameters()).device
    cells, done = torch.zeros(len(GROUPS), 2), 0
    total = limit or sum(Description.load(folder).splits.get(split, 0) for folder in folders)
    with progress_bar("masks", total=total, unit="images") as bar:
        for samples in iterate_samples(folders, split=split, count=_CHUNK):
            found = samples.take(samples.found.nonzero()[0][: limit - done if limit else None])
            for batch in plain_batches(
                found, image_size=geometry.image_size, mask_size=geometry.mask_size, batch_size=batch_size
            ):
                logits = mask_net(batch.images.to(device)).cpu()
                drawn = nn.functional.interpolate(batch.masks, logits.shape[-2:], mode="bilinear")
                cells += overlaps(logits, drawn).sum(0)
            done += len(found)
            bar.advance(len(samples))
            if limit and done >= limit:
                break
    if done == 0:
        raise ConfigError(f"split: no face of split {split!r} in {', '.join(map(str, folders))}")
    return {
        group: round(float(both / either.clamp_min(1)), 4) for group, (both, either) in zip(GROUPS, cells, strict=True)
    }
