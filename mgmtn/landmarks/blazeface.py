"""Detect faces with BlazeFace (full range) on a whole image and, for small faces, on overlapping tiles of it.

Bazarevsky et al., arXiv 1907.05047. The network sees 192 px a side and finds faces from about 15 px there; halving the
tiles finds smaller ones. Found of 40 faces pasted in a photograph of 1024x768 px, by width as a share of the longer
side, with the time of one thread of a server CPU:

| levels | 1.5% | 2% | 2.5% | 3% | 4% | 5% | 7% | 10% | ms |
|---|---|---|---|---|---|---|---|---|---|
| 0 | 0 | 0 | 5 | 12 | 23 | 37 | 39 | 40 | 10 |
| 1 | 10 | 26 | 34 | 36 | 40 | 40 | 40 | 40 | 44 |
| 2 | 35 | 40 | 40 | 40 | 40 | 40 | 40 | 40 | 130 |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from mgmtn.landmarks.litert import Network, sigmoid

# Shapes: A anchors, K detections, S pixels a side of what the network sees.
_STRIDE: Final = 4  # pixels between anchors
_FOUND_FROM: Final = 15  # pixels of the network's input: narrower faces are missed
_OVERLAP: Final = 0.25  # of neighbouring tiles; what is wider was found one level before
_SAME_FACE: Final = 0.4  # intersection over union from which two boxes are one face


@dataclass(frozen=True)
class Detections:
    """What was detected, in pixels of the image.

    Attributes:
        boxes: float32, shape ``(K, 4)``: x1, y1, x2, y2; brows to chin; may leave the image.
        eyes: float32, shape ``(K, 2, 2)``: x, y of the eye on the image's left, then of the other, of an upright face.
        scores: float32, shape ``(K,)``, 0 to 1.
    """

    boxes: np.ndarray
    eyes: np.ndarray
    scores: np.ndarray


def best_of_each_face(boxes: np.ndarray, *, scores: np.ndarray) -> np.ndarray:
    """Indices of the boxes, shape ``(K, 4)`` as x1, y1, x2, y2, that remain when each face keeps its best one."""
    corner_and_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxes(corner_and_size.tolist(), scores.tolist(), 0.0, _SAME_FACE) if len(boxes) else []
    return np.asarray(kept, int).reshape(-1)


def pyramid(image: np.ndarray, *, size: int, levels: int, min_face_size: float) -> list[np.ndarray]:
    """The image at sizes that double: the first has a longer side of `size` pixels and shows the whole at once.

    There are `levels` more, fewer when faces of `min_face_size` pixels are found on one already.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    scales = [scale]
    while len(scales) <= levels and scales[-1] * min_face_size < _FOUND_FROM:
        scales.append(scales[-1] * 2)
    sizes = [(max(1, round(width * scale)), max(1, round(height * scale))) for scale in scales]
    pictures = [image]
    for wanted in reversed(sizes):  # each from the next larger one: cheaper than from the image
        method = cv2.INTER_AREA if wanted[0] < pictures[-1].shape[1] else cv2.INTER_LINEAR
        pictures.append(cv2.resize(pictures[-1], wanted, interpolation=method))
    return pictures[:0:-1]


def tile_starts(length: int, *, size: int) -> list[int]:
    """The first pixel of each tile along one side; one tile is centred on a side that is shorter than it."""
    if length <= size:
        return [-((size - length) // 2)]
    count = int(np.ceil((length - size) / (size * (1 - _OVERLAP)))) + 1
    return [round(start) for start in np.linspace(0, length - size, count)]


def tiles(picture: np.ndarray, *, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Squares of `size` pixels that cover a picture, black outside it, each with its x, y in the picture."""
    height, width = picture.shape[:2]
    for y in tile_starts(height, size=size):
        for x in tile_starts(width, size=size):
            tile = np.zeros((size, size, 3), np.uint8)
            part = picture[max(y, 0) : y + size, max(x, 0) : x + size]
            tile[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]] = part
            yield tile, np.array([x, y], np.float32)


class BlazeFace:
    """The detector, with its network loaded."""

    def __init__(self, *, min_score: float, min_face_size: float, num_threads: int) -> None:
        outputs = ("reshaped_regressor_face_4", "reshaped_classifier_face_4")
        self._network = Network("face_detection_full_range.tflite", outputs=outputs, num_threads=num_threads)
        self._min_score, self._min_face_size = min_score, min_face_size
        centres = np.arange(_STRIDE / 2, self._network.size, _STRIDE, dtype=np.float32)
        self._anchors_A2 = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)

    def detect(self, image: np.ndarray, *, levels: int) -> Detections:
        """The faces of one image (RGB, uint8, ``(H, W, 3)``), each once."""
        height, width = image.shape[:2]
        size = self._network.size
        boxes, eyes, scores = [], [], []
        for picture in pyramid(image, size=size, levels=levels, min_face_size=self._min_face_size):
            scale = np.array([width / picture.shape[1], height / picture.shape[0]], np.float32)
            for tile, offset in tiles(picture, size=size):
                points_K42, score = self._detect_in_tile(tile)
                points_K42 = (points_K42 + offset) * scale
                boxes.append(points_K42[:, :2].reshape(-1, 4))
                eyes.append(points_K42[:, 2:])
                scores.append(score)
        found = Detections(boxes=np.concatenate(boxes), eyes=np.concatenate(eyes), scores=np.concatenate(scores))
        kept = best_of_each_face(found.boxes, scores=found.scores)
        return Detections(boxes=found.boxes[kept], eyes=found.eyes[kept], scores=found.scores[kept])

    def _detect_in_tile(self, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Box corners and eyes, (K, 4, 2) in pixels of the tile, and scores (K,), many a face."""
        regressors, logits = self._network(tile.astype(np.float32) / 127.5 - 1)
        scores = sigmoid(logits[:, 0])
        kept = scores >= self._min_score
        # The network gives centre, size and six key points, relative to the anchor; the eyes come first.
        points_K82 = regressors[kept].reshape(-1, 8, 2)
        centre, half, eyes = points_K82[:, :1], points_K82[:, 1:2] / 2, points_K82[:, 2:4]
        points_K42 = np.concatenate([centre - half, centre + half, eyes], axis=1)
        return points_K42 + self._anchors_A2[kept][:, None], scores[kept]
