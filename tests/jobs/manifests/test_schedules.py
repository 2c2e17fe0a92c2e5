"""How often a cron schedule ticks."""

import pytest

from jobs.manifests.schedules import shortest_interval


@pytest.mark.parametrize(
    ("schedule", "hours"),
    [("0 2 * * *", 24), ("@daily", 24), ("0 2,14 * * mon-fri", 12), ("*/15 * * * *", 0.25), ("0 22,2 1 jan ?", 4)],
)
def test_the_shortest_interval_of_a_schedule(schedule, hours):
    assert shortest_interval(schedule) == hours * 3600


@pytest.mark.parametrize(
    "schedule", ["0 2 * *", "60 * * * *", "a * * * *", "*/0 * * * *", "5-1 * * * *", "TZ=UTC @daily"]
)
def test_a_schedule_that_cron_refuses_is_refused(schedule):
    with pytest.raises(ValueError, match=r"cron|within"):
        shortest_interval(schedule)
