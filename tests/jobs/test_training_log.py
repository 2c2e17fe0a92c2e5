import csv
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from jobs.training_log import EPOCHS_FILE, EVENTS_FILE, PLOT_FILE, STEPS_FILE, TIME_PARTS, write_log


def epochs(count: int) -> list[dict[str, float]]:
    seconds = {f"{part}_seconds": 1.5 for part in TIME_PARTS}
    return [
        {
            "score": 0.5 + epoch / 10,
            "epoch": epoch,
            "loss": 1 / (1 + epoch),
            "images_per_second": 9.0,
            "time": 100 + epoch,
        }
        | seconds
        for epoch in range(count)
    ]


def steps(count: int) -> list[dict[str, float]]:
    return [{"step": 10 * n, "epochs": n / 4, "loss": 1 / (1 + n), "rate": 0.1, "time": 50 + n} for n in range(count)]


def read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def curve(path: Path, tag: str) -> list[tuple[float, int, float]]:
    """Time, step and value of each point. A record is its length, 4 bytes of checksum, the event, and 4 more."""
    data, start, points = path.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        event = Event.FromString(data[start + 12 : start + 12 + length])
        start += length + 16
        points += [
            (event.wall_time, event.step, value.simple_value) for value in event.summary.value if value.tag == tag
        ]
    return points


def test_the_tables_hold_every_epoch_and_step_once_however_often_they_are_written(tmp_path):
    for count in (1, 3):
        write_log(str(tmp_path), epochs=epochs(count), steps=steps(4 * count))
    assert read(tmp_path / EPOCHS_FILE) == epochs(3)
    assert read(tmp_path / STEPS_FILE) == steps(12)


def test_tensorboard_shows_the_curves(tmp_path):
    for count in (1, 3):
        write_log(str(tmp_path), epochs=epochs(count), steps=steps(4 * count))
    assert [path.name for path in (tmp_path / EVENTS_FILE).parent.iterdir()] == [Path(EVENTS_FILE).name]
    scores, losses = (curve(tmp_path / EVENTS_FILE, tag) for tag in ("epoch/score", "step/loss"))
    assert [(step, value) for _, step, value in scores] == [
        (row["epoch"], pytest.approx(row["score"])) for row in epochs(3)
    ]
    assert [time for time, _, _ in scores] == [100, 101, 102]
    assert [step for _, step, _ in losses] == [10 * n for n in range(12)]


def test_tensorboard_shows_no_point_for_what_was_not_measured(tmp_path):
    rows = [row | {"allreduce_added_seconds": float("nan")} for row in epochs(2)]
    write_log(str(tmp_path), epochs=rows, steps=steps(1))
    assert curve(tmp_path / EVENTS_FILE, "epoch/allreduce_added_seconds") == []
    assert len(curve(tmp_path / EVENTS_FILE, "epoch/score")) == 2


@pytest.mark.parametrize(("epoch_count", "step_count"), [(0, 3), (1, 0), (3, 12)])
def test_the_plot_is_a_picture_that_changes_with_the_run(tmp_path, epoch_count, step_count):
    write_log(str(tmp_path / "a"), epochs=epochs(epoch_count), steps=steps(step_count))
    write_log(str(tmp_path / "b"), epochs=epochs(epoch_count + 1), steps=steps(step_count))
    pictures = [np.asarray(Image.open(tmp_path / name / PLOT_FILE).convert("L")) for name in "ab"]
    assert pictures[0].shape == (560, 880)
    assert (pictures[0] != pictures[1]).any()


def test_between_epochs_only_the_tables_are_written(tmp_path):
    write_log(str(tmp_path), epochs=epochs(1), steps=steps(3), drawn=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [EPOCHS_FILE, STEPS_FILE]


def test_a_run_without_a_step_has_no_log(tmp_path):
    write_log(str(tmp_path), epochs=[], steps=[])
    assert not list(tmp_path.iterdir())
