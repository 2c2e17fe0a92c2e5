"""Aligned faces in, 40 calibrated probabilities out. Owns the device, the number format and the memory layout."""

import numpy as np
import torch
from torch import Tensor

from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.calibration import calibrate
from mgmtn.checkpoint import Checkpoint
from mgmtn.errors import ConfigError


class Labeller:
    """A loaded model.

    Args:
        checkpoint: an attribute network's.
        device: "cpu", "cuda" or "cuda:1"; None takes a GPU when there is one.
        batch_size: faces in one forward pass; bounds memory, does not change answers.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, batch_size: int = 64) -> None:
        self.card = checkpoint.card
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        # On a CPU channels-last halves the time of depthwise convolutions; on a GPU tensor cores ask for it.
        self.network = checkpoint.network().to(self.device).to(memory_format=torch.channels_last)
        self.thresholds = np.array([self.card.thresholds.get(name, 0.5) for name in ATTRIBUTES], dtype=np.float32)

    @property
    def image_size(self) -> int:
        """Side of the square that faces must have, pixels."""
        return self.network.settings.image_size

    def __call__(self, faces: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Label faces.

        Args:
            faces: aligned RGB faces, uint8, shape `(N, S, S, 3)`, S = `image_size`; N may be 0.
            masks: group masks, bool, shape `(N, 8, M, M)`: in place of AML's, and required by a model that was
                trained on landmark masks.

        Returns:
            float32, shape `(N, 40)`: calibrated probabilities in the order of `ATTRIBUTES`.

        Raises:
            ConfigError: the faces have another size or type, or masks are missing or of another shape.
        """
        logits = self.logits(faces, masks)
        return calibrate(logits, self.card.calibration)

    @torch.inference_mode()
    def logits(self, faces: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Uncalibrated logits, float32, shape `(N, 40)`; arguments as for a call."""
        size = self.image_size
        if faces.shape[1:] != (size, size, 3) or faces.dtype != np.uint8:
            raise ConfigError(f"faces: expected uint8 of shape (N, {size}, {size}, 3), got {faces.dtype} {faces.shape}")
        if masks is not None and (masks.ndim != 4 or masks.shape[:2] != (len(faces), len(GROUPS))):
            raise ConfigError(f"masks: expected shape ({len(faces)}, {len(GROUPS)}, M, M), got {masks.shape}")
        out = np.empty((len(faces), len(ATTRIBUTES)), np.float32)
        for start in range(0, len(faces), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = None if masks is None else self._to_device(masks[part]).float()
            images = self._to_device(faces[part]).permute(0, 3, 1, 2)
            out[part] = self._answer(images, given).float().cpu().numpy()
        return out

    def _answer(self, images_B3SS: Tensor, masks_BGMM: Tensor | None) -> Tensor:
        logits_BA: Tensor = self.network(images_B3SS, masks_BGMM)
        if not self.card.average_flip:
            return logits_BA
        mirrored = None if masks_BGMM is None else masks_BGMM.flip(3)
        return (logits_BA + self.network(images_B3SS.flip(3), mirrored)) / 2

    def _to_device(self, array: np.ndarray) -> Tensor:
        # A copy: arrays that arrive from Ray's object store are read-only.
        return torch.from_numpy(np.array(array)).to(self.device)

    def label_bits(self, probabilities: np.ndarray) -> np.ndarray:
        """Bit k set where attribute k reaches the model's threshold: uint64, shape `(N,)`."""
        powers = np.left_shift(np.uint64(1), np.arange(len(ATTRIBUTES), dtype=np.uint64))
        return ((probabilities >= self.thresholds) * powers).sum(axis=1, dtype=np.uint64)
