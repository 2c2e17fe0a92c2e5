"""What can be trained: the mask network (AML) and the attribute network (MGMTN), as tasks of the training loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from jobs.data.batches import Batch
from jobs.data.object_store import local_copy
from jobs.data.training_table import Samples, load_labels, load_samples
from mgmtn.attributes import GROUPS
from mgmtn.checkpoint import Checkpoint
from mgmtn.errors import ConfigError, FetchError
from mgmtn.losses import AttributeLoss, attribute_loss, mask_loss
from mgmtn.mask_net import MaskNet, MaskNetSettings, overlaps
from mgmtn.network import MGMTN, NetworkSettings
from mgmtn.pretrained import load_imagenet_weights, load_trunk_weights

M = TypeVar("M", bound=nn.Module)

_FEW_FOLDERS: Final = 20  # so few are not one for each person


@dataclass(frozen=True)
class Source:
    """Where a task's samples are, and how they are cut."""

    data: tuple[str, ...]
    validation: float
    limit: int

    def load(self) -> tuple[Samples, Samples]:
        """Training samples and those held out of the train split.

        Raises:
            ConfigError: none are held out, or all.
        """
        names, _ = load_labels(self.data, split="train", limit=self.limit)
        held_out = self._cut(names)
        # Each side by itself: both as parts of one would be in memory twice for a while.
        train, cut = (
            load_samples(self.data, split="train", limit=self.limit, chosen=side) for side in (~held_out, held_out)
        )
        return train, cut

    def load_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Only the labels of `load`'s samples, in the same order: int8, shape `(N, 40)`.

        A driver needs no more, and all faces of a large table may not fit into its memory.

        Raises:
            ConfigError: none are held out, or all.
        """
        names, labels = load_labels(self.data, split="train", limit=self.limit)
        held_out = self._cut(names)
        return labels[~held_out], labels[held_out]

    def _cut(self, names: np.ndarray) -> np.ndarray:
        held_out = validation_cut(names, self.validation)
        if held_out.all() or not held_out.any():
            raise ConfigError(
                f"validation: {self.validation:g} of {len(names)} samples holds out {held_out.sum()}; "
                "both sides need some"
            )
        return held_out


def validation_cut(names: np.ndarray, share: float) -> np.ndarray:
    """Choose the samples to hold out: bool, shape `(N,)`; the same for the same names.

    Where images lie in a folder per person, whole folders are chosen, so that nobody is on both sides. Not so a folder
    that alone has more than is to be held out in all: that is a collection.
    """
    folders = np.array([str(Path(name).parent) for name in names])
    _, folder, counts = np.unique(folders, return_inverse=True, return_counts=True)
    is_person = (len(counts) > _FEW_FOLDERS) & (counts[folder] <= max(1, share * len(names)))
    keys = np.where(is_person, folders, names)
    unique, where = np.unique(keys, return_inverse=True)
    chosen = np.random.default_rng(20).random(len(unique)) < share
    return chosen[where]


@dataclass(frozen=True)
class MaskTask:
    """Image to group masks."""

    source: Source
    network: MaskNetSettings
    image_size: int
    mask_size: int
    init: Checkpoint | None = None

    @property
    def trained(self) -> dict[str, Any]:
        return {
            "network": self.network.model_dump(mode="json"),
            "init": model_id_of(self.init),
            "validation": self.source.validation,
        }

    def load(self) -> tuple[Samples, Samples]:
        # A picture in which no face was found has no masks to learn from.
        train, held_out = (samples.take(np.flatnonzero(samples.found)) for samples in self.source.load())
        if len(held_out) == 0:
            raise ConfigError("validation: a face was found in none of the samples that it holds out")
        return train, held_out

    def build(self) -> nn.Module:
        return started_from(MaskNet(self.network), self.init)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch.images)
        return mask_loss(logits, nn.functional.interpolate(batch.masks, logits.shape[-2:], mode="bilinear"))

    def validate(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch.images)
        return overlaps(logits, nn.functional.interpolate(batch.masks, logits.shape[-2:], mode="bilinear"))

    def metrics(self, results: Tensor, samples: Samples) -> dict[str, float]:
        iou = (results[..., 0].sum(0) / results[..., 1].sum(0).clamp_min(1)).tolist()
        return {
            "score": float(np.mean(iou)),
            **{f"iou_{group}": value for group, value in zip(GROUPS, iou, strict=True)},
        }


@dataclass(frozen=True)
class AttributeTask:
    """Face to 40 attributes."""

    source: Source
    network: NetworkSettings
    mask_checkpoint: Checkpoint | None
    pretrained: bool
    loss_kind: AttributeLoss
    positive_weight: tuple[float, ...] | None
    image_size: int
    mask_size: int
    trunk_weights: str | None = None
    trunk_sha256: str | None = None
    freeze: int = 0
    init: Checkpoint | None = None
    average_flip: bool = False
    label_smoothing: float = 0.0

    @property
    def trained(self) -> dict[str, Any]:
        return {
            "network": self.network.model_dump(mode="json"),
            "average_flip": self.average_flip,
            "mask_model": model_id_of(self.mask_checkpoint),
            "init": model_id_of(self.init),
            "validation": self.source.validation,
            "pretrained": self.pretrained,
            "trunk_weights": self.trunk_sha256,
            "freeze": self.freeze,
            "loss": self.loss_kind,
            "balance": self.positive_weight is not None,
            "label_smoothing": self.label_smoothing,
        }

    def load(self) -> tuple[Samples, Samples]:
        train, held_out = self.source.load()
        if not held_out.known.any():
            raise ConfigError(f"validation: none of the {len(held_out)} samples that it holds out has a label")
        return train, held_out

    def build(self) -> nn.Module:
        module = MGMTN(self.network)
        if self.trunk_weights is not None:
            load_trunk_weights(module.trunk.net, path=local_weights(self.trunk_weights))
        elif self.pretrained and not fills(module.trunk, self.init, prefix="trunk."):
            load_imagenet_weights(module.trunk.net, name=self.network.backbone)
        started_from(module, self.init)
        if module.mask_net is not None and self.mask_checkpoint is not None:
            module.mask_net.load_state_dict(self.mask_checkpoint.tensors())
            module.mask_net.requires_grad_(False)
        if self.freeze:
            module.trunk.freeze(self.freeze)
        return module

    def _masks(self, batch: Batch) -> Tensor | None:
        return batch.masks if self.network.masks == "landmarks" else None

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        logits = module(batch.images, self._masks(batch))
        weight = None if self.positive_weight is None else torch.tensor(self.positive_weight, device=logits.device)
        labels = batch.labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return attribute_loss(logits, labels, batch.known, kind=self.loss_kind, positive_weight_A=weight)

    def validate(self, module: nn.Module, batch: Batch) -> Tensor:
        masks = self._masks(batch)
        logits: Tensor = module(batch.images, masks)
        if not self.average_flip:
            return logits
        return (logits + module(batch.images.flip(3), None if masks is None else masks.flip(3))) / 2

    def metrics(self, results: Tensor, samples: Samples) -> dict[str, float]:
        labels, known = torch.from_numpy(samples.labels == 1), torch.from_numpy(samples.known)
        counts = known.sum(0)
        right = (((results > 0) == labels) & known).sum(0)
        named = counts > 0  # an attribute that nobody labelled has no accuracy
        loss = attribute_loss(results, labels.float(), known)
        return {"score": (right[named] / counts[named]).mean().item(), "validation_loss": loss.item()}


def model_id_of(checkpoint: Checkpoint | None) -> str | None:
    return None if checkpoint is None else checkpoint.card.model_id


def local_weights(uri: str) -> Path:
    """A trunk's weights on this machine.

    Raises:
        ConfigError: they cannot be had.
    """
    try:
        return local_copy(uri)
    except (ConfigError, FetchError) as error:
        raise ConfigError(f"trunk_weights: {error}") from error


def fills(module: nn.Module, init: Checkpoint | None, *, prefix: str) -> bool:
    """Whether a checkpoint has all tensors of a part of the network; the part's names begin with the prefix there."""
    part = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    return init is not None and len(_fitting(part, init)) == len(part)


def _fitting(state: Mapping[str, Tensor], init: Checkpoint) -> dict[str, Tensor]:
    return {name: value for name, value in init.tensors().items() if name in state and state[name].shape == value.shape}


def started_from(module: M, init: Checkpoint | None) -> M:
    """Fill a network with the tensors of a checkpoint that fit it, in place.

    Raises:
        ConfigError: none does.
    """
    if init is None:
        return module
    fitting = _fitting(module.state_dict(), init)
    if not fitting:
        raise ConfigError(f"init: no tensor of {init.card.name} fits this network")
    module.load_state_dict(fitting, strict=False)
    return module
