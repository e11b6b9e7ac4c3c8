"""Building blocks of the LDM family's encoder and decoders (ADM, 2105.05233; LDM, 2112.10752).

Modules and parameters have the names of LDM's code, so that its checkpoints convert by name.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdiff_dist.models.attention import SelfAttentionBlock, SpatialTransformer, zero_init
from msdiff_dist.models.group_norm import GroupNorm
from msdiff_dist.models.ldm.config import LDMConfig


def timestep_embedding(t_B: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at `channels / 2` frequencies from 1 down towards 1/10000; float32 [B, channels]."""
    half = channels // 2
    # Times near 1000 magnify the rounding of a frequency a thousandfold, so keep the published code's order of
    # operations.
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(_double(x_BCHW))
        return out


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.op(x_BCHW)
        return out


class ResBlock(nn.Module):
    """Residual block of two convolutions, between which the time embedding enters.

    Args:
        emb_channels: width of the time embedding.
        resample: "up" doubles, "down" halves height and width on both paths; None keeps them.
    """

    def __init__(
        self,
        config: LDMConfig,
        in_channels: int,
        emb_channels: int,
        out_channels: int,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = config.use_scale_shift_norm
        self.resample = {None: nn.Identity(), "up": _Double(), "down": nn.AvgPool2d(2)}[resample]
        # A norm computes the SiLU after it as well; an identity keeps the places that published checkpoints name.
        self.in_layers = nn.Sequential(
            GroupNorm(config.norm_groups, in_channels, silu=True),
            nn.Identity(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if self.scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(config.norm_groups, out_channels, silu=True),
            nn.Identity(),
            nn.Dropout(config.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = conv(self.resample(norm(x_BCHW)))
        emb_BC = self.emb_layers(emb_BE)
        if self.scale_shift:
            # Adaptive group normalisation (2105.05233, Sec. 3): the embedding acts after the norm.
            norm, _, dropout, conv = self.out_layers
            h = conv(dropout(norm(h, *emb_BC.chunk(2, dim=1))))
        else:
            h = self.out_layers(h + emb_BC[:, :, None, None])
        out: Tensor = self.skip_connection(self.resample(x_BCHW)) + h
        return out


class UNetBlock(nn.Sequential):
    """Layers in sequence; each is called with what it needs of the time embedding and the context."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, context_BSE: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x_BCHW = layer(x_BCHW, emb_BE)
            elif isinstance(layer, SpatialTransformer):
                x_BCHW = layer(x_BCHW, context_BSE)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


def attention_block(config: LDMConfig, channels: int) -> SelfAttentionBlock | SpatialTransformer:
    """A spatial transformer where the model has context tokens, else a self-attention block."""
    heads = config.heads(channels)
    if config.context_dim is None:
        return SelfAttentionBlock(
            channels, heads, config.norm_groups, config.attention_backend, config.legacy_attention_order
        )
    return SpatialTransformer(
        channels,
        heads,
        config.norm_groups,
        config.attention_backend,
        config.context_dim,
        config.transformer_depth,
        config.use_linear_in_transformer,
    )


class _Double(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return _double(x_BCHW)


def _double(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
