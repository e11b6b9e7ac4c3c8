"""Weights to use elsewhere: plain safetensors and a config.json, written one parameter at a time.

export/
  config.json           `ModelDescription`: rebuilds the model without a recipe
  model.safetensors     every parameter
  shared.safetensors, stage_0.safetensors, ...   the same in parts: what all stages share, and each stage's own

Names are those of `MultistageUNet` in every file: `shared.*`, `stages.K.*`. A stage needs the shared file and its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist import __version__
from msdiff_dist.checkpoint.tensor_file import TensorWriter
from msdiff_dist.config import to_mapping
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.posthoc import open_posthoc
from msdiff_dist.export.weights import CONFIG, MODEL, CheckpointWeights, open_checkpoint
from msdiff_dist.files.atomic import atomic_folder, writing

_METADATA = {"format": "pt"}  # what the libraries that read such files look for


def export(
    run: Path, out: Path, step: int | None = None, ema: bool = True, ema_length: float | None = None
) -> list[Path]:
    """Write the folder `out`, complete or not at all; returns its files. Holds one parameter in memory at a time.

    Args:
        run: a run folder, or one checkpoint.
        ema_length: of an average made from the run's snapshots, relative to the training so far.

    Raises:
        CheckpointError: no such checkpoint, it is corrupt, or `out` holds files or cannot be written; or an average of
            that length cannot be made.
    """
    if ema_length is None:
        weights = CheckpointWeights(open_checkpoint(run, step, verify=True), ema)
    elif ema:
        weights = open_posthoc(run, ema_length, step)
    else:
        raise CheckpointError("--ema-length", ema_length, "--raw asks for weights that are no average", "Keep one.")
    with writing("--out", out, CheckpointError), atomic_folder(out) as aside:
        shapes = weights.reader.index.shapes
        like = {name: torch.empty(shapes[name], device="meta") for name in weights.names()}
        write_tensors(aside, like, weights.tensor, {})
        description = replace(weights.description, version=__version__)
        (aside / CONFIG).write_text(json.dumps(to_mapping(description), indent=1) + "\n")
    return sorted(out.iterdir())


def write_tensors(
    folder: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write every file of parameters of an export, reading each parameter once; returns their sha256 by name.

    Args:
        like: every parameter's type and shape.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))  # aligned, as the format asks
    files = {MODEL: names}
    for name in names:
        files.setdefault(_part_file(name), []).append(name)
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(
                TensorWriter(folder / file, {n: like[n] for n in held}, {**_METADATA, **metadata})
            )
            for file, held in files.items()
        }
        for name in names:
            tensor = read(name)
            writers[MODEL].write(name, tensor)
            writers[_part_file(name)].write(name, tensor)
    return {file: writer.stored.sha256 for file, writer in writers.items()}


def _part_file(name: str) -> str:
    part, stage, *_ = name.split(".")
    return f"stage_{stage}.safetensors" if part == "stages" else f"{part}.safetensors"
