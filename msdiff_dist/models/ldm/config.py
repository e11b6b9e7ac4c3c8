"""Configuration of family `ldm`: fields, and the checks that fail before a model is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from msdiff_dist.bounds import check_between, check_bytes
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.unet_config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class LDMConfig(UNetConfig):
    """The U-Net of latent diffusion (2105.05233; 2112.10752), with a decoder per stage."""

    family: Literal["ldm"] = "ldm"
    """U-Net family."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    attention_downsamples: tuple[int, ...] = (8, 4, 2)
    decoder_attention: tuple[tuple[int, ...], ...] | None = None
    """`attention_downsamples` of each decoder, stage 0 first; null gives every decoder those of the encoder."""
    num_heads: int | None = None
    """Attention heads; give this or `num_head_channels`."""
    num_head_channels: int | None = None
    """Channels of an attention head; give this or `num_heads`."""
    context_dim: int | None = None
    """Width of the context tokens. With it, attention levels are spatial transformers (self-attention, cross-attention,
    feed-forward); without it, self-attention blocks."""
    transformer_depth: int = 1
    """Transformer blocks in each spatial transformer."""
    use_linear_in_transformer: bool = False
    """Linear projections around a spatial transformer instead of 1x1 convolutions."""
    class_conditioning: Literal["embedding", "context"] = "embedding"
    """How a class enters: `embedding` adds its vector to the time embedding, `context` makes it the one context
    token."""
    use_scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm of a residual block instead of being added."""
    resblock_updown: bool = False
    """Resample inside residual blocks instead of by a strided or an upsampling convolution."""
    legacy_attention_order: bool = True
    """Self-attention blocks divide their projection into heads before q, k and v, as LDM's checkpoints do."""

    per_stage = (*UNetConfig.per_stage, "decoder_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transformer_depth", "num_heads", "num_head_channels", "context_dim"):
            self._check_positive(name, getattr(self, name))
        check_between("transformer_depth", self.transformer_depth, 1, 100)
        widest = max(channels for channels, _ in self._block_widths())
        check_bytes("context_dim", self.context_dim, 4 * widest * (self.context_dim or 0), "a cross-attention layer")
        if self.decoder_attention is not None:
            self._check_one_per_stage("decoder_attention", self.decoder_attention)
            self._check_attention("decoder_attention", *self.decoder_attention)
        self._check_heads()
        self._check_conditioning()
        self._check_norm_groups()

    @property
    def context_channels(self) -> int | None:
        # With `class_conditioning: context` the encoder makes the one context token itself, from the label.
        return self.context_dim if self.class_conditioning == "embedding" else None

    def attention_of(self, stage: int) -> tuple[int, ...]:
        """Downsampling factors at which decoder `stage` has attention."""
        return self.attention_downsamples if self.decoder_attention is None else self.decoder_attention[stage]

    def of_decoders(self, parts: Sequence[tuple[Self, int]], **changes: Any) -> Self:
        return super().of_decoders(parts, **changes, **self._attention([model.attention_of(k) for model, k in parts]))

    def of_widths(self, widths: Sequence[int], attention: Sequence[Sequence[int]] | None = None) -> Self:
        places = attention or [self.attention_of(0)] * len(widths)
        return replace(self, decoder_channels=tuple(widths), **self._attention(places))

    def unified(self) -> Self:
        return replace(self, decoder_channels=(self.encoder_width(0),), share_encoder=True, decoder_attention=None)

    def _attention(self, places: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The field `decoder_attention` for decoders with these places: null where all have the encoder's."""
        of_stages = tuple(tuple(factors) for factors in places)
        return {"decoder_attention": None if set(of_stages) == {self.attention_downsamples} else of_stages}

    def _small_changes(self, context_width: int) -> dict[str, Any]:
        heads = {"num_heads": None, "num_head_channels": 4} if self.num_head_channels else {"num_heads": 1}
        return {**heads, "context_dim": self.context_dim and context_width, "transformer_depth": 1}

    def heads(self, channels: int) -> int:
        """Number of heads of an attention layer over `channels`."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return channels // self.num_head_channels

    def _check_heads(self) -> None:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ConfigError(
                "num_heads",
                self.num_heads,
                f"exactly one of num_heads and num_head_channels (= {self.num_head_channels}) must be set",
                "Keep one: heads by number, or by channels per head.",
            )
        name, divisor = (
            ("num_heads", self.num_heads)
            if self.num_heads is not None
            else ("num_head_channels", self.num_head_channels)
        )
        assert divisor is not None
        for channels, place in self._attention_widths():
            if channels % divisor:
                raise ConfigError(
                    name,
                    divisor,
                    f"does not divide the {channels} channels of attention in {place}",
                    f"Use a divisor of {channels}, other widths, or no attention there.",
                )

    def _check_conditioning(self) -> None:
        if self.class_conditioning == "context" and (self.num_classes is None or self.context_dim is None):
            raise ConfigError(
                "class_conditioning",
                self.class_conditioning,
                "needs num_classes and context_dim",
                'Set both, or use "embedding".',
            )

    def _check_norm_groups(self) -> None:
        widths = list(self._block_widths())
        for channels, place in widths:
            if channels % self.norm_groups:
                # Inputs of blocks are sums of these widths, so what divides all widths divides all inputs.
                common = math.gcd(*(c for c, _ in widths))
                fitting = max(g for g in range(1, min(self.norm_groups, common) + 1) if common % g == 0)
                raise ConfigError(
                    "norm_groups",
                    self.norm_groups,
                    f"does not divide the {channels} channels that a GroupNorm of {place} normalises",
                    f"Set norm_groups to {fitting}, or use widths that {self.norm_groups} divides.",
                )

    def _attention_widths(self) -> Iterator[tuple[int, str]]:
        """(channels, place) of every attention layer. The middle block always has one."""
        for stage in range(self.num_stages):
            blocks = self.down_blocks(stage)
            yield blocks[-1].out_channels, "the encoder's middle block"
            for down in blocks:
                if down.downsampling in self.attention_downsamples:
                    yield down.out_channels, "the encoder"
            for up in self.up_blocks(stage):
                if up.downsampling in self.attention_of(stage):
                    yield up.out_channels, f"decoder {stage}"
