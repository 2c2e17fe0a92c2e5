"""Label images without Ray: the reference of the benchmark.

A pool of as many processes as the job has CPUs. Each has its own detector and model, runs them on one thread, and takes
eight images at a time: reads, decodes, finds, aligns and labels them, and sends boxes and probabilities back. Nothing
is planned, written or made good after a failure.
"""

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch

from jobs.bench_sides import Result, Side
from mgmtn.allocator import keep_freed_memory
from mgmtn.checkpoint import Checkpoint
from mgmtn.errors import ImageError
from mgmtn.images import ImageLimits, align_face, centre_transform, decode_image, warp_face
from mgmtn.labeller import Labeller

CHUNK: Final = 8  # images: larger ones fill the model's batches better, and leave processes idle at the end


class PlainLabeller:
    """Reads and labels images one after another, with the library alone."""

    def __init__(self, side: Side) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        cv2.setNumThreads(1)
        self.labeller = Labeller(Checkpoint.load(side.model), batch_size=side.batch_size)
        self.detector = side.detector.build()
        self.whole_images = side.faces == "whole-image"

    def __call__(self, files: Sequence[str]) -> tuple[int, np.ndarray, np.ndarray]:
        """Label some images.

        Returns:
            How many images there were; boxes `(N, 4)` and probabilities `(N, 40)` of their faces.
        """
        size = self.labeller.image_size
        boxes, crops = [np.zeros((0, 4), np.float32)], []
        for file in files:
            try:
                image = decode_image(Path(file).read_bytes(), limits=ImageLimits())
            except ImageError:
                continue
            [faces] = (self.detector.fit if self.whole_images else self.detector.find)([image])
            boxes.append(faces.boxes)
            crops += [align_face(image, landmarks, size=size) for landmarks in faces.landmarks]
            if len(faces) == 0 and self.whole_images:
                boxes.append(np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32))
                crops.append(warp_face(image, centre_transform(image, size=size), size=size))
        aligned = np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8)
        return len(files), np.concatenate(boxes), self.labeller(aligned)


_plain: PlainLabeller | None = None  # of each process of the pool


def _start(side: Side) -> None:
    global _plain
    _plain = PlainLabeller(side)


def _label(files: Sequence[str]) -> tuple[int, np.ndarray, np.ndarray]:
    assert _plain is not None, "the pool's processes start with _start"
    return _plain(files)


def label(side: Side) -> Result:
    """Label the images with a pool of processes."""
    chunks = [side.files[start : start + CHUNK] for start in range(0, len(side.files), CHUNK)]
    images = faces = first = 0
    began = 0.0
    with multiprocessing.get_context("spawn").Pool(side.cpus, initializer=_start, initargs=(side,)) as pool:
        for count, _, probabilities in pool.imap_unordered(_label, chunks):
            if not first:
                began, first = time.time(), count
            images += count
            faces += len(probabilities)
        seconds = time.time() - began
    return Result(images=images, faces=faces, first=first, seconds=seconds)
