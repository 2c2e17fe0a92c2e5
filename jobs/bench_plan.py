"""Measure planning against a plain DuckDB anti join of the same files: `python -m jobs.bench_plan`, or `make bench`.

Ten million synthetic images by default: 1 % new, 2 % changed, 1 % gone, half a percent to be tried again; every tenth
image of the table has a second face. `jobs.bench_plan_side` says what each side is. The sides run one after the other,
each in a process of its own with the same number of threads; the ratios are of the plan to the plain join that may use
as much memory as it likes. Nothing else should run on the machine.
"""

import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, PositiveInt
from pydantic_core import to_json

from jobs.bench_machine import machine
from jobs.bench_plan_side import MODEL, PlanResult, PlanSide
from jobs.data.plan import PlanLimits
from jobs.data.scratch import scratch_folder
from jobs.settings import Settings, run_program

log = logging.getLogger(__name__)

Order = Literal["image_id", "uri"]
_FILE_ROWS: Final = 122_880  # of the table's files, as `mgmtn compact` leaves them
_SIDES: Final = ("plain", "plain, limited", "plan")

_INVENTORY: Final = """
SELECT md5(i::VARCHAR) AS image_id,
    's3://corpus/faces/' || lpad((i // 10000)::VARCHAR, 6, '0') || '/' || lpad(i::VARCHAR, 10, '0') || '.jpg' AS uri,
    md5(CASE WHEN i % 50 = 7 THEN 'changed' ELSE 'as it was' END || i) AS etag, (20000 + (i * 7919) % 400000) AS size
FROM range({images}) t(i) ORDER BY {order}
"""
_TABLE: Final = """
SELECT md5(i::VARCHAR) AS image_id,
    's3://corpus/faces/' || lpad((i // 10000)::VARCHAR, 6, '0') || '/' || lpad(i::VARCHAR, 10, '0') || '.jpg' AS uri,
    md5('as it was' || i) AS etag, CASE WHEN i % 200 = 11 THEN 'fetch_error' ELSE 'ok' END AS status,
    1::SMALLINT AS attempts, (CASE WHEN i % 200 = 11 THEN -1 ELSE face END)::SMALLINT AS face_index,
    '{model}' AS model_id
FROM range({first}, {end}) t(i), (SELECT unnest([0, 1]) AS face) WHERE face = 0 OR i % 10 = 3
ORDER BY image_id, face_index
"""


class PlanBenchSettings(Settings):
    """What is measured."""

    images: PositiveInt = Field(10_000_000, description="images of the inventory, and of the table")
    orders: tuple[Order, ...] = Field(
        ("image_id", "uri"), description="how the inventory's file is sorted, as ours or as a listing; each is measured"
    )
    repeats: PositiveInt = Field(3, description="runs of each side; the medians are reported")
    threads: PositiveInt = Field(os.cpu_count() or 1, description="threads of each side")
    memory_gb: float = Field(PlanLimits().memory_gb, gt=0, description="limit of the plan's memory in DuckDB, GB")
    folder: Path | None = Field(None, description="folder for the files, about 200 bytes an image; unset: TMPDIR's")
    output: Path | None = Field(None, description="JSON file for every single measurement")


def run(settings: PlanBenchSettings) -> dict[str, Any]:
    """Measure, print a table, and return the ratios."""
    measured: list[dict[str, Any]] = []
    with scratch_folder("bench", within=settings.folder) as folder:
        make_files(settings, folder=folder)
        for order in settings.orders:
            for repeat in range(settings.repeats):
                for name in _SIDES if repeat % 2 == 0 else _SIDES[::-1]:
                    result = measure(settings, name=name, order=order, folder=folder)
                    measured.append({"order": order, "repeat": repeat, "side": name} | result.model_dump())
                    log.info("measured %s", " ".join(f"{key}={value}" for key, value in measured[-1].items()))
    check(measured)
    report = {"machine": machine(settings.threads), "ratios": ratios(measured), "measured": measured}
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_bytes(to_json(report, indent=1) + b"\n")
    print(markdown(measured), flush=True)
    return {"machine": report["machine"], "images": settings.images, "ratios": report["ratios"]}


def make_files(settings: PlanBenchSettings, *, folder: Path) -> None:
    """Write `inventory-<order>.parquet` and the table's files, `table/*.parquet`."""
    import duckdb

    images, moved = settings.images, settings.images // 100
    table = _TABLE.format(first=moved, end=images + moved, model=MODEL)
    with duckdb.connect(config={"threads": settings.threads, "temp_directory": str(folder / "spill")}) as connection:
        for order in settings.orders:
            file = folder / f"inventory-{order}.parquet"
            query = _INVENTORY.format(images=images, order=order)
            connection.execute(f"COPY ({query}) TO '{file}' (FORMAT parquet, COMPRESSION zstd)")
        connection.execute(
            f"COPY ({table}) TO '{folder / 'table'}' (FORMAT parquet, COMPRESSION zstd, "
            f"ROW_GROUP_SIZE {_FILE_ROWS}, ROW_GROUPS_PER_FILE 1)"
        )
    log.info("event=made images=%d files=%d", images, len(list((folder / "table").iterdir())))


def measure(settings: PlanBenchSettings, *, name: str, order: Order, folder: Path) -> PlanResult:
    """Run one side in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        side = PlanSide(
            name="plan" if name == "plan" else "plain",
            inventory=folder / f"inventory-{order}.parquet",
            table=tuple(sorted((folder / "table").iterdir())),
            folder=Path(work),
            threads=settings.threads,
            memory_gb=None if name == "plain" else settings.memory_gb,
            known=settings.images,
        )
        command = [sys.executable, "-m", "jobs.bench_plan_side", side.model_dump_json()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return PlanResult.model_validate_json(done.stdout.splitlines()[-1])


def check(measured: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that every side has found the same images."""
    answers = {(row["due"], row["gone"]) for row in measured}
    assert len(answers) == 1, f"the sides disagree on what is due and gone: {sorted(answers)}"


def ratios(measured: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The plan's figures by those of the plain join without a limit: medians over the repeats, by order."""
    return {
        order: {
            name: round(_median(measured, order, "plan", name) / _median(measured, order, "plain", name), 3)
            for name in ("seconds", "cpu_seconds", "peak_mb")
        }
        for order in dict.fromkeys(row["order"] for row in measured)
    }


def markdown(measured: Sequence[Mapping[str, Any]]) -> str:
    """A table of medians, and of the ratios between them."""
    lines = ["| inventory sorted by | side | seconds | CPU seconds | peak MB |", "|---|---|---|---|---|"]
    for order, of_order in ratios(measured).items():
        for side in _SIDES:
            figures = [_median(measured, order, side, name) for name in of_order]
            lines.append(f"| {order} | {side} | {figures[0]:.1f} | {figures[1]:.1f} | {figures[2]:.0f} |")
        shares = " | ".join(f"**{ratio:.2f}**" for ratio in of_order.values())
        lines.append(f"| {order} | plan / plain | {shares} |")
    return "\n".join(lines)


def _median(measured: Sequence[Mapping[str, Any]], order: str, side: str, name: str) -> float:
    return statistics.median(row[name] for row in measured if (row["order"], row["side"]) == (order, side))


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PlanBenchSettings, run, argv, prog="python -m jobs.bench_plan", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
