"""Reading a checkpoint by parameter name, whatever layout wrote it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msdiff_dist.checkpoint.layout import CheckpointIndex, complete_checkpoints, parse_key, sha256_of
from msdiff_dist.distributed.zero_state import Fragment, ShardedState
from msdiff_dist.errors import CheckpointError


class CheckpointReader:
    """Stretches and whole tensors of one checkpoint. Opens no more than what is asked for.

    Raises:
        CheckpointError: a file is missing, cut short or damaged, or a parameter is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = CheckpointIndex.load(folder)
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = defaultdict(list)
        for stored in self.index.files:
            path = folder / stored.name
            if not path.exists() or path.stat().st_size != stored.size:
                found = path.stat().st_size if path.exists() else None
                raise CheckpointError(
                    str(path), found, f"should have {stored.size} bytes", "The file is damaged: use another checkpoint."
                )
            for key, numel in self._keys(path):
                kind, name, start = parse_key(key)
                self._pieces[kind, name].append((start, numel, path, key))

    def verify(self) -> None:
        """Compare every file with its checksum."""
        for stored in self.index.files:
            path = self.folder / stored.name
            if sha256_of(path) != stored.sha256:
                raise CheckpointError(str(path), stored.sha256, "its content changed since it was written",
                                      "The file is damaged: use another checkpoint.")  # fmt: skip

    def names(self, prefix: str = "") -> list[str]:
        """Parameters whose names begin with `prefix`."""
        return [n for n in self.index.shapes if n.startswith(prefix)]

    def stretch(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened `kind` of parameter `name`, float32."""
        out = torch.empty(numel)
        filled = 0
        for at, length, path, key in self._pieces[kind, name]:
            low, high = max(at, start), min(at + length, start + numel)
            if low < high:
                with safe_open(path, "pt") as f:
                    out[low - start : high - start] = f.get_slice(key)[low - at : high - at]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                str(self.folder), name, f"holds {filled} of {numel} elements of its {kind}", "Use another checkpoint."
            )
        return out

    def tensor(self, kind: str, name: str) -> Tensor:
        """The whole `kind` of parameter `name`, in its shape."""
        shape = self.index.shapes[name]
        return self.stretch(kind, name, 0, math.prod(shape)).view(shape)

    def module_state(self, kind: str, prefix: str) -> dict[str, Tensor]:
        """State dict of the part of the model under `prefix` (`shared.`, `stages.1.`), prefix removed."""
        return {name.removeprefix(prefix): self.tensor(kind, name) for name in self.names(prefix)}

    def _keys(self, path: Path) -> Iterator[tuple[str, int]]:
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():  # noqa: SIM118
                    yield key, f.get_slice(key).get_shape()[0]
        except SafetensorError as e:
            raise CheckpointError(str(path), None, f"is damaged ({e})", "Use another checkpoint.") from None


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete_checkpoints(checkpoints)
    return found[-1] if found else None


def restore(reader: CheckpointReader, state: Mapping[str, ShardedState], ema: Mapping[str, list[Tensor]]) -> None:
    """Put weights, moments and EMA of a checkpoint into this rank's shards. Collective: weights are gathered.

    Raises:
        CheckpointError: the model of the checkpoint is not the one being trained.
    """
    for prefix, shards in state.items():
        for name, shape in shards.shapes.items():
            stored = reader.index.shapes.get(prefix + name)
            if stored != shape:
                raise CheckpointError(
                    prefix + name, stored, f"has shape {list(shape)} in this recipe's model",
                    "Resume with the recipe that made the checkpoint.",
                )  # fmt: skip

        def read(kind: str, f: Fragment, prefix: str = prefix) -> Tensor:
            return reader.stretch(kind, prefix + f.name, f.start, f.numel)

        shards.restore(read, reader.index.moments, reader.index.step)
        for f in shards.fragments:
            ema[prefix][f.flat][f.offset : f.offset + f.numel].copy_(read("ema", f))
