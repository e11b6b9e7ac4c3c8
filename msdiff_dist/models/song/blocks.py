"""Building blocks of the DDPM++ and NCSN++ families' encoder and decoders (2011.13456; 2206.00364, appendix F)."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdiff_dist.models.attention import SelfAttentionBlock
from msdiff_dist.models.group_norm import GroupNorm
from msdiff_dist.models.song.config import SongConfig
from msdiff_dist.randomness import generator

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

SILENT = 1e-5
"""Gain of the first weights of a branch's last layer: the branch starts close to zero."""
HALF_POWER = math.sqrt(0.5)
"""Factor on the sum of two paths that keeps the variance of each."""
_EPS = 1e-6  # of GroupNorm, as in the published networks


def initialised(layer: Layer, scale: float = 1.0) -> Layer:
    """Set the layer's weights to uniform Xavier values times `scale` and its bias to zero; return the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int = 3, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps height and width, with the families' first weights."""
    return initialised(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2), scale)


def group_norm(config: SongConfig, channels: int) -> GroupNorm:
    """A norm with the SiLU that follows it."""
    return GroupNorm(config.groups(channels), channels, eps=_EPS, silu=True)


class TimeFrequencies:
    """Sines, then cosines, of the time input at `channels / 2` frequencies; float32 [B, channels].

    `positional` frequencies run from 1 down to 1/10000, evenly in the logarithm. `fourier` frequencies are 2 pi times
    normal numbers of standard deviation 16, the same in every model. This is no `nn.Module`, so that casting a model
    to bfloat16 does not round them.
    """

    def __init__(self, embedding: Literal["positional", "fourier"], channels: int) -> None:
        half = channels // 2
        if embedding == "positional":
            exponents = torch.arange(half, dtype=torch.float32, device="cpu") * (-math.log(10_000) / max(1, half - 1))
            self.frequencies = exponents.exp()
        else:
            normal = generator(0, "fourier frequencies").standard_normal(half)
            self.frequencies = torch.from_numpy(2 * math.pi * 16 * normal).float()

    def __call__(self, t_B: Tensor) -> Tensor:
        if self.frequencies.device != t_B.device:
            self.frequencies = self.frequencies.to(t_B.device)
        angles = t_B.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Filter(nn.Module):
    """A separable low-pass filter over each channel, with zeros beyond the border.

    Args:
        taps: weights along each axis, even in number; they are normalised to sum to one.
    """

    kernel: Tensor

    def __init__(self, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.taps = taps
        # On the CPU even where the model is built on the meta device: checkpoints do not hold this buffer.
        row = torch.tensor(taps, dtype=torch.float32, device="cpu") / sum(taps)
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x_BCHW: Tensor, padding: int) -> Tensor:
        """The filtered image, at the same spacing of pixels."""
        return F.conv2d(x_BCHW, self._kernel(x_BCHW), padding=padding, groups=x_BCHW.shape[1])

    def halved(self, x_BCHW: Tensor) -> Tensor:
        """Filter, and keep every other pixel."""
        # The filter of taps (1, 1) is average pooling here, and nearest-neighbour doubling in `doubled`.
        if self.taps == (1, 1):
            return F.avg_pool2d(x_BCHW, 2)
        return F.conv2d(x_BCHW, self._kernel(x_BCHW), stride=2, padding=self._padding, groups=x_BCHW.shape[1])

    def doubled(self, x_BCHW: Tensor) -> Tensor:
        """Insert zeros between pixels, and filter; four times the weights make up for three zeros to each pixel."""
        if self.taps == (1, 1):
            return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
        kernel = 4 * self._kernel(x_BCHW)
        return F.conv_transpose2d(x_BCHW, kernel, stride=2, padding=self._padding, groups=x_BCHW.shape[1])

    @property
    def _padding(self) -> int:
        return len(self.taps) // 2 - 1

    def _kernel(self, x_BCHW: Tensor) -> Tensor:
        return self.kernel.to(x_BCHW.dtype).expand(x_BCHW.shape[1], -1, -1, -1)


class SongBlock(nn.Module):
    """Residual block of two convolutions, between which the time embedding enters, and self-attention with one head.

    Args:
        emb_channels: width of the time embedding.
        resample: "up" doubles, "down" halves height and width on both paths; None keeps them.
        attention: the block ends in self-attention.
    """

    def __init__(
        self,
        config: SongConfig,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        resample: Literal["up", "down"] | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.filter = resample, Filter(config.variant.resample_filter)
        self.in_norm, self.in_conv = group_norm(config, in_channels), conv(in_channels, out_channels)
        self.emb = initialised(nn.Linear(emb_channels, out_channels))
        self.out_norm, self.out_conv = group_norm(config, out_channels), conv(out_channels, out_channels, scale=SILENT)
        self.dropout = nn.Dropout(config.dropout)
        same_shape = in_channels == out_channels and resample is None
        self.skip = nn.Identity() if same_shape else conv(in_channels, out_channels, kernel=1)
        self.attention = _attention(config, out_channels) if attention else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        h = self.in_conv(self._resampled(self.in_norm(x_BCHW)))
        h = self.out_norm(h + self.emb(emb_BE)[:, :, None, None])
        h = (self.skip(self._resampled(x_BCHW)) + self.out_conv(self.dropout(h))) * HALF_POWER
        # `SelfAttentionBlock` adds its input already: here the sum is only rescaled.
        out: Tensor = h if self.attention is None else self.attention(h) * HALF_POWER
        return out

    def _resampled(self, x_BCHW: Tensor) -> Tensor:
        if self.resample is None:
            return x_BCHW
        return self.filter.doubled(x_BCHW) if self.resample == "up" else self.filter.halved(x_BCHW)


class SongBlocks(nn.Sequential):
    """Blocks in sequence; each is called with the time embedding."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:  # type: ignore[override]
        for block in self:
            x_BCHW = block(x_BCHW, emb_BE)
        return x_BCHW


class PyramidStep(nn.Module):
    """A step of NCSN++'s input pyramid ("residual" in 2011.13456): adds the image, halved, to the encoder's path."""

    def __init__(self, config: SongConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.filter = Filter(config.variant.resample_filter)
        self.conv = initialised(nn.Conv2d(in_channels, out_channels, 3, stride=2))

    def forward(self, image_BCHW: Tensor, h_BCHW: Tensor) -> Tensor:
        # The filter's padding leaves one pixel more on each axis, so that the unpadded convolution halves exactly.
        halved = self.conv(self.filter(image_BCHW, padding=len(self.filter.taps) // 2))
        out: Tensor = (halved + h_BCHW) * HALF_POWER
        return out


def middle_block(config: SongConfig, channels: int, emb_channels: int) -> SongBlocks:
    """The two blocks at the lowest resolution, the first with attention."""
    return SongBlocks(
        SongBlock(config, channels, channels, emb_channels, attention=True),
        SongBlock(config, channels, channels, emb_channels),
    )


def _attention(config: SongConfig, channels: int) -> SelfAttentionBlock:
    groups, backend = config.groups(channels), config.attention_backend
    block = SelfAttentionBlock(channels, 1, groups, backend, legacy_order=False, eps=_EPS)
    initialised(block.qkv, math.sqrt(0.2))
    initialised(block.proj_out, SILENT)
    return block
