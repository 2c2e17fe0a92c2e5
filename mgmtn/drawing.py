"""Pictures for people: faces with boxes and points, group masks over a crop, contact sheets. Pillow only.

Images go in as RGB uint8 arrays and come out as Pillow images in RGB. Nothing drawn here is read by a program.
"""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgmtn.attributes import GROUPS

if TYPE_CHECKING:  # the detectors bring torch, which a contact sheet need not wait for
    from mgmtn.landmarks import Faces

# Okabe and Ito's palette, which colour-blind readers can tell apart; its black is grey here, to show on dark pictures.
_COLOURS: Final = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (170, 170, 170),
)
GROUP_COLOURS: Final[dict[str, tuple[int, int, int]]] = dict(zip(GROUPS, _COLOURS, strict=True))
_BOX: Final = (0, 220, 90)
_POINT: Final = (255, 230, 0)
_PAPER: Final = (255, 255, 255)
_INK: Final = (25, 25, 25)
_GREY: Final = (205, 205, 205)
_GAP: Final = 6  # pixels between tiles, and around text


def draw_faces(image: np.ndarray, faces: "Faces") -> Image.Image:
    """Draw every face's box with its index and score, and its 68 points.

    Args:
        image: RGB uint8, shape `(H, W, 3)`.
        faces: in pixels of `image`.
    """
    picture = Image.fromarray(image).convert("RGB")
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 400))
    font = _font(max(11, 6 * line))
    for index, (box, score, points) in enumerate(zip(faces.boxes, faces.scores, faces.landmarks, strict=True)):
        x1, y1, x2, y2 = (float(value) for value in box)
        draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=_BOX, width=line)
        _label(draw, (x1, y1), f"{index}  {score:.2f}", font=font)
        radius = max(1.0, (x2 - x1) / 120)
        for x, y in points.astype(float):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_POINT)
    return picture


def overlay_masks(crop: np.ndarray, masks: np.ndarray) -> Image.Image:
    """What `tint_masks` makes, beside a legend; arguments and errors are the same."""
    picture = tint_masks(crop, masks)
    return _beside(picture, _legend(height=picture.height))


def tint_masks(crop: np.ndarray, masks: np.ndarray) -> Image.Image:
    """Lay the group masks over a face, each in its colour of `GROUP_COLOURS`.

    Args:
        crop: RGB uint8, shape `(H, W, 3)`.
        masks: bool, or float in 0..1 as opacity, shape `(8, h, w)` in the order of `GROUPS`, covering the whole crop.

    Raises:
        ValueError: if there are not as many masks as groups.
    """
    if masks.ndim != 3 or len(masks) != len(GROUPS):
        raise ValueError(f"masks of shape {masks.shape}, expected ({len(GROUPS)}, h, w)")
    picture = Image.fromarray(crop).convert("RGB")
    colours = tuple(GROUP_COLOURS.values())
    # The widest first: the mask of the whole face would hide the mouth's.
    for group in np.argsort(-masks.reshape(len(masks), -1).sum(axis=1, dtype=np.float64), kind="stable"):
        mask, colour = masks[group], colours[group]
        opacity = np.rint(np.clip(mask.astype(np.float32), 0, 1) * 140).astype(np.uint8)
        shape = Image.fromarray(opacity).resize(picture.size, Image.Resampling.BILINEAR)
        picture.paste(colour, (0, 0, *picture.size), mask=shape)
    return picture


def contact_sheet(
    tiles: Sequence[np.ndarray | Image.Image], captions: Sequence[str], *, columns: int = 5, tile_size: int = 180
) -> Image.Image:
    """Lay pictures out in rows, each fitted into a square, with its caption below.

    Args:
        tiles: RGB uint8 arrays of shape `(H, W, 3)`, any sizes, or Pillow images; at least one.
        captions: one a tile; lines are cut to the tile's width.
        columns: tiles a row.
        tile_size: side of a tile's square, pixels.

    Raises:
        ValueError: if there is no tile, or not one caption a tile.
    """
    if not tiles or len(tiles) != len(captions):
        raise ValueError(f"{len(tiles)} tiles and {len(captions)} captions: one caption a tile is wanted, and one tile")
    font = _font(max(10, tile_size // 15))
    line_height = _line_height(font)
    texts = [[_fit(line, font=font, width=tile_size) for line in caption.splitlines()] for caption in captions]
    columns = min(columns, len(tiles))
    step_x = tile_size + _GAP
    step_y = tile_size + line_height * max(map(len, texts)) + 2 * _GAP
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x, y = _GAP + place % columns * step_x, _GAP + place // columns * step_y
        _paste_fitted(sheet, tile, corner=(x, y), size=tile_size)
        for number, line in enumerate(text):
            draw.text((x, y + tile_size + _GAP // 2 + number * line_height), line, fill=_INK, font=font)
    return sheet


def crop_face(image: np.ndarray, box: Sequence[float], *, margin: float = 0.35) -> np.ndarray:
    """The square around a face, cut at the image's edges.

    Args:
        image: RGB uint8, shape `(H, W, 3)`.
        box: x1, y1, x2, y2 in pixels of `image`.
        margin: added on every side, as a part of the box's longer side.

    Returns:
        RGB uint8, a view of `image`; the whole image if the box lies outside it.
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    half = max(x2 - x1, y2 - y1) * (0.5 + margin)
    centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(0, round(centre_x - half)), max(0, round(centre_y - half))
    crop = image[top : max(0, round(centre_y + half)), left : max(0, round(centre_x + half))]
    return crop if crop.size else image


def placeholder(reason: str, *, size: int = 180) -> Image.Image:
    """A grey square that says why there is no picture."""
    tile = Image.new("RGB", (size, size), _GREY)
    font = _font(max(10, size // 14))
    lines = _wrap(_printable(reason), font=font, width=size - 2 * _GAP)
    height = _line_height(font)
    fitting = lines[: max(1, (size - 2 * _GAP) // height)]
    top = (size - height * len(fitting)) // 2
    draw = ImageDraw.Draw(tile)
    for number, line in enumerate(fitting):
        draw.text((_GAP, top + number * height), line, fill=_INK, font=font)
    return tile


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("Ágjy|")
    return round(bottom - min(top, 0)) + 2


def _printable(text: str) -> str:
    """The text as the bundled font can show it: no lone surrogates (undecodable file names), controls or accents."""
    plain = unicodedata.normalize("NFKD", text.encode("utf-8", "replace").decode())
    return "".join(char if char.isprintable() else " " for char in plain if not unicodedata.combining(char))


def _fit(text: str, *, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = _printable(text[: width + 1])  # a character takes a pixel at least
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrap(text: str, *, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fit(word, font=font, width=width))
    return [line for line in lines if line]


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    *,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Text on the box's colour, above the corner, or below it where the image ends."""
    height = _line_height(font)
    x, y = max(0.0, corner[0]), corner[1] - height if corner[1] >= height else max(0.0, corner[1])
    draw.rectangle((x, y, x + font.getlength(text) + 4, y + height), fill=_BOX)
    draw.text((x + 2, y), text, fill=_INK, font=font)


def _legend(*, height: int) -> Image.Image:
    font = _font(12)
    step = max(_line_height(font) + 2, 16)
    width = round(max(font.getlength(group) for group in GROUPS)) + 3 * _GAP + 12
    legend = Image.new("RGB", (width, max(height, step * len(GROUPS) + 2 * _GAP)), _PAPER)
    draw = ImageDraw.Draw(legend)
    for number, (group, colour) in enumerate(GROUP_COLOURS.items()):
        y = _GAP + number * step
        draw.rectangle((_GAP, y + 2, _GAP + 12, y + 14), fill=colour, outline=_INK)
        draw.text((2 * _GAP + 12, y), group, fill=_INK, font=font)
    return legend


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), _PAPER)
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def _paste_fitted(sheet: Image.Image, tile: np.ndarray | Image.Image, *, corner: tuple[int, int], size: int) -> None:
    picture = tile if isinstance(tile, Image.Image) else Image.fromarray(tile)
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(small, (corner[0] + (size - width) // 2, corner[1] + (size - height) // 2))
