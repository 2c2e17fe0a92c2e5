"""A few images of a table as a person should see them: boxes and points, aligned faces, masks and labels.

Rows are drawn at random over the whole table, though only the row groups that hold them are read.
"""

import bisect
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from jobs.data.object_store import join, open_store
from jobs.data.parts import FileFacts
from jobs.data.schema import TABLE_SCHEMA
from jobs.data.snapshots import LabelTable, Snapshot
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Checkpoint
from mgmtn.drawing import draw_faces, tint_masks
from mgmtn.errors import ConfigError, FetchError, ImageError
from mgmtn.images import ImageLimits, centre_transform, decode_image, face_transform, transform_points, warp_face
from mgmtn.landmarks import Faces
from mgmtn.masks import draw_masks
from mgmtn.network import MGMTN

log = logging.getLogger(__name__)

Row = dict[str, Any]

_FACE_SIZE: Final = 128  # pixels, where no model says what it looks at
_FAR_AWAY: Final = -1e4  # where points are drawn that are not known: outside of any picture


@dataclass(frozen=True)
class SampleFace:
    """One face of a sample.

    Attributes:
        row: of the table.
        aligned: the square that the model saw.
        masked: the same with the facial groups in colour; None without a model.
        labels: the attributes whose label is set, with their probabilities.
    """

    row: Row
    aligned: Image.Image
    masked: Image.Image | None
    labels: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One image of the table; `picture` is None, and `problem` says why, where it cannot be shown."""

    uri: str
    picture: Image.Image | None
    problem: str
    faces: tuple[SampleFace, ...]
    hidden: int


def draw_rows(table: LabelTable, snapshot: Snapshot, *, images: int, seed: int) -> list[list[Row]]:
    """The rows of some images with faces, drawn at random.

    Args:
        table: the label table.
        snapshot: of it.
        images: how many are wanted; fewer come where the table has fewer.
        seed: equal seeds draw equal images.

    Returns:
        For each image its rows, largest face first.

    Raises:
        ConfigError: a file of the table is missing or damaged.
    """
    files = [file for file in snapshot.files if file.faces]
    if not files or not images:
        return []
    random = np.random.default_rng(seed)
    ends = list(accumulate(file.faces for file in files))
    # An image with many faces is no likelier to be drawn than another, but its file is: near enough for a look.
    wanted = Counter(bisect.bisect_right(ends, place) for place in random.integers(ends[-1], size=images).tolist())
    drawn = [
        rows for number, count in sorted(wanted.items()) for rows in _draw_from(table, files[number], count, random)
    ]
    for number, file in enumerate(files):  # the files that were drawn may have too few
        if len(drawn) < images and number not in wanted:
            drawn += _draw_from(table, file, images - len(drawn), random)
    return drawn[:images]


def _draw_from(table: LabelTable, file: FileFacts, count: int, random: np.random.Generator) -> list[list[Row]]:
    """Rows of so many images of one row group of a file."""
    uri = join(table.uri, file.path)
    try:
        with table.store.open(uri) as source, pq.ParquetFile(source, pre_buffer=True) as parquet:
            group = int(random.integers(parquet.num_row_groups))
            rows = parquet.read_row_group(group, columns=TABLE_SCHEMA.names)
    except (FetchError, pa.ArrowInvalid) as error:
        raise ConfigError(f"a file of the label table cannot be read: {error}") from error
    rows = rows.filter(pc.greater_equal(rows["face_index"], 0))
    ids = pc.unique(rows["image_id"])
    chosen = ids.take(pa.array(np.sort(random.permutation(len(ids))[:count])))
    found = rows.filter(pc.is_in(rows["image_id"], value_set=chosen)).sort_by(
        [("image_id", "ascending"), ("face_index", "ascending")]
    )
    by_image: dict[str, list[Row]] = {}
    for row in found.to_pylist():
        by_image.setdefault(row["image_id"], []).append(row)
    return list(by_image.values())


class SampleMaker:
    """Turns rows into pictures.

    Args:
        checkpoint: the model whose masks are shown; None shows none.
        limits: what is refused before it is decoded.
        most_faces: faces of an image that are cut out; the rest is only counted.
    """

    def __init__(self, checkpoint: Checkpoint | None, *, limits: ImageLimits, most_faces: int = 3) -> None:
        self.limits, self.most_faces = limits, most_faces
        self.network = checkpoint.network() if checkpoint else None
        self.model_id = checkpoint.card.model_id if checkpoint else None
        self.size = self.network.settings.image_size if self.network else _FACE_SIZE

    def __call__(self, rows: Sequence[Row]) -> Sample:
        """One image from its rows; a picture that is gone, changed or damaged is said, and is no error."""
        uri, etag = rows[0]["uri"], rows[0]["etag"]
        shown = rows[: self.most_faces]
        try:
            data = open_store(uri).get(uri, etag=etag, max_bytes=self.limits.max_bytes)
            image = decode_image(data, limits=self.limits)
        except ImageError as error:
            log.warning("sample=not_shown uri=%r status=%s", uri, error.status)
            return Sample(uri, None, str(error), (), len(rows))
        faces = tuple(self._face(image, row) for row in shown)
        return Sample(uri, draw_faces(image, _faces_of(rows)), "", faces, len(rows) - len(shown))

    def _face(self, image: np.ndarray, row: Row) -> SampleFace:
        points = None if row["landmarks"] is None else np.array(row["landmarks"], np.float32).reshape(68, 2)
        if points is None:
            transform = centre_transform(image, size=self.size)
        else:
            transform = face_transform(points, size=self.size)
        aligned = warp_face(image, transform, size=self.size)
        # Another model's masks are no explanation of what this row says.
        masks = self._masks(aligned, points, transform) if row["model_id"] == self.model_id else None
        return SampleFace(
            row=row,
            aligned=Image.fromarray(aligned),
            masked=None if masks is None else tint_masks(aligned, masks),
            labels={name: row[name] for k, name in enumerate(ATTRIBUTES) if row["labels"] and row["labels"] >> k & 1},
        )

    def _masks(self, aligned: np.ndarray, points: np.ndarray | None, transform: np.ndarray) -> np.ndarray | None:
        """AML's masks, or those drawn from the points for a network that has no AML; `(8, h, w)` in 0..1."""
        assert self.network is not None
        if self.network.mask_net is not None:
            return predict_masks(self.network, aligned)
        if points is None or not self.network.uses_masks:
            return None
        return draw_masks(transform_points(points, transform), crop_size=self.size)


def predict_masks(network: MGMTN, aligned: np.ndarray) -> np.ndarray:
    """The soft group masks that guide a network's pooling on one face: float32, shape `(8, h, w)`, in 0..1."""
    import torch

    with torch.inference_mode():
        images_13SS = torch.from_numpy(aligned.copy()).permute(2, 0, 1)[None].float()
        return network.soft_masks(images_13SS)[0].numpy()


def _faces_of(rows: Sequence[Row]) -> Faces:
    far = [_FAR_AWAY] * 136
    points = np.array([row["landmarks"] or far for row in rows], np.float32).reshape(-1, 68, 2)
    boxes = np.array([[row[f"box_{corner}"] for corner in ("x1", "y1", "x2", "y2")] for row in rows], np.float32)
    scores = np.array([row["detection_score"] or 0 for row in rows], np.float32)
    return Faces(boxes=boxes, scores=scores, landmarks=points)
