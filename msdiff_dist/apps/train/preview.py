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
    job = SamplingJob(
        num=config.num,
        seed=config.seed,
        sampler=config.sampler,
        prompts=config.prompts,
        batch_size=config.batch_size,
    )
    # Every rank that samples reads the whole model from the shared disk, so only as many do as there are batches.
    ranks = min(env.world_size, len(job.batches))
    images = _drawn(job, weights, range(env.rank, job.num, ranks), env.device) if env.rank < ranks else None

    def write(images_of_rank: list[Tensor | None]) -> None:
        drawn = [found for found in images_of_rank if found is not None]  # ranks without images are the last ones
        every = torch.empty(job.num, *drawn[0].shape[1:], dtype=torch.uint8)
        for rank, own_images in enumerate(drawn):
            every[rank::ranks] = own_images
        write_grid(every, target, job.columns(num_classes))
        shutil.rmtree(weights)

    combined(images, write)


def _drawn(job: SamplingJob, weights: Path, index_n: range, device: torch.device) -> Tensor:
    """The job's images with these numbers, uint8 [n, C, H, W] on the CPU, a batch at a time."""
    generator = ImageGenerator(CheckpointWeights(CheckpointReader(weights)), device)
    batches = [index_n[i : i + job.batch_size] for i in range(0, len(index_n), job.batch_size)]
    images = torch.cat([job.draw(generator, batch) for batch in batches])
    del generator
    if device.type == "cuda":
        torch.cuda.empty_cache()  # training needs blocks of other sizes
    return images
