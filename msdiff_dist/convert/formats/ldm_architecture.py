"""Infers the configuration of a U-Net of the LDM family from its tensors' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from msdiff_dist.convert.options import HeadsRule
from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.models.ldm.config import LDMConfig


@dataclass(frozen=True)
class DecoderNames:
    """Prefixes of the names of a decoder's blocks and of its output layers.

    In LDM `output_blocks.` and `out.`; in the multi-stage code, for stage 1, `de_modules.1.` and `outs.1.`.
    """

    blocks: str
    head: str


def infer_model(
    unet: TensorSource,
    decoders: Sequence[DecoderNames],
    class_table: tuple[int, int] | None = None,
    heads: HeadsRule | None = None,
) -> tuple[LDMConfig, HeadsRule]:
    """The configuration of a U-Net, and the rule for its heads that was used.

    Args:
        unet: tensors under LDM's names; the encoder's are `input_blocks`, `middle_block`, `time_embed`, `label_emb`.
        decoders: names of the decoders, stage 0 first.
        class_table: shape [classes, width] of a table of classes that are context tokens; None where there is none.
        heads: the rule, where it is known; None takes the published models' (`published_heads`).

    Raises:
        CheckpointError: the names or shapes are not those of such a U-Net.
    """
    shape = _Shapes(unet)
    width, in_channels = shape.of("input_blocks.0.0.weight")[:2]
    # In the encoder a level is its residual blocks and the resampling before the next level; block 0 is the first
    # convolution. So encoder and decoder have the same number of blocks, num_res_blocks + 1 for each level.
    per_level = shape.blocks_per_level(decoders[0])
    count = shape.count("input_blocks.")
    levels, rest = divmod(count, per_level)
    if rest or shape.count(decoders[0].blocks) != count:
        raise _not_ldm(f"{count} input blocks and {shape.count(decoders[0].blocks)} output blocks")
    num_res_blocks = per_level - 1
    first_blocks = [f"input_blocks.{1 + level * per_level}." for level in range(levels)]
    mults = [shape.width_of(f"{block}0.") / width for block in first_blocks]
    attention = tuple(2**level for level, block in enumerate(first_blocks) if shape.has_attention(block))
    decoder_channels, decoder_attention = [], []
    for names in decoders:
        decoder_channels.append(shape.of(f"{names.head}2.weight")[1] / mults[0])
        # Decoders begin at the deepest level.
        first_blocks = [f"{names.blocks}{(levels - 1 - level) * per_level}." for level in range(levels)]
        decoder_attention.append(
            tuple(2**level for level, block in enumerate(first_blocks) if shape.has_attention(block))
        )
    if any(value != int(value) for value in [*mults, *decoder_channels]):
        raise _not_ldm(f"level widths {mults} times {width}, which are no whole multiples")

    middle = "middle_block.1."
    cross = f"{middle}transformer_blocks.0.attn2.to_k.weight"  # keys from the context: [C, context_dim]
    context_dim = shape.of(cross)[1] if cross in shape else None
    linear = context_dim is not None and len(shape.of(f"{middle}proj_in.weight")) == 2
    # With scale and shift the time embedding gives two numbers for each channel.
    scale_shift = shape.of("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * shape.width_of("input_blocks.1.0.")
    # The block between two levels is a convolution, or a residual block that resamples.
    updown = f"input_blocks.{per_level}.0.in_layers.2.weight" in shape and levels > 1
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
            num_res_blocks=num_res_blocks,
            attention_downsamples=attention,
            decoder_attention=None if same else tuple(decoder_attention),
            num_heads=heads.num_heads,
            num_head_channels=heads.num_head_channels,
            context_dim=context_dim,
            transformer_depth=shape.count(f"{middle}transformer_blocks.") or 1,
            use_linear_in_transformer=linear,
            num_classes=None if label_rows is None else label_rows - 1,  # the last row is that of the dropped class
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
    """The heads of the published model of this kind.

    Args:
        mults: width of each level as a multiple of the first convolution's.
        context_dim: width of the context tokens; None without context.
        linear: whether transformers project with linear layers instead of convolutions.
        updown: whether residual blocks resample.
        classes: whether the context is a class.
    """
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
    """Answers questions about the shapes of a U-Net's tensors."""

    def __init__(self, source: TensorSource) -> None:
        self._shapes = {key: tuple(source.meta(key).shape) for key in source.names()}

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def of(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor that every such U-Net has."""
        if key not in self._shapes:
            raise _not_ldm(f"no {key}")
        return self._shapes[key]

    def count(self, prefix: str) -> int:
        """Number of modules in the list `prefix`."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({m[1] for key in self._shapes if (m := pattern.match(key))})

    def width_of(self, block: str) -> int:
        """Output channels of a residual block."""
        return self.of(f"{block}in_layers.2.weight")[0]

    def has_attention(self, block: str) -> bool:
        return f"{block}1.norm.weight" in self._shapes

    def blocks_per_level(self, names: DecoderNames) -> int:
        """Number of blocks in a decoder's level, whose last block ends in upsampling; in all, if there is one level."""
        for i in range(self.count(names.blocks)):
            # The block's last layer upsamples if it has a convolution, or is a second residual block.
            last = f"{names.blocks}{i}.{self.count(f'{names.blocks}{i}.') - 1}."
            if f"{last}conv.weight" in self or (not last.endswith(".0.") and f"{last}in_layers.2.weight" in self):
                return i + 1
        return self.count(names.blocks)


def _not_ldm(found: str) -> CheckpointError:
    return CheckpointError(
        "checkpoint", found, "is not what a U-Net of the LDM family has",
        "Name the right format with --from, or convert a checkpoint of this family.",
    )  # fmt: skip
