"""Put a label table's small files together: `mgmtn compact LABELS`.

Each night adds files of that night's images. This rewrites a model's small files as few large ones, sorted by image_id,
and commits them as a new snapshot with the same rows. Readers see the files before or those after, never both. Old
snapshots keep their files until `mgmtn vacuum`.
"""

import logging
import secrets
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import DirectoryPath, Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.data.compaction import Lot, choose_lots, rewrite
from jobs.data.lease import Lease, LeaseSettings, held
from jobs.data.parts import ROW_GROUP_ROWS, FileFacts
from jobs.data.snapshots import LabelTable, Snapshot, SnapshotConflict, next_snapshot
from jobs.outcomes import LeaseHeld
from jobs.settings import Place, Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

ROWS_PER_FILE: Final = 4 * ROW_GROUP_ROWS


class CompactSettings(Settings):
    """Settings of `mgmtn compact`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    rows_per_file: PositiveInt = Field(
        ROWS_PER_FILE, description="rows of a new file, about; smaller than half of it, a file is small. 0.7 KB a row"
    )
    all_files: bool = Field(
        False, description="rewrite a model's large files too, so that each image_id can be in one file only"
    )
    dry_run: bool = Field(False, description="say what would be rewritten, and stop")
    scratch: DirectoryPath | None = Field(
        None, description="folder for the rows in between, 1 KB each; unset: the system's temporary folder"
    )
    lease: LeaseSettings = Field(default_factory=LeaseSettings)


def run(settings: CompactSettings) -> dict[str, Any]:
    """Rewrite what is worth it and commit it.

    Raises:
        ConfigError: there is no label table, or a file of it is missing or damaged.
        LeaseHeld: another run writes to the table.
    """
    started = time.monotonic()
    table = LabelTable(settings.labels)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-compact-{secrets.token_hex(3)}"
    if settings.dry_run:
        current = _current(table)
        return _summary(None, current, current, lots=_lots(current, settings), written=None, started=started)
    _current(table)  # a wrong LABELS shows before a lease is written there
    with held(table.uri, holder=run_id, settings=settings.lease) as lease:
        current = _current(table)
        lots = _lots(current, settings)
        if not lots:
            return _summary(None, current, current, lots=(), written=(), started=started)
        log.info(
            "event=compacting files=%d rows=%d", sum(len(lot.files) for lot in lots), sum(lot.rows for lot in lots)
        )
        written = tuple(file for lot in lots for file in rewrite(table, lot, run_id=run_id, scratch=settings.scratch))
        snapshot = commit(table, current, lots=lots, written=written, run_id=run_id, lease=lease)
    return _summary(run_id, current, snapshot, lots=lots, written=written, started=started)


def _current(table: LabelTable) -> Snapshot:
    current = table.current()
    if current is None:
        raise ConfigError(f"LABELS {table.uri!r}: there is no label table")
    return current


def _lots(current: Snapshot, settings: CompactSettings) -> tuple[Lot, ...]:
    return choose_lots(current, rows_per_file=settings.rows_per_file, all_files=settings.all_files)


def commit(
    table: LabelTable,
    current: Snapshot,
    *,
    lots: Sequence[Lot],
    written: Sequence[FileFacts],
    run_id: str,
    lease: Lease,
) -> Snapshot:
    """Publish new files in place of those that they were made of.

    Raises:
        LeaseHeld: another run took the lease or committed; the new files stay, unlisted, until they are vacuumed.
    """
    replaced = {file.path for lot in lots for file in lot.files}
    snapshot = next_snapshot(
        current,
        files=[*(file for file in current.files if file.path not in replaced), *written],
        run_id=run_id,
        model_id=current.model_id,
        thresholds_id=current.thresholds_id,
        inventory_digest=current.inventory_digest,
    )
    assert (snapshot.rows, snapshot.images, snapshot.faces) == (current.rows, current.images, current.faces)
    lease.confirm()
    try:
        return table.commit(snapshot)
    except SnapshotConflict as error:
        raise LeaseHeld(str(error)) from error


def _summary(
    run_id: str | None,
    before: Snapshot,
    after: Snapshot,
    *,
    lots: Sequence[Lot],
    written: Sequence[FileFacts] | None,
    started: float,
) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "snapshot": after.number,
        "rewritten": {"files": sum(len(lot.files) for lot in lots), "rows": sum(lot.rows for lot in lots)},
        "written": sum(lot.files_after for lot in lots) if written is None else len(written),
        "files": {"before": len(before.files), "after": len(after.files)},
        "bytes": {"before": before.bytes, "after": after.bytes},
        "seconds": round(time.monotonic() - started, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(CompactSettings, run, argv, prog="mgmtn compact", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
