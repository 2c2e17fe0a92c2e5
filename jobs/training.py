"""One training on Ray Train, whatever is trained: its settings, its workers, and where its state is kept."""

import logging
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

import pyarrow.fs
import ray.train
import ray.train.torch
from pydantic import Field, PositiveInt, model_validator

from jobs.cluster import ClusterSettings, joined, totals
from jobs.data.augmentation import AugmentSettings
from jobs.data.object_store import canonical_uri, is_s3
from jobs.optimisation import OptimisationSettings
from jobs.settings import Place, Settings
from jobs.train_loop import LoopConfig, Task, train_worker
from jobs.train_state import Best, Progress
from jobs.training_log import write_log
from mgmtn.errors import ConfigError, MgmtnError

log = logging.getLogger(__name__)


class TrainSettings(Settings):
    """What both trainings share."""

    data: tuple[Place, ...] = Field(description="folders of training tables (mgmtn prepare), comma-separated")
    output: Place = Field(description="folder of the run, local or in S3: its state, logs and, in the end, checkpoint/")
    name: str = Field(description="first part of the model's id")
    validation: float = Field(0.08, gt=0, lt=1, description="share of the train split that is held out to tune on")
    limit: int = Field(0, ge=0, description="samples taken, the first; 0: all")
    workers: PositiveInt = Field(2, description="training processes")
    min_workers: PositiveInt | None = Field(
        None, description="processes that the run makes do with while the cluster has no room for more; none: workers"
    )
    gpu: bool = Field(False, description="a GPU for each worker, NCCL between them; otherwise CPUs and gloo")
    threads: PositiveInt = Field(1, description="CPUs of each worker")
    loaders: int | None = Field(
        None, ge=0, description="threads of each worker that prepare faces ahead; none: 4 beside a GPU, else 0"
    )
    max_failures: int = Field(3, ge=0, description="times that the run goes on by itself after a worker died")
    checkpoint_minutes: float = Field(10.0, ge=0, description="minutes between checkpoints within an epoch")
    log_steps: PositiveInt = Field(10, description="steps between two entries of steps.csv")
    init: Place | None = Field(
        None, description="a checkpoint of the same kind to start from: its tensors that fit by name and shape"
    )
    half_weights: bool = Field(True, description="store matrices in 16 bits: half the size, the same accuracy")
    optimisation: OptimisationSettings = Field(default_factory=OptimisationSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @model_validator(mode="after")
    def _numbers_that_fit(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} are more than workers: {self.workers}")
        if self.workers > self.optimisation.batch_size:
            size = self.optimisation.batch_size
            raise ValueError(f"optimisation.batch_size: {size} faces are too few for workers: {self.workers}")
        return self


def train(settings: TrainSettings, task: Task) -> tuple[Progress, Best]:
    """Run the workers to the end, and write the log.

    Returns:
        The run, and its best epoch on the validation cut.

    Raises:
        ConfigError: the workers do not fit the cluster, or what they found wrong with settings or data.
        TrainingDiverged: the loss is not finite; names the step.
        WorkerGroupError: workers died more often than `max_failures`; the same command goes on where they were.
    """
    output = canonical_uri(settings.output)
    folder, filesystem = _storage(output)
    config = LoopConfig(
        task=task,
        optimisation=settings.optimisation,
        augment=settings.augment,
        threads=settings.threads,
        output=output,
        loaders=settings.loaders,
        checkpoint_minutes=settings.checkpoint_minutes,
        log_steps=settings.log_steps,
    )
    fewest = settings.min_workers or settings.workers
    with joined(settings.cluster, dashboard=True):
        _check_fit(settings, workers=fewest)
        trainer = ray.train.torch.TorchTrainer(
            cast(Any, train_worker),  # Ray forgets that a worker may return something
            train_loop_config={"loop": config},
            scaling_config=ray.train.ScalingConfig(
                num_workers=cast(Any, settings.workers if fewest == settings.workers else (fewest, settings.workers)),
                use_gpu=settings.gpu,
                resources_per_worker={"CPU": settings.threads} | ({"GPU": 1} if settings.gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="state",
                storage_path=folder,
                storage_filesystem=filesystem,
                failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            ),
        )
        result: Any = trainer.fit()
    if isinstance(result.return_value, MgmtnError):
        raise result.return_value
    assert result.checkpoint is not None  # the loop reports one after each epoch
    with result.checkpoint.as_directory() as state:
        progress = Progress.load(Path(state))
    assert progress.best is not None
    write_log(output, epochs=progress.epochs, steps=progress.steps)
    if stopped_early(settings, progress):
        patience = settings.optimisation.patience
        log.info("event=stopped_early epochs=%d best=%d patience=%d", progress.epoch, progress.best.epoch, patience)
    return progress, progress.best


def stopped_early(settings: TrainSettings, progress: Progress) -> bool:
    """Whether patience ended a finished run before its epochs did."""
    return progress.epoch < settings.optimisation.epochs


def _storage(output: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Where Ray Train keeps its state: a path, and the file system that it is on, None for this machine's.

    A file system in S3 is where boto3's settings say; it carries no keys, and finds them where it is used.
    """
    if not is_s3(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        return output, None
    from jobs.data.s3_client import client  # as in open_store: boto3 takes its time

    endpoint = urlsplit(client().meta.endpoint_url)
    options: dict[str, Any] = {"region": client().meta.region_name}
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    return output.removeprefix("s3://"), pyarrow.fs.S3FileSystem(**options)


def _check_fit(settings: TrainSettings, *, workers: int) -> None:
    have = totals()
    if workers * settings.threads > have["CPU"]:
        wanted = f"{workers} x {settings.threads}"
        raise ConfigError(f"workers, threads: {wanted} CPUs are more than the cluster's {have['CPU']:g}")
    if settings.gpu and workers > have["GPU"]:
        raise ConfigError(f"workers: {workers} need a GPU each, the cluster has {have['GPU']:g}")
