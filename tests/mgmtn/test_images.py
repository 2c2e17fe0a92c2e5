"""Bytes to pixels: every format as it comes from cameras and the web, and every way in which a file can be wrong."""

import struct
import tracemalloc
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image
from pydantic import ValidationError

from mgmtn.errors import DecodeError, ImageTooLarge, ImageTooSmall
from mgmtn.images import ImageLimits, decode_image

LIMITS = ImageLimits()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def smooth_picture(height: int = 32, width: int = 48) -> np.ndarray:
    """Each corner another colour, no edges: lossy formats keep it nearly as it is."""
    corners = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [220, 220, 220]]], np.uint8)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


PICTURE = smooth_picture()


def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def assert_looks_like(data: bytes, expected: np.ndarray, *, within: float = 6) -> None:
    decoded = decode_image(data, limits=LIMITS)
    assert (decoded.dtype, decoded.shape) == (np.uint8, expected.shape)
    assert np.abs(decoded.astype(int) - expected).max() <= within


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_bit_for_bit(file_format):
    assert_looks_like(encode(PICTURE, file_format), PICTURE, within=0)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_comes_back_bit_for_bit(compression):
    assert_looks_like(encode(PICTURE, "TIFF", compression=compression), PICTURE, within=0)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 98, "subsampling": 0}),
        ("JPEG", {"quality": 98, "progressive": True}),
        ("WEBP", {"quality": 100}),
        ("TIFF", {"compression": "jpeg", "quality": 98}),
    ],
)
def test_lossy_formats_come_back_nearly_the_same(file_format, options):
    assert_looks_like(encode(PICTURE, file_format, **options), PICTURE, within=12)


def test_lossless_webp_comes_back_bit_for_bit():
    assert_looks_like(encode(PICTURE, "WEBP", lossless=True), PICTURE, within=0)


def test_a_gif_comes_back_as_its_palette_has_it():
    indexed = Image.fromarray(PICTURE).quantize(64)
    assert_looks_like(encode(indexed, "GIF"), np.asarray(indexed.convert("RGB")), within=0)


# Orientation to how the upright picture is stored under it.
STORED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


def orientation_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {"quality": 98, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
)
def test_all_orientations_give_the_same_upright_picture(orientation, file_format, options):
    stored = np.ascontiguousarray(STORED[orientation](PICTURE))
    data = encode(stored, file_format, exif=orientation_exif(orientation), **options)
    assert_looks_like(data, PICTURE, within=8 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [6, 7])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_orientation_is_applied_whatever_the_pixels_are(orientation, mode):
    grey = np.ascontiguousarray(np.kron([[0, 255], [255, 255]], np.ones((16, 24))).astype(np.uint8))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](grey[..., None])[..., 0]))
    stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257) if mode == "I;16" else stored.convert(mode)
    data = encode(stored, "PNG", exif=orientation_exif(orientation))
    assert_looks_like(data, np.repeat(grey[..., None], 3, axis=2), within=0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert_looks_like(encode(PICTURE, "PNG", exif=orientation_exif(orientation)), PICTURE, within=0)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_a_torn_exif_block_costs_only_the_orientation(exif):
    assert_looks_like(encode(PICTURE, "WEBP", lossless=True, exif=exif), PICTURE, within=0)


def test_exif_that_cannot_be_written_again_does_no_harm():
    exif = orientation_exif(6)
    exif[ExifTags.Base.ImageDescription] = "more than eight"
    data = encode(np.rot90(PICTURE).copy(), "WEBP", lossless=True, exif=exif)
    entry = struct.pack(">HHI", ExifTags.Base.ImageDescription, 2, 16)
    as_rational = struct.pack(">HHI", ExifTags.Base.ImageDescription, 5, 1)
    assert entry in data
    assert_looks_like(data.replace(entry, as_rational), PICTURE, within=0)


def test_cmyk_jpeg_has_its_colours_as_another_decoder_sees_them():
    data = encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=98)
    assert b"Adobe" in data  # which says that the four channels are stored inverted
    other = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert_looks_like(data, other, within=3)
    assert_looks_like(data, PICTURE, within=12)


def test_adobe_jpeg_in_ycck_has_its_colours():
    """Transform 2 in Adobe's marker: the first three channels are the YCbCr of the inks, read as if they were RGB."""
    inks = np.asarray(Image.fromarray(PICTURE).convert("CMYK"))
    luma_chroma = np.asarray(Image.fromarray(inks[..., :3].copy()).convert("YCbCr"))
    channels = np.concatenate([255 - luma_chroma, inks[..., 3:]], axis=2)  # Pillow inverts four channels on writing
    data = encode(cmyk(channels), "JPEG", quality=98)
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    as_ycck = data[: marker + 11] + b"\2" + data[marker + 12 :]
    assert_looks_like(as_ycck, PICTURE, within=16)


def cmyk(channels: np.ndarray) -> Image.Image:
    height, width = channels.shape[:2]
    return Image.frombytes("CMYK", (width, height), channels.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("file_format", "within"), [("JPEG", 6), ("PNG", 0), ("BMP", 0), ("TIFF", 0)])
def test_grey_becomes_three_equal_channels(file_format, within):
    grey = PICTURE[..., 0]
    assert_looks_like(encode(grey, file_format), np.repeat(grey[..., None], 3, axis=2), within=within)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_lie_over_white(file_format):
    alpha = np.zeros((32, 48, 1), np.uint8)
    alpha[:, 16:32], alpha[:, 32:] = 128, 255
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    expected = np.rint((PICTURE * (alpha / 255.0)) + 255 * (1 - alpha / 255.0)).astype(int)
    assert_looks_like(encode(np.concatenate([PICTURE, alpha], 2), file_format, **options), expected, within=1)


def test_grey_with_transparency_lies_over_white():
    grey_alpha = np.zeros((32, 48, 2), np.uint8)
    grey_alpha[:, 24:] = (90, 255)
    expected = np.full((32, 48, 3), 255)
    expected[:, 24:] = 90
    assert_looks_like(encode(grey_alpha, "PNG"), expected, within=0)


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_becomes_white(file_format):
    indices = np.zeros((32, 48), np.uint8)
    indices[:, 24:] = 1
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.full((32, 48, 3), 255)
    expected[:, :24] = (10, 20, 30)
    assert_looks_like(encode(image, file_format, transparency=1), expected, within=0)


def test_a_transparent_colour_of_an_rgb_png_becomes_white():
    pixels = np.full((32, 48, 3), (10, 20, 30), np.uint8)
    pixels[:, 24:] = (1, 2, 3)
    expected = pixels.astype(int)
    expected[:, 24:] = 255
    assert_looks_like(encode(pixels, "PNG", transparency=(1, 2, 3)), expected, within=0)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_one_bit_becomes_black_and_white(file_format):
    bits = np.indices((32, 48)).sum(0) % 3 == 0
    expected = np.repeat(bits[..., None], 3, axis=2) * 255
    assert_looks_like(encode(bits, file_format), expected, within=0)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_its_full_range(file_format):
    ramp = np.tile(np.linspace(0, 65535, 48).astype(np.uint16), (32, 1))
    expected = np.rint(np.repeat(ramp[..., None], 3, axis=2) / 257.0).astype(int)
    assert_looks_like(encode(ramp, file_format), expected, within=0)


def test_sixteen_bit_colour_keeps_its_high_bytes():
    ok, data = cv2.imencode(".png", PICTURE[..., ::-1].astype(np.uint16) * 257)
    assert ok
    assert_looks_like(data.tobytes(), PICTURE, within=1)


@pytest.mark.parametrize(("top", "white"), [(1.0, 1.0), (0.5, 1.0), (255.0, 255.0)])
def test_floats_are_scaled_by_one_or_by_their_maximum_above_it(top, white):
    ramp = np.tile(np.linspace(0, top, 48, dtype=np.float32), (32, 1))
    expected = np.rint(np.repeat(ramp[..., None], 3, axis=2) * 255 / white).astype(int)
    assert_looks_like(encode(ramp, "TIFF"), expected, within=1)


def test_floats_that_are_no_numbers_are_drawn_all_the_same():
    odd = np.tile(np.array([np.nan, np.inf, -np.inf, -5, 0, 0.5], np.float32), (32, 8))
    assert decode_image(encode(odd, "TIFF"), limits=LIMITS).shape == (32, 48, 3)


@pytest.mark.parametrize(("file_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_an_animation_is_its_first_frame(file_format, options):
    first, second = (Image.new("RGB", (48, 32), colour) for colour in ("red", "blue"))
    data = encode(first, file_format, save_all=True, append_images=[second], **options)
    assert_looks_like(data, np.full((32, 48, 3), (255, 0, 0)), within=0)


def test_the_first_picture_of_an_mpo_is_taken():
    first, second = Image.fromarray(PICTURE), Image.new("RGB", (48, 32), "blue")
    assert_looks_like(encode(first, "MPO", save_all=True, append_images=[second], quality=98), PICTURE, within=12)


# Limits.


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def claim_size(data: bytes, file_format: str, *, width: int, height: int) -> bytes:
    """The file with another size in its header."""
    old, new = (48, 32), (width, height)
    layouts = {"JPEG": ">HH", "GIF": "<HH", "BMP": "<ii"}
    if file_format == "JPEG":
        old, new = old[::-1], new[::-1]
    layout = layouts[file_format]
    return data.replace(struct.pack(layout, *old), struct.pack(layout, *new), 1)


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (100_001, 1_000)])
def test_a_decompression_bomb_is_refused_without_a_buffer_for_it(size):
    bomb = png_of_size(*size)
    tracemalloc.start()
    with pytest.raises(ImageTooLarge, match="limit"):
        decode_image(bomb, limits=LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("file_format", ["JPEG", "GIF", "BMP"])
def test_a_size_above_the_limit_is_refused_from_the_header_of_every_format(file_format):
    data = claim_size(encode(PICTURE, file_format), file_format, width=30_000, height=20_000)
    with pytest.raises(ImageTooLarge):
        decode_image(data, limits=LIMITS)


def test_the_limit_on_pixels_holds_to_the_pixel():
    data = encode(PICTURE, "PNG")
    assert decode_image(data, limits=ImageLimits(max_pixels=48 * 32)).shape == (32, 48, 3)
    with pytest.raises(ImageTooLarge, match="48x32 pixels, above the limit of 1535"):
        decode_image(data, limits=ImageLimits(max_pixels=48 * 32 - 1))


def test_the_limit_on_bytes_holds_to_the_byte_and_is_checked_first():
    data = encode(PICTURE, "PNG")
    assert decode_image(data, limits=ImageLimits(max_bytes=len(data))).shape == (32, 48, 3)
    with pytest.raises(ImageTooLarge, match=f"{len(data)} bytes, above the limit of {len(data) - 1}"):
        decode_image(data, limits=ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ImageTooLarge):
        decode_image(b"not an image", limits=ImageLimits(max_bytes=5))


def test_a_side_below_the_limit_is_too_small_either_way_round():
    limits = ImageLimits(min_side=32)
    assert decode_image(encode(PICTURE, "PNG"), limits=limits).shape == (32, 48, 3)
    for pixels in (PICTURE[:31], PICTURE[:, :31]):
        with pytest.raises(ImageTooSmall, match="a side below the limit of 32"):
            decode_image(encode(np.ascontiguousarray(pixels), "PNG"), limits=limits)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises((ImageTooSmall, DecodeError)):
        decode_image(png_of_size(*size), limits=LIMITS)


def test_a_limit_that_pillow_would_not_let_through_is_no_setting():
    with pytest.raises(ValidationError, match="max_pixels"):
        ImageLimits(max_pixels=200_000_000)
