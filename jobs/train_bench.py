"""Measure how training scales: `python -m jobs.train_bench`.

The same faces, network and global batch on 1 worker and on 2 (`--workers`), one after the other on one cluster, by the
loop that `mgmtn train` runs. The first epoch warms up, the second one counts. Efficiency is the speed of n workers over
n times that of the first row's worker: 1.00 would be all of it. Nothing else should run on the machine, and the
workers' threads together must not be more than its cores.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from jobs.cluster import ClusterSettings, joined
from jobs.data.made_faces import write_made_table
from jobs.data.scratch import scratch_folder
from jobs.optimisation import OptimisationSettings
from jobs.settings import Settings, run_program
from jobs.train_state import Progress
from jobs.train_tasks import AttributeTask, Source
from jobs.training import TrainSettings, train
from mgmtn.masks import MASK_SIZE
from mgmtn.network import NetworkSettings

log = logging.getLogger(__name__)

_PARTS: Final = ("data", "forward", "backward", "optimiser")
_VALIDATION: Final = 0.05
# Of a step. All but the last keep their gradients to themselves: the difference is what the all-reduce adds.
_ACCUMULATE: Final = 2


class TrainBenchSettings(Settings):
    """What is measured."""

    workers: tuple[int, ...] = Field((1, 2), description="numbers of workers, each measured; the first is compared to")
    steps: PositiveInt = Field(20, description="steps measured, and as many before to warm up")
    batch_size: PositiveInt = Field(64, description="faces of a step over all workers")
    threads: PositiveInt = Field(1, description="CPUs of each worker")
    gpu: bool = Field(False, description="a GPU for each worker")
    backbone: str = Field("efficientnet_lite0", description="trunk's name in timm")
    image_size: PositiveInt = Field(128, description="side of the model's square, pixels")
    freeze_norm: bool = Field(
        False, description="batch norms keep their statistics: the losses of 1 and 2 workers then agree"
    )
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @field_validator("workers")
    @classmethod
    def _some(cls, workers: tuple[int, ...]) -> tuple[int, ...]:
        if not workers or min(workers) < 1:
            raise ValueError(f"{workers} are no numbers of workers")
        return workers


def run(settings: TrainBenchSettings) -> dict[str, Any]:
    """Measure, print a table, and return it."""
    runs: list[Progress] = []
    with scratch_folder("bench") as folder, joined(settings.cluster, dashboard=True):
        count = round(settings.steps * settings.batch_size / (1 - _VALIDATION) * 1.02) + settings.batch_size // 2
        data = write_made_table(folder / "data", count=count, image_size=settings.image_size, margin=8)
        for workers in settings.workers:
            runs.append(_trained(settings, str(data), output=f"{folder}/{workers}", workers=workers))
            log.info("event=measured workers=%d images_per_second=%.1f", workers, _last(runs[-1])["images_per_second"])
    rows = table(runs)
    print(markdown(rows), flush=True)
    return {"rows": rows, "batch_size": settings.batch_size, "freeze_norm": settings.freeze_norm}


def _trained(settings: TrainBenchSettings, data: str, *, output: str, workers: int) -> Progress:
    network = NetworkSettings(
        backbone=settings.backbone, image_size=settings.image_size, masks="landmarks", dropout=0.0
    )
    training = TrainSettings(
        name="bench",
        data=(data,),
        output=output,
        workers=workers,
        threads=settings.threads,
        gpu=settings.gpu,
        validation=_VALIDATION,
        log_steps=1,
        optimisation=OptimisationSettings(
            epochs=2, batch_size=settings.batch_size, accumulate=_ACCUMULATE, freeze_norm=settings.freeze_norm
        ),
    )
    task = AttributeTask(
        source=Source((data,), _VALIDATION, 0),
        network=network,
        mask_checkpoint=None,
        pretrained=False,
        loss_kind="bce",
        positive_weight=None,
        image_size=settings.image_size,
        mask_size=MASK_SIZE,
    )
    progress, _ = train(training, task)
    return progress


def _last(progress: Progress) -> dict[str, float]:
    return progress.epochs[-1]


def table(runs: Sequence[Progress]) -> list[dict[str, float]]:
    """A row for each run: speed, efficiency against the first, milliseconds of a step's parts, and how far its losses
    are from the first run's at most."""
    first = _last(runs[0])
    rows = []
    for progress in runs:
        last, steps = _last(progress), len(progress.steps) / 2
        speedup = last["images_per_second"] / first["images_per_second"]
        apart = [abs(one["loss"] - two["loss"]) for one, two in zip(progress.steps, runs[0].steps, strict=True)]
        rows.append(
            {
                "workers": last["workers"],
                "images_per_second": last["images_per_second"],
                "efficiency": speedup * first["workers"] / last["workers"],
                **{f"{part}_ms": 1000 * last[f"{part}_seconds"] / steps for part in _PARTS},
                "allreduce_ms": 1000 * last["allreduce_seconds"] / steps,
                "allreduce_added_ms": 1000 * last["allreduce_added_seconds"] / steps,
                "largest_loss_difference": float(np.max(apart)),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, float]]) -> str:
    """The rows as people read them; parts are milliseconds of a step."""
    names = list(rows[0])
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[f"{row[name]:.4g}" for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(TrainBenchSettings, run, argv, prog="python -m jobs.train_bench", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
