"""diffusers' UNet2DModel and UNet2DConditionModel: configurations and key maps, both ways.

The up path of these stock classes is as wide as their down path, so they hold a unified model, or one stage, whose
decoder is as wide as its encoder. The class of `carried/multistage_unet_2d.py` holds any other model under the same
names, with `decoders.K.` before those of decoder K.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from msdiff_dist.convert.key_map import SAME, Layout, Rule, SplitQKV
from msdiff_dist.errors import CheckpointError, ConfigError
from msdiff_dist.models.ldm.config import LDMConfig

# The classes of diffusers that this package's networks fit.
STOCK = ("UNet2DModel", "UNet2DConditionModel")
# Attention's layers: their names now, and before diffusers 0.15.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_IRRELEVANT = {  # fields of config.json that change no output in evaluation: sizes and hints about precision
    "sample_size", "num_train_timesteps", "upcast_attention", "dropout", "addition_embed_type_num_heads",
    "reverse_transformer_layers_per_block", "mid_block_only_cross_attention", "addition_time_embed_dim",
    # What EMAModel of diffusers adds to the config.json of averaged weights.
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip


def stock_config(model: LDMConfig) -> dict[str, Any] | str:
    """config.json of the stock class that computes the same; if there is none, the reason, as a clause."""
    width, mults = model.encoder_width(0), model.channel_mult
    if model.num_stages > 1:
        return "it has several decoders"
    if model.decoder_channels[0] != width:
        return f"its decoder is {model.decoder_channels[0]} channels wide and its encoder {width}"
    if mults[0] != 1:
        return "its first level is wider than its first convolution"
    if model.class_conditioning == "context":
        return "its classes are context tokens, whose table the stock class does not hold"
    levels = range(len(mults))
    down = [2**i in model.attention_downsamples for i in levels]
    up = [2**i in model.attention_of(0) for i in reversed(levels)]
    common = {
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "block_out_channels": [width * m for m in mults],
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if model.use_scale_shift_norm else "default",
        "num_class_embeds": None if model.num_classes is None else model.num_classes + 1,
        "dropout": model.dropout,
    }
    if model.context_dim is not None:
        if model.resblock_updown:
            return "it resamples inside residual blocks, between blocks with context"
        # What this class calls attention_head_dim is the number of heads.
        heads = model.num_heads or [max(1, width * m // (model.num_head_channels or 1)) for m in mults]
        return {
            "_class_name": "UNet2DConditionModel",
            **common,
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in down],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up],
            "attention_head_dim": heads,
            "cross_attention_dim": model.context_dim,
            "transformer_layers_per_block": model.transformer_depth,
            "use_linear_projection": model.use_linear_in_transformer,
        }
    # This class has one number of channels per head, at every width that has attention; None is one head of all
    # channels.
    attended = {width * m for i, m in enumerate(mults) if down[i] or up[-1 - i]} | {width * mults[-1]}
    head_dims = {c // model.heads(c) for c in attended}
    if len(head_dims) > 1 and model.num_heads != 1:
        return f"it has {model.num_heads} heads at every width, and the stock class the same channels per head"
    kind = "Resnet{}sampleBlock2D" if model.resblock_updown else "{}Block2D"
    return {
        "_class_name": "UNet2DModel",
        **common,
        "down_block_types": ["AttnDownBlock2D" if a else kind.format("Down") for a in down],
        "up_block_types": ["AttnUpBlock2D" if a else kind.format("Up") for a in up],
        "downsample_type": "resnet" if model.resblock_updown else "conv",
        "upsample_type": "resnet" if model.resblock_updown else "conv",
        "attention_head_dim": None if model.num_heads == 1 else head_dims.pop(),
        # Under scale and shift the stock class's middle attention has no norm unless this is set.
        "attn_norm_num_groups": model.norm_groups if model.use_scale_shift_norm else None,
    }


def stock_network(model: LDMConfig) -> nn.Module:
    """diffusers' own network of this architecture, with fresh weights, to compare with.

    Raises:
        ConfigError: there is none.
    """
    import diffusers

    config = stock_config(model)
    if isinstance(config, str):
        raise ConfigError("model", model.family, f"no class of diffusers computes it: {config}", "Unify its stages.")
    fields = {name: value for name, value in config.items() if name != "_class_name"}
    network: nn.Module = getattr(diffusers, config["_class_name"])(**fields)
    return network


def model_of_stock(config: Mapping[str, Any]) -> LDMConfig:
    """Our configuration of the network that a stock class's config.json describes.

    Raises:
        CheckpointError: a field asks for something that our network does not do.
    """
    full = {**_defaults(config["_class_name"]), **config}
    widths = _tuple(full["block_out_channels"])
    if any(w % widths[0] for w in widths):
        raise _unsupported("block_out_channels", widths, "are no whole multiples of the first")
    levels = len(widths)
    down = tuple(2**i for i, kind in enumerate(full["down_block_types"]) if "Attn" in kind)
    up = tuple(2 ** (levels - 1 - i) for i, kind in enumerate(full["up_block_types"]) if "Attn" in kind)
    conditional = config["_class_name"] == "UNet2DConditionModel"
    num_heads, per_head = _conditional_heads(full, widths) if conditional else _plain_heads(full)
    classes = full["num_class_embeds"]
    try:
        model = LDMConfig(
            in_channels=full["in_channels"],
            out_channels=full["out_channels"],
            encoder_channels=widths[0],
            decoder_channels=(widths[0],),
            channel_mult=tuple(w // widths[0] for w in widths),
            num_res_blocks=full["layers_per_block"],
            attention_downsamples=down,
            decoder_attention=None if set(up) == set(down) else (tuple(sorted(up)),),
            num_classes=None if classes is None else classes - 1,
            context_dim=full["cross_attention_dim"] if conditional else None,
            transformer_depth=full["transformer_layers_per_block"] if conditional else 1,
            use_linear_in_transformer=bool(full.get("use_linear_projection")),
            use_scale_shift_norm=full["resnet_time_scale_shift"] == "scale_shift",
            resblock_updown=full.get("downsample_type") == "resnet",
            dropout=full["dropout"],
            norm_groups=full["norm_num_groups"],
            num_heads=num_heads,
            num_head_channels=per_head,
        )
    except (ConfigError, TypeError) as e:
        raise CheckpointError(
            "unet/config.json", None, f"describes a network that cannot be built here ({e})", "Convert another."
        ) from None
    # The configuration must give the same config.json again: a field that differs asks for something else.
    ours = stock_config(model)
    if isinstance(ours, str):
        raise _unsupported("unet/config.json", None, f"describes a network of which {ours}")
    expected = {**_defaults(config["_class_name"]), **ours}
    for name, value in full.items():
        same = _tuple(value) == _tuple(expected.get(name))
        if not (same or name.startswith("_") or name in _IRRELEVANT or _same_heads(name, full, expected, widths)):
            raise _unsupported(name, value, f"is not what our network does ({expected.get(name)!r})")
    return model


def diffusers_unet_rules(model: LDMConfig, own_class: bool = False, old_attention: bool = False) -> list[Rule]:
    """Rules for every parameter of our model, which must have a shared encoder, and a diffusers U-Net's.

    Args:
        own_class: use the names of `carried/multistage_unet_2d.py`, with `decoders.K.` before those of decoder K.
        old_attention: use the names of attention's layers before diffusers 0.15: query, key, value, proj_attn.
    """
    rules = list(_linear("shared.time_embed.0", "time_embedding.linear_1"))
    rules += _linear("shared.time_embed.2", "time_embedding.linear_2")
    rules += _linear("shared.input_blocks.0.0", "conv_in")
    if model.num_classes is not None:
        rules.append(Rule("shared.label_emb.weight", ("class_embedding.weight",)))
    # Ours numbers blocks through, theirs level by level. In the encoder the last of a level's blocks resamples.
    per_level = model.num_res_blocks + 1
    for i, block in enumerate(model.down_blocks(0), start=1):
        level, j = divmod(i - 1, per_level)
        ours, theirs = f"shared.input_blocks.{i}.", f"down_blocks.{level}."
        if block.resamples:
            rules += _resampling(model, f"{ours}0", f"{theirs}downsamplers.0", "op")
            continue
        rules += _resnet(f"{ours}0", f"{theirs}resnets.{j}", block.in_channels != block.out_channels)
        if block.downsampling in model.attention_downsamples:
            rules += _attention(model, block.out_channels, f"{ours}1", f"{theirs}attentions.{j}", old_attention)
    deepest = model.down_blocks(0)[-1].out_channels
    rules += _resnet("shared.middle_block.0", "mid_block.resnets.0", False)
    rules += _attention(model, deepest, "shared.middle_block.1", "mid_block.attentions.0", old_attention)
    rules += _resnet("shared.middle_block.2", "mid_block.resnets.1", False)
    for stage in range(model.num_stages):
        prefix = f"decoders.{stage}." if own_class else ""
        for i, up in enumerate(model.up_blocks(stage)):
            level, j = divmod(i, per_level)
            ours, theirs = f"stages.{stage}.output_blocks.{i}.", f"{prefix}up_blocks.{level}."
            rules += _resnet(f"{ours}0", f"{theirs}resnets.{j}", up.in_channels != up.out_channels)
            layer = 1
            if up.downsampling in model.attention_of(stage):
                rules += _attention(model, up.out_channels, f"{ours}1", f"{theirs}attentions.{j}", old_attention)
                layer = 2
            if up.resamples:
                rules += _resampling(model, f"{ours}{layer}", f"{theirs}upsamplers.0", "conv")
        rules += _linear(f"stages.{stage}.out.0", f"{prefix}conv_norm_out")
        rules += _linear(f"stages.{stage}.out.2", f"{prefix}conv_out")
    return rules


def _linear(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",))


def _resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Rule]:
    names = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
    names |= {"out_layers.0": "norm2", "out_layers.3": "conv2"}
    if shortcut:
        names["skip_connection"] = "conv_shortcut"
    for our, their in names.items():
        yield from _linear(f"{ours}.{our}", f"{theirs}.{their}")


def _resampling(model: LDMConfig, ours: str, theirs: str, layer: str) -> Iterator[Rule]:
    if model.resblock_updown:
        return _resnet(ours, theirs, False)
    return _linear(f"{ours}.{layer}", f"{theirs}.conv")


def _attention(model: LDMConfig, channels: int, ours: str, theirs: str, old: bool) -> Iterator[Rule]:
    if model.context_dim is not None:
        yield from _transformer(model, ours, theirs)
        return
    names = _OLD_ATTENTION if old else {k: k for k in _OLD_ATTENTION}
    yield from _linear(f"{ours}.norm", f"{theirs}.group_norm")
    layout: Layout = SplitQKV(model.heads(channels), model.legacy_attention_order)
    for kind in ("weight", "bias"):
        joint = tuple(f"{theirs}.{names[layer]}.{kind}" for layer in ("to_q", "to_k", "to_v"))
        yield Rule(f"{ours}.qkv.{kind}", joint, layout)
        yield Rule(f"{ours}.proj_out.{kind}", (f"{theirs}.{names['to_out.0']}.{kind}",), SAME)


def _transformer(model: LDMConfig, ours: str, theirs: str) -> Iterator[Rule]:
    for layer in ("norm", "proj_in", "proj_out"):
        yield from _linear(f"{ours}.{layer}", f"{theirs}.{layer}")
    for i in range(model.transformer_depth):
        block = f"transformer_blocks.{i}"
        for layer in ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
            yield from _linear(f"{ours}.{block}.{layer}", f"{theirs}.{block}.{layer}")
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v"):
                name = f"{block}.{attention}.{layer}.weight"
                yield Rule(f"{ours}.{name}", (f"{theirs}.{name}",))


def _plain_heads(full: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """UNet2DModel's number of heads, or its channels per head."""
    per_head = full["attention_head_dim"]
    return (1, None) if per_head is None else (None, per_head)


def _conditional_heads(full: Mapping[str, Any], widths: Sequence[int]) -> tuple[int | None, int | None]:
    """UNet2DConditionModel's number of heads, or its channels per head.

    Raises:
        CheckpointError: neither is the same at all levels.
    """
    # What this class calls attention_head_dim is the number of heads.
    heads = full["num_attention_heads"] or full["attention_head_dim"]
    if isinstance(heads, int):
        return heads, None
    if len(set(heads)) == 1:
        return heads[0], None
    per_head = {w // h for w, h in zip(widths, heads, strict=True)}
    if len(per_head) > 1:
        raise _unsupported(
            "attention_head_dim", heads, "gives neither one number of heads nor one of channels per head"
        )
    return None, per_head.pop()


def _same_heads(name: str, full: Mapping[str, Any], expected: Mapping[str, Any], widths: Sequence[int]) -> bool:
    """Whether a field about heads differs in writing alone: one number for all levels, or a list; one of two fields."""
    if name not in ("attention_head_dim", "num_attention_heads") or full["_class_name"] != "UNet2DConditionModel":
        return False

    def numbers(config: Mapping[str, Any]) -> tuple[int, ...]:
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        return (heads,) * len(widths) if isinstance(heads, int) else tuple(heads)

    return numbers(full) == numbers(expected)


def _defaults(class_name: str) -> dict[str, Any]:
    """Values of the fields that a config.json does not have."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def _tuple(value: Any) -> Any:
    """A list as a tuple, for comparison: JSON has lists where the defaults are tuples."""
    return tuple(value) if isinstance(value, list) else value


def _unsupported(field: str, value: Any, problem: str) -> CheckpointError:
    return CheckpointError(field, value, problem, "Convert another checkpoint: this one cannot be converted exactly.")
