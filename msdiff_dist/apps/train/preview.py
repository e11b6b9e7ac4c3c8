"""A grid of images during training: every rank samples its share."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.distributed.agree import combined
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.grid import write_grid
from msdiff_dist.evaluation.sampling_job import SamplingJob
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.recipe import Recipe


def write_preview(recipe: Recipe, weights: Path, target: Path, env: Environment) -> None:
    """Sample the grid that the recipe asks for, and write it as an image. Collective.

    Args:
        weights: a folder with the layout of a checkpoint that holds the averages; it is removed afterwards.
        target: the image file.
    """
    config, num_classes = recipe.preview, recipe.model.num_classes
    job = SamplingJob(num=config.num, seed=config.seed, sampler=config.sampler, prompts=config.prompts)
    own = range(env.rank, job.num, env.world_size)  # every world_size-th image; empty on ranks past the last image
    images: Tensor | None = None  # [n, C, H, W]
    if own:
        generator = ImageGenerator(CheckpointWeights(CheckpointReader(weights)), env.device)
        images = job.draw(generator, own)

    def write(images_of_rank: list[Tensor | None]) -> None:
        drawn = [found for found in images_of_rank if found is not None]  # ranks without images are the last ones
        every = torch.empty(job.num, *drawn[0].shape[1:], dtype=torch.uint8)
        for rank, own_images in enumerate(drawn):
            every[rank :: env.world_size] = own_images
        write_grid(every, target, job.columns(num_classes))
        shutil.rmtree(weights)

    combined(images, write)
