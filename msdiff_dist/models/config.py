"""The U-Net's shape: `ModelConfig`, and the blocks that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from msdiff_dist.errors import ConfigError

AttentionBackend = Literal["auto", "sdpa", "xformers", "math"]


@dataclass(frozen=True)
class DownBlock:
    """One residual block of an encoder's down path, or the step to the next level when `resamples`."""

    in_channels: int
    out_channels: int
    downsampling: int
    resamples: bool


@dataclass(frozen=True)
class UpBlock:
    """One residual block of a decoder; reads the path and a skip together. `resamples` after it where a level ends."""

    in_channels: int
    out_channels: int
    downsampling: int
    resamples: bool


@dataclass(frozen=True)
class ModelConfig:
    """A U-Net with one shared encoder and one decoder per stage (or one whole U-Net per stage).

    Args:
        encoder_channels: base width of the encoder; one per stage where `share_encoder` is false and they differ.
        decoder_channels: base width of each stage's decoder, stage 0 first. One entry is the unified model.
        channel_mult: width factor of each level.
        num_res_blocks: residual blocks per level (a decoder has one more).
        attention_downsamples: downsampling factors (1, 2, 4, ...) whose levels have attention.
        decoder_attention: the same for each decoder on its own; None takes `attention_downsamples` everywhere.
        num_heads, num_head_channels: exactly one of them: heads by number, or by channels per head.
        context_dim: width of the context tokens. With it, attention levels are spatial transformers (self-attention,
            cross-attention, feed-forward); without it, self-attention blocks.
        use_linear_in_transformer: linear instead of 1x1-convolution projections around a spatial transformer.
        num_classes: labels 0 .. num_classes - 1; label num_classes is the dropped one.
        class_conditioning: "embedding" adds the label's vector to the time embedding, "context" makes it the one
            context token.
        use_scale_shift_norm: time embedding as scale and shift of the second norm instead of an addition.
        resblock_updown: resample inside residual blocks instead of by a strided or upsampling convolution.
        legacy_attention_order: self-attention blocks split heads before q, k, v.
    """

    encoder_channels: int | tuple[int, ...]
    decoder_channels: tuple[int, ...]
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_downsamples: tuple[int, ...] = (8, 4, 2)
    decoder_attention: tuple[tuple[int, ...], ...] | None = None
    family: Literal["ldm"] = "ldm"
    in_channels: int = 3
    out_channels: int = 3
    num_heads: int | None = None
    num_head_channels: int | None = None
    context_dim: int | None = None
    transformer_depth: int = 1
    use_linear_in_transformer: bool = False
    num_classes: int | None = None
    class_conditioning: Literal["embedding", "context"] = "embedding"
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    dropout: float = 0.0
    norm_groups: int = 32
    share_encoder: bool = True
    legacy_attention_order: bool = True
    attention_backend: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_stages()
        self._check_attention()
        self._check_conditioning()
        self._check_norm_groups()

    @property
    def num_stages(self) -> int:
        return len(self.decoder_channels)

    @property
    def takes_context(self) -> bool:
        """Whether `forward` needs context tokens from outside."""
        return self.context_dim is not None and self.class_conditioning == "embedding"

    @property
    def takes_label(self) -> bool:
        return self.num_classes is not None

    def encoder_width(self, stage: int) -> int:
        return self.encoder_channels if isinstance(self.encoder_channels, int) else self.encoder_channels[stage]

    def emb_channels(self, stage: int) -> int:
        """Width of the time embedding."""
        return 4 * self.encoder_width(stage)

    def attention_of(self, stage: int) -> tuple[int, ...]:
        """Downsampling factors at which decoder `stage` has attention."""
        return self.attention_downsamples if self.decoder_attention is None else self.decoder_attention[stage]

    def heads(self, channels: int) -> int:
        if self.num_heads is not None:
            return self.num_heads
        assert self.num_head_channels is not None
        return channels // self.num_head_channels

    def down_blocks(self, stage: int) -> list[DownBlock]:
        """The encoder's blocks after its first convolution; each leaves one skip, as that convolution does."""
        width = channels = self.encoder_width(stage)
        blocks = []
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                blocks.append(DownBlock(channels, mult * width, 2**level, resamples=False))
                channels = mult * width
            if level < len(self.channel_mult) - 1:
                blocks.append(DownBlock(channels, channels, 2**level, resamples=True))
        return blocks

    def up_blocks(self, stage: int) -> list[UpBlock]:
        """Decoder `stage`'s blocks, deepest first; each reads the last skip not yet read."""
        skips = [self.encoder_width(stage), *(b.out_channels for b in self.down_blocks(stage))]
        channels = skips[-1]
        blocks = []
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                width = mult * self.decoder_channels[stage]
                resamples = level > 0 and i == self.num_res_blocks
                blocks.append(UpBlock(channels + skips.pop(), width, 2**level, resamples))
                channels = width
        return blocks

    def check_latent_size(self, height: int, width: int) -> None:
        """Raise `ConfigError` unless every level halves the size exactly."""
        divisor = 2 ** (len(self.channel_mult) - 1)
        if height % divisor or width % divisor:
            raise ConfigError(
                "channel_mult",
                self.channel_mult,
                f"has {len(self.channel_mult)} levels, and {height}x{width} cannot be halved that often",
                f"Use fewer levels, or a height and width that {divisor} divides.",
            )

    def _check_sizes(self) -> None:
        widths = self.encoder_channels if isinstance(self.encoder_channels, tuple) else (self.encoder_channels,)
        positive: dict[str, tuple[int, ...]] = {
            "encoder_channels": widths,
            "decoder_channels": self.decoder_channels,
            "channel_mult": self.channel_mult,
            "num_res_blocks": (self.num_res_blocks,),
            "in_channels": (self.in_channels,),
            "out_channels": (self.out_channels,),
            "transformer_depth": (self.transformer_depth,),
            "norm_groups": (self.norm_groups,),
            **{
                name: (value,)
                for name in ("num_heads", "num_head_channels", "context_dim", "num_classes")
                if (value := getattr(self, name)) is not None
            },
        }
        for name, numbers in positive.items():
            if not numbers or min(numbers) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1", "Give positive whole numbers.")
        if any(w % 2 for w in widths):
            raise ConfigError(
                "encoder_channels", self.encoder_channels, "must be even, for its sines and cosines", "Use even widths."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "must be in [0, 1)", "Give a probability below 1.")

    def _check_stages(self) -> None:
        if isinstance(self.encoder_channels, tuple):
            if self.share_encoder:
                raise ConfigError(
                    "encoder_channels",
                    self.encoder_channels,
                    "is one width per stage, but the encoder is shared",
                    "Give one number, or set share_encoder to false.",
                )
            self._check_one_per_stage("encoder_channels", self.encoder_channels)
        if self.decoder_attention is not None:
            self._check_one_per_stage("decoder_attention", self.decoder_attention)

    def _check_one_per_stage(self, name: str, values: tuple[object, ...]) -> None:
        if len(values) != self.num_stages:
            raise ConfigError(
                name,
                values,
                f"has {len(values)} entries for {self.num_stages} stages (decoder_channels)",
                f"Give {self.num_stages}, stage 0 first.",
            )

    def _check_attention(self) -> None:
        levels = [2**level for level in range(len(self.channel_mult))]
        placements: dict[str, tuple[tuple[int, ...], ...]] = {"attention_downsamples": (self.attention_downsamples,)}
        if self.decoder_attention is not None:
            placements["decoder_attention"] = self.decoder_attention
        for name, lists in placements.items():
            for unknown in sorted({d for factors in lists for d in factors} - set(levels)):
                raise ConfigError(
                    name, getattr(self, name), f"{unknown} is no downsampling of a level", f"Choose from {levels}."
                )
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
        widths = list(self._norm_widths())
        for channels, place in widths:
            if channels % self.norm_groups:
                common = math.gcd(*(c for c, _ in widths))
                fitting = max(g for g in range(1, self.norm_groups + 1) if common % g == 0)
                raise ConfigError(
                    "norm_groups",
                    self.norm_groups,
                    f"does not divide the {channels} channels that a GroupNorm of {place} normalises",
                    f"Set norm_groups to {fitting}, or use widths that {self.norm_groups} divides.",
                )

    def _attention_widths(self) -> Iterator[tuple[int, str]]:
        for stage in range(self.num_stages):
            blocks = self.down_blocks(stage)
            yield blocks[-1].out_channels, "the encoder's middle block"
            for down in blocks:
                if down.downsampling in self.attention_downsamples:
                    yield down.out_channels, "the encoder"
            for up in self.up_blocks(stage):
                if up.downsampling in self.attention_of(stage):
                    yield up.out_channels, f"decoder {stage}"

    def _norm_widths(self) -> Iterator[tuple[int, str]]:
        # Inputs of decoder blocks are sums of these widths.
        for stage in range(self.num_stages):
            yield self.encoder_width(stage), "the encoder"
            for down in self.down_blocks(stage):
                yield down.out_channels, "the encoder"
            for up in self.up_blocks(stage):
                yield up.out_channels, f"decoder {stage}"
