"""`.npy` files from shards: what their header claims is compared with what is there before memory is taken."""

from __future__ import annotations

import io
import math
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from msdiff_dist.data.foreign import what_it_is


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in a .npy file, whose values come next in the stream.

    Raises:
        ValueError: it is none; the message is a clause.
    """
    try:
        major, _ = npy_format.read_magic(stream)
    except ValueError as e:
        raise ValueError("is not a .npy array") from e
    # Versions 2 and 3 differ in the encoding of the names of fields alone.
    read_header = npy_format.read_array_header_1_0 if major == 1 else npy_format.read_array_header_2_0
    try:
        shape, _, dtype = read_header(stream)
    except Exception as e:  # the header is Python source, and numpy lets through what its tokenizer and parser raise
        raise ValueError(f"has a header that is not one of a .npy array ({type(e).__name__})") from e
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"has the shape {shape}")
    return shape, dtype


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of a .npy file.

    Raises:
        ValueError, EOFError: it is none, holds Python objects, or is shorter than its header claims; the message is a
            clause.
    """
    stream = io.BytesIO(content)
    if not content.startswith(npy_format.MAGIC_PREFIX):
        raise ValueError(what_it_is(content[:512]) or "is not a .npy array")
    shape, dtype = read_npy_header(stream)
    claimed, present = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if claimed > present and not dtype.hasobject:  # np.load refuses objects
        raise ValueError(f"claims {dtype}{list(shape)}, {claimed} bytes, and has {present}")
    stream.seek(0)
    try:
        array: NDArray[Any] = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError):
        raise
    except Exception as e:
        raise ValueError(f"is not a readable .npy array ({type(e).__name__}: {e})") from e
    return array
