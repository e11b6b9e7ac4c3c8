"""The projector of representation alignment (2410.06940): from the shared encoder's middle to a teacher's features.

It trains with the model and is no part of it: checkpoints hold it under a prefix of its own, exports do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.multistage_unet import build_parts, seeded

PREFIX = "guide."
"""Prefix of the names of the projector's parameters, beside `shared.` and `stages.K.`."""


class Projector(nn.Sequential):
    """REPA's MLP of three layers, at every position: maps [n, channels, h, w] to [n, features, h, w]."""

    def __init__(self, channels: int, width: int, features: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, features, 1),
        )


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A module that trains with the model on one of the shared features.

    Attributes:
        module: maps that feature of all samples to what its loss is of.
        feature: which of the shared part's features, by index.
        prefix: of its parameters' names in checkpoints.
    """

    module: nn.Module
    feature: int
    prefix: str


def build_projector(channels: int, width: int, features: int, seed: int = 0) -> nn.Module:
    """A projector whose first weights depend on `seed` alone."""
    return seeded(seed, "guide", Projector, channels, width, features)


def middle_of(config: ModelConfig) -> int | None:
    """Which of the features of the shared part is the middle; None where there is none or it is not known."""
    return FAMILIES[config.family].middle if config.share_encoder else None


@lru_cache(maxsize=16)
def middle_shape(config: ModelConfig, latent_size: tuple[int, int]) -> tuple[int, int, int]:
    """Shape [C, h, w] of the shared encoder's middle for latents of this height and width. Nothing is allocated."""
    middle = middle_of(config)
    assert middle is not None, "the model has no shared middle"
    with torch.device("meta"), torch.no_grad():
        shared, _ = build_parts(config, [])
        context = torch.empty(1, 1, config.context_channels) if config.context_channels else None
        label = torch.empty(1, dtype=torch.int64) if config.takes_label else None
        x_BCHW = torch.empty(1, config.in_channels, *latent_size)
        features: tuple[Tensor, ...] = shared(x_BCHW, torch.empty(1, dtype=torch.int64), context, label)
    channels, height, width = features[middle].shape[1:]
    return channels, height, width
