"""Label faces with 40 attributes: detect and align faces, predict group masks and attributes.

```python
checkpoint = Checkpoint.load(DEFAULT_MODEL)
labeller = Labeller(checkpoint)
image = decode_image(Path("photo.jpg").read_bytes(), limits=ImageLimits())
[faces] = MediaPipeSettings().build().find([image])
crops = [align_face(image, landmarks, size=labeller.image_size) for landmarks in faces.landmarks]
probabilities = labeller(np.stack(crops))  # one row per face, one column per name of ATTRIBUTES
```

A name is imported when it is first asked for: torch takes seconds, and the attributes' names do not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgmtn.attributes import ATTRIBUTES, GROUP_ATTRIBUTES, GROUPS, attribute_name
    from mgmtn.checkpoint import DEFAULT_MODEL, Calibration, Card, Checkpoint, shipped_models
    from mgmtn.drawing import contact_sheet, draw_faces, overlay_masks
    from mgmtn.errors import (
        CheckpointError,
        ConfigError,
        DecodeError,
        FetchError,
        ImageError,
        ImageTooLarge,
        ImageTooSmall,
        MgmtnError,
        UnsupportedImage,
    )
    from mgmtn.images import ImageLimits, align_face, decode_image
    from mgmtn.labeller import Labeller
    from mgmtn.landmarks import DetectorSettings, Faces, FanSettings, LandmarkDetector, MediaPipeSettings
    from mgmtn.mask_net import MaskNet, MaskNetSettings
    from mgmtn.masks import draw_masks
    from mgmtn.network import MGMTN, NetworkSettings

__all__ = [
    "ATTRIBUTES",
    "DEFAULT_MODEL",
    "GROUPS",
    "GROUP_ATTRIBUTES",
    "MGMTN",
    "Calibration",
    "Card",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DecodeError",
    "DetectorSettings",
    "Faces",
    "FanSettings",
    "FetchError",
    "ImageError",
    "ImageLimits",
    "ImageTooLarge",
    "ImageTooSmall",
    "Labeller",
    "LandmarkDetector",
    "MaskNet",
    "MaskNetSettings",
    "MediaPipeSettings",
    "MgmtnError",
    "NetworkSettings",
    "UnsupportedImage",
    "align_face",
    "attribute_name",
    "contact_sheet",
    "decode_image",
    "draw_faces",
    "draw_masks",
    "overlay_masks",
    "shipped_models",
]

# The file that each name comes from, as above.
_NAMES_OF = {
    "attributes": ("ATTRIBUTES", "GROUP_ATTRIBUTES", "GROUPS", "attribute_name"),
    "checkpoint": ("DEFAULT_MODEL", "Calibration", "Card", "Checkpoint", "shipped_models"),
    "drawing": ("contact_sheet", "draw_faces", "overlay_masks"),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DecodeError",
        "FetchError",
        "ImageError",
        "ImageTooLarge",
        "ImageTooSmall",
        "MgmtnError",
        "UnsupportedImage",
    ),
    "images": ("ImageLimits", "align_face", "decode_image"),
    "labeller": ("Labeller",),
    "landmarks": ("DetectorSettings", "Faces", "FanSettings", "LandmarkDetector", "MediaPipeSettings"),
    "mask_net": ("MaskNet", "MaskNetSettings"),
    "masks": ("draw_masks",),
    "network": ("MGMTN", "NetworkSettings"),
}
_FILE_OF = {name: file for file, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'mgmtn' has no attribute {name!r}")
    value = getattr(import_module(f"mgmtn.{_FILE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
