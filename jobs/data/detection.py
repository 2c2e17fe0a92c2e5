"""Settings that choose a landmark detector, shared by the programs that look for faces."""

from typing import Literal

from pydantic import BaseModel, Field

from jobs.data.object_store import is_s3, local_copy
from mgmtn.landmarks import DetectorSettings, FanSettings, MediaPipeSettings


class DetectionSettings(BaseModel):
    """Mixed into a program's settings."""

    detector: Literal["mediapipe", "fan"] = Field(
        "mediapipe", description="landmark detector: the embedded one, or face-alignment's FAN, whose weights you give"
    )
    mediapipe: MediaPipeSettings = Field(default_factory=MediaPipeSettings)
    fan: FanSettings = Field(default_factory=FanSettings)

    def detector_settings(self) -> DetectorSettings:
        """The settings of the chosen detector, with weights of S3 copied to this machine's cache."""
        if self.detector == "mediapipe":
            return self.mediapipe
        copies = {}
        if self.fan.weights is not None and is_s3(self.fan.weights):
            copies["weights"] = str(local_copy(self.fan.weights, sha256=self.fan.weights_sha256))
        if self.fan.face_detector_weights is not None and is_s3(self.fan.face_detector_weights):
            copies["face_detector_weights"] = str(local_copy(self.fan.face_detector_weights))
        return self.fan.model_copy(update=copies)
