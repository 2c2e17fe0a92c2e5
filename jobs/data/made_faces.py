"""A training table of drawn faces, for benchmarks and tests that need something to learn but no pictures of people."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.data.training_table import TRAINING_SCHEMA, Description, encode_face
from mgmtn.attributes import ATTRIBUTES
from mgmtn.masks import MASK_SIZE, pack_masks

_FACELESS_EVERY = 7  # of the pictures: one has no face


def write_made_table(
    folder: Path, *, count: int, image_size: int, margin: int = 0, mask_size: int = MASK_SIZE, seed: int = 0
) -> Path:
    """Write a table of `count` train rows: discs on noise, whose colours are the first three labels.

    The masks are the disc for every group, labels 4 to 39 repeat the first three, and the last one is unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = [_row(number, random, image_size + 2 * margin, mask_size) for number in range(count)]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), folder / "part-00000.parquet")
    faces = sum(row["face_found"] is True for row in rows)
    Description(
        dataset="made faces",
        image_size=image_size,
        margin=margin,
        mask_size=mask_size,
        detector="none",
        images=count,
        faces=faces,
        no_face=count - faces,
        failed=0,
        splits={"train": count},
    ).save(folder)
    return folder


def _row(number: int, random: np.random.Generator, side: int, mask_size: int) -> dict[str, object]:
    colour = random.integers(0, 2, 3)
    pixels = random.integers(0, 64, (side, side, 3), dtype=np.uint8)
    pixels[_disc(side)] += (colour * 160).astype(np.uint8)
    found = number % _FACELESS_EVERY > 0
    labels = np.resize(colour, len(ATTRIBUTES)).astype(np.int8)
    labels[-1] = -1
    return {
        "image": f"{number:06d}.jpg",
        "split": "train",
        "status": "ok" if found else "no_face",
        "face_found": found,
        "face": encode_face(pixels),
        "masks": pack_masks(np.broadcast_to(_disc(mask_size), (8, mask_size, mask_size))),
        "labels": labels.tolist(),
    }


def _disc(side: int) -> np.ndarray:
    offsets = np.arange(side) - (side - 1) / 2
    return offsets[:, None] ** 2 + offsets**2 <= (0.35 * side) ** 2
