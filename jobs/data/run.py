"""One labelling run from plan to commit: what it is planned on, what it need not do again, what it publishes."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from jobs.data.parts import FileFacts
from jobs.data.plan import REASONS, Plan
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


def divide(job: Run, note: RunNote, *, limit: int, resume: bool, accept_failures: bool = False) -> Work:
    """Tell what runs that died have done, what is done now, and what is left for later.

    Args:
        job: the run.
        note: what the run is.
        limit: images labelled now at most; 0: all.
        resume: take up finished files.
        accept_failures: see `adopt`.

    Raises:
        ConfigError: the table cannot be read or written.
    """
    adopted = Adopted()
    if resume:
        due = job.plan.due_files if job.plan.images else ()
        adopted = adopt(job.table, note, current=job.current, due=due, accept_failures=accept_failures)
    images = job.plan.images - adopted.images
    if not limit or images <= limit:
        return Work(adopted, images, adopted.remaining(job.plan.due_tables(rows=IMAGES_PER_ROUND)), {})
    first = next(adopted.remaining(job.plan.due_tables(rows=adopted.images + limit)))
    todo = first.slice(0, limit)
    counts = Counter(todo["reason"].to_pylist())
    later = {reason: job.plan.planned[reason] - adopted.reasons.get(reason, 0) - counts[reason] for reason in REASONS}
    return Work(adopted, todo.num_rows, iter([todo]), later)


def commit(
    job: Run,
    files: Iterable[FileFacts],
    *,
    planned: dict[str, int] | None = None,
    pace: Pace | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> Snapshot:
    """Publish files in place of the rows that they supersede, and of those whose image is gone.

    Args:
        job: the run.
        files: the run's own and those that it adopted.
        planned: images by reason, as the snapshot tells them; the whole plan by default.
        pace: how fast the run was.
        confirm: called last before the commit, to make sure that the lease is still held.

    Raises:
        LeaseHeld: another run committed first; this one's files stay, unlisted, for the same command to take up.
    """
    files = tuple(files)
    gone = pa.concat_arrays([written_ids(job.table, files), job.plan.dropped]) if job.current else ()
    kept = job.table.carry_over(job.current, drop_ids=gone, run_id=job.id)
    snapshot = next_snapshot(
        job.current,
        files=[*kept, *files],
        run_id=job.id,
        model_id=job.checkpoint.card.model_id,
        thresholds_id=job.checkpoint.card.thresholds_id,
        inventory_digest=job.digest,
        planned=planned or job.plan.planned,
        pace=pace,
    )
    if len(snapshot.models) > 1:
        log.warning("event=mixed_models snapshot=%d images=%s", snapshot.number, snapshot.models)
    confirm()
    try:
        return job.table.commit(snapshot)
    except SnapshotConflict as error:
        raise LeaseHeld(str(error)) from error


def written_ids(table: LabelTable, files: Sequence[FileFacts]) -> pa.Array:
    """The image_ids that a run's files hold, strings; those of a file's row groups may be there twice."""
    batches = table.read_files(files, columns=("image_id",))
    return pa.chunked_array([pc.unique(batch["image_id"]) for batch in batches], pa.string()).combine_chunks()


def outcomes_of(files: Iterable[FileFacts]) -> Counter[str]:
    """Images by status."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(file.images)
    return counts
