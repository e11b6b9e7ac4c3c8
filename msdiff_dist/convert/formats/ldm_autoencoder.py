"""LDM's first stage and diffusers' AutoencoderKL and VQModel: the same networks under other names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msdiff_dist.convert.key_map import OursFromTheirs, Pointwise, Rule, rule
from msdiff_dist.convert.model_weights import AutoencoderWeights
from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError

_NOT_WEIGHTS = {"loss.": "of the autoencoder's training loss", "colorize": "only shows segmentation maps"}


@dataclass(frozen=True)
class FirstStage:
    """A converted first stage. used: source key -> diffusers' names."""

    weights: AutoencoderWeights
    used: Mapping[str, list[str]]
    left_out: Mapping[str, str]

    def config_fields(self) -> dict[str, Any]:
        """Fields of our AutoencoderConfig."""
        kind: Literal["vq", "kl"] = "vq" if self.weights.class_name == "VQModel" else "kl"
        return {"kind": kind, "path": "autoencoder"}


def read_first_stage(source: TensorSource, sheet: Mapping[str, Any]) -> FirstStage | None:
    """An LDM first stage (prefix removed) as a diffusers autoencoder; None where there is none.

    Args:
        sheet: `first_stage_config` of LDM's YAML, for the image size, which no tensor tells.

    Raises:
        CheckpointError: it is no AutoencoderKL or VQModel of LDM, or incomplete.
    """
    keys = source.names()
    left_out = {k: why for k in keys for start, why in _NOT_WEIGHTS.items() if k.startswith(start)}
    keys = [k for k in keys if k not in left_out]
    if not keys:
        return None
    config = _infer(source, keys, sheet)
    rules = list(_rules(config))
    wanted = {k for r in rules for k in r.theirs}
    for problem, names in (("is missing", wanted - set(keys)), ("has no place in it", set(keys) - wanted)):
        if names:
            raise CheckpointError(
                f"first_stage_model.{min(names)}", None, f"{problem}: the autoencoder is not LDM's KL or VQ model",
                "Remove first_stage_model.* from the checkpoint and name a diffusers autoencoder in the recipe.",
            )  # fmt: skip
    used = {k: [r.ours] for r in rules for k in r.theirs}
    name = str(config["_class_name"])
    return FirstStage(AutoencoderWeights(name, config, OursFromTheirs(source, rules)), used, left_out)


def write_first_stage(weights: AutoencoderWeights) -> list[Rule]:
    """How a diffusers autoencoder's tensors (ours, here) are LDM's, without the prefix.

    Raises:
        CheckpointError: LDM has no such autoencoder.
    """
    rules = list(_rules(weights.config))
    odd = sorted(set(weights.tensors.names()) ^ {r.ours for r in rules})
    if odd:
        raise CheckpointError(
            f"autoencoder/{odd[0]}", weights.class_name, "has no place in LDM's autoencoder",
            "Convert without the autoencoder's folder.",
        )  # fmt: skip
    return rules


def _infer(source: TensorSource, keys: list[str], sheet: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {k: tuple(source.meta(k).shape) for k in keys}
    try:
        levels = _count(keys, r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        latent = shapes["decoder.conv_in.weight"][1]
        attention = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)]
        dd = (sheet.get("params") or {}).get("ddconfig") or {}
        common = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
            "block_out_channels": widths,
            "layers_per_block": _count(keys, r"encoder\.down\.0\.block\.(\d+)\."),
            "act_fn": "silu",
            "latent_channels": latent,
            "norm_num_groups": 32,
            "sample_size": int(dd.get("resolution", 256)),
            "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        }
        if "quantize.embedding.weight" in shapes:
            number, width = shapes["quantize.embedding.weight"]
            return {"_class_name": "VQModel", **common, "num_vq_embeddings": number, "vq_embed_dim": width}
        if shapes["quant_conv.weight"][:2] != (2 * latent, 2 * latent):
            raise CheckpointError(
                "first_stage_model.quant_conv.weight", shapes["quant_conv.weight"],
                f"changes the number of channels ({2 * latent}), which diffusers' AutoencoderKL cannot",
                "Remove first_stage_model.* from the checkpoint.",
            )  # fmt: skip
        return {"_class_name": "AutoencoderKL", **common}
    except KeyError as e:
        raise CheckpointError(
            f"first_stage_model.{e.args[0]}", None, "is missing: the autoencoder is not LDM's KL or VQ model",
            "Use the complete checkpoint, or remove first_stage_model.* from it.",
        ) from None  # fmt: skip


def _rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """Ours are diffusers' names, theirs LDM's."""
    levels, blocks = len(config["block_out_channels"]), config["layers_per_block"]
    widths = list(config["block_out_channels"])
    for side in ("encoder", "decoder"):
        yield from _pair(f"{side}.conv_in", f"{side}.conv_in")
        yield from _pair(f"{side}.conv_norm_out", f"{side}.norm_out")
        yield from _pair(f"{side}.conv_out", f"{side}.conv_out")
        for i in (0, 1):
            yield from _resnet(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}", shortcut=False)
        if config.get("mid_block_add_attention", True):
            yield from _attention(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
    channels = widths[0]
    for i, width in enumerate(widths):
        attends = config["down_block_types"][i].startswith("Attn")
        yield from _level(f"encoder.down_blocks.{i}", f"encoder.down.{i}", blocks, channels != width, attends)
        if i < levels - 1:
            yield from _pair(f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv")
        channels = width
    for i, width in enumerate(reversed(widths)):
        attends, theirs = config["up_block_types"][i].startswith("Attn"), f"decoder.up.{levels - 1 - i}"
        yield from _level(f"decoder.up_blocks.{i}", theirs, blocks + 1, channels != width, attends)
        if i < levels - 1:
            yield from _pair(f"decoder.up_blocks.{i}.upsamplers.0.conv", f"{theirs}.upsample.conv")
        channels = width
    yield from _pair("quant_conv", "quant_conv")
    yield from _pair("post_quant_conv", "post_quant_conv")
    if config["_class_name"] == "VQModel":
        yield rule("quantize.embedding.weight", "quantize.embedding.weight")


def _level(ours: str, theirs: str, blocks: int, widens: bool, attends: bool) -> Iterator[Rule]:
    for j in range(blocks):
        yield from _resnet(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", shortcut=widens and j == 0)
        if attends:
            yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}")


def _resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Rule]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from _pair(f"{ours}.{layer}", f"{theirs}.{layer}")
    if shortcut:
        yield from _pair(f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut")


def _attention(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _pair(f"{ours}.group_norm", f"{theirs}.norm")
    for our, their in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield Rule(f"{ours}.{our}.weight", (f"{theirs}.{their}.weight",), Pointwise(2))
        yield rule(f"{ours}.{our}.bias", f"{theirs}.{their}.bias")


def _pair(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield rule(f"{ours}.{kind}", f"{theirs}.{kind}")


def _count(keys: list[str], pattern: str) -> int:
    found = {m[1] for k in keys if (m := re.match(pattern, k))}
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return len(found)
