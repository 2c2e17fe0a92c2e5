"""Compare a run with the snapshot that it would follow, and find what somebody should look at before it is published.

A share of the run (failures, images without a face, faces with an attribute) differs too much from the snapshot's if
the difference exceeds its limit by more than chance explains: the lower end of the Agresti-Caffo interval for a
difference of two proportions (The American Statistician 54, 2000), at four standard errors. So small runs pass
unless they are far off, and no limit has to be widened for them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from jobs.data.parts import FileFacts
from jobs.data.plan import Plan
from jobs.data.prevalence import LabelCounts, label_counts
from jobs.data.schema import FAILED, Status
from jobs.data.snapshots import LabelTable, Snapshot

# Forty attributes are looked at every night: at four standard errors chance alone refuses one run in 400.
_SIGMAS: Final = 4.0


class GateSettings(BaseModel):
    """How far a run may be from the table before somebody must look."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_deleted: float = Field(
        0.2, ge=0, le=1, description="share of the table's images that may leave it; an empty inventory never passes"
    )
    max_failed_rise: float = Field(
        0.1, ge=0, le=1, description="rise of the share of images that failed; as many as are retried do not count"
    )
    max_no_face_change: float = Field(
        0.15, ge=0, le=1, description="change of the share of images without a face, among those that could be read"
    )
    max_drift: float = Field(
        0.15, ge=0, le=1, description="change of the share of faces that have an attribute, for each attribute"
    )
    min_images: PositiveInt = Field(
        100, description="images (faces) that the run, and the table, must have for a comparison"
    )


@dataclass(frozen=True)
class Finding:
    """One check that a run did not pass.

    Attributes:
        check: `deleted`, `failed`, `no_face`, or `drift` of an attribute.
        value: the share in the run; of `deleted`, of the table's images.
        before: the share in the snapshot.
        limit: how much they may differ.
    """

    check: str
    value: float
    before: float
    limit: float

    def __str__(self) -> str:
        before = "" if self.check == "deleted" else f", {self.before:.1%} before"
        return f"{self.check}: {self.value:.1%}{before} (limit: {self.limit:.1%})"


def check_inventory(plan: Plan, settings: GateSettings) -> tuple[Finding, ...]:
    """Find a collapsed inventory, such as a wrong prefix or a bucket that is half empty, before any work is done."""
    deleted = plan.planned["deleted"]
    if not deleted:
        return ()
    share = deleted / plan.known
    collapsed = share > settings.max_deleted and deleted >= settings.min_images
    if plan.listed and not collapsed:
        return ()
    return (Finding("deleted", share, 0.0, settings.max_deleted),)


def check_run(
    table: LabelTable, files: Sequence[FileFacts], before: Snapshot | None, *, retried: int, settings: GateSettings
) -> tuple[Finding, ...]:
    """Compare a run's files, which are not published yet, with the snapshot before them; the first has none.

    Raises:
        ConfigError: if the labels of an older file must be read and cannot be.
    """
    if before is None or not files:
        return ()
    outcomes: Counter[str] = Counter()
    for file in files:
        outcomes.update(file.images)
    return (
        *check_outcomes(outcomes, before.images, retried=retried, settings=settings),
        *check_drift(label_counts(table, files), label_counts(table, before.files), settings),
    )


def check_outcomes(
    run: Mapping[str, int], before: Mapping[str, int], *, retried: int, settings: GateSettings
) -> tuple[Finding, ...]:
    """Compare what became of a run's images with what became of the table's.

    Args:
        run: the run's images by status.
        before: the snapshot's images by status.
        retried: how many of the run's images have failed before: of these it is no surprise.
        settings: the limits.
    """
    failed, failed_before = _failed(run), _failed(before)
    images, images_before = sum(run.values()), sum(before.values())
    expected = min(failed, retried)
    failures = _compare(
        "failed",
        (failed - expected, images - expected),
        (failed_before, images_before),
        limit=settings.max_failed_rise,
        settings=settings,
    )
    faceless = _compare(
        "no_face",
        (run.get(Status.NO_FACE, 0), images - failed),
        (before.get(Status.NO_FACE, 0), images_before - failed_before),
        limit=settings.max_no_face_change,
        settings=settings,
    )
    if failures and failures.value < failures.before:  # better than before
        failures = None
    return tuple(filter(None, (failures, faceless)))


def check_drift(run: LabelCounts, before: LabelCounts, settings: GateSettings) -> tuple[Finding, ...]:
    """Compare how common each attribute is among a run's faces and among the table's, the largest change first."""
    found = [
        _compare(
            f"drift of {name}",
            (run.positives[name], run.faces),
            (before.positives[name], before.faces),
            limit=settings.max_drift,
            settings=settings,
        )
        for name in run.positives
    ]
    return tuple(sorted(filter(None, found), key=lambda each: -abs(each.value - each.before)))


def _failed(images: Mapping[str, int]) -> int:
    return sum(images.get(status, 0) for status in FAILED)


def _compare(
    check: str, now: tuple[int, int], then: tuple[int, int], *, limit: float, settings: GateSettings
) -> Finding | None:
    """Compare two shares, each a count and the number that it is a part of; None if there is nothing to say."""
    if min(now[1], then[1]) < settings.min_images:
        return None
    (share, error), (before, error_before) = map(_share, (now, then))
    if abs(share - before) - _SIGMAS * math.hypot(error, error_before) <= limit:
        return None
    return Finding(check, now[0] / now[1], then[0] / then[1], limit)


def _share(part: tuple[int, int]) -> tuple[float, float]:
    """A share with Agresti and Caffo's one success and one failure added, and its standard error."""
    count, total = part[0] + 1, part[1] + 2
    share = count / total
    return share, math.sqrt(share * (1 - share) / total)
