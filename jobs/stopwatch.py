"""Where a training step's time goes: its parts one after the other, and the all-reduce that runs beside one of them."""

import math
import threading
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


class Stopwatch:
    """Seconds of each part of a loop, added up.

    On a GPU the parts are measured by events in its stream, since the host runs ahead of it; what the GPU waited for
    the host counts to the part that made it wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: Counter[str] = Counter()
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        """What passed since the last lap was this part."""
        self._marks.append((part, self._now()))

    def settle(self) -> None:
        """Add up the laps. On a GPU: call it where the host has waited for the GPU anyway."""
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[part] += before.elapsed_time(after) / 1000 if self._on_gpu else after - before
        del self._marks[:-1]

    def restart(self) -> None:
        """Forget what was added up, and what passed since the last lap."""
        self.seconds.clear()
        self._marks = [("", self._now())]


class AllReduceClock:
    """Seconds in which a bucket of gradients is on its way between workers, waiting for the slowest included.

    Much of it runs beside the backward pass, so it is no part of a step's time of its own. On GPUs, whose all-reduce
    the host does not see end, it is not measured, and not a number.
    """

    def __init__(self, model: nn.Module) -> None:
        self._is_measured = next(model.parameters()).device.type == "cpu"
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self.restart()
        if self._is_measured and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, _timed_all_reduce)

    def restart(self) -> None:
        self.seconds = 0.0 if self._is_measured else math.nan

    def start(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1

    def stop(self) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self.seconds += time.perf_counter() - self._since


def _timed_all_reduce(clock: AllReduceClock, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    def ended(future: torch.futures.Future[Tensor]) -> Tensor:
        clock.stop()
        return future.value()

    clock.start()
    assert dist.group.WORLD is not None  # DDP has a group
    return allreduce_hook(dist.group.WORLD, bucket).then(ended)
