"""Label every face of an image collection with 40 attributes, into a Parquet table.

  mgmtn label PHOTOS --output LABELS

Only what is due is labelled: images that are new or changed, or that the model has not seen, or that failed for a
passing reason. The run's files become part of the table in one step at its end, or not at all.
"""

import logging
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow.compute as pc
import ray
import ray.data
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterSettings, Pools, joined, share, totals
from jobs.data.detection import DetectionSettings
from jobs.data.inventory import inventory_digest, take_inventory
from jobs.data.models import resolve_model
from jobs.data.parts import FileFacts
from jobs.data.pipeline import label_flow
from jobs.data.plan import PLAN_COLUMNS, Plan, make_plan
from jobs.data.schema import FAILED, Status
from jobs.data.sink import MIN_ROWS_PER_WRITE, LabelSink
from jobs.data.snapshots import LabelTable, Snapshot, SnapshotConflict, next_snapshot
from jobs.data.stages import FaceMode, FaceWork
from jobs.outcomes import ErrorBudgetExceeded, LeaseHeld
from jobs.settings import Settings, run_program
from jobs.telemetry import progress_bar
from mgmtn.checkpoint import DEFAULT_MODEL, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.images import ImageLimits
from mgmtn.network import NetworkSettings

log = logging.getLogger(__name__)

EXAMPLES = 10  # images named by --dry-run


class LabelSettings(DetectionSettings, Settings):
    """Settings of `mgmtn label`."""

    inputs: CliPositionalArg[tuple[str, ...]] = Field(
        description="folders, S3 prefixes, images, or lists (.parquet, .csv or .txt with uri)"
    )
    output: str = Field(description="the label table: a folder or an s3:// prefix")
    model: str = Field(DEFAULT_MODEL, description="a model that ships, or a checkpoint's folder, local or s3://")
    faces: FaceMode = Field("detect", description="find every face, or take each picture as one face crop")
    masks: Literal["learned", "landmarks"] = Field(
        "learned", description="group masks from the model itself, or drawn from the landmarks"
    )
    all_files: bool = Field(False, description="take every file of a folder, not only those with an image's suffix")
    limit: int = Field(0, ge=0, description="images labelled in this run at most; 0: all that are due")
    deletions: Literal["drop", "keep"] = Field("drop", description="what becomes of rows whose image is gone")
    relabel: bool = Field(False, description="label every image again")
    dry_run: bool = Field(False, description="say what is due, and why, and stop")
    max_failed_fraction: float = Field(
        0.5, ge=0, le=1, description="share of this run's images that may fail (unreadable, damaged, no image at all)"
    )
    face_workers: PositiveInt | None = Field(
        None, description="processes that read images and find faces; unset: one for each CPU"
    )
    model_workers: PositiveInt | None = Field(
        None, description="processes that run the model, a GPU each; unset: all GPUs, or without any one for each CPU"
    )
    batch_size: PositiveInt = Field(64, description="faces in one forward pass; bounds GPU memory")
    images_per_block: PositiveInt = Field(32, description="images that a worker takes at a time")
    rows_per_file: PositiveInt = Field(MIN_ROWS_PER_WRITE, description="rows gathered for a file; the last has fewer")
    limits: ImageLimits = Field(default_factory=ImageLimits)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


@dataclass(frozen=True)
class Run:
    """What is decided before any work starts."""

    id: str
    table: LabelTable
    current: Snapshot | None
    checkpoint: Checkpoint
    digest: str
    plan: Plan


def run(settings: LabelSettings) -> dict[str, Any]:
    """Label what is due and commit it.

    Raises:
        ConfigError, CheckpointError: before any work.
        ErrorBudgetExceeded: too many images failed; nothing is committed.
        LeaseHeld: another run committed first.
    """
    started = time.monotonic()
    job = prepare_run(settings)
    log.info("event=planned run_id=%s model_id=%s %s", job.id, job.checkpoint.card.model_id, _text(job.plan.planned))
    if settings.dry_run:
        return _dry_summary(job)
    files: tuple[FileFacts, ...] = ()
    if job.plan.due.num_rows:
        files = label(settings, job)
    outcomes = _outcomes(files)
    snapshot = job.current.number if job.current else 0
    seconds = time.monotonic() - started
    summary = _summary(job, settings, outcomes, faces=sum(file.faces for file in files), seconds=seconds)
    check_budget(outcomes, settings.max_failed_fraction, summary | {"snapshot": snapshot})
    if files or len(job.plan.dropped):
        snapshot = commit(job, files).number
    return summary | {"snapshot": snapshot}


def prepare_run(settings: LabelSettings) -> Run:
    """Read the model, the table and the inventory, and plan."""
    checkpoint = resolve_model(settings.model)
    _check_masks(settings, checkpoint)
    table = LabelTable(settings.output)
    current = table.current()
    inventory = take_inventory(settings.inputs, all_files=settings.all_files)
    plan = make_plan(
        inventory,
        table.read(current, columns=PLAN_COLUMNS),
        model_id=checkpoint.card.model_id,
        relabel=settings.relabel,
        deletions=settings.deletions,
        limit=settings.limit or None,
    )
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    return Run(run_id, table, current, checkpoint, inventory_digest(inventory), plan)


def _check_masks(settings: LabelSettings, checkpoint: Checkpoint) -> None:
    network = checkpoint.card.network
    if not isinstance(network, NetworkSettings):
        raise ConfigError(f"model: {settings.model!r} predicts {checkpoint.card.kind}, not attributes")
    if network.masks == "landmarks" and settings.masks == "learned":
        raise ConfigError(f"masks: {settings.model!r} was trained on landmark masks; give --masks landmarks")


def label(settings: LabelSettings, job: Run) -> tuple[FileFacts, ...]:
    """Run the flow on a cluster.

    Returns:
        The facts of the files written, not yet part of the table.

    Raises:
        ConfigError: the job does not fit the cluster.
    """
    card = job.checkpoint.card
    assert isinstance(card.network, NetworkSettings)
    work = FaceWork(
        detector=settings.detector_settings(),
        limits=settings.limits,
        mode=settings.faces,
        image_size=card.network.image_size,
        draw_masks=settings.masks == "landmarks",
        model_id=card.model_id,
        run_id=job.id,
    )
    work.detector.build()  # missing weights show here, once, and not in every worker
    sink = LabelSink(
        settings.output,
        model_id=card.model_id,
        run_id=job.id,
        thresholds_id=card.thresholds_id,
        min_rows_per_write=settings.rows_per_file,
    )
    with joined(settings.cluster):
        pools = share(
            **{name.lower() + "s": value for name, value in totals().items()},
            face_workers=settings.face_workers,
            model_workers=settings.model_workers,
        )
        with progress_shown(job.plan.due.num_rows) as progress:
            label_flow(
                job.plan.due,
                work=work,
                checkpoint=ray.put(job.checkpoint),
                pools=_no_more_than_blocks(pools, job.plan.due.num_rows, settings.images_per_block),
                batch_size=settings.batch_size,
                images_per_block=settings.images_per_block,
                progress=progress,
            ).write_datasink(sink, ray_remote_args={"num_cpus": 0})
    return sink.files


def _no_more_than_blocks(pools: Pools, images: int, images_per_block: int) -> Pools:
    """A small job starts no more processes than it has blocks for: each takes seconds to start."""
    blocks = -(-images // images_per_block)
    return replace(pools, face_workers=min(pools.face_workers, blocks), model_workers=min(pools.model_workers, blocks))


def check_budget(outcomes: Counter[str], max_failed_fraction: float, summary: dict[str, Any]) -> None:
    """Refuse to publish a run in which more images failed than allowed.

    Raises:
        ErrorBudgetExceeded: naming the share, the limit and the outcomes.
    """
    failed = sum(outcomes[status] for status in FAILED)
    if outcomes.total() and failed / outcomes.total() > max_failed_fraction:
        raise ErrorBudgetExceeded(
            f"{failed} of {outcomes.total()} images failed ({failed / outcomes.total():.1%}), more than "
            f"--max-failed-fraction {max_failed_fraction:g} allows; nothing was published. {_text(dict(outcomes))}",
            summary=summary,
        )


def commit(job: Run, files: Iterable[FileFacts]) -> Snapshot:
    """Publish the run's files in place of the rows that they supersede, and of those whose image is gone.

    Raises:
        LeaseHeld: another run committed first; this one's files stay, unlisted.
    """
    files = tuple(files)
    superseded = written_ids(job.table, files) if job.current else []
    kept = job.table.carry_over(job.current, drop_ids=[*superseded, *job.plan.dropped.to_pylist()], run_id=job.id)
    snapshot = next_snapshot(
        job.current,
        files=[*kept, *files],
        run_id=job.id,
        model_id=job.checkpoint.card.model_id,
        thresholds_id=job.checkpoint.card.thresholds_id,
        inventory_digest=job.digest,
        planned=job.plan.planned,
    )
    try:
        return job.table.commit(snapshot)
    except SnapshotConflict as error:
        raise LeaseHeld(str(error)) from error


def written_ids(table: LabelTable, files: Sequence[FileFacts]) -> list[str]:
    """The image_ids that a run's files hold."""
    ids: list[str] = []
    for batch in table.read_files(files, columns=("image_id",)):
        ids += pc.unique(batch["image_id"]).to_pylist()
    return ids


class Tally:
    """Counts what the model workers have finished, for the driver to show."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, counts: dict[str, int]) -> None:
        self.counts.update(counts)

    def get(self) -> Counter[str]:
        return self.counts


@contextmanager
def progress_shown(images: int) -> Iterator[Any]:
    """Show images done, their rate, the time left and the failures so far; yields the actor that counts."""
    tally: Any = ray.remote(num_cpus=0)(Tally).remote()
    finished = threading.Event()
    with progress_bar("label", total=images, unit="images") as bar:

        def show() -> None:
            counts = ray.get(tally.get.remote())
            failed = sum(counts[status] for status in FAILED)
            done = sum(counts[status] for status in Status)
            bar.set(done, f"faces={counts['faces']} no_face={counts[Status.NO_FACE]} failed={failed}")

        def watch() -> None:
            while not finished.wait(1.0):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield tally
        finally:
            finished.set()
            watcher.join()
        show()


def _outcomes(files: Iterable[FileFacts]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.images)
    return counts


def _summary(
    job: Run, settings: LabelSettings, outcomes: Counter[str], *, faces: int, seconds: float
) -> dict[str, Any]:
    return {
        "run_id": job.id,
        "snapshot": 0,
        "model_id": job.checkpoint.card.model_id,
        "planned": job.plan.planned,
        "images": dict(sorted(outcomes.items())),
        "faces": faces,
        "seconds": round(seconds, 2),
        "images_per_second": round(outcomes.total() / seconds, 2),
        "output": settings.output,
    }


def _dry_summary(job: Run) -> dict[str, Any]:
    sizes = job.plan.due["size"]
    return {
        "run_id": None,
        "snapshot": job.current.number if job.current else 0,
        "model_id": job.checkpoint.card.model_id,
        "planned": job.plan.planned,
        "kept": job.plan.kept,
        "bytes": pc.sum(sizes).as_py() or 0,
        "examples": job.plan.due.select(["uri", "reason"]).slice(0, EXAMPLES).to_pylist(),
        "output": job.table.uri,
    }


def _text(counts: dict[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in counts.items() if count)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(LabelSettings, run, argv, prog="mgmtn label", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
