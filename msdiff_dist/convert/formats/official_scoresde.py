"""Checkpoints of the official multi-stage score_sde code: NCSN++ on the VP-SDE (2011.13456), with numbered modules.

model.en_modules.N    time embedding (0, 1), first convolution (2), residual blocks, attention, pyramid, middle
model.de_modules.K.N  decoder K: residual blocks, attention, norm, convolution
ema.shadow_params     averages, a list in the order of the parameters

A unified model has one list `all_modules`. Names may begin with `module.`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdiff_dist.convert.formats.song import checked_song, groups_of, recognising
from msdiff_dist.convert.key_map import Layout, OursFromTheirs, Rule, TheirsFromOurs, check_complete, rule
from msdiff_dist.convert.model_weights import ModelWeights, Written, empty_model
from msdiff_dist.convert.networks import note
from msdiff_dist.convert.options import ConvertOptions, given_boundaries
from msdiff_dist.convert.recognition import refuse_other_formats
from msdiff_dist.convert.tensor_sources import (
    PICKLES,
    MemorySource,
    RenamedSource,
    TensorSource,
    load_pickle,
    open_source,
)
from msdiff_dist.convert.writing import write_state_dict
from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig
from msdiff_dist.diffusion.processes.vp import VPConfig
from msdiff_dist.errors import CheckpointError
from msdiff_dist.export.description import ModelDescription
from msdiff_dist.models.song.config import SongConfig

PAPER_BOUNDARIES = tuple(1000 * b / 999 for b in (0.442, 0.6308))
"""Where the published network changes decoders, in t: it compares 999 t with 1000 times the paper's boundaries.

Its stages are (lo, hi] and ours [lo, hi), which differs at the boundaries themselves alone.
"""
TRAINED_FROM, SAMPLED_TO = 1e-5, 1e-3
"""First time of score_sde's training loss, and the last of its samplers by default."""
BUFFERS = ("sigmas",)
"""Tensors of the state dict that are no parameters, so that the list of averages does not count them."""
# Layers of a residual block: our names and theirs.
_BLOCK = {
    "in_norm": "GroupNorm_0", "in_conv": "Conv_0", "emb": "Dense_0", "out_norm": "GroupNorm_1", "out_conv": "Conv_1",
    "skip": "Conv_2",
}  # fmt: skip


class Transposed(Layout):
    """Ours [n C, C] is n matrices one below the other; theirs are n matrices [C, C], each transposed: x W, not W x."""

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        return torch.cat([t.t() for t in theirs])

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return [part.t() for part in ours.chunk(ours.shape[0] // ours.shape[1])]


class Joined(Layout):
    """Ours [3 C] are three biases one after the other; theirs are three of [C]."""

    def to_ours(self, theirs: list[Tensor]) -> Tensor:
        return torch.cat(theirs)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        return list(ours.chunk(3))


def read_scoresde(path: Path, options: ConvertOptions) -> ModelWeights:
    """A checkpoint, or a state dict, of the score_sde code as our weights.

    Raises:
        CheckpointError: it is of another network, incomplete, or has unexpected keys.
    """
    source, averaged = _opened(path, options)
    refuse_other_formats(source.names(), "official-scoresde")
    groups, assumed = groups_of(options)
    model = _infer(source, groups)
    unified = any(k.startswith("all_modules.") for k in source.names())
    rules = scoresde_rules(model, unified)
    left_out = {**source.left_out, **{k: "not used by this network" for k in BUFFERS if k in source}}
    check_complete(source, rules, left_out, dict(empty_model(model).named_parameters()), "official-scoresde")
    boundaries, assumptions = given_boundaries(options.boundaries, model.num_stages, PAPER_BOUNDARIES)
    description = ModelDescription(
        model=model,
        diffusion=DiffusionConfig(process="vp", section=VPConfig(t_min=TRAINED_FROM, t_end=SAMPLED_TO)),
        stages=StagesConfig(boundaries=boundaries),
        weights="ema" if averaged else "raw",
    )
    return ModelWeights(
        description=description,
        tensors=OursFromTheirs(source, rules),
        used={k: [r.ours] for r in rules for k in r.theirs},
        left_out=left_out,
        assumed=[*assumed, *assumptions, *note(source.taken, options.weights)],
    )


def write_scoresde(weights: ModelWeights, path: Path, metadata: Mapping[str, str]) -> Written:
    """Write our weights as a state dict of the score_sde code.

    Raises:
        CheckpointError: the score_sde code has no such network.
    """
    model = checked_song(weights, "ncsnpp_vp", "vp")
    if model.num_classes is not None or model.augment_labels:
        raise CheckpointError(
            "num_classes", model.num_classes, "the score_sde code has no classes", "Use another --to."
        )
    rules = scoresde_rules(model, unified=False)
    return Written(
        names={r.ours: list(r.theirs) for r in rules},
        files={path.name: write_state_dict(path, TheirsFromOurs(weights.tensors, rules), metadata)},
    )


def scoresde_rules(model: SongConfig, unified: bool) -> list[Rule]:
    """Rules for every parameter of our model and the score_sde code's, whose modules are numbered in the order of use.

    Args:
        unified: whether all modules are in one list, `all_modules`.
    """
    encoder = _Numbered("all_modules." if unified else "en_modules.")
    rules = [*_pair("shared.time_embed.0", encoder.next()), *_pair("shared.time_embed.2", encoder.next())]
    rules += _pair("shared.conv_in", encoder.next())
    steps = 0  # of the input pyramid, whose convolution follows each block that halves the resolution
    for i, block in enumerate(model.down_blocks(0)):
        attends = not block.resamples and block.downsampling in model.attention_downsamples
        skip = block.resamples or block.in_channels != block.out_channels
        rules += _block(f"shared.input_blocks.{i}", encoder, attends, skip)
        if block.resamples:
            rules += _pair(f"shared.pyramid.{steps}.conv", f"{encoder.next()}.Conv2d_0")
            steps += 1
    rules += _block("shared.middle_block.0", encoder, True, False)
    rules += _block("shared.middle_block.1", encoder, False, False)
    for k in range(model.num_stages):
        decoder = encoder if unified else _Numbered(f"de_modules.{k}.")
        for i, up in enumerate(model.up_blocks(k)):
            attends = up.ends_level and up.downsampling in model.attention_downsamples
            skip = up.in_channels != up.out_channels
            rules += _block(f"stages.{k}.output_blocks.{i}.0", decoder, attends, skip)
            if up.resamples:
                rules += _block(f"stages.{k}.output_blocks.{i}.1", decoder, False, True)
        rules += _pair(f"stages.{k}.out.0", decoder.next())
        rules += _pair(f"stages.{k}.out.2", decoder.next())
    return rules


class _Numbered:
    """Names of the modules of a list, one after the other."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._number = prefix, -1

    def next(self) -> str:
        self._number += 1
        return f"{self._prefix}{self._number}"


def _block(ours: str, modules: _Numbered, attends: bool, skip: bool) -> Iterator[Rule]:
    """Rules for a residual block and, if it `attends`, for the attention, which is the next module."""
    theirs = modules.next()
    for our, their in _BLOCK.items():
        if our != "skip" or skip:
            yield from _pair(f"{ours}.{our}", f"{theirs}.{their}")
    if attends:
        theirs, ours = modules.next(), f"{ours}.attention"
        yield from _pair(f"{ours}.norm", f"{theirs}.GroupNorm_0")
        yield Rule(f"{ours}.qkv.weight", tuple(f"{theirs}.NIN_{i}.W" for i in range(3)), Transposed())
        yield Rule(f"{ours}.qkv.bias", tuple(f"{theirs}.NIN_{i}.b" for i in range(3)), Joined())
        yield Rule(f"{ours}.proj_out.weight", (f"{theirs}.NIN_3.W",), Transposed())
        yield rule(f"{ours}.proj_out.bias", f"{theirs}.NIN_3.b")


def _pair(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield rule(f"{ours}.{kind}", f"{theirs}.{kind}")


def _opened(path: Path, options: ConvertOptions) -> tuple[TensorSource, bool]:
    """The weights that `options.weights` asks for, under names without `module.`, and whether they are averages.

    Raises:
        CheckpointError: averages are asked for and there are none, or the file cannot be read.
    """
    source = open_source(path, options.wanted("official-scoresde"))
    if source.taken is not None and source.taken.averaged:
        return RenamedSource(source, {k.removeprefix("module."): k for k in source.names()}), True
    averages = _averages(path, source)
    if averages is None and options.weights == "ema":
        raise CheckpointError(
            "--weights", "ema", "the checkpoint holds no averaged weights (ema.shadow_params)", "Use --weights raw."
        )
    use_averages = averages is not None and options.weights != "raw"
    if use_averages:
        left_out = {**source.left_out, "model": "the last weights; their average was converted"}
        left_out.pop("ema", None)
        source = MemorySource(averages or {}, source.files, left_out)
    names = {k.removeprefix("module."): k for k in source.names()}
    return RenamedSource(source, names), use_averages


def _averages(path: Path, source: TensorSource) -> dict[str, Tensor] | None:
    """The averages by name; None if the checkpoint has none. They are a list in the order of the parameters.

    Raises:
        CheckpointError: the list does not fit the parameters' shapes.
    """
    content: Any = load_pickle(path) if path.suffix in PICKLES else None
    ema = content.get("ema") if isinstance(content, dict) else None
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not all(isinstance(t, Tensor) for t in shadow):
        return None
    # The list has no names. Only as many averages as parameters, of the same shapes in the same order, can be paired.
    names = [k for k in source.names() if k.removeprefix("module.") not in BUFFERS]
    shapes = [tuple(source.meta(k).shape) for k in names]
    if shapes != [tuple(t.shape) for t in shadow]:
        raise CheckpointError(
            "ema.shadow_params", len(shadow), f"do not follow the {len(names)} parameters of the model",
            "Use --weights raw.",
        )  # fmt: skip
    return dict(zip(names, shadow, strict=True))


def _infer(source: TensorSource, groups: int) -> SongConfig:
    """The configuration, inferred from names and shapes."""
    shapes = {k: tuple(source.meta(k).shape) for k in source.names()}
    unified = any(k.startswith("all_modules.") for k in shapes)
    base = "all_modules." if unified else "en_modules."
    count = len({k.split(".")[1] for k in shapes if k.startswith(base)})
    pyramid = [n for n in range(count) if f"{base}{n}.Conv2d_0.weight" in shapes]
    with recognising("official-scoresde", "NCSN++ with an input pyramid"):
        width, in_channels = shapes[f"{base}2.weight"][:2]
        # A level's blocks lie between the steps of the pyramid; the block before a step is the one that halves.
        first = [3, *(n + 1 for n in pyramid)]
        per_level = sum(f"{base}{n}.Dense_0.weight" in shapes for n in range(3, pyramid[0] - 1))
        mults = tuple(shapes[f"{base}{n}.Conv_0.weight"][0] // width for n in first)
        attention = tuple(2**i for i, n in enumerate(first) if f"{base}{n + 1}.NIN_0.W" in shapes)
        heads = [_last_convolution(shapes, prefix) for prefix in _decoders(shapes, unified)]
        return SongConfig(
            family="ncsnpp_vp",
            in_channels=in_channels,
            out_channels=heads[0][0],
            encoder_channels=width,
            decoder_channels=tuple(head[1] // mults[0] for head in heads),
            channel_mult=mults,
            num_res_blocks=per_level,
            attention_downsamples=attention,
            norm_groups=groups,
        )


def _decoders(shapes: Mapping[str, tuple[int, ...]], unified: bool) -> list[str]:
    """Prefixes of the lists whose last module is a decoder's last convolution, stage 0 first."""
    if unified:
        return ["all_modules."]
    return [f"de_modules.{k}." for k in range(len({k.split(".")[1] for k in shapes if k.startswith("de_modules.")}))]


def _last_convolution(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[int, ...]:
    last = max(int(k.removeprefix(prefix).split(".")[0]) for k in shapes if k.startswith(prefix))
    return shapes[f"{prefix}{last}.weight"]
