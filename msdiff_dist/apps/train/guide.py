"""The guide of a recipe: its teacher, opened and counted, and its projector."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.errors import ConfigError, UserError
from msdiff_dist.evaluation.feature_spaces import FEATURE_SPACES, FeatureSpace, load_feature_space
from msdiff_dist.models.autoencoder import LatentCodec
from msdiff_dist.models.projector import PREFIX, Projection, Projector, build_projector, middle_of, middle_shape
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.guide import Guide, GuideConfig

_WITHOUT_GRID = ("inception", "clip")
_FIELDS = {"--features": "guide.features", "classifier": "guide.features", "--feature-weights": "guide.path"}


@dataclass(frozen=True, kw_only=True)
class GuideCosts:
    """What a guide costs.

    Attributes:
        channels: of the shared encoder's middle.
        features: of the teacher, at each place.
        params: of the projector.
        projector_macs: multiply-adds of its forward pass for one sample.
        teacher_macs: multiply-adds of the teacher for one image.
        last_step: number of the last step with the guide.
    """

    channels: int
    features: int
    params: int
    projector_macs: int
    teacher_macs: int
    last_step: int

    @property
    def step_macs(self) -> int:
        """A third of the multiply-adds for one sample: forward and backward pass of the projector, and the teacher's
        forward pass."""
        return self.projector_macs + self.teacher_macs // 3


def guide_costs(recipe: Recipe) -> GuideCosts | None:
    """Count the guide of a recipe on one of its images; None for a recipe without.

    Raises:
        ConfigError: the teacher's weights are missing, or it does not take the recipe's images.
    """
    config = recipe.guide
    if config is None:
        return None
    features, teacher_macs = _teacher_costs(config.features, config.path, recipe.data.x_shape)
    channels, height, width = middle_shape(recipe.model, recipe.latent_shape[1:])
    with torch.device("meta"):
        params = sum(p.numel() for p in Projector(channels, config.width, features).parameters())
    per_place = (channels + config.width) * config.width + config.width * features
    return GuideCosts(
        channels=channels,
        features=features,
        params=params,
        projector_macs=per_place * height * width,
        teacher_macs=teacher_macs,
        last_step=config.last_step(recipe.train.steps),
    )


def guide_fields(costs: GuideCosts) -> dict[str, Any]:
    """The costs as plain data, as `msdiff plan --json` and `msdiff flops --json` print them."""
    return {
        "params": costs.params,
        "projector_gmacs": costs.projector_macs / 1e9,
        "teacher_gmacs": costs.teacher_macs / 1e9,
        "last_step": costs.last_step,
    }


def build_projection(recipe: Recipe, costs: GuideCosts | None) -> Projection | None:
    """The projector of a recipe, with its first weights."""
    if costs is None:
        return None
    assert recipe.guide is not None
    middle = middle_of(recipe.model)
    assert middle is not None
    module = build_projector(costs.channels, recipe.guide.width, costs.features, recipe.train.seed)
    return Projection(module=module, feature=middle, prefix=PREFIX)


def blank_projection(recipe: Recipe, costs: GuideCosts | None) -> Projection | None:
    """The projector of a recipe in its whole size, with weights of zeros."""
    with torch.device("meta"):
        projection = build_projection(recipe, costs)
    if projection:
        projection.module.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in itertools.chain(projection.module.parameters(), projection.module.buffers()):
                tensor.zero_()
    return projection


def open_guide(recipe: Recipe, done: int, device: torch.device) -> Guide | None:
    """The guide of a run that goes on after `done` steps; None without one, and after its last step.

    Raises:
        ConfigError: as `guide_costs`.
    """
    config = recipe.guide
    if config is None or done >= config.last_step(recipe.train.steps):
        return None
    teacher, codec = _opened(config, device), LatentCodec(recipe.autoencoder, False, device)
    if device.type == "cuda" and recipe.train.precision == "bf16":
        return Guide(config=config, teacher=lambda x0: _in_bf16(teacher, codec.pixels(x0)))
    return Guide(config=config, teacher=lambda x0: teacher.spatial(codec.pixels(x0)))


def _in_bf16(teacher: FeatureSpace, images_nCHW: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return teacher.spatial(images_nCHW)


@lru_cache(maxsize=16)
def _teacher_costs(features: str, path: str | None, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(features at each place, multiply-adds for one image) of a teacher."""
    teacher = _opened(GuideConfig(features=features, path=path), torch.device("cpu"))
    with _at_fields(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        # The counter sees plain matrix products on any device, and not all fused kernels of attention.
        found = teacher.spatial(torch.zeros(1, *image_shape, dtype=torch.uint8))
    return found.shape[1], counter.get_total_flops() // 2


def _opened(config: GuideConfig, device: torch.device) -> FeatureSpace:
    if config.path is not None and config.features not in FEATURE_SPACES:
        problem = "is the weights of a named teacher, and guide.features is none"
        raise ConfigError("guide.path", config.path, problem, "Remove it: a classifier's file holds its weights.")
    with _at_fields():
        space = load_feature_space(config.features, None if config.path is None else Path(config.path), device)
    if space.grid is None:
        known = ", ".join(name for name in FEATURE_SPACES if name not in _WITHOUT_GRID)
        raise ConfigError(
            "guide.features", config.features, "has no features of an image's places to align with",
            f"Choose from: {known}, or the file of a classifier.",
        )  # fmt: skip
    return space


@contextmanager
def _at_fields() -> Iterator[None]:
    """Errors that name the options of `msdiff evaluate` name the recipe's fields instead."""
    try:
        yield
    except UserError as e:
        if e.field not in _FIELDS:
            raise
        remedy = e.remedy.replace("--features mobilenet", "guide.features: mobilenet")
        raise ConfigError(_FIELDS[e.field], e.value, e.problem, remedy) from e
