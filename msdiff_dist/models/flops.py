"""What a model costs: parameters and multiply-adds of one forward, counted on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.models.config import ModelConfig
from msdiff_dist.models.multistage_unet import build_parts


@dataclass(frozen=True)
class PartCost:
    """Parameters of a part, and multiply-adds of its forward for one sample (matrix products and convolutions)."""

    params: int
    macs: int


@dataclass(frozen=True)
class ModelCosts:
    """The encoder's cost (zero where each stage has its own) and each stage's, without the shared encoder."""

    encoder: PartCost
    decoders: tuple[PartCost, ...]

    @property
    def total_params(self) -> int:
        return self.encoder.params + sum(d.params for d in self.decoders)

    def equivalent_macs(self, shares: Sequence[float]) -> float:
        """Mean multiply-adds of encoder + decoder where stage k has the share `shares[k]` of all evaluations."""
        assert len(shares) == len(self.decoders)
        return self.encoder.macs + sum(share * d.macs for share, d in zip(shares, self.decoders, strict=True))


@lru_cache(maxsize=64)
def costs(config: ModelConfig, latent_size: tuple[int, int], context_tokens: int = 77) -> ModelCosts:
    """Count a model on inputs of `latent_size` (height, width), attending to `context_tokens` where it takes context.

    Nothing is allocated. Counts are kept, for variants of one model.
    """
    config.check_latent_size(*latent_size)
    with torch.device("meta"), torch.no_grad():
        # The counter sees the matrix products of this backend, and not those inside a fused kernel.
        shared, stages = build_parts(dataclasses.replace(config, attention_backend="math"), range(config.num_stages))
        x_BCHW = torch.empty(1, config.in_channels, *latent_size)
        t_B = torch.empty(1, dtype=torch.int64)
        context = torch.empty(1, context_tokens, config.context_channels) if config.context_channels else None
        label = torch.empty(1, dtype=torch.int64) if config.takes_label else None
        features, encoder = _count(shared, x_BCHW, t_B, context, label)
        decoders = tuple(_count(stage, *features)[1] for stage in stages.values())
    return ModelCosts(encoder, decoders)


def _count(part: nn.Module, *inputs: Tensor | None) -> tuple[Any, PartCost]:
    with FlopCounterMode(display=False) as counter:
        output = part(*inputs)
    return output, PartCost(sum(p.numel() for p in part.parameters()), counter.get_total_flops() // 2)
