"""Rehearse two nights on one machine: `python -m deploy.rehearsal --output DIR`, or `make rehearsal`.

A real S3 server (OpenStack Swift where it can be started, else moto's), a Ray cluster of three nodes with dashboard and
tokens, and Prometheus with the project's rules. The nights are the RayJob's own command (`k8s/overlays/nightly`),
submitted by `mgmtn submit`; between them pictures are added, replaced and deleted, and in the midst of the second a
node is lost. A third night is given a place without pictures and must fail. Then the table, the metrics and the alerts
are checked; exit code 0 means that all is as it should be. DIR has `rehearsal.json` and every log.

Prometheus must be installed (Debian's `prometheus`); a Pushgateway is used where it is.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from deploy.rehearsal.checks import FAILED_NIGHT_ALERT, Evidence, checked
from deploy.rehearsal.cluster import Cluster, ray_running
from deploy.rehearsal.monitoring import Prometheus, prometheus_running, pushgateway_running
from deploy.rehearsal.nights import SMALL, Command, Night, NodeLoss, night, run_alone
from deploy.rehearsal.pictures import Pictures
from deploy.rehearsal.processes import NotRunning, marked
from deploy.rehearsal.store import s3_running
from deploy.rehearsal.tables import Table
from jobs.data.lease import ending_on_sigterm
from jobs.data.s3_store import split
from jobs.outcomes import Refused
from jobs.settings import Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

PICTURES: Final = 40
NEW, REPLACED, DELETED = 100, 10, 5
MARK: Final = ".rehearsal"
TORN: Final = 15  # the number of a picture that cannot be read
# Ray's own are ten seconds: Prometheus sees what a node has counted shortly before it is lost.
RAY: Final = {"RAY_metrics_report_interval_ms": "1000", "RAY_worker_niceness": "0"}


class RehearsalSettings(Settings):
    """Settings of the rehearsal."""

    output: Path = Field(description="folder for the report, the logs and the tables; what an earlier one left goes")


class RehearsalFailed(Refused):
    """Something is not as it should be, or could not be tried."""

    exit_code = 1


def run(settings: RehearsalSettings) -> dict[str, Any]:
    """Rehearse, print each check, and write the report.

    Raises:
        ConfigError: the output folder holds something else than a rehearsal's.
        RehearsalFailed: a check does not hold, or a server does not start.
    """
    started = time.monotonic()
    folder = emptied(settings.output.resolve())
    try:
        with ending_on_sigterm(), everything_running(folder) as stage:
            evidence = go_through(stage)
            checks = checked(evidence)
    except NotRunning as error:
        raise RehearsalFailed(str(error)) from error
    print(*checks, sep="\n", flush=True)
    failed = [check.name for check in checks if check.wrong]
    summary = {"checks": len(checks), "failed": failed, "seconds": round(time.monotonic() - started, 1)}
    nights = {name: asdict(getattr(evidence, name)) for name in ("first", "second", "third", "fresh")}
    loss = {"done": evidence.loss.done, "workers": evidence.loss.workers}
    report = summary | {"checks": [asdict(check) for check in checks], "nights": nights, "lost": loss}
    (folder / "rehearsal.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise RehearsalFailed(f"{len(failed)} of {len(checks)} checks failed", summary=summary)
    return summary


def emptied(folder: Path) -> Path:
    """Make a folder anew; only an empty one or an earlier rehearsal's, which its mark tells, is cleared.

    Raises:
        ConfigError: it holds anything else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ConfigError(f"output: {str(folder)!r} is not empty, and not an earlier rehearsal's: it is left alone")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return folder


@dataclass(frozen=True)
class Stage:
    """What stands while the nights go by.

    Attributes:
        folder: for logs and tables.
        environment: of somebody with access to the store, and to no cluster.
        command: the nights'.
        pushgateway: host:port; None where there is none.
    """

    folder: Path
    environment: dict[str, str]
    command: Command
    pictures: Pictures
    cluster: Cluster
    prometheus: Prometheus
    pushgateway: str | None


@contextmanager
def everything_running(folder: Path) -> Iterator[Stage]:
    """Store, cluster, Prometheus and empty buckets; nothing of it is left in the end.

    Raises:
        NotRunning: a server does not start.
    """
    command = Command.of_the_rayjob()
    with ExitStack() as stack:
        plain = stack.enter_context(marked(str(folder))) | RAY | {"MGMTN_CACHE": str(folder / "cache")}
        store = stack.enter_context(s3_running(folder, environment=plain))
        environment = plain | store.variables
        pictures = Pictures(command.photos, photographs=folder / "photographs", variables=store.variables)
        pictures.client.create_bucket(Bucket=split(command.labels)[0])
        cluster = stack.enter_context(ray_running(folder, environment=environment, cpus=(2, 2)))
        gateway = stack.enter_context(pushgateway_running(folder, environment=plain))
        nodes = [f"127.0.0.1:{node.metrics_port}" for node in (cluster.head, *cluster.nodes)]
        runs = [command.metrics, *([gateway] if gateway else [])]
        prometheus = stack.enter_context(prometheus_running(folder, environment=plain, ray=nodes, runs=runs))
        log.info("event=running store=%s nodes=%d prometheus=1 pushgateway=%d", store.name, len(nodes), bool(gateway))
        yield Stage(folder, environment, command, pictures, cluster, prometheus, gateway)


def go_through(stage: Stage) -> Evidence:
    """The nights, and what is there to see after them.

    Raises:
        RehearsalFailed: one of the first two failed.
    """
    pictures, command, prometheus = stage.pictures, stage.command, stage.prometheus
    submitted = partial(night, cluster=stage.cluster, folder=stage.folder)
    pictures.put(range(PICTURES))
    pictures.tear(TORN)
    first = published(submitted(command.words(), name="night-1"))
    # The workers' last counts come a second or two after the run.
    expected = sum(first.summary["images"].values())
    await_true(lambda: sum(prometheus.values("sum(ray_mgmtn_images_total)").values()) >= expected)

    pictures.put(range(PICTURES, PICTURES + NEW))
    pictures.put(range(REPLACED), version=1)
    before = frozenset(pictures.uris)
    pictures.delete(range(PICTURES - DELETED, PICTURES))
    loss = NodeLoss(stage.cluster, prometheus, after=10)
    second = published(submitted(command.words(), name="night-2", meanwhile=loss))
    # One machine, no cluster: the same faces by another way.
    alone = ["label", command.photos, "--output", str(stage.folder / "fresh"), *SMALL, "--cluster.num-cpus", "2"]
    fresh = run_alone(alone, name="fresh", environment=stage.environment, folder=stage.folder)

    # A prefix that exists, and has no pictures: the gate must not believe that all are gone.
    moved = command.photos.rstrip("/") + "-moved/"
    pictures.client.put_object(Bucket=pictures.bucket, Key=split(moved)[1] + "README", Body=b"They have moved.")
    words = command.words(photos=moved, pushgateway=stage.pushgateway)
    third = submitted(words, name="night-3")
    await_true(lambda: bool(prometheus.values(f'ALERTS{{alertname="{FAILED_NIGHT_ALERT}",alertstate="firing"}}')))

    table = Table(command.labels, environment=stage.environment, client=pictures.client)
    fresh_table = Table(str(stage.folder / "fresh"), environment=stage.environment, client=pictures.client)
    return Evidence(
        first=first,
        second=second,
        third=third,
        fresh=fresh,
        planned_first={"new": PICTURES},
        planned_second={"new": NEW, "changed": REPLACED, "deleted": DELETED},
        loss=loss,
        uris=frozenset(pictures.uris),
        gone=before - pictures.uris,
        history=table.history(),
        parents=table.parents(),
        rows=table.rows(stage.folder / "files"),
        fresh_rows=fresh_table.rows(stage.folder / "fresh-files"),
        prometheus=prometheus,
    )


def published(one: Night) -> Night:
    """A night without which there is nothing more to look at.

    Raises:
        RehearsalFailed: it failed.
    """
    if one.exit_code:
        raise RehearsalFailed(f"{one.name} ended with {one.exit_code}; its log has the reason: {one.log}")
    return one


def await_true(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    """Wait for what a check asks for later: it fails there if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> int:
    logging.getLogger("deploy").setLevel(logging.INFO)
    return run_program(RehearsalSettings, run, argv, prog="python -m deploy.rehearsal", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
