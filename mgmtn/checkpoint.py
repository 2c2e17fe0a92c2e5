"""A checkpoint: a folder with `model.safetensors` and `card.json`, the model card that people and programs read.

The weights cannot execute code. The card names their sha256, so a damaged or swapped file is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES
from mgmtn.errors import CheckpointError
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"
MODELS = Path(__file__).parent / "weights"  # the models that ship, a folder each
DEFAULT_MODEL = "mgmtn-mobilefacenet-celeba"

M = TypeVar("M", bound=nn.Module)


class Calibration(BaseModel):
    """Platt scaling of one attribute: probability = sigmoid(slope * logit + intercept)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: float = Field(1.0, description="divides the logit's over-confidence when below 1")
    intercept: float = Field(0.0, description="shifts the logit")


class Card(BaseModel):
    """What a checkpoint is. Everything above `training` changes what the model answers, and so its `model_id`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="first part of the model's id")
    kind: Literal["attributes", "masks"]
    network: NetworkSettings | MaskNetSettings
    attributes: tuple[str, ...] = ATTRIBUTES
    groups: dict[str, tuple[str, ...]] = GROUP_ATTRIBUTES
    thresholds: dict[str, float] = Field(default_factory=dict, description="probability from which a label is set")
    calibration: dict[str, Calibration] = Field(default_factory=dict)
    average_flip: bool = Field(False, description="answer with the mean logits of a face and its mirror image")
    weights_sha256: str = ""

    training: dict[str, Any] = Field(default_factory=dict, description="data, commands, settings, licence")
    accuracy: dict[str, Any] = Field(default_factory=dict, description="measured, with the command beside it")
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """The name and twelve hexadecimal digits of what decides the model's answers.

        Defaults do not count, so that a later field, whose default is what went before, leaves every id as it was.
        For the same reason no default of the card, nor of the networks' settings, may ever change.
        """
        about = {"training", "accuracy", "versions"}
        content = json.dumps(self.model_dump(mode="json", exclude=about, exclude_defaults=True), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def thresholds_id(self) -> str:
        content = json.dumps([self.thresholds.get(name, 0.5) for name in ATTRIBUTES])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Checkpoint:
    """A card and the bytes of its weights: small enough to travel to workers whole."""

    card: Card
    weights: bytes

    @classmethod
    def of(cls, module: nn.Module, card: Card, *, half: bool = False) -> Self:
        """Take a network's weights; `half` stores matrices and kernels in 16 bits, vectors stay at 32."""
        tensors = {
            name: value.detach().cpu().contiguous().to(_stored_type(value, half=half))
            for name, value in module.state_dict().items()
        }
        weights = safetensors.torch.save(tensors)
        stamp = {"weights_sha256": hashlib.sha256(weights).hexdigest(), "versions": _versions()}
        return cls(card.model_copy(update=stamp), weights)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint's folder.

        Args:
            path: the folder, or the name of a model that ships.

        Raises:
            CheckpointError: nothing is there, a file is damaged, or the weights are not those that the card names.
        """
        folder = Path(path)
        if not folder.exists() and str(path) in shipped_models():
            folder = MODELS / str(path)
        try:
            card = Card.model_validate_json((folder / CARD_FILE).read_bytes())
            weights = (folder / WEIGHTS_FILE).read_bytes()
        except OSError as error:
            names = ", ".join(shipped_models()) or "none"
            raise CheckpointError(f"no checkpoint at {str(path)!r} ({error}); models that ship: {names}") from error
        except ValidationError as error:
            raise CheckpointError(f"{folder / CARD_FILE} is not a model card: {error}") from error
        return cls(card, weights)._checked(folder)

    def _checked(self, folder: Path) -> Self:
        found = hashlib.sha256(self.weights).hexdigest()
        if found != self.card.weights_sha256:
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE} is damaged or another model's: sha256 {found}, "
                f"the card says {self.card.weights_sha256}"
            )
        # Order counts: channel k of a mask network is group k.
        if tuple(self.card.groups.items()) != tuple(GROUP_ATTRIBUTES.items()):
            raise CheckpointError(f"{folder}: made for another partition into groups: {self.card.groups}")
        if self.card.kind == "attributes" and self.card.attributes != ATTRIBUTES:
            raise CheckpointError(f"{folder}: made for another set of attributes: {', '.join(self.card.attributes)}")
        return self

    def save(self, folder: str | Path) -> Path:
        """Write the folder, the card last: a folder with a card is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        (folder / WEIGHTS_FILE).write_bytes(self.weights)
        (folder / CARD_FILE).write_text(self.card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return folder

    def tensors(self) -> dict[str, Tensor]:
        """The weights in 32 bits.

        Raises:
            CheckpointError: the bytes are not safetensors.
        """
        try:
            tensors = safetensors.torch.load(self.weights)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"the weights of {self.card.name} are not safetensors: {error}") from error
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def network(self) -> MGMTN:
        """Build the attribute network and fill it.

        Raises:
            CheckpointError: this is a mask network's checkpoint, or the weights do not fit the card's settings.
        """
        if not isinstance(self.card.network, NetworkSettings):
            raise CheckpointError(f"{self.card.name} predicts {self.card.kind}, not attributes")
        return _filled(MGMTN(self.card.network), self.tensors(), self.card)

    def mask_net(self) -> MaskNet:
        """Build the mask network and fill it; errors as in `network`."""
        if not isinstance(self.card.network, MaskNetSettings):
            raise CheckpointError(f"{self.card.name} predicts {self.card.kind}, not masks")
        return _filled(MaskNet(self.card.network), self.tensors(), self.card)


def _filled(module: M, tensors: Mapping[str, Tensor], card: Card) -> M:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:  # torch's answer to missing, unknown or misshapen tensors
        raise CheckpointError(f"the weights of {card.name} do not fit its card's network: {error}") from error
    return module.eval()


def _stored_type(value: Tensor, *, half: bool) -> torch.dtype:
    return torch.float16 if half and value.ndim > 1 and value.is_floating_point() else value.dtype


def shipped_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(card.parent.name for card in MODELS.glob(f"*/{CARD_FILE}"))


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("mgmtn", "torch", "timm", "segmentation-models-pytorch")}
