"""What a labelling run reports of itself as a whole: on a port while it lasts, to a Pushgateway, or into a text file.

A night is shorter than Prometheus' memory and its process is gone when it ends, so it is reported from outside: a
Pushgateway, or a file that node_exporter reads, keeps the last values until the next night. They are added to what is
there: a run that fails says so and leaves `mgmtn_last_success_timestamp_seconds` as the last good one has set it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, pushadd_to_gateway, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator

from jobs.data.schema import STATUSES
from jobs.outcomes import EXIT_INTERRUPTED, LeaseHeld, exit_code_of
from mgmtn.errors import MgmtnError

log = logging.getLogger(__name__)

JOB: Final = "mgmtn_label"  # the Pushgateway's label `job`
_PUSH_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 0.5
_SIGNALS: Final = 128  # exit codes from here on are those of signals


class MetricsSettings(BaseModel):
    """Where a run reports its metrics; nowhere by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int | None = Field(None, ge=0, le=65535, description="serve them to Prometheus on this port while running")
    host: str = Field("0.0.0.0", description="address that the port listens on")
    linger_seconds: float = Field(
        60, ge=0, description="how long the port waits after the run for a scrape that sees its end"
    )
    pushgateway: str | None = Field(None, description="push them to this Pushgateway: http://host:9091")
    textfile: Path | None = Field(None, description="write them to this file (.prom) for node_exporter's collector")
    interval_seconds: PositiveFloat = Field(15, description="how often a run that lasts pushes or writes them")
    corpus: str | None = Field(
        None, min_length=1, description="value of a label `corpus`, where several tables report to one Prometheus"
    )

    @field_validator("pushgateway")
    @classmethod
    def _is_plain_url(cls, url: str | None) -> str | None:
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("not an http:// or https:// URL")
            if parts.username is not None:
                raise ValueError("a user's name and password cannot be part of it")
        return url


class RunMetrics(Collector):
    """The state of one run; prometheus_client reads it whenever it is scraped, pushed or written."""

    def __init__(self, *, corpus: str | None = None) -> None:
        self._labels = {"corpus": corpus} if corpus else {}
        self._started = time.monotonic()
        self._lasted: float | None = None
        self._planned: dict[str, int] = {}
        self._images: dict[str, int] = dict.fromkeys((status.value for status in STATUSES), 0)
        self._snapshot: tuple[int, datetime] | None = None
        self._prevalence: dict[str, float] = {}
        self._drift: dict[str, float] = {}
        self._succeeded_at = self._failed_at = self._refused_at = 0.0
        self.begun = False
        self.exit_code: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the values are final."""
        return self._lasted is not None

    @property
    def seconds(self) -> float:
        """How long the run took, or has taken so far."""
        return time.monotonic() - self._started if self._lasted is None else self._lasted

    def plan(self, planned: Mapping[str, int]) -> None:
        """Say how many images the run answers for, by reason, and under `deleted` how many leave the table."""
        self._planned = dict(planned)
        self.begun = True

    def count(self, images: Mapping[str, int]) -> None:
        """Say how many images are done so far, by status; other keys are left out."""
        self._images = {status: int(images.get(status, 0)) for status in self._images}

    def snapshot(self, number: int, created_at: datetime, *, prevalence: Mapping[str, float]) -> None:
        """Say which snapshot is the table's current one.

        Args:
            number: its number.
            created_at: when it was committed.
            prevalence: share of its labelled faces that have an attribute, from 0 to 1, by attribute.
        """
        self._snapshot = (number, created_at)
        self._prevalence = dict(prevalence)

    def drift(self, prevalence: Mapping[str, float], *, before: Mapping[str, float]) -> None:
        """Say how far the run's faces are from the table's.

        Args:
            prevalence: among the faces that the run has labelled, from 0 to 1, by attribute.
            before: the same among those of the snapshot that it was planned on; empty if there is none.
        """
        self._drift = {name: share - before[name] for name, share in prevalence.items() if name in before}

    def end(self, exit_code: int) -> None:
        """Fix the run's length and how it ended; 0 is a success."""
        self._lasted = time.monotonic() - self._started
        self.exit_code = exit_code
        self.begun = True
        if exit_code == 0:
            self._succeeded_at = time.time()
        else:
            self._failed_at = time.time()

    def refuse(self) -> None:
        """Say that another run holds the table's lease, and no more: the rest is that run's to tell."""
        self._lasted = time.monotonic() - self._started
        self._refused_at = time.time()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The values of this moment."""
        if self._refused_at:
            about = "When a run last found the table's lease held by another"
            yield self._one("mgmtn_lease_refused_timestamp_seconds", about, self._refused_at)
            return
        yield self._each("mgmtn_run_images", "Images of the run that are done, by outcome", status=self._images)
        yield self._each("mgmtn_run_planned", "Images due in the run, by reason, and deleted", reason=self._planned)
        yield self._one("mgmtn_run_seconds", "How long the run has taken", self.seconds)
        yield self._one("mgmtn_run_in_progress", "1 while the run lasts; stays 1 if it was killed", not self.ended)
        if self.exit_code is not None:
            yield self._one("mgmtn_run_exit_code", "How the last run ended; 0 is a success", self.exit_code)
        if self._succeeded_at:
            about = "When a run last ended well"
            yield self._one("mgmtn_last_success_timestamp_seconds", about, self._succeeded_at)
        if self._failed_at:
            yield self._one("mgmtn_last_failure_timestamp_seconds", "When a run last failed", self._failed_at)
        if self._snapshot:
            number, created_at = self._snapshot
            lag = (datetime.now(UTC) - created_at).total_seconds()
            yield self._one("mgmtn_snapshot_number", "The table's current snapshot", number)
            yield self._one("mgmtn_snapshot_lag_seconds", "Age of the current snapshot when this was reported", lag)
        if self._prevalence:
            about = "Share of the current snapshot's labelled faces that have the attribute"
            yield self._each("mgmtn_attribute_prevalence", about, attribute=self._prevalence)
        if self._drift:
            about = "Prevalence among the run's faces less that of the snapshot before"
            yield self._each("mgmtn_attribute_drift", about, attribute=self._drift)

    def _one(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, about, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), float(value))
        return family

    def _each(self, name: str, about: str, **values: Mapping[str, float]) -> GaugeMetricFamily:
        """A family with a sample for each item of its one keyword argument, which names the label."""
        [(label, by_value)] = values.items()
        family = GaugeMetricFamily(name, about, labels=(*self._labels, label))
        for key, value in by_value.items():
            family.add_metric((*self._labels.values(), str(key)), float(value))
        return family


@contextmanager
def reported(settings: MetricsSettings) -> Iterator[RunMetrics]:
    """Report the run that is the body, while it lasts and in its end, whatever that is.

    Where nobody can be reached the run goes on, and the log says so. Nothing is sent before the plan is known: a run
    that waits for another's lease must not speak in that one's place.
    """
    metrics = RunMetrics(corpus=settings.corpus)
    finished = threading.Event()
    publisher = threading.Thread(target=_report_until, args=(finished, metrics, settings), daemon=True, name="metrics")
    with _served(metrics, settings):
        publisher.start()
        try:
            yield metrics
        except LeaseHeld:
            metrics.refuse()
            raise
        except BaseException as error:
            metrics.end(_exit_code(error))
            raise
        else:
            metrics.end(0)
        finally:
            finished.set()
            publisher.join()
            report(metrics, settings)


def report(metrics: RunMetrics, settings: MetricsSettings) -> None:
    """Write the text file and push; what fails is logged."""
    if settings.textfile is not None:
        path = settings.textfile
        _logging_failure(str(path), lambda: _write(metrics, path))
    if settings.pushgateway is not None:
        gateway, key = settings.pushgateway, {"corpus": settings.corpus} if settings.corpus else {}
        _logging_failure(
            gateway,
            lambda: pushadd_to_gateway(
                gateway, job=JOB, registry=_registry(metrics), grouping_key=key, timeout=_PUSH_SECONDS
            ),
        )


def _report_until(finished: threading.Event, metrics: RunMetrics, settings: MetricsSettings) -> None:
    while not finished.wait(settings.interval_seconds):
        if metrics.begun:
            report(metrics, settings)


def _logging_failure(target: str, action: Callable[[], None]) -> None:
    try:
        action()
    except (OSError, HTTPException) as error:
        log.warning("event=metrics_not_reported to=%s error=%s: %s", target, type(error).__name__, error)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return (exit_code_of(error) if isinstance(error, MgmtnError) else None) or 1


def _registry(*collectors: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def _write(metrics: RunMetrics, path: Path) -> None:
    """Replace the file in one step; metrics in it that this run does not report stay, as in a Pushgateway."""
    ours = {family.name for family in metrics.collect()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), _registry(metrics, _Kept(path, without=ours)))


class _Kept(Collector):
    """The families of an older text file."""

    def __init__(self, path: Path, *, without: Iterable[str]) -> None:
        self._families = [family for family in _read(path) if family.name not in set(without)]

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _read(path: Path) -> list[Metric]:
    if not path.exists():
        return []
    try:
        return list(text_string_to_metric_families(path.read_text(encoding="utf-8")))
    except ValueError as error:
        log.warning("event=metrics_file_replaced path=%s error=%s", path, error)
        return []


@contextmanager
def _served(metrics: RunMetrics, settings: MetricsSettings) -> Iterator[None]:
    """Serve the metrics for as long as the body lasts, and then until their final values were scraped."""
    if settings.port is None:
        yield
        return
    scrapes = _Scrapes(metrics)
    try:
        server, thread = start_http_server(settings.port, settings.host, registry=_registry(scrapes))
    except OSError as error:
        log.warning("event=metrics_not_served port=%d error=%s", settings.port, error)
        yield
        return
    log.info("event=metrics_served port=%d", server.server_port)
    try:
        yield
    finally:
        # Whoever interrupts a run is not kept waiting.
        if (metrics.exit_code or 0) < _SIGNALS and scrapes.final.wait(settings.linger_seconds):
            time.sleep(_ANSWER_SECONDS)  # the answer to that scrape is still being written
        server.shutdown()
        server.server_close()
        thread.join()


class _Scrapes(Collector):
    """Passes a run's metrics on, and knows when somebody has read their final values."""

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
        self.final = threading.Event()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ended = self._metrics.ended
        yield from self._metrics.collect()
        if ended:
            self.final.set()
