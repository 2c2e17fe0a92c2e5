"""Files that are torn, mutated or no images at all: the answer is always an image or an `ImageError`."""

import logging
import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from mgmtn.errors import DecodeError, ImageError, UnsupportedImage
from mgmtn.images import ImageLimits, decode_image

LIMITS = ImageLimits()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def outcome(data: bytes, limits: ImageLimits = LIMITS) -> str:
    try:
        image = decode_image(data, limits=limits)
    except ImageError as error:
        return error.status
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
    return "image"


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_name_of_the_error_says_that_a_torn_file_is_damaged(file_format):
    whole = encode(NOISE, file_format)
    with pytest.raises(DecodeError, match=f"damaged {file_format}|damaged header"):
        decode_image(whole[: len(whole) // 2], limits=LIMITS)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_torn_anywhere_is_an_image_error_or_an_image(file_format):
    whole = encode(NOISE, file_format)
    for length in range(1, len(whole), max(1, len(whole) // 150)):
        assert outcome(whole[:length]) in ("image", "decode_error", "unsupported")
    assert outcome(whole[:30]) == "decode_error"


def test_an_empty_file_is_damaged():
    with pytest.raises(DecodeError, match="empty"):
        decode_image(b"", limits=LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b"plain text",
        b"BMW is a maker of cars, and this is a text",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00",
        b"%PDF-1.7\n",
        b"\x00" * 1000,
        b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heic",
        b"\x89",
        b"P6 4 4 255 " + bytes(48),
    ],
    ids=["html", "text", "text like bmp", "svg", "wav", "pdf", "zeros", "heic", "one byte", "ppm"],
)
def test_what_is_no_image_is_unsupported_and_shown_by_its_first_bytes(data):
    with pytest.raises(UnsupportedImage) as caught:
        decode_image(data, limits=LIMITS)
    assert repr(data[:12]) in str(caught.value)


def test_random_bytes_are_unsupported():
    generator = np.random.default_rng(0)
    for _ in range(300):
        assert outcome(generator.bytes(int(generator.integers(1, 400)))) in ("unsupported", "decode_error")


def test_a_message_is_the_same_every_time():
    torn = encode(NOISE, "PNG")[:20]
    messages = set()
    for _ in range(3):
        with pytest.raises(DecodeError) as caught:
            decode_image(bytes(torn), limits=LIMITS)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


def test_a_tiff_whose_tags_claim_gigabytes_is_refused_without_them():
    data = bytearray(encode(NOISE, "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for entry in range(entries):
        torn = bytearray(data)
        struct.pack_into("<I", torn, directory + 2 + 12 * entry + 4, 0x7FFFFFFF)  # the tag's number of values
        tracemalloc.start()
        outcome(bytes(torn))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24


def samples() -> dict[str, bytes]:
    """A small file of every kind."""
    noise = NOISE[:24, :24].copy()
    image, turned = Image.fromarray(noise), Image.fromarray(np.rot90(noise).copy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "hello"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:01:01 00:00:00"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    frames = {"save_all": True, "append_images": [turned]}
    files = {
        "jpeg": encode(image, "JPEG", exif=exif),
        "progressive jpeg": encode(image, "JPEG", progressive=True, exif=exif),
        "cmyk jpeg": encode(image.convert("CMYK"), "JPEG"),
        "mpo": encode(image, "MPO", **frames),
        "png": encode(image, "PNG", exif=exif),
        "palette png": encode(image.quantize(8), "PNG", transparency=0),
        "grey png": encode(image.convert("L"), "PNG", transparency=5, icc_profile=b"x" * 99, exif=exif),
        "16-bit png": encode(noise[..., 0].astype(np.uint16) * 257, "PNG"),
        "apng": encode(image, "PNG", **frames),
        "webp": encode(image, "WEBP", exif=exif),
        "lossless webp": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "animated webp": encode(image, "WEBP", **frames),
        "gif": encode(image.quantize(8), "GIF", transparency=1),
        "animated gif": encode(image.quantize(8), "GIF", save_all=True, append_images=[turned.quantize(8)]),
        "bmp": encode(image, "BMP"),
        "palette bmp": encode(image.quantize(16), "BMP"),
        "fax tiff": encode(image.convert("1"), "TIFF", compression="group4"),
        "float tiff": encode(noise[..., 0] / np.float32(255), "TIFF", exif=exif),
        "16-bit tiff": encode(noise[..., 0].astype(np.uint16) * 257, "TIFF"),
        "cmyk tiff": encode(image.convert("CMYK"), "TIFF"),
        "rgba tiff": encode(image.convert("RGBA"), "TIFF"),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"{compression} tiff"] = encode(image, "TIFF", compression=compression)
    return files


SAMPLES = samples()


def mutations(data: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """Copies with some bytes changed, more often near the start, and some of them cut short."""
    choose = random.Random(seed)
    for _ in range(count):
        torn = bytearray(data)
        reach = min(len(torn), 256) if choose.random() < 0.6 else len(torn)
        for _ in range(choose.choice((1, 1, 2, 4, 8))):
            position = choose.randrange(reach)
            change = choose.randrange(4)
            if change == 0:
                torn[position] ^= 1 << choose.randrange(8)
            elif change == 1:
                torn[position] = choose.choice((0, 1, 127, 128, 255))
            elif change == 2:
                torn[position] = choose.randrange(256)
            else:
                word = choose.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
                torn[position : position + 4] = word[: len(torn) - position]
        if choose.random() < 0.1:
            del torn[choose.randrange(len(torn)) :]
        yield with_checksums(bytes(torn))


def with_checksums(data: bytes) -> bytes:
    """A PNG with checksums that are right, so that the damage gets past them; anything else as it is."""
    if not data.startswith(b"\x89PNG"):
        return data
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        parts += [data[position:end], struct.pack(">I", zlib.crc32(data[position + 4 : end]))]
        position = end + 4
    return b"".join(parts) + data[position:]


@pytest.mark.parametrize("name", SAMPLES)
def test_damage_is_an_image_error_and_nothing_else(name, caplog):
    caplog.set_level(logging.CRITICAL)
    limits = ImageLimits(min_side=1, max_pixels=2_000_000)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        found = {outcome(data, limits) for data in mutations(SAMPLES[name], count=400, seed=7)}
    assert "decode_error" in found  # so the mutations do harm
    assert not leaked
