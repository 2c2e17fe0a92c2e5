"""One labelling run from plan to commit: what it is planned on, what it need not do again, what it publishes."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.data.buckets import ImageIds, bucket_bounds
from jobs.data.parts import FileFacts
from jobs.data.plan import REASONS, Plan, PlanLimits
from jobs.data.resume import Adopted, RunNote, adopt
from jobs.data.snapshots import LabelTable, Pace, Snapshot, SnapshotConflict, next_snapshot
from jobs.outcomes import LeaseHeld
from mgmtn.checkpoint import Checkpoint

log = logging.getLogger(__name__)

IMAGES_PER_ROUND: Final = 1_000_000  # images given to Ray at a time, about 150 MB of plan


@dataclass(frozen=True)
class Run:
    """What is decided before any work starts."""

    id: str
    table: LabelTable
    current: Snapshot | None
    checkpoint: Checkpoint
    digest: str
    plan: Plan

    @property
    def parent(self) -> int:
        """Number of the snapshot that the run was planned on; 0 for none."""
        return self.current.number if self.current else 0


@dataclass(frozen=True)
class Work:
    """What of a plan a run does.

    Attributes:
        adopted: finished files of runs that died.
        images: how many images are labelled now.
        tables: their rows, sorted by image_id, in tables that fit in memory.
        later: due images that are left for another run, by reason.
    """

    adopted: Adopted
    images: int
    tables: Iterator[pa.Table]
    later: dict[str, int]

    def planned(self, plan: Plan) -> dict[str, int]:
        """Images by reason that this run answers for."""
        return {reason: count - self.later.get(reason, 0) for reason, count in plan.planned.items()}

    @property
    def incomplete_model(self) -> bool:
        """Whether images that another model labelled would be left beside those of this one."""
        return self.later.get("new_model", 0) > 0


NO_WORK: Final = Work(Adopted(), images=0, tables=iter(()), later={})


def divide(
    job: Run,
    note: RunNote,
    *,
    limit: int,
    resume: bool,
    accept_failures: bool = False,
    discard: bool = False,
    limits: PlanLimits | None = None,
) -> Work:
    """Tell what runs that died have done, what is done now, and what is left for later.

    Args:
        job: the run.
        note: what the run is.
        limit: images labelled now at most; 0: all.
        resume: take up finished files.
        accept_failures: see `adopt`.
        discard: see `adopt`; never where a folder could not be listed, whose images may be due again.
        limits: memory and temporary files.

    Raises:
        ConfigError: the table cannot be read or written.
    """
    adopted = Adopted()
    if resume:
        adopted = adopt(
            job.table,
            note,
            current=job.current,
            due=job.plan.due_files if job.plan.images else (),
            accept_failures=accept_failures,
            discard=discard and not job.plan.unreadable,
            limits=limits,
        )
    images = job.plan.images - adopted.images
    todo = adopted.remaining(job.plan.due_tables(rows=IMAGES_PER_ROUND))
    if not limit or images <= limit:
        return Work(adopted, images, todo, {})
    counts: Counter[str] = Counter()
    for rows in _first(limit, todo):
        counts.update(rows["reason"].to_pylist())
    later = {reason: job.plan.planned[reason] - adopted.reasons.get(reason, 0) - counts[reason] for reason in REASONS}
    todo = adopted.remaining(job.plan.due_tables(rows=IMAGES_PER_ROUND))
    return Work(adopted, limit, _first(limit, todo), later)


def _first(count: int, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The first rows of tables, as many as are wanted and there."""
    for rows in tables:
        yield rows.slice(0, count)
        count -= rows.num_rows
        if count <= 0:
            return


def publish(
    job: Run,
    work: Work,
    files: Sequence[FileFacts],
    *,
    pace: Pace | None,
    limits: PlanLimits,
    confirm: Callable[[], None],
) -> Snapshot | None:
    """Commit what a run has done, or the deletions alone if its model is incomplete; None if there is nothing to do.

    Arguments and errors as for `commit`.
    """
    if work.incomplete_model:
        log.warning("event=staged run_id=%s later=%d", job.id, sum(work.later.values()))
        return commit_deletions(job, limits=limits, confirm=confirm) if job.plan.planned["deleted"] else None
    if not files and not job.plan.planned["deleted"]:
        return None
    return commit(job, files, planned=work.planned(job.plan), pace=pace, limits=limits, confirm=confirm)


def commit(
    job: Run,
    files: Iterable[FileFacts],
    *,
    planned: dict[str, int] | None = None,
    pace: Pace | None = None,
    limits: PlanLimits | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> Snapshot:
    """Publish files in place of the rows that they supersede, and of those whose image is gone.

    Args:
        job: the run.
        files: the run's own and those that it adopted.
        planned: images by reason, as the snapshot tells them; the whole plan by default.
        pace: how fast the run was.
        limits: memory and temporary files.
        confirm: called last before the commit, to make sure that the lease is still held.

    Raises:
        LeaseHeld: another run committed first; this one's files stay, unlisted, for the same command to take up.
    """
    files = tuple(files)
    snapshot = next_snapshot(
        job.current,
        files=[*_carried_over(job, files, limits or PlanLimits()), *files],
        run_id=job.id,
        model_id=job.checkpoint.card.model_id,
        thresholds_id=job.checkpoint.card.thresholds_id,
        inventory_digest=job.digest,
        planned=planned or job.plan.planned,
        pace=pace,
    )
    if len(snapshot.models) > 1:
        log.warning("event=mixed_models snapshot=%d images=%s", snapshot.number, snapshot.models)
    return _publish(job, snapshot, confirm)


def commit_deletions(
    job: Run, *, limits: PlanLimits | None = None, confirm: Callable[[], None] = lambda: None
) -> Snapshot:
    """Publish the table as it is without the images that are gone: the run's own labels have to wait for the rest.

    Arguments and errors as for `commit`; there is a current snapshot.
    """
    assert job.current is not None, "nothing can be gone from no table"
    snapshot = next_snapshot(
        job.current,
        files=_carried_over(job, (), limits or PlanLimits()),
        run_id=job.id,
        model_id=job.current.model_id,
        thresholds_id=job.current.thresholds_id,
        inventory_digest=job.current.inventory_digest,
        planned=dict.fromkeys(job.plan.planned, 0) | {"deleted": job.plan.planned["deleted"]},
    )
    return _publish(job, snapshot, confirm)


def _carried_over(job: Run, files: Sequence[FileFacts], limits: PlanLimits) -> tuple[FileFacts, ...]:
    """The current snapshot's files, without the rows of images that are in a run's files or gone."""
    if job.current is None:
        return ()
    with limits.scratch("commit") as folder:
        gone = superseded_ids(job, files, folder=folder / "gone", images_per_bucket=limits.images_per_bucket)
        return job.table.carry_over(job.current, drop_ids=gone, run_id=job.id)


def superseded_ids(job: Run, files: Sequence[FileFacts], *, folder: Path, images_per_bucket: int) -> ImageIds:
    """The images that a run's files hold, and those that are gone.

    Args:
        job: the run.
        files: its own and those that it adopted.
        folder: a new one, about 20 bytes an image.
        images_per_bucket: about how many ids are in memory at a time.
    """
    images = outcomes_of(files).total() + job.plan.planned["deleted"]
    written = job.table.read_files(files, columns=("image_id",))
    dropped = (batch for path in job.plan.dropped_files for batch in pq.ParquetFile(path).iter_batches())
    bounds = bucket_bounds(images, rows_per_bucket=images_per_bucket)
    return ImageIds.of(chain(written, dropped), folder=folder, bounds=bounds)


def _publish(job: Run, snapshot: Snapshot, confirm: Callable[[], None]) -> Snapshot:
    confirm()
    try:
        return job.table.commit(snapshot)
    except SnapshotConflict as error:
        raise LeaseHeld(str(error)) from error


def outcomes_of(files: Iterable[FileFacts]) -> Counter[str]:
    """Images by status."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.images)
    return counts
