"""Nights as the CronJob starts them: the RayJob's own command, by `mgmtn submit`."""

import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from deploy.rehearsal.cluster import Cluster, Node
from deploy.rehearsal.monitoring import Prometheus
from deploy.rehearsal.processes import ROOT, free_port, lose

log = logging.getLogger(__name__)

RAYJOB: Final = ROOT / "k8s" / "overlays" / "nightly" / "rayjob.yaml"
NIGHT_SECONDS: Final = 600
# The manifest's cluster has 32 CPUs and a million pictures. Here each node has room for all processes, as the
# manifest's nodes have once a new one has come, and few pictures are steps enough to lose a node between two of them.
SMALL: Final = ("--face-workers", "2", "--model-workers", "2", "--images-per-block", "4", "--batch-size", "8")


@dataclass(frozen=True)
class Command:
    """What the RayJob runs, `python -m jobs.label PHOTOS --output LABELS ...`, with a port of this machine.

    Attributes:
        photos: where the pictures are.
        labels: the table.
        flags: all the others, those that say where metrics go excepted.
        metrics: host:port of the driver's metrics.
    """

    photos: str
    labels: str
    flags: tuple[str, ...]
    metrics: str

    @classmethod
    def of_the_rayjob(cls) -> "Command":
        entrypoint = yaml.safe_load(RAYJOB.read_text(encoding="utf-8"))["spec"]["entrypoint"]
        _, _, program, photos, output, labels, *flags = shlex.split(entrypoint)
        assert (program, output) == ("jobs.label", "--output")
        port = flags.index("--metrics.port")
        return cls(photos, labels, (*flags[:port], *flags[port + 2 :], *SMALL), f"127.0.0.1:{free_port()}")

    def words(self, *, photos: str | None = None, pushgateway: str | None = None) -> list[str]:
        """The words after `mgmtn`: of the night itself, or of one with other pictures, or that pushes its metrics."""
        host, _, port = self.metrics.partition(":")
        served = ("--metrics.port", port, "--metrics.host", host)
        pushed = ("--metrics.pushgateway", f"http://{pushgateway}")
        metrics = pushed if pushgateway else served
        return ["label", photos or self.photos, "--output", self.labels, *self.flags, *metrics]


@dataclass(frozen=True)
class Night:
    """A run that has ended.

    Attributes:
        name: of the night, and of the job.
        log: the file.
        exit_code: of `mgmtn submit`.
        summary: the last line of its stdout; empty if there is none.
        started: seconds since 1970, as `ended`.
    """

    name: str
    log: str
    exit_code: int
    summary: dict[str, Any]
    started: float
    ended: float


def night(
    words: Sequence[str],
    *,
    name: str,
    cluster: Cluster,
    folder: Path,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda submitted: None,
) -> Night:
    """Submit a job and follow it to its end; logs go to the folder.

    Args:
        words: the command and its arguments.
        name: key of the job, which tells the nights apart.
        meanwhile: what is done while it runs.
    """
    command = [sys.executable, "-m", "jobs.submit", *words, "--key", name]
    return _ended(command, name=name, environment=cluster.environment, folder=folder, meanwhile=meanwhile)


def run_alone(words: Sequence[str], *, name: str, environment: Mapping[str, str], folder: Path) -> Night:
    """The same on this machine, on a Ray that lives as long as the command."""
    command = [sys.executable, "-m", "jobs.cli", *words]
    return _ended(command, name=name, environment=environment, folder=folder, meanwhile=lambda process: None)


def _ended(
    command: Sequence[str],
    *,
    name: str,
    environment: Mapping[str, str],
    folder: Path,
    meanwhile: Callable[[subprocess.Popen[bytes]], None],
) -> Night:
    log.info("event=started night=%s", name)
    started, output, said = time.time(), folder / f"{name}.out", folder / f"{name}.log"
    with output.open("wb") as stdout, said.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            meanwhile(process)
            code = process.wait(NIGHT_SECONDS)
        finally:
            lose(process)
    log.info("event=ended night=%s exit_code=%d seconds=%.0f", name, code, time.time() - started)
    lines = output.read_text(encoding="utf-8").splitlines()
    summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Night(name, str(said), code, summary, started, time.time())


class NodeLoss:
    """The loss of a node in the midst of a run.

    Attributes:
        workers: titles of the run's processes that died with it; empty if no node was lost.
        done: images that the run had done then.
    """

    def __init__(self, cluster: Cluster, prometheus: Prometheus, *, after: int) -> None:
        """
        Args:
            cluster: of whose nodes one is lost; not the head, on which the driver is.
            prometheus: says how far the run is.
            after: how many images the run has done when it happens.
        """
        self._cluster, self._prometheus, self._after = cluster, prometheus, after
        self.workers: list[str] = []
        self.done = 0

    def __call__(self, submitted: subprocess.Popen[bytes]) -> None:
        """Wait for the moment, and do it."""
        progress = "sum(mgmtn_run_images) and on () max(mgmtn_run_in_progress) == 1"
        while submitted.poll() is None:
            self.done = int(self._prometheus.values(progress).get("", 0))
            if self.done >= self._after:
                node = max(self._cluster.nodes, key=_work)
                self.workers = node.workers("MapBatches")
                lose(node.process)
                log.info("event=node_lost done=%d workers=%s", self.done, self.workers)
                return
            time.sleep(0.2)


def _work(node: Node) -> int:
    return len(node.workers("MapBatches"))
