"""A Ray cluster of several nodes on this machine, with token authentication, as the manifests have it."""

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from deploy.rehearsal.processes import NotRunning, answers, family, free_port, lose, start, wait_until

NODE_SECONDS: Final = 180
# Ray starts an agent for each node on fixed ports, which are another node's on the same machine.
PORTS: Final = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")


@dataclass(frozen=True)
class Node:
    """One `ray start`.

    Attributes:
        process: ends with its node.
        metrics_port: where Ray exports the metrics of the node's workers.
    """

    process: subprocess.Popen[bytes]
    metrics_port: int

    def workers(self, title: str) -> list[str]:
        """The titles of its worker processes that hold some words: `ray::MapBatches(FindFaces)`."""
        titles = (_title(process) for process in family(self.process))
        return [each for each in titles if each.startswith("ray::") and title in each]


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        environment: of somebody who may use it: a driver, or who submits a job.
        head: the node without work.
        nodes: the others.
    """

    environment: dict[str, str]
    head: Node
    nodes: list[Node]


@contextmanager
def ray_running(
    folder: Path,
    *,
    environment: Mapping[str, str],
    cpus: Sequence[int],
    head_cpus: int = 0,
    dashboard: bool = True,
) -> Iterator[Cluster]:
    """A head, and a node for each number of CPUs.

    Args:
        folder: for their logs.
        environment: of the nodes, and so of drivers and workers.
        cpus: of the nodes, one or more each.
        head_cpus: 0: only drivers run on the head.
        dashboard: with the interface that jobs are submitted to.

    Raises:
        NotRunning: a node did not start, twice.
    """
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: the paths of its sockets are limited
    token, port, url_port = secrets.token_hex(32), free_port(), free_port()
    environment = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    head_flags = ["--head", f"--num-cpus={head_cpus}", f"--port={port}", f"--temp-dir={temporary}"]
    head_flags += ["--dashboard-host=127.0.0.1", f"--dashboard-port={url_port}", f"--include-dashboard={dashboard}"]
    started: list[Node] = []
    try:
        started.append(_start(head_flags, environment=environment, log=folder / "ray-head.log"))
        for number, count in enumerate(cpus, start=1):  # one after the other: two that start at once may collide
            flags = [f"--address=127.0.0.1:{port}", f"--num-cpus={count}"]
            started.append(_start(flags, environment=environment, log=folder / f"ray-node-{number}.log"))
        environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        if dashboard:
            environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{url_port}"
            jobs, header = f"http://127.0.0.1:{url_port}/api/jobs/", {"Authorization": f"Bearer {token}"}
            log = folder / "ray-head.log"
            wait_until(lambda: answers(jobs, header), started[0].process, log=log, seconds=NODE_SECONDS)
        yield Cluster(environment, started[0], started[1:])
    finally:
        for node in reversed(started):  # not `ray stop`, which ends every cluster of the machine
            lose(node.process)
        shutil.rmtree(temporary, ignore_errors=True)


def _start(flags: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Node:
    try:
        return _start_once(flags, environment=environment, log=log)
    except NotRunning:  # on a machine with much to do Ray gives its own parts up after 30 s
        return _start_once(flags, environment=environment, log=log)


def _start_once(flags: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Node:
    ports = {name: free_port() for name in PORTS}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *flags]
    command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    log.write_bytes(b"")
    process = start([*command, *(f"--{name}={port}" for name, port in ports.items())], environment=environment, log=log)
    try:
        wait_until(lambda: b"Ray runtime started" in log.read_bytes(), process, log=log, seconds=NODE_SECONDS)
    except BaseException:
        lose(process)
        raise
    return Node(process, ports["metrics-export-port"])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()  # Ray fills a title up with spaces
    except psutil.Error:
        return ""
