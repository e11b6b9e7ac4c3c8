"""Stages grown, extracted and merged compute what the models that they come from compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from msdiff_dist.convert.conversion import read
from msdiff_dist.convert.edit.merge import merge
from msdiff_dist.convert.edit.stages import extract_stage, grow
from msdiff_dist.convert.model_weights import ModelWeights
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import ConfigError
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from msdiff_dist.models.ldm.widths import resized_decoder
from msdiff_dist.models.resizing import Channels
from tests.unit.convert.convert_helpers import inputs, loaded, randomise

BASE: dict[str, Any] = {
    "encoder_channels": 32, "decoder_channels": (32,), "channel_mult": (1, 2), "num_res_blocks": 1,
    "attention_downsamples": (2,), "num_head_channels": 32,
}  # fmt: skip
UNIFIED = LDMConfig(**BASE)
KINDS = {
    "plain": UNIFIED,
    "scale-shift, resampling blocks": LDMConfig(**BASE, use_scale_shift_norm=True, resblock_updown=True, num_classes=3),
    "text": LDMConfig(**BASE, context_dim=8, transformer_depth=2),
    "text, linear, one number of heads": LDMConfig(
        **{**BASE, "num_head_channels": None}, num_heads=4, context_dim=8, use_linear_in_transformer=True
    ),
    "other order of heads": LDMConfig(**BASE, legacy_attention_order=False),
}
BOUNDS = (442.0, 631.0)


def opened(path: Path) -> ModelWeights:
    return read(path, "msdiff", ConvertOptions())


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_stages_of_the_same_width_are_the_unified_model(make_export: Any, config: LDMConfig) -> None:
    grown = grow(opened(make_export(config)), BOUNDS, [32] * 3)
    assert grown.model == replace(config, decoder_channels=(32, 32, 32))
    x, t, conditions = inputs(config, batch=3)
    expected = randomise(build_model(config))(x, t, torch.zeros(3, dtype=torch.int64), **conditions)
    for stage in range(3):
        output = loaded(grown)(x, t, torch.full((3,), stage), **conditions)
        assert torch.equal(output, expected)
    assert grown.used["stages.0.out.2.bias"] == [f"stages.{k}.out.2.bias" for k in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_other_widths_fit_and_stay_near(make_export: Any, config: LDMConfig) -> None:
    grown = grow(opened(make_export(config)), BOUNDS, [96, 32, 32])
    model = loaded(grown)
    x, t, conditions = inputs(config, batch=3)
    zeros = torch.zeros(3, dtype=torch.int64)
    expected = randomise(build_model(config))(x, t, zeros, **conditions)
    fresh = randomise(build_model(grown.model), seed=1)(x, t, zeros, **conditions)
    wide = model(x, t, zeros, **conditions)
    assert (wide - expected).abs().mean() < 0.5 * (fresh - expected).abs().mean()
    assert torch.equal(model(x, t, zeros + 1, **conditions), expected)


@torch.no_grad()
@pytest.mark.parametrize("heads_first", [True, False])
def test_repeated_heads_attend_as_one(heads_first: bool) -> None:
    """Attention on repeated channels gives repeated channels: the rule is exact where no norm mixes."""
    from msdiff_dist.models.attention import SelfAttentionBlock

    old = LDMConfig(**BASE, legacy_attention_order=heads_first)
    how = resized_decoder(old, replace(old, decoder_channels=(96,)), 0)
    narrow = randomise(SelfAttentionBlock(64, 2, 32, "math", heads_first))
    wide = SelfAttentionBlock(192, 6, 32, "math", heads_first)
    place = "output_blocks.0.1."
    wide.load_state_dict({k: how[place + k].apply(v) for k, v in narrow.state_dict().items()})  # type: ignore[union-attr]
    x = torch.randn(1, 64, 3, 3)
    repeated = Channels.resized(64, 192).source
    assert torch.allclose(wide(x[:, repeated]), narrow(x)[:, repeated], atol=1e-5)


def test_channels_keep_their_place_in_their_group() -> None:
    wider = Channels.resized(4, 6)
    assert wider.source.tolist() == [0, 0, 1, 2, 2, 3]
    assert wider.reads.tolist() == [0.5, 0.5, 1, 0.5, 0.5, 1]
    narrower = Channels.resized(6, 4)
    assert narrower.source.tolist() == [0, 1, 3, 4]
    assert narrower.reads.tolist() == [1, 1, 1, 1]
    groups = [set((Channels.resized(64, 96).source[i * 3 : i * 3 + 3] // 2).tolist()) for i in range(32)]
    assert groups == [{i} for i in range(32)]


@torch.no_grad()
def test_attention_comes_and_goes(make_export: Any) -> None:
    grown = grow(opened(make_export(UNIFIED)), (500.0,), [32, 32], [[], [1, 2]])
    x, t, _ = inputs(UNIFIED)
    expected = randomise(build_model(UNIFIED))(x, t, torch.zeros(2, dtype=torch.int64))
    model = loaded(grown)
    assert torch.equal(model(x, t, torch.ones(2, dtype=torch.int64)), expected)  # new attention begins silent
    assert not any(".attn" in k or ".qkv" in k for k in grown.tensors.names() if k.startswith("stages.0."))


def test_types_are_kept(make_export: Any) -> None:
    tensors = grow(opened(make_export(UNIFIED, dtype=torch.float16)), BOUNDS, [96, 32, 32]).tensors
    assert all(tensors.read(k).dtype == tensors.meta(k).dtype == torch.float16 for k in tensors.names())


@pytest.mark.parametrize(
    ("bounds", "widths", "named"),
    [
        ((442.0,), [32] * 3, "--widths"),
        ((442.5, 631.0), [32] * 3, "boundaries"),
        (BOUNDS, [32, 32, 48], "norm_groups"),
        (BOUNDS, [64, 32, 32], "block 0"),
    ],
)
def test_stages_that_make_no_model(make_export: Any, bounds: tuple, widths: list[int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        grow(opened(make_export(UNIFIED)), bounds, widths)


def test_only_unified_models_grow(make_export: Any) -> None:
    staged = replace(UNIFIED, decoder_channels=(32, 32))
    with pytest.raises(ConfigError, match="--stage"):
        grow(opened(make_export(staged)), BOUNDS, [32] * 3)


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
def test_a_stage_alone_computes_the_same(make_export: Any, share: bool) -> None:
    staged = replace(UNIFIED, decoder_channels=(64, 32), decoder_attention=((2,), ()), share_encoder=share)
    one = extract_stage(opened(make_export(staged)), 1)
    assert one.model == replace(UNIFIED, decoder_attention=((),))
    x, t, _ = inputs(UNIFIED)
    ones = torch.ones(2, dtype=torch.int64)
    assert torch.equal(loaded(one)(x, t, 0 * ones), randomise(build_model(staged))(x, t, ones))
    assert set(one.used) | set(one.left_out) == set(opened_names(staged))


def opened_names(config: LDMConfig) -> list[str]:
    return [name for name, _ in build_model(config).named_parameters()]


@torch.no_grad()
def test_taken_apart_and_put_together(make_export: Any) -> None:
    staged = replace(UNIFIED, decoder_channels=(64, 32, 32), decoder_attention=((2,), (), (2,)))
    weights = opened(make_export(staged))
    again = merge([extract_stage(weights, k) for k in range(3)], BOUNDS)
    assert again.model == staged
    assert again.description.stages == weights.description.stages
    assert all(torch.equal(again.tensors.read(k), weights.tensors.read(k)) for k in weights.tensors.names())


@torch.no_grad()
def test_different_encoders_stay_apart(make_export: Any) -> None:
    wide = replace(UNIFIED, encoder_channels=64, decoder_channels=(64,))
    models = [opened(make_export(UNIFIED, "a")), opened(make_export(wide, "b"))]
    merged = merge(models, (500.0,))
    assert merged.model == replace(UNIFIED, encoder_channels=(32, 64), decoder_channels=(32, 64), share_encoder=False)
    x, t, _ = inputs(UNIFIED)
    zeros = torch.zeros(2, dtype=torch.int64)
    for stage, config in enumerate((UNIFIED, wide)):
        assert torch.equal(loaded(merged)(x, t, zeros + stage), randomise(build_model(config))(x, t, zeros))


def test_models_of_other_inputs_are_not_merged(make_export: Any) -> None:
    other = replace(UNIFIED, num_classes=5)
    with pytest.raises(ConfigError, match=r"model 1.*num_classes"):
        merge([opened(make_export(UNIFIED, "a")), opened(make_export(other, "b"))], (500.0,))
