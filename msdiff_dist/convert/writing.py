"""Writing tensors one at a time, and results that are complete or absent."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msdiff_dist.checkpoint.tensor_file import TensorReader, TensorWriter
from msdiff_dist.convert.tensor_sources import PICKLES, RESIDENT, TensorSource
from msdiff_dist.errors import CheckpointError
from msdiff_dist.files.atomic import atomic_path, writing
from msdiff_dist.files.digest import sha256_of

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_safetensors(path: Path, source: TensorSource, metadata: Mapping[str, str]) -> str:
    """Write all of `source` as one .safetensors file, holding one tensor at a time; returns the file's sha256."""
    keys = sorted(source.names(), key=lambda k: (-source.meta(k).element_size(), k))  # aligned, as the format asks
    with TensorWriter(path, {k: source.meta(k) for k in keys}, {"format": "pt", **metadata}) as writer:
        for key in keys:
            writer.write(key, source.read(key))
    return writer.stored.sha256


def write_state_dict(path: Path, source: TensorSource, metadata: Mapping[str, str]) -> str:
    """Write `source` as .safetensors, or as `{"state_dict": ...}` in a torch file; returns the file's sha256.

    Raises:
        CheckpointError: the name ends neither way.
    """
    if path.suffix == ".safetensors":
        return write_safetensors(path, source, metadata)
    if path.suffix not in PICKLES:
        raise CheckpointError(
            "DST", path.name, "is to be one file of LDM's",
            "Let its name end in .safetensors or .ckpt.",
        )  # fmt: skip
    # torch.save wants all tensors at once: let them be mapped from a file, and drop pages that were written.
    mapped = path.with_name(f"{path.name}.safetensors")
    try:
        write_safetensors(mapped, source, metadata)
        memory, tensors = TensorReader(mapped).mapped()
        with _Dropping(path, memory) as f:
            torch.save({"state_dict": {k: tensors[k] for k in source.names()}, **metadata}, f)
    finally:
        mapped.unlink(missing_ok=True)
    return sha256_of(path)


class _Dropping(io.BufferedWriter):
    """A file to write mapped memory to, which does not stay resident."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._memory, self._resident = memory, 0

    def write(self, data: Buffer) -> int:
        self._resident += memoryview(data).nbytes
        if self._resident > RESIDENT:
            self._memory.madvise(mmap.MADV_DONTNEED)
            self._resident = 0
        return super().write(data)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder at, which becomes `path` when the block ends without an error.

    Raises:
        CheckpointError: `path` exists already, or cannot be written.
    """
    with writing("DST", path, CheckpointError), atomic_path(path) as aside:
        yield aside
