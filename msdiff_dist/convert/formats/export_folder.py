"""The format `msdiff`: an export folder, with the frozen networks in it, if any, or a checkpoint of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist import __version__
from msdiff_dist.checkpoint.layout import INDEX, checkpoints_below
from msdiff_dist.checkpoint.what_is import what_is
from msdiff_dist.config import to_mapping
from msdiff_dist.convert.formats.frozen_networks import AUTOENCODER, TEXT, with_described_networks, write_frozen
from msdiff_dist.convert.key_map import SAME, OursFromTheirs, Rule, check_complete
from msdiff_dist.convert.model_weights import ModelWeights, Written, empty_model
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.convert.recognition import format_at, refuse_other_formats
from msdiff_dist.convert.tensor_sources import SafetensorsSource, TensorSource
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.export import write_tensors
from msdiff_dist.export.weights import CONFIG, MODEL, CheckpointWeights, ExportWeights, export_folder, open_checkpoint
from msdiff_dist.models.text_encoder import TextEncoderConfig


def read_msdiff(path: Path, options: ConvertOptions) -> ModelWeights:
    """An export, a run folder (its newest checkpoint), one checkpoint, or a file in one of them.

    Raises:
        CheckpointError: it is nothing of these; the error says what it is.
    """
    folder = export_folder(path)
    if folder is not None:
        return read_export(folder, options)
    if checkpoints_below(path) or (path if path.is_dir() else path.parent).joinpath(INDEX).is_file():
        return read_run(path, options)
    other = format_at(path)
    what, remedy = what_is(path) if other is None else (f"is of format {other}", f"Use --from {other}.")
    raise CheckpointError("SRC", str(path), what, remedy)


def read_export(folder: Path, options: ConvertOptions) -> ModelWeights:
    """Open an export folder.

    Raises:
        CheckpointError: it is incomplete.
    """
    description = ExportWeights(folder).description
    if options.weights not in ("auto", description.weights):
        raise CheckpointError(
            "--weights", options.weights, f"{folder} holds {description.weights} weights only",
            "Remove --weights, or export the others with `msdiff export`.",
        )  # fmt: skip
    source = SafetensorsSource([folder / MODEL])
    refuse_other_formats(source.names(), "msdiff")
    shapes = dict(empty_model(description.model).named_parameters())
    rules = [Rule(name, (name,), SAME) for name in shapes]
    check_complete(source, rules, {}, shapes, "msdiff")
    found = ModelWeights(
        description=description,
        tensors=OursFromTheirs(source, rules),
        used={name: [name] for name in shapes},
        notes=sorted(folder.glob("LICENSE*")) + sorted(folder.glob("SOURCE_*")),
    )
    return with_described_networks(found)


def read_run(folder: Path, options: ConvertOptions) -> ModelWeights:
    """Open the newest checkpoint of a run folder of this package, or one checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt.
    """
    weights = CheckpointWeights(open_checkpoint(folder, verify=True), ema=options.weights != "raw")
    found = ModelWeights(
        description=weights.description,
        tensors=CheckpointSource(weights),
        used={name: [name] for name in weights.names()},
    )
    return with_described_networks(found)


class CheckpointSource(TensorSource):
    """The parameters of a run's checkpoint, averaged or last."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._weights = weights
        self.files = tuple(weights.reader.folder / f.name for f in weights.reader.index.files)

    def names(self) -> list[str]:
        return self._weights.names()

    def meta(self, key: str) -> Tensor:
        return torch.empty(self._weights.reader.index.shapes[key], device="meta")

    def read(self, key: str) -> Tensor:
        return self._weights.tensor(key)


def write_export(weights: ModelWeights, folder: Path, metadata: Mapping[str, str]) -> Written:
    """Write an export folder. Its config.json names the frozen networks' folders, if any, relative to itself."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Written(names={k: [k] for k in weights.tensors.names()})
    like = {name: weights.tensors.meta(name) for name in weights.tensors.names()}
    written.files |= write_tensors(folder, like, weights.tensors.read, metadata)
    description = replace(weights.description, version=__version__)
    if weights.autoencoder_weights is not None:
        description = replace(description, autoencoder=replace(description.autoencoder, path=AUTOENCODER))
    if weights.text_encoder_weights is not None:
        description = replace(description, text_encoder=TextEncoderConfig(kind="clip", name=TEXT))
    (folder / CONFIG).write_text(json.dumps(to_mapping(description), indent=1) + "\n")
    write_frozen(weights, folder / AUTOENCODER, folder / TEXT, folder, written, metadata)
    return written
