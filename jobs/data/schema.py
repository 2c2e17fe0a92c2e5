"""The label table's columns, in order, and what its statuses mean.

A table read years later must explain itself: every file carries the schema's version and the order of the attributes,
which is also the order of the bits in `labels`.
"""

import hashlib
from enum import StrEnum
from typing import Final

import pyarrow as pa

from mgmtn.attributes import ATTRIBUTES

SCHEMA_VERSION: Final = 1
MAX_ATTEMPTS: Final = 3
ERROR_LENGTH: Final = 256
LANDMARK_VALUES: Final = 136


class Status(StrEnum):
    """The outcome of one image; its value is what the column `status` holds."""

    OK = "ok"
    NO_FACE = "no_face"
    FETCH_ERROR = "fetch_error"
    DECODE_ERROR = "decode_error"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    TOO_SMALL = "too_small"
    MODEL_ERROR = "model_error"
    CRASHED = "crashed"


STATUSES: Final = tuple(Status)
# May go away by itself: tried again by the next runs, MAX_ATTEMPTS times in all.
TRANSIENT: Final = frozenset({Status.FETCH_ERROR, Status.MODEL_ERROR, Status.CRASHED})
# Counts towards a run's error budget. A picture beyond our limits, or without a face, is an answer and not a failure.
FAILED: Final = frozenset(
    {Status.FETCH_ERROR, Status.DECODE_ERROR, Status.UNSUPPORTED, Status.MODEL_ERROR, Status.CRASHED}
)

SORT_KEYS: Final = (("image_id", "ascending"), ("face_index", "ascending"))

# One row per image, each URI once, by image_id. `etag` and `size` are null where the image could not be looked up.
INVENTORY_SCHEMA: Final = pa.schema(
    [("image_id", pa.string()), ("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())]
)

TABLE_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int16()),
        ("face_index", pa.int16()),
        ("face_count", pa.int16()),
        ("box_x1", pa.float32()),
        ("box_y1", pa.float32()),
        ("box_x2", pa.float32()),
        ("box_y2", pa.float32()),
        ("detection_score", pa.float32()),
        ("sharpness", pa.float32()),
        ("face_size", pa.float32()),
        ("landmarks", pa.list_(pa.float32(), LANDMARK_VALUES)),
        *((name, pa.float32()) for name in ATTRIBUTES),
        ("labels", pa.uint64()),
        ("model_id", pa.string()),
        ("run_id", pa.string()),
        ("labelled_at", pa.timestamp("us", tz="UTC")),
    ],
    metadata={"mgmtn.schema_version": str(SCHEMA_VERSION), "mgmtn.attributes": ",".join(ATTRIBUTES)},
)

# Set in every row, whatever became of the image.
REQUIRED: Final = (
    "image_id",
    "uri",
    "status",
    "attempts",
    "face_index",
    "face_count",
    "model_id",
    "run_id",
    "labelled_at",
)


def image_id(uri: str) -> str:
    """The image's name in the table: 32 hex characters, BLAKE2b-128 of the URI in UTF-8."""
    return hashlib.blake2b(uri.encode(), digest_size=16).hexdigest()
