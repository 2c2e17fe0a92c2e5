"""How the weights move in training: rates, their schedule, the moving average, and what does not move at all."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class OptimisationSettings(BaseModel):
    """How the weights move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(12, ge=1, description="passes over the training data")
    patience: int = Field(
        0, ge=0, description="stop after so many epochs without a better score on the validation cut; 0: never"
    )
    batch_size: int = Field(64, ge=1, description="faces per step over all workers")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a worker's share of a step is computed, one after the other, to save memory",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak of the cosine schedule")
    trunk_rate: float = Field(0.5, ge=0, description="the pretrained trunk's learning rate, as a share of the others'")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises to its peak")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's, on matrices and kernels only")
    gradient_norm: float = Field(5.0, gt=0, description="gradients are scaled down to this norm")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the forward pass; auto: bf16 on GPUs, fp32 on CPUs; bf16 is fast on some CPUs, too"
    )
    freeze_norm: bool = Field(
        False, description="batch norms use the statistics they started with: right for few faces per worker"
    )
    ema: float = Field(
        0.98, ge=0, lt=1, description="decay of the averaged weights, the ones that are kept; nearer to 1 in long runs"
    )
    seed: int = Field(0, ge=0, description="of initial weights, order and augmentation")


def parameter_groups(module: nn.Module, opt: OptimisationSettings) -> list[dict[str, Any]]:
    """Trunk and the rest at their own rates; vectors (norms, biases) without weight decay."""
    groups: list[dict[str, Any]] = []
    for in_trunk in (True, False):
        for is_matrix in (True, False):
            parameters = [
                parameter
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
                and name.startswith("trunk.") == in_trunk
                and (parameter.ndim > 1) == is_matrix
            ]
            rate = opt.learning_rate * (opt.trunk_rate if in_trunk else 1.0)
            group = {"params": parameters, "lr": rate, "initial_lr": rate}
            groups += [group if is_matrix else group | {"weight_decay": 0.0}] if parameters else []
    return groups


def rate_at(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: a linear rise, then a half cosine to zero."""
    rising = max(1, int(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """The weights' moving average, buffers included."""
    return AveragedModel(module, multi_avg_fn=moving_average(decay), use_buffers=True)


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential moving average for `AveragedModel` that forgets the first weights soon: its decay rises from 0.1
    to `decay` as (1 + steps) / (10 + steps), as TensorFlow's ExponentialMovingAverage has it."""

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], steps: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)

    return update


def freeze_unreached(module: nn.Module, loss: Tensor) -> None:
    """Freeze the parameters that a loss does not reach: some trunks carry a tail that gives no features, and
    distributed training waits for the gradient of every parameter that is not frozen."""
    loss.backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def to_training(module: nn.Module, *, freeze_norm: bool) -> None:
    """Switch to training; batch norms stay as they are where they are to use their first statistics."""
    module.train()
    if freeze_norm:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
