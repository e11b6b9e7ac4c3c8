"""The configuration of any model can be inferred from its tensors' names and shapes in LDM's layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msdiff_dist.convert.formats.ldm import CLASS_TABLE, UNET, decoder_names, ldm_unet_rules
from msdiff_dist.convert.formats.ldm_architecture import infer_model, published_heads
from msdiff_dist.convert.key_map import TheirsFromOurs
from msdiff_dist.convert.model_weights import empty_model
from msdiff_dist.convert.options import HeadsRule
from msdiff_dist.convert.tensor_sources import MemorySource, under
from msdiff_dist.errors import CheckpointError
from msdiff_dist.models.ldm.config import LDMConfig


@st.composite
def models(draw: st.DrawFn) -> LDMConfig:
    levels = draw(st.integers(1, 3))
    places = st.sets(st.sampled_from([2**i for i in range(levels)])).map(lambda s: tuple(sorted(s)))
    stages = draw(st.integers(1, 3))
    context = draw(st.sampled_from([None, 24]))
    num_classes = draw(st.sampled_from([None, 4]))
    own_places = draw(st.none() | st.tuples(*[places] * stages))
    attention = draw(places)
    assume(own_places is None or any(p != attention for p in own_places))
    return LDMConfig(
        in_channels=draw(st.sampled_from([1, 4])),
        out_channels=draw(st.sampled_from([3, 8])),
        encoder_channels=draw(st.sampled_from([32, 64])),
        decoder_channels=tuple(draw(st.sampled_from([32, 64, 96])) for _ in range(stages)),
        channel_mult=(1, *draw(st.lists(st.integers(1, 4), min_size=levels - 1, max_size=levels - 1))),
        num_res_blocks=draw(st.integers(1, 3)),
        attention_downsamples=attention,
        decoder_attention=own_places,
        num_head_channels=16,
        context_dim=context,
        transformer_depth=draw(st.integers(1, 2)) if context else 1,
        use_linear_in_transformer=draw(st.booleans()) if context else False,
        num_classes=num_classes,
        class_conditioning=draw(st.sampled_from(["embedding", "context"])) if context and num_classes else "embedding",
        use_scale_shift_norm=draw(st.booleans()),
        resblock_updown=draw(st.booleans()) if levels > 1 else False,
    )


@settings(max_examples=20, deadline=None)
@given(config=models(), multistage=st.booleans())
def test_names_and_shapes_give_the_configuration_back(config: LDMConfig, multistage: bool) -> None:
    if not multistage:
        first = None if config.decoder_attention is None else config.decoder_attention[:1]
        config = replace(config, decoder_channels=config.decoder_channels[:1], decoder_attention=first)
    if config.decoder_attention is not None and set(config.decoder_attention) == {config.attention_downsamples}:
        config = replace(config, decoder_attention=None)
    rules = ldm_unet_rules(config, multistage)
    source = TheirsFromOurs(MemorySource(dict(empty_model(config).named_parameters())), rules)
    table = tuple(source.meta(CLASS_TABLE).shape) if CLASS_TABLE in source else None
    heads = HeadsRule(None, 16, "given")
    found, _ = infer_model(under(source, UNET), decoder_names(config.num_stages, multistage), table, heads)
    assert found == config


def test_every_parameter_has_one_name() -> None:
    rules = ldm_unet_rules(replace(small(), decoder_channels=(64, 32)), multistage=True)
    theirs = [k for r in rules for k in r.theirs]
    assert len(theirs) == len(set(theirs)) == len({r.ours for r in rules})


@pytest.mark.parametrize(
    ("arguments", "number", "per_head"),
    [
        (((1, 2, 3, 4), None, False, False, False), None, 32),
        (((1, 2, 2, 4, 4), None, False, True, False), 8, None),
        (((1, 2, 3, 5), 512, False, False, True), 1, None),
        (((1, 2, 4), 512, False, False, True), None, 32),
        (((1, 2, 4, 4), 768, False, False, False), 8, None),
        (((1, 2, 4, 4), 1024, True, False, False), None, 64),
    ],
)
def test_heads_of_published_models(arguments: tuple, number: int | None, per_head: int | None) -> None:
    rule = published_heads(*arguments)
    assert (rule.num_heads, rule.num_head_channels) == (number, per_head)


def test_other_networks_are_refused() -> None:
    source = MemorySource(dict(empty_model(small()).named_parameters()))
    with pytest.raises(CheckpointError, match=r"input_blocks\.0\.0\.weight"):
        infer_model(source, decoder_names(1, False))


def small() -> LDMConfig:
    return LDMConfig(
        encoder_channels=32, decoder_channels=(32,), channel_mult=(1, 2), attention_downsamples=(2,), num_heads=1
    )
