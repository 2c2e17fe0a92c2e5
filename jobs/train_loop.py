"""What each training worker runs: one straight loop, the same for the mask network and the attribute network.

State goes to a checkpoint after every epoch; a run that is started again goes on from the last one.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from jobs.data.batches import AugmentSettings, Batch, plain_batches, training_batches
from jobs.data.training_table import Samples
from mgmtn.errors import MgmtnError

STATE_FILE, PROGRESS_FILE, LOG_FILE = "state.pt", "progress.json", "log.csv"
WEIGHTS_FILE, PREDICTIONS_FILE = "ema.safetensors", "validation.safetensors"


class TrainingDiverged(MgmtnError):
    """The loss is not finite."""


class TooFewSamples(MgmtnError):
    """There is not one whole batch to train on."""


class OptimisationSettings(BaseModel):
    """How the weights move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(12, ge=1, description="passes over the training data")
    batch_size: int = Field(64, ge=1, description="faces per step over all workers")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the cosine schedule")
    trunk_rate: float = Field(0.5, ge=0, description="the pretrained trunk's learning rate, as a share of the others'")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises to its peak")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's, on matrices and kernels only")
    gradient_norm: float = Field(5.0, gt=0, description="gradients are scaled down to this norm")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the forward pass; auto: bf16 on GPUs, fp32 on CPUs; bf16 is fast on some CPUs, too"
    )
    ema: float = Field(0.998, ge=0, lt=1, description="decay of the averaged weights, the ones that are kept")
    seed: int = Field(0, ge=0, description="of initial weights, order and augmentation")


class Task(Protocol):
    """What is trained: network, loss and validation. It travels to the workers."""

    @property
    def image_size(self) -> int:
        """Side of the model's square, pixels."""

    @property
    def mask_size(self) -> int:
        """Side of the stored masks, pixels."""

    def load(self) -> tuple[Samples, Samples]:
        """Training and validation samples."""

    def build(self) -> nn.Module:
        """The network with its initial weights."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss of a batch."""

    def validate(self, module: nn.Module, batch: Batch) -> Tensor:
        """Per-face results of a batch, first dimension B, that `metrics` understands."""

    def metrics(self, results: Tensor, samples: Samples) -> dict[str, float]:
        """Figures from the results of all validation samples, in order."""


@dataclass(frozen=True)
class LoopConfig:
    """All that a worker needs to know."""

    task: Task
    optimisation: OptimisationSettings
    augment: AugmentSettings
    threads: int
    log_folder: str


def train_worker(config: dict[str, LoopConfig]) -> None:
    """Run on every worker.

    Args:
        config: the one under "loop"; Ray Train wants a dict.

    Raises:
        TrainingDiverged: the loss is not finite; names the step.
        TooFewSamples: the samples do not fill one batch.
    """
    loop = config["loop"]
    task, opt = loop.task, loop.optimisation
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(loop.threads)
    torch.manual_seed(opt.seed)
    per_worker = max(1, opt.batch_size // world)
    in_bf16 = opt.precision == "bf16" or (opt.precision == "auto" and device.type == "cuda")

    # Data, network, optimiser.
    samples, held_out = task.load()
    steps_per_epoch = len(samples) // (per_worker * world)
    total_steps = steps_per_epoch * opt.epochs
    if steps_per_epoch == 0:
        raise TooFewSamples(f"{len(samples)} training samples do not fill a batch of {per_worker * world}")
    module = task.build().to(device).to(memory_format=torch.channels_last)
    freeze_unused(module, task, samples, device)
    model = ray.train.torch.prepare_model(module)
    optimizer = torch.optim.AdamW(parameter_groups(module, opt), weight_decay=opt.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, total_steps, opt.warmup))
    average = AveragedModel(module, multi_avg_fn=moving_average(opt.ema), use_buffers=True)

    # Go on where an earlier run stopped.
    first_epoch, best = 0, -math.inf
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch, best = state["epoch"] + 1, state["best"]

    for epoch in range(first_epoch, opt.epochs):
        started, loss_sum = time.perf_counter(), torch.zeros((), device=device)
        module.train()
        batches = training_batches(
            samples,
            image_size=task.image_size,
            mask_size=task.mask_size,
            batch_size=per_worker,
            augment=loop.augment,
            seed=opt.seed,
            epoch=epoch,
            rank=rank,
            world=world,
        )
        for step, batch in enumerate(batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                loss = task.loss(model, batch.to(device))
            if not torch.isfinite(loss):
                raise TrainingDiverged(f"loss is {loss.item()} in epoch {epoch}, step {step} of {steps_per_epoch}")
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), opt.gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            average.update_parameters(module)
            loss_sum += loss.detach()
        seconds = time.perf_counter() - started

        # Validate the averaged weights, each worker on its share; keep the state.
        results = predict_all(task, average.module, held_out, device, rank=rank, world=world)
        metrics = task.metrics(results, held_out) | {
            "epoch": epoch,
            "loss": loss_sum.item() / max(steps_per_epoch, 1),
            "images_per_second": steps_per_epoch * per_worker * world / seconds,
            "seconds": time.perf_counter() - started,
        }
        best = max(best, metrics["score"])
        with TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                state = {
                    "module": module.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "epoch": epoch,
                    "best": best,
                }
                torch.save(state, Path(folder) / STATE_FILE)
                kept = {name: value.cpu().contiguous() for name, value in average.module.state_dict().items()}
                safetensors.torch.save_file(kept, Path(folder) / WEIGHTS_FILE)
                safetensors.torch.save_file({"results": results.contiguous()}, Path(folder) / PREDICTIONS_FILE)
                (Path(folder) / PROGRESS_FILE).write_text(json.dumps(metrics))
                append_log(Path(loop.log_folder) / LOG_FILE, metrics)
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=saved)


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential moving average for `AveragedModel` that forgets the first weights soon: its decay rises from 0.1
    to `decay` as (1 + steps) / (10 + steps), as TensorFlow's ExponentialMovingAverage has it."""

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], steps: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)

    return update


def freeze_unused(module: nn.Module, task: Task, samples: Samples, device: torch.device) -> None:
    """Freeze the parameters that the loss does not reach: some trunks carry a tail that gives no features, and
    distributed training waits for the gradient of every parameter that is not frozen."""
    few = samples.take(np.arange(min(2, len(samples))))
    (batch,) = plain_batches(few, image_size=task.image_size, mask_size=task.mask_size, batch_size=2)
    task.loss(module.eval(), batch.to(device)).backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


@torch.inference_mode()
def predict_all(
    task: Task, module: nn.Module, samples: Samples, device: torch.device, *, rank: int, world: int
) -> Tensor:
    """Validation results of all samples, in order, computed in shares and gathered on every worker."""
    module.eval()
    bounds = [len(samples) * part // world for part in range(world + 1)]
    share = samples.take(torch.arange(bounds[rank], bounds[rank + 1]).numpy())
    batches = plain_batches(share, image_size=task.image_size, mask_size=task.mask_size, batch_size=64)
    results = torch.cat([task.validate(module, batch.to(device)).float().cpu() for batch in batches])
    if world == 1:
        return results
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, results)
    return torch.cat(gathered)


def parameter_groups(module: nn.Module, opt: OptimisationSettings) -> list[dict[str, Any]]:
    """Trunk and the rest at their own rates; vectors (norms, biases) without weight decay."""
    groups: list[dict[str, Any]] = []
    for in_trunk in (True, False):
        for is_matrix in (True, False):
            parameters = [
                parameter
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
                and name.startswith("trunk.") == in_trunk
                and (parameter.ndim > 1) == is_matrix
            ]
            rate = opt.learning_rate * (opt.trunk_rate if in_trunk else 1.0)
            group = {"params": parameters, "lr": rate}
            groups += [group if is_matrix else group | {"weight_decay": 0.0}] if parameters else []
    return groups


def rate_at(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: a linear rise, then a half cosine to zero."""
    rising = max(1, int(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def append_log(path: Path, metrics: dict[str, float]) -> None:
    """Add a line to the run's CSV log, with a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(metrics))
        if new:
            writer.writeheader()
        writer.writerow(metrics)
