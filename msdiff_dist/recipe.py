"""The recipe: one YAML file with a section for each configuration dataclass, checked as a whole before anything starts.

Each dataclass checks its own fields; `recipe_checks` checks what fields of different sections must have in common.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from msdiff_dist.checkpoint.policy import CheckpointConfig
from msdiff_dist.config import from_mapping, to_mapping, with_current_names
from msdiff_dist.data.config import DataConfig
from msdiff_dist.data.make.encoding import EncodeConfig
from msdiff_dist.diffusion.augmentation import AugmentationConfig
from msdiff_dist.diffusion.config import DiffusionConfig, build_process, build_times
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.stage_partition import StagePartition, build_partition
from msdiff_dist.diffusion.training_times import TrainingTimes
from msdiff_dist.distributed.placement import ParallelConfig
from msdiff_dist.errors import ConfigError, raise_all
from msdiff_dist.evaluation.during_training import EvaluationConfig
from msdiff_dist.evaluation.grid import PreviewConfig
from msdiff_dist.evaluation.held_out_loss import ValidationConfig
from msdiff_dist.files.text import Document, Override, read_document
from msdiff_dist.models.activation_checkpointing import ActivationCheckpointingConfig
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.freezing import Freezing, freezing
from msdiff_dist.models.text_encoder import TextEncoderConfig
from msdiff_dist.recipe_checks import contradictions_of
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
        raise_all(contradictions_of(self, ()))

    @classmethod
    def contradictions(cls, values: Mapping[str, Any], unusable: Collection[str]) -> list[ConfigError]:
        """What `from_mapping` can say of the sections `values`, or of their defaults, where others are unusable."""
        recipe = object.__new__(cls)
        for f in fields(cls):
            if f.name not in unusable:
                default = f.default if f.default_factory is MISSING else f.default_factory()
                object.__setattr__(recipe, f.name, values.get(f.name, default))
        return contradictions_of(recipe, unusable)

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
