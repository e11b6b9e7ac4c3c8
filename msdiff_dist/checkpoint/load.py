"""Reading a checkpoint by parameter name, whatever layout wrote it.

A rank asks for the ranges that its own layout holds; the reader finds the stored ranges that overlap them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from msdiff_dist.checkpoint.layout import CheckpointIndex, parse_key
from msdiff_dist.checkpoint.save import GATHERED, Averages
from msdiff_dist.checkpoint.tensor_file import TensorReader, check_content, check_size, corrupt
from msdiff_dist.distributed.frozen_weights import Fragment
from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import CheckpointError
from msdiff_dist.terminal import LongWork


class CheckpointReader:
    """Reads ranges and whole tensors of one checkpoint. Opens and reads no more than what is asked for.

    Args:
        open_files: how many files may be open at a time.

    Attributes:
        index: the content of checkpoint.json.

    Raises:
        CorruptError: the index is corrupt, or a file is missing or of another size.
        CheckpointError: the checkpoint has a newer format.
    """

    def __init__(self, folder: Path, open_files: int = 64) -> None:
        self.folder = folder
        self.index = CheckpointIndex.load(folder)
        self._open: Callable[[str], TensorReader] = lru_cache(open_files)(lambda name: TensorReader(folder / name))
        # By kind and parameter: (start, numel, file, key) of every stored range.
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str, str]]] = defaultdict(list)
        for stored in self.index.files:
            check_size(folder / stored.name, stored)
            for key, numel in stored.keys.items():
                kind, name, start = parse_key(key)
                self._pieces[kind, name].append((start, numel, stored.name, key))

    @property
    def kinds(self) -> list[str]:
        """Kinds of tensors in the checkpoint: `param`, optimizer moments, averages."""
        return sorted({kind for kind, _ in self._pieces})

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the files with their checksums: every `parts`-th file from number `part`, or all.

        Raises:
            CorruptError: naming the first file that differs.
        """
        mine = self.index.files[part::parts]
        # Of several ranks one shows it.
        with LongWork("checking", sum(f.size for f in mine), "MB") if part == 0 else nullcontext() as work:
            for stored in mine:
                check_content(self.folder / stored.name, stored, work.advance if work else lambda size: None)

    def names(self, prefix: str = "") -> list[str]:
        """Parameters whose names begin with `prefix`."""
        return [n for n in self.index.shapes if n.startswith(prefix)]

    def holds(self, kind: str, name: str) -> bool:
        """Whether there is any of that kind of a parameter: frozen ones have no moments."""
        return bool(self._pieces.get((kind, name)))

    def read_range(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened `kind` of parameter `name`, float32.

        Raises:
            CorruptError: some of them are not stored.
        """
        out = torch.empty(numel)
        filled = 0  # stored ranges do not overlap, so a count is enough to know that every element was found
        for at, length, file, key in self._pieces[kind, name]:
            low, high = max(at, start), min(at + length, start + numel)
            if low < high:
                self._open(file).read(key, low - at, out[low - start : high - start])
                filled += high - low
        if filled != numel:
            raise corrupt(self.folder, f"it holds {filled} of {numel} elements of {kind} of {name}")
        return out

    def tensor(self, kind: str, name: str) -> Tensor:
        """The whole `kind` of parameter `name`, in its shape, float32."""
        shape = self.index.shapes[name]
        return self.read_range(kind, name, 0, math.prod(shape)).view(shape)

    def module_state(self, kind: str, prefix: str) -> dict[str, Tensor]:
        """State dict of the part of the model under `prefix` (`shared.`, `stages.1.`), without the prefix."""
        return {name.removeprefix(prefix): self.tensor(kind, name) for name in self.names(prefix)}


def check_architecture(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the names and shapes of the checkpoint's parameters with those of the model being trained.

    Raises:
        CheckpointError: naming the first parameter that differs, and how many do.
    """
    stored = reader.index.shapes
    differing = [n for n in sorted({*stored, *shapes}) if stored.get(n) != shapes.get(n)]
    if differing:
        first = differing[0]
        before, now = (list(s[first]) if first in s else "absent" for s in (stored, shapes))
        raise CheckpointError(
            "checkpoint", str(reader.folder),
            f"is of another architecture: {len(differing)} parameters differ, the first is {first}, {before} there and "
            f"{now} in this recipe's model",
            "Resume with the recipe that made it, or name another --run-dir.",
        )  # fmt: skip


class StateReader(Protocol):
    """What `restore` needs of a checkpoint: `CheckpointReader` has it, and what reads one as another model's."""

    index: CheckpointIndex

    @property
    def kinds(self) -> list[str]:
        """Kinds of tensors that it has."""

    def holds(self, kind: str, name: str) -> bool:
        """Whether there is any of that kind of a parameter."""

    def read_range(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened `kind` of parameter `name`, float32."""


def restore(
    reader: StateReader,
    state: Mapping[str, ShardedState],
    averages: Averages,
    began: Mapping[str, int],
    own_steps: Mapping[str, int],
) -> None:
    """Put weights, moments and averages of a checkpoint into this rank's shards.

    Collective: once the shards are filled, the network's own weights are gathered from them. An average that the
    checkpoint does not have begins at the weights; that is so where a run branched with further averages.

    Args:
        began: by prefix of the parameter names, the step at which the part's optimizer began. One that begins at the
            checkpoint's own step has no moments.
        own_steps: by prefix, optimizer steps of parts that have not stepped in every step since.

    Raises:
        CorruptError: an element is missing.
    """
    kinds = reader.kinds
    for prefix, shards in state.items():

        def read(kind: str, f: Fragment, prefix: str = prefix) -> Tensor:
            return reader.read_range(kind, prefix + f.name, f.start, f.numel)

        steps = own_steps.get(prefix, reader.index.step - began.get(prefix, 0))
        shards.restore(read, reader.index.moments if steps else [], steps)
        for f in shards.fragments if shards.gathered else ():
            waiting = shards.gathered[f.flat][f.offset : f.offset + f.numel]
            if reader.holds(GATHERED, prefix + f.name):
                waiting.copy_(read(GATHERED, f))
            else:
                waiting.zero_()
        for kind, average in averages.items():
            source = kind if kind in kinds else "param"
            for f in shards.fragments:
                average[prefix][f.flat][f.offset : f.offset + f.numel].copy_(read(source, f))
        for kind, flats in shards.frozen.averages.items():
            source = kind if kind in kinds else "param"
            for f in shards.frozen.fragments:
                flats[f.flat][f.offset : f.offset + f.numel].copy_(read(source, f))


def start_from(
    read_range: Callable[[str, int, int], Tensor], state: Mapping[str, ShardedState], averages: Averages
) -> None:
    """Put weights into this rank's shards, and into every average of them. Collective as `restore` is.

    Args:
        read_range: (name, start, numel) -> elements of the flattened parameter, float32.
    """
    for prefix, shards in state.items():

        def read(kind: str, f: Fragment, prefix: str = prefix) -> Tensor:
            return read_range(prefix + f.name, f.start, f.numel)

        shards.restore(read, moments=[], optimizer_steps=0)
        for average in averages.values():
            for values, flat in zip(average[prefix], shards.flats(), strict=True):
                values.copy_(flat.detach())
        for kept in shards.frozen.averages.values():
            for values, flat in zip(kept, shards.frozen.flats, strict=True):
                values.copy_(flat)
