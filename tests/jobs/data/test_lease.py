import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs.data.lease import EXIT_TERMINATED, Lease, LeaseRecord, LeaseSettings, current_holder, held
from jobs.data.object_store import LocalStore
from jobs.outcomes import LeaseHeld
from mgmtn.errors import ConfigError

LONG = LeaseSettings(seconds=3600, skew_seconds=0)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass, for all runs."""
    passed = [0.0]

    def wait(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr("jobs.data.lease._now", lambda: datetime.now(UTC) + timedelta(seconds=passed[0]))
    return wait


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the next object be written and its writer not learn it."""
    due = []
    create = LocalStore.put_if_absent

    def put_if_absent(store: LocalStore, uri: str, data: bytes) -> bool:
        created = create(store, uri, data)
        if due:
            due.pop()
            raise ConfigError("no answer")
        return created

    monkeypatch.setattr(LocalStore, "put_if_absent", put_if_absent)
    return lambda: due.append(True)


def lease(labels: Path, holder: str = "r1", settings: LeaseSettings = LONG) -> Lease:
    return Lease(str(labels), holder=holder, settings=settings)


def taken(labels: Path, holder: str = "r1", settings: LeaseSettings = LONG) -> Lease:
    made = lease(labels, holder, settings)
    made.acquire()
    return made


def records(labels: Path) -> list[str]:
    return sorted(path.name for path in (labels / "_lease").iterdir())


def elsewhere(labels: Path) -> None:
    """Let the last record be that of a process on another machine."""
    path = labels / "_lease" / records(labels)[-1]
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"host": "other", "process": "another-boot/pid:[1]/7/99"}))


def test_a_second_run_is_told_who_holds_the_lease_and_starts_nothing(tmp_path):
    with held(str(tmp_path), holder="r1", settings=LONG):
        before = records(tmp_path)
        with pytest.raises(LeaseHeld, match=r"run r1 on .* holds the lease.*no work was started") as refusal:
            lease(tmp_path, "r2").acquire()
        assert refusal.value.exit_code == 75
        assert records(tmp_path) == before


def test_a_lease_that_was_given_back_is_free_at_once(tmp_path):
    for fence, holder in enumerate(("r1", "r2", "r3"), start=1):
        with held(str(tmp_path), holder=holder, settings=LONG) as mine:
            assert mine.fence == fence
    record = current_holder(str(tmp_path))
    assert record is not None
    assert (record.holder, record.fence, record.released) == ("r3", 3, True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_in_an_error_gives_its_lease_back(tmp_path, error):
    def fail() -> None:
        with held(str(tmp_path), holder="r1", settings=LONG):
            raise error

    with pytest.raises(error):
        fail()
    assert taken(tmp_path, "r2").fence == 2


def test_a_lease_that_ran_out_is_taken_over_with_a_higher_fence_and_its_holder_may_not_commit(tmp_path, later):
    late = taken(tmp_path)
    elsewhere(tmp_path)
    later(3000)
    with pytest.raises(LeaseHeld):
        taken(tmp_path, "r2")
    later(1000)
    assert taken(tmp_path, "r2").fence == 2
    for _ in range(2):
        with pytest.raises(LeaseHeld, match="another run took the lease 1"):
            late.confirm()
    late.release()
    record = current_holder(str(tmp_path))
    assert record is not None
    assert (record.holder, record.released) == ("r2", False)


def test_clocks_that_differ_do_not_end_a_lease_early(tmp_path, later):
    taken(tmp_path)
    elsewhere(tmp_path)
    later(3610)
    with pytest.raises(LeaseHeld):
        taken(tmp_path, "r2", LeaseSettings(skew_seconds=60))
    later(60)
    assert taken(tmp_path, "r2", LeaseSettings(skew_seconds=60)).fence == 2


def test_a_holder_that_renews_keeps_the_lease_and_leaves_few_records(tmp_path, later):
    mine = taken(tmp_path)
    for _ in range(5):
        later(3000)
        mine.confirm()
        elsewhere(tmp_path)
        with pytest.raises(LeaseHeld):
            taken(tmp_path, "r2")
    assert mine.fence == 1
    assert len(records(tmp_path)) == 2


def test_a_lease_is_renewed_while_its_run_works(tmp_path):
    with held(str(tmp_path), holder="r1", settings=LeaseSettings(seconds=0.2)) as mine:
        deadline = time.monotonic() + 60
        while records(tmp_path)[-1] < f"{3:020d}.json":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mine.confirm()
    assert current_holder(str(tmp_path)).released


def test_a_holder_that_slept_while_others_came_and_went_notices(tmp_path, later):
    sleeper = taken(tmp_path)
    elsewhere(tmp_path)
    later(4000)
    for holder in ("r2", "r3"):
        with held(str(tmp_path), holder=holder, settings=LONG) as other:
            other.confirm()
    # The record that its renewal would meet is cleared by now.
    assert f"{2:020d}.json" not in records(tmp_path)
    with pytest.raises(LeaseHeld, match="others have held it since"):
        sleeper.confirm()
    assert taken(tmp_path, "r4").fence == 4


def test_a_renewal_that_landed_without_an_answer_is_this_runs_own(tmp_path, unanswered):
    mine = taken(tmp_path)
    for _ in range(3):
        unanswered()
        with pytest.raises(ConfigError, match="no answer"):
            mine.confirm()
        mine.confirm()
        with pytest.raises(LeaseHeld, match="run r1"):
            taken(tmp_path, "r2")
    assert (mine.fence, len(records(tmp_path))) == (1, 2)
    mine.release()
    assert taken(tmp_path, "r2").fence == 2


def test_a_renewal_without_an_answer_does_not_keep_the_lease_from_being_given_back(tmp_path, unanswered):
    mine = taken(tmp_path)
    unanswered()
    with pytest.raises(ConfigError):
        mine.confirm()
    mine.release()
    assert current_holder(str(tmp_path)).released
    assert taken(tmp_path, "r2").fence == 2


@pytest.mark.parametrize("holder", ["r2", "r1"])
def test_a_renewal_without_an_answer_does_not_hide_that_another_took_the_lease(tmp_path, unanswered, later, holder):
    late = taken(tmp_path)
    unanswered()
    with pytest.raises(ConfigError):
        late.confirm()
    elsewhere(tmp_path)
    later(4000)
    other = taken(tmp_path, holder)
    for _ in range(2):
        with pytest.raises(LeaseHeld, match="another run took the lease 1"):
            late.confirm()
    late.release()
    other.confirm()
    assert (other.fence, current_holder(str(tmp_path)).released) == (2, False)


def test_a_lease_that_was_given_back_without_an_answer_is_not_held(tmp_path, unanswered):
    mine = taken(tmp_path)
    unanswered()
    mine.release()
    with pytest.raises(LeaseHeld):
        mine.confirm()


def test_a_run_that_loses_its_lease_is_interrupted(tmp_path):
    settings = LeaseSettings(seconds=0.4, skew_seconds=0)

    def work() -> None:
        with held(str(tmp_path), holder="r1", settings=settings):
            usurp(tmp_path)
            threading.Event().wait(60)

    with pytest.raises(LeaseHeld, match="others have held it since"):
        work()


def test_a_run_that_ignores_sigint_as_a_shells_background_job_does_is_interrupted_too(tmp_path):
    code = (
        "import signal, sys, time; from jobs.data.lease import LeaseSettings, held\n"
        "from jobs.settings import Settings, run_program\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "def run(settings):\n"
        "    with held(sys.argv[1], holder='r1', settings=LeaseSettings(seconds=2, skew_seconds=0)):\n"
        "        print('taken', flush=True); time.sleep(60)\n"
        "sys.exit(run_program(Settings, run, [], prog='mgmtn label'))"
    )
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        usurp(tmp_path)
        _, errors = process.communicate()
    assert process.returncode == LeaseHeld.exit_code
    assert "mgmtn label: " in errors
    assert "the run was interrupted" in errors


def usurp(labels: Path) -> None:
    """Take the next number, as a run does whose clock is far ahead."""
    last = labels / "_lease" / records(labels)[-1]
    record = LeaseRecord.model_validate_json(last.read_text())
    other = record.model_copy(update={"fence": record.fence + 1, "holder": "r2"})
    # Several numbers ahead: the holder's own next one may come between.
    (labels / "_lease" / f"{int(last.stem) + 5:020d}.json").write_text(other.model_dump_json())


def test_of_many_who_try_at_once_one_holds_the_lease(tmp_path):
    def attempt(number: int) -> str:
        try:
            taken(tmp_path, f"r{number}")
        except LeaseHeld:
            return "refused"
        return "holds"

    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(attempt, range(8)))
    assert sorted(told) == ["holds", *["refused"] * 7]


def test_a_run_may_wait_for_the_lease(tmp_path):
    first = taken(tmp_path)
    threading.Timer(0.3, first.release).start()
    assert taken(tmp_path, "r2", LeaseSettings(wait_seconds=30)).fence == 2


def test_a_dead_process_of_this_machine_holds_no_lease(tmp_path):
    code = (
        "import sys; from jobs.data.lease import Lease, LeaseSettings\n"
        "Lease(sys.argv[1], holder='r1', settings=LeaseSettings()).acquire(); print('taken', flush=True)\n"
        "import time; time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(LeaseHeld):
            taken(tmp_path, "r2")
        process.kill()
    assert taken(tmp_path, "r2").fence == 2


def test_sigterm_gives_the_lease_back(tmp_path):
    code = (
        "import sys, time; from jobs.data.lease import LeaseSettings, held\n"
        "with held(sys.argv[1], holder='r1', settings=LeaseSettings()):\n"
        "    print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_TERMINATED
    record = current_holder(str(tmp_path))
    assert record is not None
    assert record.released


def test_the_lease_works_in_s3(bucket, monkeypatch):
    with held(f"{bucket}/labels", holder="r1", settings=LONG) as mine:
        mine.confirm()
        with pytest.raises(LeaseHeld, match="run r1"):
            Lease(f"{bucket}/labels", holder="r2", settings=LONG).acquire()
    with held(f"{bucket}/labels", holder="r2", settings=LONG) as mine:
        assert mine.fence == 2


def test_a_table_without_a_lease_has_no_holder_and_a_damaged_record_is_named(tmp_path):
    assert current_holder(str(tmp_path)) is None
    taken(tmp_path)
    (tmp_path / "_lease" / f"{1:020d}.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a lease"):
        taken(tmp_path, "r2")


def test_a_record_of_this_very_process_is_alive(tmp_path):
    taken(tmp_path)
    record = current_holder(str(tmp_path))
    assert record is not None
    assert f"/{os.getpid()}/" in record.process
    assert not record.is_free(datetime.now(UTC), skew=timedelta())
