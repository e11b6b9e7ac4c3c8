"""Model configurations: bad ones are refused by field, accepted ones can be built and run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msdiff_dist.config import from_mapping, to_mapping
from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig, ModelConfig, build_model

GOOD: dict[str, Any] = {
    "encoder_channels": 32,
    "decoder_channels": [64, 32, 16],
    "channel_mult": [1, 2],
    "attention_downsamples": [2],
    "num_head_channels": 16,
    "norm_groups": 16,
}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"norm_groups": 32}, "model.norm_groups", ["16 channels", "decoder 2", "norm_groups to 16"]),
        ({"decoder_channels": [64, 40, 16]}, "model.norm_groups", ["decoder 1", "norm_groups to 8"]),
        ({"num_head_channels": 24}, "model.num_head_channels", ["does not divide"]),
        ({"num_heads": 5, "num_head_channels": None}, "model.num_heads", ["does not divide"]),
        ({"num_heads": 4}, "model.num_heads", ["exactly one"]),
        ({"num_head_channels": None}, "model.num_heads", ["exactly one"]),
        ({"attention_downsamples": [4]}, "model.attention_downsamples", ["[1, 2]"]),
        ({"decoder_attention": [[2], [3], []]}, "model.decoder_attention", ["3", "[1, 2]"]),
        ({"decoder_attention": [[2], []]}, "model.decoder_attention", ["2 entries", "3 stages"]),
        ({"encoder_channels": [32, 32, 32]}, "model.encoder_channels", ["share_encoder"]),
        ({"encoder_channels": [32, 32], "share_encoder": False}, "model.encoder_channels", ["3 stages"]),
        ({"encoder_channels": 0}, "model.encoder_channels", ["at least 1"]),
        ({"decoder_channels": []}, "model.decoder_channels", ["at least 1"]),
        ({"channel_mult": []}, "model.channel_mult", ["at least 1"]),
        ({"encoder_channels": 15, "norm_groups": 1}, "model.encoder_channels", ["even"]),
        ({"class_conditioning": "context", "num_classes": 3}, "model.class_conditioning", ["context_dim"]),
        ({"class_conditioning": "context", "context_dim": 3}, "model.class_conditioning", ["num_classes"]),
        ({"num_classes": 0}, "model.num_classes", ["at least 1"]),
        ({"dropout": 1.0}, "model.dropout", ["below 1"]),
        ({"attention_backend": "flash"}, "model.attention_backend", ["sdpa"]),
        ({"decoder_chanels": [1]}, "model.decoder_chanels", ["decoder_channels"]),
    ],
)
def test_bad_configurations_are_refused_by_field(changes: dict[str, Any], field: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_mapping(ModelConfig, GOOD | changes, "model")
    assert refused.value.field == field
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_round_trip() -> None:
    config = from_mapping(ModelConfig, GOOD | {"decoder_attention": [[2], [1, 2], []]}, "model")
    assert config.decoder_attention == ((2,), (1, 2), ())
    assert from_mapping(ModelConfig, to_mapping(config), "model") == config


def accepted(fields: dict[str, Any]) -> LDMConfig | None:
    """The configuration; None where it is refused, after a look at the remedy."""
    try:
        return LDMConfig(**fields)
    except ConfigError as e:
        refused = e
    assert refused.field in ("norm_groups", "num_heads")
    if refused.field == "norm_groups":
        fitting = int(refused.remedy.split("norm_groups to ")[1].split(",")[0])
        assert fitting < fields["norm_groups"]
        LDMConfig(**fields | {"norm_groups": fitting})
    return None


@settings(max_examples=25, deadline=None)
@given(
    encoder=st.integers(1, 6).map(lambda n: 4 * n),
    decoders=st.lists(st.integers(1, 6).map(lambda n: 4 * n), min_size=1, max_size=3),
    mult=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    res_blocks=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4, 8, 12]),
    heads=st.sampled_from([1, 2, 4, 8]),
    updown=st.booleans(),
    data=st.data(),
)
def test_what_is_accepted_can_be_built_and_run(
    encoder: int,
    decoders: list[int],
    mult: list[int],
    res_blocks: int,
    groups: int,
    heads: int,
    updown: bool,
    data: st.DataObject,
) -> None:
    """Torch itself refuses groups and heads that do not divide, so no bad configuration may slip through."""
    levels = st.lists(st.sampled_from([2**i for i in range(len(mult))]), unique=True).map(tuple)
    fields: dict[str, Any] = {
        "encoder_channels": encoder,
        "decoder_channels": tuple(decoders),
        "channel_mult": tuple(mult),
        "num_res_blocks": res_blocks,
        "attention_downsamples": data.draw(levels),
        "decoder_attention": tuple(data.draw(levels) for _ in decoders),
        "num_heads": heads,
        "resblock_updown": updown,
    }
    config = accepted(fields | {"norm_groups": groups})
    assume(config is not None)
    assert config is not None
    size = 2 ** len(mult)
    with torch.device("meta"):
        k = len(decoders) - 1
        features = (model := build_model(config)).shared(torch.empty(2, 3, size, size), torch.zeros(2))
        assert model.stages[k](*features).shape == (2, 3, size, size)
        for stage, decoder in enumerate(model.stages):
            for block, module in zip(config.up_blocks(stage), decoder.output_blocks, strict=True):
                has_attention = any("attn" in n or "qkv" in n for n, _ in module.named_parameters())
                assert has_attention == (block.downsampling in config.attention_of(stage))
