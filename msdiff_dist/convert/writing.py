"""Writes tensors one at a time to .safetensors or torch files, and makes results appear complete or not at all."""

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
from msdiff_dist.terminal import LongWork

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_safetensors(path: Path, source: TensorSource, metadata: Mapping[str, str]) -> str:
    """Write all of `source` as one .safetensors file, holding one tensor at a time; returns the file's sha256."""
    # Widest elements first, as safetensors' own writer does: tensors then start at multiples of their element sizes.
    keys = sorted(source.names(), key=lambda k: (-source.meta(k).element_size(), k))
    like = {key: source.meta(key) for key in keys}
    with (
        TensorWriter(path, like, {"format": "pt", **metadata}) as writer,
        LongWork("writing", sum(meta.nbytes for meta in like.values()), "MB") as work,
    ):
        for key in keys:
            writer.write(key, source.read(key))
            work.advance(like[key].nbytes)
    return writer.stored.sha256


def write_state_dict(path: Path, source: TensorSource, metadata: Mapping[str, str]) -> str:
    """Write `source` as a .safetensors file, or as `{"state_dict": ...}` in a torch file; returns the file's sha256.

    Args:
        path: its suffix decides between the two.
        metadata: added to the header of a .safetensors file, or beside `state_dict` in a torch file.

    Raises:
        CheckpointError: the suffix is that of neither.
    """
    if path.suffix == ".safetensors":
        return write_safetensors(path, source, metadata)
    if path.suffix not in PICKLES:
        raise CheckpointError(
            "DST", path.name, "must be the name of a .safetensors or torch file in this format",
            "Let it end in .safetensors or .ckpt.",
        )  # fmt: skip
    # torch.save takes all tensors at once. So that they need not all be in memory, they are first written to a
    # temporary file and mapped from it; `_DroppingWriter` frees the pages that were read.
    mapped = path.with_name(f"{path.name}.safetensors")
    try:
        write_safetensors(mapped, source, metadata)
        memory, tensors = TensorReader(mapped).mapped()
        with _DroppingWriter(path, memory) as f:
            torch.save({"state_dict": {k: tensors[k] for k in source.names()}, **metadata}, f)
    finally:
        mapped.unlink(missing_ok=True)
    return sha256_of(path)


class _DroppingWriter(io.BufferedWriter):
    """A file for the content of mapped memory, which frees that memory's pages after every `RESIDENT` bytes."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._memory, self._resident = memory, 0

    def write(self, data: Buffer) -> int:
        self._resident += memoryview(data).nbytes
        if self._resident > RESIDENT:
            # The pages were never changed, so the kernel can read them from the file again if need be.
            self._memory.madvise(mmap.MADV_DONTNEED)
            self._resident = 0
        return super().write(data)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path for a new file or folder, which becomes `path` when the block ends without an error.

    Raises:
        CheckpointError: `path` exists already, or cannot be written.
    """
    with writing("DST", path, CheckpointError), atomic_path(path) as aside:
        yield aside
