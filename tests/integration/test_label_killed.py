"""`mgmtn label` killed at a chosen moment, and run again: the lines of `deploy/crashes.md`.

The driver gets SIGKILL, and takes its cluster along, when a chosen request reaches the store, which then never sees it.
Two moments by default; `MGMTN_TEST_EVERY_CRASH=1` takes them all. The store is moto;
`MGMTN_TEST_CRASH_STORE=swift` takes OpenStack Swift (`own`: yours, see `tests/conftest.py`).
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from jobs import label
from jobs.data.lease import EXIT_TERMINATED, current_holder
from jobs.data.resume import unfinished_runs
from jobs.data.s3_store import split
from jobs.data.snapshots import LabelTable
from jobs.label import LabelSettings
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.parametrize("s3_endpoint", [os.environ.get("MGMTN_TEST_CRASH_STORE", "moto")], indirect=True),
]

PICTURES = 40
SMALL = {
    "faces": "whole-image",
    "images_per_block": 4,
    "batch_size": 4,
    "rows_per_file": 8,
    "face_workers": 1,  # each process takes seconds to start
    "model_workers": 1,
}
COLUMNS = ["uri", "status", "error", "attempts", "face_index", "face_count", "labels", *ATTRIBUTES]


@dataclass(frozen=True)
class Moment:
    """The request, the `nth` of its kind, at which the driver is killed; in the first night or the second."""

    method: str
    path: str
    nth: int = 1
    night: int = 1


MOMENTS = {
    "before it has the lease": Moment("PUT", "/_lease/"),
    "before it says what it is": Moment("PUT", "/_runs/"),
    "with its first picture": Moment("GET", "/photos/"),
    "with its first file": Moment("PUT", "/part-"),
    "with two finished files": Moment("PUT", "/part-", nth=3),
    "while it checks its files": Moment("HEAD", "/part-"),
    "before its commit": Moment("PUT", "/_snapshots/"),
    "after its commit": Moment("DELETE", "/_runs/"),
    "while it rewrites files": Moment("PUT", "/part-", nth=2, night=2),
    "before its second commit": Moment("PUT", "/_snapshots/", night=2),
}
USUAL = ("with two finished files", "before its commit")
# The next model, 16 pictures of which are labelled in two files; then the deletions are published.
STAGED = {
    "while it rewrites files without the deleted": Moment("PUT", "/part-", nth=3),
    "before it commits the deletions": Moment("PUT", "/_snapshots/"),
}
EVERY = bool(os.environ.get("MGMTN_TEST_EVERY_CRASH"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_model(tmp_path_factory.mktemp("next"), seed=1)


def random_model(folder: Path, *, seed: int) -> str:
    torch.manual_seed(seed)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    card = Card(name="random", kind="attributes", network=network)
    return str(Checkpoint.of(MGMTN(network), card).save(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        paint(folder / f"{number:02d}.png", seed=number)
    return folder


@pytest.fixture(scope="module")
def second_night(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures but the first, and with another in place of the second."""
    folder = tmp_path_factory.mktemp("second")
    for path in sorted(pictures.iterdir())[2:]:
        (folder / path.name).write_bytes(path.read_bytes())
    paint(folder / "01.png", seed=1001)
    return folder


def paint(path: Path, *, seed: int) -> None:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(colours).resize((64, 64), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, pictures: Path, second_night: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, pa.Table]:
    """The rows that each night must give, from fresh runs that nobody killed."""
    tables = {}
    for night, folder in ((1, pictures), (2, second_night)):
        labels = tmp_path_factory.mktemp("labels")
        label.run(LabelSettings(inputs=(str(folder),), output=str(labels), model=model, **SMALL))
        tables[night] = rows(str(labels))
    return tables


@pytest.fixture(scope="module")
def relabelled(
    local_ray: None, second_night: Path, next_model: str, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    """The rows that the second night's pictures must have by the next model."""
    labels = tmp_path_factory.mktemp("labels")
    label.run(LabelSettings(inputs=(str(second_night),), output=str(labels), model=next_model, **SMALL))
    return rows(str(labels))


def rows(labels: str) -> pa.Table:
    """The current rows by the picture's name; a double one would be seen."""
    table = LabelTable(labels)
    read = table.read(table.current(), columns=COLUMNS).read_all()
    names = pa.array([uri.rpartition("/")[2] for uri in read["uri"].to_pylist()])
    return read.set_column(0, "uri", names).sort_by([("uri", "ascending"), ("face_index", "ascending")])


def same(found: pa.Table, expected: pa.Table) -> None:
    for name in COLUMNS:
        if name in ATTRIBUTES:  # a batch of other faces moves the last digits
            np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-5)
        else:
            assert found[name].to_pylist() == expected[name].to_pylist(), name


class Corpus:
    """Pictures in the bucket, written past the proxy, and the job that labels them."""

    def __init__(self, folder: str, model: str) -> None:
        self.photos, self.labels, self.model = f"{folder}/photos/", f"{folder}/labels", model
        self.client = boto3.session.Session().client("s3")
        self.drivers: list[Driver] = []

    def put(self, folder: Path) -> None:
        """Make the prefix hold what a folder holds."""
        bucket, prefix = split(self.photos)
        for entry in self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", ()):
            if not (folder / entry["Key"].removeprefix(prefix)).exists():
                self.client.delete_object(Bucket=bucket, Key=entry["Key"])
        for path in folder.iterdir():
            data = path.read_bytes()
            self.client.put_object(Bucket=bucket, Key=prefix + path.name, Body=data)

    def start(self, *more: str) -> "Driver":
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        command = [sys.executable, "-m", "jobs.label", self.photos, "--output", self.labels, "--model", self.model]
        self.drivers.append(Driver([*command, *flags, *more]))
        return self.drivers[-1]

    @property
    def table(self) -> LabelTable:
        return LabelTable(self.labels)

    def finished_pictures(self) -> Counter[str]:
        """Names of the pictures whose rows are in a finished file of no snapshot."""
        table, names = self.table, Counter[str]()
        current = table.current()
        listed = {file.path for file in current.files} if current else set()
        for info in table.store.list(f"{table.uri}/", missing_ok=True):
            if info.uri.endswith(".parquet") and info.uri.removeprefix(f"{table.uri}/") not in listed:
                data = pa.BufferReader(table.store.get(info.uri))
                read = pa.parquet.read_table(data, columns=["uri", "face_index"]).to_pylist()
                names.update(row["uri"].rpartition("/")[2] for row in read if row["face_index"] <= 0)
        return names


class Driver:
    """The command, as a process whose cluster dies with it."""

    def __init__(self, command: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"MGMTN_TEST_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, after the last process of it is gone."""
        out, err = self.process.communicate(timeout=600)
        deadline = time.monotonic() + 180
        while left := self._left():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        return self.process.returncode, out, err

    def _left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MGMTN_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def corpus(s3_folder: str, model: str) -> Iterator[Corpus]:
    made = Corpus(s3_folder, model)
    yield made
    for driver in made.drivers:
        if driver.process.poll() is None:  # the test has failed
            driver.process.kill()
            driver.end()


def summary_of(ended: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = ended
    assert code == 0, err
    return dict(json.loads(out.splitlines()[-1]))


def at(moment: Moment, act: Callable[[], None]) -> Callable[..., bool]:
    """Harm for the proxy: `act`, and let the request and all later ones go unanswered."""
    seen, lock, gone = Counter[str](), threading.Lock(), threading.Event()

    def harm(handler: Any, request: Any) -> bool:
        with lock:
            if request.method == moment.method and re.search(moment.path, request.path) and not request.query:
                seen["request"] += 1
                if seen["request"] == moment.nth:
                    act()
                    gone.set()
        if gone.is_set():
            handler.close_connection = True
        return gone.is_set()

    return harm


def fetched(proxy: Any) -> Counter[str]:
    """How often each picture was fetched."""
    seen = (request for request in proxy.seen if request.method == "GET" and "/photos/" in request.path)
    return Counter(request.path.rpartition("/")[2] for request in seen)


@pytest.mark.parametrize("name", MOMENTS if EVERY else USUAL)
def test_a_run_that_is_killed_is_taken_up_by_the_same_command(
    corpus: Corpus, s3_proxy, pictures: Path, second_night: Path, undisturbed: dict[int, pa.Table], name: str
) -> None:
    moment = MOMENTS[name]
    corpus.put(pictures)
    if moment.night == 2:
        summary_of(corpus.start().end())
        corpus.put(second_night)
    before = corpus.table.current()

    driver = corpus.start()
    s3_proxy.harm = at(moment, driver.process.kill)
    assert driver.end()[0] == -signal.SIGKILL
    s3_proxy.harm = lambda handler, request: False
    committed = corpus.table.current()
    assert (committed == before) is (name != "after its commit")
    finished = corpus.finished_pictures()
    if name == "with two finished files":
        assert len(finished) == 2 * SMALL["rows_per_file"]

    s3_proxy.seen.clear()
    summary = summary_of(corpus.start().end())
    same(rows(corpus.labels), undisturbed[moment.night])
    due = {1: PICTURES, 2: 1}[moment.night] if committed == before else 0
    done = {picture for picture in finished if picture == "01.png" or moment.night == 1} if due else set()
    assert summary["adopted"] == len(done)
    counts = fetched(s3_proxy)
    assert not set(counts) & done, "finished work was done again"
    assert set(counts.values()) <= {1}
    assert len(counts) == due - len(done)
    assert unfinished_runs(corpus.table) == ()


@pytest.mark.skipif(not EVERY, reason="takes minutes: MGMTN_TEST_EVERY_CRASH=1")
@pytest.mark.parametrize("name", STAGED)
def test_a_kill_amid_the_deletions_of_a_night_whose_model_is_incomplete_loses_no_row_and_no_work(
    corpus: Corpus,
    s3_proxy,
    pictures: Path,
    second_night: Path,
    undisturbed: dict[int, pa.Table],
    next_model: str,
    relabelled: pa.Table,
    name: str,
) -> None:
    corpus.put(pictures)
    summary_of(corpus.start().end())
    corpus.put(second_night)
    s3_proxy.seen.clear()
    corpus.model = next_model

    driver = corpus.start("--limit=16")
    s3_proxy.harm = at(STAGED[name], driver.process.kill)
    assert driver.end()[0] == -signal.SIGKILL
    s3_proxy.harm = lambda handler, request: False
    assert corpus.table.current().number == 1
    assert len(corpus.finished_pictures()) >= 16

    summary = summary_of(corpus.start("--limit=16").end())
    assert (summary["adopted"], summary["snapshot"]) == (16, 2)
    same(rows(corpus.labels), undisturbed[1].slice(1))  # the first is deleted; the old model's rows stand

    assert summary_of(corpus.start().end())["adopted"] == 32
    same(rows(corpus.labels), relabelled)
    assert set(fetched(s3_proxy).values()) == {1}
    assert len(fetched(s3_proxy)) == PICTURES - 1
    assert unfinished_runs(corpus.table) == ()


def test_of_two_runs_at_once_one_is_told_to_come_back_and_starts_nothing(
    corpus: Corpus, s3_proxy, pictures: Path, undisturbed: dict[int, pa.Table]
) -> None:
    corpus.put(pictures)
    at_work, go_on = threading.Event(), threading.Event()

    def hold(handler: Any, request: Any) -> bool:
        if request.method == "GET" and "/photos/" in request.path:
            at_work.set()
            go_on.wait(300)
        return False

    s3_proxy.harm = hold
    first = corpus.start()
    assert at_work.wait(300)
    code, _, err = corpus.start().end()
    go_on.set()
    assert code == 75
    assert "holds the lease" in err
    assert summary_of(first.end())["snapshot"] == 1
    assert len(corpus.table.history()) == 1
    same(rows(corpus.labels), undisturbed[1])
    assert set(fetched(s3_proxy).values()) == {1}


def test_a_run_that_is_told_to_stop_gives_its_lease_back(corpus: Corpus, s3_proxy, pictures: Path) -> None:
    corpus.put(pictures)
    driver = corpus.start()
    told = threading.Event()

    def tell(handler: Any, request: Any) -> bool:
        if request.method == "PUT" and "/part-" in request.path and not told.is_set():
            told.set()
            driver.process.send_signal(signal.SIGTERM)
        return False

    s3_proxy.harm = tell
    code, _, err = driver.end()
    assert told.is_set()
    assert code == EXIT_TERMINATED, err
    holder = current_holder(corpus.labels)
    assert holder is not None
    assert holder.released
    assert corpus.table.current() is None
    assert len(unfinished_runs(corpus.table)) == 1
