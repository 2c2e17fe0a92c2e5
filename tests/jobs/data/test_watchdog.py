import subprocess
import sys
import time

import pytest

from jobs.data.watchdog import ended_if_it_hangs, still_working

# A regular expression that would take years, in C code that never gives up the interpreter's lock.
LOCKED = "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"


def process(work: str, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """A process that does the work with so much time."""
    lines = ["from jobs.data.watchdog import ended_if_it_hangs, still_working", "import time", "def work():"]
    lines += [f"    {line}" for line in work.splitlines()]
    lines += [f"with ended_if_it_hangs('FindFaces ab 32', seconds={seconds}):", "    work()", "print('done')"]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("work", ["while True: pass", "time.sleep(60)"])
def test_work_that_hangs_ends_its_process_and_says_what_it_was_and_where_it_stood(work):
    ended = process(work, seconds=0.3)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("event=hung work='FindFaces ab 32' seconds=0.3") == 1
    assert "in work" in ended.stderr


def test_work_that_hangs_without_giving_up_the_interpreter_ends_its_process_too():
    ended = process(LOCKED, seconds=0.3)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Timeout" in ended.stderr
    assert "in work" in ended.stderr


def test_work_that_comes_on_step_by_step_has_all_the_time_that_it_needs():
    ended = process("for _ in range(8):\n    time.sleep(0.25)\n    still_working()", seconds=1)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_without_a_limit_nothing_is_watched():
    ended = process("still_working(); time.sleep(0.5)", seconds=0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_work_that_is_done_in_time_or_fails_is_no_longer_watched():
    def fail() -> None:
        with ended_if_it_hangs("a", seconds=0.2):
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
        with ended_if_it_hangs("b", seconds=0.2):
            pass
    still_working()
    time.sleep(0.5)  # this process would be gone
