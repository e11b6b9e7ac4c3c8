"""Parts of a run on one rank, made from its recipe: for training, and for rehearsals of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from msdiff_dist.apps.train.plan import RunPlan, channels_last
from msdiff_dist.diffusion.objective import Objective
from msdiff_dist.distributed.engines import StageParallelEngines
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.distributed.groups import Groups
from msdiff_dist.distributed.part_engines import EngineConfig
from msdiff_dist.distributed.router import Router
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.projector import Projection
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.draws import Drawing
from msdiff_dist.training.feed import Feed, Reader
from msdiff_dist.training.optimizer import optimizer_factory
from msdiff_dist.training.prepare import Conditioning, Preparation


def build_engines(
    recipe: Recipe,
    plan: RunPlan,
    shared: nn.Module,
    stages: Mapping[int, nn.Module],
    groups: Groups,
    device: torch.device,
    projection: Projection | None = None,
) -> StageParallelEngines:
    """The engines of the shared part, the held stages and the projector, which are on `device`. Collective."""
    config = EngineConfig(
        precision="bf16" if recipe.train.precision == "bf16" else "fp32",
        zero_shared=recipe.parallel.zero_shared,
        zero_decoders=recipe.parallel.zero_decoders,
        gradient_accumulation_steps=recipe.train.gradient_accumulation_steps,
        grad_clip=recipe.optimizer.grad_clip,
    )
    optimizer = optimizer_factory(recipe.optimizer, fused=device.type == "cuda")
    return StageParallelEngines(shared, stages, optimizer, config, groups, device, plan.gathering, projection)


def build_feed(
    recipe: Recipe, plan: RunPlan, reader: Reader, groups: Groups, env: Environment, start_batch: int
) -> Feed:
    """The micro batches of this rank from global batch `start_batch` on, of the samples that `reader` reads."""
    return Feed(
        reader,
        plan.batches,
        Router(groups.routing, plan.placement, env.rank, env.device),
        Drawing(
            seed=recipe.train.seed,
            shape=recipe.latent_shape,
            condition_dropout=recipe.train.condition_dropout,
            augmentation=recipe.augmentation,
            pinned=env.device.type == "cuda",
        ),
        seed=recipe.train.seed,
        accumulation=recipe.train.gradient_accumulation_steps,
        start_batch=start_batch,
        progress=env.progress,
    )


def build_preparation(
    recipe: Recipe, objective: Objective, null_context_TC: Tensor | None, env: Environment
) -> Preparation:
    """What makes the network's inputs of a micro batch.

    Args:
        null_context_TC: the context of "no caption"; None: zeros.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    null_context = None if null_context_TC is None else null_context_TC.to(env.device, dtype)
    on_gpu = env.device.type == "cuda"
    return Preparation(
        objective,
        LatentCodec(recipe.autoencoder, recipe.data.kind != "image", env.device),
        Conditioning(null_label=recipe.model.num_classes, null_context_TC=null_context),
        device=env.device,
        dtype=dtype,
        memory_format=torch.channels_last if channels_last(recipe, on_gpu) else torch.contiguous_format,
    )
