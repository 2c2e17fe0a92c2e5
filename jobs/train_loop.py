"""What each training worker runs: one straight loop, the same for the mask network and the attribute network.

State goes to a checkpoint after every epoch, and every few minutes within one. A run that is started again goes on at
the very step: what a step does follows from (seed, epoch, step) and the state alone.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from jobs.data.augmentation import AugmentSettings
from jobs.data.batches import Batch, plain_batches, step_seed, training_batches
from jobs.data.scratch import scratch_folder
from jobs.data.training_table import Samples
from jobs.optimisation import (
    OptimisationSettings,
    averaged,
    freeze_unreached,
    parameter_groups,
    rate_at,
    set_rate,
    to_training,
)
from jobs.stopwatch import AllReduceClock, Stopwatch
from jobs.train_state import Progress, load_tensors, save_tensors
from jobs.training_log import TIME_PARTS, write_log
from mgmtn.allocator import keep_freed_memory
from mgmtn.errors import CheckpointError, ConfigError, FetchError, MgmtnError

log = logging.getLogger(__name__)

T = TypeVar("T")

DRAWING_SECONDS: Final = 60  # after so many a finished epoch is drawn; short ones wait for those after, or the end


class TrainingDiverged(MgmtnError):
    """The loss or its gradient is not finite."""


class TooFewSamples(ConfigError):
    """There is not one whole batch to train on."""


class Task(Protocol):
    """What is trained: network, loss and validation. It travels to the workers."""

    @property
    def image_size(self) -> int:
        """Side of the model's square, pixels."""

    @property
    def mask_size(self) -> int:
        """Side of the stored masks, pixels."""

    @property
    def trained(self) -> dict[str, Any]:
        """The task's part of `LoopConfig.trained`."""

    def load(self) -> tuple[Samples, Samples]:
        """Training and validation samples."""

    def build(self) -> nn.Module:
        """The network with its initial weights."""

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss of a batch."""

    def validate(self, module: nn.Module, batch: Batch) -> Tensor:
        """Per-face results of a batch, first dimension B, that `metrics` understands."""

    def metrics(self, results: Tensor, samples: Samples) -> dict[str, float]:
        """Figures from the results of all validation samples, in order; the higher their "score" the better."""


@dataclass(frozen=True)
class LoopConfig:
    """All that a worker needs to know.

    `output` is the URI of the run's folder; `loaders` None: see `jobs.train`'s settings.
    """

    task: Task
    optimisation: OptimisationSettings
    augment: AugmentSettings
    threads: int
    output: str
    loaders: int | None = None
    checkpoint_minutes: float = 10.0
    log_steps: int = 10

    @property
    def trained(self) -> dict[str, Any]:
        """What decides, beside the samples, what the weights become, as JSON has it: a run goes on only as the same.

        Not what only ends a run, and may let a finished one go on, nor into how many parts a step is cut.
        """
        steps = self.optimisation.model_dump(mode="json", exclude={"epochs", "patience", "accumulate"})
        return self.task.trained | {"optimisation": steps, "augment": self.augment.model_dump(mode="json")}


def train_worker(config: dict[str, LoopConfig]) -> MgmtnError | None:
    """Run on every worker.

    Args:
        config: the one under "loop"; Ray Train wants a dict.

    Returns:
        What is wrong with the run, the same on every worker: an exception that escaped would be taken for the death of
        a worker, and the run be tried again, to end the same way. None: nothing.
    """
    try:
        _train(config["loop"])
    except (ConfigError, CheckpointError, TrainingDiverged) as error:
        return error
    return None


def _train(loop: LoopConfig) -> None:
    task, opt = loop.task, loop.optimisation
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if on_gpu := device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(loop.threads)
    keep_freed_memory()
    in_bf16 = opt.precision == "bf16" or (opt.precision == "auto" and on_gpu)
    loaders = loop.loaders if loop.loaders is not None else 4 if on_gpu else 0

    run = together(lambda: set_up(loop, device))
    module, optimizer, progress = run.module, run.optimizer, run.progress
    model = ray.train.torch.prepare_model(module)
    all_reduce, watch = AllReduceClock(model), Stopwatch(device)
    steps_per_epoch = len(run.samples) // opt.batch_size
    saved_at = time.monotonic()
    if rank == 0:
        log.info("event=training workers=%d epoch=%d seen=%d", world, progress.epoch, progress.seen)

    while progress.epoch < opt.epochs and not progress.out_of_patience(opt.patience):
        epoch, first_step = progress.epoch, progress.seen // opt.batch_size
        batches = training_batches(
            run.samples,
            image_size=task.image_size,
            mask_size=task.mask_size,
            batch_size=opt.batch_size,
            augment=loop.augment,
            seed=opt.seed,
            epoch=epoch,
            first_step=first_step,
            rank=rank,
            world=world,
            loaders=loaders,
        )
        to_training(module, freeze_norm=opt.freeze_norm)
        watch.restart()
        all_reduce.restart()
        for step, batch in enumerate(batches, first_step):
            watch.lap("data")

            # Gradients of the mean loss over the faces of all parts and workers: each counts by how many faces it has.
            torch.manual_seed(step_seed(opt.seed, epoch=epoch, step=step, rank=rank + 1))  # for dropout; 0 draws faces
            loss_sum = torch.zeros((), device=device)
            parts = batch.split(opt.accumulate)
            for part in parts:
                is_last = part is parts[-1]
                with contextlib.nullcontext() if is_last else unsynchronised(model):
                    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                        loss = task.loss(model, part.to(device)) * (len(part) / opt.batch_size)
                    watch.lap("forward")
                    (loss * world).backward()  # for the workers' gradients are averaged
                    watch.lap("backward" if is_last else "backward_alone")
                loss_sum += loss.detach()
            norm = nn.utils.clip_grad_norm_(module.parameters(), opt.gradient_norm)

            # All workers must agree on the loss, and on whether to write a checkpoint now, as the first one's clock has
            # it. The gradients are the same on all of them by now.
            is_due = rank == 0 and time.monotonic() - saved_at >= 60 * loop.checkpoint_minutes
            loss, due, norm_value = summed(
                torch.stack([loss_sum, loss_sum.new_tensor(float(is_due)), norm / world])
            ).tolist()
            if not np.isfinite([loss, norm_value]).all():
                where = f"epoch {epoch}, step {step} of {steps_per_epoch}"
                raise TrainingDiverged(f"the loss is {loss}, its gradient's norm {norm_value} in {where}")

            global_step = epoch * steps_per_epoch + step
            rate = rate_at(global_step, steps_per_epoch * opt.epochs, opt.warmup)
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.average.update_parameters(module)
            progress.seen += opt.batch_size
            progress.loss_sum += loss
            watch.lap("optimiser")
            watch.settle()
            if global_step % loop.log_steps == 0:
                row = {"step": global_step, "epochs": epoch + (step + 1) / steps_per_epoch, "loss": loss}
                progress.steps.append(row | {"rate": rate, "gradient_norm": norm_value, "time": time.time()})
            if due and step + 1 < steps_per_epoch:
                save(run, loop, {"epoch": epoch, "step": step}, rank=rank)
                saved_at = time.monotonic()
                watch.lap("checkpoint")

        # Validate the averaged weights, each worker on its share; keep the state.
        mean_loss = progress.loss_sum / steps_per_epoch
        share_buffers(run.average.module)
        results = predict_all(task, run.average.module, run.held_out, device, rank=rank, world=world)
        watch.lap("validation")
        watch.settle()
        figures = task.metrics(results, run.held_out) | {
            "epoch": epoch,
            "loss": mean_loss,
            **time_split(watch, all_reduce, images=(steps_per_epoch - first_step) * opt.batch_size, opt=opt),
            "workers": world,
            "time": time.time(),
        }
        progress.end_epoch(figures, weights=run.average.module.state_dict(), results=results)
        save(run, loop, figures, rank=rank)
        saved_at = time.monotonic()
        if rank == 0:
            score, speed = figures["score"], figures["images_per_second"]
            log.info("event=epoch epoch=%d loss=%.4f score=%.4f images_per_second=%.1f", epoch, mean_loss, score, speed)


def time_split(
    watch: Stopwatch, all_reduce: AllReduceClock, *, images: int, opt: OptimisationSettings
) -> dict[str, float]:
    """Seconds of an epoch's parts, of what was run of it without a break, and the speed of training alone.

    `allreduce_seconds` is when gradients were on their way, mostly beside the backward pass, which they may wait for;
    `allreduce_added_seconds` is how much longer the backward pass took for it: known only where a step has parts, of
    which all but the last keep their gradients to themselves. Not a number where it was not measured.
    """
    seconds = {part: watch.seconds[part] for part in TIME_PARTS}
    added = float("nan")
    if opt.accumulate > 1:
        added = seconds["backward"] - watch.seconds["backward_alone"] / (opt.accumulate - 1)
    seconds["backward"] += watch.seconds["backward_alone"]
    training = sum(seconds[part] for part in ("data", "forward", "backward", "optimiser"))
    return {
        "images_per_second": images / training,
        **{f"{part}_seconds": value for part, value in seconds.items()},
        "allreduce_seconds": all_reduce.seconds,
        "allreduce_added_seconds": added,
    }


@dataclass
class Training:
    """A worker's part of a run."""

    samples: Samples
    held_out: Samples
    module: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    progress: Progress
    drawn_at: float = field(default_factory=time.monotonic)


def set_up(loop: LoopConfig, device: torch.device) -> Training:
    """Data, network and optimiser, as an earlier run of the same output left them, or new.

    Raises:
        TooFewSamples: the samples do not fill one batch.
        ConfigError: the task's, or the earlier run was another.
    """
    task, opt = loop.task, loop.optimisation
    torch.manual_seed(opt.seed)
    samples, held_out = task.load()
    if len(samples) < opt.batch_size:
        raise TooFewSamples(f"optimisation.batch_size: {len(samples)} training samples do not fill {opt.batch_size}")
    module = task.build().to(device).to(memory_format=torch.channels_last)
    few = samples.take(np.arange(min(2, len(samples))))
    (batch,) = plain_batches(few, image_size=task.image_size, mask_size=task.mask_size, batch_size=2)
    freeze_unreached(module, task.loss(module.eval(), batch.to(device)))
    optimizer = torch.optim.AdamW(parameter_groups(module, opt), weight_decay=opt.weight_decay)
    trained = loop.trained | {"data": digest_of(samples)}
    progress = Progress(len(samples), trained)
    run = Training(samples, held_out, module, averaged(module, opt.ema), optimizer, progress)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            run.progress = Progress.load(Path(folder))
            run.progress.check(samples=len(samples), trained=trained)
            load_tensors(Path(folder), module=module, average=run.average, optimizer=optimizer)
    return run


def digest_of(samples: Samples) -> str:
    """The first characters of a SHA-256 over names and labels: other samples, even as many, are another run's."""
    digest = hashlib.sha256("\n".join(samples.names.tolist()).encode())
    digest.update(samples.labels.tobytes())
    return digest.hexdigest()[:16]


def save(run: Training, loop: LoopConfig, figures: dict[str, Any], *, rank: int) -> None:
    """Write a checkpoint, and the log beside it; every worker must call it."""
    with scratch_folder("checkpoint") as folder:
        saved = None
        if rank == 0:
            save_tensors(folder, module=run.module, average=run.average, optimizer=run.optimizer)
            run.progress.save(folder)
            saved = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(figures, checkpoint=saved)
    if rank == 0:
        try:
            is_time = run.progress.seen == 0 and time.monotonic() - run.drawn_at >= DRAWING_SECONDS
            write_log(loop.output, epochs=run.progress.epochs, steps=run.progress.steps, drawn=is_time)
            run.drawn_at = time.monotonic() if is_time else run.drawn_at
        except FetchError as error:  # no reason to stop: the next checkpoint's log holds all of it
            log.warning("event=log_not_written reason=%r", str(error))


def unsynchronised(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep gradients on their worker, to be added to those of a later part of the step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def summed(values: Tensor) -> Tensor:
    """Sums over the workers, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Give every worker the first one's buffers, in place.

    The running statistics of batch norms come from each worker's own faces, and the first one's are what is saved.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gathered(value: T) -> list[T]:
    """What each worker has, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(step: Callable[[], T]) -> T:
    """Do something on every worker, and raise on all of them what one of them raised of our errors: the others would
    wait for it for ever."""
    value, error = None, None
    try:
        value = step()
    except MgmtnError as raised:
        error = raised
    for failure in gathered(error):
        if failure is not None:
            raise failure
    return cast(T, value)


@torch.inference_mode()
def predict_all(
    task: Task, module: nn.Module, samples: Samples, device: torch.device, *, rank: int, world: int
) -> Tensor:
    """Validation results of all samples, in order, computed in shares and gathered on every worker."""
    module.eval()
    share = samples.take(np.arange(len(samples) * rank // world, len(samples) * (rank + 1) // world))
    batches = plain_batches(share, image_size=task.image_size, mask_size=task.mask_size, batch_size=64)
    results = [task.validate(module, batch.to(device)).float().cpu() for batch in batches]
    return torch.cat([result for part in gathered(results) for result in part])
