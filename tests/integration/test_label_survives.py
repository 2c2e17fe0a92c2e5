"""What kills a part of a run and not the run: a picture that its process dies of, a worker, a node."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image

from deploy.rehearsal.cluster import ray_running
from deploy.rehearsal.processes import lose, marked
from jobs import label
from jobs.data.snapshots import LabelTable
from jobs.label import LabelSettings
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.landmarks import MediaPipeSettings
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PICTURES = 24
DEADLY = (77, 33)  # width and height of pictures that a process dies of
ENDLESS, LOCKING = (78, 33), (79, 33)  # and that it hangs in: so that its other threads run on, or stand still too


class DeadlyDetector:
    """The embedded detector, with a fault such as a decoder's: on some pictures the process is gone at once."""

    def __init__(self) -> None:
        self._detector = MediaPipeSettings().build()

    def fit(self, images: list[np.ndarray]) -> list[Any]:
        if any(image.shape[1::-1] == DEADLY for image in images):
            os._exit(139)
        return self._detector.fit(images)


class HangingDetector:
    """The embedded detector, with the other fault of decoders: some pictures are never done."""

    def __init__(self) -> None:
        self._detector = MediaPipeSettings().build()

    def fit(self, images: list[np.ndarray]) -> list[Any]:
        sizes = {image.shape[1::-1] for image in images}
        while ENDLESS in sizes:
            time.sleep(0.1)
        if LOCKING in sizes:
            re.match(r"(a+)+$", "a" * 40 + "b")
        return self._detector.fit(images)


class SlowDetector:
    """The embedded detector, slow enough for something to happen in the midst of a run."""

    def __init__(self) -> None:
        self._detector = MediaPipeSettings().build()

    def fit(self, images: list[np.ndarray]) -> list[Any]:
        time.sleep(0.3 * len(images))
        return self._detector.fit(images)


class SlowSettings:
    def build(self) -> SlowDetector:
        return SlowDetector()


class SlowLabelSettings(LabelSettings):
    def chosen_detector(self) -> Any:
        return SlowSettings()


class DeadlySettings:
    def build(self) -> DeadlyDetector:
        return DeadlyDetector()


class DeadlyLabelSettings(LabelSettings):
    def chosen_detector(self) -> Any:
        return DeadlySettings()


class HangingSettings:
    def build(self) -> HangingDetector:
        return HangingDetector()


class HangingLabelSettings(LabelSettings):
    def chosen_detector(self) -> Any:
        return HangingSettings()


class RefusingDetector:
    """The embedded detector where its settings serve: with the driver alone."""

    def __init__(self, driver: int) -> None:
        self._driver = driver
        self._detector = MediaPipeSettings().build()

    def fit(self, images: list[np.ndarray]) -> list[Any]:
        if os.getpid() != self._driver:
            raise ConfigError("this node has no weights")
        return self._detector.fit(images)


@dataclass(frozen=True)
class RefusingSettings:
    driver: int

    def build(self) -> RefusingDetector:
        return RefusingDetector(self.driver)


class RefusingLabelSettings(LabelSettings):
    def chosen_detector(self) -> Any:
        return RefusingSettings(os.getpid())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    card = Card(name="random", kind="attributes", network=network)
    return str(Checkpoint.of(MGMTN(network), card).save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        Image.fromarray(generator.integers(0, 256, (48, 48, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def settings(cls: type[LabelSettings], pictures: Path, labels: Path, model: str, **more: Any) -> LabelSettings:
    small: dict[str, Any] = {"images_per_block": 4, "batch_size": 4, "rows_per_file": 8, "faces": "whole-image"}
    return cls(inputs=(str(pictures),), output=str(labels), model=model, **(small | more))


def rows(labels: Path) -> list[dict[str, Any]]:
    """The current rows, without what differs from run to run."""
    table = LabelTable(str(labels))
    columns = ["uri", "face_index", "status", "error", "attempts", "face_count", "smiling", "young", "labels"]
    found = table.read(table.current(), columns=columns).read_all().to_pylist()
    return sorted(found, key=lambda row: (row["uri"], row["face_index"]))


@pytest.mark.usefixtures("local_ray")
def test_a_picture_that_kills_its_process_again_and_again_is_one_crashed_row(
    pictures: Path, tmp_path: Path, model: str
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    more = tmp_path / "more"
    more.mkdir()
    for path in pictures.iterdir():
        (more / path.name).symlink_to(path)
    Image.new("RGB", DEADLY).save(more / "deadly.png")
    summary = label.run(settings(DeadlyLabelSettings, more, tmp_path / "labels", model))
    assert summary["images"] == {"crashed": 1, "ok": PICTURES}
    [crashed] = [row for row in rows(tmp_path / "labels") if row["status"] == "crashed"]
    assert Path(crashed["uri"]).name == "deadly.png"
    assert "died" in crashed["error"]
    assert (crashed["face_index"], crashed["face_count"], crashed["young"], crashed["labels"]) == (-1, 0, None, None)
    again = label.run(settings(LabelSettings, more, tmp_path / "labels", model))
    assert again["planned"]["retry"] == 1
    assert again["images"] == {"ok": 1}


@pytest.mark.usefixtures("local_ray")
def test_a_picture_that_its_process_hangs_in_is_one_crashed_row(pictures: Path, tmp_path: Path, model: str) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    more = tmp_path / "more"
    more.mkdir()
    for path in pictures.iterdir():
        (more / path.name).symlink_to(path)
    Image.new("RGB", ENDLESS).save(more / "endless.png")
    Image.new("RGB", LOCKING).save(more / "locking.png")
    summary = label.run(settings(HangingLabelSettings, more, tmp_path / "labels", model, task_timeout=8))
    assert summary["images"] == {"crashed": 2, "ok": PICTURES}
    crashed = {Path(row["uri"]).name: row["error"] for row in rows(tmp_path / "labels") if row["status"] == "crashed"}
    assert set(crashed) == {"endless.png", "locking.png"}
    assert all("hung" in error for error in crashed.values())


@pytest.mark.usefixtures("local_ray")
def test_settings_that_serve_the_driver_and_no_worker_are_still_wrong_settings(
    pictures: Path, tmp_path: Path, model: str
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ConfigError, match="this node has no weights"):
        label.run(settings(RefusingLabelSettings, pictures, tmp_path / "labels", model))
    assert LabelTable(str(tmp_path / "labels")).current() is None


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("stage", ["FindFaces", "PredictAttributes"])
def test_a_run_outlives_the_death_of_a_worker(pictures: Path, tmp_path: Path, model: str, stage: str) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    label.run(settings(LabelSettings, pictures, tmp_path / "undisturbed", model))
    with once_a_file_is_written(tmp_path / "labels", lambda: kill_worker(stage)) as killed:
        summary = label.run(settings(SlowLabelSettings, pictures, tmp_path / "labels", model))
    assert killed.is_set()
    assert summary["images"] == {"ok": PICTURES}
    same(rows(tmp_path / "labels"), rows(tmp_path / "undisturbed"))


def kill_worker(stage: str) -> None:
    workers = [process for process in psutil.process_iter() if f"MapBatches({stage})" in title(process)]
    workers[0].kill()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def once_a_file_is_written(labels: Path, act: Callable[[], None]) -> Iterator[threading.Event]:
    """Act in the midst of a run, by another thread; the event that is yielded says that it was done."""
    done, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if any(labels.rglob("part-*.parquet")):
                act()
                done.set()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield done
    finally:
        over.set()
        watcher.join()


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    numbers = ("smiling", "young")
    for name in numbers:  # a batch of other faces moves the last digits
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in expected], atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert {k: one[k] for k in one if k not in numbers} == {k: other[k] for k in other if k not in numbers}


def test_a_run_on_several_nodes_outlives_the_loss_of_one(pictures: Path, tmp_path: Path, model: str) -> None:
    with (
        marked(str(tmp_path)) as plain,
        ray_running(tmp_path, environment=plain, cpus=(2, 2), dashboard=False) as cluster,
    ):
        # The driver, on a node without CPUs, has the model alone; every worker gets it from the object store.
        command = [sys.executable, __file__, str(pictures), str(tmp_path / "labels"), model]
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        with once_a_file_is_written(tmp_path / "labels", lambda: lose(cluster.nodes[0].process)) as lost:
            ended = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
            )
    assert ended.returncode == 0, ended.stderr
    assert lost.is_set()
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["images"] == {"ok": PICTURES}
    found = rows(tmp_path / "labels")
    assert len({row["uri"] for row in found}) == len(found) == PICTURES


class HereOnlySettings(SlowLabelSettings):
    def chosen_detector(self) -> Any:
        shutil.rmtree(self.model, ignore_errors=True)  # the driver has read it: no worker may need the file
        return super().chosen_detector()


def drive(pictures: str, labels: str, model: str) -> None:
    """The driver of several nodes: one node's loss leaves room for every worker of the run."""
    copy = shutil.copytree(model, Path(labels).with_name("model of the driver"))
    few = {"face_workers": 2, "model_workers": 2, "cluster": {"address": os.environ["RAY_ADDRESS"]}}
    summary = label.run(settings(HereOnlySettings, Path(pictures), Path(labels), str(copy), **few))
    print(json.dumps(summary))


if __name__ == "__main__":
    drive(*sys.argv[1:])
