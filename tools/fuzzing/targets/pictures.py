"""Images: one target for each format, all read by one function."""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msdiff_dist.data.image_files import UNREADABLE, ImageReading, is_plain, opened, read_image

from ..mutated_files import mutate_png, png_of
from ..mutations import mutate_bytes
from ..target import MEMORY, DisagreementError, Target

_RGB = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)


def _saved(kind: str, array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def _seeds(kind: str) -> list[bytes]:
    grey, deep = _RGB[..., 0], _RGB[..., 0].astype(np.uint16) * 257
    alpha = np.concatenate([_RGB, _RGB[..., :1]], -1)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [_saved(kind, _RGB)]
    if kind != "WEBP":
        seeds.append(_saved(kind, grey))
    match kind:
        case "PNG":
            palette = io.BytesIO()
            Image.fromarray(_RGB).quantize(4).save(palette, kind, transparency=0)
            seeds += [_saved(kind, deep), _saved(kind, alpha), _saved(kind, _RGB, exif=exif), palette.getvalue()]
        case "JPEG":
            seeds += [_saved(kind, _RGB, exif=exif), _saved(kind, _RGB, progressive=True)]
        case "TIFF":
            seeds += [_saved(kind, deep), _saved(kind, _RGB, compression="tiff_lzw"), _saved(kind, _RGB, exif=exif)]
            seeds += [_saved(kind, _RGB, compression=c) for c in ("jpeg", "tiff_deflate", "packbits")]
            seeds += [_saved(kind, grey / np.float32(255))]
        case "GIF" | "WEBP":
            seeds.append(_saved(kind, _RGB, save_all=True, append_images=[Image.fromarray(_RGB[::-1].copy())]))
            seeds += [_saved(kind, alpha)]
            seeds += [_saved(kind, _RGB, lossless=True)] if kind == "WEBP" else []
        case "PPM":
            seeds += [
                _saved(kind, deep),
                b"P3\n2 1\n255\n1 2 3 4 5 6\n",
                b"P1\n2 2\n0 1 1 0\n",
            ]
    return seeds


def _png(width: int, height: int, bits: int, colour: int, *extra: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return png_of([(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")])


def _tiff(*tags: tuple[int, int, int, int]) -> bytes:
    known = (
        (256, 4, 1, 4),
        (257, 4, 1, 4),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 16),
    )
    by_tag = {tag[0]: tag for tag in (*known, *tags)}
    directory = struct.pack("<H", len(by_tag)) + b"".join(
        struct.pack("<HHLL", *tag) for _, tag in sorted(by_tag.items())
    )
    return struct.pack("<2sHL", b"II", 42, 24) + bytes(16) + directory + struct.pack("<L", 24)


def _hostile() -> dict[str, dict[str, bytes]]:
    bomb = zlib.compress(bytes(1 << 27), 9)
    return {
        "PNG": {
            "bomb in zTXt": _png(4, 4, 8, 0, (b"zTXt", b"a\0\0" + bomb), rows=bytes(20)),
            "bomb in iTXt": _png(4, 4, 8, 0, (b"iTXt", b"a\0\1\0\0\0" + bomb), rows=bytes(20)),
            "bombs in iTXt after the image": _png(4, 4, 8, 0, rows=bytes(20))[:-12]
            + png_of([(b"iTXt", b"a\0\1\0\0\0" + bomb)] * 9 + [(b"IEND", b"")])[8:],
            "bomb in iCCP": _png(4, 4, 8, 0, (b"iCCP", b"a\0\0" + bomb), rows=bytes(20)),
            "16-bit grey of 64 Mpixel": _png(1 << 13, 1 << 13, 16, 0, rows=bytes((2 << 13) + 1) * (1 << 13)),
            "claims 64 Mpixel": _png(1 << 13, 1 << 13, 8, 2),
            "claims 16 Gpixel": _png(1 << 17, 1 << 17, 8, 2),
            "no pixels": _png(0, 0, 8, 2),
        },
        "TIFF": {
            "many values in a tag": _tiff((270, 2, 0xFFFFFFFF, 8)),
            "many bits per sample": _tiff((258, 3, 0x7FFFFFFF, 8)),
            "bits per sample without a value": _tiff((258, 3, 0, 0)),
            "no bits": _tiff((258, 3, 1, 0)),
            "EXIF that leads to itself": _tiff((34665, 4, 1, 24)),
            "directory that leads to itself": _tiff(),
            "claims many strips": _tiff((273, 4, 0x3FFFFFFF, 8), (279, 4, 0x3FFFFFFF, 8)),
            "no width": _tiff((256, 4, 1, 0)),
        },
        "GIF": {"frames without end": b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + (b",\0\0\0\0\1\0\1\0\0\2\2D\1\0" * 20000)},
        "PPM": {
            "claims 64 Mpixel": b"P6 8192 8192 255\n",
            "floating point": b"PF\n1 1\n-1.0\n" + bytes(12),
            "claims more": b"P6 99999999999 99999999999 255\n",
            "long number": b"P3 1 1 255 " + b"9" * 9999,
            "EPS by another name": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
        },
    }


def _hostile_of(kind: str) -> dict[str, bytes]:
    return _hostile().get(kind, {})


def _read(data: bytes, folder: Path) -> Any:
    image = read_image(data, ImageReading())
    with opened(data) as stored:
        is_plain(stored, ImageReading())
    if image.size < (1024, 1024):
        read_image(data, ImageReading(orientation="stored", transparency="black", animation="first"))
    return image


def _as_pillow(data: bytes, found: Any) -> None:
    if found.mode not in ("L", "RGB"):
        raise DisagreementError(f"mode: {found.mode}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            plain = (
                image.mode in ("L", "RGB") and not image.has_transparency_data and image.getexif().get(0x0112, 1) == 1
            )
            theirs = np.asarray(image)
    except Exception as e:
        raise DisagreementError(f"Pillow refuses: {type(e).__name__} {e}") from e
    if plain and not np.array_equal(theirs, np.asarray(found)):
        raise DisagreementError("pixels: differ from Pillow's")


# An image of MOST_PIXELS takes 4 bytes a pixel in Pillow, and a second copy where it is turned or converted.
_MEMORY = MEMORY * 2 + (64 << 20)
TARGETS = tuple(
    Target(
        name=kind.lower(),
        read=_read,
        seeds=partial(_seeds, kind),
        hostile=partial(_hostile_of, kind),
        refuses=UNREADABLE,
        oracle=_as_pillow,
        mutate=mutate_png if kind == "PNG" else mutate_bytes,
        largest=1 << 12,
        memory=_MEMORY,
    )
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF")
)
