"""What a training run is, at any step: all that it needs to go on there as if it had never stopped."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mgmtn.errors import ConfigError

STATE_FILE, PROGRESS_FILE = "state.pt", "progress.json"
WEIGHTS_FILE, RESULTS_FILE = "best.safetensors", "validation.safetensors"
_FORMAT = 4  # of the files; 3 did not say how it is trained, 2 nor what, 1 had neither steps nor a best epoch


@dataclass(frozen=True)
class Best:
    """The best epoch so far: the averaged weights in its end and their results on the validation samples."""

    epoch: int
    weights: dict[str, Tensor]
    results: Tensor


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        samples: training samples in all; a run cannot go on with others.
        trained: what is trained, and how; nor can it go on as another.
        epoch: the epoch under way.
        seen: samples of it that the weights have learned from.
        loss_sum: of its steps.
        epochs: figures of each finished epoch.
        steps: losses every few steps.
        best: None before the end of the first epoch.
    """

    samples: int
    trained: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    seen: int = 0
    loss_sum: float = 0.0
    epochs: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    best: Best | None = None

    def end_epoch(self, figures: dict[str, float], *, weights: dict[str, Tensor], results: Tensor) -> None:
        """Go to the start of the next epoch; keep the weights if they are the best."""
        self.epochs.append(figures)
        if self.best is None or figures["score"] > self.epochs[self.best.epoch]["score"]:
            self.best = Best(self.epoch, {name: value.cpu().clone() for name, value in weights.items()}, results)
        self.epoch, self.seen, self.loss_sum = self.epoch + 1, 0, 0.0

    def check(self, *, samples: int, trained: dict[str, Any]) -> None:
        """Make sure that a run may go on from here.

        Args:
            samples: training samples that there are now.
            trained: what is to be trained now, as JSON has it.

        Raises:
            ConfigError: it began with others.
        """
        if self.samples != samples:
            raise ConfigError(
                f"output: holds a run on {self.samples} training samples, and there are {samples} now; "
                "use a new folder (init starts from another run's weights)"
            )
        before, now = _flat(self.trained), _flat(trained)
        for name in sorted(before.keys() | now.keys()):
            if (was := before.get(name)) != (wanted := now.get(name)):
                raise ConfigError(
                    f"output: holds the state of a run with other settings: {name} was {was!r} there, "
                    f"and is {wanted!r} now; use a new folder"
                )

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` epochs in a row, unless it is 0, brought no better score."""
        return bool(patience) and self.best is not None and self.epoch - 1 - self.best.epoch >= patience

    def save(self, folder: Path) -> None:
        """Write what a person may read as JSON, and the best epoch beside it."""
        kept = {
            name: getattr(self, name) for name in ("samples", "trained", "epoch", "seen", "loss_sum", "epochs", "steps")
        }
        best_epoch = None if self.best is None else self.best.epoch
        (folder / PROGRESS_FILE).write_text(json.dumps({"format": _FORMAT, "best_epoch": best_epoch, **kept}))
        if self.best is not None:
            weights = {name: value.contiguous() for name, value in self.best.weights.items()}
            safetensors.torch.save_file(weights, folder / WEIGHTS_FILE)
            safetensors.torch.save_file({"results": self.best.results.contiguous()}, folder / RESULTS_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The inverse of `save`.

        Raises:
            ConfigError: the folder's files are of another version of this program.
        """
        read: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
        if read.pop("format", 1) != _FORMAT:
            raise ConfigError(
                "output: holds the state of an earlier version's run, which cannot go on; use a new folder"
            )
        best_epoch = read.pop("best_epoch")
        if best_epoch is None:
            return cls(**read)
        weights = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        results = safetensors.torch.load_file(folder / RESULTS_FILE)["results"]
        return cls(**read, best=Best(best_epoch, weights, results))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole names: `network.fusion`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def save_tensors(folder: Path, *, module: nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, their average and the optimiser's state."""
    state = {
        "module": module.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, folder / STATE_FILE)


def load_tensors(
    folder: Path,
    *,
    module: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    """The inverse of `save_tensors`, in place and on the devices where they are.

    Raises:
        ConfigError: they are another network's.
    """
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    try:
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        # The rates are those of the present settings; what is taken up are the moments of the gradients.
        saved, groups = state["optimizer"], optimizer.state_dict()["param_groups"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("other parameters are frozen")
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (RuntimeError, ValueError) as error:  # torch's answers to missing or misshapen tensors
        raise ConfigError(f"output: holds the state of a run with other settings of the network: {error}") from error
