"""The true architecture with random weights: what is checked is the path to the points, not where they lie."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from skimage.data import astronaut

from mgmtn.errors import ConfigError
from mgmtn.landmarks import FanSettings, MediaPipeSettings

NAME = "2DFAN4-11f355bf06.pth.tar"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from face_alignment.models import FAN

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fan") / "random-fan4.pth.tar"
    torch.save(FAN(4).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return FanSettings(weights=str(weights), batch_size=2).build()


@pytest.fixture(scope="module")
def found(detector):
    return detector.find([astronaut()])[0]


def test_a_face_gets_68_points_and_the_embedded_detectors_box(found):
    embedded = MediaPipeSettings().build().find([astronaut()])[0]
    assert (len(found), found.landmarks.shape, found.landmarks.dtype) == (1, (1, 68, 2), np.float32)
    np.testing.assert_array_equal(found.boxes, embedded.boxes)
    np.testing.assert_array_equal(found.scores, embedded.scores)


def test_the_points_are_those_of_the_package_without_its_rounding(found, weights, monkeypatch, tmp_path):
    from face_alignment import FaceAlignment, LandmarksType

    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / NAME).symlink_to(weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    package = FaceAlignment(LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False, face_detector="folder")
    points = package.get_landmarks_from_image(astronaut(), detected_faces=list(found.boxes.astype(float)))
    np.testing.assert_array_equal(np.trunc(found.landmarks[0]), points[0])


def test_faces_of_several_images_share_batches_and_keep_their_place(detector, found):
    blank = np.full((120, 160, 3), 127, np.uint8)
    mirrored = np.ascontiguousarray(astronaut()[:, ::-1])
    images = [blank, astronaut(), blank, mirrored, astronaut()]
    faces = detector.find(images)
    assert [len(each) for each in faces] == [0, 1, 0, 1, 1]
    for index in (1, 4):
        np.testing.assert_allclose(faces[index].landmarks, found.landmarks, atol=1e-3)
    alone = detector.find([mirrored])[0]
    np.testing.assert_allclose(faces[3].landmarks, alone.landmarks, atol=1e-3)


def test_a_crop_gets_one_face_and_a_picture_without_one_none(detector):
    crop, blank = astronaut()[:250, 100:350], np.full((120, 160, 3), 127, np.uint8)
    faces = detector.fit([np.ascontiguousarray(crop), blank])
    assert [len(each) for each in faces] == [1, 0]
    assert faces[1].landmarks.shape == (0, 68, 2)


def test_no_images_give_no_faces(detector):
    assert detector.find([]) == []
    assert detector.fit([]) == []


def test_absent_weights_are_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=rf"no weights at .*absent.pth: download {NAME} \(https://.*\), then set"):
        FanSettings(weights=str(tmp_path / "absent.pth")).build()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no weights at {tmp_path}/hub/checkpoints/{NAME}"):
        FanSettings().build()
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_refused_with_both(weights):
    true = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"sha256 {true}, expected {'0' * 64}"):
        FanSettings(weights=str(weights), weights_sha256="0" * 64).build()


def test_a_file_with_the_stated_hash_is_taken(weights):
    true = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert FanSettings(weights=str(weights), weights_sha256=true).build()


def test_the_hash_in_a_files_name_counts(weights, tmp_path):
    (tmp_path / NAME).symlink_to(weights)
    with pytest.raises(ConfigError, match="expected 11f355bf06"):
        FanSettings(weights=str(tmp_path / NAME)).build()


def test_the_weights_of_another_network_are_refused(tmp_path):
    from face_alignment.models import FAN

    torch.save(FAN(1).state_dict(), tmp_path / "fan1.pth")
    with pytest.raises(ConfigError, match=r"does not hold the weights of 2D-FAN-4: .*Missing key"):
        FanSettings(weights=str(tmp_path / "fan1.pth")).build()


class _Harmful:
    def __reduce__(self):
        return (Path("harmed").touch, ())


def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": _Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ConfigError, match="does not hold the weights"):
        FanSettings(weights=str(tmp_path / "harmful.pth")).build()
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"not weights"], ids=["empty", "text"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(ConfigError, match="does not hold the weights"):
        FanSettings(weights=str(tmp_path / "other.pth")).build()


def test_a_face_detector_without_its_weights_is_an_error(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no weights at .*s3fd-619a316812.pth"):
        FanSettings(weights=str(weights), face_detector="sfd").build()


@pytest.fixture
def s3fd_weights(tmp_path):
    """A file of the true S3FD, whose answer is one face of 512 px around the centre of any picture of 128 px."""
    from face_alignment.detection.sfd.net_s3fd import s3fd

    state = {name: torch.zeros_like(value) for name, value in s3fd().state_dict().items()}
    for name, value in state.items():
        if name.endswith("mbox_conf.bias"):  # the last output is the face's, the others the background's
            sign = 1 if name.startswith("conv7_2") else -1
            value[:], value[-1] = -10 * sign, 10 * sign
    torch.save(state, tmp_path / "s3fd.pth")
    return tmp_path / "s3fd.pth"


@pytest.mark.parametrize("method", ["find", "fit"])
def test_the_packages_own_face_detector_can_find_the_boxes(method, weights, s3fd_weights):
    detector = FanSettings(weights=str(weights), face_detector="sfd", face_detector_weights=str(s3fd_weights)).build()
    faces = getattr(detector, method)([astronaut()[:128, 160:288].copy()])[0]
    np.testing.assert_allclose(faces.boxes, [[0, 0, 128, 128]], atol=1e-3)
    np.testing.assert_allclose(faces.scores, [1.0], atol=1e-3)
    assert faces.landmarks.shape == (1, 68, 2)


def test_another_networks_file_is_no_face_detector(weights):
    settings = FanSettings(weights=str(weights), face_detector="sfd", face_detector_weights=str(weights))
    with pytest.raises(ConfigError, match="cannot be loaded as sfd"):
        settings.build()


def test_a_device_that_is_absent_is_an_error(weights):
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
        FanSettings(weights=str(weights), device="cuda:99").build()


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="wieghts"):
        FanSettings(wieghts="a.pth")
