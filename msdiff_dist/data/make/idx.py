"""IDX files, the format of MNIST: two zero bytes, element type, number of dimensions, sizes, then the values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MOST_BYTES = 2**31  # of the values
_BYTES = 0x08  # the format's code for unsigned bytes


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in a file, which is gzipped if its name ends in .gz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an IDX file of bytes, or its length does not fit its shape.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            zeros, kind, rank = struct.unpack(">HBB", stream.read(4))
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
            if (zeros, kind) != (0, _BYTES):
                raise ValueError("not an IDX file of bytes")
            # One byte more than there should be: what follows could be of any length once it is unpacked.
            size = math.prod(shape)
            data = stream.read(min(size, _MOST_BYTES) + 1)
    except (EOFError, struct.error, zlib.error) as e:
        raise ValueError(f"cut short or not an IDX file: {e}") from None
    if len(data) != size:
        raise ValueError(
            f"its shape {list(shape)} asks for {size} bytes, and it has {'more' if len(data) > size else len(data)}"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
