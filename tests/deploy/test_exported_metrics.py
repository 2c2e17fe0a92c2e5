"""The queries of the rules and the dashboard against what the code, a real run and a real Prometheus have.

The run is two nights of a small network on a Ray of its own; its metrics must be whole when its workers are gone.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import ray.util.metrics
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.rehearsal.monitoring import RULES, Prometheus, prometheus_running
from deploy.rehearsal.processes import free_port
from jobs import demo
from jobs.data.worker_metrics import STAGES, WorkerMetrics
from jobs.run_metrics import RunMetrics
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"

# Labels that no exporter of ours sets: of scraping (PodMonitor), and of --metrics.corpus.
OUTSIDE = frozenset({"ray_io_cluster", "corpus"})

Exported = dict[str, set[str]]  # labels by the name of a sample


@dataclass(frozen=True)
class Query:
    """One expression and where it stands."""

    source: str
    expression: str

    def complaints(self, exported: Exported) -> Iterator[str]:
        """What it asks for and nobody exports."""
        metrics = {name for name in re.findall(r"\b(?:ray_)?mgmtn[\w:]*", self.expression) if ":" not in name}
        yield from (f"{self.source}: no metric {name}" for name in metrics - exported.keys())
        for metric, matchers in re.findall(r"\b((?:ray_)?mgmtn[\w:]*)\s*\{([^}]*)\}", self.expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            for label in labels - exported.get(metric, set()) - OUTSIDE:
                yield f"{self.source}: {metric} has no label {label}"
        known = OUTSIDE.union(*(exported.get(name, set()) for name in metrics))
        for group in re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", self.expression):
            labels = {label.strip() for label in group.split(",")} - {""}
            yield from (f"{self.source}: nothing has the label {label}" for label in labels - known)


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]


def panel_queries() -> list[Query]:
    """The dashboard's, as Grafana sends them with all corpora chosen."""
    return [
        Query(panel["title"], target["expr"].replace("$corpus", ".*").replace("$__rate_interval", "30s"))
        for panel in panels()
        for target in panel["targets"]
    ]


def rule_queries() -> list[Query]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [Query(rule.get("alert") or rule["record"], rule["expr"]) for group in groups for rule in group["rules"]]


def exported_by(exposition: str) -> Exported:
    families = text_string_to_metric_families(exposition)
    samples = [sample for family in families for sample in family.samples]
    exported: Exported = {}
    for sample in samples:
        exported.setdefault(sample.name, set()).update(sample.labels)
    return exported


def declared() -> Exported:
    """What the code can export at all."""
    run = RunMetrics()
    run.plan({"new": 1})
    run.snapshot(1, datetime.now(UTC), prevalence={"smiling": 0.5})
    run.drift({"smiling": 0.5}, before={"smiling": 0.25})
    run.end(0)
    failed, refused = RunMetrics(), RunMetrics()
    failed.end(1)
    refused.refuse()
    families = [family for metrics in (run, failed, refused) for family in metrics.collect()]
    exported = {family.name: set(sample.labels) for family in families for sample in family.samples}
    for metric in vars(WorkerMetrics()).values():
        name, labels = f"ray_{metric.info['name']}", set(metric.info["tag_keys"])
        exported[name] = labels
        if isinstance(metric, ray.util.metrics.Histogram):
            exported |= {f"{name}_count": labels, f"{name}_sum": labels, f"{name}_bucket": labels | {"le"}}
    return exported


@pytest.mark.parametrize("query", [*rule_queries(), *panel_queries()], ids=lambda query: query.source)
def test_queries_use_only_what_the_code_exports(query):
    assert list(query.complaints(declared())) == []


def test_a_query_of_nothing_is_noticed():
    asked = Query("wrong", 'sum by (stage) (rate(mgmtn_run_images{state="ok"}[5m])) / mgmtn_run_secs')
    assert sorted(asked.complaints({"mgmtn_run_images": {"status"}})) == [
        "wrong: mgmtn_run_images has no label state",
        "wrong: no metric mgmtn_run_secs",
        "wrong: nothing has the label stage",
    ]


def test_panels_are_told_apart_and_do_not_overlap():
    assert len({panel["title"] for panel in panels()}) == len({panel["id"] for panel in panels()}) == len(panels())
    cells = Counter(
        (x, y)
        for grid in (panel["gridPos"] for panel in panels())
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


# A driver as `mgmtn label` is one, on a Ray with a known port for metrics; it stays until its stdin closes.
NIGHTS = """
import os, sys
import ray
from jobs import label
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, _metrics_export_port=int(sys.argv[1]))
for arguments in sys.argv[2], sys.argv[3]:
    code = label.main(arguments.split("|"))
    assert code == 0, code
print("finished", flush=True)
sys.stdin.read()
"""
COPIES = 12  # of some seven photographs


@dataclass(frozen=True)
class Nights:
    """Two runs that have ended, on a Ray that still stands.

    Attributes:
        workers: what Ray exports.
        driver: what the second run reported.
        summaries: the runs' own.
        prometheus: has scraped both all the while; None where there is none.
        started: seconds since 1970.
    """

    workers: str
    driver: str
    summaries: list[dict[str, Any]]
    prometheus: Prometheus | None
    started: float


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    folder = tmp_path_factory.mktemp("nights")
    workers, driver = free_port(), free_port()
    command = [sys.executable, "-c", NIGHTS, str(workers), *_two_nights(folder, driver)]
    environment = os.environ | {
        "RAY_metrics_report_interval_ms": "1000",  # ten seconds otherwise
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    started = time.time()
    with (
        _prometheus(folder, workers=workers, driver=driver) as prometheus,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as run,
    ):
        assert run.stdin is not None
        assert run.stdout is not None
        try:
            *lines, last = iter(_until("finished", run.stdout.readline))
            assert last == "finished"
            summaries = [json.loads(line) for line in lines if line.startswith("{")]
            text = _settled(lambda: get(f"http://127.0.0.1:{workers}/metrics"), summaries)
            if prometheus is not None:
                time.sleep(3)  # it looks every second
            yield Nights(text, (folder / "mgmtn.prom").read_text(encoding="utf-8"), summaries, prometheus, started)
        finally:
            run.stdin.close()
            try:
                run.wait(timeout=60)
            except subprocess.TimeoutExpired:
                run.terminate()


def _two_nights(folder: Path, port: int) -> list[str]:
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    card = Card(name="random", kind="attributes", network=network)
    model = Checkpoint.of(MGMTN(network), card).save(folder / "model")
    photos = folder / "photos"
    demo.run(demo.DemoSettings(output=photos))
    faces = sorted(path for path in photos.iterdir() if path.name in ("astronaut.png", "collage.jpg", "cat.png"))
    # The second night must last some seconds: an increase shows only where it falls between two looks.
    for copy in range(COPIES):
        shutil.copytree(photos, folder / "copies" / str(copy))
    common = ["--output", str(folder / "labels"), "--model", str(model), "--face-workers", "1", "--model-workers", "1"]
    common += ["--max-failed-fraction", "1", "--metrics.textfile", str(folder / "mgmtn.prom")]
    common += ["--metrics.port", str(port), "--metrics.host", "127.0.0.1", "--metrics.linger-seconds", "5"]
    return ["|".join([*map(str, faces), *common]), "|".join([str(photos), str(folder / "copies"), *common])]


def _until(end: str, read: Callable[[], str]) -> Iterator[str]:
    while line := read():
        yield line.rstrip("\n")
        if line.rstrip("\n") == end:
            return


def _settled(read: Callable[[], str], summaries: list[dict[str, Any]]) -> str:
    """The workers' metrics once all images are in them, or as they are after a while."""
    images = sum(sum(summary["images"].values()) for summary in summaries)
    end = time.monotonic() + 30
    while True:
        text = read()
        done = totals(text, "ray_mgmtn_images_total", "status").total()
        written = totals(text, "ray_mgmtn_stage_seconds_count", "stage")["write"]
        if min(done, written) >= images or time.monotonic() > end:
            return text
        time.sleep(0.5)


@contextmanager
def _prometheus(folder: Path, *, workers: int, driver: int) -> Iterator[Prometheus | None]:
    """One that scrapes both ports; None where it is not installed."""
    if shutil.which("prometheus") is None:
        yield None
        return
    targets = {"ray": [f"127.0.0.1:{workers}"], "runs": [f"127.0.0.1:{driver}"]}
    with prometheus_running(folder, environment=os.environ, **targets) as prometheus:
        yield prometheus


def totals(exposition: str, name: str, label: str) -> Counter[str]:
    """The samples of one name, added up over workers, by the value of a label; zeros left out."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == name and sample.value:
                counts[sample.labels.get(label, "")] += int(sample.value)
    return counts


@pytest.mark.integration
def test_every_image_and_face_of_a_short_run_is_in_the_workers_metrics(nights):
    images: Counter[str] = Counter()
    for summary in nights.summaries:
        images.update(summary["images"])
    assert len(nights.summaries) == 2
    assert totals(nights.workers, "ray_mgmtn_images_total", "status") == images
    faces = sum(summary["faces"] for summary in nights.summaries)
    assert totals(nights.workers, "ray_mgmtn_faces_total", "status").total() == faces
    passed = totals(nights.workers, "ray_mgmtn_stage_seconds_count", "stage")
    assert set(passed) == set(STAGES)
    assert {passed[stage] for stage in ("fetch", "model", "write")} == {images.total()}
    assert totals(nights.workers, "ray_mgmtn_bytes_read_total", "").total() > 0


@pytest.mark.integration
def test_the_driver_reports_the_run_that_it_has_ended(nights):
    summary = nights.summaries[-1]
    assert totals(nights.driver, "mgmtn_run_images", "status") == summary["images"]
    assert totals(nights.driver, "mgmtn_snapshot_number", "") == {"": summary["snapshot"]} == {"": 2}
    planned = totals(nights.driver, "mgmtn_run_planned", "reason")
    assert planned == {reason: count for reason, count in summary["planned"].items() if count}
    samples = [sample for family in text_string_to_metric_families(nights.driver) for sample in family.samples]
    for name in ("mgmtn_attribute_prevalence", "mgmtn_attribute_drift"):
        assert [sample.labels["attribute"] for sample in samples if sample.name == name] == list(ATTRIBUTES)


@pytest.mark.integration
def test_queries_use_only_what_a_real_run_exports(nights):
    exported = exported_by(nights.workers) | exported_by(nights.driver)
    # Only a run that fails or finds the lease held says so.
    exported |= {f"mgmtn_{event}_timestamp_seconds": set() for event in ("last_failure", "lease_refused")}
    complaints = [text for query in (*rule_queries(), *panel_queries()) for text in query.complaints(exported)]
    assert complaints == []


@pytest.fixture(scope="module")
def ask(nights: Nights) -> Callable[..., Any]:
    """`ask(path, **parameters)`: the data of an answer of the real Prometheus."""
    if nights.prometheus is None:
        pytest.skip("prometheus, of Debian's package of that name, is not on this machine")
    return nights.prometheus.ask


@pytest.mark.integration
def test_no_panel_is_empty_in_a_real_prometheus(nights, ask):
    window = {"start": nights.started, "end": time.time(), "step": 1}
    answers = {query: ask("query_range", query=query.expression, **window)["result"] for query in panel_queries()}
    assert [query.source for query, series in answers.items() if not series] == []
    rates = [series for query, series in answers.items() if query.source == "Images and faces by the workers"]
    assert all(any(float(value) > 0 for each in series for _, value in each["values"]) for series in rates)


@pytest.mark.integration
def test_a_real_prometheus_evaluates_every_rule_and_sees_nothing_wrong_with_good_nights(ask):
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {query.source for query in rule_queries()}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [alert["labels"] for alert in ask("alerts")["alerts"] if alert["state"] == "firing"] == []
