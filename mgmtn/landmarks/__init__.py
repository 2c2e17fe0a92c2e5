"""Find faces and their 68 landmarks (the iBUG 300-W scheme) in images.

68 points, 0-based: jaw 0-16 (chin 8), brows 17-21 and 22-26, nose bridge 27-30, nose base 31-35, eyes 36-41 and 42-47,
outer lip 48-59, inner lip 60-67; the image's left comes first.

To add a detector: write its settings (with their own `kind` and a `build`) and its class in a file beside this one, and
list the settings in `DetectorSettings` below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

import numpy as np
from pydantic import Field

# fmt: off
# Which of the 68 points each one is in the mirrored picture.
MIRRORED_68: Final = np.array([
    16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0,  # jaw
    26, 25, 24, 23, 22, 21, 20, 19, 18, 17,  # brows
    27, 28, 29, 30, 35, 34, 33, 32, 31,  # nose
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,  # eyes
    54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65,  # lips
])
# fmt: on


def most_central(boxes: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Which box is large and near the centre of an image of that size.

    Args:
        boxes: shape ``(N, 4)``: x1, y1, x2, y2.

    Returns:
        Its index, shape ``(1,)``; shape ``(0,)`` when there are no boxes.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    off_centre = np.linalg.norm((boxes[:, :2] + boxes[:, 2:] - [width, height]) / 2, axis=1)
    return np.argsort(off_centre / np.sqrt(sizes.prod(axis=1)), kind="stable")[:1]


@dataclass(frozen=True)
class Faces:
    """The faces of one image, the one with the largest box first; there may be none.

    Boxes and landmarks are in pixels of the image that was given, origin at its top left; boxes lie within the image,
    landmarks may leave it where a face does.

    Attributes:
        boxes: float32, shape ``(N, 4)``: x1, y1, x2, y2.
        scores: float32, shape ``(N,)``, 0 to 1.
        landmarks: float32, shape ``(N, 68, 2)``: x, y.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray

    @classmethod
    def none(cls) -> "Faces":
        return cls(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            landmarks=np.zeros((0, 68, 2), np.float32),
        )

    @classmethod
    def largest_first(cls, boxes: np.ndarray, *, scores: np.ndarray, landmarks: np.ndarray) -> "Faces":
        """The same faces as float32, sorted by the area of their boxes."""
        order = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")
        arrays = (np.asarray(array, np.float32)[order] for array in (boxes, scores, landmarks))
        return cls(*arrays)

    def take(self, indices: np.ndarray) -> "Faces":
        return Faces(boxes=self.boxes[indices], scores=self.scores[indices], landmarks=self.landmarks[indices])

    def __len__(self) -> int:
        return len(self.boxes)


class LandmarkDetector(Protocol):
    """Faces and landmarks of images; each image is RGB, uint8, shape ``(H, W, 3)``, and images may differ in size."""

    def find(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """Every face of each photograph."""
        ...

    def fit(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """The face of each picture that is itself one face crop: one face, or none where no face is seen."""
        ...


# The detectors import `Faces` from here, so they come after it.
from mgmtn.landmarks.fan import FanSettings  # noqa: E402
from mgmtn.landmarks.mediapipe import MediaPipeSettings  # noqa: E402

DetectorSettings = Annotated[MediaPipeSettings | FanSettings, Field(discriminator="kind")]

__all__ = [
    "MIRRORED_68",
    "DetectorSettings",
    "Faces",
    "FanSettings",
    "LandmarkDetector",
    "MediaPipeSettings",
    "most_central",
]
