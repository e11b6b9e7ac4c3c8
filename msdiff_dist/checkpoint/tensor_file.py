"""safetensors files of float32 tensors, written and read as streams: nothing is held twice, nothing is mapped.

A file is 8 bytes with the header's length, the header as JSON (name -> dtype, shape, place), then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from msdiff_dist.errors import CheckpointError

_ITEM = 4  # bytes of a float32
_CHUNK = 1 << 24


class DamagedError(CheckpointError):
    """A file of a checkpoint or export is missing, cut short or changed."""


def damaged(path: Path, problem: str) -> DamagedError:
    """The error that a file is not as it was written."""
    return DamagedError("file", str(path), f"is damaged: {problem}", "Use another checkpoint, or restore the file.")


@dataclass(frozen=True)
class StoredFile:
    """One file as it was written. keys: number of elements of each tensor."""

    name: str
    size: int
    sha256: str
    keys: dict[str, int]


class TensorWriter:
    """Writes one file tensor by tensor, in the order of `shapes`. Leave the `with` block, then ask for `stored`."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        header, offset = {}, 0
        for name, shape in shapes.items():
            size = _ITEM * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path, self._shapes = path, dict(shapes)
        self._waiting = iter(shapes)
        self._digest, self._size = hashlib.sha256(), 0
        self._file: IO[bytes] = path.open("wb")
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> TensorWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor: float32 on the CPU."""
        assert name == next(self._waiting)
        assert tensor.dtype == torch.float32
        assert tuple(tensor.shape) == tuple(self._shapes[name])
        self._put(_bytes_of(tensor.contiguous()))

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                assert next(self._waiting, None) is None
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def stored(self) -> StoredFile:
        """What was written."""
        keys = {name: math.prod(shape) for name, shape in self._shapes.items()}
        return StoredFile(self.path.name, self._size, self._digest.hexdigest(), keys)

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._file.write(chunk)
            self._digest.update(chunk)
        self._size += len(data)


class TensorReader:
    """Reads stretches of one file's tensors.

    Raises:
        DamagedError: the file is missing, cut short, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb", buffering=0)
            self._begin, self.shapes, self._offsets = self._header()
        except OSError as e:
            raise damaged(path, e.strerror or str(e)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged(path, "its header is not that of a safetensors file of float32") from None

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous float32 on the CPU, with the elements of the flattened tensor from `start`."""
        if name not in self.shapes:
            raise damaged(self.path, f"it has no {name}")
        at, target = self._begin + self._offsets[name] + _ITEM * start, _bytes_of(out)
        while len(target):
            count = os.preadv(self._file.fileno(), [target], at)
            if not count:
                raise damaged(self.path, f"it ends in {name}")
            at, target = at + count, target[count:]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        out = torch.empty(self.shapes.get(name, ()))
        self.read(name, 0, out)
        return out

    def _header(self) -> tuple[int, dict[str, tuple[int, ...]], dict[str, int]]:
        size, length = os.fstat(self._file.fileno()).st_size, int.from_bytes(self._file.read(8), "little")
        if length > size - 8:
            raise ValueError
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        if any(entry["dtype"] != "F32" for entry in header.values()):
            raise ValueError
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != size:
            raise damaged(self.path, f"it has {size} bytes where its header says {end}")
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return 8 + length, shapes, {name: entry["data_offsets"][0] for name, entry in header.items()}


def check_size(path: Path, stored: StoredFile) -> None:
    """Compare a file's size with what was written.

    Raises:
        DamagedError: it differs, or the file is missing.
    """
    size = path.stat().st_size if path.exists() else None
    if size != stored.size:
        problem = "it is missing" if size is None else f"it has {size} bytes and was written with {stored.size}"
        raise damaged(path, problem)


def check_content(path: Path, stored: StoredFile) -> None:
    """Compare a file with its checksum.

    Raises:
        DamagedError: it differs, or the file is missing.
    """
    check_size(path, stored)
    with path.open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != stored.sha256:
            raise damaged(path, "its content changed since it was written (sha256 differs)")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).numpy().data.cast("B")
