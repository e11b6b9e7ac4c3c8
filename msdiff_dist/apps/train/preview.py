"""A grid of images while training: every rank samples its share."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.distributed.agree import gathered
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import write_grid
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.recipe import Recipe


def write_preview(recipe: Recipe, weights: Path, target: Path, env: Environment) -> None:
    """Sample the recipe's grid with `weights`, which is removed afterwards. Collective."""
    config, num_classes = recipe.preview, recipe.model.num_classes
    job = SamplingJob(num=config.num, seed=config.seed, sampler=config.sampler, prompts=config.prompts)
    own = range(env.rank, job.num, env.world_size)
    images: Tensor | None = None
    if own:
        generator = ImageGenerator(CheckpointWeights(CheckpointReader(weights)), env.device)
        images = job.draw(generator, own)
    parts = [part for part in gathered(images) if part is not None]
    if env.rank == 0:
        every = torch.empty(job.num, *parts[0].shape[1:], dtype=torch.uint8)
        for rank, part in enumerate(parts):
            every[rank :: env.world_size] = part
        write_grid(every, target, job.columns(num_classes))
        shutil.rmtree(weights)
