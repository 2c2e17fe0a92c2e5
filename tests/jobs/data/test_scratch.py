import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.data.scratch import scratch_folder


def folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.name.startswith("mgmtn-scratch-"))


def test_a_folder_goes_when_its_work_ends_whatever_the_end_is(tmp_path):
    with scratch_folder("plan", within=tmp_path) as folder:
        (folder / "file").write_bytes(b"1")
        assert folder.parent == tmp_path
        assert folder.name.startswith("mgmtn-scratch-plan-")
    with pytest.raises(RuntimeError), scratch_folder("plan", within=tmp_path) as folder:
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_without_a_place_it_lies_in_the_systems_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder("plan") as folder:
        assert folder.parent == tmp_path


def test_what_a_killed_process_left_goes_with_the_next_one_and_what_a_living_one_has_stays(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from jobs.data.scratch import scratch_folder\n"
        "with scratch_folder('plan', within=Path(sys.argv[1])) as folder:\n"
        "    (folder / 'deep').mkdir(); (folder / 'deep' / 'file').write_bytes(b'1')\n"
        "    print(folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with scratch_folder("inventory", within=tmp_path) as mine, scratch_folder("plan", within=tmp_path) as more:
            assert set(folders(tmp_path)) == {left, mine, more}
            process.kill()
            process.wait()
            with scratch_folder("plan", within=tmp_path) as latest:
                assert set(folders(tmp_path)) == {mine, more, latest}
    assert folders(tmp_path) == []


def test_nothing_else_in_the_place_is_touched(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mgmtn-scratch-plan-ab12cd34").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mgmtn-scratch-plan-file1234").write_bytes(b"a file")
    for name in ("mgmtn-labels", "mgmtn-scratch-plan", "mgmtn-scratch-plan-ab12cd34-of-mine", "plan-ab12cd34"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    with scratch_folder("plan", within=tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "elsewhere").is_dir()


def test_where_folders_cannot_be_locked_they_serve_all_the_same(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")  # what NFS says

    (tmp_path / "mgmtn-scratch-plan-ab12cd34").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    with scratch_folder("plan", within=tmp_path) as folder:
        assert len(folders(tmp_path)) == 2
        assert folder in folders(tmp_path)
    assert len(folders(tmp_path)) == 1


def test_many_at_once_do_not_take_each_others_folders_for_left_ones(tmp_path):
    def work(number: int) -> None:
        with scratch_folder("plan", within=tmp_path) as folder:
            (folder / "file").write_text(str(number))
            assert os.listdir(folder) == ["file"]

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(400)))
    assert folders(tmp_path) == []
