"""Training on Ray that is killed, grows short of room, or cannot work: real processes, real kills, a tiny network."""

import csv
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from jobs import train
from jobs.data.made_faces import write_made_table
from jobs.data.models import resolve_model
from jobs.optimisation import OptimisationSettings
from jobs.train import NewNetworkSettings, TrainAttributesSettings
from jobs.train_loop import TrainingDiverged
from jobs.train_state import PROGRESS_FILE
from jobs.training_log import EPOCHS_FILE, EVENTS_FILE, PLOT_FILE, STEPS_FILE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

SIZE, STEPS = 64, 8
PATIENCE_SECONDS = 600  # for what takes seconds on a machine with nothing else to do
NETWORK = NewNetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16, masks="landmarks")
OPTIMISATION = OptimisationSettings(epochs=2, batch_size=16, learning_rate=3e-3, ema=0.8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """80 faces, of which 64 to 79 are learned from: four steps an epoch."""
    return str(write_made_table(tmp_path_factory.mktemp("data") / "table", count=80, image_size=SIZE, margin=4))


def settings(data: str, output: Path, **changes: Any) -> TrainAttributesSettings:
    parts: dict[str, Any] = {
        "data": (data,),
        "output": output,
        "network": NETWORK,
        "pretrained": False,
        "optimisation": OPTIMISATION,
        "validation": 0.15,
        "log_steps": 1,
        "checkpoint_minutes": 0,
    }
    return TrainAttributesSettings(**(parts | changes))


def flags(data: str, output: str) -> list[str]:
    """The same settings for a command line."""
    said = settings(data, Path("unused")).model_dump(mode="json", exclude_unset=True)
    command = [sys.executable, "-m", "jobs.train", "attributes", "--data", data, "--output", output, "--no-pretrained"]
    for name in ("validation", "log_steps", "checkpoint_minutes"):
        command += [f"--{name.replace('_', '-')}", str(said[name])]
    for group, model in (("network", NETWORK), ("optimisation", OPTIMISATION)):
        for name, value in model.model_dump(mode="json", exclude_unset=True).items():
            command += [f"--{group}.{name.replace('_', '-')}", str(value)]
    return [*command, "--cluster.num-cpus", "2", "--cluster.object-store-gb", "0.3"]


def environment() -> dict[str, str]:
    return dict(os.environ) | {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE_SECONDS), "RAY_DEDUP_LOGS": "0"}


def rows(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output / STEPS_FILE)]


def weights(output: Path) -> str:
    return hashlib.sha256((output / "checkpoint/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(data: str, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    summary = train.run_attributes(settings(data, output))
    assert len(losses(output)) == STEPS
    assert summary["epochs"] == 2
    for name in (EPOCHS_FILE, PLOT_FILE, EVENTS_FILE):
        assert (output / name).stat().st_size > 0
    return output


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def started(data: str, output: Path) -> subprocess.Popen[str]:
    command = flags(data, str(output))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def test_a_run_whose_every_process_is_killed_ends_as_if_it_had_not_been(
    data: str, undisturbed: Path, tmp_path: Path
) -> None:
    step = random.randrange(2, STEPS)
    killed = started(data, tmp_path)
    processes = [psutil.Process(killed.pid)]
    try:
        wait_until(lambda: len(losses(tmp_path)) >= step, killed)
    finally:
        processes += processes[0].children(recursive=True)
        for process in processes:
            process.kill()
    killed.communicate()
    assert not (tmp_path / "checkpoint").exists()
    assert len(losses(tmp_path)) < STEPS

    again = started(data, tmp_path)
    stdout, stderr = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, stderr
    epoch, seen = (int(re.findall(rf"event=training .*{name}=(\d+)", stderr)[0]) for name in ("epoch", "seen"))
    # The checkpoint of the very last step may not have been written yet.
    assert 4 * epoch + seen // 16 >= step - 1, "it went on, not anew"
    assert losses(tmp_path) == losses(undisturbed), f"killed at step {step}"
    assert weights(tmp_path) == weights(undisturbed), f"killed at step {step}"
    assert json.loads(stdout.splitlines()[-1])["epochs"] == 2


def test_the_death_of_a_worker_costs_no_step(data: str, undisturbed: Path, tmp_path: Path) -> None:
    run = started(data, tmp_path)
    driver = psutil.Process(run.pid)
    wait_until(lambda: len(losses(tmp_path)) >= 2, run)
    workers = [process for process in driver.children(recursive=True) if "RayTrainWorker" in process.name()]
    if not workers:  # the name is in the command line where the kernel's is cut short
        workers = [p for p in driver.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    random.choice(workers).kill()
    _, stderr = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 0, stderr
    assert stderr.count("event=training ") == 2
    assert losses(tmp_path) == losses(undisturbed)
    assert weights(tmp_path) == weights(undisturbed)


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_work_ends_the_run_at_once(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Train would try again three times, and then say that its workers failed."""
    assert train.main([*flags(data, str(tmp_path / "few"))[3:], "--limit", "18"]) == 2
    assert "do not fill 16" in capsys.readouterr().err
    wild = OPTIMISATION.model_copy(update={"learning_rate": 1e30, "gradient_norm": 1e30})
    with pytest.raises(TrainingDiverged, match=r"the loss is .* in epoch 0, step \d of 4"):
        train.run_attributes(settings(data, tmp_path / "wild", optimisation=wild))


@pytest.mark.usefixtures("local_ray")
def test_a_run_makes_do_with_the_workers_that_fit_and_learns_what_one_alone_learns(data: str, tmp_path: Path) -> None:
    """The workers' norms keep their first statistics: else each would have its own batch's."""
    same = {
        "optimisation": OPTIMISATION.model_copy(update={"freeze_norm": True}),
        "network": NETWORK.model_copy(update={"dropout": 0.0}),
        "checkpoint_minutes": 10,
    }
    train.run_attributes(settings(data, tmp_path / "one", workers=1, **same))
    train.run_attributes(settings(data, tmp_path / "many", workers=3, min_workers=1, **same))
    ran = [{row["workers"] for row in rows(tmp_path / name / EPOCHS_FILE)} for name in ("one", "many")]
    assert ran == [{1}, {2}]
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    apart, alone = rows(tmp_path / "many" / EPOCHS_FILE)[-1], rows(tmp_path / "one" / EPOCHS_FILE)[-1]
    assert apart["allreduce_seconds"] > 0
    assert alone["allreduce_seconds"] == 0


def test_a_run_lives_in_s3_as_in_a_folder(data: str, bucket: str) -> None:
    output = f"{bucket}/runs/tiny"
    command = [*flags(data, output), "--workers", "1"]

    def trained(*more: str) -> dict[str, Any]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        assert "never-print-this" not in done.stderr + done.stdout
        return dict(json.loads(done.stdout.splitlines()[-1]))

    assert trained("--optimisation.epochs", "1")["epochs"] == 1
    summary = trained("--optimisation.epochs", "2")
    assert summary["epochs"] == 2
    assert resolve_model(f"{output}/checkpoint").card.model_id == summary["model_id"]
    found = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="runs/tiny/")["Contents"]
    keys = {entry["Key"].removeprefix("runs/tiny/") for entry in found}
    assert {EPOCHS_FILE, STEPS_FILE, PLOT_FILE, EVENTS_FILE} <= keys
    assert sum(key.endswith(PROGRESS_FILE) for key in keys) == 1
    body = boto3.client("s3").get_object(Bucket=bucket.removeprefix("s3://"), Key=f"runs/tiny/{EPOCHS_FILE}")["Body"]
    assert [row["epoch"] for row in csv.DictReader(body.read().decode().splitlines())] == ["0", "1"], "it went on"
