"""The recipe: one YAML file with a section for each configuration dataclass, checked as a whole before anything starts.

Each dataclass checks its own fields; this file checks what fields of different sections must have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from msdiff_dist.bounds import check_bytes, check_different, check_name
from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.config import from_mapping, to_mapping, with_current_names
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.encoding import EncodeConfig
from msdiff_dist.diffusion.augmentation import AUGMENT_LABELS, AugmentationConfig
from msdiff_dist.diffusion.config import DiffusionConfig, build_process, build_times
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.stage_partition import StagePartition, build_partition
from msdiff_dist.diffusion.training_times import TrainingTimes
from msdiff_dist.distributed.placement import ParallelConfig
from msdiff_dist.errors import ConfigError, collecting, raise_all
from msdiff_dist.evaluation.during_training import EvaluationConfig
from msdiff_dist.evaluation.grid import PreviewConfig
from msdiff_dist.evaluation.held_out_loss import ValidationConfig
from msdiff_dist.files.text import Document, Override, read_document
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.freezing import Freezing, freezing, parameter_names
from msdiff_dist.models.projector import middle_of
from msdiff_dist.models.text_encoder import TextEncoderConfig
from msdiff_dist.registry import import_extensions
from msdiff_dist.shipped import where_to_get
from msdiff_dist.training.config import TrainConfig
from msdiff_dist.training.ema import EmaConfig
from msdiff_dist.training.guide import GuideConfig
from msdiff_dist.training.optimizer import LrScheduleConfig, OptimizerConfig
from msdiff_dist.training.phases import GrowConfig, TrainedStagesConfig
from msdiff_dist.training.sinks import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run in full. Only `apps`, `launch` and `cli` import it; other code is given single sections."""

    name: str
    """Name of the run: its default folder is `runs/NAME`."""
    data: DataConfig
    stages: TrainedStagesConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    grow: GrowConfig | None = None
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig | None = None
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    augmentation: AugmentationConfig | None = None
    guide: GuideConfig | None = None
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    extensions: tuple[str, ...] = ()
    """Python modules imported when the recipe, or a model that it trained, is loaded; they may add U-Net families,
    processes, solvers, optimizers and metric sinks."""

    def __post_init__(self) -> None:
        raise_all(_contradictions(self, ()))

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], unusable: Collection[str]) -> list[ConfigError]:
        """What `from_mapping` can say of the sections `values`, or of their defaults, where others are unusable."""
        recipe = object.__new__(cls)
        for f in fields(cls):
            if f.name not in unusable:
                default = f.default if f.default_factory is MISSING else f.default_factory()
                object.__setattr__(recipe, f.name, values.get(f.name, default))
        return _contradictions(recipe, unusable)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the diffusion model works on."""
        shape = self.data.x_shape
        return self.autoencoder.latent_shape(shape[0], shape[1]) if self.data.kind == "image" else shape

    def reference_images(self) -> DataConfig | None:
        """The images that the model is trained on, themselves or their latents; None where unknown."""
        data = self.data if self.data.kind == "image" else self.encode.data
        return None if data is None or not data.mixed else data

    def process(self) -> Process:
        """The diffusion process."""
        return build_process(self.diffusion, self.stages)

    def times(self) -> TrainingTimes:
        """The times that are trained on, and the weights of their losses."""
        return build_times(self.diffusion, self.stages)

    def freezing(self) -> Freezing:
        """The parameters that do not train, and the stages whose samples are trained on."""
        return freezing(self.model, self.train.freeze, self.stages.ended)

    def partition(self) -> StagePartition:
        """The stages, in the process's own time."""
        return build_partition(self.stages, self.process())


def load_recipe(path: Path | str, overrides: Sequence[str | Override] = ()) -> Recipe:
    """Read a recipe file, apply dotted overrides (`train.steps=100`, `stages.boundaries=[442,631]`) and check it.

    Raises:
        ConfigError: the file is missing or not YAML, or fields are unknown, missing, mistyped or contradictory: all of
            them, each with its line.
    """
    return read_mapping(Path(path), overrides).parsed(recipe_from)


def read_mapping(path: Path, overrides: Sequence[str | Override], field: str = "RECIPE") -> Document:
    """The content of a YAML file with dotted overrides applied.

    Raises:
        ConfigError: the file is missing or not a mapping in YAML. `field` is what the command line calls it.
    """
    if not path.expanduser().exists() and not path.is_symlink():
        raise ConfigError(field, str(path), "no such file", _where_to_get(path))
    return read_document(path, field, overrides)


def _where_to_get(path: Path) -> str:
    """The remedy for a recipe file that does not exist."""
    command = where_to_get(path)
    if command:
        return f"`{command}` writes it."
    known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    here = f"Choose from: {', '.join(known)}." if known else "Name a YAML file."
    return f"{here} `msdiff recipes` lists those that `msdiff init` writes."


def recipe_from(mapping: Any) -> Recipe:
    """A recipe from plain YAML data. The modules under `extensions` are imported first: they may add names to tables.

    Raises:
        ConfigError: a field is unknown, missing, mistyped or contradictory, or an extension cannot be imported.
    """
    import_extensions(mapping)
    return from_mapping(Recipe, mapping)


def stored_recipe(mapping: Any) -> Recipe:
    """A recipe from a run folder or checkpoint, which an earlier version may have written."""
    return recipe_from(with_current_names(mapping))


def recipe_mapping(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain YAML data, every default written out."""
    content: dict[str, Any] = to_mapping(recipe)
    return content


def comparable_mapping(mapping: Any) -> dict[str, Any]:
    """A recipe's plain data, perhaps stored by an earlier version, with every field written out.

    So is the section of the diffusion process, which `recipe_mapping` leaves null where the recipe does.
    """
    recipe = stored_recipe(mapping)
    content = recipe_mapping(recipe)
    content["diffusion"] = {**content["diffusion"], recipe.diffusion.process: to_mapping(recipe.diffusion.settings())}
    return content


def _contradictions(recipe: Recipe, unusable: Collection[str]) -> list[ConfigError]:
    """The errors of every check that reads no unusable section."""
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
