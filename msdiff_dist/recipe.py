"""The recipe: one YAML file with a section for each configuration dataclass, checked as a whole before anything starts.

Each dataclass checks its own fields; this file checks what fields of different sections must have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.config import from_mapping, to_mapping, with_current_names
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.encoding import EncodeConfig
from msdiff_dist.diffusion.augmentation import AUGMENT_LABELS, AugmentationConfig
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.stage_partition import StagePartition, build_partition
from msdiff_dist.distributed.placement import ParallelConfig
from msdiff_dist.errors import ConfigError
from msdiff_dist.evaluation.grid import PreviewConfig
from msdiff_dist.files.text import read_yaml
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.text_encoder import TextEncoderConfig
from msdiff_dist.registry import import_extensions
from msdiff_dist.shipped import where_to_get
from msdiff_dist.training.config import TrainConfig
from msdiff_dist.training.ema import EmaConfig
from msdiff_dist.training.optimizer import LrScheduleConfig, OptimizerConfig
from msdiff_dist.training.sinks import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run in full. Only `apps`, `launch` and `cli` import it; other code is given single sections."""

    name: str
    """Name of the run: its default folder is `runs/NAME`."""
    data: DataConfig
    stages: StagesConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig | None = None
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    augmentation: AugmentationConfig | None = None
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    extensions: tuple[str, ...] = ()
    """Python modules imported when the recipe, or a model that it trained, is loaded; they may add U-Net families,
    processes, solvers, optimizers and metric sinks."""

    def __post_init__(self) -> None:
        _check_stages(self)
        _check_shapes(self)
        _check_conditions(self)
        _check_augmentation(self)
        _check_preview(self)
        _check_compilation(self)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the diffusion model works on."""
        shape = self.data.x_shape
        return self.autoencoder.latent_shape(shape[0], shape[1]) if self.data.kind == "image" else shape

    def process(self) -> Process:
        """The diffusion process."""
        return build_process(self.diffusion)

    def partition(self) -> StagePartition:
        """The stages, in the process's own time."""
        return build_partition(self.stages, self.process())


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply dotted overrides (`train.steps=100`, `stages.boundaries=[442,631]`) and check it.

    Raises:
        ConfigError: the file is missing or not YAML, or a field is unknown, missing, mistyped or contradictory.
    """
    return recipe_from(read_mapping(Path(path), overrides))


def read_mapping(path: Path, overrides: Sequence[str], field: str = "RECIPE") -> Any:
    """The content of a YAML file with dotted overrides applied, as plain data.

    Raises:
        ConfigError: the file is missing or not YAML text, or an override is not of the form key=value. `field` is what
            the command line calls the file.
    """
    if not path.expanduser().exists() and not path.is_symlink():
        raise ConfigError(field, str(path), "no such file", _where_to_get(path))
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name or name.startswith("-"):
            raise ConfigError("override", override, "is not of the form key=value", "Write train.steps=100, say.")
    return read_yaml(path, field, lambda loaded: OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides))))


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


def _check_stages(recipe: Recipe) -> None:
    recipe.partition()
    stages, decoders = recipe.stages.num_stages, recipe.model.num_stages
    if stages != decoders:
        raise ConfigError(
            "model.decoder_channels", list(recipe.model.decoder_channels),
            f"has {decoders} decoders for the {stages} stages of stages.boundaries = {list(recipe.stages.boundaries)}",
            f"Give {stages} widths, or {decoders - 1} boundaries.",
        )  # fmt: skip


def _check_shapes(recipe: Recipe) -> None:
    channels, height, width = recipe.latent_shape
    if recipe.model.in_channels != channels or recipe.model.out_channels != channels:
        name = "in_channels" if recipe.model.in_channels != channels else "out_channels"
        raise ConfigError(
            f"model.{name}", getattr(recipe.model, name), f"the data has {channels} channels", f"Set it to {channels}."
        )
    try:
        recipe.model.check_latent_size(height, width)
    except ConfigError as e:
        raise ConfigError(f"model.{e.field}", e.value, e.problem, e.remedy) from None


def _check_conditions(recipe: Recipe) -> None:
    data, model = recipe.data, recipe.model
    if data.num_classes != model.num_classes:
        raise ConfigError(
            "model.num_classes", model.num_classes, f"differs from data.num_classes = {data.num_classes}",
            "Give both the same number of classes, or neither.",
        )  # fmt: skip
    if model.context_channels != (data.context_shape[1] if data.context_shape else None):
        raise ConfigError(
            "model.context_dim", model.context_channels, f"does not fit data.context_shape = {data.context_shape}",
            "Make context_dim the width of the stored context tokens, or leave both out.",
        )  # fmt: skip
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
    for name in ("zero_shared", "zero_decoders"):
        if getattr(recipe.parallel, name) == 3:
            raise ConfigError(
                f"parallel.{name}", 3, "gathers weights in the midst of the forward pass, which cannot be compiled",
                "Use level 1 or 2, or set train.compile to false.",
            )  # fmt: skip
    for name in ("encoder", "decoders"):
        if getattr(recipe.activation_checkpointing, name):
            raise ConfigError(
                f"activation_checkpointing.{name}", True, "cannot be compiled, and the compiler recomputes by itself",
                "Set it to false, or train.compile.",
            )  # fmt: skip


def _check_preview(recipe: Recipe) -> None:
    if not recipe.preview.every:
        return
    try:
        recipe.preview.sampler.for_process(recipe.process())
    except ConfigError as e:
        raise ConfigError(f"preview.sampler.{e.field}", e.value, e.problem, e.remedy) from None
