"""What a run reports of itself: through real files, a real port and a server that takes pushes."""

import contextlib
import logging
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.data.schema import STATUSES
from jobs.outcomes import ErrorBudgetExceeded, GateRefused, LeaseHeld
from jobs.run_metrics import JOB, MetricsSettings, RunMetrics, reported
from mgmtn.errors import ConfigError

Values = dict[tuple[str, str], float]

ALWAYS = {"mgmtn_run_images", "mgmtn_run_planned", "mgmtn_run_seconds", "mgmtn_run_in_progress", "mgmtn_run_exit_code"}
FAILED = ALWAYS | {"mgmtn_last_failure_timestamp_seconds"}
CONTRACT = ALWAYS - {"mgmtn_run_in_progress", "mgmtn_run_exit_code"} | {
    "mgmtn_last_success_timestamp_seconds",
    "mgmtn_snapshot_number",
    "mgmtn_snapshot_lag_seconds",
    "mgmtn_attribute_prevalence",
    "mgmtn_attribute_drift",
}


def values(text: str) -> Values:
    """Samples of an exposition by name and the value of their label."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, ",".join(sample.labels.values())): sample.value for sample in samples}


def names(text: str) -> set[str]:
    return {name for name, _ in values(text)}


def a_night(metrics: RunMetrics) -> None:
    metrics.plan({"new": 50, "retry": 10, "deleted": 3})
    metrics.count({"ok": 55, "fetch_error": 5, "faces": 70})


def a_failing_night(settings: MetricsSettings, error: BaseException) -> None:
    with reported(settings) as metrics:
        a_night(metrics)
        raise error


def a_good_night(metrics: RunMetrics) -> None:
    a_night(metrics)
    metrics.snapshot(7, datetime.now(UTC) - timedelta(seconds=90), prevalence={"smiling": 0.5, "young": 0.75})
    metrics.drift({"smiling": 0.5, "young": 0.75}, before={"smiling": 0.375})


@pytest.fixture
def textfile(tmp_path: Path) -> Path:
    return tmp_path / "collector" / "mgmtn.prom"


class Gateway:
    """A server that takes pushes as a Pushgateway does, and keeps them."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str, str, str]] = []
        self.status = 202
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                gateway.pushes.append((self.command, self.path, body))
                self.send_response(gateway.status)
                self.end_headers()

            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.stop()


def test_a_good_night_reports_every_metric_of_the_contract(textfile):
    with reported(MetricsSettings(textfile=textfile)) as metrics:
        a_good_night(metrics)
    found = values(textfile.read_text())

    assert {name for name, _ in found} == CONTRACT | ALWAYS
    assert {label for name, label in found if name == "mgmtn_run_images"} == set(STATUSES)
    assert found["mgmtn_run_images", "ok"] == 55
    assert found["mgmtn_run_images", "no_face"] == 0
    assert found["mgmtn_run_planned", "retry"] == 10
    assert found["mgmtn_run_in_progress", ""] == found["mgmtn_run_exit_code", ""] == 0
    assert found["mgmtn_last_success_timestamp_seconds", ""] == pytest.approx(time.time(), abs=60)
    assert found["mgmtn_snapshot_number", ""] == 7
    assert 90 <= found["mgmtn_snapshot_lag_seconds", ""] < 150
    assert found["mgmtn_attribute_prevalence", "young"] == 0.75
    assert found["mgmtn_attribute_drift", "smiling"] == 0.125
    assert ("mgmtn_attribute_drift", "young") not in found  # nothing to compare it with


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ErrorBudgetExceeded("too many failed"), 4),
        (GateRefused("drift"), 3),
        (ConfigError("no such bucket"), 2),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_a_failed_night_says_so_and_does_not_claim_success(textfile, error, code):
    with pytest.raises(type(error)):
        a_failing_night(MetricsSettings(textfile=textfile), error)
    found = values(textfile.read_text())
    assert {name for name, _ in found} == FAILED
    assert found["mgmtn_run_exit_code", ""] == code
    assert found["mgmtn_run_images", "fetch_error"] == 5
    assert found["mgmtn_run_seconds", ""] > 0


def test_the_last_success_outlives_a_failed_night(textfile):
    with reported(MetricsSettings(textfile=textfile)) as metrics:
        a_good_night(metrics)
    good = values(textfile.read_text())
    with pytest.raises(GateRefused):
        a_failing_night(MetricsSettings(textfile=textfile), GateRefused("drift"))
    bad = values(textfile.read_text())

    name = ("mgmtn_last_success_timestamp_seconds", "")
    assert bad[name] == good[name]
    assert bad["mgmtn_run_exit_code", ""] == 3
    assert bad["mgmtn_attribute_drift", "smiling"] == 0.125


def test_a_run_that_finds_the_lease_held_leaves_the_other_runs_metrics_alone(textfile):
    with reported(MetricsSettings(textfile=textfile)) as metrics:
        a_good_night(metrics)
    before = values(textfile.read_text())
    with pytest.raises(LeaseHeld), reported(MetricsSettings(textfile=textfile)):
        raise LeaseHeld("another run")
    after = values(textfile.read_text())
    assert after.pop(("mgmtn_lease_refused_timestamp_seconds", "")) == pytest.approx(time.time(), abs=60)
    assert after == before


def test_a_damaged_text_file_is_replaced(textfile, caplog):
    textfile.parent.mkdir()
    textfile.write_text('mgmtn_run_seconds{status="\n')
    with reported(MetricsSettings(textfile=textfile)) as metrics:
        a_night(metrics)
    assert values(textfile.read_text())["mgmtn_run_images", "ok"] == 55
    assert f"metrics_file_replaced path={textfile}" in caplog.text


def test_a_run_that_lasts_is_reported_meanwhile_but_not_before_it_has_a_plan(textfile):
    with reported(MetricsSettings(textfile=textfile, interval_seconds=0.02)) as metrics:
        time.sleep(0.2)
        assert not textfile.exists()  # it may be waiting for the lease of another run
        a_night(metrics)
        wait_for(textfile.exists)
        found = values(textfile.read_text())
        assert found["mgmtn_run_in_progress", ""] == 1
        assert ("mgmtn_run_exit_code", "") not in found
        metrics.count({"ok": 60})
        wait_for(lambda: values(textfile.read_text())["mgmtn_run_images", "ok"] == 60)


def wait_for(condition, *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_pushes_are_added_so_that_an_older_success_stays(gateway):
    with pytest.raises(GateRefused):
        a_failing_night(MetricsSettings(pushgateway=gateway.url), GateRefused("drift"))
    [(method, path, body)] = gateway.pushes
    assert method == "POST"  # a PUT would delete what this run does not report
    assert path == f"/metrics/job/{JOB}"
    assert names(body) == FAILED


def test_a_corpus_has_a_group_and_a_label_of_its_own(gateway):
    with reported(MetricsSettings(pushgateway=gateway.url, corpus="faces")) as metrics:
        a_good_night(metrics)
    [(_, path, body)] = gateway.pushes
    assert path == f"/metrics/job/{JOB}/corpus/faces"
    assert values(body)["mgmtn_run_images", "faces,ok"] == 55
    assert values(body)["mgmtn_snapshot_number", "faces"] == 7


def test_a_run_does_not_fail_with_a_gateway_that_refuses(gateway, caplog):
    gateway.status = 500
    with reported(MetricsSettings(pushgateway=gateway.url)) as metrics:
        a_night(metrics)
    assert f"metrics_not_reported to={gateway.url} error=HTTPError" in caplog.text


def test_a_run_does_not_fail_where_nothing_can_be_written_pushed_or_served(tmp_path, gateway, caplog):
    gateway.stop()
    (tmp_path / "file").touch()
    settings = MetricsSettings(
        pushgateway=gateway.url, textfile=tmp_path / "file" / "mgmtn.prom", port=8080, host="192.0.2.1"
    )
    with reported(settings) as metrics:
        a_night(metrics)
    for event in ("metrics_not_served port=8080", f"metrics_not_reported to={gateway.url}", "mgmtn.prom"):
        assert event in caplog.text


def port_of(caplog: pytest.LogCaptureFixture) -> str:
    [line] = [message for message in caplog.messages if "metrics_served" in message]
    return f"http://127.0.0.1:{line.rpartition('=')[2]}/metrics"


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("ending", [None, GateRefused("drift")])
def test_the_port_stays_open_until_the_end_was_scraped(caplog, ending):
    caplog.set_level(logging.INFO)
    scraped: list[str] = []

    def night() -> None:
        try:
            with reported(MetricsSettings(port=0, host="127.0.0.1", linger_seconds=60)) as metrics:
                a_night(metrics)
                scraped.append(scrape(port_of(caplog)))
                if ending:
                    raise ending
        except GateRefused:
            pass

    run = threading.Thread(target=night)
    started = time.monotonic()
    run.start()
    wait_for(lambda: scraped)
    assert values(scraped[0])["mgmtn_run_in_progress", ""] == 1
    while run.is_alive():
        with contextlib.suppress(OSError, HTTPException):
            scraped.append(scrape(port_of(caplog)))
        time.sleep(0.05)
    assert values(scraped[-1])["mgmtn_run_exit_code", ""] == (3 if ending else 0)
    assert time.monotonic() - started < 50  # it did not linger on after that


def test_nobody_waits_for_a_scrape_of_an_interrupted_run():
    with pytest.raises(KeyboardInterrupt), reported(MetricsSettings(port=0, host="127.0.0.1", linger_seconds=3000)):
        raise KeyboardInterrupt


@pytest.mark.parametrize("url", ["pushgateway:9091", "ftp://host", "http://user:secret@host:9091"])
def test_a_pushgateway_is_a_plain_url(url):
    with pytest.raises(ValueError, match=r"http:// or https:// URL|cannot be part"):
        MetricsSettings(pushgateway=url)
