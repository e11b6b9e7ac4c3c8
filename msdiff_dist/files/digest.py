"""Checksums of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

_CHUNK = 1 << 20


def sha256_of(path: Path, read: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file's content, in hexadecimal. The file is not held in memory.

    Args:
        read: called with the number of bytes that were read, many times.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as f:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        while size := f.readinto(buffer):
            digest.update(buffer[:size])
            read(size)
        return digest.hexdigest()
