"""Measure a model on labelled faces: accuracy and calibration of each attribute, plots, and its worst errors.

  mgmtn evaluate --model M --data DATA --split test --output DIR

Every picture of the split counts: one in which no face was found by its centre, and one that could not be read at all
as if the model had said no to every attribute. Of a mask network (AML), alone or inside a model, the agreement of its
masks with those drawn from landmarks is measured.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from pydantic import Field, PositiveInt

from jobs.data.batches import plain_batches
from jobs.data.models import resolve_model
from jobs.data.object_store import canonical_uri, new_files
from jobs.data.training_table import Description, iterate_samples, unreadable_labels
from jobs.mask_agreement import mask_agreement
from jobs.outcomes import all_of
from jobs.settings import Place, Settings, run_program
from jobs.telemetry import progress_bar
from mgmtn.allocator import keep_freed_memory
from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES
from mgmtn.calibration import calibrate
from mgmtn.checkpoint import CARD_FILE, Checkpoint
from mgmtn.drawing import contact_sheet
from mgmtn.errors import CheckpointError, ConfigError
from mgmtn.labeller import Labeller
from mgmtn.metrics import CALIBRATION_BINS, Report, report
from mgmtn.network import NetworkSettings

log = logging.getLogger(__name__)

WORST: Final = 24  # errors on the contact sheet
_CHUNK: Final = 256  # faces in memory at once
GROUP_FIGURES: Final = ("accuracy", "balanced_accuracy", "f1", "average_precision", "ece", "majority")

# Mean accuracy over 40 attributes in percent, as published, on the whole official test sets: (CelebA, LFWA).
PUBLISHED: Final[dict[str, tuple[float | None, float | None]]] = {
    "MGMTN (paper)": (92.30, 87.01),
    "FaRL ViT-B": (92.06, None),
    "FaceXFormer": (91.83, None),
    "SSP+SSG": (91.80, 87.13),
    "DMM-CNN": (91.70, 86.56),
    "SwinFace": (91.32, None),
    "MCNN-AUX": (91.29, 86.31),
    "Slim-CNN": (91.24, None),
    "MOON": (90.94, None),
    "LNets+ANet": (87.33, 83.85),
    "Label2Label, ResNet-50": (None, 87.50),
    "Label2Label, ResNet-101": (None, 87.56),
    "always the majority class": (79.91, 71.75),
}


class EvaluateSettings(Settings):
    """Settings of `mgmtn evaluate`."""

    model: str = Field(description="a model that ships, or a checkpoint's folder, local or s3://")
    data: tuple[Place, ...] = Field(description="folders of training tables (mgmtn prepare), comma-separated")
    split: Literal["train", "validation", "test"] = Field("test", description="rows to measure on")
    output: Place = Field(description="folder for metrics.json, metrics.md and pictures, local or s3://")
    masks: Literal["learned", "landmarks"] = Field("learned", description="the model's own, or those of the table")
    limit: int = Field(0, ge=0, description="pictures measured, the first, readable ones before others; 0: all")
    batch_size: PositiveInt = Field(64, description="faces in one forward pass")
    device: str | None = Field(
        None, pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda, cuda:1; unset: a GPU when there is one"
    )
    record: bool = Field(False, description="write the figures into the model's card (a local folder); its id stays")


@dataclass(frozen=True)
class Answers:
    """What the model said of every picture, and the truth.

    Attributes:
        names: N image names.
        logits, labels, known: shape `(N, 40)`.
        found: bool, shape `(N,)`: a face was found.
    """

    names: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    found: np.ndarray


def run(settings: EvaluateSettings) -> dict[str, Any]:
    """Measure, write and draw.

    Raises:
        ConfigError: the table is missing, of another geometry, or has no row of the split; there is no such device;
            `record` without a local folder to record in.
        CheckpointError: there is no such model, or its answers are not finite.
    """
    checkpoint, *_ = all_of(
        lambda: resolve_model(settings.model), *(partial(Description.load, folder) for folder in settings.data)
    )
    _check_device(settings.device)
    if settings.record:
        _card_file(settings)
    if checkpoint.card.kind == "masks":
        return run_masks(settings, checkpoint)
    keep_freed_memory()
    labeller = Labeller(checkpoint, device=settings.device, batch_size=settings.batch_size)
    _check_geometry(settings, checkpoint)
    answers = ask(settings, labeller)
    unreadable = unreadable_labels(settings.data, split=settings.split)
    if settings.limit:
        unreadable = unreadable[: settings.limit - len(answers.names)]
    answers = _with_unreadable(answers, unreadable)
    probabilities = calibrate(answers.logits, checkpoint.card.calibration)
    raw = calibrate(answers.logits, {})
    figures = report(probabilities, answers.labels == 1, answers.known, thresholds=labeller.thresholds)
    uncalibrated = report(raw, answers.labels == 1, answers.known, thresholds=labeller.thresholds)
    faces = report(
        probabilities[answers.found],
        (answers.labels == 1)[answers.found],
        answers.known[answers.found],
        thresholds=labeller.thresholds,
    )
    summary = {
        "model_id": checkpoint.card.model_id,
        "split": settings.split,
        "images": len(answers.names),
        "mean_accuracy": _percent(figures.mean("accuracy")),
        "mean_balanced_accuracy": _percent(figures.mean("balanced_accuracy")),
        "mean_f1": _percent(figures.mean("f1")),
        "mean_ap": _percent(figures.mean("average_precision")),
        "ece": _rounded(figures.mean("ece")),
        "ece_uncalibrated": _rounded(uncalibrated.mean("ece")),
        "mean_majority": _percent(figures.mean("majority")),
        "mean_accuracy_faces": _percent(faces.mean("accuracy")),
        "no_face": int((~answers.found).sum()) - len(unreadable),
        "unreadable": len(unreadable),
    }
    if labeller.network.mask_net is not None:
        summary["mask_iou"] = mask_agreement(
            labeller.network.mask_net, settings.data, split=settings.split, limit=settings.limit
        )
    summary["output"] = settings.output
    command = _command(settings)
    everything = summary | {
        "command": command,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "groups": {figure: figures.group_means(figure) for figure in GROUP_FIGURES},
        "attributes": {
            name: row | {"ece_uncalibrated": uncalibrated.attributes[name].ece}
            for name, row in figures.as_dict().items()
        },
    }
    with new_files(canonical_uri(settings.output)) as folder:
        (folder / "metrics.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        (folder / "metrics.md").write_text(as_markdown(figures, uncalibrated, summary, command), encoding="utf-8")
        draw_reliability(folder / "reliability.png", answers, calibrated=probabilities, raw=raw)
        draw_accuracy(folder / "accuracy.png", figures)
        draw_worst(folder / "worst.png", settings, answers, probabilities - labeller.thresholds, probabilities)
    if settings.record:
        record(settings, checkpoint, summary | {"command": command})
    return summary


def run_masks(settings: EvaluateSettings, checkpoint: Checkpoint) -> dict[str, Any]:
    """Measure a mask network; the summary holds the intersection over union of each group.

    Raises:
        ConfigError: the table is missing or has no face of the split.
    """
    mask_net = checkpoint.mask_net().to(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    agreement = mask_agreement(
        mask_net, settings.data, split=settings.split, limit=settings.limit, batch_size=settings.batch_size
    )
    summary = {"model_id": checkpoint.card.model_id, "split": settings.split, "mask_iou": agreement}
    everything = summary | {"command": _command(settings), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    with new_files(canonical_uri(settings.output)) as folder:
        (folder / "metrics.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if settings.record:
        record(settings, checkpoint, summary | {"command": _command(settings)})
    return summary | {"output": settings.output}


def ask(settings: EvaluateSettings, labeller: Labeller) -> Answers:
    """Run the model over every readable picture of the split.

    Raises:
        CheckpointError: an answer is not finite. No figure would show it: every comparison with it says no.
    """
    geometry = Description.load(settings.data[0])
    total = sum(Description.load(folder).splits.get(settings.split, 0) for folder in settings.data)
    total = min(total, settings.limit) if settings.limit else total
    parts: list[Answers] = []
    with progress_bar("evaluate", total=total, unit="images") as progress:
        for samples in iterate_samples(settings.data, split=settings.split, count=_CHUNK):
            if settings.limit:
                samples = samples.take(np.arange(min(len(samples), settings.limit - progress.done)))
            (batch,) = plain_batches(
                samples, image_size=geometry.image_size, mask_size=geometry.mask_size, batch_size=len(samples)
            )
            faces = batch.images.to(torch.uint8).permute(0, 2, 3, 1).numpy()
            masks = batch.masks.numpy() > 0.5 if settings.masks == "landmarks" else None
            logits = labeller.logits(faces, masks)
            if not np.isfinite(logits).all():
                name = samples.names[~np.isfinite(logits).all(axis=1)][0]
                raise CheckpointError(f"model: {settings.model!r} gives answers that are not finite for {name}")
            parts.append(Answers(samples.names, logits, samples.labels, samples.known, samples.found))
            progress.advance(len(samples))
            if progress.done == settings.limit:
                break
    if not parts:
        folders = ", ".join(settings.data)
        raise ConfigError(f"split: no readable picture of split {settings.split!r} in {folders}")
    fields = ("names", "logits", "labels", "known", "found")
    return Answers(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _check_device(device: str | None) -> None:
    if device is None or device == "cpu":
        return
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device: {device!r}, but this machine has {count} GPUs that torch can use")


def _check_geometry(settings: EvaluateSettings, checkpoint: Checkpoint) -> None:
    network = checkpoint.card.network
    assert isinstance(network, NetworkSettings)  # the labeller has refused any other
    for folder in settings.data:
        size = Description.load(folder).image_size
        if size != network.image_size:
            raise ConfigError(
                f"data: {folder!r} was prepared for {size} pixels, {settings.model!r} looks at "
                f"{network.image_size}: prepare it again with --image-size {network.image_size}"
            )


def _with_unreadable(answers: Answers, labels: np.ndarray) -> Answers:
    """Add the pictures that nobody could read, with a firm no to every attribute."""
    if len(labels) == 0:
        return answers
    no = np.full(labels.shape, -1e4, np.float32)
    return Answers(
        names=np.concatenate([answers.names, np.full(len(labels), "(unreadable)")]),
        logits=np.concatenate([answers.logits, no]),
        labels=np.concatenate([answers.labels, labels]),
        known=np.concatenate([answers.known, labels >= 0]),
        found=np.concatenate([answers.found, np.zeros(len(labels), bool)]),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _command(settings: EvaluateSettings) -> str:
    words = ["mgmtn", "evaluate", "--model", settings.model, "--data", ",".join(settings.data)]
    words += ["--split", settings.split]
    words += ["--masks", "landmarks"] if settings.masks == "landmarks" else []
    words += ["--limit", str(settings.limit)] if settings.limit else []
    return shlex.join([*words, "--output", settings.output])


def _card_file(settings: EvaluateSettings) -> Path:
    """The card to record in.

    Raises:
        ConfigError: the model is not a local folder.
    """
    card = Path(settings.model) / CARD_FILE
    if not card.is_file():
        raise ConfigError(f"record: {settings.model!r} is not a local folder with a {CARD_FILE}")
    return card


def record(settings: EvaluateSettings, checkpoint: Checkpoint, figures: dict[str, Any]) -> None:
    """Write the figures into the card of a model's local folder; its weights are not touched."""
    path = _card_file(settings)
    name = "+".join(Path(folder).name for folder in settings.data) + f"/{settings.split}"
    measured = {key: value for key, value in figures.items() if key not in ("model_id", "output")}
    accuracy = checkpoint.card.accuracy | {name: measured | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}}
    card = checkpoint.card.model_copy(update={"accuracy": accuracy})
    assert card.model_id == checkpoint.card.model_id
    new = path.with_suffix(".new")
    new.write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)  # in one step: a model without its card would be lost
    log.info("event=recorded card=%s figures=%s", path, name)


def as_markdown(figures: Report, uncalibrated: Report, summary: dict[str, Any], command: str) -> str:
    """The figures, and the calibration error without calibration, as tables for a person to read."""
    owner = {name: group for group, names in GROUP_ATTRIBUTES.items() for name in names}
    lines = [f"# {summary['model_id']} on {summary['images']} pictures ({summary['split']})", "", f"`{command}`", ""]
    lines += ["| figure | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in summary.items() if key not in ("model_id", "split", "output")]
    lines += ["", "| group | mean accuracy, % |", "|---|---|"]
    lines += [f"| {group} | {_percent(value)} |" for group, value in figures.group_means("accuracy").items()]
    lines += ["", "Each attribute, all figures in %:", ""]
    lines += ["| attribute | group | accuracy | balanced | F1 | AP | ECE | ECE uncalibrated | majority |"]
    lines += ["|---" * 9 + "|"]
    for name, row in figures.attributes.items():
        errors = (row.ece, uncalibrated.attributes[name].ece)
        shares = (row.accuracy, row.balanced_accuracy, row.f1, row.average_precision, *errors, row.majority)
        lines.append(f"| {name} | {owner[name]} | " + " | ".join(str(_percent(share)) for share in shares) + " |")
    lines += [
        "",
        "Mean accuracy, %: as published, on the whole official test sets, and of this model on these pictures:",
        "",
    ]
    lines += ["| method | CelebA | LFWA | here |", "|---|---|---|---|"]
    lines += [f"| {method} | {celeba or '-'} | {lfwa or '-'} | |" for method, (celeba, lfwa) in PUBLISHED.items()]
    lines += [f"| **{summary['model_id']}** | | | **{summary['mean_accuracy']}** |"]
    return "\n".join(lines) + "\n"


def draw_reliability(path: Path, answers: Answers, *, calibrated: np.ndarray, raw: np.ndarray) -> None:
    """How often what the model gives a probability is so, over all attributes, before and after calibration."""
    figure, axes = plt.subplots(figsize=(5, 5))
    truth = (answers.labels == 1)[answers.known]
    for name, probabilities in (("before calibration", raw), ("after", calibrated)):
        values = probabilities[answers.known]
        bins = np.minimum((values * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        used = [index for index in range(CALIBRATION_BINS) if (bins == index).any()]
        said = [values[bins == index].mean() for index in used]
        axes.plot(said, [truth[bins == index].mean() for index in used], marker="o", label=name)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set(xlabel="probability given", ylabel="share that is so", title="Reliability, all attributes")
    axes.legend()
    _save(figure, path)


def draw_accuracy(path: Path, figures: Report) -> None:
    """Each attribute's accuracy beside that of always answering with the commoner label."""
    figure, axes = plt.subplots(figsize=(7, 9))
    rows = np.arange(len(ATTRIBUTES))
    accuracy = [100 * (figures.attributes[name].accuracy or 0) for name in ATTRIBUTES]
    majority = [100 * (figures.attributes[name].majority or 0) for name in ATTRIBUTES]
    axes.barh(rows, accuracy, color="tab:blue", label="model")
    axes.scatter(majority, rows, color="black", marker="|", s=80, label="majority class", zorder=3)
    axes.set_yticks(rows, ATTRIBUTES, fontsize=7)
    axes.set_ylim(len(ATTRIBUTES) - 0.4, -0.6)
    axes.set(xlim=(0, 100), xlabel="accuracy, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)  # above: no corner is free of bars
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_worst(
    path: Path, settings: EvaluateSettings, answers: Answers, excess: np.ndarray, probabilities: np.ndarray
) -> None:
    """The pictures whose labels the model contradicts most firmly, the firmest first, each with its worst label.

    Args:
        path: where to draw them; nothing is drawn where no label is wrong.
        settings: where the pictures are.
        answers: the readable pictures first, in the order of the files.
        excess: probabilities less thresholds, shape `(N, 40)`.
        probabilities: shape `(N, 40)`.
    """
    wrong = ((excess >= 0) != (answers.labels == 1)) & answers.known & answers.found[:, None]
    firmness = np.where(wrong, np.abs(excess), -1.0)
    order = np.argsort(-firmness.max(axis=1), kind="stable")[:WORST]
    chosen = [int(index) for index in order if firmness[index].max() >= 0]
    faces = _faces_at(settings, chosen)
    captions = []
    for index in chosen:
        k = int(firmness[index].argmax())
        label = "yes" if answers.labels[index, k] == 1 else "no"
        name = Path(str(answers.names[index])).name
        captions.append(f"{name}\n{ATTRIBUTES[k]}\n{probabilities[index, k]:.3f}, label {label}")
    if chosen:
        contact_sheet([faces[index] for index in chosen], captions).save(path)


def _faces_at(settings: EvaluateSettings, places: Sequence[int]) -> dict[int, np.ndarray]:
    """The faces at some places of the split: by place, since two tables may name a picture alike."""
    wanted, start = set(places), 0
    faces: dict[int, np.ndarray] = {}
    for samples in iterate_samples(settings.data, split=settings.split, count=_CHUNK):
        here = wanted.intersection(range(start, start + len(samples)))
        faces |= {place: samples.faces[place - start] for place in here}
        start += len(samples)
        if len(faces) == len(wanted):
            break
    return faces


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(EvaluateSettings, run, argv, prog="mgmtn evaluate", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
