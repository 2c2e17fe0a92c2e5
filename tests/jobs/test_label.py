"""What `mgmtn label` decides before any work starts, and after it: no Ray here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from jobs import demo
from jobs.cluster import Pools
from jobs.data.lease import LeaseRecord, LeaseSettings, held
from jobs.data.object_store import LocalStore, canonical_uri
from jobs.data.parts import FileFacts, write_part
from jobs.data.resume import announce, unfinished_runs
from jobs.data.run import Run, commit, divide
from jobs.data.schema import image_id
from jobs.data.snapshots import LabelTable, next_snapshot
from jobs.label import (
    LabelSettings,
    _no_more_than_blocks,
    choose_model,
    main,
    note_of,
    prepare_run,
    run,
)
from jobs.outcomes import ErrorBudgetExceeded, GateRefused, LeaseHeld
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


def planned(settings: LabelSettings) -> Run:
    return prepare_run(settings, choose_model(settings))


def leave_files(label_rows, settings: LabelSettings, names: Sequence[str], **columns: Any) -> Run:
    """A run that wrote one file, with these photographs of the plan, and died."""
    job = planned(settings)
    announce(job.table, note_of(settings, job))
    model_id = job.checkpoint.card.model_id
    due = [row for row in job.plan.due.to_pylist() if Path(row["uri"]).name in names]
    told = {"model_id": model_id, "run_id": job.id} | columns
    rows = [label_rows({row["uri"]: 1}, etag=row["etag"], attempts=row["attempts"], **told) for row in due]
    write_part(pa.concat_tables(rows), store=LocalStore(), labels_uri=job.table.uri, model_id=model_id, run_id=job.id)
    return job


def publish(label_rows, photos: Path, output: Path, model: str, **columns: Any) -> FileFacts:
    """A table in which every photograph is labelled by the model already; the facts of its file."""
    job = planned(settings(photos, output, model))
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


def test_all_that_is_seen_to_be_wrong_is_told_at_once_and_before_the_table_is_touched(tmp_path, capsys):
    command = ["nowhere", "gone.jpg", "--output", str(tmp_path / "labels"), "--model", "nope"]
    assert main([*command, "--detector", "fan", "--fan.weights", "/none.pth"]) == 2
    told = capsys.readouterr().err
    for problem in ("model: no checkpoint at 'nope'", "input 'nowhere'", "input 'gone.jpg'", "no weights at /none.pth"):
        assert problem in told
    assert not (tmp_path / "labels").exists()


def test_a_place_that_cannot_be_is_told_with_its_setting(photos, model, capsys):
    assert main([str(photos), "--output", "", "--model", str(model)]) == 2
    assert "--output: '': an empty path" in capsys.readouterr().err


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


def test_relabelled_images_replace_their_rows(photos, tmp_path, model, label_rows):
    publish(label_rows, photos, tmp_path / "labels", model, young=0.25)
    job = planned(settings(photos, tmp_path / "labels", model, relabel=True))
    uri, model_id = job.plan.due["uri"][0].as_py(), job.checkpoint.card.model_id
    rows = label_rows({uri: 2}, model_id=model_id, young=0.75)
    files = [write_part(rows, store=LocalStore(), labels_uri=job.table.uri, model_id=model_id, run_id=job.id)]
    snapshot = commit(job, files)
    read = job.table.read(snapshot, columns=["uri", "young"]).read_all().to_pylist()
    assert [row["young"] for row in read if row["uri"] == uri] == [0.75, 0.75]
    assert [row["young"] for row in read if row["uri"] != uri] == [0.25] * (len(list(photos.iterdir())) - 1)


def test_a_run_that_was_overtaken_does_not_commit(photos, tmp_path, model, label_rows):
    late = planned(settings(photos, tmp_path / "labels", model))
    facts = publish(label_rows, photos, tmp_path / "labels", model)
    with pytest.raises(LeaseHeld, match="another run committed snapshot 1 first") as refusal:
        commit(late, [facts])
    assert refusal.value.exit_code == 75


@pytest.mark.parametrize(
    ("images", "workers"),
    [(1, (1, 1)), (32, (1, 1)), (33, (2, 2)), (96, (3, 3)), (32_000, (8, 4))],
)
def test_a_small_job_starts_no_more_processes_than_it_has_blocks(images, workers):
    pools = Pools(face_workers=8, model_workers=4, cpus_per_face=0.75, cpus_per_model=0.25, gpus_per_model=0)
    fewer = _no_more_than_blocks(pools, images, 32)
    assert (fewer.face_workers, fewer.model_workers) == workers
    assert (fewer.cpus_per_face, fewer.cpus_per_model) == (0.75, 0.25)


def test_a_first_snapshot_follows_nothing():
    assert next_snapshot(None, files=(), run_id="r", model_id="m", inventory_digest="d").number == 1


def test_a_run_is_refused_while_another_holds_the_lease(photos, tmp_path, model, capsys):
    command = [str(photos), "--output", str(tmp_path / "labels"), "--model", model]
    with held(str(tmp_path / "labels"), holder="the-other", settings=LeaseSettings()):
        assert main(command) == 75
        assert main([*command, "--dry-run"]) == 0  # it only looks
    assert "run the-other" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["_lease"]
    assert not ray.is_initialized()


def test_work_that_a_dead_run_has_done_is_published_without_doing_it_again(photos, tmp_path, model, label_rows):
    every = [path.name for path in photos.iterdir()]
    died = leave_files(label_rows, settings(photos, tmp_path / "labels", model), every)
    summary = run(settings(photos, tmp_path / "labels", model))
    assert (summary["adopted"], summary["images"], summary["snapshot"]) == (len(every), {"ok": len(every)}, 1)
    assert not ray.is_initialized()
    table = LabelTable(str(tmp_path / "labels"))
    current = table.current()
    assert current is not None
    assert [file.run_id for file in current.files] == [died.id]
    assert current.planned["new"] == len(every)
    assert unfinished_runs(table) == ()


def test_a_run_that_died_after_its_commit_is_forgotten_by_the_next(photos, tmp_path, model, label_rows):
    given = settings(photos, tmp_path / "labels", model)
    job = leave_files(label_rows, given, [path.name for path in photos.iterdir()])
    run(given)
    announce(job.table, note_of(given, job))
    assert run(given)["snapshot"] == 1
    assert unfinished_runs(job.table) == ()


def test_a_limit_counts_what_is_still_to_be_done(photos, tmp_path, model, label_rows):
    given = settings(photos, tmp_path / "labels", model)
    first = sorted(path.name for path in photos.iterdir())[:4]
    leave_files(label_rows, given, first)
    job = planned(given)
    work = divide(job, note_of(given, job), limit=3, resume=True)
    total = len(list(photos.iterdir()))
    assert (work.adopted.images, work.images, work.later["new"]) == (4, 3, total - 7)
    assert work.planned(job.plan)["new"] == 7
    [todo] = work.tables
    assert not {Path(uri).name for uri in todo["uri"].to_pylist()} & set(first)
    assert not work.incomplete_model
    everything = divide(job, note_of(given, job), limit=0, resume=False)
    assert (everything.adopted.images, everything.images, everything.later) == (0, total, {})


def test_a_limit_beyond_what_fits_in_memory_is_done_in_rounds(photos, tmp_path, model, label_rows, monkeypatch):
    monkeypatch.setattr("jobs.data.run.IMAGES_PER_ROUND", 3)
    given = settings(photos, tmp_path / "labels", model, limit=5)
    leave_files(label_rows, given, [path.name for path in photos.iterdir()][:2])
    job = planned(given)
    work = divide(job, note_of(given, job), limit=5, resume=True)
    todo = list(work.tables)
    total = len(list(photos.iterdir()))
    assert (work.images, sum(rows.num_rows for rows in todo), work.later["new"]) == (5, 5, total - 7)
    assert max(rows.num_rows for rows in todo) <= 3
    ids = pa.concat_tables(todo)["image_id"].to_pylist()
    assert ids == sorted(set(ids))
    dry = run(given.model_copy(update={"dry_run": True}))
    sizes = dict(zip(job.plan.due["image_id"].to_pylist(), job.plan.due["size"].to_pylist(), strict=True))
    assert dry["bytes"] == sum(sizes[each] for each in sorted(sizes)[:5])


def test_a_new_model_is_not_published_before_it_has_labelled_everything(photos, tmp_path, model, label_rows):
    publish(label_rows, photos, tmp_path / "labels", model)
    torch.manual_seed(1)
    other = str(Checkpoint.of(MGMTN(TINY), Card(name="other", kind="attributes", network=TINY)).save(tmp_path / "m"))
    given = settings(photos, tmp_path / "labels", other)
    names = sorted(path.name for path in photos.iterdir())
    job = leave_files(label_rows, given, names[:5])
    work = divide(job, note_of(given, planned(given)), limit=2, resume=True)
    assert work.incomplete_model
    assert (work.adopted.images, work.images, work.later["new_model"]) == (5, 2, len(names) - 7)
    # The old model's nights go on, and do not touch what the new one has so far.
    (extra := tmp_path / "list.txt").write_text("".join(f"{photos / name}\n" for name in names[1:]))
    assert run(settings(extra, tmp_path / "labels", model))["snapshot"] == 2
    assert len(unfinished_runs(job.table)) == 1
    # The rest is done, in another run that died: then the switch is one commit.
    leave_files(label_rows, given, names[5:])
    summary = run(given)
    assert (summary["staged"], summary["adopted"], summary["snapshot"]) == (0, len(names), 3)
    current = job.table.current()
    assert current is not None
    assert current.models == {job.checkpoint.card.model_id: len(names)}
    assert job.table.at(2).models == {choose_model(settings(photos, tmp_path, model)).card.model_id: len(names) - 1}


def test_a_collapsed_inventory_is_refused_until_it_is_accepted(photos, tmp_path, model, label_rows, capsys):
    publish(label_rows, photos, tmp_path / "labels", model)
    (tmp_path / "empty").mkdir()
    command = [str(tmp_path / "empty"), "--output", str(tmp_path / "labels"), "--model", model]
    assert main(command) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refused"][0]["check"] == "deleted"
    assert main([*command, "--accept"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["snapshot"] == 2


def test_a_refused_run_can_be_accepted_and_is_not_done_again(photos, tmp_path, model, label_rows):
    every = [path.name for path in photos.iterdir()]
    publish(label_rows, photos, tmp_path / "labels", model)
    gate = {"min_images": 5, "max_drift": 0.0}
    given = settings(photos, tmp_path / "labels", model, relabel=True, gate=gate)
    leave_files(label_rows, given, every, labels=0)
    with pytest.raises(GateRefused, match="drift of") as refusal:
        run(given)
    assert refusal.value.summary is not None
    assert refusal.value.summary["adopted"] == len(every)
    table = LabelTable(str(tmp_path / "labels"))
    assert all(one.refusal for one in unfinished_runs(table))
    summary = run(given.model_copy(update={"accept": True}))
    assert (summary["adopted"], summary["snapshot"]) == (len(every), 2)
    assert not ray.is_initialized()


def test_images_that_failed_in_passing_are_tried_again_after_a_refusal(photos, tmp_path, model, label_rows):
    every = [path.name for path in photos.iterdir()]
    given = settings(photos, tmp_path / "labels", model)
    leave_files(label_rows, given, every[1:])
    leave_files(label_rows, given, every[:1], status="fetch_error", error="a store that did not answer")
    strict = given.model_copy(update={"max_failed_fraction": 0.0})
    with pytest.raises(ErrorBudgetExceeded):
        run(strict)
    job = planned(given)
    work = divide(job, note_of(given, job), limit=0, resume=True)
    [todo] = work.tables
    assert [Path(uri).name for uri in todo["uri"].to_pylist()] == every[:1]
    assert divide(job, note_of(given, job), limit=0, resume=True, accept_failures=True).images == 0


def test_a_run_whose_lease_was_taken_does_not_commit(photos, tmp_path, model, label_rows):
    job = planned(settings(photos, tmp_path / "labels", model))
    model_id = job.checkpoint.card.model_id
    rows = label_rows({"a": 1}, model_id=model_id)
    facts = write_part(rows, store=LocalStore(), labels_uri=job.table.uri, model_id=model_id, run_id=job.id)
    with held(job.table.uri, holder=job.id, settings=LeaseSettings()) as lease:
        last = max((tmp_path / "labels" / "_lease").iterdir())
        record = LeaseRecord.model_validate_json(last.read_text())
        usurper = record.model_copy(update={"fence": record.fence + 1, "holder": "the-other"})
        last.with_name(f"{int(last.stem) + 1:020d}.json").write_text(usurper.model_dump_json())
        with pytest.raises(LeaseHeld, match="nothing was published"):
            commit(job, [facts], confirm=lease.confirm)
    assert job.table.current() is None
