"""Image files of every mode and depth: scaled by what their values mean, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from msdiff_dist.data.image_files import MOST_PIXELS, ImageReading, fitted, read_image

RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
"""From black to white in 16 bits."""
EIGHT = (RAMP / 257).round().astype(np.uint8)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(content: bytes, reading: ImageReading | None = None) -> np.ndarray:
    image = read_image(content, reading or ImageReading())
    assert image.mode in ("L", "RGB")
    return np.asarray(image)


def tiff(values: np.ndarray, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """A grey TIFF with these tags, written here because Pillow writes no such files."""
    data = values.tobytes()
    tags = [
        (256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, len(data)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", tag, kind, 1, v) for tag, kind, v in tags)
    return struct.pack("<2sHL", b"II", 42, 8 + len(data)) + data + directory + struct.pack("<L", 0)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bit_grey_keeps_its_ramp(kind: str) -> None:
    content = stored(Image.fromarray(RAMP.astype(np.uint16)), kind)
    assert abs(pixels(content).astype(int) - EIGHT).max() <= 1


def test_16_bit_tiff_where_white_is_zero() -> None:
    content = tiff(RAMP.astype("<u2"), 16, photometric=0)
    assert abs(pixels(content) - (255 - EIGHT.astype(int))).max() <= 1


def test_12_bit_tiff() -> None:
    values = np.linspace(0, 4095, 64).round().astype(int).reshape(8, 8)
    packed = bytearray()
    for first, second in values.reshape(-1, 2).tolist():
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    content = tiff(np.frombuffer(bytes(packed), np.uint8).reshape(8, 12), 12, photometric=1)
    content = content.replace(struct.pack("<HHLL", 256, 4, 1, 12), struct.pack("<HHLL", 256, 4, 1, 8))
    assert abs(pixels(content) - values * (255 / 4095)).max() <= 0.5


def test_floating_point_tiff_between_0_and_1() -> None:
    content = stored(Image.fromarray((RAMP / 65535).astype(np.float32)), "tiff")
    assert abs(pixels(content) - RAMP / 257).max() <= 0.51


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        (Image.fromarray(RAMP.astype(np.float32)), "tiff", "floating-point pixels from 0.0 to 65535.0"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "tiff", "floating-point pixels"),
        (Image.fromarray(RAMP.astype(np.int32)), "tiff", "32-bit integer"),
        (Image.new("LAB", (4, 4)), "tiff", "LAB"),
    ],
    ids=["floats above 1", "no numbers", "32 bits", "LAB"],
)
def test_values_without_a_fixed_white_are_refused_by_name(image: Image.Image, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(stored(image, kind))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("1", (2, 2), 1), "png", [255]),
        (Image.new("L", (2, 2), 70), "png", [70]),
        (Image.new("LA", (2, 2), (0, 0)), "png", [255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "png", [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "png", [255, 0, 0]),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "png", [204, 204, 204]),
        (Image.new("RGB", (2, 2), (9, 8, 7)), "bmp", [9, 8, 7]),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tiff", [255, 0, 0]),
        (Image.new("RGB", (2, 2), (255, 0, 0)).quantize(4), "gif", [255, 0, 0]),
        (Image.new("RGB", (2, 2), (10, 20, 30)), "webp", [10, 20, 30]),
    ],
    ids=["1", "L", "LA", "clear", "opaque", "one fifth", "RGB", "CMYK", "palette", "webp"],
)
def test_every_mode_becomes_grey_or_colour(image: Image.Image, kind: str, expected: list[int]) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    found = pixels(stored(image, kind, **options)).reshape(4, -1)
    assert (found == expected).all()


def test_avif_is_read() -> None:
    found = pixels(stored(Image.new("RGB", (16, 16), (200, 30, 30)), "avif"))
    assert abs(found.astype(int) - [200, 30, 30]).max() < 12


def test_transparency_and_its_colour_are_a_choice() -> None:
    clear = stored(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "png")
    assert (pixels(clear, ImageReading(transparency="black")) == 0).all()
    with pytest.raises(ValueError, match="transparent pixels"):
        pixels(clear, ImageReading(transparency="refuse"))
    opaque = stored(Image.new("RGBA", (2, 2), (255, 0, 0, 255)), "png")
    assert (pixels(opaque, ImageReading(transparency="refuse")) == [255, 0, 0]).all()


def test_orientation_is_a_choice() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = stored(Image.new("RGB", (16, 8)), "jpeg", exif=exif)
    assert pixels(content).shape == (16, 8, 3)
    assert pixels(content, ImageReading(orientation="stored")).shape == (8, 16, 3)


def test_animations_give_their_first_frame_or_are_refused() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png"):
        content = stored(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (pixels(content)[0, 0] == [255, 0, 0]).all()
        with pytest.raises(ValueError, match="2 frames"):
            pixels(content, ImageReading(animation="refuse"))


def test_a_giant_is_refused_before_it_is_decoded() -> None:
    """A header that claims 60,000 x 60,000 pixels, and none behind it."""
    header = struct.pack(">LLBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b""
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))
    with pytest.raises((ValueError, Image.DecompressionBombError), match=r"60000x60000|decompression bomb"):
        pixels(b"\x89PNG\r\n\x1a\n" + chunks)
    assert MOST_PIXELS < Image.MAX_IMAGE_PIXELS, "Pillow warns only above what is refused here"


def test_sizes_are_known_before_decoding() -> None:
    seen = []
    cut = stored(Image.effect_noise((30, 20), 100), "png")[:200]
    with pytest.raises(OSError, match="truncated"):
        read_image(cut, ImageReading(), lambda width, height: seen.append((width, height)))
    assert seen == [(30, 20)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"\n<!DOCTYPE HTML><html>", "HTML page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"", "is empty"),
        (b"junk", "no known image format"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(content)


def test_covering_crops_and_padding_keeps_all() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, :10] = 255
    image = Image.fromarray(wide)
    assert (np.asarray(fitted(image, 10, "cover", (0, 0))) == 255).all()
    assert (np.asarray(fitted(image, 10, "cover", (1, 1))) == 0).all()
    padded = np.asarray(fitted(image, 30, "pad", (0.5, 0.5)))
    assert padded.shape == (30, 30)
    assert padded[15, 2] == 255
    assert (padded[:10] == 0).all()
