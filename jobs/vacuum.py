"""Delete what a label table no longer needs: `mgmtn vacuum LABELS --older-than 7d`.

Goes: snapshots that were replaced longer ago than that, and the files that only they list; files, notes and torn writes
of runs that died, of that age. Stays: the current snapshot, always, and each that was the current one since then, with
all their files; what an unfinished run has done, as long as a run of its model began or wrote something since then.

A promise about pictures that are withdrawn: a picture that leaves the corpus leaves the next snapshot (`mgmtn label`
with `--deletions drop`), and once that snapshot is older than `--older-than`, a vacuum deletes every file under LABELS
that still holds a row of it; with `--older-than 0s` at once. Three things are beyond LABELS: a bucket that keeps
versions (a lifecycle rule must end them; a warning says so), copies that `mgmtn query` made of a table in S3 (the
folder MGMTN_CACHE, by default ~/.cache/mgmtn), and what others have copied.

Before it deletes files it commits the current state again, as a snapshot with the same files: a run that sleeps in its
commit, and has lost its lease meanwhile, then finds its number taken and cannot list what is gone. Both count as one
for `--keep`, and as the current one above.

Killed at any moment it leaves every remaining snapshot readable, and the next vacuum does the rest.
"""

import logging
import re
import secrets
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, PositiveInt, field_validator
from pydantic_settings import CliPositionalArg

from jobs.data.lease import LeaseSettings, held
from jobs.data.object_store import is_s3
from jobs.data.retention import Retention, Sweep, delete, fence, plan_sweep
from jobs.data.snapshots import LabelTable
from jobs.settings import Place, Settings, run_program

if TYPE_CHECKING:  # boto3: for a table in S3 alone
    from jobs.data.s3_remains import TornUpload

log = logging.getLogger(__name__)

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class VacuumSettings(Settings):
    """Settings of `mgmtn vacuum`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    older_than: str = Field(
        "7d", description="age from which what nobody needs may go, as in 90m, 12h, 7d, 2w; 0s: all of it at once"
    )
    keep: PositiveInt = Field(1, description="snapshots that stay at any age, the latest ones")
    dry_run: bool = Field(False, description="say what would be deleted, and stop")
    lease: LeaseSettings = Field(default_factory=LeaseSettings)

    @field_validator("older_than")
    @classmethod
    def _is_duration(cls, text: str) -> str:
        duration(text)
        return text


def duration(text: str) -> timedelta:
    """`90m`, `12h`, `7d` or `2w` as a time span.

    Raises:
        ValueError: for any other text, and for one that is longer than the calendar.
    """
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError("a number and a unit are wanted: s, m, h, d or w, as in 7d")
    try:
        span = timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError:
        span = timedelta.max
    if span > datetime.now(UTC) - datetime.min.replace(tzinfo=UTC):
        raise ValueError(f"{text!r} is longer than the calendar")
    return span


def run(settings: VacuumSettings) -> dict[str, Any]:
    """Delete what may go.

    Raises:
        ConfigError: there is no label table, or something of it cannot be read or deleted.
        LeaseHeld: another run writes to the table.
    """
    started = time.monotonic()
    table = LabelTable(settings.labels)
    retention = Retention.of(duration(settings.older_than), keep=settings.keep)
    sweep = plan_sweep(table, retention)
    uploads = _torn_uploads(table, retention)
    if not settings.dry_run:
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-vacuum-{secrets.token_hex(3)}"
        with held(table.uri, holder=run_id, settings=settings.lease) as lease:
            sweep = plan_sweep(table, retention)  # what was planned before is out of date if another run ended since
            log.info(
                "event=deleting snapshots=%d files=%d bytes=%d", len(sweep.snapshots), len(sweep.files), sweep.bytes
            )
            if sweep.files:
                lease.confirm()
                sweep = fence(table, sweep, run_id=run_id)
            delete(table, sweep, check=lease.confirm)
            for upload in uploads:
                upload.give_up()
    return _summary(sweep, uploads=len(uploads), dry_run=settings.dry_run, started=started)


def _torn_uploads(table: LabelTable, retention: Retention) -> list["TornUpload"]:
    """The uploads that broke off long enough ago; a local table has none."""
    if not is_s3(table.uri):
        return []
    from jobs.data.s3_remains import keeps_versions, torn_uploads

    if keeps_versions(table.uri):
        log.warning("bucket=versioned uri=%r reason='what is deleted stays as an older version'", table.uri)
    uploads = torn_uploads(f"{table.uri.rstrip('/')}/")
    return [upload for upload in uploads if retention.is_over(upload.begun_at)]


def _summary(sweep: Sweep, *, uploads: int, dry_run: bool, started: float) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "deleted": {
            "snapshots": sweep.snapshots,
            "files": len(sweep.files),
            "torn": len(sweep.torn) + uploads,
            "notes": len(sweep.notes),
            "bytes": sweep.bytes,
        },
        "kept": {
            "snapshots": sweep.kept_snapshots,
            "files": sweep.kept_files,
            "files_of_unfinished_runs": sweep.waiting,
            "recent_files": sweep.recent,
            "foreign_files": sweep.foreign,
        },
        "seconds": round(time.monotonic() - started, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(VacuumSettings, run, argv, prog="mgmtn vacuum", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
