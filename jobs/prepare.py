"""Images with labels become a training table: aligned faces, landmarks, group masks, labels and split, in Parquet.

    mgmtn prepare DATASET --output DATA

Killed and run again, it keeps the files that are finished and makes the rest.
"""

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterSettings, joined, totals
from jobs.data.datasets import read_dataset
from jobs.data.detection import DetectionSettings, on_this_machine
from jobs.data.object_store import canonical_uri
from jobs.data.preparation import Preparation, count_outcomes, dataset_digest, take_up, write_part
from jobs.data.schema import ERROR_LENGTH, Status
from jobs.data.stages import EVERYWHERE, Row, fetch_and_decode
from jobs.data.training_table import TRAINING_SCHEMA, Description, encode_face
from jobs.settings import Place, Settings, run_program
from jobs.telemetry import progress_bar
from mgmtn.errors import ImageError
from mgmtn.images import ImageLimits, centre_transform, face_transform, transform_points, warp_face
from mgmtn.landmarks import DetectorSettings, Faces
from mgmtn.masks import draw_masks, pack_masks

log = logging.getLogger(__name__)

_BLOCK = 32  # images handed to a worker at a time


class PrepareSettings(DetectionSettings, Settings):
    """Settings of `mgmtn prepare`."""

    dataset: CliPositionalArg[str] = Field(
        description="folder with labels.csv or with CelebA's or LFWA's official files, or a .csv or .parquet with uri"
    )
    output: Place = Field(description="the training table: a folder or an s3:// prefix")
    image_size: int = Field(128, ge=32, description="side of the model's square, pixels")
    margin: int = Field(16, ge=0, description="pixels kept around the square for random crops")
    limit: int = Field(0, ge=0, description="images taken, the first of the dataset; 0: all")
    rows_per_file: PositiveInt = Field(1024, description="images in a file; what a killed run had begun is made again")
    remake: bool = Field(False, description="make every file again, also those that an earlier run finished")
    workers: int = Field(0, ge=0, description="worker processes, a CPU each; 0: as many as the cluster has CPUs")
    limits: ImageLimits = Field(default_factory=ImageLimits)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)


class MakeSamples:
    """Stage `row, uri, split, labels -> face, landmarks, masks`: each picture's main face, or its centre, marked."""

    def __init__(self, detector: DetectorSettings, limits: ImageLimits, image_size: int, margin: int) -> None:
        cv2.setNumThreads(1)
        self.detector = on_this_machine(detector).build()
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
        return pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA).append_column("row", batch["row"])

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
    """Make the table, or what an earlier run left to do.

    Raises:
        ConfigError: the dataset cannot be read, or the output not written.
    """
    table = read_dataset(settings.dataset)
    if settings.limit:
        table = table.slice(0, settings.limit)
    folder = canonical_uri(settings.output)
    detector = settings.chosen_detector()
    preparation = Preparation(
        dataset_sha256=dataset_digest(table),
        images=len(table),
        rows_per_file=settings.rows_per_file,
        image_size=settings.image_size,
        margin=settings.margin,
        detector=detector.model_dump(mode="json"),
        limits=settings.limits.model_dump(mode="json"),
    )
    finished = take_up(folder, preparation, anew=settings.remake)
    wanted = [number for number in range(preparation.files) if number not in finished]
    log.info("event=started images=%d files=%d finished=%d", len(table), preparation.files, len(finished))
    if wanted:
        on_this_machine(detector).build()  # what is wrong with it shows here, once
        with joined(settings.cluster):
            make_parts(table, wanted, preparation, folder=folder, settings=settings, detector=detector)
    counts = count_outcomes(folder, preparation)
    outcomes = {
        "images": counts.total(),
        "faces": counts[Status.OK],
        "no_face": counts[Status.NO_FACE],
        "failed": counts.total() - counts[Status.OK] - counts[Status.NO_FACE],
    }
    Description(
        dataset=settings.dataset,
        image_size=settings.image_size,
        margin=settings.margin,
        mask_size=preparation.mask_size,
        detector=detector.kind,
        splits=dict(Counter(table["split"].to_pylist())),
        **outcomes,
    ).save(folder)
    return {**outcomes, "output": settings.output}


def make_parts(
    table: pa.Table,
    wanted: Sequence[int],
    preparation: Preparation,
    *,
    folder: str,
    settings: PrepareSettings,
    detector: DetectorSettings,
) -> None:
    """Make files of the table, each written as soon as its last image is done."""
    numbered = table.append_column("row", pa.array(range(len(table)), pa.int64()))
    blocks = list(blocks_of(numbered, wanted, preparation))
    samples = ray.data.from_arrow(blocks).map_batches(
        MakeSamples,
        fn_constructor_args=(detector, settings.limits, settings.image_size, settings.margin),
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=settings.workers or int(totals()["CPU"])),
    )
    pending: defaultdict[int, list[pa.Table]] = defaultdict(list)
    batches: Iterable[pa.Table] = samples.iter_batches(batch_size=None, batch_format="pyarrow")
    with progress_bar("prepare", total=sum(map(len, blocks)), unit="images") as progress:
        for batch in batches:
            for number, rows in by_file(batch, preparation.rows_per_file):
                pending[number].append(rows)
                first, end = preparation.span(number)
                if sum(map(len, pending[number])) == end - first:
                    whole = pa.concat_tables(pending.pop(number)).sort_by("row")
                    write_part(whole.drop_columns("row"), number, folder=folder)
            progress.advance(len(batch))


def blocks_of(numbered: pa.Table, wanted: Sequence[int], preparation: Preparation) -> Iterator[pa.Table]:
    """The rows of the wanted files in small pieces, file after file, so that few files are unfinished at a time."""
    for number in wanted:
        first, end = preparation.span(number)
        for start in range(first, end, _BLOCK):
            yield numbered.slice(start, min(_BLOCK, end - start))


def by_file(batch: pa.Table, rows_per_file: int) -> Iterator[tuple[int, pa.Table]]:
    """A batch's rows by the file that they belong to: one, unless Ray joined blocks."""
    numbers = pc.divide(batch["row"], rows_per_file)
    for number in pc.unique(numbers).to_pylist():
        yield number, batch.filter(pc.equal(numbers, number))


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(PrepareSettings, run, argv, prog="mgmtn prepare", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
