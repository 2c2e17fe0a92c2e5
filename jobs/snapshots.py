"""List the committed states of a label table, oldest first: `mgmtn snapshots LABELS`."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.data.snapshots import LabelTable, Snapshot
from jobs.settings import Place, Settings, run_program
from mgmtn.errors import ConfigError


class SnapshotsSettings(Settings):
    """Settings of `mgmtn snapshots`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    snapshot: PositiveInt | None = Field(None, description="number of the only snapshot to show; unset: all there are")
    format: Literal["auto", "table", "tsv", "json"] = Field(
        "auto", description="json: one object a line; auto: table on a terminal, else tsv"
    )


def run(settings: SnapshotsSettings) -> None:
    """Print a row for each snapshot.

    Raises:
        ConfigError: if there is no label table, no such snapshot (any more), or one is damaged.
    """
    table = LabelTable(settings.labels)
    snapshots = (table.at(settings.snapshot),) if settings.snapshot else table.history()
    rows = [summarise(snapshot) for snapshot in snapshots]
    if not rows:
        raise ConfigError(f"LABELS {settings.labels!r}: there is no label table")
    if settings.format == "json":
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
    elif settings.format == "table" or (settings.format == "auto" and sys.stdout.isatty()):
        _print_table(rows)
    else:
        sys.stdout.writelines("\t".join(cells) + "\n" for cells in [list(rows[0]), *map(_cells, rows)])


def summarise(snapshot: Snapshot) -> dict[str, Any]:
    """One snapshot as a row.

    `images` counts the table's images by status, `models` by the model that labelled them; `planned` says what the run
    found due, and `seconds` how long it took: nothing and null for one that labelled nothing, such as a compaction.
    """
    return {
        "number": snapshot.number,
        "created_at": snapshot.created_at.isoformat(timespec="seconds"),
        "run_id": snapshot.run_id,
        "model_id": snapshot.model_id,
        "files": len(snapshot.files),
        "bytes": snapshot.bytes,
        "rows": snapshot.rows,
        "faces": snapshot.faces,
        "images": snapshot.images,
        "models": snapshot.models,
        "planned": {reason: count for reason, count in snapshot.planned.items() if count},
        "seconds": round(snapshot.pace.seconds, 2) if snapshot.pace else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [_cell(value) for value in row.values()]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={count}" for name, count in value.items())
    return "" if value is None else str(value)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    # Fits 80 columns: on a narrow terminal dates, ids and counts are broken over lines, and no number or time is.
    rows = [
        {"number": row["number"], "created (UTC)": row["created_at"].replace("T", " ")[:19]}
        | {name: row[name] for name in ("run_id", "model_id", "files", "rows", "faces", "images", "planned", "seconds")}
        | ({"model_id": row["models"]} if len(row["models"]) > 1 else {})
        for row in rows
    ]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name, value in rows[0].items():
        folds = name in ("created (UTC)", "run_id", "model_id", "images", "planned")
        justify: Literal["right", "left"] = "right" if isinstance(value, int | float) else "left"
        table.add_column(name, justify=justify, no_wrap=not folds, overflow="fold", min_width=10 if folds else None)
    for row in rows:
        table.add_row(*_cells(row))
    Console(file=sys.stdout, highlight=False).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(SnapshotsSettings, run, argv, prog="mgmtn snapshots", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
