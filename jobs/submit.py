"""Run a command of mgmtn on a Ray cluster: `mgmtn submit label s3://photos/ --output s3://labels/faces --address URL`.

What follows the name of the command is the command's own, except this program's settings below, which may stand
anywhere (--config, --verbose and --help before the name). The cluster's machines have mgmtn installed, as the container
image does; nothing is uploaded unless --working-dir says so.

The job's log goes to stderr; stdout has the job's id, then its summary; the exit code is the job's. The id is derived
from the command and --key: a job that runs or has succeeded is followed, not started again, and one that failed or was
stopped gets another attempt. On a cluster with token authentication set RAY_AUTH_TOKEN.
"""

import asyncio
import hashlib
import importlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import requests
from pydantic import DirectoryPath, Field
from pydantic_settings import CliPositionalArg
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.following import POLL_SECONDS, JobEnded, PatientClient, exit_code_of_job, follow, stop
from jobs.settings import Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

ADDRESSES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ONLY_BEFORE: Final = frozenset(("--config", "--verbose", "--help", "-h"))  # the job has its own
SWITCHES: Final = frozenset(("--wait", "--no-wait", "--verbose", "--no-verbose", "--help", "-h"))


class SubmitSettings(Settings):
    """Settings of `mgmtn submit`."""

    job: CliPositionalArg[str] = Field(description="a command of mgmtn; its own arguments follow it")
    address: str | None = Field(
        None, description="URL of the cluster's dashboard, http://HOST:8265 (else RAY_API_SERVER_ADDRESS, RAY_ADDRESS)"
    )
    key: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,40}$",
        description="what tells this work from the same command at another time; unset: today's date (UTC)",
    )
    wait: bool = Field(True, description="follow the job to its end")
    on_interrupt: Literal["cancel", "leave"] = Field("cancel", description="what becomes of the job on Ctrl-C")
    patience: float = Field(300.0, ge=0, description="seconds that the cluster may be out of reach while waiting")
    working_dir: DirectoryPath | None = Field(
        None, description="folder to upload and run the job in; its jobs/ and mgmtn/ come before the installed ones"
    )
    exclude: tuple[str, ...] = Field(
        (".git/", ".venv/", "build/", "runs/", "demo/"),
        description="patterns, as of .gitignore, of what in --working-dir stays here",
    )


def run(settings: SubmitSettings, arguments: Sequence[str] = ()) -> Mapping[str, Any] | None:
    """Start the job, or find it, and follow it.

    Returns:
        The job's summary; None where it has none, or was not waited for.

    Raises:
        ConfigError: no such command, or no cluster that lets us in.
        JobEnded: the job did not succeed.
        ContactLost: the cluster is gone.
    """
    _check_job(settings.job)
    entrypoint = shlex.join(("python", "-m", f"jobs.{settings.job}", *arguments))
    client = connect(settings.address)
    job_id = find_or_start(client, entrypoint, settings)
    print(job_id, flush=True)
    if not settings.wait:
        return None
    try:
        job, shown = asyncio.run(follow(client, job_id, patience=settings.patience))
    except KeyboardInterrupt:
        if settings.on_interrupt == "leave":
            log.warning("event=left_running job=%s", job_id)
            raise
        raise stop(client, job_id) from None
    code = exit_code_of_job(job)
    if code:
        text = f"job {job_id} {job.status.lower()}, exit code {code}: {_last_line(job.message or '')}"
        raise JobEnded(text, exit_code=code, summary=shown.summary)
    return shown.summary


def _check_job(name: str) -> None:
    # By its name, when asked: the list of commands is the command line's, and no program imports another.
    commands = importlib.import_module("jobs.cli").COMMANDS
    if name not in commands or name == "submit":
        others = ", ".join(sorted(set(commands) - {"submit"}))
        raise ConfigError(f"JOB {name!r}: not a command that a cluster can run; those are {others}")


def _last_line(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster.

    Raises:
        ConfigError: there is no address, nobody answers there, or the token is missing or wrong.
    """
    address = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)
    if address is None:
        raise ConfigError(f"--address: required; or set {' or '.join(ADDRESSES)}")
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(f"--address {address!r}: the URL of the dashboard is wanted, such as http://HOST:8265")
    os.environ[ADDRESSES[0]] = address  # Ray lets the environment override the argument
    try:
        return PatientClient(address, headers=_token_header())
    except AuthenticationError as error:
        raise ConfigError(f"--address {address!r}: not let in; set RAY_AUTH_TOKEN to the cluster's token") from error
    except (ConnectionError, requests.RequestException, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {address!r}: no Ray dashboard answers there: {error}") from error


def _token_header() -> dict[str, str]:
    """Ray's client sends a token only where RAY_AUTH_MODE=token too, which is easily forgotten.

    Raises:
        ConfigError: the file of the token cannot be read.
    """
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path!r} cannot be read: {error}") from error
    return {"Authorization": f"Bearer {token}"} if token else {}


def find_or_start(client: JobSubmissionClient, entrypoint: str, settings: SubmitSettings) -> str:
    """The id of the job, which runs, or has succeeded, or was started just now."""
    key = settings.key or f"{datetime.now(UTC):%Y-%m-%d}"
    first = submission_id(entrypoint, key)
    known = {job.submission_id: job.status for job in client.list_jobs()}
    job_id, attempt = first, 1
    while known.get(job_id) in (JobStatus.FAILED, JobStatus.STOPPED):
        attempt += 1
        job_id = f"{first}-{attempt}"
    if job_id in known:
        log.info("event=attached job=%s status=%s", job_id, known[job_id])
        return job_id
    try:
        _start(
            client,
            patience=settings.patience,
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env=runtime_environment(settings),
            metadata={"mgmtn_key": key, "mgmtn_attempt": str(attempt)},
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise ConfigError(f"the cluster refuses the job: {error}") from error
        log.info("event=attached job=%s", job_id)  # somebody asked for the same at the same moment
    else:
        log.info("event=submitted job=%s entrypoint=%r", job_id, entrypoint)
    return job_id


def _start(client: JobSubmissionClient, *, patience: float, **job: Any) -> None:
    """Submit; the dashboard of a cluster that has just started answers before it can start jobs, and says so."""
    deadline = time.monotonic() + patience
    while True:
        try:
            client.submit_job(**job)
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() >= deadline:
                raise
            log.info("event=waiting_for_cluster reason=%r", str(error))
            time.sleep(POLL_SECONDS)
        else:
            return


def submission_id(entrypoint: str, key: str) -> str:
    """`label-2026-03-01-5f0e...`: the same for the same command and key, and no other."""
    digest = hashlib.sha256(f"{key}\0{entrypoint}".encode()).hexdigest()[:12]
    return f"{shlex.split(entrypoint)[2].removeprefix('jobs.')}-{key}-{digest}"


def runtime_environment(settings: SubmitSettings) -> dict[str, Any]:
    """Nothing, or the folder to upload."""
    if settings.working_dir is None:
        return {}
    return {"working_dir": str(settings.working_dir.resolve()), "excludes": list(settings.exclude)}


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the job's: its name and all that follows, less what is ours.

    After `--` everything is the job's.
    """
    flags = {f"--{name.replace('_', '-')}" for name in SubmitSettings.model_fields if name != "job"} | SWITCHES
    own: list[str] = []
    job: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0]
        if word == "--":
            return own, job + words
        if flag not in flags - (ONLY_BEFORE if job else frozenset()) and (job or not word.startswith("-")):
            job.append(word)
            continue
        own.append(word)
        if word in flags - SWITCHES and words:
            own.append(words.pop(0))
    return own, job


def main(argv: Sequence[str] | None = None) -> int:
    own, job = split_arguments(sys.argv[1:] if argv is None else argv)
    return run_program(
        SubmitSettings,
        lambda settings: run(settings, job[1:]),
        [*own, *job[:1]],
        prog="mgmtn submit",
        description=__doc__ or "",
    )


if __name__ == "__main__":
    sys.exit(main())
