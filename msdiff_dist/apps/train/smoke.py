"""A small variant of a recipe that trains for a few steps with the same code, in seconds and without data."""

from __future__ import annotations

from dataclasses import replace

from msdiff_dist.data.config import DataConfig
from msdiff_dist.diffusion.solvers import SOLVERS
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.freezing import matches, parameter_names
from msdiff_dist.recipe import Recipe

STEPS = 2
_WIDTH = 16  # of the widest encoder
_CONTEXT = (3, 8)  # tokens and their width


def smoke(recipe: Recipe) -> Recipe:
    """A recipe with the same process, stages, family, conditioning, optimizer and averages; all else is small.

    Samples are random numbers in the shape of the recipe's images or latents, no larger than the network's levels need.
    What needs real images is left out: held-out samples, evaluations and the guide.
    """
    data, model = _data(recipe), recipe.model.small(_WIDTH, _CONTEXT[1])
    folds = recipe.autoencoder.kind == "space_to_depth"
    autoencoder = recipe.autoencoder if folds else AutoencoderConfig()
    images = data.x_shape[0] in (autoencoder.factor**2, 3 * autoencoder.factor**2)
    solver = SOLVERS[recipe.preview.sampler.name or recipe.process().sampler]
    return replace(
        recipe,
        name=f"{recipe.name}_smoke",
        data=data,
        autoencoder=autoencoder,
        text_encoder=None,
        model=model,
        grow=recipe.grow and replace(recipe.grow, at=STEPS - 1, width=model.decoder_channels[0], attention=None),
        stages=replace(recipe.stages, end=None),
        validation=None,
        evaluation=replace(recipe.evaluation, every=0),
        guide=None,
        train=replace(
            recipe.train,
            steps=STEPS,
            global_batch_size=6 * model.num_stages,
            micro_batch_size=None,
            init_from=None,
            freeze=_freeze(recipe, model),
            gradient_accumulation_steps=1,
        ),
        lr_schedule=replace(recipe.lr_schedule, warmup_steps=min(1, recipe.lr_schedule.warmup_steps)),
        parallel=replace(recipe.parallel, placement="auto"),
        checkpoint=replace(recipe.checkpoint, every=0),
        preview=replace(
            recipe.preview,
            every=STEPS if images else 0,
            num=2,
            prompts=(),
            sampler=replace(recipe.preview.sampler, steps=max(2, solver.least_steps)),
        ),
    )


def _freeze(recipe: Recipe, model: ModelConfig) -> tuple[str, ...]:
    """The patterns that name something in the small model too, which has fewer blocks; all of it must not freeze."""
    names = parameter_names(model) if recipe.train.freeze else ()
    kept = tuple(pattern for pattern in recipe.train.freeze if any(matches(pattern, name) for name in names))
    return kept if any(not any(matches(pattern, name) for pattern in kept) for name in names) else ()


def _data(recipe: Recipe) -> DataConfig:
    channels, *size = recipe.latent_shape
    smallest = 2 ** len(recipe.model.channel_mult)
    context = recipe.data.context_shape and (min(recipe.data.context_shape[0], _CONTEXT[0]), _CONTEXT[1])
    return DataConfig(
        kind="synthetic",
        lanes=12,
        latent_shape=(channels, min(size[0], smallest), min(size[1], smallest)),
        latent_dtype=recipe.data.latent_dtype,
        num_classes=recipe.data.num_classes,
        context_shape=context,
    )
