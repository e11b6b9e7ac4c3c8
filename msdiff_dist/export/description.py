"""The description of a trained model that the config.json of an export holds: enough to rebuild it without a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
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
"""Newest version of config.json that this package reads, and the one that it writes."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Everything needed to rebuild and sample a model. Sections have the same content as in a recipe."""

    model: ModelConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig | None = None
    """The encoder of captions, for models with text as context."""
    context_shape: tuple[int, int] | None = None
    """Number of context tokens and their width, (T, D); None for models without context, and where unknown."""
    sample_size: int | tuple[int, int] | None = None
    """Height and width of the diffusion's images or latents; one number if they are equal, None where unknown."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the training."""
    weights: Literal["ema", "raw"] | None = None
    """`ema` for averaged weights, `raw` for those of the last step; None where unknown."""
    ema_length: float | None = None
    """Length of an average made after training, as a fraction of the training up to `step`."""
    name: str = ""
    """Name of the recipe."""
    step: int | None = None
    """Number of optimizer steps done."""
    format: int = FORMAT
    """Version of config.json."""
    version: str = ""
    """Version of this package that wrote the export."""
    extensions: tuple[str, ...] = ()
    """Modules to import before the rest of the description is read, since they may bring its families or processes."""

    def process(self) -> Process:
        """The diffusion process."""
        return build_process(self.diffusion, self.stages)

    def partition(self) -> StagePartition:
        """The division of the process's time into stages."""
        return build_partition(self.stages, self.process())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of the diffusion's images or latents.

        Raises:
            ConfigError: `sample_size` is unknown.
        """
        if self.sample_size is None:
            raise ConfigError("sample_size", None, "is missing from the model's config.json", "Add it there.")
        size = self.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.in_channels, height, width


def describe(recipe: Mapping[str, Any], step: int) -> ModelDescription:
    """The description of a recipe's model after `step` optimizer steps.

    Args:
        recipe: a complete recipe as plain data, as checkpoints hold it, with the precision that the run chose.
    """
    import_extensions(recipe)
    data = from_mapping(DataConfig, recipe["data"], "data")
    autoencoder = from_mapping(AutoencoderConfig, recipe["autoencoder"], "autoencoder")
    shape = data.x_shape
    # Data of another kind than images are latents already, in the shape that the diffusion sees.
    _, height, width = autoencoder.latent_shape(shape[0], shape[1]) if data.kind == "image" else shape
    mapping = {name: recipe[name] for name in ("model", "diffusion", "autoencoder", "name")}
    # How the stages were trained is not part of the model.
    of_model = {f.name for f in fields(StagesConfig)}
    mapping["stages"] = {name: value for name, value in recipe["stages"].items() if name in of_model}
    mapping |= {"text_encoder": recipe.get("text_encoder"), "context_shape": data.context_shape}
    mapping |= {"extensions": recipe.get("extensions", ())}
    mapping |= {"sample_size": height if height == width else [height, width]}
    mapping |= {"precision": recipe["train"]["precision"], "step": step}
    return from_mapping(ModelDescription, mapping)


def description_from(mapping: Any) -> ModelDescription:
    """The description in the parsed config.json of an export. Imports the modules that it lists under `extensions`."""
    import_extensions(mapping)
    return from_mapping(ModelDescription, mapping)
