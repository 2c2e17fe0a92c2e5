import math
import threading
import time

import pytest
import torch

from jobs.stopwatch import AllReduceClock, Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_laps_of_a_part_add_up(clock):
    watch = Stopwatch(CPU)
    for _ in range(3):
        clock(2)
        watch.lap("data")
        clock(5)
        watch.lap("forward")
        watch.settle()
    assert watch.seconds == {"data": 6, "forward": 15}


def test_a_restart_forgets_what_was_and_what_passed(clock):
    watch = Stopwatch(CPU)
    clock(2)
    watch.lap("data")
    watch.settle()
    clock(9)
    watch.restart()
    clock(1)
    watch.lap("data")
    watch.settle()
    assert watch.seconds == {"data": 1}


def test_overlapping_buckets_count_once(clock):
    all_reduce = AllReduceClock(torch.nn.Linear(1, 1))
    all_reduce.start()
    clock(1)
    all_reduce.start()
    clock(1)
    all_reduce.stop()
    clock(1)
    all_reduce.stop()
    clock(50)
    all_reduce.start()
    clock(1)
    all_reduce.stop()
    assert all_reduce.seconds == 4


def test_a_restart_counts_from_nothing(clock):
    all_reduce = AllReduceClock(torch.nn.Linear(1, 1))
    all_reduce.start()
    clock(1)
    all_reduce.stop()
    all_reduce.restart()
    assert all_reduce.seconds == 0


def test_where_it_cannot_be_measured_it_is_no_number():
    assert math.isnan(AllReduceClock(torch.nn.Linear(1, 1, device="meta")).seconds)


def test_buckets_may_end_in_other_threads():
    all_reduce = AllReduceClock(torch.nn.Linear(1, 1))
    threads = [threading.Thread(target=lambda: (all_reduce.start(), all_reduce.stop())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_reduce.seconds >= 0
    assert all_reduce._under_way == 0
