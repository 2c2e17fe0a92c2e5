"""What `mgmtn label` decides before any work starts, and after it: no Ray here."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from jobs import demo
from jobs.cluster import Pools
from jobs.data.object_store import LocalStore, canonical_uri
from jobs.data.parts import FileFacts, write_part
from jobs.data.schema import Status, image_id
from jobs.data.snapshots import LabelTable, next_snapshot
from jobs.label import (
    LabelSettings,
    Tally,
    _no_more_than_blocks,
    check_budget,
    commit,
    main,
    prepare_run,
    run,
    written_ids,
)
from jobs.outcomes import ErrorBudgetExceeded, LeaseHeld
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network with random weights."""
    torch.manual_seed(0)
    checkpoint = Checkpoint.of(MGMTN(TINY), Card(name="tiny", kind="attributes", network=TINY))
    return str(checkpoint.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    demo.run(demo.DemoSettings(output=folder))
    return folder


def settings(photos: Path, output: Path, model: str, **more: Any) -> LabelSettings:
    return LabelSettings(inputs=(str(photos),), output=str(output), model=model, **more)


def publish(label_rows, photos: Path, output: Path, model: str, **columns: Any) -> FileFacts:
    """A table in which every photograph is labelled by the model already; the facts of its file."""
    job = prepare_run(settings(photos, output, model))
    etags = dict(zip(job.plan.due["uri"].to_pylist(), job.plan.due["etag"].to_pylist(), strict=True))
    model_id = job.checkpoint.card.model_id
    rows = pa.concat_tables(
        label_rows({uri: 1}, etag=etag, model_id=model_id, **columns) for uri, etag in etags.items()
    )
    facts = write_part(rows, store=LocalStore(), labels_uri=canonical_uri(str(output)), model_id=model_id, run_id="r1")
    commit(job, [facts])
    return facts


def test_every_wrong_setting_is_named_at_once(capsys):
    flags = ["--faces", "some", "--batch-size", "0", "--max-failed-fraction", "2", "--limits.min-side", "0"]
    assert main(["photos", *flags, "--detector", "dlib", "--limit", "-1"]) == 2
    problems = capsys.readouterr().err
    for name in ("output", "faces", "batch_size", "max_failed_fraction", "limits.min_side", "detector", "limit"):
        assert name in problems.replace("-", "_"), problems


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "absent"}, "no checkpoint at 'absent'"),
        ({"input": "absent"}, "there is no such folder, image or list"),
        ({"output": "ftp://host/labels"}, "no store for ftp://"),
    ],
)
def test_what_does_not_exist_is_a_wrong_setting(photos, tmp_path, model, capsys, changes, problem):
    given = {"input": str(photos), "output": str(tmp_path / "labels"), "model": model} | changes
    assert main([given["input"], "--output", given["output"], "--model", given["model"]]) == 2
    assert problem in capsys.readouterr().err
    assert not ray.is_initialized()


def test_a_mask_network_cannot_label(photos, tmp_path, capsys):
    tiny = MaskNetSettings(depth=3, decoder_channels=(16, 8, 8), resolution=32)
    masks = Checkpoint.of(MaskNet(tiny), Card(name="aml", kind="masks", network=tiny)).save(tmp_path / "aml")
    assert main([str(photos), "--output", str(tmp_path / "labels"), "--model", str(masks)]) == 2
    assert "predicts masks, not attributes" in capsys.readouterr().err


def test_a_model_of_landmark_masks_must_get_them(photos, tmp_path):
    network = TINY.model_copy(update={"masks": "landmarks"})
    card = Card(name="drawn", kind="attributes", network=network)
    drawn = str(Checkpoint.of(MGMTN(network), card).save(tmp_path / "drawn"))
    command = [str(photos), "--output", str(tmp_path / "labels"), "--model", drawn, "--dry-run"]
    assert main(command) == 2
    assert main([*command, "--masks", "landmarks"]) == 0


def test_a_dry_run_says_what_is_due_and_touches_nothing(photos, tmp_path, model, capsys):
    command = [str(photos), "--output", str(tmp_path / "labels"), "--model", model, "--dry-run"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    count = len(list(photos.iterdir()))
    assert summary["planned"] == {"new": count, "changed": 0, "new_model": 0, "retry": 0, "relabel": 0, "deleted": 0}
    assert summary["bytes"] == sum(path.stat().st_size for path in photos.iterdir())
    assert (summary["run_id"], summary["snapshot"], summary["kept"]) == (None, 0, 0)
    assert {example["reason"] for example in summary["examples"]} == {"new"}
    assert not (tmp_path / "labels").exists()
    assert not ray.is_initialized()
    assert main([*command, "--limit", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["planned"]["new"] == 3


def test_an_empty_folder_is_nothing_to_do(tmp_path, model):
    (tmp_path / "photos").mkdir()
    summary = run(settings(tmp_path / "photos", tmp_path / "labels", model))
    assert (summary["images"], summary["faces"], summary["snapshot"]) == ({}, 0, 0)
    assert LabelTable(str(tmp_path / "labels")).current() is None
    assert not ray.is_initialized()


def test_when_nothing_is_due_the_snapshot_stays(photos, tmp_path, model, label_rows):
    publish(label_rows, photos, tmp_path / "labels", model)
    summary = run(settings(photos, tmp_path / "labels", model))
    assert sum(summary["planned"].values()) == 0
    assert (summary["images"], summary["faces"], summary["snapshot"]) == ({}, 0, 1)
    assert not ray.is_initialized()
    dry = run(settings(photos, tmp_path / "labels", model, relabel=True, dry_run=True))
    assert (dry["planned"]["relabel"], dry["kept"], dry["snapshot"]) == (len(list(photos.iterdir())), 0, 1)


def test_an_image_that_is_gone_leaves_the_table_without_any_labelling(photos, tmp_path, model, label_rows):
    publish(label_rows, photos, tmp_path / "labels", model)
    fewer = tmp_path / "fewer.txt"
    kept = sorted(photos.iterdir())[1:]
    fewer.write_text("".join(f"{path}\n" for path in kept))
    keep = run(settings(fewer, tmp_path / "labels", model, deletions="keep"))
    assert (keep["planned"]["deleted"], keep["snapshot"]) == (0, 1)
    drop = run(settings(fewer, tmp_path / "labels", model))
    assert (drop["planned"]["deleted"], drop["snapshot"]) == (1, 2)
    table = LabelTable(str(tmp_path / "labels"))
    ids = table.read(table.current(), columns=["image_id"]).read_all()["image_id"].to_pylist()
    assert set(ids) == {image_id(str(path)) for path in kept}
    assert not ray.is_initialized()


def test_a_files_images_are_known_by_their_ids_once(photos, tmp_path, model, label_rows):
    rows = label_rows({"a": 2, "b": "no_face", "c": 1})
    facts = write_part(rows, store=LocalStore(), labels_uri=str(tmp_path), model_id="m1", run_id="r1")
    assert sorted(written_ids(LabelTable(str(tmp_path)), [facts])) == sorted(map(image_id, "abc"))
    assert written_ids(LabelTable(str(tmp_path)), []) == []


def test_relabelled_images_replace_their_rows(photos, tmp_path, model, label_rows):
    publish(label_rows, photos, tmp_path / "labels", model, young=0.25)
    job = prepare_run(settings(photos, tmp_path / "labels", model, relabel=True, limit=1))
    [uri], model_id = job.plan.due["uri"].to_pylist(), job.checkpoint.card.model_id
    rows = label_rows({uri: 2}, model_id=model_id, young=0.75)
    files = [write_part(rows, store=LocalStore(), labels_uri=job.table.uri, model_id=model_id, run_id=job.id)]
    snapshot = commit(job, files)
    read = job.table.read(snapshot, columns=["uri", "young"]).read_all().to_pylist()
    assert [row["young"] for row in read if row["uri"] == uri] == [0.75, 0.75]
    assert [row["young"] for row in read if row["uri"] != uri] == [0.25] * (len(list(photos.iterdir())) - 1)


def test_a_run_that_was_overtaken_does_not_commit(photos, tmp_path, model, label_rows):
    late = prepare_run(settings(photos, tmp_path / "labels", model))
    facts = publish(label_rows, photos, tmp_path / "labels", model)
    with pytest.raises(LeaseHeld, match="another run committed snapshot 1 first") as refusal:
        commit(late, [facts])
    assert refusal.value.exit_code == 75


@pytest.mark.parametrize(
    ("outcomes", "fraction"),
    [
        ({}, 0.0),
        ({"ok": 1, "crashed": 1}, 0.5),  # exactly what is allowed
        ({"no_face": 5, "too_large": 3, "too_small": 2}, 0.0),  # answers, not failures
        ({"decode_error": 5}, 1.0),
    ],
)
def test_failures_within_the_budget_pass(outcomes, fraction):
    check_budget(Counter(outcomes), fraction, {})


@pytest.mark.parametrize("status", ["fetch_error", "decode_error", "unsupported", "model_error", "crashed"])
def test_failures_beyond_the_budget_are_refused_with_their_numbers(status):
    with pytest.raises(ErrorBudgetExceeded, match=rf"3 of 4 images failed \(75\.0%\).* 0\.5 .*{status}=3") as refusal:
        check_budget(Counter({"ok": 1, status: 3}), 0.5, {"run_id": "r"})
    assert refusal.value.exit_code == 4
    assert refusal.value.summary == {"run_id": "r"}


@pytest.mark.parametrize(
    ("images", "workers"),
    [(1, (1, 1)), (32, (1, 1)), (33, (2, 2)), (96, (3, 3)), (32_000, (8, 4))],
)
def test_a_small_job_starts_no_more_processes_than_it_has_blocks(images, workers):
    pools = Pools(face_workers=8, model_workers=4, cpus_per_face=0.75, cpus_per_model=0.25, gpus_per_model=0)
    fewer = _no_more_than_blocks(pools, images, 32)
    assert (fewer.face_workers, fewer.model_workers) == workers
    assert (fewer.cpus_per_face, fewer.cpus_per_model) == (0.75, 0.25)


def test_the_tally_adds_up_what_workers_report():
    tally = Tally()
    tally.add({"ok": 2, "faces": 3})
    tally.add({"ok": 1, "no_face": 1, "faces": 1})
    assert tally.get() == {"ok": 3, "no_face": 1, "faces": 4}
    assert tally.get()[Status.OK] == 3


def test_a_first_snapshot_follows_nothing():
    assert next_snapshot(None, files=(), run_id="r", model_id="m", inventory_digest="d").number == 1
