"""Writing tensors one at a time, and folders that are complete or absent."""

from __future__ import annotations

import hashlib
import io
import mmap
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msdiff_dist.checkpoint.tensor_file import TensorReader, TensorWriter
from msdiff_dist.convert.sources import PICKLES, RESIDENT, TensorSource
from msdiff_dist.errors import CheckpointError

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


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder at, which becomes `path` when the block ends without an error.

    Raises:
        CheckpointError: `path` exists already, or cannot be written.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError("DST", str(path), "exists already", "Name a new file or folder, or remove it.")
    folder = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder / path.name
        if path.is_dir():
            path.rmdir()
        (folder / path.name).rename(path)
    except OSError as e:
        raise CheckpointError("DST", str(path), f"cannot be written ({e})", "Free space, or name another.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
