"""Compare the inventory with what a snapshot knows, a range of image_ids at a time: which images are due, or gone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.data.buckets import Buckets, bucket_bounds, buckets_of_files, stage
from jobs.data.inventory import unreadable_folders
from jobs.data.object_store import file_uri
from jobs.data.schema import INVENTORY_SCHEMA, MAX_ATTEMPTS, TABLE_SCHEMA, TRANSIENT
from mgmtn.errors import ConfigError

if TYPE_CHECKING:
    import duckdb

# What may have to be known of a snapshot's rows; `known_columns` tells what has to.
PLAN_COLUMNS: Final = ("image_id", "uri", "etag", "status", "attempts", "face_index", "model_id")

# A null etag is a version too: that of an image which cannot be looked up.
_JUDGED: Final = """
CREATE OR REPLACE TEMP TABLE judged AS
SELECT coalesce(i.image_id, k.image_id) AS image_id, i.uri, i.etag, i.size, k.attempts AS tried,
    CASE WHEN k.image_id IS NULL THEN 'new'
         WHEN i.image_id IS NULL THEN {gone}
         WHEN k.etag IS DISTINCT FROM i.etag THEN 'changed'
         WHEN k.model_id <> $model_id THEN 'new_model'
         WHEN list_contains($transient, k.status) AND k.attempts < $max_attempts THEN 'retry'
         WHEN $relabel THEN 'relabel' END AS reason
FROM ({inventory}) i FULL JOIN ({known}) k USING (image_id)
WHERE reason IS NOT NULL
"""
# The table has rows of one model for an image, unless somebody else wrote them: then ours count.
_EACH_ONCE: Final = "SELECT DISTINCT ON (image_id) * FROM ({rows}) ORDER BY image_id, model_id = $model_id DESC"
# What an unreadable folder holds is unknown, not gone. Only asked where there is one: it costs a third of the time.
_GONE_IF_READABLE: Final = """
CASE WHEN NOT EXISTS (SELECT 1 FROM (SELECT unnest($unreadable) AS folder) WHERE starts_with(k.uri, folder || '/'))
THEN 'deleted' END
"""
_NO_INVENTORY: Final = "SELECT '' AS image_id, '' AS uri, '' AS etag, 0::BIGINT AS size WHERE false"
_NOTHING_KNOWN: Final = (
    "SELECT '' AS image_id, '' AS uri, '' AS etag, '' AS status, 0::SMALLINT AS attempts, '' AS model_id WHERE false"
)

# Queries for the two answers, from the table `judged`.
# A count of attempts starts anew with a version or a model: what failed thrice under one may succeed
# under another.
DUE: Final = """
SELECT image_id, uri, etag, size,
    (CASE WHEN reason IN ('retry', 'relabel') THEN tried + 1 ELSE 1 END)::SMALLINT AS attempts, reason
FROM judged WHERE reason <> 'deleted' ORDER BY image_id"""
GONE: Final = "SELECT image_id FROM judged WHERE reason = 'deleted' ORDER BY image_id"


@dataclass(frozen=True)
class Sides:
    """Both sides of the comparison, cut alike.

    Attributes:
        inventory: rows of `INVENTORY_SCHEMA`.
        known: a row for each image of the snapshot, and for each model that labelled it.
        listed: how many images the inventory has.
        unreadable: the inventory's folders that could not be listed.
    """

    inventory: Buckets
    known: Buckets
    listed: int
    unreadable: tuple[str, ...]

    @property
    def buckets(self) -> range:
        """Their numbers."""
        return range(len(self.inventory.files))


def cut_sides(
    inventory: pa.Table | Path,
    current: pa.Table | pa.RecordBatchReader,
    *,
    known: int,
    images_per_bucket: int,
    folder: Path,
) -> Sides:
    """Cut the inventory and the snapshot's rows into buckets.

    Args:
        inventory: the table, or a Parquet file or a folder of them.
        current: rows with `known_columns(inventory)`.
        known: about how many images `current` has.
        images_per_bucket: about how many images of either side a bucket may hold.
        folder: for files in the buckets' order; those of an inventory that has this order already are not copied.

    Raises:
        ConfigError: if an inventory file cannot be read.
    """
    images = _images_in(inventory)
    bounds = bucket_bounds(max(images, known), rows_per_bucket=images_per_bucket)
    if isinstance(inventory, Path):
        files = _parquet_files(inventory)
        listed = buckets_of_files(files, schema=INVENTORY_SCHEMA, folder=folder / "inventory", bounds=bounds)
    else:
        batches = inventory.to_batches()
        listed = stage(batches, schema=INVENTORY_SCHEMA, folder=folder / "inventory", bounds=bounds)
    columns = [name for name in known_columns(inventory) if name != "face_index"]
    return Sides(
        inventory=listed,
        known=stage(
            _one_row_each(current),
            schema=pa.schema([TABLE_SCHEMA.field(name) for name in columns]),
            folder=folder / "known",
            bounds=bounds,
        ),
        listed=images,
        unreadable=_unreadable(inventory),
    )


def known_columns(inventory: pa.Table | Path) -> tuple[str, ...]:
    """The columns of the snapshot's rows that the comparison reads.

    Only where a folder could not be listed are these the URIs too, which are most of the bytes.
    """
    return tuple(name for name in PLAN_COLUMNS if name != "uri" or _unreadable(inventory))


def _images_in(inventory: pa.Table | Path) -> int:
    if isinstance(inventory, Path):
        return sum(pq.read_metadata(file).num_rows for file in _parquet_files(inventory))
    return inventory.num_rows


def _unreadable(inventory: pa.Table | Path) -> tuple[str, ...]:
    schema = pq.read_schema(_parquet_files(inventory)[0]) if isinstance(inventory, Path) else inventory.schema
    names = [name.rstrip("/") for name in unreadable_folders(schema.empty_table())]
    # An image whose name is not UTF-8 has a URI of another form than its folder.
    return (*names, *(file_uri(name) for name in names if name.startswith("/")))


def _parquet_files(path: Path) -> tuple[Path, ...]:
    files = tuple(sorted(path.rglob("*.parquet"))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise ConfigError(f"inventory {str(path)!r}: there is no Parquet file")
    return files


def _one_row_each(current: pa.Table | pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """One row of each image, whatever its faces."""
    for batch in current.to_batches() if isinstance(current, pa.Table) else current:
        yield batch.filter(pc.less_equal(batch["face_index"], 0))


@dataclass(frozen=True)
class Rules:
    """By which an image is due or gone.

    Attributes:
        model_id: the model that will label; an image labelled by another is due.
        relabel: every image is due.
        drop: an image that left the inventory is gone.
    """

    model_id: str
    relabel: bool
    drop: bool

    def judge(self, connection: "duckdb.DuckDBPyConnection", sides: Sides, *, bucket: int) -> int:
        """Make the table `judged` of a bucket, to be asked with `DUE` and `GONE`.

        Returns:
            How many images of the bucket are known.
        """
        images, known = _known_images(connection, sides.known.sql(bucket))
        check_folders = self.drop and bool(sides.unreadable)
        gone = _GONE_IF_READABLE if check_folders else "'deleted'" if self.drop else "NULL"
        statement = _JUDGED.format(inventory=sides.inventory.sql(bucket) or _NO_INVENTORY, known=known, gone=gone)
        parameters = {
            "model_id": self.model_id,
            "transient": sorted(TRANSIENT),
            "max_attempts": MAX_ATTEMPTS,
            "relabel": self.relabel,
        }
        connection.execute(statement, parameters | ({"unreadable": list(sides.unreadable)} if check_folders else {}))
        return images


def _known_images(connection: "duckdb.DuckDBPyConnection", rows: str | None) -> tuple[int, str]:
    """How many images a bucket's known rows have, and a query that gives each of them once."""
    if rows is None:
        return 0, _NOTHING_KNOWN
    [(models, images)] = connection.execute(f"SELECT count(DISTINCT model_id), count(*) FROM ({rows})").fetchall()
    if models == 1:
        return images, rows
    [(images,)] = connection.execute(f"SELECT count(DISTINCT image_id) FROM ({rows})").fetchall()
    return images, _EACH_ONCE.format(rows=rows)
