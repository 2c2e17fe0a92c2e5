"""The training table: aligned faces with landmarks, masks and labels, in Parquet, beside a description of itself."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.data.datasets import UNKNOWN
from jobs.data.object_store import canonical_uri, join, local_copy, new_file, open_store, parent
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import ConfigError, FetchError
from mgmtn.masks import unpack_masks

DESCRIPTION_FILE = "dataset.json"
Folder = str | Path  # of a training table: a local one, or an s3:// prefix
_ROWS_AT_ONCE = 512
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

    def save(self, folder: Folder) -> None:
        write_bytes(join(canonical_uri(str(folder)), DESCRIPTION_FILE), self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read a table's description.

        Raises:
            ConfigError: the folder has none, or it is of another version.
        """
        uri = join(canonical_uri(str(folder)), DESCRIPTION_FILE)
        try:
            return cls.model_validate_json(open_store(uri).get(uri))
        except FetchError as error:
            raise ConfigError(
                f"data: {str(folder)!r} is not a finished training table (mgmtn prepare makes one): {error}"
            ) from error
        except (ValidationError, json.JSONDecodeError) as error:
            raise ConfigError(f"data: {uri}: {error}") from error


def write_bytes(uri: str, content: bytes) -> None:
    """Create or replace an object in one step."""
    with new_file(uri) as path:
        path.write_bytes(content)


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
        return type(self)(*(array[indices] for array in self._arrays))

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.names, self.faces, self.masks, self.labels, self.found

    def room_for(self, count: int) -> Self:
        """Arrays like these, of another length and yet without content."""
        made = [np.empty((count, *array.shape[1:]), array.dtype) for array in self._arrays]
        return type(self)(np.empty(count, object), *made[1:])

    def put(self, indices: np.ndarray, samples: Self) -> None:
        """Overwrite the samples at some indices."""
        for mine, theirs in zip(self._arrays, samples._arrays, strict=True):
            mine[indices] = theirs

    def unpacked_masks(self, mask_size: int) -> np.ndarray:
        """bool, shape `(N, 8, M, M)`."""
        return np.stack([unpack_masks(mask.tobytes(), mask_size=mask_size) for mask in self.masks])


def load_samples(folders: Sequence[Folder], *, split: str, limit: int = 0, chosen: np.ndarray | None = None) -> Samples:
    """Read one split of one or several training tables of the same geometry into memory, sorted by table and name.

    Args:
        folders: of the tables.
        split: whose rows.
        limit: rows, the first; 0: all.
        chosen: bool, which of these rows; None: all.

    Raises:
        ConfigError: the tables differ in geometry, or none has a row of that split.
    """
    geometry = {(d.image_size, d.margin, d.mask_size) for d in map(Description.load, folders)}
    if len(geometry) > 1:
        raise ConfigError(f"data: the tables differ in (image_size, margin, mask_size): {sorted(geometry)}")
    names = [_dataset(folder).to_table(columns=["image"], filter=_readable(split))["image"] for folder in folders]
    places = _places([column.to_numpy() for column in names], limit=limit)
    if chosen is not None:
        place_now = np.where(chosen, np.cumsum(chosen) - 1, -1)
        places = [np.where(place >= 0, place_now[place], -1) for place in places]
    count = sum(int((place >= 0).sum()) for place in places)
    if count == 0:
        raise ConfigError(f"data: no usable row of split {split!r} in {', '.join(map(str, folders))}")
    return _fill(folders, places, split=split, count=count)


def load_labels(folders: Sequence[Folder], *, split: str, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Names, shape `(N,)`, and labels, int8 of shape `(N, 40)`, of the samples that `load_samples` gives, in its order.

    Raises:
        ConfigError: none of the tables has a row of that split.
    """
    columns = ["image", "labels"]
    tables = [_dataset(folder).to_table(columns=columns, filter=_readable(split)) for folder in folders]
    whole = pa.concat_tables([table.take(_in_order(table["image"].to_numpy())) for table in tables])
    if len(whole) == 0:
        raise ConfigError(f"data: no usable row of split {split!r} in {', '.join(map(str, folders))}")
    whole = whole.slice(0, limit or None)
    return whole["image"].to_numpy().astype(str), _label_array(whole)


def _in_order(names: np.ndarray) -> np.ndarray:
    return np.argsort(names, kind="stable")


def _places(names: Sequence[np.ndarray], *, limit: int) -> list[np.ndarray]:
    """Where each row of each table belongs among all samples; -1 past the limit."""
    places, start = [], 0
    for column in names:
        place = np.empty(len(column), np.int64)
        place[_in_order(column)] = np.arange(start, start + len(column))
        places.append(np.where(place < limit, place, -1) if limit else place)
        start += len(column)
    return places


def _fill(folders: Sequence[Folder], places: Sequence[np.ndarray], *, split: str, count: int) -> Samples:
    """Decode row by row into arrays made once: all faces of CelebA take tens of gigabytes, and no Arrow column of
    32-bit offsets could hold their files while they are sorted."""
    filled: Samples | None = None
    for folder, place in zip(folders, places, strict=True):
        start = 0
        for rows in _pieces(folder, split, count=_ROWS_AT_ONCE):
            where = place[start : start + len(rows)]
            start += len(rows)
            if (where < 0).all():
                continue
            samples = _samples(rows.filter(pa.array(where >= 0)))
            filled = filled or samples.room_for(count)
            filled.put(where[where >= 0], samples)
    assert filled is not None  # there are rows, for they were counted
    return replace(filled, names=filled.names.astype(str))


def iterate_samples(folders: Sequence[Folder], *, split: str, count: int) -> Iterator[Samples]:
    """The readable rows of one split, `count` at a time at most, in the order of the files."""
    for folder in folders:
        yield from map(_samples, _pieces(folder, split, count=count))


def _pieces(folder: Folder, split: str, *, count: int) -> Iterator[pa.Table]:
    for batch in _dataset(folder).to_batches(columns=_COLUMNS, filter=_readable(split), batch_size=count):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def unreadable_labels(folders: Sequence[Folder], *, split: str) -> np.ndarray:
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


def _dataset(folder: Folder) -> ds.Dataset:
    Description.load(folder)  # a table without one is not whole
    uri = canonical_uri(str(folder))
    names = [info.uri for info in open_store(uri).list(uri) if _is_file_of(info.uri, uri)]
    try:
        files = [local_copy(name) for name in sorted(names)]
    except FetchError as error:
        raise ConfigError(f"data: {error}") from error
    return ds.dataset(files, schema=TRAINING_SCHEMA, format="parquet")


def _is_file_of(uri: str, folder: str) -> bool:
    return uri.endswith(".parquet") and parent(uri) == folder.rstrip("/")


def _readable(split: str) -> ds.Expression:
    return (ds.field("split") == split) & ds.field("face").is_valid()


def encode_face(face: np.ndarray) -> bytes:
    """RGB uint8 to PNG; level 1: twice the speed of the default for a tenth more bytes."""
    _, data = cv2.imencode(".png", face[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return data.tobytes()


def decode_face(data: bytes) -> np.ndarray:
    """The inverse of `encode_face`."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
