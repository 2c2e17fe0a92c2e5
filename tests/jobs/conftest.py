"""Label rows for the tests of the programs and their data."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from jobs.data.buckets import ImageIds
from jobs.data.parts import write_part
from jobs.data.schema import TABLE_SCHEMA, image_id
from jobs.data.snapshots import LabelTable, Snapshot, next_snapshot
from mgmtn.attributes import ATTRIBUTES

Rows = Callable[..., pa.Table]
Night = Callable[..., Snapshot]


@pytest.fixture
def label_rows() -> Rows:
    """`label_rows({uri: face count or status}, **columns)`: rows as a run would write them, in no particular order."""
    return _label_rows


def _label_rows(images: Mapping[str, int | str], **columns: Any) -> pa.Table:
    rows = [row | columns for uri, outcome in images.items() for row in _rows_of(uri, outcome)]
    return pa.Table.from_pylist(rows[::-1], schema=TABLE_SCHEMA)


def _rows_of(uri: str, outcome: int | str) -> list[dict[str, Any]]:
    image = {
        "image_id": image_id(uri),
        "uri": uri,
        "etag": "v1",
        "size": 10,
        "status": "ok",
        "attempts": 1,
        "face_index": -1,
        "face_count": 0,
        "model_id": "m1",
        "run_id": "r1",
        "labelled_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    if isinstance(outcome, str):
        return [image | {"status": outcome, "error": None if outcome == "no_face" else "why"}]
    face = {
        "width": 100,
        "height": 80,
        "box_x1": 1.5,
        "landmarks": [0.5] * 136,
        "labels": 2**39 + 1,
    } | dict.fromkeys(ATTRIBUTES, 0.25)
    return [image | face | {"face_index": index, "face_count": outcome} for index in range(outcome)]


@pytest.fixture
def add_night() -> Night:
    """`add_night(table's uri, {uri: face count or status}, drop=uris, run_id=..., model_id=..., **columns)`: the next
    snapshot, with a file of these rows and without those that they supersede or that are dropped."""
    return _add_night


def _add_night(
    uri: str,
    images: Mapping[str, int | str],
    /,
    *,
    drop: Sequence[str] = (),
    run_id: str = "r1",
    model_id: str = "m1",
    **columns: Any,
) -> Snapshot:
    table = LabelTable(uri)
    current = table.current()
    dropped = ImageIds.few(image_id(uri) for uri in (*drop, *images))
    files = table.carry_over(current, drop_ids=dropped, run_id=run_id)
    if images:
        rows = _label_rows(images, run_id=run_id, model_id=model_id, **columns)
        written = write_part(rows, store=table.store, labels_uri=table.uri, model_id=model_id, run_id=run_id)
        files = (*files, written)
    return table.commit(
        next_snapshot(current, files=files, run_id=run_id, model_id=model_id, inventory_digest=f"of {run_id}")
    )
