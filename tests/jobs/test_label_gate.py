"""Runs that the gate refuses, and what becomes of them: everything is labelled already, so no Ray here."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from jobs.data.gate import GateSettings
from jobs.data.parts import write_part
from jobs.data.prevalence import prevalence
from jobs.data.resume import announce, unfinished_runs
from jobs.data.schema import image_id
from jobs.data.snapshots import LabelTable
from jobs.label import LabelSettings, choose_model, main, note_of, prepare_run, run
from jobs.outcomes import GateRefused
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

SMILING = 1 << ATTRIBUTES.index("smiling")
OLD = {f"/corpus/{number}.jpg": 1 for number in range(400)}
NEW = {f"/corpus/{number}.jpg": 1 for number in range(400, 700)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tiny = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)
    checkpoint = Checkpoint.of(MGMTN(tiny), Card(name="tiny", kind="attributes", network=tiny))
    return str(checkpoint.save(tmp_path_factory.mktemp("model")))


def images_listed(folder: Path, *uris: str) -> str:
    path = folder / "images.parquet"
    pq.write_table(pa.table({"uri": uris, "etag": ["v1"] * len(uris), "size": [10] * len(uris)}), path)
    return str(path)


def settings(tmp_path: Path, model: str, *uris: str, **more: Any) -> LabelSettings:
    listed = images_listed(tmp_path, *uris)
    return LabelSettings(inputs=(listed,), output=str(tmp_path / "labels"), model=model, **more)


def leave_finished(label_rows, given: LabelSettings, outcomes: dict[str, Any], *, run_id: str, labels: int = 0) -> None:
    """The files of a run that died before its commit."""
    job = prepare_run(given, choose_model(given), run_id=run_id)
    announce(job.table, note_of(given, job).model_copy(update={"started_at": datetime(2026, 1, 1, tzinfo=UTC)}))
    model_id = job.checkpoint.card.model_id
    write_part(
        label_rows(outcomes, labels=labels, model_id=model_id, run_id=run_id),
        store=job.table.store,
        labels_uri=job.table.uri,
        model_id=model_id,
        run_id=run_id,
    )


@pytest.fixture
def table(label_rows, tmp_path, model) -> LabelTable:
    """400 images, nobody smiles; snapshot 1."""
    given = settings(tmp_path, model, *OLD)
    leave_finished(label_rows, given, OLD, run_id="first")
    assert run(given)["snapshot"] == 1
    return LabelTable(str(tmp_path / "labels"))


def test_an_inventory_that_collapsed_is_refused_and_can_be_accepted(table, tmp_path, model, capsys):
    some = [*OLD][:100]
    command = [images_listed(tmp_path, *some), "--output", table.uri, "--model", model]
    assert main(command) == 3
    said = capsys.readouterr()
    assert "deleted: 75.0% (limit: 20.0%)" in said.err
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["refused"] == [{"check": "deleted", "value": 0.75, "before": 0.0, "limit": 0.2}]
    assert (summary["planned"]["deleted"], summary["snapshot"], table.current().number) == (300, 1, 1)
    assert main([*command, "--accept"]) == 0
    assert (table.current().number, sum(table.current().images.values())) == (2, 100)


def test_an_empty_inventory_never_empties_the_table_by_itself(table, tmp_path, model):
    (tmp_path / "photos").mkdir()
    given = {"inputs": (str(tmp_path / "photos"),), "output": table.uri, "model": model}
    with pytest.raises(GateRefused, match=r"deleted: 100\.0%"):
        run(LabelSettings(**given, gate=GateSettings(max_deleted=1)))
    assert run(LabelSettings(**given, deletions="keep"))["snapshot"] == 1


def test_a_dry_run_tells_what_would_be_refused_and_how_long_the_rest_would_take(table, tmp_path, model, label_rows):
    summary = run(settings(tmp_path, model, *[*OLD][:100], *NEW, dry_run=True))
    assert [finding["check"] for finding in summary["refused"]] == ["deleted"]
    assert summary["expected_seconds"] is None  # no image was labelled, all were taken over
    assert summary["bytes"] == 3000
    assert len(summary["examples"]) == 10


@pytest.mark.parametrize(
    ("outcomes", "labels", "finding"),
    [
        (NEW, SMILING, r"drift of smiling: 100\.0%, 0\.0% before \(limit: 15\.0%\)"),
        (dict.fromkeys(NEW, "no_face"), 0, r"no_face: 100\.0%, 0\.0% before"),
        (dict.fromkeys([*NEW][:100], "decode_error") | dict.fromkeys([*NEW][100:], 1), 0, r"failed: 33\.3%, 0\.0%"),
    ],
    ids=["drift", "no_face", "failed"],
)
def test_a_run_too_far_from_the_table_is_kept_and_published_when_accepted(
    table, tmp_path, model, label_rows, outcomes, labels, finding
):
    given = settings(tmp_path, model, *OLD, *NEW)
    leave_finished(label_rows, given, outcomes, run_id="second", labels=labels)
    with pytest.raises(GateRefused, match=finding) as refusal:
        run(given)
    assert refusal.value.exit_code == 3
    assert refusal.value.summary["adopted"] == 300
    assert table.current().number == 1
    assert "the gate refuses" in next(found.refusal.reason for found in unfinished_runs(table) if found.refusal)
    accepted = run(given.model_copy(update={"accept": True}))
    assert (accepted["snapshot"], accepted["adopted"]) == (2, 300)
    ids = table.read(table.current(), columns=["image_id"]).read_all()["image_id"].to_pylist()
    assert sorted(ids) == sorted(map(image_id, {**OLD, **NEW}))
    assert unfinished_runs(table) == ()
    assert not ray.is_initialized()


def test_a_run_like_the_table_is_published(table, tmp_path, model, label_rows):
    given = settings(tmp_path, model, *OLD, *NEW)
    smiles = dict.fromkeys([*NEW][:30], 1)
    leave_finished(label_rows, given, smiles, run_id="second", labels=SMILING)
    leave_finished(label_rows, given, {uri: 1 for uri in NEW if uri not in smiles}, run_id="third")
    assert run(given)["snapshot"] == 2
    assert prevalence(table, table.current().files)["smiling"] == pytest.approx(30 / 700)


def test_a_relabelling_by_another_model_is_compared_too(table, tmp_path, label_rows, model):
    torch.manual_seed(1)
    tiny = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)
    other = Checkpoint.of(MGMTN(tiny), Card(name="other", kind="attributes", network=tiny))
    given = settings(tmp_path, str(other.save(tmp_path / "other")), *OLD)
    leave_finished(label_rows, given, OLD, run_id="second", labels=SMILING)
    with pytest.raises(GateRefused, match="drift of smiling"):
        run(given)
    assert run(given.model_copy(update={"accept": True}))["planned"]["new_model"] == 400
