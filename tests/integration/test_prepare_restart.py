"""`mgmtn prepare` killed half-way goes on where it was; it writes to S3 as to a folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import demo, prepare
from jobs.data.training_table import DESCRIPTION_FILE, TRAINING_SCHEMA, Description
from jobs.prepare import PrepareSettings
from mgmtn.landmarks import MediaPipeSettings

pytestmark = pytest.mark.integration

PICTURES, PER_FILE = 120, 10
OPTIONS = {"image_size": 64, "margin": 8, "workers": 1, "rows_per_file": PER_FILE}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One portrait, moved; picture 5 shows no face, picture 6 is torn."""
    folder = tmp_path_factory.mktemp("dataset")
    demo.run(demo.DemoSettings(output=folder / "portraits"))
    portrait = Image.open(folder / "portraits/astronaut.png").convert("RGB")
    names = [f"{number:03d}.jpg" for number in range(PICTURES)]
    for number, name in enumerate(names):
        portrait.crop((number, 0, 400 + number, 400)).save(folder / name)
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(folder / names[5])
    (folder / names[6]).write_bytes((folder / names[6]).read_bytes()[:500])
    (folder / "labels.csv").write_text("image,Smiling\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(names)))
    return folder


def settings(dataset: Path, output: object) -> PrepareSettings:
    detector = MediaPipeSettings(levels=0)
    return PrepareSettings(dataset=str(dataset), output=str(output), mediapipe=detector, **OPTIONS)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity and time of each finished file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("part-*.parquet")}


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(folder / name) for name in sorted(files(folder))])


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    summary = prepare.run(settings(dataset, folder))
    assert (summary["images"], summary["faces"], summary["no_face"], summary["failed"]) == (120, 118, 1, 1)
    return folder


def kill_half_way(dataset: Path, output: Path) -> None:
    """Start the command in a process of its own, and kill it with the first file that appears."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "jobs.prepare", str(dataset), "--output", str(output), "--mediapipe.levels=0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen([*command, *flags, "--cluster.num-cpus=1"], env=environment) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end and not files(output):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_goes_on_with_what_it_had_finished(dataset, undisturbed, tmp_path):
    folder = tmp_path / "data"
    kill_half_way(dataset, folder)
    finished = files(folder)
    assert 0 < len(finished) < PICTURES // PER_FILE
    assert not (folder / DESCRIPTION_FILE).exists()

    summary = prepare.run(settings(dataset, folder))
    assert files(folder).items() >= finished.items()  # not touched
    assert rows(folder).equals(rows(undisturbed))
    assert Description.load(folder) == Description.load(undisturbed)
    assert (folder / "masks.png").read_bytes() == (undisturbed / "masks.png").read_bytes()
    assert {path.suffix for path in folder.iterdir()} == {".parquet", ".json", ".png"}

    made = files(folder)
    assert prepare.run(settings(dataset, folder)) == summary
    assert files(folder) == made  # a finished table is not made again
    prepare.run(settings(dataset, folder).model_copy(update={"margin": 4, "limit": 15}))
    assert sorted(files(folder)) == ["part-00000.parquet", "part-00001.parquet"]
    assert not made.items() & files(folder).items()


def test_rows_lie_in_the_order_of_the_dataset_and_say_what_became_of_each_picture(undisturbed):
    table = rows(undisturbed)
    assert table.schema.equals(TRAINING_SCHEMA)
    assert table["image"].to_pylist() == [f"{number:03d}.jpg" for number in range(PICTURES)]
    assert table["status"].to_pylist()[4:8] == ["ok", "no_face", "decode_error", "ok"]
    assert table["face_found"].to_pylist()[4:8] == [True, False, False, True]
    assert table["face"].null_count == 1
