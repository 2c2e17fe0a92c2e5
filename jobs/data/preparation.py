"""The files of a training table while it is being made: finished ones are kept, so that a killed run can go on.

The dataset's rows, in order, are cut into files of so many rows. A file appears whole or not at all. A record beside
them says what they are made from: a run that would make other rows starts anew.
"""

import hashlib
import json
import re
from collections import Counter
from importlib.metadata import version
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.data.object_store import join, new_files, open_store, relative
from jobs.data.training_table import DESCRIPTION_FILE, TRAINING_SCHEMA, decode_face, write_bytes
from mgmtn.drawing import contact_sheet, overlay_masks
from mgmtn.errors import FetchError
from mgmtn.masks import MASK_SIZE, unpack_masks

RECORD_FILE: Final = "preparation.json"
SHEET_FILE: Final = "masks.png"
SHEET_SAMPLES: Final = 24
_PART: Final = re.compile(r"part-\d{5,}\.parquet")
_LITTER: Final = re.compile(r"\.[0-9a-f]{32}\.tmp")  # what a killed run was writing


class Preparation(BaseModel):
    """What decides a table's rows. That a picture changed under its old name is not noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_sha256: str = Field(description="of the names, uris, splits and labels")
    images: int
    rows_per_file: int
    image_size: int
    margin: int
    mask_size: int = MASK_SIZE
    detector: dict[str, Any]
    limits: dict[str, Any]
    version: str = Field(default_factory=lambda: version("mgmtn"))

    @property
    def files(self) -> int:
        return -(-self.images // self.rows_per_file)

    def span(self, number: int) -> tuple[int, int]:
        """The dataset's rows in a file, from and up to."""
        return number * self.rows_per_file, min((number + 1) * self.rows_per_file, self.images)

    @classmethod
    def load(cls, folder: str) -> Self | None:
        """The record of a folder; None if there is none that this version understands."""
        uri = join(folder, RECORD_FILE)
        try:
            return cls.model_validate_json(open_store(uri).get(uri))
        except (FetchError, ValidationError):
            return None


def dataset_digest(table: pa.Table) -> str:
    """Hex SHA-256 of a table of `jobs.data.datasets.DATASET_SCHEMA`."""
    digest = hashlib.sha256()
    for name in ("image", "uri", "split"):
        digest.update(json.dumps(table[name].to_pylist()).encode())
    digest.update(table["labels"].combine_chunks().flatten().to_numpy().tobytes())
    return digest.hexdigest()


def take_up(folder: str, preparation: Preparation, *, anew: bool = False) -> set[int]:
    """Make a folder ready: files of another preparation are deleted, those of this one kept.

    Args:
        folder: URI of the training table.
        preparation: what is to be made.
        anew: keep nothing.

    Returns:
        Numbers of the files that are finished.
    """
    store = open_store(folder)
    present = [relative(info.uri, folder=folder) for info in store.list(folder, missing_ok=True)]
    same = not anew and Preparation.load(folder) == preparation
    finished = set()
    if same:
        written = (number for number in range(preparation.files) if part_name(number) in present)
        finished = {number for number in written if _is_whole(folder, number, preparation)}
    if len(finished) < preparation.files or not same:
        store.delete(join(folder, DESCRIPTION_FILE))  # first: with it a table counts as whole
    for name in present:
        if _LITTER.fullmatch(name) or (not same and (_PART.fullmatch(name) or name == SHEET_FILE)):
            store.delete(join(folder, name))
    if not same:
        write_bytes(join(folder, RECORD_FILE), preparation.model_dump_json(indent=1).encode() + b"\n")
    return finished


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _is_whole(folder: str, number: int, preparation: Preparation) -> bool:
    first, end = preparation.span(number)
    try:
        with open_store(folder).open(join(folder, part_name(number))) as file:
            return pq.ParquetFile(file).metadata.num_rows == end - first
    except (FetchError, pa.ArrowInvalid):
        return False


def write_part(rows: pa.Table, number: int, *, folder: str) -> None:
    """Write one file of the table; before the first, a picture of its masks for a person to look at."""
    if number == 0:
        _write_mask_sheet(rows, folder=folder)
    with new_files(folder) as temporary:
        path = temporary / part_name(number)
        pq.write_table(rows.cast(TRAINING_SCHEMA), path, compression="zstd", row_group_size=512)


def _write_mask_sheet(rows: pa.Table, *, folder: str) -> None:
    """Draw the masks of some samples over their faces, faces that were found first; nothing where there are none."""
    readable = rows.filter(rows["face"].is_valid()).sort_by([("face_found", "descending")])
    chosen = readable.slice(0, SHEET_SAMPLES).to_pylist()
    if not chosen:
        return
    tiles = [overlay_masks(decode_face(row["face"]), unpack_masks(row["masks"])) for row in chosen]
    with new_files(folder) as temporary:
        contact_sheet(tiles, [row["image"] for row in chosen]).save(temporary / SHEET_FILE)


def count_outcomes(folder: str, preparation: Preparation) -> Counter[str]:
    """Images by status, over all files of a finished table."""
    counts: Counter[str] = Counter()
    for number in range(preparation.files):
        with open_store(folder).open(join(folder, part_name(number))) as file:
            counts.update(pq.read_table(file, columns=["status"])["status"].to_pylist())
    return counts
