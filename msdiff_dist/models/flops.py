"""What a model costs: parameters and multiply-adds of one forward pass, counted without allocating anything.

The placement of stages on ranks balances these counts.
"""

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
from msdiff_dist.models.freezing import freezing
from msdiff_dist.models.multistage_unet import build_parts


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Parameters of an encoder or decoder, and multiply-adds of its matrix products and convolutions for one sample.

    Attributes:
        params, trained: number of all parameters, and of those that train.
        macs: multiply-adds of the forward pass.
        step_macs: a third of the multiply-adds of forward and backward pass together. A backward pass costs twice the
            forward pass, so this is `macs` where everything trains; a part that is frozen and whose inputs need no
            gradient costs a third of that, one whose inputs do need one about two thirds.
    """

    params: int
    trained: int
    macs: int
    step_macs: int


@dataclass(frozen=True)
class ModelCosts:
    """Cost of the shared encoder and of each stage.

    Where each stage has an encoder of its own, that is part of the stage's cost, and `encoder` is zero.
    """

    encoder: PartCost
    decoders: tuple[PartCost, ...]

    @property
    def total_params(self) -> int:
        return self.encoder.params + sum(d.params for d in self.decoders)

    @property
    def trained_params(self) -> int:
        """Number of parameters that train."""
        return self.encoder.trained + sum(d.trained for d in self.decoders)

    @property
    def step_macs_K(self) -> list[int]:
        """`PartCost.step_macs` of encoder and decoder of each stage."""
        return [self.encoder.step_macs + d.step_macs for d in self.decoders]

    def equivalent_macs(self, shares: Sequence[float]) -> float:
        """Mean multiply-adds of one evaluation where a share `shares[k]` of all evaluations is in stage k."""
        assert len(shares) == len(self.decoders)
        return self.encoder.macs + sum(share * d.macs for share, d in zip(shares, self.decoders, strict=True))


@lru_cache(maxsize=64)
def costs(
    config: ModelConfig, latent_size: tuple[int, int], context_tokens: int = 77, freeze: tuple[str, ...] = ()
) -> ModelCosts:
    """Count parameters and multiply-adds of a model.

    Args:
        latent_size: height and width of the input.
        context_tokens: length of the context, where the model takes one.
        freeze: what does not train (`train.freeze`).

    Raises:
        ConfigError: the model's levels cannot halve such a size.
    """
    config.check_latent_size(*latent_size)
    with torch.device("meta"), torch.set_grad_enabled(bool(freeze)):
        # The `math` backend is plain matrix products, which the counter sees on any device; fused kernels it may not.
        shared, stages = build_parts(dataclasses.replace(config, attention_backend="math"), range(config.num_stages))
        freezing(config, freeze).apply(shared, stages)
        x_BCHW = torch.empty(1, config.in_channels, *latent_size)
        t_B = torch.empty(1, dtype=torch.int64)
        context = torch.empty(1, context_tokens, config.context_channels) if config.context_channels else None
        label = torch.empty(1, dtype=torch.int64) if config.takes_label else None
        features, encoder = _count(shared, x_BCHW, t_B, context, label)
        # The graph is cut between encoder and decoders, as in training.
        leaves = [[f.detach().requires_grad_(f.requires_grad) for f in features] for _ in stages]
        decoders = tuple(_count(stage, *own)[1] for stage, own in zip(stages.values(), leaves, strict=True))
    return ModelCosts(encoder, decoders)


def _count(part: nn.Module, *inputs: Tensor | None) -> tuple[Any, PartCost]:
    with FlopCounterMode(display=False) as counter:
        output = part(*inputs)
        forward = counter.get_total_flops()
        if torch.is_grad_enabled():
            outputs = [f for f in ([output] if isinstance(output, Tensor) else output) if f.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.empty_like(f) for f in outputs])
            passes = counter.get_total_flops()
        else:
            passes = 3 * forward
    # A multiply-add is two floating-point operations.
    return output, PartCost(
        params=sum(p.numel() for p in part.parameters()),
        trained=sum(p.numel() for p in part.parameters() if p.requires_grad),
        macs=forward // 2,
        step_macs=passes // 6,
    )
