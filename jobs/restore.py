"""Make an earlier snapshot the table's current state again: `mgmtn restore LABELS --snapshot 12`.

It is committed as a new snapshot with the earlier one's files, so that nothing is lost: the state that it replaces
stays in the history, and can be restored in turn. The next `mgmtn label` compares the images with the restored rows:
what came since is due again, and pictures that were withdrawn since leave again. Relabel with the model of the restored
rows, or the next night brings the other model's back.
"""

import logging
import secrets
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.data.lease import LeaseSettings, held
from jobs.data.snapshots import LabelTable, Snapshot, SnapshotConflict, next_snapshot
from jobs.outcomes import LeaseHeld
from jobs.settings import Place, Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)


class RestoreSettings(Settings):
    """Settings of `mgmtn restore`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    snapshot: PositiveInt = Field(description="number of the snapshot whose rows are wanted; see mgmtn snapshots")
    dry_run: bool = Field(False, description="check that it can be restored, say what would change, and stop")
    lease: LeaseSettings = Field(default_factory=LeaseSettings)


def run(settings: RestoreSettings) -> dict[str, Any]:
    """Commit the earlier state anew.

    Raises:
        ConfigError: there is no such snapshot, or its files are gone or damaged.
        LeaseHeld: another run writes to the table.
    """
    started = time.monotonic()
    table = LabelTable(settings.labels)
    current, wanted = _both(table, settings.snapshot)
    if settings.dry_run:
        table.verify(wanted.files)
    if settings.dry_run or current.files == wanted.files:
        return _summary(current, wanted, current, started=started)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-restore-{secrets.token_hex(3)}"
    with held(table.uri, holder=run_id, settings=settings.lease) as lease:
        current, wanted = _both(table, settings.snapshot)
        snapshot = next_snapshot(
            current,
            files=wanted.files,
            run_id=run_id,
            model_id=wanted.model_id,
            thresholds_id=wanted.thresholds_id,
            inventory_digest=wanted.inventory_digest,
        )
        lease.confirm()
        try:
            restored = table.commit(snapshot)
        except SnapshotConflict as error:
            raise LeaseHeld(str(error)) from error
    log.info("event=restored snapshot=%d as=%d", wanted.number, restored.number)
    return _summary(current, wanted, restored, started=started)


def _both(table: LabelTable, number: int) -> tuple[Snapshot, Snapshot]:
    current = table.current()
    if current is None:
        raise ConfigError(f"LABELS {table.uri!r}: there is no label table")
    return current, table.at(number)


def _summary(before: Snapshot, wanted: Snapshot, after: Snapshot, *, started: float) -> dict[str, Any]:
    return {
        "snapshot": after.number,
        "restored": wanted.number,
        "model_id": wanted.model_id,
        "rows": {"before": before.rows, "after": wanted.rows},
        "files": {"before": len(before.files), "after": len(wanted.files)},
        "seconds": round(time.monotonic() - started, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(RestoreSettings, run, argv, prog="mgmtn restore", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
