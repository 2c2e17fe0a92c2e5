"""Start servers, wait until they answer, and leave none behind.

Each gets a session of its own, so that Ctrl-C reaches the program that started it alone, and that program ends it.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = Path(__file__).parents[2]
MARK: Final = "MARK_OF_REHEARSAL"  # variable of the environment, which children inherit


class NotRunning(Exception):
    """A server is not installed, has ended, or does not answer; the message says which, and why."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes to the end of a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            env=dict(environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that descend from it, the eldest first; empty once it is gone."""
    try:
        eldest = psutil.Process(process.pid)
        return [eldest, *eldest.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def lose(process: subprocess.Popen[bytes]) -> None:
    """Everything that descends from a process dies at once, as when its machine does."""
    for each in family(process):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait(60)


@contextmanager
def running(
    command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path, url: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, once it answers at a URL; it dies in the end.

    Raises:
        NotRunning: it does not answer within a minute.
    """
    server = start(command, environment=environment, log=log)
    try:
        wait_until(lambda: answers(url), server, log=log, seconds=60)
        yield server
    finally:
        lose(server)


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a server answers, and not with a failure of its own."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], *, log: Path, seconds: float) -> None:
    """Wait for a condition, as long as a process lives.

    Raises:
        NotRunning: with the end of the log.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process.poll()
        if ended is not None or time.monotonic() > deadline:
            why = f"ended with {ended}" if ended is not None else f"is not ready after {seconds:g} s"
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise NotRunning(f"{Path(str(process.args[0])).name} {why}: {tail}")  # type: ignore[index]
        time.sleep(0.2)


@contextmanager
def marked(mark: str) -> Iterator[dict[str, str]]:
    """An environment for children; whoever still has it in the end is killed: orphans of nodes that died too.

    It is this process's, without the variables that would change how mgmtn and Ray behave, and with its Python first.
    """
    changing = ("RAY_A", "MGMTN_", "AWS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(changing)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # as the image has it
    try:
        yield environment | {MARK: mark}
    finally:
        while left := having(mark):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=10)


def having(mark: str) -> list[psutil.Process]:
    """The processes of this machine, zombies and this one excepted, whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]
