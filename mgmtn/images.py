"""Bytes to pixels, safely, and a face to the model's square.

An image is RGB uint8 `(H, W, 3)` throughout, upright: EXIF orientation is applied on decoding.
"""

import re
import struct
import warnings
import zlib
from io import BytesIO

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from skimage.transform import SimilarityTransform

from mgmtn.errors import DecodeError, ImageTooLarge, ImageTooSmall, UnsupportedImage

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # MPO opens as JPEG and has no entry of its own
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP|GIF8[79]a|BM.{4}\0{4}|II[*+]\0|MM\0[*+]",
    re.DOTALL,
)

# What Pillow's decoders raise on damaged files (found by mutating files, see the tests).
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError),
    *(OverflowError, struct.error, zlib.error),
)

# EXIF orientation to what turns the stored picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Five points of an upright face in units of the distance between the eye centres, origin midway between the eyes:
# eyes, nose tip, mouth corners, image-left first. Ratios of the ArcFace template (Deng et al., arXiv 1801.07698).
_TEMPLATE = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.571], [-0.414, 1.157], [0.414, 1.157]])
# The square holds hat and neck: 4.5 eye distances wide, 2.1 of them above the eyes.
EYE_DISTANCE = 0.22  # of the square's side
EYE_HEIGHT = 0.47  # of the square's side, from the top


class ImageLimits(BaseModel):
    """What is refused before any pixel is decoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int = Field(64 * 2**20, gt=0, description="largest image file, bytes")
    max_pixels: int = Field(
        100_000_000,
        gt=0,
        le=178_000_000,
        description="largest image, width x height in pixels; Pillow stops just above",
    )
    min_side: int = Field(16, ge=1, description="smallest width or height, pixels")


def decode_image(data: bytes, *, limits: ImageLimits) -> np.ndarray:
    """Decode JPEG, PNG, WebP, GIF, BMP or TIFF (the first frame of an animation) to upright RGB.

    Grey, palette, CMYK, YCbCr and 16-bit images become 8-bit RGB; transparent pixels are laid over white.

    Returns:
        uint8, shape `(H, W, 3)`, EXIF orientation applied.

    Raises:
        ImageTooLarge, ImageTooSmall: a limit is passed; known from the header, before decoding.
        UnsupportedImage: the bytes are of none of the formats, whatever the file's name says.
        DecodeError: the bytes are damaged.
    """
    if not data:
        raise DecodeError("the file is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"{len(data)} bytes, above the limit of {limits.max_bytes}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs below our limit and of odd EXIF; limits are ours
        try:
            image = Image.open(BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageTooLarge(str(error)) from error
        except _DAMAGE as error:
            raise _refusal(data, error) from error
        _check_size(image, limits)
        try:
            return np.asarray(_to_rgb(_upright(image)))
        except Image.DecompressionBombError as error:  # a frame or a tile may claim more than the image
            raise ImageTooLarge(str(error)) from error
        except _DAMAGE as error:
            raise DecodeError(f"damaged {image.format}: {_reason(error)}") from error


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(f"{width}x{height} pixels, above the limit of {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(f"{width}x{height} pixels, a side below the limit of {limits.min_side}")


def _refusal(data: bytes, error: Exception) -> DecodeError | UnsupportedImage:
    if not _SIGNATURE.match(data):
        return UnsupportedImage(f"not an image of a known format; it starts with {data[:12]!r}")
    return DecodeError(f"damaged header: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory, and no reason
        return "no decoder takes it"
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _upright(image: Image.Image) -> Image.Image:
    """Decode, then apply the EXIF orientation (Pillow's own way also writes the EXIF anew, and fails on odd ones)."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return image  # a torn EXIF block leaves the pixels good
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit integers by their full range, floats by 1.0 or by their maximum when above it."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(min=0)
    top = 1.0 if image.mode == "F" else 65535.0
    pixels *= 255 / max(top, float(pixels.max()))
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def sharpness(face: np.ndarray) -> float:
    """Variance of the Laplacian of a face's grey values: below about 20 on our square, a face looks blurred.

    Args:
        face: RGB uint8, shape `(S, S, 3)`.
    """
    return float(cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_32F).var())


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """Reduce 68 iBUG points to five: eye centres, nose tip, mouth corners, image-left first.

    Args:
        landmarks: shape `(68, 2)`, x and y in pixels.

    Returns:
        float64, shape `(5, 2)`, the same frame.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    return np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])


def face_transform(landmarks: np.ndarray, *, size: int, margin: int = 0) -> np.ndarray:
    """The similarity that takes an image to the model's square.

    Args:
        landmarks: shape `(68, 2)`, x and y in pixels of the image.
        size: side of the model's square, pixels.
        margin: pixels added on every side, for random crops in training.

    Returns:
        float64, shape `(2, 3)`: pixel coordinates of the image to those of the square.
    """
    template = _TEMPLATE * EYE_DISTANCE * size + [size / 2 - 0.5 + margin, EYE_HEIGHT * size - 0.5 + margin]
    transform = SimilarityTransform.from_estimate(five_points(landmarks), template)
    if not transform:  # all points in one place: no scale or angle to be had, so keep the image's own
        return np.column_stack([np.eye(2), template.mean(0) - five_points(landmarks).mean(0)])
    return np.asarray(transform.params[:2], dtype=np.float64)


def centre_transform(image: np.ndarray, *, size: int, margin: int = 0) -> np.ndarray:
    """The scaling that takes an image's largest centred square to the model's square; as `face_transform`."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    offset_x, offset_y = (size - scale * width) / 2, (size - scale * height) / 2
    shift = scale / 2 - 0.5 + margin  # centres of pixels, not their corners, lie on whole numbers
    return np.array([[scale, 0.0, offset_x + shift], [0.0, scale, offset_y + shift]])


def warp_face(image: np.ndarray, transform: np.ndarray, *, size: int) -> np.ndarray:
    """Resample an image under a similarity; borders are replicated.

    Args:
        image: RGB uint8, shape `(H, W, 3)`.
        transform: shape `(2, 3)`, image pixels to square pixels.
        size: side of the square, pixels.

    Returns:
        uint8, shape `(size, size, 3)`.
    """
    scale = float(np.hypot(transform[0, 0], transform[1, 0]))
    # Bilinear sampling of a face many times larger than the square would alias: average it down first.
    reduction = min(int(1 / scale), *image.shape[:2]) if scale < 1 else 1
    image, transform = _reduce_region(image, transform, size=size, reduction=reduction)
    return cv2.warpAffine(image, transform, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _reduce_region(
    image: np.ndarray, transform: np.ndarray, *, size: int, reduction: int
) -> tuple[np.ndarray, np.ndarray]:
    """Crop the part of an image that the square sees and average it down.

    The cells that are averaged lie on multiples of `reduction` in the image, whatever part of it is seen: so squares
    with and without a margin agree.
    """
    height, width = image.shape[:2]
    corners = np.array([[0, 0, 1], [size, 0, 1], [0, size, 1], [size, size, 1]], dtype=np.float64)
    seen = corners @ cv2.invertAffineTransform(transform).T / reduction  # in cells
    cells = -(-np.array([width, height]) // reduction)
    left, top = np.clip(np.floor(seen.min(0)) - 1, 0, cells - 1).astype(int) * reduction
    right, bottom = np.clip(np.ceil(seen.max(0)) + 2, 1, cells).astype(int) * reduction
    right, bottom = max(right, left + reduction), max(bottom, top + reduction)
    region = image[top:bottom, left:right]
    if reduction > 1:
        # The image's last cells may be cut: fill them up.
        below, beside = bottom - top - region.shape[0], right - left - region.shape[1]
        region = cv2.copyMakeBorder(region, 0, below, 0, beside, cv2.BORDER_REPLICATE)
        reduced = (region.shape[1] // reduction, region.shape[0] // reduction)
        region = cv2.resize(region, reduced, interpolation=cv2.INTER_AREA)
    # A cell's centre u lies at reduction * (u + 0.5) - 0.5 + left in the image.
    shift = reduction / 2 - 0.5
    to_image = np.array([[reduction, 0, shift + left], [0, reduction, shift + top], [0, 0, 1]])
    return region, transform @ to_image


def align_face(image: np.ndarray, landmarks: np.ndarray, *, size: int, margin: int = 0) -> np.ndarray:
    """Cut a face out of an image, upright, at the model's scale.

    Without margin the result equals the middle of the result with one (a pixel may round to the next grey level).

    Args:
        image: RGB uint8, shape `(H, W, 3)`.
        landmarks: shape `(68, 2)`, x and y in pixels of the image.

    Returns:
        uint8, shape `(size + 2 * margin, size + 2 * margin, 3)`.
    """
    return warp_face(image, face_transform(landmarks, size=size, margin=margin), size=size + 2 * margin)


def transform_points(points: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Apply a `(2, 3)` transform to points of shape `(N, 2)`."""
    return np.asarray(points @ transform[:, :2].T + transform[:, 2])
