"""Label every face of an image collection with 40 attributes, into a Parquet table.

  mgmtn label PHOTOS --output LABELS

The inputs of one command are the whole corpus of the table: what is in none of them leaves it (`--deletions`). Only
what is due is labelled: images that are new or changed, or that the model has not seen, or that failed for a passing
reason. The run's files become part of the table in one step at its end, or not at all. The same command after a run
that died takes up the files which that one had finished (`deploy/crashes.md`).

A new model labels every image again, in files of its own, and the commit that puts them in place of the old ones is
the switch. Until then the table is the old model's as a whole: a run that leaves some of a new model's images for later
(`--limit`) publishes none of its labels, keeps its files, and the same command goes on with the rest. Images that are
gone leave the table all the same, in a snapshot of the old model's rows. Meanwhile nights with the old model can be
run and published as before. After the switch the old labels are in the snapshots before it
(`--snapshot` of the commands that read), until these are vacuumed.
"""

import logging
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal

import pyarrow.compute as pc
import ray
import ray.data
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterSettings, Pools, joined, share, totals
from jobs.data.detection import DetectionSettings, on_this_machine
from jobs.data.forecast import expected_seconds
from jobs.data.gate import GateSettings, check_inventory, check_run
from jobs.data.inventory import check_inputs, inventory_digest, write_inventory
from jobs.data.lease import LeaseSettings, ending_on_sigterm, held
from jobs.data.ledger import progress_shown, settings_of_workers, start_ledger
from jobs.data.models import resolve_model
from jobs.data.parts import FileFacts
from jobs.data.pipeline import label_flow
from jobs.data.plan import PlanLimits, known_columns, make_plan
from jobs.data.prevalence import prevalence
from jobs.data.resume import RunNote, announce, conclude, refuse
from jobs.data.run import NO_WORK, Run, Work, divide, outcomes_of, publish
from jobs.data.sink import ROWS_PER_FILE, LabelSink
from jobs.data.snapshots import LabelTable, Pace, Snapshot
from jobs.data.stages import FaceMode, FaceWork
from jobs.outcomes import ErrorBudgetExceeded, GateRefused, all_of
from jobs.run_metrics import MetricsSettings, RunMetrics, reported
from jobs.settings import Place, Settings, run_program
from jobs.verdict import check_budget, counts_text, pass_gate
from mgmtn.checkpoint import DEFAULT_MODEL, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.images import ImageLimits
from mgmtn.network import NetworkSettings

log = logging.getLogger(__name__)

EXAMPLES = 10  # images named by --dry-run


class LabelSettings(DetectionSettings, Settings):
    """Settings of `mgmtn label`."""

    inputs: CliPositionalArg[tuple[str, ...]] = Field(
        description="folders, S3 prefixes, images, or lists (.parquet, .csv or .txt with uri); all of one command are "
        "the whole corpus of the table: an image of the table that is in none of them is taken for deleted and leaves "
        "it, unless --deletions keep. Two folders of one table belong in one command"
    )
    output: Place = Field(description="the label table: a folder or an s3:// prefix")
    model: str = Field(DEFAULT_MODEL, description="a model that ships, or a checkpoint's folder, local or s3://")
    faces: FaceMode = Field("detect", description="find every face, or take each picture as one face crop")
    masks: Literal["learned", "landmarks"] = Field(
        "learned", description="group masks from the model itself, or drawn from the landmarks"
    )
    all_files: bool = Field(False, description="take every file of a folder, not only those with an image's suffix")
    limit: int = Field(0, ge=0, description="images labelled in this run at most; 0: all that are due")
    deletions: Literal["drop", "keep"] = Field(
        "drop", description="what becomes of rows whose image is gone, that is, in none of the inputs"
    )
    relabel: bool = Field(
        False, description="label every image again, in one run: with --limit each would take the same images again"
    )
    dry_run: bool = Field(False, description="say what is due, and why, and stop")
    max_failed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of this run's images that may fail (unreadable, damaged, no image at all); as many failures "
        "as images are tried again do not count. A night of one new picture, which is damaged, exceeds any below 1",
    )
    face_workers: PositiveInt | None = Field(
        None, description="processes that read images and find faces; unset: one for each CPU"
    )
    model_workers: PositiveInt | None = Field(
        None, description="processes that run the model, a GPU each; unset: all GPUs, or without any one for each CPU"
    )
    batch_size: PositiveInt = Field(64, description="faces in one forward pass; bounds GPU memory")
    images_per_block: PositiveInt = Field(32, description="images that a worker takes at a time")
    # S3's client gives a request up after 325 s: 8 attempts of 5 s to connect and 30 s to read, and 45 s between them.
    task_timeout: float = Field(
        360,
        ge=0,
        description="seconds for a step of a worker: to have another image read, to find the faces of up to 16 images, "
        "to run the model on a batch. A worker that takes longer is ended and its images are tried one by one; one "
        "that hangs alone, twice, becomes `crashed`. Above the 325 s that S3's retries may take; 0: no limit",
    )
    rows_per_file: PositiveInt = Field(
        ROWS_PER_FILE,
        description="rows gathered for a file, the last has fewer; what a run that dies has gathered is lost. "
        "mgmtn compact makes large files of small ones",
    )
    resume: bool = Field(True, description="take up the finished files of runs that died")
    accept: bool = Field(False, description="publish what the gate refuses, the files of a refused run included")
    gate: GateSettings = Field(default_factory=GateSettings)
    plan: PlanLimits = Field(default_factory=PlanLimits)
    limits: ImageLimits = Field(default_factory=ImageLimits)
    lease: LeaseSettings = Field(default_factory=LeaseSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


def run(settings: LabelSettings) -> dict[str, Any]:
    """Label what is due and commit it.

    Raises:
        ConfigError, CheckpointError: before any work.
        LeaseHeld: another run writes the table, or took the lease from this one, or committed first.
        ErrorBudgetExceeded: too many images failed; nothing is committed.
        GateRefused: the plan, or what came of it, is too far from the table; nothing is committed.
    """
    if settings.dry_run:
        return _dry_summary(settings, prepare_run(settings, check(settings)))
    with reported(settings.metrics) as metrics:
        return _run(settings, metrics, check(settings))


def check(settings: LabelSettings) -> Checkpoint:
    """Load the model, and see what can be seen of the other settings before any work.

    Raises:
        ConfigError, CheckpointError: naming all that is wrong.
    """
    checkpoint, *_ = all_of(
        lambda: choose_model(settings),
        lambda: check_inputs(settings.inputs),
        lambda: on_this_machine(settings.chosen_detector()).build(),  # its weights
    )
    return checkpoint


def _run(settings: LabelSettings, metrics: RunMetrics, checkpoint: Checkpoint) -> dict[str, Any]:
    started, run_id = time.monotonic(), new_run_id()
    with held(settings.output, holder=run_id, settings=settings.lease) as lease:
        job = prepare_run(settings, checkpoint, run_id=run_id)
        metrics.plan(job.plan.planned)
        _tell_snapshot(metrics, job.table, job.current)
        note = note_of(settings, job)
        refusal = _summary(settings, job, NO_WORK, (), seconds=time.monotonic() - started)
        pass_gate(check_inventory(job.plan, settings.gate), refusal, accept=settings.accept)
        if job.plan.images:
            announce(job.table, note)
        work = divide(
            job,
            note,
            limit=settings.limit,
            resume=settings.resume,
            accept_failures=settings.accept,
            discard=settings.deletions == "drop",
            limits=settings.plan,
        )
        counts = counts_text(
            work.planned(job.plan) | {"adopted": work.adopted.images, "later": sum(work.later.values())}
        )
        log.info("event=planned run_id=%s model_id=%s %s", job.id, job.checkpoint.card.model_id, counts)
        metrics.plan(work.planned(job.plan))
        files = (*work.adopted.files, *(label(settings, job, work, metrics) if work.images else ()))
        metrics.count(outcomes_of(files))
        _tell_drift(metrics, job, files)
        summary = _summary(settings, job, work, files, seconds=time.monotonic() - started)
        judge(settings, job, work, files, summary)
        pace = Pace(images=work.images, seconds=time.monotonic() - started) if work.images else None
        snapshot = publish(job, work, files, pace=pace, limits=settings.plan, confirm=lease.confirm)
        if snapshot is not None:
            _tell_snapshot(metrics, job.table, snapshot)
            summary["snapshot"] = snapshot.number
        if not work.incomplete_model:
            _forget_runs(settings, job, work)
        return summary


def _forget_runs(settings: LabelSettings, job: Run, work: Work) -> None:
    """Forget this run and those that it looked through, whose files are in the table or of no use.

    Not those where something may be due that is not so tonight: of a folder that could not be listed, or, with
    deletions kept, of other inputs.
    """
    of_no_use = settings.deletions == "drop" and not job.plan.unreadable
    try:
        conclude(job.table, [job.id, *(work.adopted.runs if of_no_use else ())])
    except ConfigError as error:  # the night is published; the next run forgets them
        log.warning("event=notes_stay error=%s", error)


def new_run_id() -> str:
    """Sorts by time; two runs of one second differ."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def choose_model(settings: LabelSettings) -> Checkpoint:
    """The checkpoint that labels.

    Raises:
        CheckpointError, ConfigError: there is none, or it cannot be used so.
    """
    checkpoint = resolve_model(settings.model)
    _check_masks(settings, checkpoint)
    return checkpoint


def prepare_run(settings: LabelSettings, checkpoint: Checkpoint, *, run_id: str | None = None) -> Run:
    """Read the table and the inventory, and plan."""
    table = LabelTable(settings.output)
    current = table.current()
    with settings.plan.scratch("inventory") as folder:
        inventory = write_inventory(settings.inputs, folder / "inventory", all_files=settings.all_files)
        digest = inventory_digest(inventory)
        plan = make_plan(
            inventory,
            table.read(current, columns=known_columns(inventory)),
            model_id=checkpoint.card.model_id,
            relabel=settings.relabel,
            deletions=settings.deletions,
            known=sum(current.images.values()) if current else 0,
            limits=settings.plan,
        )
    return Run(run_id or new_run_id(), table, current, checkpoint, digest, plan)


def note_of(settings: LabelSettings, job: Run) -> RunNote:
    """What of a run decides its rows: another run's files may be taken over only if all of it is the same."""
    return RunNote(
        run_id=job.id,
        started_at=datetime.now(UTC),
        parent=job.parent,
        model_id=job.checkpoint.card.model_id,
        thresholds_id=job.checkpoint.card.thresholds_id,
        work={
            "faces": settings.faces,
            "masks": settings.masks,
            "detector": {"kind": settings.detector} | getattr(settings, settings.detector).model_dump(mode="json"),
            "limits": settings.limits.model_dump(mode="json"),
        },
    )


def _check_masks(settings: LabelSettings, checkpoint: Checkpoint) -> None:
    network = checkpoint.card.network
    if not isinstance(network, NetworkSettings):
        raise ConfigError(f"model: {settings.model!r} predicts {checkpoint.card.kind}, not attributes")
    if network.masks == "landmarks" and settings.masks == "learned":
        raise ConfigError(f"masks: {settings.model!r} was trained on landmark masks; give --masks landmarks")


def label(settings: LabelSettings, job: Run, work: Work, metrics: RunMetrics) -> tuple[FileFacts, ...]:
    """Run the flow on a cluster.

    Args:
        settings: of the program.
        job: the run.
        work: at least one image.

    Returns:
        The facts of the files written, not yet part of the table.

    Raises:
        ConfigError: the job does not fit the cluster.
    """
    face_work = face_work_of(settings, job)
    files: list[FileFacts] = []
    # Ray's own handler of SIGTERM would end the process before the lease is given back, and outlives Ray.
    with ending_on_sigterm(), joined(settings.cluster), ending_on_sigterm():
        pools = share(
            **{name.lower() + "s": value for name, value in totals().items()},
            face_workers=settings.face_workers,
            model_workers=settings.model_workers,
        )
        checkpoint, ledger = ray.put(job.checkpoint), start_ledger()
        with settings_of_workers(ledger), progress_shown(ledger, images=work.images, report=metrics.count):
            for due in work.tables:
                sink = LabelSink(
                    settings.output,
                    model_id=face_work.model_id,
                    run_id=job.id,
                    thresholds_id=job.checkpoint.card.thresholds_id,
                    rows_per_file=settings.rows_per_file,
                )
                label_flow(
                    due,
                    work=face_work,
                    checkpoint=checkpoint,
                    pools=_no_more_than_blocks(pools, due.num_rows, settings.images_per_block),
                    batch_size=settings.batch_size,
                    images_per_block=settings.images_per_block,
                    task_timeout=settings.task_timeout,
                    progress=ledger,
                    ledger=ledger,
                ).write_datasink(sink, ray_remote_args={"num_cpus": 0})
                files += sink.files
    return tuple(files)


def face_work_of(settings: LabelSettings, job: Run) -> FaceWork:
    """What face workers are told."""
    card = job.checkpoint.card
    assert isinstance(card.network, NetworkSettings)
    return FaceWork(
        detector=settings.chosen_detector(),
        limits=settings.limits,
        mode=settings.faces,
        image_size=card.network.image_size,
        draw_masks=settings.masks == "landmarks",
        model_id=card.model_id,
        run_id=job.id,
    )


def _no_more_than_blocks(pools: Pools, images: int, images_per_block: int) -> Pools:
    """A small job starts no more processes than it has blocks for: each takes seconds to start."""
    blocks = -(-images // images_per_block)
    return replace(pools, face_workers=min(pools.face_workers, blocks), model_workers=min(pools.model_workers, blocks))


def judge(settings: LabelSettings, job: Run, work: Work, files: Sequence[FileFacts], summary: dict[str, Any]) -> None:
    """Refuse to publish a bad run, and say so beside its files, which stay.

    Raises:
        ErrorBudgetExceeded: too many images failed.
        GateRefused: the run is too far from the table.
    """
    try:
        retried = work.planned(job.plan)["retry"]
        check_budget(outcomes_of(files), settings.max_failed_fraction, summary, retried=retried)
        if not work.incomplete_model:  # part of a model's work is compared when it is whole
            findings = check_run(job.table, files, job.current, retried=retried, settings=settings.gate)
            pass_gate(findings, summary, accept=settings.accept)
    except (ErrorBudgetExceeded, GateRefused) as error:
        for run_id in (job.id, *work.adopted.runs):
            refuse(job.table, run_id, reason=str(error))
        raise


def _tell_snapshot(metrics: RunMetrics, table: LabelTable, snapshot: Snapshot | None) -> None:
    if snapshot is not None:
        shares = prevalence(table, snapshot.files)
        metrics.snapshot(snapshot.number, snapshot.created_at, prevalence=shares)


def _tell_drift(metrics: RunMetrics, job: Run, files: Sequence[FileFacts]) -> None:
    if job.current is not None:
        before = prevalence(job.table, job.current.files)
        metrics.drift(prevalence(job.table, files), before=before)


def _summary(
    settings: LabelSettings, job: Run, work: Work, files: Sequence[FileFacts], *, seconds: float
) -> dict[str, Any]:
    outcomes = outcomes_of(files)
    done = outcomes.total() - work.adopted.images
    return {
        "run_id": job.id,
        "snapshot": job.parent,
        "model_id": job.checkpoint.card.model_id,
        "planned": work.planned(job.plan),
        "adopted": work.adopted.images,
        "staged": outcomes.total() if work.incomplete_model else 0,
        "images": dict(sorted(outcomes.items())),
        "faces": sum(file.faces for file in files),
        "seconds": round(seconds, 2),
        "images_per_second": round(done / seconds, 2),
        "output": settings.output,
    }


def _dry_summary(settings: LabelSettings, job: Run) -> dict[str, Any]:
    work = divide(job, note_of(settings, job), limit=settings.limit, resume=False)
    first = next(work.tables, None)
    due = chain([first], work.tables) if first is not None else ()
    examples = first.select(["uri", "reason"]).slice(0, EXAMPLES).to_pylist() if first is not None else []
    return {
        "run_id": None,
        "snapshot": job.parent,
        "model_id": job.checkpoint.card.model_id,
        "planned": work.planned(job.plan),
        "kept": job.plan.kept + sum(count for reason, count in work.later.items() if reason != "new"),
        "bytes": sum(pc.sum(rows["size"]).as_py() or 0 for rows in due) if work.later else job.plan.bytes,
        "expected_seconds": expected_seconds(
            job.table, job.current, images=work.images, model_id=job.checkpoint.card.model_id
        ),
        "refused": [asdict(finding) for finding in check_inventory(job.plan, settings.gate)],
        "examples": examples,
        "output": settings.output,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(LabelSettings, run, argv, prog="mgmtn label", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
