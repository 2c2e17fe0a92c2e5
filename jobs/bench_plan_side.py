"""One side of the planning benchmark, in a process of its own: `python -m jobs.bench_plan_side SIDE`, a `PlanSide` as
JSON.

`plan` is `make_plan` over the inventory's files and the table's rows as `mgmtn label` streams them. `plain` is what one
would write in DuckDB instead: an anti join for the images that are new or changed, one for those that are gone, over
the same files into the same format. It knows neither reasons nor attempts, and holds the hash table of a whole side.
"""

import sys
import time
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from jobs.data.object_store import open_store
from jobs.data.parts import read_parts
from jobs.data.plan import PlanLimits, known_columns, make_plan
from jobs.data.schema import TABLE_SCHEMA

MODEL: str = "m1-0123456789ab"


class PlanSide(BaseModel):
    """What a side is to do.

    Attributes:
        inventory: a Parquet file.
        table: Parquet files with the table's `PLAN_COLUMNS`.
        folder: an empty one for what is written.
        memory_gb: limit of DuckDB's memory; None for DuckDB's own.
        known: about how many images the table has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["plan", "plain"]
    inventory: Path
    table: tuple[Path, ...]
    folder: Path
    threads: int
    memory_gb: float | None
    known: int


class PlanResult(BaseModel):
    """What it took.

    Attributes:
        due: images that are new or changed.
        gone: images that left.
        seconds: without the imports.
        cpu_seconds: of all threads.
        peak_mb: the process' largest resident size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    due: int
    gone: int
    seconds: float
    cpu_seconds: float
    peak_mb: float


def work(side: PlanSide) -> PlanResult:
    """Do it and measure."""
    started, cpu_started = time.monotonic(), time.process_time()
    due, gone = _plan(side) if side.name == "plan" else _plain(side)
    return PlanResult(
        due=due,
        gone=gone,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_mb=_peak_bytes() / 1e6,
    )


def _plan(side: PlanSide) -> tuple[int, int]:
    columns = known_columns(side.inventory)
    schema = pa.schema([TABLE_SCHEMA.field(name) for name in columns])
    batches = read_parts([str(path) for path in side.table], store=open_store(str(side.folder)), columns=columns)
    plan = make_plan(
        side.inventory,
        pa.RecordBatchReader.from_batches(schema, (batch.cast(schema) for batch in batches)),
        model_id=MODEL,
        known=side.known,
        limits=PlanLimits(memory_gb=side.memory_gb or 1.0, threads=side.threads, folder=side.folder),
    )
    return plan.planned["new"] + plan.planned["changed"], plan.planned["deleted"]


def _plain(side: PlanSide) -> tuple[int, int]:
    connection = duckdb.connect(config={"threads": side.threads, "temp_directory": str(side.folder / "spill")})
    if side.memory_gb is not None:
        connection.execute(f"SET memory_limit = '{round(1000 * side.memory_gb)}MB'")
    tables = ", ".join(f"'{path}'" for path in side.table)
    queries = {
        "due": f"""SELECT i.* FROM '{side.inventory}' i ANTI JOIN (
            SELECT image_id, etag FROM read_parquet([{tables}]) WHERE face_index <= 0) USING (image_id, etag)""",
        "gone": f"""SELECT image_id FROM (SELECT image_id FROM read_parquet([{tables}]) WHERE face_index <= 0) k
            ANTI JOIN '{side.inventory}' i USING (image_id)""",
    }
    for name, query in queries.items():
        connection.execute(f"COPY ({query}) TO '{side.folder / name}.parquet' (FORMAT parquet, COMPRESSION lz4)")
    due, gone = (pq.read_metadata(side.folder / f"{name}.parquet").num_rows for name in queries)
    return due, gone


def _peak_bytes() -> int:
    # Not getrusage: its figure includes the process that this one was started from.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(work(PlanSide.model_validate_json(sys.argv[1])).model_dump_json(), flush=True)
