"""The training table: aligned faces with landmarks, masks and labels, in Parquet, beside a description of itself."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.data.datasets import UNKNOWN
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import ConfigError
from mgmtn.masks import unpack_masks

DESCRIPTION_FILE = "dataset.json"
_COLUMNS = ["image", "face", "masks", "labels", "face_found"]

TRAINING_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("uri", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("face_found", pa.bool_()),
        ("face", pa.binary()),  # PNG, so that training sees the pixels that labelling sees
        ("landmarks", pa.list_(pa.float32(), 136)),  # pixels of the face
        ("masks", pa.binary()),  # see mgmtn.masks.pack_masks
        ("labels", pa.list_(pa.int8(), len(ATTRIBUTES))),  # -1: unknown
    ]
)


class Description(BaseModel):
    """What a training table holds. Written last: a table with a description is whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    image_size: int
    margin: int
    mask_size: int
    detector: str
    images: int
    faces: int
    no_face: int
    failed: int
    splits: dict[str, int]

    def save(self, folder: Path) -> None:
        (folder / DESCRIPTION_FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a table's description.

        Raises:
            ConfigError: the folder has none, or it is of another version.
        """
        try:
            return cls.model_validate_json((folder / DESCRIPTION_FILE).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"data: {str(folder)!r} is not a finished training table (mgmtn prepare makes one)"
            ) from error
        except (ValidationError, json.JSONDecodeError) as error:
            raise ConfigError(f"data: {folder / DESCRIPTION_FILE}: {error}") from error


@dataclass(frozen=True)
class Samples:
    """Faces in memory, as arrays of one length N.

    Attributes:
        names: N image names.
        faces: uint8, shape `(N, S + 2m, S + 2m, 3)`, RGB.
        masks: packed bits, uint8, shape `(N, 8 * M * M / 8)`.
        labels: int8, shape `(N, 40)`, -1 where unknown.
        found: bool, shape `(N,)`: False for centre crops of pictures in which no face was found.
    """

    names: np.ndarray
    faces: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    found: np.ndarray

    def __len__(self) -> int:
        return len(self.faces)

    @property
    def known(self) -> np.ndarray:
        return self.labels != UNKNOWN

    def take(self, indices: np.ndarray) -> Self:
        """The samples at some indices, in that order."""
        arrays = (self.names, self.faces, self.masks, self.labels, self.found)
        return type(self)(*(array[indices] for array in arrays))

    def unpacked_masks(self, mask_size: int) -> np.ndarray:
        """bool, shape `(N, 8, M, M)`."""
        return np.stack([unpack_masks(mask.tobytes(), mask_size=mask_size) for mask in self.masks])


def load_samples(folders: tuple[Path, ...], *, split: str, limit: int = 0) -> Samples:
    """Read one split of one or several training tables of the same geometry into memory, sorted by table and name.

    Raises:
        ConfigError: the tables differ in geometry, or none has a row of that split.
    """
    geometry = {(d.image_size, d.margin, d.mask_size) for d in map(Description.load, folders)}
    if len(geometry) > 1:
        raise ConfigError(f"data: the tables differ in (image_size, margin, mask_size): {sorted(geometry)}")
    tables = [_read_split(folder, split) for folder in folders]
    table = pa.concat_tables(tables)
    if len(table) == 0:
        raise ConfigError(f"data: no usable row of split {split!r} in {', '.join(map(str, folders))}")
    if limit:
        table = table.slice(0, limit)
    return _samples(table)


def iterate_samples(folders: tuple[Path, ...], *, split: str, count: int) -> Iterator[Samples]:
    """The readable rows of one split, `count` at a time at most, in the order of the files."""
    for folder in folders:
        for batch in _dataset(folder).to_batches(columns=_COLUMNS, filter=_readable(split), batch_size=count):
            if batch.num_rows:
                yield _samples(pa.Table.from_batches([batch]))


def unreadable_labels(folders: tuple[Path, ...], *, split: str) -> np.ndarray:
    """The labels of the pictures that could not be read: int8, shape `(N, 40)`."""
    unreadable = (ds.field("split") == split) & ds.field("face").is_null()
    tables = [_dataset(folder).to_table(columns=["labels"], filter=unreadable) for folder in folders]
    return _label_array(pa.concat_tables(tables))


def _samples(table: pa.Table) -> Samples:
    return Samples(
        names=np.array(table["image"].to_pylist()),
        faces=np.stack([decode_face(face) for face in table["face"].to_pylist()]),
        masks=np.stack([np.frombuffer(mask, np.uint8) for mask in table["masks"].to_pylist()]),
        labels=_label_array(table),
        found=table["face_found"].to_numpy(),
    )


def _label_array(table: pa.Table) -> np.ndarray:
    return table["labels"].combine_chunks().flatten().to_numpy().reshape(-1, len(ATTRIBUTES))


def _dataset(folder: Path) -> ds.Dataset:
    Description.load(folder)  # a table without one is not whole
    return ds.dataset(sorted(folder.glob("*.parquet")), schema=TRAINING_SCHEMA, format="parquet")


def _readable(split: str) -> ds.Expression:
    return (ds.field("split") == split) & ds.field("face").is_valid()


def _read_split(folder: Path, split: str) -> pa.Table:
    return _dataset(folder).to_table(columns=_COLUMNS, filter=_readable(split)).sort_by("image")


def encode_face(face: np.ndarray) -> bytes:
    """RGB uint8 to PNG; level 1: twice the speed of the default for a tenth more bytes."""
    _, data = cv2.imencode(".png", face[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return data.tobytes()


def decode_face(data: bytes) -> np.ndarray:
    """The inverse of `encode_face`."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
