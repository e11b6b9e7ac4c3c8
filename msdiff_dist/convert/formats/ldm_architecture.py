"""A U-Net of the LDM family, read from its tensors' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.models.ldm.config import LDMConfig


@dataclass(frozen=True)
class HeadsRule:
    """Heads, which no shape tells: by number or by channels each. `why` says where they come from."""

    num_heads: int | None
    num_head_channels: int | None
    why: str


@dataclass(frozen=True)
class DecoderNames:
    """Prefixes of one decoder's blocks and head: `output_blocks.` and `out.`, or `de_modules.1.` and `outs.1.`."""

    blocks: str
    head: str


def infer_model(
    unet: TensorSource,
    decoders: Sequence[DecoderNames],
    class_table: tuple[int, int] | None = None,
    heads: HeadsRule | None = None,
) -> tuple[LDMConfig, HeadsRule]:
    """The configuration of a U-Net whose encoder is named `input_blocks`, `middle_block`, `time_embed`, `label_emb`.

    Args:
        class_table: [classes, width] of an embedding of classes as context tokens, where there is one.
        heads: where they are known; None takes the published models' rule.

    Raises:
        CheckpointError: the names do not describe such a U-Net.
    """
    shape = _Shapes(unet)
    width, in_channels = shape.of("input_blocks.0.0.weight")[:2]
    per_level = shape.blocks_per_level(decoders[0])
    count = shape.count("input_blocks.")
    levels, rest = divmod(count, per_level)
    if rest or shape.count(decoders[0].blocks) != count:
        raise _not_ldm(f"{count} input blocks and {shape.count(decoders[0].blocks)} output blocks")
    per_level -= 1
    mults = [shape.width_of(f"input_blocks.{1 + level * (per_level + 1)}.0.") / width for level in range(levels)]
    attention = tuple(
        2**level for level in range(levels) if shape.has_attention(f"input_blocks.{1 + level * (per_level + 1)}.")
    )
    decoder_channels, decoder_attention = [], []
    for names in decoders:
        base = shape.of(f"{names.head}2.weight")[1] / mults[0]
        decoder_channels.append(base)
        decoder_attention.append(
            tuple(
                2**level
                for level in range(levels)
                if shape.has_attention(f"{names.blocks}{(levels - 1 - level) * (per_level + 1)}.")
            )
        )
    if any(value != int(value) for value in [*mults, *decoder_channels]):
        raise _not_ldm(f"level widths {mults} times {width}, which are no whole multiples")

    middle = "middle_block.1."
    cross = f"{middle}transformer_blocks.0.attn2.to_k.weight"
    context_dim = shape.of(cross)[1] if cross in shape else None
    linear = context_dim is not None and len(shape.of(f"{middle}proj_in.weight")) == 2
    scale_shift = shape.of("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * shape.width_of("input_blocks.1.0.")
    updown = f"input_blocks.{per_level + 1}.0.in_layers.2.weight" in shape and levels > 1
    label_rows = shape.of("label_emb.weight")[0] if "label_emb.weight" in shape else None
    if class_table is not None:
        if label_rows is not None or class_table[1] != context_dim:
            raise _not_ldm(f"a class embedding of shape {class_table} beside context width {context_dim}")
        label_rows = class_table[0]
    heads = heads or published_heads(tuple(int(m) for m in mults), context_dim, linear, updown, class_table is not None)
    same = all(a == set(attention) for a in map(set, decoder_attention))
    try:
        config = LDMConfig(
            in_channels=in_channels,
            out_channels=shape.of(f"{decoders[0].head}2.weight")[0],
            encoder_channels=width,
            decoder_channels=tuple(int(c) for c in decoder_channels),
            channel_mult=tuple(int(m) for m in mults),
            num_res_blocks=per_level,
            attention_downsamples=attention,
            decoder_attention=None if same else tuple(decoder_attention),
            num_heads=heads.num_heads,
            num_head_channels=heads.num_head_channels,
            context_dim=context_dim,
            transformer_depth=shape.count(f"{middle}transformer_blocks.") or 1,
            use_linear_in_transformer=linear,
            num_classes=None if label_rows is None else label_rows - 1,
            class_conditioning="context" if class_table else "embedding",
            use_scale_shift_norm=scale_shift,
            resblock_updown=updown,
        )
    except ConfigError as e:
        raise CheckpointError(
            e.field, e.value, f"{e.problem} (heads: {heads.why})",
            "Give the number of heads with --heads or --head-channels, or the configuration with --config.",
        ) from None  # fmt: skip
    return config, heads


def published_heads(
    mults: tuple[int, ...], context_dim: int | None, linear: bool, updown: bool, classes: bool
) -> HeadsRule:
    """The number of heads of the published model of this kind."""
    if context_dim is None:
        if updown:
            return HeadsRule(8, None, "8, as in LSUN churches: residual blocks that resample")
        return HeadsRule(None, 32, "32 channels per head, as in the CelebA-HQ, FFHQ and bedrooms models")
    if linear:
        return HeadsRule(None, 64, "64 channels per head, as in Stable Diffusion 2: linear projections")
    if not classes:
        return HeadsRule(8, None, "8, as in Stable Diffusion 1: text context, convolutional projections")
    if mults == (1, 2, 3, 5):
        return HeadsRule(1, None, "1, as in cin256-v2: classes as context, levels 1, 2, 3, 5")
    return HeadsRule(None, 32, "32 channels per head, as in the vq-f8 ImageNet model: classes as context")


class _Shapes:
    """Questions about the tensors of a U-Net."""

    def __init__(self, source: TensorSource) -> None:
        self._shapes = {key: tuple(source.meta(key).shape) for key in source.names()}

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def of(self, key: str) -> tuple[int, ...]:
        if key not in self._shapes:
            raise _not_ldm(f"no {key}")
        return self._shapes[key]

    def count(self, prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({m[1] for key in self._shapes if (m := pattern.match(key))})

    def width_of(self, block: str) -> int:
        return self.of(f"{block}in_layers.2.weight")[0]

    def has_attention(self, block: str) -> bool:
        return f"{block}1.norm.weight" in self._shapes

    def blocks_per_level(self, names: DecoderNames) -> int:
        """Residual blocks in a decoder's level: up to and with the first that ends in upsampling."""
        for i in range(self.count(names.blocks)):
            last = f"{names.blocks}{i}.{self.count(f'{names.blocks}{i}.') - 1}."
            if f"{last}conv.weight" in self or (not last.endswith(".0.") and f"{last}in_layers.2.weight" in self):
                return i + 1
        return self.count(names.blocks)


def _not_ldm(found: str) -> CheckpointError:
    return CheckpointError(
        "checkpoint", found, "is not what a U-Net of the LDM family has",
        "Name the right format with --from, or convert a checkpoint of this family.",
    )  # fmt: skip
