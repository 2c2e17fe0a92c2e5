"""The stages of the labelling flow: what a worker does with a block of rows. A row never vanishes.

Each image enters as one row of the plan and leaves as one row per face, or as one row that says why there is none.
Only an `ImageError` becomes a row's status; a bug or an outage stops the job.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import ray
import torch

from jobs.data.detection import on_this_machine
from jobs.data.object_store import open_store
from jobs.data.schema import ERROR_LENGTH, TABLE_SCHEMA, Status
from jobs.data.watchdog import still_working
from jobs.data.worker_metrics import timed, worker_metrics
from mgmtn.allocator import keep_freed_memory
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.checkpoint import Checkpoint
from mgmtn.errors import ImageError
from mgmtn.images import (
    ImageLimits,
    centre_transform,
    decode_image,
    face_transform,
    sharpness,
    transform_points,
    warp_face,
)
from mgmtn.labeller import Labeller
from mgmtn.landmarks import DetectorSettings, Faces
from mgmtn.masks import MASK_SIZE, draw_masks, pack_masks, unpack_masks

Row = dict[str, Any]
FaceMode = Literal["detect", "whole-image"]

PREDICTED = (*ATTRIBUTES, "labels")
# Between the stages: the table's columns that are known before the model, the aligned face as raw RGB bytes, and its
# packed masks when they are drawn from landmarks. Decoded photographs stay where they were decoded.
FACE_SCHEMA = pa.schema(
    [
        *(field for field in TABLE_SCHEMA if field.name not in PREDICTED),
        pa.field("face", pa.binary()),
        pa.field("masks", pa.binary()),
    ]
)
# Without landmarks each group looks at the whole square.
EVERYWHERE = np.ones((len(GROUPS), MASK_SIZE, MASK_SIZE), bool)

CRASH = "the process that worked on it died, or hung and was ended, again and again"

_FETCH_THREADS = 16
_DECODED_BYTES = 128 * 2**20  # decoded images held at once by one worker
_DECODED_IMAGES = 16


def fetch_and_decode(
    rows: Sequence[Row], *, limits: ImageLimits
) -> Iterator[list[tuple[Row, np.ndarray | ImageError]]]:
    """Read a block's images, many at once, and decode them, few at once.

    Args:
        rows: with `uri` and `etag`.

    Yields:
        The rows in order, in small groups, each with its image or with what is wrong with it.
    """

    def fetch(row: Row) -> bytes | ImageError:
        try:
            with timed("fetch"):
                data = open_store(row["uri"]).get(row["uri"], etag=row["etag"], max_bytes=limits.max_bytes)
        except ImageError as error:
            return error
        worker_metrics().count_bytes(len(data))
        return data

    group: list[tuple[Row, np.ndarray | ImageError]] = []
    held = 0
    with ThreadPoolExecutor(_FETCH_THREADS) as threads:
        for row, data in zip(rows, threads.map(fetch, rows), strict=True):
            still_working()  # a store that is slow, image after image, is no hang
            image = _decode(data, limits)
            held += image.nbytes if isinstance(image, np.ndarray) else 0
            group.append((row, image))
            if held > _DECODED_BYTES or len(group) >= _DECODED_IMAGES:
                yield group
                still_working()
                group, held = [], 0
    if group:
        yield group


def _decode(data: bytes | ImageError, limits: ImageLimits) -> np.ndarray | ImageError:
    if isinstance(data, ImageError):
        return data
    try:
        with timed("decode"):
            return decode_image(data, limits=limits)
    except ImageError as error:
        return error


@dataclass(frozen=True)
class FaceWork:
    """What a face worker is to do; travels to it.

    Attributes:
        image_size: side of the model's square, pixels.
        draw_masks: also draw group masks from the landmarks, for a model that does not predict its own.
    """

    detector: DetectorSettings
    limits: ImageLimits
    mode: FaceMode
    image_size: int
    draw_masks: bool
    model_id: str
    run_id: str


class FindFaces:
    """Stage `uri, etag -> face, masks` and all that is known before the model: outcome, boxes, landmarks, quality."""

    def __init__(self, work: FaceWork) -> None:
        cv2.setNumThreads(1)  # the actor owns one CPU
        worker_metrics()
        self.work = work
        self.detector = on_this_machine(work.detector).build()

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = []
        for group in fetch_and_decode(batch.to_pylist(), limits=self.work.limits):
            images = [image for _, image in group if isinstance(image, np.ndarray)]
            detect = self.detector.find if self.work.mode == "detect" else self.detector.fit
            with timed("faces", images=len(images)):
                found = iter(detect(images))
                for planned, image in group:
                    row = self._row(planned)
                    if isinstance(image, ImageError):
                        rows.append(row | {"status": image.status, "error": str(image)[:ERROR_LENGTH]})
                    else:
                        rows += self._face_rows(row, image, next(found))
        return pa.Table.from_pylist(rows, schema=FACE_SCHEMA)

    def give_up(self, batch: pa.Table) -> pa.Table:
        """Rows for images that take the process with them, which is known of them by now."""
        crash = {"status": Status.CRASHED, "error": CRASH}
        return pa.Table.from_pylist([self._row(planned) | crash for planned in batch.to_pylist()], schema=FACE_SCHEMA)

    def _row(self, planned: Row) -> Row:
        return {
            **{name: planned[name] for name in ("image_id", "uri", "etag", "size", "attempts")},
            "face_index": -1,
            "face_count": 0,
            "model_id": self.work.model_id,
            "run_id": self.work.run_id,
            "labelled_at": datetime.now(UTC),
        }

    def _face_rows(self, row: Row, image: np.ndarray, faces: Faces) -> list[Row]:
        height, width = image.shape[:2]
        row |= {"width": width, "height": height}
        if len(faces) == 0 and self.work.mode == "detect":
            return [row | {"status": Status.NO_FACE}]
        row |= {"status": Status.OK, "face_count": max(len(faces), 1)}
        if len(faces) == 0:  # the user says that the picture is a face, though no landmarks were found
            return [row | self._cut_whole(image)]
        return [row | {"face_index": index} | self._cut(image, faces, index) for index in range(len(faces))]

    def _cut(self, image: np.ndarray, faces: Faces, index: int) -> Row:
        size = self.work.image_size
        landmarks = faces.landmarks[index]
        transform = face_transform(landmarks, size=size)
        masks = None
        if self.work.draw_masks:
            masks = pack_masks(draw_masks(transform_points(landmarks, transform), crop_size=size))
        return {
            **_box_columns(faces.boxes[index]),
            "detection_score": float(faces.scores[index]),
            "landmarks": landmarks.ravel().tolist(),
            "masks": masks,
            **_face_columns(warp_face(image, transform, size=size)),
        }

    def _cut_whole(self, image: np.ndarray) -> Row:
        size = self.work.image_size
        face = warp_face(image, centre_transform(image, size=size), size=size)
        masks = pack_masks(EVERYWHERE) if self.work.draw_masks else None
        box = np.array([0, 0, image.shape[1], image.shape[0]], np.float32)
        return {**_box_columns(box), "face_index": 0, "masks": masks, **_face_columns(face)}


def _box_columns(box: np.ndarray) -> Row:
    x1, y1, x2, y2 = (float(value) for value in box)
    size = float(np.sqrt(max(x2 - x1, 0) * max(y2 - y1, 0)))
    return {"box_x1": x1, "box_y1": y1, "box_x2": x2, "box_y2": y2, "face_size": size}


def _face_columns(face: np.ndarray) -> Row:
    return {"sharpness": sharpness(face), "face": face.tobytes()}


class PredictAttributes:
    """Stage `face, masks -> 40 probabilities, labels`.

    Args:
        checkpoint: a reference in the object store: each node holds the weights once.
        batch_size: faces in one forward pass.
        progress: an actor that counts images by status.
    """

    def __init__(self, checkpoint: "ray.ObjectRef[Checkpoint]", batch_size: int, progress: Any = None) -> None:
        worker_metrics()
        torch.set_num_threads(1)  # without a GPU there is a model worker for every CPU
        keep_freed_memory()
        self.labeller = Labeller(ray.get(checkpoint), batch_size=batch_size)
        self.progress = progress

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        table = predict(batch, self.labeller)
        images = self._report(table)
        worker_metrics().time_stage("model", seconds=time.perf_counter() - started, images=images)
        return table

    def give_up(self, batch: pa.Table) -> pa.Table:
        """Rows for images whose faces take the process with them, which is known of them by now."""
        nothing = {name: pa.nulls(len(batch), TABLE_SCHEMA.field(name).type) for name in PREDICTED}
        known = {name: batch[name] for name in batch.column_names if name not in ("face", "masks")}
        known |= {"status": pa.repeat(Status.CRASHED.value, len(batch)), "error": pa.repeat(CRASH, len(batch))}
        table = pa.table([(known | nothing)[name] for name in TABLE_SCHEMA.names], schema=TABLE_SCHEMA)
        self._report(table)
        return table

    def _report(self, table: pa.Table) -> int:
        """Count what is done; returns how many images that is."""
        outcomes = image_outcomes(table)
        worker_metrics().count_images(outcomes)
        if self.progress is not None:
            self.progress.add.remote(outcomes)
        return sum(outcomes.values()) - outcomes["faces"]


def image_outcomes(table: pa.Table) -> dict[str, int]:
    """Images by status and, under `faces`, the faces labelled."""
    index, status = table["face_index"].to_numpy(), table["status"].to_numpy(zero_copy_only=False)
    names, counts = np.unique(status[index <= 0], return_counts=True)
    outcomes = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    return outcomes | {"faces": int(((index >= 0) & (status == Status.OK.value)).sum())}


def predict(table: pa.Table, labeller: Labeller) -> pa.Table:
    """Replace the faces of a table of `FACE_SCHEMA` by their attributes: a table of `TABLE_SCHEMA`.

    An image with a face whose probabilities are not finite becomes a `model_error`, all its faces: it is tried again
    whole.
    """
    has_face = table["face"].is_valid().to_numpy(zero_copy_only=False)
    chosen = table.filter(pa.array(has_face))
    size = labeller.image_size
    faces = np.frombuffer(b"".join(chosen["face"].to_pylist()), np.uint8).reshape(-1, size, size, 3)
    packed = chosen["masks"].to_pylist()
    masks = np.stack([unpack_masks(mask) for mask in packed]) if packed and packed[0] is not None else None
    probabilities = np.full((len(table), len(ATTRIBUTES)), np.nan, np.float32)
    probabilities[has_face] = labeller(faces, masks)
    good = np.asarray(np.isfinite(probabilities).all(axis=1))
    columns = {name: table[name] for name in table.column_names if name not in ("face", "masks")}
    if not good[has_face].all():
        ids = table["image_id"].to_numpy(zero_copy_only=False)
        bad = has_face & np.isin(ids, np.unique(ids[has_face & ~good]))
        good &= ~bad
        columns |= _model_errors(columns, bad=bad)
    for k, name in enumerate(ATTRIBUTES):
        columns[name] = pa.array(probabilities[:, k], mask=~good)
    columns["labels"] = pa.array(labeller.label_bits(probabilities), pa.uint64(), mask=~good)
    return pa.table([columns[name] for name in TABLE_SCHEMA.names], schema=TABLE_SCHEMA)


def _model_errors(columns: Row, *, bad: np.ndarray) -> Row:
    """The status and error columns with the given rows marked."""
    status = np.where(bad, Status.MODEL_ERROR.value, columns["status"].to_numpy(zero_copy_only=False))
    error = columns["error"].to_pylist()
    message = "the model's probabilities are not finite"
    return {
        "status": pa.array(status.tolist(), pa.string()),
        "error": pa.array([message if mark else old for old, mark in zip(error, bad, strict=True)], pa.string()),
    }
