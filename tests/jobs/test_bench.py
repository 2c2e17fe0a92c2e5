"""The benchmark: its images, its arithmetic, and that both of its sides do the same work."""

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from jobs.bench import BenchSettings, Memory, image_files, make_images, markdown, measure, ratios
from jobs.bench_loop import PlainLabeller
from jobs.bench_sides import Side
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.landmarks import MediaPipeSettings
from mgmtn.network import MGMTN, NetworkSettings


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("bench"), count=18)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = NetworkSettings(image_size=64, masks="ones", width=8)
    card = Card(name="tiny", kind="attributes", network=network)
    return str(Checkpoint.of(MGMTN(network).eval(), card).save(tmp_path_factory.mktemp("model") / "tiny"))


def side(images, model, *, name, faces="detect", labels="labels"):
    return Side(
        name=name,
        files=tuple(sorted(map(str, images.iterdir()))),
        labels=str(labels),
        model=model,
        faces=faces,
        detector=MediaPipeSettings(levels=0),
        cpus=2,
        batch_size=64,
        images_per_block=6,
    )


def row(side, rate, *, repeat=0, mode="detect"):
    peaks = dict.fromkeys(("driver_mb", "workers_mb", "services_mb", "total_mb"), 7)
    return {"faces_mode": mode, "repeat": repeat, "side": side, "rate_warm": rate, "rate_cold": rate / 2} | peaks


def test_every_image_that_is_made_is_another(images):
    contents = {path.read_bytes() for path in images.iterdir()}
    assert len(contents) == 18


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no images in"):
        image_files(BenchSettings(photos=str(tmp_path)), folder=tmp_path)


def test_the_loop_labels_the_faces_it_finds_or_each_whole_image(images, model):
    files = side(images, model, name="loop").files
    count, boxes, probabilities = PlainLabeller(side(images, model, name="loop"))(files)
    assert count == 18
    assert 0 < len(boxes) < 18
    assert probabilities.shape == (len(boxes), 40)
    count, boxes, probabilities = PlainLabeller(side(images, model, name="loop", faces="whole-image"))(files)
    assert boxes.shape == (18, 4)
    assert np.isfinite(probabilities).all()


def test_the_loop_counts_a_broken_image_and_goes_on(images, model, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    count, boxes, _ = PlainLabeller(side(images, model, name="loop"))([str(tmp_path / "torn.jpg")])
    assert count == 1
    assert len(boxes) == 0


def test_ratios_are_taken_within_a_repeat_and_then_their_median():
    loop = [row("loop", rate, repeat=k) for k, rate in enumerate((10.0, 20.0, 40.0))]
    job = [row("job", rate, repeat=k) for k, rate in enumerate((5.0, 16.0, 24.0))]
    assert ratios(loop + job)["detect"]["rate_warm"] == {"median": 0.6, "lowest": 0.5, "highest": 0.8}


def test_the_table_has_both_sides_and_their_ratio():
    lines = markdown([row("loop", 10.0), row("job", 6.0)]).splitlines()
    assert lines[2:] == [
        "| detect | loop | 10.0 | 5.0 | 7 | 7 | 7 | 7 |",
        "| detect | job | 6.0 | 3.0 | 7 | 7 | 7 | 7 |",
        "| detect | job / loop | **0.60** (0.60 to 0.60) | **0.60** (0.60 to 0.60) | | | | |",
    ]


def test_memory_is_that_of_the_process_and_of_its_descendants():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    memory = Memory()
    memory.look(psutil.Process(os.getpid()))
    child.communicate(b"\n")
    assert memory.peaks["driver"] > 2**20
    assert memory.peaks["services"] > 2**20
    assert memory.peaks["total"] == memory.peaks["driver"] + memory.peaks["services"] + memory.peaks["workers"]


@pytest.mark.integration
def test_both_sides_find_the_same_faces(images, model, tmp_path):
    loop = measure(side(images, model, name="loop"))
    job = measure(side(images, model, name="job", labels=tmp_path))
    assert loop["images"] == job["images"] == 18
    assert loop["faces"] == job["faces"] > 0
    assert loop["rate_cold"] > 0
    assert job["workers_mb"] > 0
