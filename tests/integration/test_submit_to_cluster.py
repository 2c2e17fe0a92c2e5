"""`mgmtn submit` against a real Ray cluster with dashboard and token authentication, as an operator runs it.

Most jobs here are a stand-in for `mgmtn label`, uploaded with --working-dir: what counts is how they end.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.rehearsal.cluster import ray_running
from deploy.rehearsal.processes import marked

pytestmark = pytest.mark.integration

STAND_IN = """\
import sys, time
print("progress=label done=1", file=sys.stderr)
code, seconds = int(sys.argv[1]), float(sys.argv[2])
if seconds:
    print("waiting", flush=True)
time.sleep(seconds)
print('{"images": {"ok": 3}, "code": %d}' % code)
print("mgmtn label: the end", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node of one CPU; the environment of somebody who may use it, and forgets that a token has a mode."""
    folder = tmp_path_factory.mktemp("cluster")
    with marked(str(folder)) as environment:
        environment["RAY_JOB_STOP_WAIT_TIME_S"] = "1"
        with ray_running(folder, environment=environment, cpus=(), head_cpus=1) as running:
            forgotten = ("RAY_AUTH_MODE", "RAY_ADDRESS")
            yield {name: value for name, value in running.environment.items() if name not in forgotten}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "label.py").write_text(STAND_IN, encoding="utf-8")
    (folder / "large.jpg").write_bytes(b"0" * 1_000_000)
    return folder


def submit(*words: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.submit", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_a_command_of_ours_runs_where_it_is_installed_and_gives_its_summary(cluster, tmp_path):
    (tmp_path / "k8s").mkdir()
    (tmp_path / "k8s" / "map.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    ended = submit("lint", tmp_path / "k8s", "--key", "here", env=cluster)
    [job_id] = ended.stdout.splitlines()
    assert "event=clean manifests=1" in ended.stderr
    assert (ended.returncode, job_id.startswith("lint-here-")) == (0, True)


def test_the_summary_is_on_stdout_and_the_exit_code_is_the_jobs(cluster, stand_in):
    ended = submit("label", 4, 0, "--working-dir", stand_in, "--exclude", "*.jpg", "--key", "n", env=cluster)
    job_id, summary = ended.stdout.splitlines()
    assert json.loads(summary) == {"images": {"ok": 3}, "code": 4}
    assert ended.returncode == 4
    assert f"mgmtn submit: job {job_id} failed, exit code 4" in ended.stderr
    assert "progress=label done=1" in ended.stderr

    again = submit("label", 4, 0, "--working-dir", stand_in, "--exclude", "*.jpg", "--key", "n", env=cluster)
    assert again.stdout.splitlines()[0] == f"{job_id}-2"  # what failed is tried again


def test_asking_twice_follows_the_one_job(cluster, stand_in):
    command = ["label", 0, 4, "--working-dir", stand_in, "--key", "twice"]
    first = submit(*command, "--no-wait", env=cluster)
    assert first.returncode == 0
    [job_id] = first.stdout.splitlines()
    second = submit(*command, env=cluster)  # runs still
    third = submit(*command, env=cluster)  # has succeeded
    for ended in (second, third):
        assert ended.returncode == 0
        assert ended.stdout.splitlines() == [job_id, '{"images":{"ok":3},"code":0}']
        assert f"event=attached job={job_id}" in ended.stderr
        assert ended.stderr.count("waiting\n") == 1


@pytest.mark.parametrize(("setting", "status"), [("cancel", "STOPPED"), ("leave", "RUNNING")])
def test_ctrl_c_cancels_or_leaves_running(cluster, stand_in, setting, status):
    command = [sys.executable, "-m", "jobs.submit", "label", "0", "60", "--working-dir", str(stand_in)]
    command += ["--key", setting, "--on-interrupt", setting]
    asked = subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert asked.stdout is not None
    assert asked.stderr is not None
    job_id = asked.stdout.readline().strip()
    while "waiting" not in asked.stderr.readline():
        assert asked.poll() is None
    asked.send_signal(signal.SIGINT)
    _, said = asked.communicate(timeout=120)
    assert asked.returncode == 130
    assert "interrupted" in said
    headers = {"Authorization": f"Bearer {cluster['RAY_AUTH_TOKEN']}"}
    url = f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/{job_id}"
    assert requests.get(url, headers=headers, timeout=10).json()["status"] == status
    requests.post(f"{url}/stop", headers=headers, timeout=10)


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_who_has_not_the_token_is_not_let_in(cluster, token):
    env = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN"}
    env |= {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    ended = submit("label", 0, 0, env=env)
    assert ended.returncode == 2
    assert "not let in; set RAY_AUTH_TOKEN" in ended.stderr
    assert ended.stdout == ""
