"""Prometheus with the project's rules, and a Pushgateway: Debian's packages prometheus and prometheus-pushgateway."""

import json
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from deploy.rehearsal.processes import ROOT, NotRunning, free_port, running

RULES: Final = ROOT / "deploy" / "prometheus" / "rules.yaml"


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.started = time.time()

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def values(self, expression: str, *, label: str = "", at: float | None = None) -> dict[str, float]:
        """The values of an expression by a label, at a time (seconds since 1970) or now.

        `[WINDOW]` in it is the time since Prometheus started.
        """
        at = at or time.time()
        window = f"[{max(1, round(at - self.started))}s]"
        found = self.ask("query", query=expression.replace("[WINDOW]", window), time=at)["result"]
        return {series["metric"].get(label, ""): float(series["value"][1]) for series in found}

    def fired(self, *, since: float, until: float) -> set[str]:
        """The names of the alerts that fired at some moment between two times."""
        window = f"{max(1, round(until - since))}s"
        expression = f'count by (alertname) (last_over_time(ALERTS{{alertstate="firing"}}[{window}]))'
        return set(self.values(expression, label="alertname", at=until))


@contextmanager
def prometheus_running(
    folder: Path, *, environment: Mapping[str, str], ray: Sequence[str], runs: Sequence[str]
) -> Iterator[Prometheus]:
    """A Prometheus that looks at everything each second.

    Args:
        folder: for its settings, log and data.
        environment: of its process.
        ray: host:port of each Ray node's metrics.
        runs: host:port of drivers, and of a Pushgateway.

    Raises:
        NotRunning: it is not installed, or does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NotRunning("prometheus, of Debian's package of that name, is not on this machine")
    labels = {"ray_io_cluster": "rehearsal"}  # as k8s/base/podmonitor.yaml sets it
    jobs = [
        {"job_name": "ray", "static_configs": [{"targets": list(ray), "labels": labels}]},
        {"job_name": "mgmtn", "honor_labels": True, "static_configs": [{"targets": list(runs)}]},
    ]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}"]
    with running(command, environment=environment, log=folder / "prometheus.log", url=f"{url}/-/ready"):
        yield Prometheus(url)


@contextmanager
def pushgateway_running(folder: Path, *, environment: Mapping[str, str]) -> Iterator[str | None]:
    """host:port of a Pushgateway; None where it is not installed."""
    program = shutil.which("prometheus-pushgateway")
    if program is None:
        yield None
        return
    address = f"127.0.0.1:{free_port()}"
    # Debian's default file would bring back what an earlier one was told.
    command = [program, f"--web.listen-address={address}", f"--persistence.file={folder / 'pushgateway.data'}"]
    log = folder / "pushgateway.log"
    with running(command, environment=environment, log=log, url=f"http://{address}/-/ready"):
        yield address
