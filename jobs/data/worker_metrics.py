"""What the processes of a run count, exported by Ray on each node's metrics port as `ray_mgmtn_...`.

Ray collects a process's counts every ten seconds and when it ends, and keeps those of ended processes until the node
stops. What only a node's last seconds have counted is nevertheless lost: what must not be lost is reported by the
driver (`jobs.run_metrics`).
"""

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from ray.util.metrics import Counter, Histogram

from jobs.data import request_rate
from jobs.data.schema import STATUSES

# Values of the label `stage`, in the flow's order.
STAGES: Final = ("fetch", "decode", "faces", "model", "write")
# Seconds that one image takes. Ray hands on in which bucket a time fell and not the time, so that sums and means in
# Prometheus are those of the buckets' middles.
STAGE_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class WorkerMetrics:
    """The metrics of one process. Without Ray they count for nobody."""

    def __init__(self) -> None:
        self._images = Counter(
            "mgmtn_images_total", description="Images that are done, by outcome", tag_keys=("status",)
        )
        self._faces = Counter("mgmtn_faces_total", description="Faces labelled")
        self._bytes = Counter("mgmtn_bytes_read_total", description="Bytes of image files read")
        self._retries = Counter(
            "mgmtn_s3_retries_total", description="Requests to the store that were sent again", tag_keys=("reason",)
        )
        self._seconds = Histogram(
            "mgmtn_stage_seconds",
            description="Seconds that one image takes in a stage; a batch's time is shared equally among its images",
            boundaries=list(STAGE_BUCKETS),
            tag_keys=("stage",),
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        # Prometheus measures increases between two samples: of a counter that appears with its first count, that count
        # would be missed. `inc` refuses a zero.
        for counter in (self._faces, self._bytes):
            counter._record(0.0)
        for status in STATUSES:
            self._images._record(0.0, tags={"status": status.value})
        for reason in request_rate.RetryReason:
            self._retries._record(0.0, tags={"reason": reason.value})

    def count_images(self, outcomes: Mapping[str, int]) -> None:
        """Count images by status and, under `faces`, faces."""
        for name, count in outcomes.items():
            if count and name == "faces":
                self._faces.inc(count)
            elif count:
                self._images.inc(count, tags={"status": name})

    def count_bytes(self, count: int) -> None:
        """Count bytes read."""
        if count:
            self._bytes.inc(count)

    def count_retry(self, reason: request_rate.RetryReason, count: int = 1) -> None:
        """Count requests sent again."""
        self._retries.inc(count, tags={"reason": reason.value})

    def time_stage(self, stage: str, *, seconds: float, images: int = 1) -> None:
        """Record that some images together took so long in a stage."""
        for _ in range(images):
            self._seconds.observe(seconds / images, tags={"stage": stage})


@functools.cache
def worker_metrics() -> WorkerMetrics:
    """This process's metrics; from its first call on, retries of requests are among them, those so far too."""
    metrics = WorkerMetrics()
    for reason, count in request_rate.retries.items():
        metrics.count_retry(reason, count)
    request_rate.listen(metrics.count_retry)
    return metrics


@contextmanager
def timed(stage: str, *, images: int = 1) -> Iterator[None]:
    """Record how long a stage takes for some images, in vain too: a store that fails takes time and is not stalled."""
    started = time.perf_counter()
    try:
        yield
    finally:
        worker_metrics().time_stage(stage, seconds=time.perf_counter() - started, images=images)
