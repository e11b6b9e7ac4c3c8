"""Weights to use elsewhere: plain safetensors and a config.json, written one parameter at a time.

export/
  config.json           `ModelDescription`: rebuilds the model without a recipe
  model.safetensors     every parameter
  shared.safetensors, stage_0.safetensors, ...   the same in parts: what all stages share, and each stage's own

Names are those of `MultistageUNet` in every file: `shared.*`, `stages.K.*`. A stage needs the shared file and its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from msdiff_dist import __version__
from msdiff_dist.checkpoint.tensor_file import TensorWriter
from msdiff_dist.checkpoint.weights import CONFIG, MODEL, CheckpointWeights, open_checkpoint
from msdiff_dist.config import to_mapping
from msdiff_dist.errors import CheckpointError

_METADATA = {"format": "pt"}  # what the libraries that read such files look for


def export(run: Path, out: Path, step: int | None = None, ema: bool = True) -> list[Path]:
    """Write the folder `out`, complete or not at all; returns its files. Holds one parameter in memory at a time.

    Args:
        run: a run folder, or one checkpoint.

    Raises:
        CheckpointError: no such checkpoint, it is damaged, or `out` holds files or cannot be written.
    """
    weights = CheckpointWeights(open_checkpoint(run, step, verify=True), ema)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("--out", str(out), "exists already", "Name a new folder.")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write_tensors(weights, aside)
        description = replace(weights.description, version=__version__)
        (aside / CONFIG).write_text(json.dumps(to_mapping(description), indent=1) + "\n")
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except OSError as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            "--out", str(out), f"could not be written ({e.strerror})", "Free space or name another folder."
        ) from None
    return sorted(out.iterdir())


def _write_tensors(weights: CheckpointWeights, folder: Path) -> None:
    shapes = weights.reader.index.shapes
    like = {name: torch.empty(shapes[name], device="meta") for name in weights.names()}
    with TensorWriter(folder / MODEL, like, _METADATA) as whole:
        for file, names_of_part in groupby(like, _part_file):
            names = list(names_of_part)
            with TensorWriter(folder / file, {name: like[name] for name in names}, _METADATA) as part:
                for name in names:
                    tensor = weights.tensor(name)
                    whole.write(name, tensor)
                    part.write(name, tensor)


def _part_file(name: str) -> str:
    part, stage, *_ = name.split(".")
    return f"stage_{stage}.safetensors" if part == "stages" else f"{part}.safetensors"
