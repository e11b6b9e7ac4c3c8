"""Encoded images to pixels: upright, opaque, in grey or RGB of 8 bits, whatever the file's mode and depth.

Packing, training, checks and clustering all read images here, so that an image means the same everywhere. A mode whose
values have no fixed white is refused by name, never clipped.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from msdiff_dist.data.foreign import what_it_is
from msdiff_dist.errors import MsdiffError

IMAGE_FIELDS = (
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff", "avif",
)  # fmt: skip
"""File extensions, in lower case, of what counts as an image."""
MOST_PIXELS = 2**26
"""Pixels of the largest image that is decoded: 8192 x 8192. A small file can claim any number of them."""
MOST_PIXELS_A_SIDE = 2**13
"""Of the largest square image."""
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What opening or decoding a corrupt image raises."""
# Of Pillow; JPEG includes MPO. Its other readers may start programs (EPS), or are of files that are no images here.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "PPM", "GIF", "TIFF", "AVIF")
_GREY = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112  # EXIF: 1 is upright
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


@dataclass(frozen=True, kw_only=True)
class ImageReading:
    """What an image file leaves open.

    Attributes:
        orientation: turn the image as its EXIF data says, or take it as stored.
        transparency: colour behind transparent pixels; `refuse`: an image with such pixels is an error.
        animation: take the first frame, or refuse a file of several.
    """

    orientation: Literal["exif", "stored"] = "exif"
    transparency: Literal["white", "black", "refuse"] = "white"
    animation: Literal["first", "refuse"] = "first"


def read_image(
    source: bytes | Path, reading: ImageReading, check_size: Callable[[int, int], None] | None = None
) -> Image.Image:
    """The image, in mode L if it has no colours and else in RGB.

    Args:
        source: content of a file, or its path.
        check_size: called with width and height as stored, before anything is decoded; may raise.

    Raises:
        ValueError: the image is too large, animated or transparent where that is refused, or its pixels have no fixed
            white; the message is a clause.
        OSError, SyntaxError, EOFError: it is corrupt.
    """
    with opened(source) as image, _only_unreadable():
        width, height = image.size
        if check_size is not None:
            check_size(width, height)
        if width * height > MOST_PIXELS:
            raise ValueError(f"has {width}x{height} pixels, more than the {MOST_PIXELS} that are decoded")
        if reading.animation == "refuse" and _frames(image) > 1:
            raise ValueError(f"has {_frames(image)} frames")
        image.load()
        upright = ImageOps.exif_transpose(image) if reading.orientation == "exif" else image
        return _opaque(_of_8_bits(upright, image), reading.transparency)


@contextmanager
def opened(source: bytes | Path) -> Iterator[Image.Image]:
    """The image before decoding: only its header is read. Errors are those of `read_image`."""
    try:
        with _only_unreadable():
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except UnidentifiedImageError as e:
        head = source[:512] if isinstance(source, bytes) else _head(source)
        raise ValueError(what_it_is(head) or "is in no known image format") from e
    with image:
        yield image


@contextmanager
def _only_unreadable() -> Iterator[None]:
    """Turn what decoders let through at corrupt files, of many kinds, into a ValueError."""
    try:
        yield
    except (*UNREADABLE, MsdiffError):
        raise
    except Exception as e:
        raise ValueError(f"cannot be decoded ({type(e).__name__}: {e})") from e


def is_plain(image: Image.Image, reading: ImageReading) -> bool:
    """Whether the file already holds what `read_image` makes of it: 8 bits, opaque, upright, one frame."""
    with _only_unreadable():
        turned = reading.orientation == "exif" and image.getexif().get(_ORIENTATION, 1) != 1
    return image.mode in ("L", "RGB") and not image.has_transparency_data and not turned and _frames(image) == 1


def fitted(image: Image.Image, size: int, how: Literal["cover", "pad"], at: tuple[float, float]) -> Image.Image:
    """The image as a square of `size` pixels.

    Args:
        how: `cover` scales the shorter side to `size` and crops the longer; `pad` scales the longer and puts black on
            both sides of the shorter.
        at: where the crop lies, from (0, 0), left and top, to (1, 1), right and bottom.
    """
    if how == "pad":
        return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS)
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, centering=at)


def _frames(image: Image.Image) -> int:
    """Number of frames. The further images of an MPO file, as phones make them, are previews of the first."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _of_8_bits(image: Image.Image, stored: Image.Image) -> Image.Image:
    """The image with deeper grey scaled to 8 bits. `stored`: as it was opened, which knows the file's own fields."""
    if image.mode.startswith("I;16"):
        return _scaled_integers(image, *_range_of_16_bits(stored))
    if image.mode == "I":
        if stored.format not in ("PNG", "PPM"):  # of these two, Pillow gives 16 bits this mode
            raise ValueError("has 32-bit integer pixels, which have no fixed white: scale them to 8 or 16 bits")
        return _scaled_integers(image, 0, 65535)
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"has floating-point pixels from {low} to {high}, not in [0, 1]: scale them")
        return _scaled(image, 0, 1)
    if image.mode == "LAB":
        raise ValueError("has LAB pixels, which need a colour profile: convert them to RGB")
    return image


def _range_of_16_bits(image: Image.Image) -> tuple[float, float]:
    """The values of black and of white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    white = 2**bits - 1
    return (white, 0) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, white)


def _scaled_integers(image: Image.Image, black: float, white: float) -> Image.Image:
    """As `_scaled`, by a table of all values: an image in float64 would take eight times its memory."""
    table = (
        ((np.arange(65536, dtype=np.float64) - black) * (255 / (white - black))).round().clip(0, 255).astype(np.uint8)
    )
    return Image.fromarray(table[np.asarray(image)])


def _scaled(image: Image.Image, black: float, white: float) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(((values - black) * (255 / (white - black))).round().clip(0, 255).astype(np.uint8))


def _opaque(image: Image.Image, behind: Literal["white", "black", "refuse"]) -> Image.Image:
    """The image in L or RGB, with a colour behind what is transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            if behind == "refuse":
                raise ValueError("has transparent pixels")
            rgba = Image.alpha_composite(Image.new("RGBA", image.size, behind), rgba)
        image = rgba.convert("L" if image.mode in _GREY else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in _GREY else "RGB")
