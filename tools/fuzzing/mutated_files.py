"""Changes of archives and images, whose headers and chunks have checksums."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import zlib
from collections.abc import Sequence

from .mutations import mutate_bytes


def mutate_tar(rng: random.Random, data: bytes) -> bytes:
    """Fields of headers are changed, blocks repeated, removed or moved; then the headers' checksums are made right."""
    out = bytearray(data)
    headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice(headers) if headers else 0
        begin, length, values = rng.choice(_TAR_FIELDS)
        match rng.randrange(6):
            case 0 | 1 | 2:
                out[at + begin : at + begin + length] = rng.choice(values)[:length].ljust(length, b"\0")
            case 3:
                block = 512 * rng.randrange(len(out) // 512 + 1)
                out[block:block] = out[at : at + 512 * rng.choice((1, 2, 3))]
            case 4:
                del out[at : at + 512 * rng.choice((1, 2))]
            case _:
                out = bytearray(mutate_bytes(rng, bytes(out), _TAR_WORDS))
    if rng.random() < 0.95:
        for at in range(0, len(out) - 511, 512):
            if out[at + 257 : at + 262] == b"ustar":
                out[at + 148 : at + 156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    pack = rng.choice((gzip.compress, bz2.compress, lzma.compress)) if rng.random() < 0.03 else bytes
    return bytes(pack(bytes(out)))


_TAR_FIELDS: tuple[tuple[int, int, tuple[bytes, ...]], ...] = (
    (
        0,
        100,
        (b"", b"a/", b"a.png", b"..", b"../a.png", b"/a.png", b"x" * 100, b"\xff.png", b".png", b"a..png", b"a/.b.png"),
    ),
    (
        124,
        12,
        (
            b"00000000000",
            b"00000001000",
            b"77777777777",
            b"\x80" + b"\0" * 10 + b"\x01",
            b"\xff" * 12,
            b"-1",
            b" 17 ",
            b"0o17",
            b"1_0",
            b"\x80\0\0\0\x7f" + b"\xff" * 7,
        ),
    ),
    (156, 1, tuple(bytes([c]) for c in b"\x000123456789LKxgSVMNDAX")),
    (157, 100, (b"", b"a.png", b"../a", b"a", b"folder")),
    (257, 8, (b"ustar\x0000", b"ustar  \0", b"ustar")),
    (345, 155, (b"", b"p", b"p/q", b"..", b"x" * 155)),
    (386, 12, (b"00000000000", b"77777777777", b"\x80" + b"\0" * 10 + b"\x01")),
    (483, 12, (b"00000000000", b"77777777777")),
)
_TAR_WORDS = (
    b"13 path=a.b\n",
    b"12 size=10\n",
    b"25 GNU.sparse.size=99999\n",
    b"22 GNU.sparse.major=1\n",
    b"22 GNU.sparse.minor=0\n",
    b"13 path=a\nb\n",
    b"30 GNU.sparse.map=0,1,999,1\n",
    b"ustar\x0000",
)


def mutate_png(rng: random.Random, data: bytes) -> bytes:
    """Chunks are changed, added, repeated, removed or moved; their lengths and checksums are made right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks or not data.startswith(b"\x89PNG"):
        return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(chunks)), rng.randrange(len(chunks))
        kind, content = chunks[i]
        match rng.randrange(6):
            case 0 | 1:
                if kind == b"IDAT":
                    try:
                        content = zlib.decompress(content)
                    except zlib.error:
                        content = b"\0"
                    chunks[i] = (kind, zlib.compress(mutate_bytes(rng, content)))
                else:
                    chunks[i] = (kind, mutate_bytes(rng, content))
            case 2:
                chunks.insert(i, rng.choice(_PNG_CHUNKS))
            case 3:
                chunks.insert(j, chunks[i])
            case 4 if len(chunks) > 1:
                del chunks[i]
            case _:
                chunks[i] = (chunks[j][0], content)
    return png_of(chunks)


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of these (type, content)."""
    pieces = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


_BOMB = zlib.compress(bytes(1 << 22))
_PNG_CHUNKS = (
    (b"zTXt", b"a\0\0" + _BOMB),
    (b"iTXt", b"a\0\1\0\0\0" + _BOMB),
    (b"iCCP", b"a\0\0" + _BOMB),
    (b"tRNS", b"\0\1"),
    (b"tRNS", b""),
    (b"tRNS", b"\0\1\0\2\0\3"),
    (b"acTL", b"\0\0\0\2\0\0\0\0"),
    (b"fcTL", bytes(26)),
    (b"fdAT", b"\0\0\0\1"),
    (b"gAMA", b"\0"),
    (b"pHYs", b""),
    (b"eXIf", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\x03\0\0\0\1\0\x06\0\0\0\0\0\0"),
    (b"eXIf", b"Exif"),
    (b"PLTE", b"\1\2"),
    (b"IHDR", b"\0\0\x20\0\0\0\x20\0\x08\2\0\0\0"),
    (b"IHDR", b"\xff" * 13),
    (b"sRGB", b""),
    (b"cHRM", b"\0"),
    (b"tIME", b""),
)
