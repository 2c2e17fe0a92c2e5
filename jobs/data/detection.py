"""Settings that choose a landmark detector, shared by the programs that look for faces."""

from typing import Literal

from pydantic import BaseModel, Field

from jobs.data.object_store import is_s3, local_copy
from mgmtn.errors import ConfigError, FetchError
from mgmtn.landmarks import DetectorSettings, FanSettings, MediaPipeSettings


def on_this_machine(settings: DetectorSettings) -> DetectorSettings:
    """A detector's settings with weights of S3 copied to this machine's cache: each node of a cluster has its own.

    Raises:
        ConfigError: there are none, or they are others than the settings say.
    """
    if not isinstance(settings, FanSettings):
        return settings
    copies = {}
    try:
        if settings.weights is not None and is_s3(settings.weights):
            copies["weights"] = str(local_copy(settings.weights, sha256=settings.weights_sha256))
        if settings.face_detector_weights is not None and is_s3(settings.face_detector_weights):
            copies["face_detector_weights"] = str(local_copy(settings.face_detector_weights))
    except FetchError as error:
        raise ConfigError(f"fan: weights cannot be had: {error}") from error
    return settings.model_copy(update=copies)


class DetectionSettings(BaseModel):
    """Mixed into a program's settings."""

    detector: Literal["mediapipe", "fan"] = Field(
        "mediapipe", description="landmark detector: the embedded one, or face-alignment's FAN, whose weights you give"
    )
    mediapipe: MediaPipeSettings = Field(default_factory=MediaPipeSettings)
    fan: FanSettings = Field(default_factory=FanSettings)

    def chosen_detector(self) -> DetectorSettings:
        """The settings of the chosen detector, which may name weights in S3."""
        return self.mediapipe if self.detector == "mediapipe" else self.fan

    def detector_settings(self) -> DetectorSettings:
        """The settings of the chosen detector, with weights of S3 copied to this machine's cache."""
        return on_this_machine(self.chosen_detector())
