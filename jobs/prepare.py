"""Images with labels become a training table: aligned faces, landmarks, group masks, labels and split, in Parquet.

mgmtn prepare DATASET --output DATA
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterSettings, joined, totals
from jobs.data.datasets import read_dataset
from jobs.data.detection import DetectionSettings
from jobs.data.schema import ERROR_LENGTH, Status
from jobs.data.stages import EVERYWHERE, Row, fetch_and_decode
from jobs.data.training_table import DESCRIPTION_FILE, TRAINING_SCHEMA, Description, decode_face, encode_face
from jobs.settings import Settings, run_program
from jobs.telemetry import progress_bar
from mgmtn.drawing import contact_sheet, overlay_masks
from mgmtn.errors import ImageError
from mgmtn.images import ImageLimits, centre_transform, face_transform, transform_points, warp_face
from mgmtn.landmarks import DetectorSettings, Faces
from mgmtn.masks import MASK_SIZE, draw_masks, pack_masks, unpack_masks

log = logging.getLogger(__name__)

ROWS_PER_FILE = 4096
SHEET_SAMPLES = 24


class PrepareSettings(DetectionSettings, Settings):
    """Settings of `mgmtn prepare`."""

    dataset: CliPositionalArg[str] = Field(description="folder with labels.csv, CelebA's folder, or a .csv or .parquet")
    output: Path = Field(description="folder of the training table")
    image_size: int = Field(128, ge=32, description="side of the model's square, pixels")
    margin: int = Field(16, ge=0, description="pixels kept around the square for random crops")
    limit: int = Field(0, ge=0, description="images taken, the first of the dataset; 0: all")
    workers: int = Field(0, ge=0, description="worker processes, a CPU each; 0: as many as the cluster has CPUs")
    limits: ImageLimits = Field(default_factory=ImageLimits)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


class MakeSamples:
    """Stage `uri, split, labels -> face, landmarks, masks`: the main face of each picture, or its centre, marked."""

    def __init__(self, detector: DetectorSettings, limits: ImageLimits, image_size: int, margin: int) -> None:
        cv2.setNumThreads(1)
        self.detector = detector.build()
        self.limits, self.image_size, self.margin = limits, image_size, margin

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = []
        for group in fetch_and_decode([row | {"etag": None} for row in batch.to_pylist()], limits=self.limits):
            images = [image for _, image in group if isinstance(image, np.ndarray)]
            found = iter(self.detector.find(images))
            for given, image in group:
                row = {name: given[name] for name in ("image", "uri", "split", "labels")} | {"face_found": False}
                if isinstance(image, ImageError):
                    rows.append(row | {"status": image.status, "error": str(image)[:ERROR_LENGTH]})
                else:
                    rows.append(row | self._sample(image, next(found)))
        return pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA)

    def _sample(self, image: np.ndarray, faces: Faces) -> Row:
        side = self.image_size + 2 * self.margin
        if len(faces) == 0:
            transform = centre_transform(image, size=self.image_size, margin=self.margin)
            face = encode_face(warp_face(image, transform, size=side))
            return {"status": Status.NO_FACE, "face": face, "masks": pack_masks(EVERYWHERE)}
        landmarks = faces.landmarks[main_face(faces, image.shape)]
        transform = face_transform(landmarks, size=self.image_size, margin=self.margin)
        points = transform_points(landmarks, transform)
        return {
            "status": Status.OK,
            "face_found": True,
            "face": encode_face(warp_face(image, transform, size=side)),
            "landmarks": points.astype(np.float32).ravel().tolist(),
            "masks": pack_masks(draw_masks(points, crop_size=side)),
        }


def main_face(faces: Faces, shape: tuple[int, ...]) -> int:
    """The face that a picture's labels speak of: large and near the middle.

    A face loses half its weight when its centre lies its own side's length away from the middle of the picture.
    """
    centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
    areas = np.prod(faces.boxes[:, 2:] - faces.boxes[:, :2], axis=1)
    squared = ((centres - [shape[1] / 2, shape[0] / 2]) ** 2).sum(axis=1)
    return int(np.argmax(areas / (1 + squared / np.maximum(areas, 1))))


def run(settings: PrepareSettings) -> dict[str, Any]:
    """Make the table.

    Raises:
        ConfigError: the dataset cannot be read.
    """
    table = read_dataset(settings.dataset)
    if settings.limit:
        table = table.slice(0, settings.limit)
    settings.output.mkdir(parents=True, exist_ok=True)
    for old in (*settings.output.glob("part-*.parquet"), settings.output / DESCRIPTION_FILE):
        old.unlink(missing_ok=True)
    detector = settings.detector_settings()
    counts: Counter[str] = Counter()
    with joined(settings.cluster), progress_bar("prepare", total=len(table), unit="images") as progress:
        workers = settings.workers or int(totals()["CPU"])
        samples = ray.data.from_arrow(table, override_num_blocks=max(1, len(table) // 32)).map_batches(
            MakeSamples,
            fn_constructor_args=(detector, settings.limits, settings.image_size, settings.margin),
            batch_format="pyarrow",
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        pending: list[pa.Table] = []
        batches: Iterable[pa.Table] = samples.iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in batches:
            pending.append(batch.cast(TRAINING_SCHEMA))
            counts.update(batch["status"].to_pylist())
            progress.advance(len(batch))
            if sum(map(len, pending)) >= ROWS_PER_FILE:
                write_part(pending, settings.output)
                pending = []
        if pending:
            write_part(pending, settings.output)
    failed = counts.total() - counts[Status.OK] - counts[Status.NO_FACE]
    Description(
        dataset=settings.dataset,
        image_size=settings.image_size,
        margin=settings.margin,
        mask_size=MASK_SIZE,
        detector=detector.kind,
        images=counts.total(),
        faces=counts[Status.OK],
        no_face=counts[Status.NO_FACE],
        failed=failed,
        splits=dict(Counter(table["split"].to_pylist())),
    ).save(settings.output)
    return {
        "images": counts.total(),
        "faces": counts[Status.OK],
        "no_face": counts[Status.NO_FACE],
        "failed": failed,
        "output": str(settings.output),
    }


def write_part(tables: Sequence[pa.Table], folder: Path) -> None:
    """Write the next file of the table; beside the first, a picture of its masks for a person to look at."""
    number = len(list(folder.glob("part-*.parquet")))
    table = pa.concat_tables(tables).sort_by("image")
    pq.write_table(table, folder / f"part-{number:05d}.parquet", compression="zstd", row_group_size=512)
    if number == 0:
        write_mask_sheet(table, folder / "masks.png")


def write_mask_sheet(batch: pa.Table, path: Path) -> None:
    """Draw the masks of the first samples over their faces, for a person to look at; nothing where there are none."""
    rows = batch.filter(batch["face"].is_valid()).slice(0, SHEET_SAMPLES).to_pylist()
    if not rows:
        return
    tiles = [overlay_masks(decode_face(row["face"]), unpack_masks(row["masks"])) for row in rows]
    contact_sheet(tiles, [row["image"] for row in rows]).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PrepareSettings, run, argv, prog="mgmtn prepare", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
