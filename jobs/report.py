"""Report on a label table as one HTML file: `mgmtn report LABELS --output report.html`.

Prevalence of the 40 attributes and its drift against the last snapshot that differs, outcomes, sizes, quality, history,
and samples with boxes, points, masks and labels. The file needs neither scripts nor the network. It holds pictures: who
may not see the images may not see the report.
"""

import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.data.face_samples import SampleMaker, draw_rows
from jobs.data.models import resolve_model
from jobs.data.object_store import file_place, new_file
from jobs.data.prevalence import LabelCounts, label_counts
from jobs.data.snapshots import LabelTable, Snapshot
from jobs.data.table_statistics import STATISTICS_COLUMNS, measure
from jobs.report_page import render
from jobs.settings import FilePlace, Place, Settings, run_program
from mgmtn.checkpoint import Checkpoint, shipped_models
from mgmtn.errors import ConfigError
from mgmtn.images import ImageLimits

log = logging.getLogger(__name__)


class ReportSettings(Settings):
    """Settings of `mgmtn report`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    output: FilePlace = Field("report.html", description="the page: a local file or an s3:// URI")
    snapshot: PositiveInt | None = Field(None, description="number of the snapshot; unset: the current one")
    samples: NonNegativeInt = Field(12, description="images shown; about 60 KB of the page each")
    seed: NonNegativeInt = Field(0, description="number behind the random choice of samples; another draws others")
    model: str | None = Field(
        None, description="the model whose masks are shown; unset: the one of the table, if it ships with this package"
    )
    history: PositiveInt = Field(20, description="snapshots listed")
    limits: ImageLimits = Field(default_factory=ImageLimits)


def run(settings: ReportSettings) -> None:
    """Write the page and print its place.

    Raises:
        ConfigError: there is no such table or snapshot, a file of it is damaged, or the page cannot be written.
        CheckpointError: there is no such model.
    """
    output = file_place(settings.output)
    table = LabelTable(settings.labels)
    snapshot = table.at(settings.snapshot) if settings.snapshot else table.current()
    if snapshot is None:
        raise ConfigError(f"LABELS {settings.labels!r}: there is no label table")
    checkpoint = resolve_model(settings.model) if settings.model else _shipped(snapshot.model_id)
    history = [earlier for earlier in table.history() if earlier.number <= snapshot.number]
    counts = label_counts(table, snapshot.files)
    before, counts_before = last_different(table, history[:-1], snapshot, counts)
    make = SampleMaker(checkpoint, limits=settings.limits)
    page = render(
        labels=table.uri,
        snapshot=snapshot,
        before=before,
        counts=counts,
        counts_before=counts_before,
        statistics=measure(table.read(snapshot, columns=STATISTICS_COLUMNS)),
        samples=[make(rows) for rows in draw_rows(table, snapshot, images=settings.samples, seed=settings.seed)],
        masks_missing=_why_no_masks(checkpoint, snapshot),
        history=history[-settings.history :],
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    with new_file(output) as path:
        path.write_text(page, encoding="utf-8")
    log.info("event=reported snapshot=%d bytes=%d", snapshot.number, len(page))
    print(output, flush=True)


def last_different(
    table: LabelTable, earlier: Sequence[Snapshot], snapshot: Snapshot, counts: LabelCounts
) -> tuple[Snapshot | None, LabelCounts | None]:
    """The last snapshot before this one that has other rows: a compaction has the same, and is no news.

    Raises:
        ConfigError: a file without counts in its facts is gone or damaged.
    """
    for candidate in reversed(earlier):
        found = label_counts(table, candidate.files)
        if (found, candidate.images) != (counts, snapshot.images):
            return candidate, found
    return None, None


def _shipped(model_id: str) -> Checkpoint | None:
    """The model with this id, if it ships."""
    for name in shipped_models():
        checkpoint = Checkpoint.load(name)
        if checkpoint.card.model_id == model_id:
            return checkpoint
    return None


def _why_no_masks(checkpoint: Checkpoint | None, snapshot: Snapshot) -> str:
    if checkpoint is None:
        return f"No masks: model {snapshot.model_id} does not ship with this package; name its checkpoint with --model."
    if checkpoint.card.model_id not in snapshot.models:
        return f"No masks: --model is {checkpoint.card.model_id}, which labelled nothing in this snapshot."
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(ReportSettings, run, argv, prog="mgmtn report", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
