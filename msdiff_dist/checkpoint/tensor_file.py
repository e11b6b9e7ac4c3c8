"""safetensors files written and read tensor by tensor, or by ranges of tensors.

The library of that name writes a file from tensors that are all in memory at once, and computes no checksum. Here a
file is written as a stream and hashed on the way, and a range is read without the rest of its tensor.

A file is 8 bytes with the header's length (little-endian), the header as JSON (name -> dtype, shape, place), then the
tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.files.safetensors_header import HeaderError, read_header

# By the names that safetensors headers use.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # bytes written and hashed at a time


class CorruptError(CheckpointError):
    """A file of a checkpoint or export is missing, cut short or changed."""


def corrupt(path: Path, problem: str) -> CorruptError:
    """The error that a file is not as it was written."""
    return CorruptError("file", str(path), f"is corrupt: {problem}", "Use another checkpoint, or restore the file.")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file as it was written, for the index of its checkpoint.

    Attributes:
        name: file name inside the checkpoint folder.
        size: bytes.
        sha256: hex digest of the content.
        keys: number of elements of each tensor, by key.
    """

    name: str
    size: int
    sha256: str
    keys: dict[str, int]


class TensorWriter:
    """Writes one file tensor by tensor, in a `with` block. After the block `stored` describes the file.

    Args:
        like: tensors of the types and shapes to come, by name, in order. They may be on the meta device.
        metadata: text by name, kept in the header.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, tensor in like.items():
            end = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors' bytes begin at a multiple of 8, as the library has it
        self.path, self._like = path, like
        self._waiting = iter(like)
        self._digest, self._size = hashlib.sha256(), 0
        self._file: IO[bytes] = path.open("wb")
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> TensorWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of `like`, which must be on the CPU."""
        assert name == next(self._waiting)
        assert tensor.dtype == self._like[name].dtype
        assert tensor.shape == self._like[name].shape
        self._put(_bytes_of(tensor.contiguous()))

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                assert next(self._waiting, None) is None
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def stored(self) -> StoredFile:
        """The file as it was written."""
        keys = {name: tensor.numel() for name, tensor in self._like.items()}
        return StoredFile(name=self.path.name, size=self._size, sha256=self._digest.hexdigest(), keys=keys)

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._file.write(chunk)
            self._digest.update(chunk)
        self._size += len(data)


class TensorReader:
    """Reads tensors of one file, whole or in part. The file is closed when the reader is no longer referenced.

    Attributes:
        like: meta tensors with every stored tensor's type and shape, by name.
        metadata: text by name from the header.

    Raises:
        CorruptError: the file is missing, cut short, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)  # readers live in caches and sources, which end without a call
            header = read_header(self._file.read, os.fstat(self._file.fileno()).st_size)
        except OSError as e:
            raise corrupt(path, e.strerror or str(e)) from None
        except HeaderError as e:
            raise corrupt(path, str(e)) from None
        self.metadata = header.metadata
        self.like = {n: torch.empty(p.shape, dtype=DTYPES[p.dtype], device="meta") for n, p in header.tensors.items()}
        self._offsets = {name: place.start for name, place in header.tensors.items()}

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with elements of the flattened tensor `name`, from index `start`.

        Args:
            out: contiguous, on the CPU, of the stored type.

        Raises:
            CorruptError: there is no such tensor of that type, or it, or the file, ends before the last element.
        """
        if name not in self.like or self.like[name].dtype != out.dtype:
            raise corrupt(self.path, f"it has no {out.dtype} tensor {name}")
        if start + out.numel() > self.like[name].numel():  # what follows in the file is another tensor
            raise corrupt(self.path, f"{name} ends before element {start + out.numel()}")
        at, target = self._offsets[name] + start * out.element_size(), _bytes_of(out)
        while len(target):  # the system may read less than it is asked for: 2 GiB at most on Linux
            count = os.preadv(self._file.fileno(), [target], at)
            if not count:
                raise corrupt(self.path, f"it ends in {name}")
            at, target = at + count, target[count:]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU."""
        out = torch.empty_like(self.like[name], device="cpu")
        self.read(name, 0, out)
        return out

    def mapped(self) -> tuple[mmap.mmap, dict[str, Tensor]]:
        """The file mapped as private memory (writes do not reach the file), and every tensor as a view of it.

        Each tensor has a storage of its own, so `torch.save` writes its elements alone. Through the mapping a caller
        can drop pages that it has read.
        """
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {n: torch.empty_like(like, device="cpu") for n, like in self.like.items() if not like.numel()}
        for name, like in self.like.items():
            if name not in tensors:
                flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=self._offsets[name])
                tensors[name] = flat.view(like.shape)
        return memory, tensors


def check_size(path: Path, stored: StoredFile) -> None:
    """Compare a file's size with that in the index.

    Raises:
        CorruptError: it differs, or the file is missing.
    """
    size = path.stat().st_size if path.exists() else None
    if size != stored.size:
        problem = "it is missing" if size is None else f"it has {size} bytes and was written with {stored.size}"
        raise corrupt(path, problem)


def check_content(path: Path, stored: StoredFile, read: Callable[[int], object] = lambda size: None) -> None:
    """Compare a file's content with the checksum in the index.

    Args:
        read: called with the number of bytes that were read, many times.

    Raises:
        CorruptError: it differs, or the file is missing.
    """
    check_size(path, stored)
    if sha256_of(path, read) != stored.sha256:
        raise corrupt(path, "its content changed since it was written (sha256 differs)")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it. Viewed as uint8 first: numpy has no bfloat16."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
