"""IDX files, the format of MNIST: two zero bytes, element type, number of dimensions, sizes, then the values."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BYTES = 0x08  # the format's code for unsigned bytes


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in a file, which is gzipped if its name ends in .gz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an IDX file of bytes, or its length does not fit its shape.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{rank}I", data, 4)
    except (EOFError, struct.error, zlib.error) as e:
        raise ValueError(f"cut short or not an IDX file: {e}") from None
    if (zeros, kind) != (0, _BYTES):
        raise ValueError("not an IDX file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
