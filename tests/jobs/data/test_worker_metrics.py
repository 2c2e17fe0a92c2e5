"""What a worker counts. What Ray exports of it is tested with a real run, in tests/deploy."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.data import request_rate, worker_metrics
from jobs.data.request_rate import RetryReason
from jobs.data.schema import STATUSES
from jobs.data.worker_metrics import STAGE_BUCKETS, WorkerMetrics, timed

Records = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """What a new process hands to Ray: name, value and labels of each record."""
    seen: Records = []

    def record(metric: Any, value: float, tags: dict[str, str] | None = None) -> None:
        seen.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr("ray.util.metrics.Metric._record", record)
    monkeypatch.setattr(request_rate, "_listeners", [])
    monkeypatch.setattr(request_rate, "retries", Counter())
    worker_metrics.worker_metrics.cache_clear()
    yield seen
    worker_metrics.worker_metrics.cache_clear()


def test_every_counter_of_the_contract_starts_at_zero(records):
    WorkerMetrics()
    assert {value for _, value, _ in records} == {0}
    labels: dict[str, list[dict[str, str]]] = {}
    for name, _, tags in records:
        labels.setdefault(name, []).append(tags)
    assert labels == {
        "mgmtn_faces_total": [{}],
        "mgmtn_bytes_read_total": [{}],
        "mgmtn_images_total": [{"status": status} for status in STATUSES],
        "mgmtn_s3_retries_total": [{"reason": reason} for reason in RetryReason],
    }


def test_images_are_counted_by_status_and_faces_apart(records):
    metrics = WorkerMetrics()
    records.clear()
    metrics.count_images({"ok": 3, "no_face": 1, "crashed": 0, "faces": 5})
    assert records == [
        ("mgmtn_images_total", 3, {"status": "ok"}),
        ("mgmtn_images_total", 1, {"status": "no_face"}),
        ("mgmtn_faces_total", 5, {}),
    ]


def test_a_batch_without_faces_or_bytes_is_no_error(records):
    metrics = WorkerMetrics()
    records.clear()
    metrics.count_images({"no_face": 1, "faces": 0})
    metrics.count_bytes(0)
    assert records == [("mgmtn_images_total", 1, {"status": "no_face"})]


def test_the_images_of_a_batch_share_its_time(records):
    metrics = WorkerMetrics()
    records.clear()
    metrics.time_stage("model", seconds=2.0, images=4)
    metrics.time_stage("model", seconds=2.0, images=0)
    assert records == [("mgmtn_stage_seconds", 0.5, {"stage": "model"})] * 4


def test_a_stage_that_fails_is_timed_too(records):
    def fail() -> None:
        with timed("fetch"):
            raise OSError("refused")

    with pytest.raises(OSError, match="refused"):
        fail()
    name, seconds, labels = records[-1]
    assert (name, labels) == ("mgmtn_stage_seconds", {"stage": "fetch"})
    assert 0 <= seconds < STAGE_BUCKETS[-1]


def test_retries_are_counted_those_before_the_first_metric_too(records):
    request_rate.count_retry(RetryReason.TIMEOUT)
    request_rate.count_retry(RetryReason.TIMEOUT)
    worker_metrics.worker_metrics()
    request_rate.count_retry(RetryReason.THROTTLED)
    worker_metrics.worker_metrics()  # a second look counts nothing again
    counted = [(value, tags["reason"]) for name, value, tags in records if name == "mgmtn_s3_retries_total" and value]
    assert counted == [(2, "timeout"), (1, "throttled")]
