"""State dicts of the official multi-stage EDM code, and of EDM's own DDPM++ networks (2206.00364).

model.enc.RESxRES_conv, _blockI, _down        encoder
model.decs.K.RESxRES_in0, _in1, _blockI, _up, _aux_norm, _aux_conv    decoder K; model.dec. of a unified model
model.map_layer0, map_layer1, map_label, map_augment                  embeddings

The pickles themselves hold the network's code and are not read: save `net.state_dict()` as .safetensors or .npz.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from msdiff_dist.convert.formats.song import checked_song, groups_of, recognising
from msdiff_dist.convert.key_map import (
    Layout,
    OursFromTheirs,
    Pointwise,
    Rule,
    TheirsFromOurs,
    check_complete,
    rule,
)
from msdiff_dist.convert.model_weights import JoinedSource, ModelWeights, Written, empty_model
from msdiff_dist.convert.networks import note
from msdiff_dist.convert.options import ConvertOptions, given_boundaries
from msdiff_dist.convert.recognition import refuse_other_formats
from msdiff_dist.convert.tensor_sources import MemorySource, RenamedSource, TensorSource
from msdiff_dist.convert.writing import write_state_dict
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.edm import EDMConfig
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.song.config import SongConfig

PREFIX = "model."
PAPER_BOUNDARIES = (2.5103, 7.6577)
"""The multi-stage paper's boundaries in sigma."""
# Layers of a residual block: our names and theirs.
_BLOCK = {
    "in_norm": "norm0", "in_conv": "conv0", "emb": "affine", "out_norm": "norm1", "out_conv": "conv1", "skip": "skip",
    "attention.norm": "norm2",
}  # fmt: skip


class InterleavedQKV(Layout):
    """Theirs, a pointwise convolution, has q, k and v of channel 0, then of channel 1, ...; ours all q, all k, all v.

    Theirs is [3 C, C, 1, 1] or a bias [3 C], with rows as [C, 3]; ours is [3 C, C] or [3 C], with rows as [3, C].
    """

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        (joint,) = theirs
        # [3 C, ...] as [C, 3, ...] becomes [3, C, ...]; the last step also drops the kernel's axes of size 1.
        out: Tensor = joint.unflatten(0, (-1, 3)).transpose(0, 1).reshape(joint.shape[0], *joint.shape[1:2])
        return out

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        interleaved = ours.unflatten(0, (3, -1)).transpose(0, 1).reshape(ours.shape)
        return [interleaved[:, :, None, None] if ours.ndim == 2 else interleaved]


def read_edm(source: TensorSource, options: ConvertOptions) -> ModelWeights:
    """A state dict of the EDM code as our weights.

    Raises:
        CheckpointError: it is of another network, incomplete, or has unexpected keys.
    """
    refuse_other_formats(source.names(), "official-edm")
    # EDM's program saves networks as averages alone. Other files say at the network's place if it is the last one.
    averaged = source.taken is None or source.taken.averaged or not source.taken.key
    if options.weights not in ("auto", "ema" if averaged else "raw"):
        kind = "averaged" if averaged else "last"
        raise CheckpointError("--weights", options.weights, f"the file holds {kind} weights only", "Remove --weights.")
    if not any(k.startswith(PREFIX) for k in source.names()):
        source = RenamedSource(source, {PREFIX + k: k for k in source.names()})
    names = source.names()
    unsupported = next(
        (k for k in names if "aux_residual" in k or "aux_skip" in k or k.endswith("map_noise.freqs")), None
    )
    if unsupported:
        raise CheckpointError(
            unsupported, None, "belongs to EDM's NCSN++, whose random frequencies this package's network does not take",
            "Convert a DDPM++ network.",
        )  # fmt: skip
    groups, assumed = groups_of(options)
    model, size = _infer(source, groups)
    multistage = any(k.startswith(f"{PREFIX}decs.") for k in names)
    rules = edm_rules(model, size, multistage)
    # Every resampling layer stores its filter, which this package's network has as a constant.
    filters = {k: "the fixed filter of resampling" for k in names if k.endswith("resample_filter")}
    check_filters(source, list(filters))
    check_complete(source, rules, filters, dict(empty_model(model).named_parameters()), "official-edm")
    boundaries, assumptions = given_boundaries(options.boundaries, model.num_stages, PAPER_BOUNDARIES)
    description = ModelDescription(
        model=model,
        diffusion=DiffusionConfig(process="edm", section=EDMConfig()),
        stages=StagesConfig(boundaries=boundaries),
        sample_size=size,
        weights="ema" if averaged else "raw",
    )
    return ModelWeights(
        description=description,
        tensors=OursFromTheirs(source, rules),
        used={k: [r.ours] for r in rules for k in r.theirs},
        left_out={**source.left_out, **filters},
        assumed=[*assumed, *assumptions, *note(source.taken, options.weights)],
    )


def write_edm(weights: ModelWeights, path: Path, metadata: Mapping[str, str]) -> Written:
    """Write our weights as a state dict of the EDM code.

    Raises:
        CheckpointError: the EDM code has no such network, or the model's image size is unknown.
    """
    model = checked_song(weights, "ddpmpp", "edm")
    size = weights.description.sample_size
    if not isinstance(size, int):
        raise CheckpointError(
            "sample_size", size, "the EDM code names its layers by the size of the image", "Add it to config.json."
        )
    rules = edm_rules(model, size, model.num_stages > 1)
    state = TheirsFromOurs(weights.tensors, rules)
    resampling = [k.removesuffix("weight") for k in state.names() if re.search(r"_(up|down)\.(conv0|skip)\.weight$", k)]
    kernel = torch.full((1, 1, 2, 2), 0.25)
    filters = MemorySource({f"{k}resample_filter": kernel for k in resampling})
    return Written(
        names={r.ours: list(r.theirs) for r in rules},
        files={path.name: write_state_dict(path, JoinedSource([state, filters]), metadata)},
        added=dict.fromkeys(filters.names(), "the fixed filter of resampling"),
    )


def edm_rules(model: SongConfig, size: int, multistage: bool) -> list[Rule]:
    """Rules for every parameter of our model and EDM's.

    Args:
        size: height and width of the network's input, which is part of their names.
        multistage: whether the decoders are a list, `decs.K.`; else the one decoder is `dec.`.
    """
    rules = [*_pair("shared.time_embed.0", "map_layer0"), *_pair("shared.time_embed.2", "map_layer1")]
    if model.num_classes is not None:
        rules += _pair("shared.label_emb", "map_label")
    if model.augment_labels:
        rules.append(rule("shared.augment_emb.weight", f"{PREFIX}map_augment.weight"))
    rules += _pair("shared.conv_in", f"enc.{size}x{size}_conv")
    per_level = model.num_res_blocks + 1
    for i, block in enumerate(model.down_blocks(0)):
        level, j = divmod(i, per_level)
        at = size >> (level + block.resamples)
        name = f"enc.{at}x{at}_down" if block.resamples else f"enc.{at}x{at}_block{j}"
        attends = not block.resamples and block.downsampling in model.attention_downsamples
        skip = block.resamples or block.in_channels != block.out_channels
        rules += _block(f"shared.input_blocks.{i}", name, attends, skip)
    lowest = size >> (len(model.channel_mult) - 1)
    for k in range(model.num_stages):
        ours, theirs = f"stages.{k}.", f"decs.{k}." if multistage else "dec."
        rules += _block(f"{ours}middle_block.0", f"{theirs}{lowest}x{lowest}_in0", True, False)
        rules += _block(f"{ours}middle_block.1", f"{theirs}{lowest}x{lowest}_in1", False, False)
        for i, up in enumerate(model.up_blocks(k)):
            at = size // up.downsampling
            attends = up.ends_level and up.downsampling in model.attention_downsamples
            name, skip = f"{theirs}{at}x{at}_block{i % per_level}", up.in_channels != up.out_channels
            rules += _block(f"{ours}output_blocks.{i}.0", name, attends, skip)
            if up.resamples:
                rules += _block(f"{ours}output_blocks.{i}.1", f"{theirs}{2 * at}x{2 * at}_up", False, True)
        rules += _pair(f"{ours}out.0", f"{theirs}{size}x{size}_aux_norm")
        rules += _pair(f"{ours}out.2", f"{theirs}{size}x{size}_aux_conv")
    return rules


def check_filters(source: TensorSource, names: list[str]) -> None:
    """Raise unless every resampling filter is the box of DDPM++, [1, 1] / 2 along each axis.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for name in names:
        if not torch.equal(source.read(name).float(), torch.full((1, 1, 2, 2), 0.25)):
            raise CheckpointError(name, None, "is another filter than DDPM++'s box [1, 1]", "Convert a DDPM++ network.")


def _block(ours: str, theirs: str, attends: bool, skip: bool) -> Iterator[Rule]:
    """Rules for a residual block, which may have attention and a convolution on its skip path."""
    for our, their in _BLOCK.items():
        if (our != "skip" or skip) and (our != "attention.norm" or attends):
            yield from _pair(f"{ours}.{our}", f"{theirs}.{their}")
    if attends:
        yield Rule(f"{ours}.attention.qkv.weight", (f"{PREFIX}{theirs}.qkv.weight",), InterleavedQKV())
        yield Rule(f"{ours}.attention.qkv.bias", (f"{PREFIX}{theirs}.qkv.bias",), InterleavedQKV())
        yield Rule(f"{ours}.attention.proj_out.weight", (f"{PREFIX}{theirs}.proj.weight",), Pointwise(2))
        yield rule(f"{ours}.attention.proj_out.bias", f"{PREFIX}{theirs}.proj.bias")


def _pair(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield rule(f"{ours}.{kind}", f"{PREFIX}{theirs}.{kind}")


def _infer(source: TensorSource, groups: int) -> tuple[SongConfig, int]:
    """The configuration, inferred from names and shapes, and the size of the network's input."""
    shapes = {k.removeprefix(PREFIX): tuple(source.meta(k).shape) for k in source.names()}
    with recognising("official-edm", "DDPM++ network of the EDM code"):
        size = next(int(m[1]) for k in shapes if (m := re.fullmatch(r"enc\.(\d+)x\d+_conv\.weight", k)))
        width, in_channels = shapes[f"enc.{size}x{size}_conv.weight"][:2]
        # Resolutions of the levels, and the number of blocks in the first; the ranges are longer than any network's.
        at = [size >> i for i in range(16) if f"enc.{size >> i}x{size >> i}_block0.conv0.weight" in shapes]
        blocks = sum(f"enc.{size}x{size}_block{j}.conv0.weight" in shapes for j in range(1000))
        mults = [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] // width for r in at]
        stages = sorted({k.split(".")[1] for k in shapes if k.startswith("decs.")}, key=int)
        decoders = [f"decs.{k}." for k in stages] or ["dec."]
        heads = [shapes[f"{d}{size}x{size}_aux_conv.weight"] for d in decoders]
        label, augment = shapes.get("map_label.weight"), shapes.get("map_augment.weight")
        config = SongConfig(
            family="ddpmpp",
            in_channels=in_channels,
            out_channels=heads[0][0],
            encoder_channels=width,
            decoder_channels=tuple(shape[1] // mults[0] for shape in heads),
            channel_mult=tuple(mults),
            num_res_blocks=blocks,
            attention_downsamples=tuple(2**i for i, r in enumerate(at) if f"enc.{r}x{r}_block0.qkv.weight" in shapes),
            num_classes=label[1] if label else None,
            augment_labels=augment[1] if augment else 0,
            norm_groups=groups,
        )
    return config, size
