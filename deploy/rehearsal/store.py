"""A real S3 server on this machine: OpenStack Swift where it can be started, else moto's."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.rehearsal.processes import ROOT, NotRunning, free_port, running

log = logging.getLogger(__name__)

SWIFT_SCRIPT: Final = (ROOT / ".." / "shared" / "s3" / "swift-aio" / "start.sh").resolve()
SWIFT_PORTS: Final = (5106, 6200, 6201, 6202, 11311)  # fixed by its configuration: one Swift at a time on a machine


@dataclass(frozen=True)
class S3Endpoint:
    """An S3 server. `variables` are boto3's, to reach it."""

    name: str
    url: str | None
    variables: dict[str, str]


def endpoint(name: str, url: str, access_key: str, secret: str) -> S3Endpoint:
    variables = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return S3Endpoint(name, url, variables)


@contextmanager
def s3_running(folder: Path, *, environment: Mapping[str, str]) -> Iterator[S3Endpoint]:
    """An S3 server with nothing in it; its logs go to the folder."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(swift_running(ROOT / "build" / "swift", environment=environment))
        except NotRunning as reason:
            log.info("event=moto_instead reason=%r", str(reason))
            server = stack.enter_context(_moto_running(folder / "moto.log", environment=environment))
        yield server


@contextmanager
def _moto_running(output: Path, *, environment: Mapping[str, str]) -> Iterator[S3Endpoint]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, environment=environment, log=output, url=url):
        yield endpoint("moto", url, "rehearsal", "rehearsal")


@contextmanager
def swift_running(folder: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[S3Endpoint]:
    """OpenStack Swift, with nothing in it.

    Raises:
        NotRunning: it cannot run here; the message says why.
    """
    _check_swift()
    # The objects of an earlier start go; `venv` and the rings of `etc` stay, which take a minute to make.
    shutil.rmtree(folder / "dev", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "start.log").open("w") as output:
        command = ["bash", str(SWIFT_SCRIPT), str(folder)]
        starting = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        if starting.wait():
            shutil.rmtree(folder / "etc", ignore_errors=True)
            raise NotRunning(f"OpenStack Swift did not start: {(folder / 'start.log').read_text()[-500:]}")
        yield endpoint("swift", f"http://127.0.0.1:{SWIFT_PORTS[0]}", "test:tester", "testing")
    finally:
        # Script and servers are one process group.
        with suppress(ProcessLookupError):
            os.killpg(starting.pid, signal.SIGTERM)


def _check_swift() -> None:
    if not SWIFT_SCRIPT.is_file():
        raise NotRunning("the script that starts OpenStack Swift, ../shared/s3/swift-aio, is not on this machine")
    if shutil.which("memcached") is None:
        raise NotRunning("OpenStack Swift needs memcached and liberasurecode1: apt-get install")
    for port in SWIFT_PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise NotRunning(f"OpenStack Swift cannot start: port {port} is in use")
