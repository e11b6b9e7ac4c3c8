"""What fields of different sections of a recipe must have in common.

Each dataclass checks its own fields when it is made; a recipe asks here for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from msdiff_dist.bounds import check_bytes, check_different, check_name
from msdiff_dist.diffusion.augmentation import AUGMENT_LABELS
from msdiff_dist.errors import ConfigError, collecting, raise_all
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.freezing import parameter_names
from msdiff_dist.models.projector import middle_of

if TYPE_CHECKING:
    from msdiff_dist.recipe import Recipe


def contradictions_of(recipe: Recipe, unusable: Collection[str]) -> list[ConfigError]:
    """The errors of every check that reads no section named in `unusable`, which `recipe` may lack."""
    errors: list[ConfigError] = []
    for check, sections in _CHECKS.items():
        if not any(section in unusable for section in sections):
            with collecting(errors):
                check(recipe)
    return errors


def _check_name(recipe: Recipe) -> None:
    check_name("name", recipe.name, "a run folder")


def _check_extensions(recipe: Recipe) -> None:
    check_different("extensions", recipe.extensions)


def _check_stages(recipe: Recipe) -> None:
    recipe.partition()
    stages, decoders = recipe.stages.num_stages, recipe.model.num_stages
    if stages != decoders:
        raise ConfigError(
            f"model.{recipe.model.place_of('decoder_channels')}", list(recipe.model.decoder_channels),
            f"has {decoders} decoders for the {stages} stages of stages.boundaries = {list(recipe.stages.boundaries)}",
            f"Give {stages} decoders, or {decoders - 1} boundaries.",
        )  # fmt: skip


def _check_times(recipe: Recipe) -> None:
    recipe.times()


def _check_shapes(recipe: Recipe) -> None:
    channels, height, width = recipe.latent_shape
    errors = [
        ConfigError(
            f"model.{recipe.model.place_of(name)}",
            number,
            f"the data has {channels} channels",
            f"Set it to {channels}.",
        )
        for name in ("in_channels", "out_channels")
        if (number := getattr(recipe.model, name)) != channels
    ]
    try:
        recipe.model.check_latent_size(height, width)
    except ConfigError as e:
        errors.append(e.within("model."))
    widest = max(recipe.model.encoder_width(k) for k in range(recipe.model.num_stages))
    features = 4 * max(widest, *recipe.model.decoder_channels) * height * width
    size = "data.image_size" if recipe.data.kind == "image" else "data.latent_shape"
    value = recipe.data.image_size or list(recipe.data.x_shape)
    with collecting(errors):
        check_bytes(size, value, features, "one layer's features of a sample")
    raise_all(errors)


def _check_classes(recipe: Recipe) -> None:
    data, model = recipe.data, recipe.model
    if data.num_classes != model.num_classes:
        raise ConfigError(
            f"model.{model.place_of('num_classes')}", model.num_classes,
            f"differs from data.num_classes = {data.num_classes}",
            "Give both the same number of classes, or neither.",
        )  # fmt: skip


def _check_context(recipe: Recipe) -> None:
    data, model = recipe.data, recipe.model
    if model.context_channels != (data.context_shape[1] if data.context_shape else None):
        raise ConfigError(
            f"model.{model.place_of('context_dim')}", model.context_channels,
            f"does not fit data.context_shape = {data.context_shape}",
            "Make context_dim the width of the stored context tokens, or leave both out.",
        )  # fmt: skip


def _check_condition_dropout(recipe: Recipe) -> None:
    data, model = recipe.data, recipe.model
    if data.num_classes is not None or data.context_shape is not None:
        return  # the model takes them, or is refused because it does not
    if recipe.train.condition_dropout and not (model.takes_context or model.takes_label):
        raise ConfigError(
            "train.condition_dropout", recipe.train.condition_dropout, "the model has no condition to drop",
            "Remove it, or give the model classes or context.",
        )  # fmt: skip


def _check_augmentation(recipe: Recipe) -> None:
    described = recipe.model.augment_labels
    if recipe.augmentation is None:
        if described:
            raise ConfigError(
                "model.augment_labels", described, "there is no augmentation to describe",
                "Remove it, or add augmentation.probability.",
            )  # fmt: skip
        return
    if described != AUGMENT_LABELS:
        taking = [n for n, family in FAMILIES.items() if "augment_labels" in family.config.__dataclass_fields__]
        remedy = f"Set it to {AUGMENT_LABELS}, with family {' or '.join(taking)}; others take no augmentation."
        problem = "the network must take the description of the augmentation as an input"
        raise ConfigError("model.augment_labels", described, problem, remedy)
    if recipe.data.kind == "latent" or recipe.autoencoder.kind != "pixel":
        raise ConfigError(
            "augmentation.probability", recipe.augmentation.probability,
            "only works on images: a transformed latent is not the latent of a transformed image",
            "Remove the augmentation.",
        )  # fmt: skip


def _check_compilation(recipe: Recipe) -> None:
    if not recipe.train.compile:
        return
    sharded = [
        ConfigError(
            f"parallel.{name}", 3, "gathers weights in the midst of the forward pass, which cannot be compiled",
            "Use level 1 or 2, or set train.compile to false.",
        )
        for name in ("zero_shared", "zero_decoders")
        if getattr(recipe.parallel, name) == 3
    ]  # fmt: skip
    checkpointed = [
        ConfigError(
            f"activation_checkpointing.{name}", True, "cannot be compiled, and the compiler recomputes by itself",
            "Set it to false, or train.compile.",
        )
        for name in ("encoder", "decoders")
        if getattr(recipe.activation_checkpointing, name)
    ]  # fmt: skip
    raise_all([*sharded, *checkpointed])


def _check_freezing(recipe: Recipe) -> None:
    stages = recipe.freezing().stages
    placed = () if recipe.parallel.placement == "auto" else enumerate(recipe.parallel.placement)
    raise_all(
        ConfigError(
            f"parallel.placement[{rank}]", list(held), f"holds stage {k}, whose samples train nothing",
            f"Leave {k} out, or take stages.{k} or shared from train.freeze.",
        )
        for rank, held in placed
        for k in held
        if 0 <= k < recipe.model.num_stages and k not in stages
    )  # fmt: skip


def _check_preview(recipe: Recipe) -> None:
    if not recipe.preview.every:
        return
    try:
        recipe.preview.sampler.for_process(recipe.process())
    except ConfigError as e:
        raise e.within("preview.sampler.") from None


def _check_evaluation(recipe: Recipe) -> None:
    config = recipe.evaluation
    if not config.every:
        return
    try:
        config.sampler.for_process(recipe.process())
    except ConfigError as e:
        raise e.within("evaluation.sampler.") from None
    if config.reference is None and recipe.reference_images() is None:
        raise ConfigError(
            "evaluation.reference", None, "is needed: it is not known which images this trains on",
            "Give shards, a folder of images or an .npz file.",
        )  # fmt: skip


def _check_guide(recipe: Recipe) -> None:
    guide = recipe.guide
    if guide is None:
        return
    errors = []
    if recipe.data.kind != "image":
        errors.append(ConfigError(
            "guide.features", guide.features,
            f"looks at images, and data.kind is {recipe.data.kind}: decoding latents in every step costs more than "
            "their training",
            "Train on images (data.kind: image), or remove the section guide.",
        ))  # fmt: skip
    if middle_of(recipe.model) is None:
        errors.append(ConfigError(
            "guide.features", guide.features,
            f"has no middle to align: the stages of this model of family {recipe.model.family} share no encoder, or "
            "the family does not say which feature is its middle",
            "Share the encoder, or remove the section guide.",
        ))  # fmt: skip
    elif {n for n in parameter_names(recipe.model) if n.startswith("shared.")} <= recipe.freezing().names:
        errors.append(ConfigError(
            "guide.weight", guide.weight, "has nothing to train: train.freeze freezes the whole shared part",
            "Remove the section guide, or let a part of the encoder train.",
        ))  # fmt: skip
    if guide.stop_at is not None and guide.stop_at > max(1, recipe.train.steps):
        errors.append(ConfigError(
            "guide.stop_at", guide.stop_at, f"lies after the last step, train.steps = {recipe.train.steps}",
            "Leave it out, or give a step before the end.",
        ))  # fmt: skip
    raise_all(errors)


def _check_validation(recipe: Recipe) -> None:
    if recipe.validation is not None and recipe.data.kind == "synthetic" and recipe.validation.fraction is not None:
        raise ConfigError(
            "validation.fraction", recipe.validation.fraction, "data of kind synthetic have no samples to hold out",
            "Leave validation out.",
        )  # fmt: skip


def _check_grow(recipe: Recipe) -> None:
    if recipe.grow is not None:
        recipe.grow.check(recipe.stages, recipe.model, recipe.train, recipe.optimizer)


def _check_ends(recipe: Recipe) -> None:
    if recipe.stages.end is not None:
        first = 1 + (recipe.grow.at if recipe.grow else 0)
        recipe.stages.end.check(first, recipe.train.steps, validates=recipe.validation is not None)


_CHECKS: dict[Callable[[Recipe], None], tuple[str, ...]] = {
    _check_name: ("name",),
    _check_extensions: ("extensions",),
    _check_times: ("diffusion", "stages"),
    _check_stages: ("stages", "diffusion", "model"),
    _check_shapes: ("data", "autoencoder", "model"),
    _check_classes: ("data", "model"),
    _check_context: ("data", "model"),
    _check_condition_dropout: ("train", "data", "model"),
    _check_augmentation: ("augmentation", "data", "autoencoder", "model"),
    _check_preview: ("preview", "diffusion", "stages"),
    _check_guide: ("guide", "data", "model", "train"),
    _check_validation: ("validation", "data"),
    _check_evaluation: ("evaluation", "diffusion", "stages", "data", "encode"),
    _check_compilation: ("train", "parallel", "activation_checkpointing"),
    _check_freezing: ("train", "model", "parallel", "stages"),
    _check_grow: ("grow", "stages", "train", "model", "optimizer"),
    _check_ends: ("grow", "stages", "train", "validation"),
}
"""The checks of what fields must have in common, and the sections that each reads."""
