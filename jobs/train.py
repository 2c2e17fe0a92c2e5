"""Train the mask network (AML) or the attribute network (MGMTN) with Ray Train.

    mgmtn train masks --data DATA --output DIR
    mgmtn train attributes --data DATA --mask-model DIR/checkpoint --output DIR

The same command again goes on where a stopped run left off, or, after a finished one, only writes its checkpoint again.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from jobs.cluster import ClusterSettings, joined, totals
from jobs.data.batches import AugmentSettings, Batch
from jobs.data.training_table import Description, Samples, load_samples
from jobs.settings import Settings, run_program
from jobs.train_loop import (
    PREDICTIONS_FILE,
    PROGRESS_FILE,
    WEIGHTS_FILE,
    LoopConfig,
    OptimisationSettings,
    Task,
    train_worker,
)
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.calibration import fit_calibration
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.losses import AttributeLoss, attribute_loss, mask_loss, positive_weights
from mgmtn.mask_net import MaskNet, MaskNetSettings, overlaps
from mgmtn.network import MGMTN, NetworkSettings
from mgmtn.pretrained import load_imagenet_weights, load_trunk_weights

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

USAGE = "usage: mgmtn train masks|attributes --data DATA --output DIR [settings]; --help after the word lists them"


class TrainSettings(Settings):
    """What both trainings share."""

    data: tuple[Path, ...] = Field(description="folders of training tables (mgmtn prepare), comma-separated")
    output: Path = Field(description="folder of the run: its state, log.csv and, in the end, checkpoint/")
    name: str = Field(description="first part of the model's id")
    validation: float = Field(0.08, gt=0, lt=1, description="share of the train split that is held out to tune on")
    limit: int = Field(0, ge=0, description="samples taken, the first; 0: all")
    workers: PositiveInt = Field(2, description="training processes")
    gpu: bool = Field(False, description="a GPU for each worker, NCCL between them; otherwise CPUs and gloo")
    threads: PositiveInt = Field(1, description="CPUs of each worker")
    max_failures: int = Field(3, ge=0, description="times that the run goes on by itself after a worker died")
    init: Path | None = Field(
        None, description="a checkpoint of the same kind to start from: its tensors that fit by name and shape"
    )
    half_weights: bool = Field(True, description="store matrices in 16 bits: half the size, the same accuracy")
    optimisation: OptimisationSettings = Field(default_factory=OptimisationSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


class TrainMasksSettings(TrainSettings):
    """Settings of `mgmtn train masks`."""

    name: str = Field("aml", description="first part of the model's id")
    network: MaskNetSettings = Field(default_factory=MaskNetSettings)


class TrainAttributesSettings(TrainSettings):
    """Settings of `mgmtn train attributes`."""

    name: str = Field("mgmtn", description="first part of the model's id")
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    mask_model: Path | None = Field(None, description="AML's checkpoint, for learned masks")
    pretrained: bool = Field(True, description="start the trunk from ImageNet weights")
    trunk_weights: Path | None = Field(
        None, description="a state dict (.pt, .safetensors) that the trunk starts from, in place of ImageNet's"
    )
    freeze: int = Field(0, ge=0, description="the trunk keeps its weights up to features of stride 2^freeze; 0: none")
    average_flip: bool = Field(True, description="the model answers with the mean of a face and its mirror image")
    loss: AttributeLoss = Field("bce", description="binary cross-entropy or focal loss")
    balance: bool = Field(False, description="weigh positives by the root of negatives per positive (with bce)")


@dataclass(frozen=True)
class Source:
    """Where a task's samples are, and how they are cut."""

    data: tuple[Path, ...]
    validation: float
    limit: int

    def load(self) -> tuple[Samples, Samples]:
        """Training samples and those held out of the train split.

        Raises:
            ConfigError: none are held out, or all.
        """
        samples = load_samples(self.data, split="train", limit=self.limit)
        held_out = validation_cut(samples.names, self.validation)
        if held_out.all() or not held_out.any():
            raise ConfigError(
                f"validation: {self.validation:g} of {len(samples)} samples holds out {held_out.sum()}; "
                "both sides need some"
            )
        return samples.take(np.flatnonzero(~held_out)), samples.take(np.flatnonzero(held_out))


def validation_cut(names: np.ndarray, share: float) -> np.ndarray:
    """Choose the samples to hold out: bool, shape `(N,)`; the same for the same names.

    Where images lie in a folder per person, whole folders are chosen, so that nobody is on both sides.
    """
    folders = np.array([str(Path(name).parent) for name in names])
    keys = folders if len(np.unique(folders)) > 20 else names
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

    def load(self) -> tuple[Samples, Samples]:
        # A picture in which no face was found has no masks to learn from.
        train, held_out = self.source.load()
        return train.take(np.flatnonzero(train.found)), held_out.take(np.flatnonzero(held_out.found))

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
    trunk_weights: Path | None = None
    freeze: int = 0
    init: Checkpoint | None = None
    average_flip: bool = False

    def load(self) -> tuple[Samples, Samples]:
        return self.source.load()

    def build(self) -> nn.Module:
        module = MGMTN(self.network)
        if self.trunk_weights is not None:
            load_trunk_weights(module.trunk.net, path=self.trunk_weights)
        elif self.pretrained:
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
        return attribute_loss(logits, batch.labels, batch.known, kind=self.loss_kind, positive_weight_A=weight)

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


def started_from(module: M, init: Checkpoint | None) -> M:
    """Fill a network with the tensors of a checkpoint that fit it, in place.

    Raises:
        ConfigError: none does.
    """
    if init is None:
        return module
    state = module.state_dict()
    fitting = {
        name: value for name, value in init.tensors().items() if name in state and state[name].shape == value.shape
    }
    if not fitting:
        raise ConfigError(f"init: no tensor of {init.card.name} fits this network")
    module.load_state_dict(fitting, strict=False)
    return module


def run_masks(settings: TrainMasksSettings) -> dict[str, Any]:
    """Train AML; the summary holds the intersection over union of each group on the validation cut."""
    geometry = Description.load(settings.data[0])
    task = MaskTask(_source(settings), settings.network, geometry.image_size, geometry.mask_size, init=_init(settings))
    weights, _, metrics = train(settings, task)
    module = MaskNet(settings.network)
    module.load_state_dict(weights)
    card = Card(
        name=settings.name, kind="masks", network=settings.network, **_account(settings, metrics, command="masks")
    )
    return _finish(settings, Checkpoint.of(module, card, half=settings.half_weights), metrics)


def run_attributes(settings: TrainAttributesSettings) -> dict[str, Any]:
    """Train MGMTN and calibrate it on the validation cut.

    Raises:
        ConfigError: learned masks without the checkpoint of a mask network, or a table of another geometry.
    """
    geometry = Description.load(settings.data[0])
    if geometry.image_size != settings.network.image_size:
        size = settings.network.image_size
        raise ConfigError(f"network.image_size: {size}, but {settings.data[0]} was prepared for {geometry.image_size}")
    mask_checkpoint, network = None, settings.network
    if network.masks == "learned" and network.head == "groups":
        if settings.mask_model is None:
            raise ConfigError("mask_model: learned masks need AML's checkpoint (mgmtn train masks makes one)")
        mask_checkpoint = Checkpoint.load(settings.mask_model)
        network = network.model_copy(update={"mask_net": mask_checkpoint.mask_net().settings})
    source = _source(settings)
    task = AttributeTask(
        source=source,
        network=network,
        mask_checkpoint=mask_checkpoint,
        pretrained=settings.pretrained,
        trunk_weights=settings.trunk_weights.resolve() if settings.trunk_weights else None,
        freeze=settings.freeze,
        init=_init(settings),
        average_flip=settings.average_flip,
        loss_kind=settings.loss,
        positive_weight=_positive_weight(source) if settings.balance else None,
        image_size=geometry.image_size,
        mask_size=geometry.mask_size,
    )
    weights, logits, metrics = train(settings, task)
    module = MGMTN(network)
    module.load_state_dict(weights)
    _, held_out = source.load()
    calibration = fit_calibration(logits.numpy(), (held_out.labels == 1).astype(np.float64), held_out.known)
    account = _account(settings, metrics, command="attributes")
    if mask_checkpoint is not None:
        masks = mask_checkpoint.card
        account["training"]["mask_model"] = {
            "model_id": masks.model_id,
            "training": masks.training,
            "accuracy": masks.accuracy,
        }
    card = Card(
        name=settings.name,
        kind="attributes",
        network=network,
        thresholds=dict.fromkeys(ATTRIBUTES, 0.5),
        calibration=calibration,
        average_flip=settings.average_flip,
        **account,
    )
    return _finish(settings, Checkpoint.of(module, card, half=settings.half_weights), metrics)


def train(settings: TrainSettings, task: Task) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Run the workers.

    Returns:
        The averaged weights, the last validation results, the last epoch's metrics.

    Raises:
        ConfigError: the workers do not fit the cluster.
    """
    output = settings.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    config = LoopConfig(task, settings.optimisation, settings.augment, settings.threads, log_folder=str(output))
    with joined(settings.cluster, dashboard=True):
        _check_fit(settings)
        trainer = ray.train.torch.TorchTrainer(
            train_worker,
            train_loop_config={"loop": config},
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.gpu,
                resources_per_worker={"CPU": settings.threads} | ({"GPU": 1} if settings.gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="state",
                storage_path=str(output),
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )
        result = trainer.fit()
    assert result.checkpoint is not None  # the loop reports one after each epoch
    with result.checkpoint.as_directory() as folder:
        weights = safetensors.torch.load_file(Path(folder) / WEIGHTS_FILE)
        results = safetensors.torch.load_file(Path(folder) / PREDICTIONS_FILE)["results"]
        metrics = dict(json.loads((Path(folder) / PROGRESS_FILE).read_text()))
    return weights, results, metrics


def _check_fit(settings: TrainSettings) -> None:
    have = totals()
    if settings.workers * settings.threads > have["CPU"]:
        wanted = f"{settings.workers} x {settings.threads}"
        raise ConfigError(f"workers, threads: {wanted} CPUs are more than the cluster's {have['CPU']:g}")
    if settings.gpu and settings.workers > have["GPU"]:
        raise ConfigError(f"workers: {settings.workers} need a GPU each, the cluster has {have['GPU']:g}")


def _source(settings: TrainSettings) -> Source:
    return Source(tuple(path.resolve() for path in settings.data), settings.validation, settings.limit)


def _init(settings: TrainSettings) -> Checkpoint | None:
    return None if settings.init is None else Checkpoint.load(settings.init)


def _positive_weight(source: Source) -> tuple[float, ...]:
    train_samples, _ = source.load()
    labels, known = torch.from_numpy(train_samples.labels == 1), torch.from_numpy(train_samples.known)
    return tuple(positive_weights(labels, known).tolist())


def _account(settings: TrainSettings, metrics: dict[str, Any], *, command: str) -> dict[str, Any]:
    """The parts of a card that say where a model comes from; folders by their names, for a card travels."""
    tables = [Description.load(folder) for folder in settings.data]
    settled = settings.model_dump(
        mode="json", exclude={"data", "output", "cluster", "network", "mask_model", "init", "trunk_weights"}
    )
    training = {
        "command": f"mgmtn train {command}" + (f" --config {settings.config}" if settings.config else ""),
        "data": [table.model_copy(update={"dataset": Path(table.dataset).name}).model_dump() for table in tables],
        "settings": settled,
        "licence": "learned from research data sets that are for non-commercial research only; see the README",
    }
    return {"training": training, "accuracy": {"validation": metrics}}


def _finish(settings: TrainSettings, checkpoint: Checkpoint, metrics: dict[str, Any]) -> dict[str, Any]:
    folder = checkpoint.save(settings.output / "checkpoint")
    log.info("event=saved model_id=%s folder=%s", checkpoint.card.model_id, folder)
    return {"model_id": checkpoint.card.model_id, "checkpoint": str(folder), **metrics}


def main(argv: Sequence[str] | None = None) -> int:
    what, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    description = __doc__ or ""
    if what == "masks":
        return run_program(TrainMasksSettings, run_masks, rest, prog="mgmtn train masks", description=description)
    if what == "attributes":
        prog = "mgmtn train attributes"
        return run_program(TrainAttributesSettings, run_attributes, rest, prog=prog, description=description)
    asked = what in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
