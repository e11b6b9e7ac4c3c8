"""Exponential moving average of the weights, kept element by element on the ZeRO shards: no gather, no full copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msdiff_dist.distributed.zero_state import ShardedState
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True)
class EmaConfig:
    """Either a decay per step, or (EDM's) a number of images in which a weight's share in the average halves.

    decay: the limit of the decay; 0.9999 unless there is a half-life. halflife_images: 500,000 in EDM. warmup: smaller
    decays at first: min(decay, (1 + n) / (10 + n)) at the n-th update (LDM's), or a half-life of at most
    `warmup_ratio` of the images seen.
    """

    decay: float | None = None
    halflife_images: float | None = None
    warmup: bool = True
    warmup_ratio: float = 0.05

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ConfigError("decay", self.decay, "must lie in [0, 1)", "Use 0.9999, or 0 to follow the weights.")
        for name in ("halflife_images", "warmup_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(name, value, "must be above 0", "EDM uses 500000 images and a ratio of 0.05.")
        if self.decay is not None and self.halflife_images is not None:
            raise ConfigError(
                "halflife_images", self.halflife_images, f"there is also a decay per step, {self.decay}", "Keep one."
            )

    def decay_at(self, update: int, batch_size: int) -> float:
        """Decay of the `update`-th update, counted from 1, of training with `batch_size` images per step."""
        if self.halflife_images is not None:
            halflife = self.halflife_images
            if self.warmup:
                halflife = min(halflife, self.warmup_ratio * (update - 1) * batch_size)
            return 0.5 ** (batch_size / halflife) if halflife else 0.0
        decay = 0.9999 if self.decay is None else self.decay
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay


class ShardedEma:
    """The average of every fp32 shard on this rank.

    `shards[prefix][i]` averages `state[prefix].flats()[i]`, prefixes as in `StageParallelEngines.state`.
    """

    def __init__(self, config: EmaConfig, state: Mapping[str, ShardedState], batch_size: int) -> None:
        self._config, self._state, self._batch_size = config, state, batch_size
        self.shards: dict[str, list[Tensor]] = {p: [f.detach().clone() for f in s.flats()] for p, s in state.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step number `step`, counted from 1."""
        weight = 1 - self._config.decay_at(step, self._batch_size)
        for prefix, state in self._state.items():
            torch._foreach_lerp_(self.shards[prefix], [f.detach() for f in state.flats()], weight)
