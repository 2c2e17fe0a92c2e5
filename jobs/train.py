"""Train the mask network (AML) or the attribute network (MGMTN) with Ray Train.

    mgmtn train masks --data DATA --output DIR
    mgmtn train attributes --data DATA --mask-model DIR/checkpoint --output DIR

The same command again goes on where a stopped run left off, or, after a finished one, only writes its checkpoint again.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from jobs.data.datasets import UNKNOWN
from jobs.data.models import resolve_model
from jobs.data.object_store import canonical_uri, file_sha256, join, new_files
from jobs.data.training_table import Description
from jobs.settings import Place, flags_of, run_program
from jobs.train_state import Best, Progress
from jobs.train_tasks import AttributeTask, MaskTask, Source, local_weights
from jobs.training import TrainSettings, stopped_early, train
from jobs.training_log import TIME_PARTS
from mgmtn.attributes import ATTRIBUTES
from mgmtn.calibration import fit_calibration
from mgmtn.checkpoint import CARD_FILE, Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.losses import AttributeLoss, positive_weights
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, Fusion, Head, NetworkSettings

log = logging.getLogger(__name__)

USAGE = "usage: mgmtn train masks|attributes --data DATA --output DIR [settings]; --help after the word lists them"


class TrainMasksSettings(TrainSettings):
    """Settings of `mgmtn train masks`."""

    name: str = Field("aml", description="first part of the model's id")
    network: MaskNetSettings = Field(default_factory=MaskNetSettings)


class NewNetworkSettings(NetworkSettings):
    """MGMTN's architecture for a new training: defaults that may follow what is measured.

    Those of `NetworkSettings` are part of what every card says without saying it, and never change.
    """

    head: Head = Field("both", description=NetworkSettings.model_fields["head"].description)
    fusion: Fusion = Field("gate", description=NetworkSettings.model_fields["fusion"].description)


class TrainAttributesSettings(TrainSettings):
    """Settings of `mgmtn train attributes`."""

    name: str = Field("mgmtn", description="first part of the model's id")
    network: NewNetworkSettings = Field(default_factory=NewNetworkSettings)
    mask_model: Place | None = Field(None, description="AML's checkpoint, for learned masks")
    pretrained: bool = Field(True, description="start the trunk from ImageNet weights")
    trunk_weights: Place | None = Field(
        None, description="a state dict (.pt, .safetensors) that the trunk starts from, in place of ImageNet's"
    )
    freeze: int = Field(0, ge=0, description="the trunk keeps its weights up to features of stride 2^freeze; 0: none")
    average_flip: bool = Field(True, description="the model answers with the mean of a face and its mirror image")
    loss: AttributeLoss = Field("bce", description="binary cross-entropy or focal loss")
    balance: bool = Field(False, description="weigh positives by the root of negatives per positive (with bce)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label that is made one half")


def run_masks(settings: TrainMasksSettings) -> dict[str, Any]:
    """Train AML; the summary holds the intersection over union of each group on the validation cut."""
    geometry = Description.load(settings.data[0])
    task = MaskTask(_source(settings), settings.network, geometry.image_size, geometry.mask_size, init=_init(settings))
    command = _command(settings, "masks")
    progress, best = train(settings, task)
    module = MaskNet(settings.network)
    module.load_state_dict(best.weights)
    account = _account(settings, progress, best, command=command, init=task.init)
    card = Card(name=settings.name, kind="masks", network=settings.network, **account)
    return _finish(settings, Checkpoint.of(module, card, half=settings.half_weights), progress, best)


def run_attributes(settings: TrainAttributesSettings) -> dict[str, Any]:
    """Train MGMTN and calibrate it on the validation cut.

    Raises:
        ConfigError: learned masks without the checkpoint of a mask network, or a table of another geometry.
    """
    geometry = Description.load(settings.data[0])
    if geometry.image_size != settings.network.image_size:
        size = settings.network.image_size
        raise ConfigError(f"network.image_size: {size}, but {settings.data[0]} was prepared for {geometry.image_size}")
    mask_checkpoint, network = None, NetworkSettings(**settings.network.model_dump())
    if network.masks == "learned" and network.head != "plain":
        if settings.mask_model is None:
            raise ConfigError("mask_model: learned masks need AML's checkpoint (mgmtn train masks makes one)")
        mask_checkpoint = resolve_model(settings.mask_model, field="mask_model")
        network = network.model_copy(update={"mask_net": mask_checkpoint.mask_net().settings})
    source = _source(settings)
    trunk_weights = canonical_uri(settings.trunk_weights) if settings.trunk_weights else None
    task = AttributeTask(
        source=source,
        network=network,
        mask_checkpoint=mask_checkpoint,
        pretrained=settings.pretrained,
        trunk_weights=trunk_weights,
        trunk_sha256=file_sha256(local_weights(trunk_weights)) if trunk_weights else None,
        freeze=settings.freeze,
        init=_init(settings),
        average_flip=settings.average_flip,
        label_smoothing=settings.label_smoothing,
        loss_kind=settings.loss,
        positive_weight=_positive_weight(source) if settings.balance else None,
        image_size=geometry.image_size,
        mask_size=geometry.mask_size,
    )
    command = _command(settings, "attributes")
    progress, best = train(settings, task)
    module = MGMTN(network)
    module.load_state_dict(best.weights)
    _, labels = source.load_labels()
    if len(labels) != len(best.results):
        raise ConfigError(f"data: {len(best.results)} samples were held out, {len(labels)} are there now")
    calibration = fit_calibration(best.results.numpy(), (labels == 1).astype(np.float64), labels != UNKNOWN)
    account = _account(settings, progress, best, command=command, init=task.init)
    if mask_checkpoint is not None:
        account["training"]["mask_model"] = _origin(mask_checkpoint)
    if trunk_weights is not None:
        account["training"]["trunk_weights"] = {"file": Path(trunk_weights).name, "sha256": task.trunk_sha256}
        account["training"]["settings"]["pretrained"] = False  # not on ImageNet
    card = Card(
        name=settings.name,
        kind="attributes",
        network=network,
        thresholds=dict.fromkeys(ATTRIBUTES, 0.5),
        calibration=calibration,
        average_flip=settings.average_flip,
        **account,
    )
    return _finish(settings, Checkpoint.of(module, card, half=settings.half_weights), progress, best)


def _source(settings: TrainSettings) -> Source:
    return Source(tuple(map(canonical_uri, settings.data)), settings.validation, settings.limit)


def _init(settings: TrainSettings) -> Checkpoint | None:
    return None if settings.init is None else resolve_model(settings.init, field="init")


def _positive_weight(source: Source) -> tuple[float, ...]:
    labels, _ = source.load_labels()
    return tuple(positive_weights(torch.from_numpy(labels == 1), torch.from_numpy(labels != UNKNOWN)).tolist())


def _command(settings: TrainSettings, what: str) -> str:
    """The command of a run, told in its beginning: who knows what becomes of the file of `--config` until its end."""
    return shlex.join(["mgmtn", "train", what, *flags_of(settings)])


def _account(
    settings: TrainSettings, progress: Progress, best: Best, *, command: str, init: Checkpoint | None
) -> dict[str, Any]:
    """The parts of a card that say where a model comes from; folders by their names, for a card travels."""
    tables = [Description.load(folder) for folder in settings.data]
    settled = settings.model_dump(
        mode="json", exclude={"data", "output", "cluster", "network", "mask_model", "init", "trunk_weights"}
    )
    training = {
        "command": command,
        "data": [table.model_copy(update={"dataset": Path(table.dataset).name}).model_dump() for table in tables],
        "settings": settled,
        "licence": "learned from research data sets that are for non-commercial research only; see the README",
    }
    if init is not None:
        training["init"] = _origin(init)
    return {"training": training, "accuracy": {"validation": _figures(progress, best)}}


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a card says of another model that its own was made from."""
    card = checkpoint.card
    return {"model_id": card.model_id, "training": card.training, "accuracy": card.accuracy}


def _figures(progress: Progress, best: Best) -> dict[str, float]:
    """What was measured in the best epoch, less what is about the machine."""
    return {
        name: value
        for name, value in progress.epochs[best.epoch].items()
        if not name.endswith(("_seconds", "_per_second")) and name not in ("time", "workers")
    }


def _finish(settings: TrainSettings, checkpoint: Checkpoint, progress: Progress, best: Best) -> dict[str, Any]:
    folder = join(canonical_uri(settings.output), "checkpoint")
    with new_files(folder, last=CARD_FILE) as temporary:
        checkpoint.save(temporary)
    log.info("event=saved model_id=%s folder=%s", checkpoint.card.model_id, folder)
    return {
        "model_id": checkpoint.card.model_id,
        "checkpoint": folder,
        **_figures(progress, best),
        "epochs": progress.epoch,
        "stopped_early": stopped_early(settings, progress),
        "images_per_second": float(np.median([row["images_per_second"] for row in progress.epochs])),
        "seconds": sum(row[f"{part}_seconds"] for row in progress.epochs for part in TIME_PARTS),
    }


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
