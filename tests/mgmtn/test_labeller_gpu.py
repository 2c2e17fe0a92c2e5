import numpy as np
import pytest
import torch

from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.labeller import Labeller
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_answers_as_the_cpu_does() -> None:
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    checkpoint = Checkpoint.of(MGMTN(network), Card(name="random", kind="attributes", network=network))
    faces = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    on_cpu, on_gpu = Labeller(checkpoint, device="cpu")(faces), Labeller(checkpoint, device="cuda")(faces)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)  # TF32 rounds convolutions
