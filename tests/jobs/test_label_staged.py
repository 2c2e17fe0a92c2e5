"""A new model that takes several nights, and the pictures that are withdrawn meanwhile: no Ray here, rows are made."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from jobs.data.lease import Lease
from jobs.data.object_store import join
from jobs.data.parts import FileFacts, write_part
from jobs.data.resume import discarded_files, unfinished_runs
from jobs.data.retention import Retention, delete, plan_sweep
from jobs.data.run import Run, Work
from jobs.data.snapshots import LabelTable
from jobs.label import LabelSettings, run
from jobs.outcomes import ErrorBudgetExceeded, GateRefused, LeaseHeld
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.network import MGMTN, NetworkSettings

CORPUS = [f"/corpus/{number}.jpg" for number in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The one that is in use, and the one that comes."""
    tiny = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)
    paths = []
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        checkpoint = Checkpoint.of(MGMTN(tiny), Card(name=name, kind="attributes", network=tiny))
        paths.append(str(checkpoint.save(tmp_path_factory.mktemp(name))))
    return paths[0], paths[1]


@pytest.fixture
def night(label_rows, tmp_path, models, monkeypatch):
    """`night(uris, new=True, limit=5)`: a run over these images; instead of labelling it writes rows, of a face each
    or of the `outcomes` that are given, into one file."""
    told: dict[str, str] = {}

    def label(settings: LabelSettings, job: Run, work: Work, metrics: Any) -> tuple[FileFacts, ...]:
        model_id = job.checkpoint.card.model_id
        rows = [
            label_rows({uri: told.get(uri, 1)}, etag=etag, attempts=attempts, model_id=model_id, run_id=job.id)
            for due in work.tables
            for uri, etag, attempts in zip(
                *(due[name].to_pylist() for name in ("uri", "etag", "attempts")), strict=True
            )
        ]
        table = job.table
        written = write_part(
            pa.concat_tables(rows), store=table.store, labels_uri=table.uri, model_id=model_id, run_id=job.id
        )
        return (written,)

    def night(
        uris: list[str],
        *,
        new: bool = False,
        etags: Mapping[str, str] = MappingProxyType({}),
        outcomes: Mapping[str, str] = MappingProxyType({}),
        **more: Any,
    ) -> dict[str, Any]:
        told.clear()
        told.update(outcomes)
        listed = tmp_path / "images.parquet"
        versions = [etags.get(uri, "v1") for uri in uris]
        pq.write_table(pa.table({"uri": uris, "etag": versions, "size": [10] * len(uris)}), listed)
        settings = LabelSettings(inputs=(str(listed),), output=str(tmp_path / "labels"), model=models[new], **more)
        return run(settings)

    monkeypatch.setattr("jobs.label.label", label)
    yield night
    assert not ray.is_initialized()


def taken(self: Lease) -> None:
    raise LeaseHeld("taken over")


@pytest.fixture
def table(night, tmp_path) -> LabelTable:
    """The corpus, as the old model labelled it; snapshot 1."""
    assert night(CORPUS)["snapshot"] == 1
    return LabelTable(str(tmp_path / "labels"))


def uris(table: LabelTable) -> list[str]:
    return sorted(table.read(table.current(), columns=["uri"]).read_all()["uri"].to_pylist())


def holding(table: LabelTable, uri: str) -> list[str]:
    """The files under the table that hold a row of an image, in a snapshot or not."""
    paths = [str(path.relative_to(table.uri)) for path in Path(table.uri).rglob("*.parquet")]
    return [path for path in paths if uri in pq.read_table(join(table.uri, path), partitioning=None)["uri"].to_pylist()]


def staged_uris(table: LabelTable) -> list[str]:
    """The images in the only file of the new model."""
    [staged] = Path(table.uri).glob("model=new*/**/*.parquet")
    return pq.read_table(staged, partitioning=None)["uri"].to_pylist()


def vacuum_after_ten_days(table: LabelTable) -> None:
    """A week's vacuum, with every file older than that; the runs have been seen since, and the snapshots replaced."""
    for path in Path(table.uri).rglob("*.parquet"):
        os.utime(path, (time.time() - 10 * 86_400,) * 2)
    delete(table, plan_sweep(table, Retention.of(timedelta(days=7))), check=lambda: None)


def test_a_night_that_leaves_a_model_incomplete_publishes_the_deletions_alone(table, night):
    old = table.current()
    summary = night(CORPUS[1:], new=True, limit=5)
    assert (summary["staged"], summary["planned"]["deleted"], summary["snapshot"]) == (5, 1, 2)
    current = table.current()
    assert uris(table) == sorted(CORPUS[1:])
    assert (current.model_id, current.models) == (old.model_id, {old.model_id: 11})
    assert current.planned == dict.fromkeys(current.planned, 0) | {"deleted": 1}
    # The next night has nothing to delete, and so nothing to publish.
    again = night(CORPUS[1:], new=True, limit=5)
    assert (again["staged"], again["adopted"], again["planned"]["deleted"], again["snapshot"]) == (10, 5, 0, 2)
    last = night(CORPUS[1:], new=True, limit=5)
    assert (last["staged"], last["adopted"], last["snapshot"]) == (0, 10, 3)
    assert list(table.current().models) == [last["model_id"]]
    assert uris(table) == sorted(CORPUS[1:])
    assert unfinished_runs(table) == ()


def test_a_picture_that_is_withdrawn_while_its_labels_wait_is_nowhere_in_the_end(table, night):
    first = table.current()
    assert night(CORPUS, new=True, limit=5)["snapshot"] == 1
    [staged] = Path(table.uri).glob("model=new*/**/*.parquet")
    withdrawn = staged_uris(table)[2]
    rest = [uri for uri in CORPUS if uri != withdrawn]
    summary = night(rest, new=True, limit=3)
    assert (summary["adopted"], summary["staged"], summary["snapshot"]) == (4, 7, 2)
    assert withdrawn not in uris(table)
    assert discarded_files(table) == {str(staged.relative_to(table.uri))}
    # It need not wait for the model: what is left of it is in snapshot 1, and goes with that.
    vacuum_after_ten_days(table)
    assert holding(table, withdrawn) == [file.path for file in first.files]
    done = night(rest, new=True)
    assert (done["adopted"], done["planned"]["new_model"], done["snapshot"]) == (7, 11, 3)
    assert uris(table) == sorted(rest)
    delete(table, plan_sweep(table, Retention.of(timedelta(0))), check=lambda: None)
    assert holding(table, withdrawn) == []
    assert uris(table) == sorted(rest)


def test_a_picture_that_is_withdrawn_on_the_last_night_does_not_come_back_either(table, night):
    assert night(CORPUS, new=True, limit=11)["staged"] == 11
    withdrawn = staged_uris(table)[0]
    rest = [uri for uri in CORPUS if uri != withdrawn]
    assert night(rest, new=True)["snapshot"] == 2
    assert uris(table) == sorted(rest)
    assert (discarded_files(table), unfinished_runs(table)) == (frozenset(), ())
    delete(table, plan_sweep(table, Retention.of(timedelta(0))), check=lambda: None)
    assert holding(table, withdrawn) == []


def test_a_picture_that_changes_while_its_labels_wait_is_labelled_again(table, night):
    night(CORPUS, new=True, limit=5)
    changed = staged_uris(table)[0]
    summary = night(CORPUS, new=True, etags={changed: "v2"})
    assert (summary["adopted"], summary["snapshot"]) == (4, 2)
    rows = table.read(table.current(), columns=["uri", "etag"]).read_all().to_pylist()
    assert {row["uri"] for row in rows if row["etag"] == "v2"} == {changed}
    assert len(rows) == len(CORPUS)


def test_with_deletions_kept_nothing_is_published_or_discarded(table, night):
    night(CORPUS, new=True, limit=5)
    summary = night(CORPUS[:6], new=True, limit=2, deletions="keep")
    assert (summary["planned"]["deleted"], summary["snapshot"]) == (0, 1)
    assert discarded_files(table) == frozenset()


def test_what_a_dead_run_finished_of_other_inputs_waits_while_deletions_are_kept(table, night, monkeypatch):
    others = [f"/other/{number}.jpg" for number in range(5)]
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "confirm", taken)
        with pytest.raises(LeaseHeld):
            night(others, deletions="keep")
    night([*CORPUS, "/corpus/one.jpg"], deletions="keep")
    assert len(unfinished_runs(table)) == 1
    assert night(others, deletions="keep")["adopted"] == 5


def test_a_night_that_is_published_succeeds_whatever_becomes_of_its_note(table, night, monkeypatch):
    def fail(*_: object) -> None:
        raise ConfigError("may not delete")

    with monkeypatch.context() as patched:
        patched.setattr("jobs.label.conclude", fail)
        assert night([*CORPUS, "/corpus/one.jpg"])["snapshot"] == 2
    assert len(unfinished_runs(table)) == 1
    night([*CORPUS, "/corpus/one.jpg", "/corpus/two.jpg"])
    assert unfinished_runs(table) == ()


def test_the_gate_stands_before_the_deletions_too(table, night):
    gate = {"min_images": 5, "max_deleted": 0.2}
    with pytest.raises(GateRefused, match=r"deleted: 50\.0%"):
        night(CORPUS[6:], new=True, limit=2, gate=gate)
    assert table.current().number == 1
    assert night(CORPUS[6:], new=True, limit=2, gate=gate, accept=True)["snapshot"] == 2


def test_deletions_do_not_overtake_another_run(table, night, monkeypatch):
    monkeypatch.setattr(Lease, "confirm", taken)
    with pytest.raises(LeaseHeld, match="taken over"):
        night(CORPUS[1:], new=True, limit=5)
    assert table.current().number == 1


def test_images_that_fail_again_do_not_exceed_the_budget_and_new_ones_do(night):
    broken = dict.fromkeys(CORPUS[:3], "fetch_error")
    assert night(CORPUS, outcomes=broken)["images"] == {"fetch_error": 3, "ok": 9}
    again = night(CORPUS, outcomes=broken)
    assert (again["planned"]["retry"], again["images"], again["snapshot"]) == (3, {"fetch_error": 3}, 2)
    with pytest.raises(
        ErrorBudgetExceeded, match=r"1 of 1 images failed \(100\.0%\), besides 3 that had failed before"
    ):
        night([*CORPUS, "/corpus/one.jpg"], outcomes=broken | {"/corpus/one.jpg": "decode_error"})
