"""Which words are the job's, what its id is, and what is told where there is no cluster."""

import importlib

import pytest
from pydantic import ValidationError
from ray.dashboard.modules.job.pydantic_models import JobDetails

from jobs import submit
from jobs.cli import COMMANDS
from jobs.manifests.programs import PROGRAMS
from jobs.submit import SubmitSettings, runtime_environment, split_arguments, submission_id
from mgmtn.errors import ConfigError


@pytest.fixture(autouse=True)
def no_cluster_in_the_environment(monkeypatch):
    for name in (*submit.ADDRESSES, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("argv", "own", "job"),
    [
        ("label s3://a --output b --address U", "--address U", "label s3://a --output b"),
        ("--address U label s3://a --no-wait --output b", "--address U --no-wait", "label s3://a --output b"),
        ("label a --address=U --key=n-1 --limit 3", "--address=U --key=n-1", "label a --limit 3"),
        ("--config s.toml --verbose label --config l.toml --verbose", "--config s.toml --verbose", None),
        ("--address U -- label --key x", "--address U", "label --key x"),
        ("label --help", "", "label --help"),
        ("--help label", "--help", "label"),
        ("--adress U label", "--adress", "U label"),
        ("label --address", "--address", "label"),
    ],
)
def test_the_jobs_words_are_told_from_our_own(argv, own, job):
    job = "label --config l.toml --verbose" if job is None else job
    assert split_arguments(argv.split()) == (own.split(), job.split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_setting_of_a_job_is_taken_for_ours(program):
    job = getattr(importlib.import_module(f"jobs.{program.split()[0]}"), PROGRAMS[program])
    assert set(job.model_fields) & set(SubmitSettings.model_fields) <= {"config", "verbose"}


def test_an_id_is_the_same_for_the_same_command_and_key_alone():
    command = "python -m jobs.label s3://a --output b"
    first = submission_id(command, "2026-03-01")
    assert first == submission_id(command, "2026-03-01")
    assert first.startswith("label-2026-03-01-")
    assert len({first, submission_id(command, "2026-03-02"), submission_id(command + "c", "2026-03-01")}) == 3


def test_nothing_is_uploaded_unless_asked(tmp_path):
    assert runtime_environment(SubmitSettings(job="label")) == {}
    asked = runtime_environment(SubmitSettings(job="label", working_dir=tmp_path, exclude=("*.jpg",)))
    assert asked == {"working_dir": str(tmp_path), "excludes": ["*.jpg"]}
    with pytest.raises(ValidationError, match="working_dir"):
        SubmitSettings(job="label", working_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "JOB: required"),
        ("label a", "--address: required; or set RAY_API_SERVER_ADDRESS or RAY_ADDRESS"),
        ("label a --address ray://head:10001", "the URL of the dashboard is wanted"),
        ("label a --address http://127.0.0.1:9", "no Ray dashboard answers there"),
        ("labl a --address http://127.0.0.1:9", "JOB 'labl': not a command"),
        ("submit label --address http://127.0.0.1:9", "JOB 'submit': not a command"),
        ("label a --key 'x'", "--key"),
    ],
)
def test_a_wrong_request_exits_with_2_and_names_what_is_wrong(argv, words, capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert submit.main(argv.split()) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


class Cluster:
    """Knows jobs by id and status, and what was asked of it."""

    def __init__(self, **jobs):
        self.jobs, self.submitted = jobs, []

    def list_jobs(self):
        return [
            JobDetails(type="SUBMISSION", submission_id=name.replace("_", "-"), status=status, entrypoint="x")
            for name, status in self.jobs.items()
        ]

    def submit_job(self, **asked):
        if asked["submission_id"] in self.submitted:
            raise RuntimeError(f"Request failed: Job with submission_id {asked['submission_id']} already exists.")
        self.submitted.append(asked["submission_id"])


@pytest.mark.parametrize(
    ("statuses", "attempt"),
    [
        ({}, "+"),
        ({"": "RUNNING"}, ""),
        ({"": "PENDING"}, ""),
        ({"": "SUCCEEDED"}, ""),
        ({"": "FAILED"}, "-2+"),
        ({"": "STOPPED", "-2": "RUNNING"}, "-2"),
        ({"": "FAILED", "-2": "FAILED"}, "-3+"),
    ],
)
def test_asking_again_follows_what_runs_or_succeeded_and_tries_again_what_failed(statuses, attempt):
    first = submission_id("python -m jobs.label a", "k")
    cluster = Cluster(**{first + suffix: status for suffix, status in statuses.items()})
    found = submit.find_or_start(cluster, "python -m jobs.label a", SubmitSettings(job="label", key="k"))
    assert found == first + attempt.rstrip("+")
    assert cluster.submitted == ([found] if attempt.endswith("+") else [])


def test_two_who_ask_at_once_start_one_job():
    cluster = Cluster()
    settings = SubmitSettings(job="label", key="k")
    both = {submit.find_or_start(cluster, "python -m jobs.label a", settings) for _ in range(2)}
    assert list(both) == cluster.submitted


def test_a_cluster_that_has_just_started_is_waited_for(monkeypatch):
    class Young(Cluster):
        answers = 0

        def submit_job(self, **asked):
            self.answers += 1
            if self.answers < 3:
                raise RuntimeError("No available agent to submit job, please try again later.")
            super().submit_job(**asked)

    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    cluster = Young()
    submit.find_or_start(cluster, "python -m jobs.label a", SubmitSettings(job="label"))
    assert len(cluster.submitted) == 1
    with pytest.raises(ConfigError, match="try again later"):
        submit.find_or_start(Young(), "python -m jobs.label a", SubmitSettings(job="label", patience=0))


def test_what_the_cluster_refuses_is_told():
    class Strict(Cluster):
        def submit_job(self, **asked):
            raise RuntimeError("Request failed with status code 400: no")

    with pytest.raises(ConfigError, match=r"refuses the job: .*: no$"):
        submit.find_or_start(Strict(), "python -m jobs.label a", SubmitSettings(job="label"))


def test_every_command_but_submit_can_be_a_job():
    for name in set(COMMANDS) - {"submit"}:
        submit._check_job(name)


def test_a_token_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    assert submit._token_header() == {}
    (tmp_path / "token").write_text("of-the-file\n", encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert submit._token_header() == {"Authorization": "Bearer of-the-file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "said")
    assert submit._token_header() == {"Authorization": "Bearer said"}


def test_a_token_file_that_is_not_there_is_a_wrong_setting(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert submit.main(["label", "a", "--address", "http://127.0.0.1:9"]) == 2
    assert "RAY_AUTH_TOKEN_PATH: " in capsys.readouterr().err
