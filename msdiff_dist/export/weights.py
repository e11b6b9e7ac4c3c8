"""A model's weights and description, read alike from a run folder, a checkpoint or an export."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.checkpoint.layout import INDEX, complete_checkpoints, find_checkpoint
from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.checkpoint.tensor_file import CorruptError, TensorReader, corrupt
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.description import FORMAT, ModelDescription, describe, description_from
from msdiff_dist.files.digest import sha256_of
from msdiff_dist.files.json_text import parse_mapping
from msdiff_dist.models.projector import PREFIX

CONFIG = "config.json"
"""File of an export that holds its `ModelDescription`."""
MODEL = "model.safetensors"
"""File of an export that holds every parameter."""


class Weights(ABC):
    """A model's description and its parameters. Each parameter is read from its file when it is asked for."""

    description: ModelDescription

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all parameters, sorted."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The parameter `name`, in its shape.

        Raises:
            CorruptError: it is missing or incomplete.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter `name`, float32."""

    @abstractmethod
    def identity(self) -> str:
        """A hex digest that is the same for the same weights alone."""

    def module_state(self, prefix: str) -> dict[str, Tensor]:
        """State dict of one module: the parameters whose names begin with `prefix` (`stages.1.`), without it."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names() if name.startswith(prefix)}


class CheckpointWeights(Weights):
    """The weights of a checkpoint: the averaged ones if `ema`, else those of the last step."""

    def __init__(self, reader: CheckpointReader, ema: bool = True) -> None:
        self.reader, self._kind = reader, "ema" if ema else "param"
        if self._kind not in reader.kinds:
            raise _no_such_kind(reader, self._kind)
        index = reader.index
        self.description = replace(describe(index.recipe, index.step), weights="ema" if ema else "raw")

    def names(self) -> list[str]:
        # The projector of a guide is a part of training alone.
        return [name for name in self.reader.names() if not name.startswith(PREFIX)]

    def tensor(self, name: str) -> Tensor:
        return self.reader.tensor(self._kind, name)

    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        return self.reader.read_range(self._kind, name, start, numel)

    def identity(self) -> str:
        # The index lists the files with their digests, so nothing has to be read.
        digests = sorted(f"{stored.name} {stored.sha256}" for stored in self.reader.index.files)
        return hashlib.sha256("\n".join([self._kind, *digests]).encode()).hexdigest()


class ExportWeights(Weights):
    """The weights of an export folder.

    Raises:
        CorruptError: a file is missing, cut short or not readable.
        CheckpointError: it is of a newer format, or no export folder.
    """

    def __init__(self, folder: Path) -> None:
        description = _read_description(folder / CONFIG)
        autoencoder, text = description.autoencoder, description.text_encoder
        # The paths of networks that came along with the export are relative to the export's folder.
        if autoencoder.path and (folder / autoencoder.path).is_dir():
            autoencoder = replace(autoencoder, path=str(folder / autoencoder.path))
        if text and text.kind == "clip" and (folder / text.name).is_dir():
            text = replace(text, name=str(folder / text.name))
        self.description = replace(description, autoencoder=autoencoder, text_encoder=text)
        self._reader = TensorReader(folder / MODEL)

    def names(self) -> list[str]:
        return sorted(self._reader.like)

    def tensor(self, name: str) -> Tensor:
        return self._reader.tensor(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: tuple(like.shape) for name, like in self._reader.like.items()}

    def read_range(self, name: str, start: int, numel: int) -> Tensor:
        out = torch.empty(numel, dtype=self._reader.like[name].dtype)
        self._reader.read(name, start, out)
        return out.float()

    def identity(self) -> str:
        return sha256_of(self._reader.path)


def open_weights(path: Path, step: int | None = None, ema: bool = True) -> Weights:
    """The weights in an export folder, a run folder or one checkpoint.

    An export holds either averaged weights or those of the last step. If it holds the latter and `ema` asks for
    averaged ones, it gives those it has, with a warning.

    Args:
        step: the run's checkpoint to read; None takes the newest. Without meaning for an export.
        ema: whether to read the averaged weights or those of the last step.

    Raises:
        CheckpointError: there are none, they are corrupt, or `ema` is false and an export holds averaged ones only.
    """
    folder = export_folder(path)
    if folder is None:
        return CheckpointWeights(open_checkpoint(path, step), ema)
    weights = ExportWeights(folder)
    held = weights.description.weights
    if held == "ema" and not ema:
        raise CheckpointError(
            "ema",
            ema,
            f"{path} holds averaged weights only",
            "Export the last ones with `msdiff export --raw`.",
        )
    if held == "raw" and ema:
        warnings.warn(f"{path} holds the last weights, not averaged ones", stacklevel=3)
    return weights


def export_folder(path: Path) -> Path | None:
    """The folder of the export that `path` is, or is a file of; None for anything else."""
    path = path.expanduser()
    folder = path.parent if path.is_file() and path.suffix in (".json", ".safetensors") else path
    if (folder / INDEX).exists() or not (folder / CONFIG).is_file():
        return None
    return folder if path == folder or (folder / MODEL).is_file() else None


def _no_such_kind(reader: CheckpointReader, kind: str) -> CheckpointError:
    """The error for weights that a checkpoint does not hold: a snapshot has averages of its own lengths alone."""
    lengths = [held.removeprefix("ema_") for held in reader.kinds if held.startswith("ema_")]
    problem = "holds the last weights" if kind == "param" else "holds averages of one kind"
    remedy = "Name a checkpoint of the run."
    if lengths:
        run = reader.folder.parent.parent
        problem = f"holds averages of the lengths {', '.join(lengths)}, made for exports"
        remedy = f"Run `msdiff export {run} --ema-length {lengths[0]} --step {reader.index.step} --out EXPORT`."
    elif "param" in reader.kinds:
        problem, remedy = "holds no averaged weights", "Ask for the last ones: --raw or --weights raw."
    return CheckpointError("SRC", str(reader.folder), problem, remedy)


def open_checkpoint(path: Path, step: int | None = None, verify: bool = False) -> CheckpointReader:
    """A run folder's newest checkpoint, the run's checkpoint of `step`, or the checkpoint `path`.

    Args:
        verify: compare its files with their checksums.

    Raises:
        CheckpointError: there is none.
        CorruptError: it is corrupt; the error names the newest older checkpoint that is intact, if there is one.
    """
    folder = find_checkpoint(path, step)
    try:
        return _opened(folder, verify)
    except CorruptError as e:
        # Names hold the step in eight digits, so they sort by step.
        older = [candidate for candidate in complete_checkpoints(folder.parent) if candidate.name < folder.name]
        for candidate in reversed(older):
            try:
                _opened(candidate, verify)
            except CheckpointError:
                continue
            raise CorruptError(e.field, e.value, e.problem, f"The newest intact checkpoint is {candidate}.") from None
        raise


def _opened(folder: Path, verify: bool) -> CheckpointReader:
    reader = CheckpointReader(folder)
    if verify:
        reader.verify()
    return reader


def _read_description(path: Path) -> ModelDescription:
    try:
        raw = parse_mapping(path.read_bytes())
    except OSError as e:
        raise corrupt(path, e.strerror or str(e)) from None
    except ValueError as e:
        raise corrupt(path, f"it {e}") from None
    if isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
        raise CheckpointError(
            "export", str(path), f"has format {raw['format']}, newer than {FORMAT}", "Use a newer msdiff_dist."
        )
    # Folders of other programs have a config.json too.
    if "model" not in raw or (path.parent / INDEX).exists():
        raise CheckpointError("export", str(path.parent), "is no export folder", "Name one made by `msdiff export`.")
    return description_from(raw)
