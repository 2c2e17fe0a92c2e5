import hashlib
from pathlib import Path

import boto3
import pytest

from jobs.data.detection import DetectionSettings
from mgmtn.errors import ConfigError
from mgmtn.landmarks import FanSettings, MediaPipeSettings


def test_the_embedded_detector_is_the_default():
    assert DetectionSettings().detector_settings() == MediaPipeSettings()


def test_the_chosen_detector_keeps_its_settings(tmp_path):
    fan = FanSettings(weights=str(tmp_path / "fan.pt"))
    assert DetectionSettings(fan=fan).detector_settings().kind == "mediapipe"
    assert DetectionSettings(detector="fan", fan=fan).detector_settings() == fan


def test_an_unknown_detector_is_refused():
    with pytest.raises(ValueError, match="'mediapipe' or 'fan'"):
        DetectionSettings(detector="dlib")


@pytest.mark.integration
def test_weights_in_s3_are_copied_and_checked(bucket):
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="fan.pt", Body=b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    given = FanSettings(weights=f"{bucket}/fan.pt", weights_sha256=sha256)
    copied = DetectionSettings(detector="fan", fan=given).detector_settings()
    assert isinstance(copied, FanSettings)
    assert isinstance(copied.weights, str)
    assert Path(copied.weights).read_bytes() == b"weights"

    other = given.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(ConfigError, match=r"fan\.pt.*SHA-256 0000"):
        DetectionSettings(detector="fan", fan=other).detector_settings()
