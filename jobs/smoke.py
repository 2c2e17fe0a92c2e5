"""Check that this installation works: `mgmtn smoke`, as the container image does when it is built.

Every model that ships is read, its weights held against the sha256 in its card, and asked about one photograph (of
scikit-image, installed anyway), in which the embedded detector must find a face that smiles. Ray is imported but not
started.
"""

import importlib.util
import logging
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import ray
import torch
from pydantic import Field

from jobs.outcomes import Refused
from jobs.settings import Settings, run_program
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Checkpoint, shipped_models
from mgmtn.errors import ConfigError
from mgmtn.images import ImageLimits, align_face, decode_image
from mgmtn.labeller import Labeller
from mgmtn.landmarks import MediaPipeSettings
from mgmtn.network import NetworkSettings

log = logging.getLogger(__name__)

PHOTOGRAPH: Final = ("skimage", "data/astronaut.png")  # Eileen Collins, smiling; NASA


class SmokeSettings(Settings):
    """Settings of `mgmtn smoke`."""

    device: Literal["cpu", "cuda"] | None = Field(
        None, description="where the models must run; unset: on a GPU if there is one"
    )


class SmokeFound(Refused):
    """The installation runs, and answers nonsense."""

    exit_code = 1


def run(settings: SmokeSettings) -> dict[str, Any]:
    """Ask every model about the photograph.

    Raises:
        CheckpointError: weights are damaged or not those of their card.
        ConfigError: there is no GPU where one is asked for.
        SmokeFound: no face is found, or a model denies the smile.
    """
    started = time.monotonic()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device 'cuda': PyTorch sees no GPU here")
    image = read_photograph()
    [faces] = MediaPipeSettings().build().find([image])
    if len(faces.boxes) != 1:
        raise SmokeFound(f"{len(faces.boxes)} faces found in a portrait, {PHOTOGRAPH[1]}")
    smiles = {name: smile(name, image, faces.landmarks[0], device=settings.device) for name in shipped_models()}
    summary = {
        "mgmtn": version("mgmtn"),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "device": settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "smiling": smiles,
        "seconds": round(time.monotonic() - started, 2),
    }
    wrong = [name for name, probability in smiles.items() if probability is not None and not probability >= 0.5]
    if wrong:
        raise SmokeFound(f"{', '.join(wrong)}: no smile in {PHOTOGRAPH[1]}: {smiles}", summary=summary)
    return summary


def read_photograph() -> np.ndarray:
    """The portrait, RGB uint8 `(512, 512, 3)`."""
    spec = importlib.util.find_spec(PHOTOGRAPH[0])
    if spec is None or spec.origin is None:
        raise ConfigError(f"the photograph comes with {PHOTOGRAPH[0]}, which is not installed")
    return decode_image((Path(spec.origin).parent / PHOTOGRAPH[1]).read_bytes(), limits=ImageLimits())


def smile(model: str, image: np.ndarray, landmarks: np.ndarray, *, device: str | None) -> float | None:
    """A model's probability of `smiling`, rounded; of a face whose landmarks have shape `(68, 2)`.

    A model that needs drawn masks, or predicts none of the attributes, is read and checked only: None.
    """
    checkpoint = Checkpoint.load(model)
    network = checkpoint.card.network
    if not isinstance(network, NetworkSettings) or network.masks == "landmarks":
        return None
    labeller = Labeller(checkpoint, device=device)
    probabilities = labeller(align_face(image, landmarks, size=labeller.image_size)[None])
    log.info("event=asked model_id=%s device=%s", checkpoint.card.model_id, labeller.device)
    return round(float(probabilities[0, ATTRIBUTES.index("smiling")]), 3)


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(SmokeSettings, run, argv, prog="mgmtn smoke", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
