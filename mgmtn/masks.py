"""68 landmarks to one binary mask per facial group.

The paper names the groups; the shapes below are ours. Lengths are in units of `d`, the distance between the eye
centres, so that masks scale with the face. Neither ear nor hair has landmarks: those two are heuristics.
"""

import cv2
import numpy as np

from mgmtn.attributes import GROUPS

MASK_SIZE = 64  # side of a stored mask; the network looks at 29 x 29 or less
_SUBPIXEL_BITS = 4

# Landmark indices of the iBUG scheme; "right" and "left" are the subject's.
_JAW = np.arange(17)
_BROWS = np.arange(17, 27)
_RIGHT_EYE, _LEFT_EYE = np.arange(36, 42), np.arange(42, 48)
_RIGHT_BROW, _LEFT_BROW = np.arange(17, 22), np.arange(22, 27)
_NOSE = np.arange(27, 36)
_OUTER_LIP = np.arange(48, 60)
_RIGHT_CHEEK = np.array([36, 41, 40, 31, 48, 4, 3, 2, 1])
_LEFT_CHEEK = np.array([45, 46, 47, 35, 54, 12, 13, 14, 15])


def draw_masks(landmarks: np.ndarray, *, crop_size: int, mask_size: int = MASK_SIZE) -> np.ndarray:
    """Draw the eight group masks of one aligned face.

    Args:
        landmarks: shape `(68, 2)`, x and y in pixels of the square crop.
        crop_size: side of the crop, pixels.
        mask_size: side of the masks, pixels; they cover the whole crop.

    Returns:
        bool, shape `(8, mask_size, mask_size)`, in the order of `GROUPS`.
    """
    scale = mask_size / crop_size
    points = (np.asarray(landmarks, dtype=np.float64) + 0.5) * scale - 0.5
    right_eye, left_eye = points[_RIGHT_EYE].mean(0), points[_LEFT_EYE].mean(0)
    unit = max(float(np.linalg.norm(left_eye - right_eye)), 1.0)
    draw = _Canvas(mask_size, unit)
    drawn = {
        "mouth": draw.hull(points[_OUTER_LIP], dilate=0.15),
        "ear": _ears(draw, points),
        "lower_face": _lower_face(draw, points),
        "cheeks": draw.polygon(points[_RIGHT_CHEEK], dilate=0.05) | draw.polygon(points[_LEFT_CHEEK], dilate=0.05),
        "nose": draw.hull(points[_NOSE], dilate=0.12),
        "eyes": _eyes(draw, points),
        "hair": _hair(draw, points),
    }
    drawn["object"] = np.logical_or.reduce(list(drawn.values()))
    return np.stack([drawn[group] for group in GROUPS])


class _Canvas:
    """Fills polygons on a square of `size` pixels; `unit` is the distance between the eyes in those pixels."""

    def __init__(self, size: int, unit: float) -> None:
        self.size = size
        self.unit = unit

    def polygon(self, points: np.ndarray, *, dilate: float = 0.0) -> np.ndarray:
        """Fill a polygon and grow it by `dilate` eye distances (a stroke of twice that width is the dilation)."""
        canvas = np.zeros((self.size, self.size), np.uint8)
        # Far outside the square nothing changes, and OpenCV's fixed point stays within 32 bits.
        points = np.clip(points, -8 * self.size, 9 * self.size)
        fixed = np.rint(points * 2**_SUBPIXEL_BITS).astype(np.int32)[None]
        cv2.fillPoly(canvas, fixed, 1, shift=_SUBPIXEL_BITS)
        stroke = min(round(2 * dilate * self.unit), 8 * self.size)  # OpenCV refuses what is absurdly thick
        if stroke > 0:
            cv2.polylines(canvas, fixed, isClosed=True, color=1, thickness=stroke, shift=_SUBPIXEL_BITS)
        return canvas.astype(bool)

    def hull(self, points: np.ndarray, *, dilate: float = 0.0) -> np.ndarray:
        return self.polygon(cv2.convexHull(points.astype(np.float32))[:, 0], dilate=dilate)


def _eyes(draw: _Canvas, points: np.ndarray) -> np.ndarray:
    """Each eye with its brow and 0.25 d below the lid (bags, rims of glasses), and the bridge between them."""
    down = np.array([0.0, 0.25 * draw.unit])
    right = np.concatenate([points[_RIGHT_BROW], points[_RIGHT_EYE], points[_RIGHT_EYE] + down])
    left = np.concatenate([points[_LEFT_BROW], points[_LEFT_EYE], points[_LEFT_EYE] + down])
    bridge = np.stack([points[39], points[42], points[42] + down / 2, points[39] + down / 2])
    return draw.hull(right, dilate=0.15) | draw.hull(left, dilate=0.15) | draw.hull(bridge, dilate=0.15)


def _lower_face(draw: _Canvas, points: np.ndarray) -> np.ndarray:
    """From the nose base along the jaw and on, at its width, to the lower border: chin, beard, neck, collar."""
    bottom = max(draw.size - 1.0, float(points[8, 1]) + 0.8 * draw.unit)
    neck = np.array([[points[13, 0], bottom], [points[3, 0], bottom]])
    top = points[[31, 32, 33, 34, 35]]
    outline = np.concatenate([top, points[[13]], neck, points[[3]]])
    return draw.polygon(outline) | draw.hull(np.concatenate([points[3:14], top]))


def _ears(draw: _Canvas, points: np.ndarray) -> np.ndarray:
    """Boxes 0.5 d wide outside the jaw's upper ends, from brow to mouth level; room for an earring below."""
    brow, mouth = float(points[_BROWS, 1].mean()), float(points[_OUTER_LIP, 1].mean())
    width = 0.5 * draw.unit
    mask = np.zeros((draw.size, draw.size), bool)
    for inner, outward in ((points[0:3, 0].mean(), -1.0), (points[14:17, 0].mean(), 1.0)):
        # A little of the cheek's edge, since the jaw line moves with the pose and sideburns grow inside it.
        start, end = inner - outward * 0.15 * draw.unit, inner + outward * width
        box = np.array([[start, brow], [end, brow], [end, mouth], [start, mouth]])
        mask |= draw.polygon(box)
    return mask


def _hair(draw: _Canvas, points: np.ndarray) -> np.ndarray:
    """All above and beside the face, down to the jaw, less the face itself up to the middle of the forehead."""
    low = float(points[_JAW, 1].max())
    left, right = float(points[_JAW, 0].min()), float(points[_JAW, 0].max())
    reach = 1.2 * draw.unit
    band = np.array([[left - reach, -1], [right + reach, -1], [right + reach, low], [left - reach, low]])
    forehead = points[_BROWS] - [0.0, 0.35 * draw.unit]
    face = np.concatenate([points[_JAW], forehead])
    return draw.polygon(band) & ~draw.hull(face)


def pack_masks(masks: np.ndarray) -> bytes:
    """Bool masks of shape `(8, M, M)` to `M * M` bytes: one bit a pixel."""
    return np.packbits(masks).tobytes()


def unpack_masks(packed: bytes, *, mask_size: int = MASK_SIZE) -> np.ndarray:
    """The inverse of `pack_masks`: bool, shape `(8, mask_size, mask_size)`.

    Raises:
        ValueError: the bytes are of masks of another size.
    """
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    return bits.reshape(len(GROUPS), mask_size, mask_size).astype(bool)
