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
    """decay: the limit of the decay. warmup: LDM's, min(decay, (1 + n) / (10 + n)) at the n-th update."""

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError("decay", self.decay, "must lie in [0, 1)", "Use 0.9999, or 0 to follow the weights.")

    def decay_at(self, update: int) -> float:
        """Decay of the `update`-th update, counted from 1."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


class ShardedEma:
    """The average of every fp32 shard on this rank.

    `shards[prefix][i]` averages `state[prefix].flats()[i]`, prefixes as in `StageParallelEngines.state`.
    """

    def __init__(self, config: EmaConfig, state: Mapping[str, ShardedState]) -> None:
        self._config, self._state = config, state
        self.shards: dict[str, list[Tensor]] = {p: [f.detach().clone() for f in s.flats()] for p, s in state.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step number `step`, counted from 1."""
        weight = 1 - self._config.decay_at(step)
        for prefix, state in self._state.items():
            torch._foreach_lerp_(self.shards[prefix], [f.detach() for f in state.flats()], weight)
