"""Writes an export folder: a model's weights in plain safetensors with a description, one parameter at a time.

export/
  config.json           `ModelDescription`: rebuilds the model without a recipe
  model.safetensors     every parameter
  shared.safetensors    the parameters that all stages share
  stage_0.safetensors   those of stage 0 alone; one such file for each stage

Every file uses the names of `MultistageUNet`: `shared.*`, `stages.K.*`. `model.safetensors` repeats what the others
hold: one file loads the whole model, and a program that runs one stage loads the shared file and that stage's alone.
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
from msdiff_dist.terminal import LongWork

_METADATA = {"format": "pt"}  # Hugging Face's loaders look for it; "pt" is PyTorch


def export(
    run: Path, out: Path, step: int | None = None, ema: bool = True, ema_length: float | None = None
) -> list[Path]:
    """Write the folder `out`, complete or not at all; returns its files. Holds one parameter in memory at a time.

    Args:
        run: a run folder, or one checkpoint.
        step: the run's checkpoint to export; None takes the newest.
        ema: whether to export the averaged weights or those of the last step.
        ema_length: make an average of this length from the run's snapshots instead, as a fraction of the training so
            far.

    Raises:
        CheckpointError: there is no such checkpoint, it is corrupt, an average of that length cannot be made, or `out`
            holds files or cannot be written.
    """
    if ema_length is None:
        weights = CheckpointWeights(open_checkpoint(run, step, verify=True), ema)
    elif ema:
        weights = open_posthoc(run, ema_length, step)
    else:
        raise CheckpointError(
            "--ema-length", ema_length, "--raw asks for weights that are no average", "Give one of them."
        )
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
    """Write the files of an export that hold parameters; returns each file's sha256.

    Args:
        folder: where to write; it exists.
        like: a tensor of every parameter's type and shape, which may be on the meta device.
        read: returns a parameter by name. Called once for each, although each is written to two files.
        metadata: added to the header of every file.
    """
    # Widest elements first, as safetensors' own writer does: tensors then start at multiples of their element sizes.
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    files = {MODEL: names}
    for name in names:
        files.setdefault(_module_file(name), []).append(name)
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(
                TensorWriter(folder / file, {n: like[n] for n in held}, {**_METADATA, **metadata})
            )
            for file, held in files.items()
        }
        work = stack.enter_context(LongWork("writing", sum(like[name].nbytes for name in names), "MB"))
        for name in names:
            tensor = read(name)
            writers[MODEL].write(name, tensor)
            writers[_module_file(name)].write(name, tensor)
            work.advance(like[name].nbytes)
    return {file: writer.stored.sha256 for file, writer in writers.items()}


def _module_file(name: str) -> str:
    """The file, besides the one of all parameters, that holds this parameter."""
    module, stage, *_ = name.split(".")
    return f"stage_{stage}.safetensors" if module == "stages" else f"{module}.safetensors"
