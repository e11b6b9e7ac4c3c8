"""LDM's autoencoder (its "first stage") as diffusers' AutoencoderKL or VQModel, which are the same networks, and back.

Here "ours" are diffusers' names and "theirs" LDM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msdiff_dist.convert.key_map import OursFromTheirs, Pointwise, Rule, rule
from msdiff_dist.convert.model_weights import AutoencoderWeights
from msdiff_dist.convert.tensor_sources import TensorSource
from msdiff_dist.errors import CheckpointError

# Beginnings of names of tensors that the autoencoder does not use, and what they are.
_NOT_WEIGHTS = {"loss.": "of the autoencoder's training loss", "colorize": "only shows segmentation maps"}


@dataclass(frozen=True)
class FirstStage:
    """A converted first stage."""

    weights: AutoencoderWeights
    """The autoencoder as diffusers has it."""
    used: Mapping[str, list[str]]
    """For each converted key of the source, diffusers' names."""
    left_out: Mapping[str, str]
    """For each other key of the source, the reason why it is not converted."""

    def config_fields(self) -> dict[str, Any]:
        """The fields of our AutoencoderConfig that the first stage decides."""
        kind: Literal["vq", "kl"] = "vq" if self.weights.class_name == "VQModel" else "kl"
        return {"kind": kind, "path": "autoencoder"}


def read_first_stage(source: TensorSource, config: Mapping[str, Any]) -> FirstStage | None:
    """An LDM first stage as a diffusers autoencoder; None if the checkpoint has none.

    Args:
        source: its tensors, without the prefix `first_stage_model.`.
        config: `first_stage_config` of LDM's YAML, for the image size, which no shape shows; may be empty.

    Raises:
        CheckpointError: it is no KL or VQ autoencoder of LDM, or incomplete.
    """
    keys = source.names()
    left_out = {k: reason for k in keys for start, reason in _NOT_WEIGHTS.items() if k.startswith(start)}
    keys = [k for k in keys if k not in left_out]
    if not keys:
        return None
    vae_config = _infer(source, keys, config)
    rules = list(_rules(vae_config))
    wanted = {k for r in rules for k in r.theirs}
    for problem, names in (("is missing", wanted - set(keys)), ("has no place in it", set(keys) - wanted)):
        if names:
            raise CheckpointError(
                f"first_stage_model.{min(names)}", None, f"{problem}: the autoencoder is not LDM's KL or VQ model",
                "Remove first_stage_model.* from the checkpoint and name a diffusers autoencoder in the recipe.",
            )  # fmt: skip
    used = {k: [r.ours] for r in rules for k in r.theirs}
    name = str(vae_config["_class_name"])
    return FirstStage(AutoencoderWeights(name, vae_config, OursFromTheirs(source, rules)), used, left_out)


def write_first_stage(weights: AutoencoderWeights) -> list[Rule]:
    """The rules for a diffusers autoencoder's tensors and LDM's, without the prefix `first_stage_model.`.

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


def _infer(source: TensorSource, keys: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' config.json of the autoencoder, inferred from shapes."""
    shapes = {k: tuple(source.meta(k).shape) for k in keys}
    try:
        levels = _count(keys, r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        latent = shapes["decoder.conv_in.weight"][1]
        attention = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)]
        dd = (config.get("params") or {}).get("ddconfig") or {}
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
        # A KL encoder gives a mean and a logarithm of the variance for each latent channel.
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
    """The rules for the autoencoder of diffusers' `config`."""
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
    # diffusers numbers the decoder's levels in the order of use, LDM by resolution; `channels` still is the deepest's.
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
    """How many different numbers the pattern's group matches in the keys.

    Raises:
        KeyError: none; it holds the name that a first one would have.
    """
    found = {m[1] for k in keys if (m := re.match(pattern, k))}
    if not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return len(found)
