"""Everything that mgmtn raises on purpose, split by what the caller should do.

```
MgmtnError
|- ConfigError          the run is wrong: stop before any work starts
|- CheckpointError      the weights are wrong: stop before any work starts
`- ImageError           one image is wrong: keep going, record `status` and the message
   |- FetchError        its bytes could not be read
   |- UnsupportedImage  its bytes are of no image format that we read
   |- DecodeError       its bytes are of a known format, but damaged
   |- ImageTooLarge     it passes a limit on bytes or pixels, checked before decoding
   `- ImageTooSmall     its shorter side is below the limit
```
"""


class MgmtnError(Exception):
    """Root of the tree."""


class ConfigError(MgmtnError):
    """The settings, or what they point to, cannot work."""


class CheckpointError(MgmtnError):
    """A checkpoint is missing, damaged, or made for something else."""


class ImageError(MgmtnError):
    """One image cannot be labelled; `status` is the outcome to record in its row."""

    status: str


class FetchError(ImageError):
    status = "fetch_error"


class UnsupportedImage(ImageError):
    status = "unsupported"


class DecodeError(ImageError):
    status = "decode_error"


class ImageTooLarge(ImageError):
    status = "too_large"


class ImageTooSmall(ImageError):
    status = "too_small"
