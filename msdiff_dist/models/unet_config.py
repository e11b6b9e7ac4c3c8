"""The configuration that all U-Net families share, and the list of residual blocks that follows from it.

Encoders, decoders, checks and the resizing of weights all read `down_blocks` and `up_blocks`, so the widths of a U-Net
are computed in one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from msdiff_dist.bounds import check_between, check_bytes, check_different
from msdiff_dist.errors import ConfigError

_MOST_BLOCKS, _MOST_CHANNELS = 20_000, 2**31
AttentionBackend = Literal["auto", "sdpa", "xformers", "math"]


@dataclass(frozen=True, kw_only=True)
class DownBlock:
    """One residual block of an encoder's down path, or, where `resamples`, the step that halves the resolution.

    `downsampling` is the factor 1, 2, 4, ... between the input's resolution and that at which the block begins.
    """

    in_channels: int
    out_channels: int
    downsampling: int
    resamples: bool


@dataclass(frozen=True, kw_only=True)
class UpBlock:
    """One residual block of a decoder. Its input is the previous block's output concatenated with one skip.

    `downsampling` is the factor between the input's resolution and that of the block; `ends_level` marks the last
    block at that resolution.
    """

    in_channels: int
    out_channels: int
    downsampling: int
    ends_level: bool

    @property
    def resamples(self) -> bool:
        """Whether height and width are doubled after this block."""
        return self.ends_level and self.downsampling > 1


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net with one shared encoder and one decoder per stage (or one whole U-Net per stage)."""

    encoder_channels: int | tuple[int, ...]
    """Base width of the encoder; a list of one per stage where `share_encoder` is false and they differ."""
    decoder_channels: tuple[int, ...]
    """Base width of each stage's decoder, stage 0 (nearest the data) first. One entry is the unified model."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Factor on the base width at each resolution level, highest resolution first."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoders have one more."""
    attention_downsamples: tuple[int, ...] = ()
    """Downsampling factors (1, 2, 4, ...) of the levels that have attention."""
    in_channels: int = 3
    """Channels of the network's input."""
    out_channels: int = 3
    """Channels of the network's output."""
    num_classes: int | None = None
    """Number of classes the network is conditioned on; label `num_classes` stands for "no class". null: none."""
    dropout: float = 0.0
    """Dropout probability in residual blocks. Its masks are the one thing in training that depends on how samples are
    spread over ranks."""
    norm_groups: int = 32
    """Groups of a GroupNorm. In family `ldm` it divides every width; in the others it is the most of them,
    min(norm_groups, channels / 4)."""
    share_encoder: bool = True
    """One encoder for all stages. false gives every stage a whole U-Net of its own."""
    attention_backend: AttentionBackend = "auto"
    """How attention is computed. `auto` uses `math` for at most 256 keys on a CPU, in bf16 and where oneDNN multiplies
    fp32 matrices; otherwise `sdpa`."""
    family: str = ""
    """U-Net family."""

    per_stage: ClassVar[tuple[str, ...]] = ("encoder_channels", "decoder_channels")
    """Fields that may differ between unified models which are joined as the stages of one model."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_stages()
        self._check_blocks()
        self._check_attention("attention_downsamples", self.attention_downsamples)

    @property
    def num_stages(self) -> int:
        return len(self.decoder_channels)

    @property
    def context_channels(self) -> int | None:
        """Width of the context tokens that `forward` takes as an argument; None if it takes no context."""
        return None

    @property
    def takes_context(self) -> bool:
        return self.context_channels is not None

    @property
    def takes_label(self) -> bool:
        return self.num_classes is not None

    @property
    def augment_labels(self) -> int:
        """Length of the vector that describes how a sample was augmented; 0 if the model takes none."""
        return 0

    def place_of(self, name: str) -> str:
        """Where a recipe's section `model` says what the attribute `name` is, for messages."""
        return name

    def encoder_width(self, stage: int) -> int:
        """Base width of the encoder that `stage` uses."""
        return self.encoder_channels if isinstance(self.encoder_channels, int) else self.encoder_channels[stage]

    def emb_channels(self, stage: int) -> int:
        """Width of the time embedding."""
        return 4 * self.encoder_width(stage)

    def down_blocks(self, stage: int) -> list[DownBlock]:
        """The encoder's blocks after its first convolution. That convolution and every block give one skip each."""
        width = channels = self.encoder_width(stage)
        blocks = []
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                blocks.append(
                    DownBlock(in_channels=channels, out_channels=mult * width, downsampling=2**level, resamples=False)
                )
                channels = mult * width
            if level < len(self.channel_mult) - 1:
                blocks.append(
                    DownBlock(in_channels=channels, out_channels=channels, downsampling=2**level, resamples=True)
                )
        return blocks

    def up_blocks(self, stage: int) -> list[UpBlock]:
        """Blocks of the decoder of `stage`, deepest first. Each takes the last skip that none has taken yet."""
        # Per level the encoder leaves one skip more than it has residual blocks: that of the first convolution, or of
        # the step to the level. So a decoder has one block more per level.
        skips = [self.encoder_width(stage), *(b.out_channels for b in self.down_blocks(stage))]
        channels = skips[-1]
        blocks = []
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                width = mult * self.decoder_channels[stage]
                blocks.append(
                    UpBlock(
                        in_channels=channels + skips.pop(),
                        out_channels=width,
                        downsampling=2**level,
                        ends_level=i == self.num_res_blocks,
                    )
                )
                channels = width
        return blocks

    # Configurations of models that are made from other models. A family whose stages differ in more than their widths
    # overrides these.

    def of_decoders(self, parts: Sequence[tuple[Self, int]], **changes: Any) -> Self:
        """This configuration with one decoder for each (model, stage) of `parts`, and with `changes`."""
        return replace(self, decoder_channels=tuple(model.decoder_channels[k] for model, k in parts), **changes)

    def of_stages(self, stages: Sequence[int]) -> UNetConfig:
        """The model with these stages alone. A single stage's encoder counts as shared: it is a unified model."""
        one = len(stages) == 1
        encoders = self.encoder_channels
        if isinstance(encoders, tuple):
            encoders = encoders[stages[0]] if one else tuple(encoders[k] for k in stages)
        parts = [(self, k) for k in stages]
        return self.of_decoders(parts, encoder_channels=encoders, share_encoder=one or self.share_encoder)

    def of_widths(self, widths: Sequence[int], attention: Sequence[Sequence[int]] | None = None) -> Self:
        """This unified model's configuration with one decoder for each of `widths`.

        Args:
            attention: downsampling factors at which each decoder has attention; None: those of the unified decoder.

        Raises:
            ConfigError: `attention` is given, but decoders of this family have it at the encoder's places.
        """
        if attention:
            problem = f"decoders of family {self.family} have attention where the encoder has it"
            raise ConfigError("--attention", [list(places) for places in attention], problem, "Omit it.")
        return replace(self, decoder_channels=tuple(widths))

    def unified(self) -> Self:
        """The unified model to compare with: one decoder, as wide as the encoder (of stage 0 where widths differ)."""
        return replace(self, decoder_channels=(self.encoder_width(0),), share_encoder=True)

    def small(self, width: int, context_width: int) -> Self:
        """A model of the same structure that runs in moments, for tests of a recipe.

        It keeps levels and stages, with one block per level. Base widths keep their proportions, in multiples of four.

        Args:
            width: base width of the widest encoder, a multiple of four.
            context_width: width of the context tokens, where the model takes context.
        """
        encoders = self.encoder_channels if isinstance(self.encoder_channels, tuple) else (self.encoder_channels,)

        def scaled(channels: int) -> int:
            return max(4, 4 * round(width * channels / max(encoders) / 4))

        return replace(
            self,
            encoder_channels=tuple(map(scaled, encoders)) if isinstance(self.encoder_channels, tuple) else width,
            decoder_channels=tuple(map(scaled, self.decoder_channels)),
            channel_mult=tuple(min(m, 2) for m in self.channel_mult),
            num_res_blocks=1,
            norm_groups=4,  # divides every width, since base widths are multiples of four
            **self._small_changes(context_width),
        )

    def _small_changes(self, context_width: int) -> dict[str, Any]:
        """Changes that the family adds to those of `small`."""
        return {}

    def check_latent_size(self, height: int, width: int) -> None:
        """Raise `ConfigError` unless height and width can be halved exactly at every level but the first."""
        divisor = 2 ** (len(self.channel_mult) - 1)
        if height % divisor or width % divisor:
            raise ConfigError(
                "channel_mult",
                self.channel_mult,
                f"has {len(self.channel_mult)} levels, and {height}x{width} cannot be halved that often",
                f"Use fewer levels, or a height and width that {divisor} divides.",
            )

    def check_conditions(self, context: Tensor | None, label: Tensor | None, augment: Tensor | None = None) -> None:
        """Raise `ConfigError` unless a forward pass is given exactly the conditions that the model takes.

        `augment` may be absent from a model that takes it: that means "not augmented", as in sampling.
        """
        for name, given, wanted in (
            ("context", context is not None, self.takes_context),
            ("label", label is not None, self.takes_label),
            ("augment", augment is not None, augment is not None and self.augment_labels > 0),
        ):
            if given != wanted:
                raise ConfigError(
                    name,
                    "given" if given else None,
                    f"the model {'needs' if wanted else 'takes no'} {name}",
                    "Match the data's conditioning to the model's context_dim, num_classes and class_conditioning.",
                )

    def _check_sizes(self) -> None:
        widths = self.encoder_channels if isinstance(self.encoder_channels, tuple) else (self.encoder_channels,)
        self._check_positive("encoder_channels", *widths)
        for name in ("decoder_channels", "channel_mult"):
            self._check_positive(name, *getattr(self, name))
        for name in ("num_res_blocks", "in_channels", "out_channels", "norm_groups", "num_classes"):
            self._check_positive(name, getattr(self, name))
        if any(w % 2 for w in widths):
            raise ConfigError(
                "encoder_channels", self.encoder_channels, "must be even, for its sines and cosines", "Use even widths."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "must be in [0, 1)", "Give a probability below 1.")

    def _check_positive(self, name: str, *numbers: int | None) -> None:
        # No numbers at all are an empty list, which is refused as well.
        if not numbers or any(n is not None and n < 1 for n in numbers):
            raise ConfigError(name, getattr(self, name), "must be at least 1", "Give positive whole numbers.")

    def _check_blocks(self) -> None:
        """Refuse what no memory holds: checks and plans go through all blocks, and torch's sizes overflow."""
        blocks = self.num_stages * len(self.channel_mult) * (2 * self.num_res_blocks + 1)
        if blocks > _MOST_BLOCKS:
            by_name = {
                "num_res_blocks": self.num_res_blocks,
                "channel_mult": len(self.channel_mult),
                "decoder_channels": self.num_stages,
            }
            name = max(by_name, key=by_name.__getitem__)
            problem = f"makes a model of {blocks:,} residual blocks, and at most {_MOST_BLOCKS:,} are possible"
            raise ConfigError(name, getattr(self, name), problem, "Use fewer.")
        for name in ("in_channels", "out_channels", "num_classes"):
            check_between(name, getattr(self, name), 1, _MOST_CHANNELS)
        for k in range(self.num_stages):
            # A residual block has a 3x3 convolution from its inputs to its outputs, in fp32.
            for name, part in (("encoder_channels", self.down_blocks(k)), ("decoder_channels", self.up_blocks(k))):
                convolutions = sum(4 * 9 * block.in_channels * block.out_channels for block in part)
                width = self.encoder_width(k) if name == "encoder_channels" else self.decoder_channels[k]
                culprit = "channel_mult" if max(self.channel_mult) > width else name
                check_bytes(culprit, getattr(self, culprit), convolutions, "the convolutions of one part of the model")
            label_bytes = 4 * self.emb_channels(k) * (self.num_classes or 0)
            check_bytes("num_classes", self.num_classes, label_bytes, "the embedding of classes")

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

    def _check_one_per_stage(self, name: str, values: tuple[object, ...]) -> None:
        if len(values) != self.num_stages:
            raise ConfigError(
                name,
                values,
                f"has {len(values)} entries for {self.num_stages} stages (decoder_channels)",
                f"Give {self.num_stages}, stage 0 first.",
            )

    def _check_attention(self, name: str, *placements: tuple[int, ...]) -> None:
        levels = [2**level for level in range(len(self.channel_mult))]
        for factors in placements:
            check_different(name, factors)
        for unknown in sorted({d for factors in placements for d in factors} - set(levels)):
            raise ConfigError(
                name, getattr(self, name), f"no level has the downsampling {unknown}", f"Choose from {levels}."
            )

    def _block_widths(self) -> Iterator[tuple[int, str]]:
        """(channels, place) of the output of every block. A block's input has one of these widths or a sum of two."""
        for stage in range(self.num_stages):
            yield self.encoder_width(stage), "the encoder"
            for down in self.down_blocks(stage):
                yield down.out_channels, "the encoder"
            for up in self.up_blocks(stage):
                yield up.out_channels, f"decoder {stage}"
