"""A job's log, its summary and its exit code, whatever becomes of the connection."""

import asyncio
import re

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails

from jobs import following
from jobs.following import ContactLost, JobLog, exit_code_of_job, follow


def job(status, code=None):
    return JobDetails(type="SUBMISSION", submission_id="a", status=status, entrypoint="x", driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 4, 4),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_the_jobs(status, code, exit_code):
    assert exit_code_of_job(job(status, code)) == exit_code


def test_what_is_delivered_twice_is_shown_once(capsys):
    log = JobLog()
    log.feed("one\ntw", start=0)
    log.feed("one\n", start=0)
    log.feed("o\nthree\n", start=6)
    log.feed("one\ntwo\nthree\nfour\n", start=0)
    assert capsys.readouterr().err == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ('time=1 level=INFO x\n{"a": 1}\n', {"a": 1}),
        ('{"a": 1}\n{"b": 2}\nafter it\n', {"b": 2}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": 1}\n{torn\n[1]\n 3\n', {"a": 1}),
        ("nothing\n", None),
    ],
)
def test_the_summary_is_the_last_line_that_is_a_json_object(text, summary):
    log = JobLog()
    for start in range(0, len(text), 5):
        log.feed(text[start : start + 5], start=start)
    log.finish()
    assert log.summary == summary


class Flaky:
    """A cluster whose log stream breaks at once, and which answers every other question with a dead line."""

    log = 'hello\n{"done": true}\n'

    def __init__(self, answers):
        self.answers = iter(answers)

    def get_job_info(self, job_id):
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_logs(self, job_id):
        return self.log

    async def tail_job_logs(self, job_id):
        yield self.log[:3]
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_a_broken_stream_and_a_missed_answer_do_not_end_the_job(monkeypatch, capsys):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    gone = ConnectionError("refused")
    cluster = Flaky([gone, job("RUNNING"), gone, gone, job("RUNNING"), job("FAILED", 3)])
    ended, shown = asyncio.run(follow(cluster, "a", patience=60))
    assert exit_code_of_job(ended) == 3
    assert shown.summary == {"done": True}
    said = "".join(part for part in re.split(r"(?:time=.*\n)", capsys.readouterr().err))
    assert said == Flaky.log


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    cluster = Flaky([job("RUNNING"), *[ConnectionError("refused")] * 1000])
    with pytest.raises(ContactLost, match=r"job a may still run; the same command finds it again"):
        asyncio.run(follow(cluster, "a", patience=0.05))
