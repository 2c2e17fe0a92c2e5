"""Follow a job of a Ray cluster to its end: its log as it grows, the summary in it, and the exit code that it had.

Ray's own `ray job logs` and `ray job status` end with 0 when the job has failed, and a log stream that breaks looks to
them like the job's end. Here the job's status alone says that it has ended, and a broken stream is taken up again where
it broke.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.outcomes import EXIT_INTERRUPTED, Refused

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
REQUEST_SECONDS: Final = 60.0  # a request that takes longer is lost
TAIL_SECONDS: Final = 5.0  # what a log stream has after the job's end to deliver the rest
STOP_SECONDS: Final = 30.0  # what a job has to end once it is told to
EXIT_TERMINATED: Final = 143  # what a shell says of a process that SIGTERM ended, as Ray ends a job
UNREACHABLE: Final = (ConnectionError, RuntimeError, requests.RequestException, aiohttp.ClientError, TimeoutError)

T = TypeVar("T")


class JobEnded(Refused):
    """The job did not succeed; the exit code is its own."""

    def __init__(self, message: str, *, exit_code: int, summary: dict[str, Any] | None) -> None:
        super().__init__(message, summary=summary)
        self.exit_code = exit_code


class ContactLost(Refused):
    """The cluster stopped to answer; what became of the job is unknown."""

    exit_code = 1


class PatientClient(JobSubmissionClient):
    """Ray's client, whose requests would wait for ever where a connection dies without a word."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **({"timeout": REQUEST_SECONDS} | kwargs))


class JobLog:
    """The log of a job, shown on stderr as it comes; what is delivered twice is shown once.

    Ray keeps stdout and stderr of a job in one file, so the summary is the last line that is a JSON object.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] | None = None
        self._seen = 0  # characters
        self._unfinished = ""

    def feed(self, text: str, *, start: int) -> None:
        """Show the part of a text that is new, which begins at character `start` of the log."""
        new = text[max(0, self._seen - start) :]
        if not new:
            return
        self._seen += len(new)
        sys.stderr.write(new)
        sys.stderr.flush()
        *lines, self._unfinished = (self._unfinished + new).split("\n")
        for line in lines:
            self._read(line)

    def finish(self) -> None:
        """Take a last line without a line end for a line."""
        self._read(self._unfinished)
        self._unfinished = ""

    def _read(self, line: str) -> None:
        if not line.startswith("{"):
            return
        try:
            found = json.loads(line)
        except ValueError:
            return
        if isinstance(found, dict):
            self.summary = found


def exit_code_of_job(job: JobDetails) -> int:
    """The exit code of an ended job's own process, as a shell would say it; 1 where it never started."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return EXIT_TERMINATED
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code  # -9: ended by signal 9


async def follow(client: JobSubmissionClient, job_id: str, *, patience: float) -> tuple[JobDetails, JobLog]:
    """Show a job's log until the job has ended.

    Args:
        client: the cluster.
        job_id: the submission id.
        patience: seconds that the cluster may be out of reach at a time.

    Raises:
        ContactLost: it was for longer.
    """
    shown = JobLog()
    tail: asyncio.Task[None] | None = None
    try:
        while True:
            job = await _asked(lambda: asyncio.to_thread(client.get_job_info, job_id), job_id, patience=patience)
            if job.status.is_terminal():
                break
            if tail is None or tail.done():
                tail = asyncio.create_task(_tail(client, job_id, shown))
            await asyncio.wait({tail}, timeout=POLL_SECONDS)
            if tail.done():  # it broke, or the job has just ended
                await asyncio.sleep(POLL_SECONDS)
        if tail is not None:
            await asyncio.wait({tail}, timeout=TAIL_SECONDS)
    finally:
        if tail is not None:
            tail.cancel()
    whole = await _asked(lambda: asyncio.to_thread(client.get_job_logs, job_id), job_id, patience=patience)
    shown.feed(whole, start=0)
    shown.finish()
    return job, shown


async def _tail(client: JobSubmissionClient, job_id: str, shown: JobLog) -> None:
    """Show the log from its beginning as it grows; returns where the stream breaks."""
    position = 0
    try:
        async for text in client.tail_job_logs(job_id):
            shown.feed(text, start=position)
            position += len(text)
    except UNREACHABLE as error:
        log.debug("event=log_stream_broke job=%s reason=%r", job_id, str(error))


async def _asked(ask: Callable[[], Awaitable[T]], job_id: str, *, patience: float) -> T:
    """Ask until there is an answer."""
    lost: float | None = None
    while True:
        try:
            return await ask()
        except UNREACHABLE as error:
            now = time.monotonic()
            if lost is None:
                lost = now
                log.warning("event=cluster_out_of_reach job=%s reason=%r", job_id, str(error))
            if now - lost >= patience:
                raise ContactLost(
                    f"the cluster has not answered for {patience:g} s, job {job_id} may still run; "
                    f"the same command finds it again: {error}"
                ) from error
            await asyncio.sleep(POLL_SECONDS)


def stop(client: JobSubmissionClient, job_id: str) -> JobEnded:
    """Stop a job and wait for its end, which it is given half a minute for.

    Returns:
        What to raise: the job was interrupted.
    """
    client.stop_job(job_id)
    deadline = time.monotonic() + STOP_SECONDS
    while not client.get_job_info(job_id).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    status = client.get_job_info(job_id).status
    return JobEnded(f"interrupted; job {job_id} is {status.lower()}", exit_code=EXIT_INTERRUPTED, summary=None)
