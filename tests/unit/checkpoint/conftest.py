"""A run folder with checkpoints of a small model, made without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.checkpoint.layout import INDEX, CheckpointIndex, key_of, step_folder
from msdiff_dist.checkpoint.tensor_file import TensorWriter
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model
from msdiff_dist.recipe import recipe_from, recipe_mapping

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "synthetic", "latent_shape": [2, 8, 8], "num_classes": 3},
    "stages": {"boundaries": [442, 631]},
    "model": {
        "in_channels": 2, "out_channels": 2, "encoder_channels": 8, "decoder_channels": [12, 8, 4],
        "channel_mult": [1, 2], "num_res_blocks": 1, "attention_downsamples": [2], "num_heads": 2, "norm_groups": 4,
        "num_classes": 3,
    },
    "optimizer": {"lr": 1e-4},
    "train": {"steps": 10, "global_batch_size": 6, "precision": "fp32"},
}  # fmt: skip


Values = dict[str, dict[str, torch.Tensor]]


def _write(run: Path, step: int, changes: dict[str, Any] | None = None) -> Values:
    """A checkpoint of two ranks that split every parameter in the middle. Returns param and ema by name."""
    parsed = recipe_from(RECIPE | (changes or {}))
    shapes = {name: tuple(p.shape) for name, p in build_model(parsed.model).named_parameters()}
    generator = torch.Generator().manual_seed(step)
    values = {k: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for k in ("param", "ema")}
    folder = step_folder(run / "checkpoints", step)
    folder.mkdir(parents=True)
    files = []
    for rank in (0, 1):
        pieces = {}
        for kind, tensors in values.items():
            for name, tensor in tensors.items():
                middle = math.ceil(tensor.numel() / 2)
                start, half = (0, tensor.flatten()[:middle]) if rank == 0 else (middle, tensor.flatten()[middle:])
                if len(half):
                    pieces[key_of(kind, name, start)] = half
        with TensorWriter(folder / f"rank_{rank:05d}.safetensors", pieces) as writer:
            for key, piece in pieces.items():
                writer.write(key, piece)
        files.append(writer.stored)
    index = CheckpointIndex(
        step=step,
        batch_size=6,
        loss=0.5,
        recipe=recipe_mapping(parsed),
        shapes=dict(sorted(shapes.items())),
        moments=[],
        world_size=2,
        files=files,
    )
    (folder / INDEX).write_text(index.dump())
    return values


@pytest.fixture
def write_checkpoint() -> Callable[..., Values]:
    """(run, step, changes of the recipe) -> values: makes a checkpoint."""
    return _write


@pytest.fixture
def model() -> MultistageUNet:
    """The checkpoints' model, with values of its own."""
    return build_model(recipe_from(RECIPE).model).eval()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5."""
    _write(tmp_path / "run", 3)
    _write(tmp_path / "run", 5)
    return tmp_path / "run"
