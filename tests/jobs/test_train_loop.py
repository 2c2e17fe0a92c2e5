"""The loop on one worker, in this process: Ray Train's part, to keep checkpoints, is a folder here.

tests/integration/test_training_survives.py has the same on Ray, with real kills.
"""

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from jobs import train_loop
from jobs.data.augmentation import AugmentSettings
from jobs.data.batches import Batch
from jobs.data.made_faces import write_made_table
from jobs.optimisation import OptimisationSettings
from jobs.train_loop import LoopConfig, TooFewSamples, TrainingDiverged, gathered, summed, together, train_worker
from jobs.train_state import Progress
from jobs.train_tasks import AttributeTask, Source
from jobs.training_log import EPOCHS_FILE, PLOT_FILE, STEPS_FILE
from mgmtn.errors import ConfigError, MgmtnError
from mgmtn.network import NetworkSettings

SIZE = 32
NETWORK = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, levels=(3,), width=16, masks="landmarks")
OPTIMISATION = OptimisationSettings(epochs=2, batch_size=16, learning_rate=3e-3, ema=0.8)


class Killed(BaseException):
    """What a kill is to a process: nothing catches it."""


@dataclass
class FolderTrain:
    """Ray Train for one worker: keeps the last checkpoint of `reports`, until it is told to die at one."""

    folder: Path
    die_at: int = -1
    reports: list[dict[str, Any]] = field(default_factory=list)

    def report(self, metrics: dict[str, Any], checkpoint: ray.train.Checkpoint | None = None) -> None:
        if len(self.reports) == self.die_at:
            raise Killed
        self.reports.append(metrics)
        assert checkpoint is not None
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(checkpoint.path, self.folder)

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return ray.train.Checkpoint(str(self.folder)) if self.folder.exists() else None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_made_table(tmp_path_factory.mktemp("data") / "table", count=64, image_size=SIZE, margin=4))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FolderTrain:
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    folder = FolderTrain(tmp_path / "state")
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda module: module)
    monkeypatch.setattr(ray.train, "report", folder.report)
    monkeypatch.setattr(ray.train, "get_checkpoint", folder.checkpoint)
    return folder


@pytest.fixture
def loop(data: str, tmp_path: Path) -> LoopConfig:
    task = AttributeTask(
        source=Source((data,), 0.2, 0),
        network=NETWORK,
        mask_checkpoint=None,
        pretrained=False,
        loss_kind="bce",
        positive_weight=None,
        image_size=SIZE,
        mask_size=64,
    )
    return LoopConfig(task, OPTIMISATION, AugmentSettings(), 1, str(tmp_path / "run"), log_steps=1)


def changed(loop: LoopConfig, **optimisation: Any) -> LoopConfig:
    return replace(loop, optimisation=loop.optimisation.model_copy(update=optimisation))


def trained(loop: LoopConfig, worker: FolderTrain) -> Progress:
    assert train_worker({"loop": loop}) is None
    return Progress.load(worker.folder)


def losses(progress: Progress) -> list[float]:
    return [row["loss"] for row in progress.steps]


def weights(progress: Progress) -> Tensor:
    assert progress.best is not None
    return torch.cat([value.flatten().double() for value in progress.best.weights.values()])


def anew(worker: FolderTrain) -> FolderTrain:
    shutil.rmtree(worker.folder, ignore_errors=True)
    worker.reports.clear()
    worker.die_at = -1
    return worker


def test_a_run_killed_at_any_step_ends_as_if_it_had_not_been(loop, worker):
    """Bit for bit, dropout and augmentation included: a step follows from its number and the state alone."""
    loop = replace(loop, checkpoint_minutes=0.0)
    undisturbed = trained(loop, worker)
    assert len(losses(undisturbed)) == len(worker.reports) == 6
    step = random.randrange(1, 6)
    anew(worker).die_at = step
    with pytest.raises(Killed):
        train_worker({"loop": loop})
    worker.die_at = -1
    resumed = trained(loop, worker)
    assert losses(resumed) == losses(undisturbed), f"killed at step {step}"
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert [row["score"] for row in resumed.epochs] == [row["score"] for row in undisturbed.epochs]
    assert len(worker.reports) == 6, "no step was done twice"


def test_what_is_learned_is_the_best_epochs_averaged_weights(loop, worker):
    progress = trained(changed(loop, epochs=3), worker)
    scores = [row["score"] for row in progress.epochs]
    assert progress.best is not None
    assert progress.best.epoch == scores.index(max(scores))
    module = loop.task.build()
    module.load_state_dict(progress.best.weights)
    _, held_out = loop.task.load()
    assert loop.task.metrics(progress.best.results, held_out)["score"] == max(scores)


@dataclass(frozen=True)
class Scored:
    """A task whose score is the next of a list, whatever was learned."""

    task: AttributeTask
    scores: list[float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def metrics(self, results: Tensor, samples: Any) -> dict[str, float]:
        return {"score": self.scores.pop(0)}


def test_training_stops_when_the_validation_score_has_not_risen_for_so_many_epochs(loop, worker):
    scores = [0.5, 0.6, 0.6, 0.4, 0.9]
    loop = replace(changed(loop, epochs=5, patience=2), task=Scored(loop.task, scores))
    progress = trained(loop, worker)
    assert [row["score"] for row in progress.epochs] == [0.5, 0.6, 0.6, 0.4]
    assert progress.best is not None
    assert progress.best.epoch == 1
    assert scores == [0.9]
    # The same command again does not go on: it has no more patience than before.
    assert len(trained(loop, worker).epochs) == 4
    assert len(trained(changed(loop, patience=3), worker).epochs) == 5


@pytest.mark.parametrize("accumulate", [2, 5])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(loop, worker, accumulate):
    """The norms keep their statistics, which are else those of each part; dropout would differ, too."""
    task = replace(loop.task, network=NETWORK.model_copy(update={"dropout": 0.0}))
    loop = replace(changed(loop, freeze_norm=True, epochs=1), task=task)
    whole = trained(loop, worker)
    parts = trained(changed(loop, accumulate=accumulate), anew(worker))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-3)
    assert math.isfinite(parts.epochs[0]["allreduce_added_seconds"])
    norms = [[row["gradient_norm"] for row in progress.steps] for progress in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_either_precision_learns(loop, worker, precision):
    progress = trained(changed(loop, precision=precision, epochs=6, learning_rate=1e-2), worker)
    assert progress.epochs[-1]["loss"] < progress.epochs[0]["loss"]
    assert weights(progress).isfinite().all()


def test_bf16_is_used_where_it_is_asked_for(loop, worker):
    runs = [losses(trained(changed(loop, epochs=1, precision=p), anew(worker))) for p in ("bf16", "fp32", "auto")]
    assert runs[1] == runs[2]
    assert runs[0] != runs[1]
    assert runs[0] == pytest.approx(runs[1], abs=0.05)


@dataclass(frozen=True)
class Exploding:
    """A task whose loss is not finite from the third batch on."""

    task: AttributeTask
    seen: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        self.seen.append(len(batch))
        return self.task.loss(module, batch) * (float("inf") if self.seen[1:] == [16] * 3 else 1)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(loop, worker):
    error = train_worker({"loop": replace(loop, task=Exploding(loop.task, []))})
    assert isinstance(error, TrainingDiverged)
    assert str(error).startswith("the loss is inf")
    assert str(error).endswith("in epoch 0, step 2 of 3")
    assert not worker.reports


def test_what_cannot_work_is_returned_and_not_raised_for_ray_to_try_again(loop, worker, data):
    error = train_worker({"loop": changed(loop, batch_size=1000)})
    assert isinstance(error, TooFewSamples)
    assert "batch_size" in str(error)
    error = train_worker({"loop": replace(loop, task=replace(loop.task, source=Source((data,), 0.001, 0)))})
    assert isinstance(error, ConfigError)
    assert "validation" in str(error)


def test_a_run_does_not_go_on_with_other_samples_or_another_network(loop, worker, data):
    trained(changed(loop, epochs=1), worker)
    fewer = replace(loop, task=replace(loop.task, source=Source((data,), 0.2, 40)))
    assert "output: holds a run on" in str(train_worker({"loop": fewer}))
    wider = replace(loop, task=replace(loop.task, network=NETWORK.model_copy(update={"width": 32})))
    assert "output: holds the state of a run with other settings" in str(train_worker({"loop": wider}))
    # Tensors of the same names and shapes, put together in another way.
    gate = replace(loop, task=replace(loop.task, network=NETWORK.model_copy(update={"fusion": "gate"})))
    assert "network.fusion was 'concat' there, and is 'gate' now" in str(train_worker({"loop": gate}))


def test_a_frozen_part_is_the_same_after_training(loop, worker):
    loop = replace(loop, task=replace(loop.task, freeze=3))
    torch.manual_seed(loop.optimisation.seed)
    before = loop.task.build().trunk.net.state_dict()
    progress = trained(loop, worker)
    assert progress.best is not None
    same = [torch.equal(value, progress.best.weights[f"trunk.net.{name}"]) for name, value in before.items()]
    assert 20 < sum(same) < len(same)
    assert torch.equal(
        before["blocks.0.0.bn1.running_mean"], progress.best.weights["trunk.net.blocks.0.0.bn1.running_mean"]
    )


def test_the_log_says_where_the_time_went(loop, worker, monkeypatch):
    monkeypatch.setattr(train_loop, "DRAWING_SECONDS", math.inf)  # however slow the machine
    progress = trained(loop, worker)
    for row in progress.epochs:
        assert row["data_seconds"] > 0
        assert row["forward_seconds"] > 0
        assert row["backward_seconds"] > 0
        assert row["optimiser_seconds"] > 0
        assert row["allreduce_seconds"] == 0  # nobody to wait for
        assert math.isnan(row["allreduce_added_seconds"])  # a step has one part
        assert row["images_per_second"] > 0
        assert row["loss"] == pytest.approx(sum(losses(progress)[3 * int(row["epoch"]) :][:3]) / 3)
    assert sorted(path.name for path in Path(loop.output).iterdir()) == [EPOCHS_FILE, STEPS_FILE]


def test_a_finished_epoch_is_drawn_where_it_takes_its_time(loop, worker, monkeypatch):
    monkeypatch.setattr(train_loop, "DRAWING_SECONDS", 0)
    trained(changed(loop, epochs=1), worker)
    assert (Path(loop.output) / PLOT_FILE).stat().st_size > 0


def test_one_worker_agrees_with_itself():
    assert gathered("a") == ["a"]
    assert summed(torch.ones(2)).tolist() == [1, 1]
    assert together(lambda: 3) == 3

    def refuse() -> int:
        raise ConfigError("no")

    calls: list[Callable[[], int]] = [refuse]
    with pytest.raises(MgmtnError, match="no"):
        together(calls[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda loop: changed(loop, learning_rate=1e-4), "optimisation.learning_rate was 0.003 there"),
        (lambda loop: changed(loop, seed=7), "optimisation.seed was 0 there"),
        (lambda loop: replace(loop, augment=AugmentSettings(erase=0.9)), "augment.erase was"),
        (lambda loop: replace(loop, task=replace(loop.task, loss_kind="focal")), "loss was 'bce' there"),
        (lambda loop: replace(loop, task=replace(loop.task, trunk_sha256="ab")), "trunk_weights was None there"),
    ],
)
def test_a_run_is_not_taken_for_one_with_other_settings(loop, worker, change, problem):
    trained(changed(loop, epochs=1), worker)
    error = train_worker({"loop": change(changed(loop, epochs=1))})
    assert isinstance(error, ConfigError)
    assert problem in str(error)
    assert len(trained(changed(loop, epochs=2, accumulate=2), worker).epochs) == 2  # these may change


def test_a_run_does_not_go_on_with_other_samples_that_are_as_many(loop, worker, tmp_path):
    trained(changed(loop, epochs=1), worker)
    other = str(write_made_table(tmp_path / "other", count=64, image_size=SIZE, margin=4, seed=9))
    error = train_worker({"loop": replace(loop, task=replace(loop.task, source=Source((other,), 0.2, 0)))})
    assert isinstance(error, ConfigError)
    assert "data was" in str(error)
