"""What is due in a run and why, from the inventory and the current snapshot.

Both may be larger than memory, and so may the work be: they are compared one range of image_ids at a time, by DuckDB
with a limit on its memory, and the plan lies in Parquet files until it is run.
"""

import logging
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from jobs.data.comparison import DUE, GONE, PLAN_COLUMNS, Rules, Sides, cut_sides, known_columns
from jobs.data.schema import INVENTORY_SCHEMA
from jobs.data.scratch import scratch_folder
from mgmtn.errors import ConfigError

if TYPE_CHECKING:
    import duckdb

__all__ = ["DUE_SCHEMA", "PLAN_COLUMNS", "REASONS", "Plan", "PlanLimits", "known_columns", "make_plan"]

log = logging.getLogger(__name__)

REASONS: Final = ("new", "changed", "new_model", "retry", "relabel")
DUE_SCHEMA: Final = pa.schema([*INVENTORY_SCHEMA, ("attempts", pa.int16()), ("reason", pa.string())])
_GONE_SCHEMA: Final = pa.schema([("image_id", pa.string())])
_READ_ROWS: Final = 65_536


class PlanLimits(BaseModel):
    """What planning may use of the driver's machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_gb: float = Field(1.0, ge=0.1, description="memory of the comparison, GB; beyond it goes to disk")
    threads: PositiveInt | None = Field(None, description="threads of the comparison; unset: all CPUs")
    images_per_bucket: PositiveInt = Field(1_000_000, description="images that are compared at a time")
    folder: Path | None = Field(
        None, description="local folder for temporary files, about 300 bytes an image; unset: TMPDIR's"
    )

    @contextmanager
    def scratch(self, purpose: str) -> Iterator[Path]:
        """A new folder for temporary files: see `scratch_folder`.

        Raises:
            ConfigError: it cannot be made.
        """
        with ExitStack() as undo:
            try:
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                folder = undo.enter_context(scratch_folder(purpose, within=self.folder))
            except OSError as error:
                where = "TMPDIR" if self.folder is None else repr(str(self.folder))
                raise ConfigError(f"plan.folder: no folder can be made in {where}: {error.strerror}") from error
            yield folder


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Attributes:
        planned: due images by reason, and `deleted`.
        listed: how many images the inventory has.
        known: how many images the table has.
        kept: how many images of the table stay as they are.
        bytes: of the images that are due, as far as their sizes are known.
        due_files: Parquet files of `DUE_SCHEMA`, sorted by image_id from the first to the last: the inventory's
            columns, the attempt number that the run records, why. They are deleted with the plan.
        dropped_files: Parquet files with the image_ids of the images that leave the table.
        unreadable: the inventory's folders that could not be listed; what they hold is neither due nor gone.
    """

    planned: dict[str, int]
    listed: int
    known: int
    kept: int
    bytes: int
    due_files: tuple[Path, ...]
    dropped_files: tuple[Path, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images are due."""
        return sum(self.planned[reason] for reason in REASONS)

    def due_tables(self, *, rows: int) -> Iterator[pa.Table]:
        """The due images in order, in tables of so many rows, the last with the rest: for more than fit in memory."""
        return _tables(self.due_files, schema=DUE_SCHEMA, rows=rows)

    @cached_property
    def due(self) -> pa.Table:
        """All due images, in memory."""
        return _whole(self.due_files, schema=DUE_SCHEMA)

    @cached_property
    def dropped(self) -> pa.Array:
        """The image_ids, strings, of the images that leave the table, in memory."""
        return _whole(self.dropped_files, schema=_GONE_SCHEMA)["image_id"].combine_chunks()


def make_plan(
    inventory: pa.Table | Path,
    current: pa.Table | pa.RecordBatchReader,
    *,
    model_id: str,
    relabel: bool = False,
    deletions: Literal["drop", "keep"] = "drop",
    limit: int | None = None,
    known: int = 0,
    limits: PlanLimits | None = None,
) -> Plan:
    """Compare the inventory with the table.

    Args:
        inventory: from `take_inventory`, or the same as a Parquet file or a folder of them, each image once. Files
            sorted by image_id are read as they lie, others are copied to temporary files in that order first.
        current: the current snapshot's rows, as `LabelTable.read` streams them; read once. Of their columns
            `known_columns(inventory)` will do.
        model_id: the model that will label; an image labelled by another is due.
        relabel: every image is due.
        deletions: whether an image that left the inventory leaves the table.
        limit: at most so many images are due, the first by image_id; the others stay as they are until another run.
        known: about how many images the table has, for the number of buckets.
        limits: memory, threads and temporary files.

    Returns:
        The plan. An image whose folder could not be listed is not taken for deleted.

    Raises:
        ConfigError: if a Parquet file of the inventory cannot be read.
    """
    # Imported here: kept by this module, it would outlive Ray's threads at exit and fill the terminal with warnings.
    import duckdb

    limits = limits or PlanLimits()
    with ExitStack() as undo:
        folder = undo.enter_context(limits.scratch("plan"))
        with (
            tempfile.TemporaryDirectory(dir=folder) as work,
            closing(duckdb.connect(config=_configuration(limits, folder=work))) as connection,
        ):
            started = time.monotonic()
            try:
                sides = cut_sides(
                    inventory,
                    current,
                    known=known,
                    images_per_bucket=limits.images_per_bucket,
                    folder=Path(work),
                )
                rules = Rules(model_id, relabel=relabel, drop=deletions == "drop")
                plan = _compare(connection, sides, rules, limit=limit, folder=folder)
            except duckdb.OutOfMemoryException as error:
                raise ConfigError(f"plan.memory_gb: {limits.memory_gb:g} GB are too few: {error}") from error
            log.info("event=compared buckets=%d seconds=%.2f", len(sides.buckets), time.monotonic() - started)
        weakref.finalize(plan, undo.pop_all().close)
        return plan


def _configuration(limits: PlanLimits, *, folder: str) -> dict[str, Any]:
    wanted = {
        "memory_limit": f"{round(1000 * limits.memory_gb)}MB",
        "temp_directory": folder,
        "preserve_insertion_order": False,  # what needs an order sorts; keeping another costs memory
    }
    return wanted | ({"threads": limits.threads} if limits.threads else {})


def _compare(
    connection: "duckdb.DuckDBPyConnection", sides: Sides, rules: Rules, *, limit: int | None, folder: Path
) -> Plan:
    planned = dict.fromkeys((*REASONS, "deleted"), 0)
    known = size = 0
    due_files: list[Path] = []
    dropped_files: list[Path] = []
    for bucket in sides.buckets:
        known += rules.judge(connection, sides, bucket=bucket)
        due, dropped = folder / f"due-{bucket:04d}.parquet", folder / f"dropped-{bucket:04d}.parquet"
        left = None if limit is None else limit - sum(planned[reason] for reason in REASONS)
        if _copy(connection, DUE if left is None else f"{DUE} LIMIT {left}", due):
            due_files.append(due)
            for reason, images, bytes_ in _sums(connection, due):
                planned[reason] += images
                size += bytes_
        if _copy(connection, GONE, dropped):
            dropped_files.append(dropped)
            planned["deleted"] += pq.read_metadata(dropped).num_rows
    replaced = sum(planned[reason] for reason in REASONS if reason != "new")
    return Plan(
        planned=planned,
        listed=sides.listed,
        known=known,
        kept=known - replaced - planned["deleted"],
        bytes=size,
        due_files=tuple(due_files),
        dropped_files=tuple(dropped_files),
        unreadable=sides.unreadable,
    )


def _copy(connection: "duckdb.DuckDBPyConnection", query: str, file: Path) -> bool:
    """Write a query's rows to a Parquet file, if there are any."""
    copied = connection.execute(f"COPY ({query}) TO '{_quoted(file)}' (FORMAT parquet, COMPRESSION lz4)").fetchall()
    if copied[0][0] == 0:
        file.unlink(missing_ok=True)
    return copied[0][0] > 0


def _sums(connection: "duckdb.DuckDBPyConnection", file: Path) -> list[tuple[str, int, int]]:
    """Images and bytes of a file of due images, by reason."""
    query = f"SELECT reason, count(*), coalesce(sum(size), 0)::BIGINT FROM '{_quoted(file)}' GROUP BY reason"
    return connection.execute(query).fetchall()


def _quoted(file: Path) -> str:
    return str(file).replace("'", "''")


def _tables(files: Sequence[Path], *, schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in _batches(files, schema=schema):
        while sum(part.num_rows for part in waiting) + batch.num_rows >= rows:
            room = rows - sum(part.num_rows for part in waiting)
            yield pa.Table.from_batches([*waiting, batch.slice(0, room)], schema=schema)
            waiting, batch = [], batch.slice(room)
        if batch.num_rows:
            waiting.append(batch)
    if waiting:
        yield pa.Table.from_batches(waiting, schema=schema)


def _batches(files: Iterable[Path], *, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_READ_ROWS):
                yield batch.select(schema.names).cast(schema)


def _whole(files: Sequence[Path], *, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(_batches(files, schema=schema), schema=schema).combine_chunks()
