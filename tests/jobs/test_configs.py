"""The paper's configuration builds networks of the paper's size; that every config loads is seen in test_house.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.settings import load
from jobs.train import TrainAttributesSettings, TrainMasksSettings
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.mask_net import MaskNet
from mgmtn.network import MGMTN

CONFIGS = Path(__file__).parents[2] / "jobs/configs"


def paper() -> tuple[TrainMasksSettings, TrainAttributesSettings]:
    masks, attributes = ([f"--config={CONFIGS}/{what}-paper.toml"] for what in ("masks", "attributes"))
    return (
        load(TrainMasksSettings, masks, prog="mgmtn train masks"),
        load(TrainAttributesSettings, attributes, prog="mgmtn train attributes"),
    )


def test_the_papers_two_trainings_fit_together():
    masks, attributes = paper()
    assert attributes.mask_model == f"{masks.output}/checkpoint"
    assert attributes.data == masks.data
    network = attributes.network
    assert (network.backbone, network.image_size, network.levels) == ("resnest50d", 227, (3, 4, 5))
    assert network.masks == "learned"


@pytest.mark.integration  # for its seconds and its gigabyte
@torch.inference_mode()
def test_the_papers_network_answers_a_batch_at_full_size():
    masks, attributes = paper()
    module = MGMTN(attributes.network.model_copy(update={"mask_net": masks.network})).eval()
    faces = np.random.default_rng(0).integers(0, 256, (2, 3, 227, 227), dtype=np.uint8)
    with FlopCounterMode(display=False) as counter:
        logits = module(torch.from_numpy(faces))
    assert logits.shape == (2, len(ATTRIBUTES))
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    # The plan in the header of attributes-paper.toml is made with this figure.
    assert counter.get_total_flops() / 2 / len(faces) == pytest.approx(8.6e9, rel=0.01)


@pytest.mark.integration
@torch.inference_mode()
def test_the_papers_mask_network_answers_a_batch_at_full_size():
    masks, _ = paper()
    module = MaskNet(masks.network).eval()
    with FlopCounterMode(display=False) as counter:
        logits = module(torch.full((1, 3, 227, 227), 90, dtype=torch.uint8))
    assert logits.shape == (1, len(GROUPS), 224, 224)
    assert torch.isfinite(logits).all()
    assert counter.get_total_flops() / 2 == pytest.approx(2.61e9, rel=0.01)
