"""What a model is, without the recipe that trained it: the config.json of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msdiff_dist.config import from_mapping
from msdiff_dist.data.config import DataConfig
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.stage_partition import StagePartition, build_partition
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.autoencoder import AutoencoderConfig
from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.text_encoder import TextEncoderConfig
from msdiff_dist.registry import import_extensions

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Everything needed to rebuild and sample a model.

    text_encoder: what turns captions into context, where the model takes some of context_shape, (T, D).
    sample_size: height and width of what the diffusion sees, one number where they are equal; None where unknown.
    precision: it was trained in. weights: `ema`, the average, or `raw`, the last ones. ema_length: of an average made
    after training, relative to it. step: optimizer steps done. extensions: the recipe's.
    """

    model: ModelConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig | None = None
    context_shape: tuple[int, int] | None = None
    sample_size: int | tuple[int, int] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["ema", "raw"] | None = None
    ema_length: float | None = None
    name: str = ""
    step: int | None = None
    format: int = FORMAT
    version: str = ""
    extensions: tuple[str, ...] = ()

    def process(self) -> Process:
        """The diffusion process."""
        return build_process(self.diffusion)

    def partition(self) -> StagePartition:
        """The stages in the process's own time."""
        return build_partition(self.stages, self.process())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what the diffusion sees.

        Raises:
            ConfigError: no file says it.
        """
        if self.sample_size is None:
            raise ConfigError("sample_size", None, "the model's config.json does not say it", "Add it there.")
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.in_channels, height, width


def describe(recipe: Mapping[str, Any], step: int) -> ModelDescription:
    """The model that a recipe, as a checkpoint keeps it, trains."""
    import_extensions(recipe)
    data = from_mapping(DataConfig, recipe["data"], "data")
    autoencoder = from_mapping(AutoencoderConfig, recipe["autoencoder"], "autoencoder")
    shape = data.x_shape
    _, height, width = autoencoder.latent_shape(shape[0], shape[1]) if data.kind == "image" else shape
    parts = {part: recipe[part] for part in ("model", "diffusion", "stages", "autoencoder", "name")}
    parts |= {"text_encoder": recipe.get("text_encoder"), "context_shape": data.context_shape}
    parts |= {"extensions": recipe.get("extensions", ())}
    size = height if height == width else [height, width]
    more = {"sample_size": size, "precision": recipe["train"]["precision"], "step": step}
    return from_mapping(ModelDescription, parts | more)


def description_from(mapping: Any) -> ModelDescription:
    """The content of an export's config.json; what it lists under `extensions` is imported first."""
    import_extensions(mapping)
    return from_mapping(ModelDescription, mapping)
