"""A grid of pictures while training: every rank samples its share."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.evaluation.generate import Generator
from msdiff_dist.evaluation.grid import class_labels, write_grid
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.recipe import Recipe


def write_preview(recipe: Recipe, weights: Path, target: Path, env: Environment) -> None:
    """Sample the recipe's grid with `weights`, which is removed afterwards. Collective."""
    config = recipe.preview
    own = list(range(env.rank, config.num, env.world_size))
    images: Tensor | None = None
    if own:
        generator = Generator(CheckpointWeights(CheckpointReader(weights)), env.device)
        labels = class_labels(own, recipe.model.num_classes)
        images = generator(own, config.sampler, config.seed, labels, config.prompts)
    gathered: list[Tensor | None] | None = [None] * env.world_size if env.rank == 0 else None
    dist.gather_object(images, gathered, dst=0)
    if gathered is not None:
        parts = [g for g in gathered if g is not None]
        every = torch.empty(config.num, *parts[0].shape[1:], dtype=torch.uint8)
        for rank, part in enumerate(parts):
            every[rank :: env.world_size] = part
        write_grid(every, target, recipe.model.num_classes if (recipe.model.num_classes or 99) <= 20 else None)
        shutil.rmtree(weights)
