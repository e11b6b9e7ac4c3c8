"""Held-out loss during training: every rank computes the evaluations of the stages that it holds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdiff_dist.checkpoint.load import CheckpointReader
from msdiff_dist.data.held_out import read_samples, split
from msdiff_dist.data.index import Shard
from msdiff_dist.data.loader import load_index
from msdiff_dist.data.samples import Samples
from msdiff_dist.diffusion.timestep_sampler import objective_probabilities
from msdiff_dist.distributed.agree import combined
from msdiff_dist.distributed.environment import Environment
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.held_out_file import HELD_OUT, read_held_out, write_held_out
from msdiff_dist.evaluation.held_out_loss import Batch, Floats, HeldOutLoss, ValidationConfig
from msdiff_dist.export.weights import CheckpointWeights
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.recipe import Recipe


def trained_shards(recipe: Recipe, index: list[list[Shard]]) -> list[list[Shard]]:
    """The shards to train on: without the samples that are held out, if a fraction of them is.

    Raises:
        ConfigError: nothing would be held out, or nothing left.
    """
    if recipe.validation is None or recipe.validation.fraction is None:
        return index
    return split(index, recipe.validation.fraction).trained


def held_out_samples(
    recipe: Recipe, config: ValidationConfig, index: Sequence[Sequence[Shard]] | None = None
) -> Samples:
    """Read the held-out samples of a recipe.

    Args:
        index: the shards of the recipe's data, if they are known.

    Raises:
        ConfigError: the recipe trains on the shards that it validates on. DataError: shards cannot be read.
    """
    if config.fraction is not None:
        shards = split(index if index is not None else load_index(recipe.data), config.fraction).held_out
        return read_samples(shards, recipe.data, config.num)
    own = recipe.data.validated_on(config.shards)
    held_out = load_index(own)
    trained_on = {shard.path for shards in (index or ()) for shard in shards}
    both = [shard.path for shards in held_out for shard in shards if shard.path in trained_on]
    if both:
        raise ConfigError(
            "validation.shards", config.shards, f"has {both[0]}, which the run trains on", "Name other shards."
        )
    return read_samples(held_out, own, config.num)


def held_out_loss(recipe: Recipe, config: ValidationConfig, samples: Samples) -> HeldOutLoss:
    """The fixed evaluations of a recipe's objective."""
    times, partition = recipe.times(), recipe.partition()
    return HeldOutLoss(
        config,
        samples,
        stored_latents=recipe.data.kind != "image",
        process=recipe.process(),
        times=times,
        partition=partition,
        probability_K=objective_probabilities(times, partition, recipe.stages),
        loss=recipe.train.loss,
    )


class Validation:
    """The held-out loss of a run, on one rank. Collective.

    Args:
        recipe: the whole run's, by whose stages the loss is measured in all its phases.
        run: the run folder, in which rank 0 has put the samples.
        stages_of_rank: the stages that each rank holds.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: ValidationConfig,
        run: Path,
        stages_of_rank: Sequence[Sequence[int]],
        env: Environment,
    ) -> None:
        self._config, self._env = config, env
        self._codec = LatentCodec(recipe.autoencoder, recipe.data.kind != "image", env.device)
        self._loss = held_out_loss(recipe, config, read_held_out(run / HELD_OUT))
        self._mine = self._loss.shares(stages_of_rank)[env.rank]

    def __call__(self, weights: Path) -> dict[str, Any]:
        """The losses of a step, the same on every rank, as `StepMetrics.validation` has them.

        Args:
            weights: folder with the layout of a checkpoint that holds weights and averages; removed afterwards.
        """
        found: dict[str, Any] = {}
        for ema in self._config.averaged:
            summary = combined(self._own(weights, ema), self._summary) | {"weights": "ema" if ema else "raw"}
            found = {**found, "raw": summary} if found else summary
        combined(None, lambda _: shutil.rmtree(weights))
        return found

    def _own(self, weights: Path, ema: bool) -> list[tuple[Batch, Floats]]:
        if not self._mine:
            return []
        model = ImageGenerator(CheckpointWeights(CheckpointReader(weights), ema), self._env.device)
        found = [(batch, self._loss.compute(model, self._codec, batch)) for batch in self._mine]
        del model
        if self._env.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs blocks of other sizes
        return found

    def _summary(self, of_ranks: list[list[tuple[Batch, Floats]]]) -> dict[str, Any]:
        losses_n = np.empty(len(self._loss.stage_n))
        for batch, losses in (pair for of_rank in of_ranks for pair in of_rank):
            losses_n[batch.rows] = losses
        return dict(self._loss.summary(losses_n))


def store_samples(recipe: Recipe, config: ValidationConfig, run: Path, index: Sequence[Sequence[Shard]]) -> None:
    """Put the held-out samples into the run folder, if they are not there. Rank 0 only.

    Raises:
        ConfigError, DataError: what `held_out_samples` raises.
    """
    if not (run / HELD_OUT).exists():
        write_held_out(run / HELD_OUT, held_out_samples(recipe, config, index))
