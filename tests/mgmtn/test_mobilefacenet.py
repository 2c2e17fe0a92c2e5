"""MobileFaceNet as a trunk, against the network that its public weights were published with."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from torch import nn

from mgmtn.mobilefacenet import MobileFaceNet, fill
from mgmtn.network import MGMTN, NetworkSettings

WEIGHTS = (Path(__file__).parents[2] / ".." / "shared" / "weights").resolve()


@pytest.fixture(scope="module")
def state():
    path = WEIGHTS / "mobilefacenet_foamliu.pt"
    if not path.is_file():
        pytest.skip("MobileFaceNet's public weights, ../shared/weights, are not on this machine")
    return torch.load(path, map_location="cpu", weights_only=True)


@torch.inference_mode()
def test_with_the_public_weights_it_embeds_faces_as_the_published_network_does(state):
    trunk = MobileFaceNet()
    fill(trunk, state)
    gdconv = nn.Sequential(nn.Conv2d(512, 512, 7, groups=512, bias=False), nn.BatchNorm2d(512))
    embedding = nn.Sequential(nn.Conv2d(512, 128, 1), nn.Flatten(), nn.BatchNorm1d(128))
    parts = {"gdconv.depthwise": gdconv[0], "gdconv.bn": gdconv[1], "conv3": embedding[0], "bn": embedding[2]}
    for name, part in parts.items():
        part.load_state_dict({key: state[f"{name}.{key}"] for key in part.state_dict()})
    net = nn.Sequential(trunk, gdconv, embedding).eval()
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    published = cv2.dnn.readNetFromONNX(str(WEIGHTS / "mobilefacenet_foamliu.onnx"))
    published.setInput(image.numpy())
    expected = published.forward()
    ours = net(image).numpy()
    assert ours.shape == (1, 128)
    # Its last layer may be followed by a normalisation: embeddings are compared by direction.
    np.testing.assert_allclose(ours / np.linalg.norm(ours), expected / np.linalg.norm(expected), atol=1e-4, rtol=0)


def test_timm_knows_it_and_its_features_have_the_strides_that_it_states():
    net = timm.create_model("mobilefacenet", pretrained=False, num_classes=0, global_pool="")
    assert [info["reduction"] for info in net.feature_info] == [2, 4, 8, 16]
    last, maps = net.forward_intermediates(torch.zeros(1, 3, 64, 64), indices=[0, 1, 2, 3])
    for info, features in zip(net.feature_info, maps, strict=True):
        assert features.shape == (1, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
    assert last.shape == (1, 512, 4, 4)


def test_pretrained_weights_are_not_pretended():
    with pytest.raises(RuntimeError, match="no weights on timm's hub"):
        timm.create_model("mobilefacenet", pretrained=True)


def test_weights_without_the_embedding_are_enough():
    source, trunk = MobileFaceNet(), MobileFaceNet()
    fill(trunk, source.state_dict() | {"conv3.weight": torch.zeros(1)})
    assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in source.state_dict().items())


def test_mgmtn_stands_on_it():
    settings = NetworkSettings(backbone="mobilefacenet", image_size=64, levels=(3, 4), width=16, masks="landmarks")
    logits = MGMTN(settings)(torch.zeros(2, 3, 64, 64), torch.ones(2, 8, 32, 32))
    assert logits.shape == (2, 40)
