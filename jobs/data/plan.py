"""What is due in a run and why, from the inventory and the current snapshot."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import pyarrow as pa

from jobs.data.inventory import unreadable_folders
from jobs.data.schema import INVENTORY_SCHEMA, MAX_ATTEMPTS, TRANSIENT

if TYPE_CHECKING:
    import duckdb

REASONS: Final = ("new", "changed", "new_model", "retry", "relabel")
# What a plan needs to know of the current snapshot's rows.
PLAN_COLUMNS: Final = ("image_id", "uri", "etag", "status", "attempts", "face_index", "model_id")

DUE_SCHEMA: Final = pa.schema([*INVENTORY_SCHEMA, ("attempts", pa.int16()), ("reason", pa.string())])

# One row for each image of the table. It has rows of one model only, unless somebody else wrote them: then ours count.
_KNOWN: Final = """
CREATE TEMP TABLE known AS
SELECT DISTINCT ON (image_id) image_id, uri, etag, status, attempts, model_id
FROM current WHERE face_index <= 0
ORDER BY image_id, model_id = $model_id DESC
"""

# A null etag is a version too: that of an image which cannot be looked up.
# A count of attempts starts anew with a version or a model: what failed thrice under one may succeed
# under another.
_JUDGED: Final = """
CREATE TEMP TABLE judged AS
SELECT i.image_id, i.uri, i.etag, i.size,
    CASE WHEN k.image_id IS NULL THEN 'new'
         WHEN k.etag IS DISTINCT FROM i.etag THEN 'changed'
         WHEN k.model_id <> $model_id THEN 'new_model'
         WHEN list_contains($transient, k.status) AND k.attempts < $max_attempts THEN 'retry'
         WHEN $relabel THEN 'relabel' END AS reason,
    (CASE WHEN reason IN ('retry', 'relabel') THEN k.attempts + 1 ELSE 1 END)::SMALLINT AS attempts
FROM inventory i LEFT JOIN known k USING (image_id)
"""

_DUE: Final = """
SELECT image_id, uri, etag, size, attempts, reason FROM judged
WHERE reason IS NOT NULL ORDER BY image_id LIMIT $max_images
"""

# What an unreadable folder holds is unknown, not gone.
_GONE: Final = """
SELECT image_id FROM known k ANTI JOIN inventory i USING (image_id)
WHERE NOT EXISTS (SELECT 1 FROM (SELECT unnest($unreadable) AS folder) WHERE starts_with(k.uri, folder || '/'))
ORDER BY image_id
"""


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Attributes:
        due: `DUE_SCHEMA`, sorted by image_id: the inventory's columns, the attempt number that the run records, why.
        dropped: image_ids, strings, of the images that leave the table.
        kept: how many images of the table stay as they are.
        planned: due images by reason, and `deleted`.
    """

    due: pa.Table
    dropped: pa.Array
    kept: int
    planned: dict[str, int]


def make_plan(
    inventory: pa.Table,
    current: pa.Table | pa.RecordBatchReader,
    *,
    model_id: str,
    relabel: bool = False,
    deletions: Literal["drop", "keep"] = "drop",
    limit: int | None = None,
) -> Plan:
    """Compare the inventory with the table.

    Args:
        inventory: from `take_inventory`.
        current: the current snapshot's rows with `PLAN_COLUMNS`, as `LabelTable.read` streams them.
        model_id: the model that will label; an image labelled by another is due.
        relabel: every image is due.
        deletions: whether an image that left the inventory leaves the table.
        limit: at most so many images are due, the first by image_id; the others stay as they are until another run.

    Returns:
        The plan. An image whose folder could not be listed is not taken for deleted.
    """
    # Imported here: kept by this module, it would outlive Ray's threads at exit and fill the terminal with warnings.
    import duckdb

    connection = duckdb.connect()
    try:
        return _plan_with(
            connection, inventory, current, model_id=model_id, relabel=relabel, drop=deletions == "drop", limit=limit
        )
    finally:
        connection.close()


def _plan_with(
    connection: "duckdb.DuckDBPyConnection",
    inventory: pa.Table,
    current: pa.Table | pa.RecordBatchReader,
    *,
    model_id: str,
    relabel: bool,
    drop: bool,
    limit: int | None,
) -> Plan:
    connection.register("inventory", inventory)
    connection.register("current", current)
    connection.execute(_KNOWN, {"model_id": model_id})
    judging = {
        "model_id": model_id,
        "transient": sorted(TRANSIENT),
        "max_attempts": MAX_ATTEMPTS,
        "relabel": relabel,
    }
    connection.execute(_JUDGED, judging)
    due = _table(connection, _DUE, {"max_images": inventory.num_rows if limit is None else limit}).cast(DUE_SCHEMA)
    unreadable = [folder.rstrip("/") for folder in unreadable_folders(inventory)]
    gone = _table(connection, _GONE, {"unreadable": unreadable}) if drop else pa.table({"image_id": []})
    dropped = gone["image_id"].cast(pa.string()).combine_chunks()
    known = connection.execute("SELECT count(*) FROM known").fetchall()[0][0]
    counts = {row["values"]: row["counts"] for row in due["reason"].value_counts().to_pylist()}
    replaced = due.num_rows - counts.get("new", 0)
    planned = {reason: counts.get(reason, 0) for reason in REASONS} | {"deleted": len(dropped)}
    return Plan(due=due, dropped=dropped, kept=known - replaced - len(dropped), planned=planned)


def _table(connection: "duckdb.DuckDBPyConnection", query: str, parameters: dict[str, object]) -> pa.Table:
    return connection.sql(query, params=parameters).to_arrow_table()
