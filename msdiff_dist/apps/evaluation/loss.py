"""The metric `loss` of `msdiff evaluate`: the held-out loss of a run's or a checkpoint's weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from msdiff_dist.apps.evaluation.subject import Subject
from msdiff_dist.apps.train.validation import held_out_loss, held_out_samples
from msdiff_dist.config import to_mapping
from msdiff_dist.distributed.environment import this_device
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.generate import ImageGenerator
from msdiff_dist.evaluation.held_out_file import HELD_OUT, read_held_out
from msdiff_dist.evaluation.held_out_loss import Floats, HeldOutLoss, ValidationConfig
from msdiff_dist.evaluation.scores import Score
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.recipe import Recipe
from msdiff_dist.terminal import LongWork


@dataclass(frozen=True)
class FoundLoss:
    """Scores `loss` and `loss_unweighted`, and what they depend on, with the losses per stage and bin."""

    scores: dict[str, Score]
    about: dict[str, Any]


def held_out(subject: Subject, shards: str | None, ema: bool) -> FoundLoss:
    """The held-out loss of the subject's weights.

    Args:
        shards: to validate on; None: those that the run held out.

    Raises:
        ConfigError: the subject has no objective (an export, a folder), or the run holds nothing out and there are no
            `shards`.
    """
    recipe, weights = subject.recipe, subject.weights
    if recipe is None or weights is None:
        raise ConfigError(
            "--metrics", "loss", "needs a run or checkpoint: nothing else says what was trained",
            "Name the run, or leave loss out.",
        )  # fmt: skip
    config = recipe.validation
    if shards is not None:
        config = replace(config or ValidationConfig(shards=shards), shards=shards, fraction=None)
    if config is None:
        raise ConfigError(
            "--held-out", None, "is needed: this run held nothing out",
            "Give shards that it was not trained on, or train with validation.fraction.",
        )  # fmt: skip
    stored = subject.home / HELD_OUT
    samples = read_held_out(stored) if shards is None and stored.exists() else held_out_samples(recipe, config)
    loss = held_out_loss(recipe, config, samples)
    losses_n = losses_of(loss, recipe, ImageGenerator(weights, this_device()))
    summary = loss.summary(losses_n)
    half = loss.interval(losses_n)
    value, unweighted = summary["loss"], summary["unweighted"]
    assert isinstance(value, float)
    assert isinstance(unweighted, float)
    # The interval of the objective is scaled like its value: both are means of the same losses, otherwise weighted.
    scaled = half * value / unweighted
    keys = "\n".join(map(str, samples.key_n.tolist()))
    evaluated = {"keys": keys, "num": config.num, "seed": config.seed, "process": to_mapping(recipe.diffusion)}
    if recipe.stages.objectives:
        evaluated["objectives"] = [[*recipe.stages.boundaries], to_mapping(recipe.stages.objectives)]
    return FoundLoss(
        {
            "loss": Score(value, value - scaled, value + scaled),
            "loss_unweighted": Score(unweighted, unweighted - half, unweighted + half),
        },
        {
            "digest": hashlib.sha256(repr(evaluated).encode()).hexdigest()[:16],
            "num": config.num,
            "seed": config.seed,
            "samples": len(samples.key_n),
            "loss_per_stage": summary["loss_per_stage"],
            "loss_per_bin": summary["loss_per_bin"],
            "epsilon": summary["epsilon"],
            "epsilon_per_stage": summary["epsilon_per_stage"],
            "weights": "ema" if ema else "raw",
        },
    )


def losses_of(loss: HeldOutLoss, recipe: Recipe, model: ImageGenerator) -> Floats:
    """The losses of all evaluations, in order, of one model of the recipe."""
    codec = LatentCodec(recipe.autoencoder, recipe.data.kind != "image", model.device)
    losses_n = np.empty(len(loss.stage_n))
    with LongWork("held-out loss", len(losses_n), "evaluations") as work:
        for batch in loss.batches:
            losses_n[batch.rows] = loss.compute(model, codec, batch)
            work.advance(len(batch.rows))
    return losses_n
