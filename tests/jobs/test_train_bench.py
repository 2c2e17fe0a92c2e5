import math

import pytest

from jobs.train_bench import TrainBenchSettings, main, markdown, run, table
from jobs.train_state import Progress


def measured(*, workers: int, speed: float, losses: list[float]) -> Progress:
    parts = {"data": 0.2, "forward": 0.4, "backward": 1.0, "optimiser": 0.1, "allreduce": 0.3, "allreduce_added": 0.05}
    last = {"workers": float(workers), "images_per_second": speed} | {f"{name}_seconds": s for name, s in parts.items()}
    steps = [{"loss": loss} for loss in losses]
    return Progress(samples=100, epochs=[{"images_per_second": 1.0}, last], steps=steps)


def test_efficiency_is_speed_for_each_worker_against_the_first_row():
    rows = table(
        [
            measured(workers=1, speed=10.0, losses=[0.7, 0.6, 0.5, 0.4]),
            measured(workers=2, speed=15.0, losses=[0.7, 0.6, 0.53, 0.4]),
        ]
    )
    assert [row["efficiency"] for row in rows] == [1.0, 0.75]
    assert [row["largest_loss_difference"] for row in rows] == [0, pytest.approx(0.03)]
    assert rows[1]["backward_ms"] == 500  # of two measured steps
    assert rows[1]["allreduce_added_ms"] == pytest.approx(25)
    text = markdown(rows).splitlines()
    assert len(text) == 4
    assert text[0].startswith("| workers | images per second | efficiency |")
    assert "| 0.75 |" in text[3]


def test_what_was_not_measured_is_shown_as_such():
    progress = measured(workers=1, speed=10.0, losses=[0.7, 0.6])
    progress.epochs[-1]["allreduce_seconds"] = math.nan
    assert "| nan |" in markdown(table([progress]))


@pytest.mark.parametrize("workers", ["0,1", "[]"])
def test_numbers_of_workers_that_cannot_be_are_refused(workers, capsys):
    assert main(["--workers", workers]) == 2
    assert "workers" in capsys.readouterr().err


@pytest.mark.bench
def test_two_workers_against_one():
    summary = run(TrainBenchSettings())
    assert [row["workers"] for row in summary["rows"]] == [1, 2]
