"""What a training run leaves for people to read: CSV, TensorBoard and a plot, each written anew from the whole record.

A run that goes on after a kill repeats the steps since its last checkpoint; files that are only ever written whole show
none of them twice.
"""

import csv
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Final

import tensorboardX
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.data.object_store import new_files
from jobs.data.scratch import scratch_folder

Row = Mapping[str, float]

EPOCHS_FILE, STEPS_FILE, PLOT_FILE = "log.csv", "steps.csv", "training.png"
EVENTS_FILE: Final = "tensorboard/events.out.tfevents.0000000000.mgmtn"  # the form that TensorBoard looks for
TIME_PARTS: Final = ("data", "forward", "backward", "optimiser", "validation", "checkpoint")


def write_log(folder: str, *, epochs: Sequence[Row], steps: Sequence[Row], drawn: bool = True) -> None:
    """Write the CSV files, and with `drawn` those for the eye, too.

    Args:
        folder: URI of the run's folder, local or in S3.
        epochs: figures of each finished epoch, all with the same names.
        steps: `step`, `loss` and more, every few steps.

    Raises:
        FetchError: the store does not take them.
    """
    with new_files(folder) as temporary:
        for name, rows in ((EPOCHS_FILE, epochs), (STEPS_FILE, steps)):
            if rows:
                write_csv(temporary / name, rows)
        if drawn and (epochs or steps):
            write_plot(temporary / PLOT_FILE, epochs=epochs, steps=steps)
            write_events(temporary / EVENTS_FILE, epochs=epochs, steps=steps)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each row, under a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_events(path: Path, *, epochs: Sequence[Row], steps: Sequence[Row]) -> None:
    """TensorBoard's event file: each column a curve, over the steps or the epochs, of what is known (not NaN)."""
    with scratch_folder("tensorboard") as temporary:
        with tensorboardX.SummaryWriter(str(temporary)) as writer:
            for kind, rows, axis in (("step", steps, "step"), ("epoch", epochs, "epoch")):
                for row in rows:
                    for name in (name for name in row.keys() - {"step", "epoch", "time"} if isfinite(row[name])):
                        writer.add_scalar(f"{kind}/{name}", row[name], int(row[axis]), walltime=row["time"])
        (written,) = temporary.iterdir()
        path.parent.mkdir(parents=True, exist_ok=True)
        written.rename(path)


def write_plot(path: Path, *, epochs: Sequence[Row], steps: Sequence[Row]) -> None:
    """Loss, score, throughput and where the time went, over the epochs."""
    figure = Figure(figsize=(11, 7), layout="constrained")  # without pyplot, whose state threads share
    loss, score, speed, time = figure.subplots(2, 2).flatten()
    if steps:
        loss.plot(_column(steps, "epochs"), _column(steps, "loss"), linewidth=0.6, alpha=0.5, label="training, by step")
    ends = [row["epoch"] + 1 for row in epochs]
    for axes, name, label in (
        (loss, "loss", "training, by epoch"),
        (loss, "validation_loss", "validation"),
        (score, "score", "validation"),
        (speed, "images_per_second", "training"),
    ):
        if epochs and name in epochs[0]:
            axes.plot(ends, _column(epochs, name), marker=".", label=label)
    if epochs:
        columns = [_column(epochs, f"{part}_seconds") for part in TIME_PARTS]
        time.stackplot(ends, columns, labels=TIME_PARTS)
    for axes, title in ((loss, "loss"), (score, "score"), (speed, "images/s"), (time, "seconds of an epoch")):
        _finish(axes, title)
    figure.savefig(path, dpi=80)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="epochs")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
