"""The detector for those who have its weights: face-alignment's 2D-FAN-4, which draws 68 points as heatmaps.

Bulat and Tzimiropoulos, arXiv 1703.07332. Its network and its cropping and decoding come from the package
`face-alignment`; nothing is ever downloaded: a file that is absent is an error before any work starts.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from mgmtn.errors import ConfigError
from mgmtn.landmarks import Faces, most_central
from mgmtn.landmarks.mediapipe import MediaPipeSettings

# Shapes: N faces, P = 68 points, heatmaps of 64x64 cells.
_SITE: Final = "https://www.adrianbulat.com/downloads/python-fan"
_NETWORK_FILE: Final = "2DFAN4-11f355bf06.pth.tar"
_DETECTOR_FILES: Final = {
    "sfd": {"path_to_detector": "s3fd-619a316812.pth"},
    "blazeface": {"path_to_detector": "blazeface.pth", "path_to_anchor": "anchors.npy"},
    "dlib": {},
}
_MIN_SIDE: Final = 2  # pixels: smaller boxes cannot be cropped
# What torch.load and load_state_dict raise for a file that is no weights, or those of another network.
_NOT_WEIGHTS: Final = (RuntimeError, TypeError, ValueError, KeyError, EOFError, pickle.UnpicklingError)

# One image, RGB uint8 (H, W, 3), and whether it is one face crop -> boxes float32 (N, 4) and scores float32 (N,).
FindBoxes = Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray]]


class FanSettings(BaseModel):
    """face-alignment's network, on the boxes of a detector of choice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fan"] = "fan"
    weights: str | None = Field(
        None,
        description=f"file with the network's weights; default: {_NETWORK_FILE} in torch's cache, "
        "$TORCH_HOME/hub/checkpoints",
    )
    weights_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{10,64}$",
        description="sha256 of that file, or its first characters (10 at least); default: those in its name, if any",
    )
    face_detector: Literal["embedded", "sfd", "blazeface", "dlib"] = Field(
        "embedded", description="what finds the faces: the embedded detector, or one of face-alignment's"
    )
    face_detector_weights: str | None = Field(
        None,
        description="file with the face detector's weights, where it has any (blazeface: anchors.npy lies beside it); "
        "default: its name in torch's cache",
    )
    embedded: MediaPipeSettings = Field(
        default_factory=MediaPipeSettings, description="the embedded detector, where it finds the faces"
    )
    device: str = Field("cpu", description="where the network runs: cpu, cuda, cuda:1")
    batch_size: PositiveInt = Field(16, description="faces per forward pass; bounds memory")

    def build(self) -> "Fan":
        """The detector, with its networks loaded.

        Raises:
            ConfigError: if a file is absent, is not the one that was meant or holds another network, or if the
                device or a package that it takes is missing.
        """
        return Fan(self)


def checked_weights(path: str | None, *, name: str, sha256: str | None = None) -> Path:
    """The file of weights that a user has put in place.

    Args:
        path: the file; None for `name` in torch's cache.
        name: what the file is called at its source.
        sha256: the first characters of its hash, or all; None for those in its name (`-11f355bf06.`), if any.

    Raises:
        ConfigError: if it is absent, or has another hash.
    """
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        raise ConfigError(
            f"no weights at {file}: download {name} ({_SITE}/{name} or face-alignment's README), then set the path "
            "to it, or put it there; or use the embedded detector, which needs no download: kind = mediapipe"
        )
    in_name = re.search(r"-([0-9a-f]{8,64})\.", file.name)
    expected = sha256 or (in_name.group(1) if in_name else "")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest() if expected else ""
    if not found.startswith(expected):
        raise ConfigError(f"{file} has sha256 {found}, expected {expected}: it is damaged, or another file")
    return file


def load_network(file: Path, *, device: str) -> torch.nn.Module:
    """FAN-4 with the weights of a file that must hold a state dict and nothing else.

    Raises:
        ConfigError: if the file holds something else, or the device is absent.
    """
    network = _face_alignment("models").FAN(4)
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except _NOT_WEIGHTS as error:
        raise ConfigError(f"{file} does not hold the weights of 2D-FAN-4: {_one_line(error)}") from error
    try:
        return network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ConfigError(f"device {device!r} cannot be used: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """The start of a message of torch's, which may name hundreds of tensors."""
    return " ".join(str(error).split())[:200]


def _face_alignment(module: str) -> Any:
    """A module of face-alignment; imported late because that takes seconds (scikit-image, numba)."""
    try:
        return import_module(f"face_alignment.{module}")
    except ImportError as error:
        raise ConfigError(f"face-alignment's {module} cannot be imported ({error}); see its README") from error


def embedded_face_detector(settings: FanSettings) -> FindBoxes:
    """The embedded detector's boxes.

    Raises:
        ConfigError: if the package that carries its networks is not installed.
    """
    detector = settings.embedded.build()

    def find_boxes(image: np.ndarray, one: bool) -> tuple[np.ndarray, np.ndarray]:
        faces = (detector.fit if one else detector.find)([image])[0]
        return faces.boxes, faces.scores

    return find_boxes


def library_face_detector(settings: FanSettings) -> FindBoxes:
    """The boxes of one of face-alignment's own face detectors.

    Raises:
        ConfigError: if its weights are absent or not its own, or its package is missing.
    """
    name, path = settings.face_detector, settings.face_detector_weights
    files = {}
    for argument, file in _DETECTOR_FILES[name].items():
        beside = path if argument == "path_to_detector" or path is None else str(Path(path).with_name(file))
        files[argument] = str(checked_weights(beside, name=file))
    module = _face_alignment(f"detection.{name}")
    try:
        detector = module.FaceDetector(device=settings.device, **files)
    except _NOT_WEIGHTS as error:
        raise ConfigError(f"{', '.join(files.values())} cannot be loaded as {name}: {_one_line(error)}") from error

    def find_boxes(image: np.ndarray, one: bool) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        found = [np.append(face, 1.0)[:5] for face in detector.detect_from_image(image)]  # dlib's have no score
        rows_N5 = np.array(found, np.float32).reshape(-1, 5)
        rows_N5 = rows_N5.clip(0, [width, height, width, height, 1])
        rows_N5 = rows_N5[(rows_N5[:, 2:4] - rows_N5[:, :2]).min(axis=1, initial=np.inf) >= _MIN_SIDE]
        if one:
            rows_N5 = rows_N5[most_central(rows_N5[:, :4], height=height, width=width)]
        return rows_N5[:, :4], rows_N5[:, 4]

    return find_boxes


class Fan:
    """face-alignment's network, a `LandmarkDetector`. A face's box and score are its face detector's."""

    def __init__(self, settings: FanSettings) -> None:
        self._settings = settings
        file = checked_weights(settings.weights, name=_NETWORK_FILE, sha256=settings.weights_sha256)
        self._network = load_network(file, device=settings.device)
        self._package = _face_alignment("utils")
        embedded = settings.face_detector == "embedded"
        self._find_boxes = embedded_face_detector(settings) if embedded else library_face_detector(settings)

    def find(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """Every face of each photograph, RGB uint8 ``(H, W, 3)``."""
        return self._place(images, found=[self._find_boxes(image, False) for image in images])

    def fit(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """The face of each face crop, RGB uint8 ``(H, W, 3)``: the one that is large and near the centre, or none."""
        return self._place(images, found=[self._find_boxes(image, True) for image in images])

    def _place(self, images: Sequence[np.ndarray], *, found: list[tuple[np.ndarray, np.ndarray]]) -> list[Faces]:
        """The landmarks of all boxes of all images, in batches that ignore where an image ends."""
        crops = [self._crop(image, box) for image, (boxes, _) in zip(images, found, strict=True) for box in boxes]
        size = self._settings.batch_size
        batches = [self._heatmap_points(crops[start : start + size]) for start in range(0, len(crops), size)]
        landmarks_NP2 = np.concatenate([np.zeros((0, 68, 2), np.float32), *batches])
        ends = np.cumsum([0, *(len(boxes) for boxes, _ in found)])
        return [
            Faces.largest_first(boxes, scores=scores, landmarks=landmarks_NP2[start:end])
            for (boxes, scores), start, end in zip(found, ends[:-1], ends[1:], strict=True)
        ]

    def _crop(self, image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """The square (256, 256, 3) that the network sees, its centre (2,) and its side in units of 200 px."""
        box = box.astype(np.float64)  # the package puts the centre in a tensor, which takes no float32 scalar
        width, height = box[2:] - box[:2]
        centre = np.array([box[0] + width / 2, box[1] + height * (0.5 - self._package.CENTER_Y_OFFSET)])
        scale = float(width + height) / self._package.REFERENCE_SCALE
        return self._package.crop(image, centre, scale), centre, scale

    @torch.inference_mode()
    def _heatmap_points(self, crops: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
        """Landmarks of one batch of crops, float32 (N, 68, 2), in pixels of their images."""
        pixels = torch.from_numpy(np.stack([crop for crop, _, _ in crops])).to(self._settings.device)
        heatmaps = self._network(pixels.permute(0, 3, 1, 2).float() / 255)[-1].float().cpu().numpy()
        points_NP2, _, _ = self._package.get_preds_fromhm(heatmaps)
        centres = np.stack([centre for _, centre, _ in crops])[:, None]
        sides = np.array([scale * self._package.SCALE_FACTOR for _, _, scale in crops])[:, None, None]
        # The package's own way back to the image rounds to whole pixels, which small faces cannot afford.
        return (centres + (points_NP2 / self._package.HEATMAP_RESOLUTION - 0.5) * sides).astype(np.float32)
