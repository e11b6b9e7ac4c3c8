"""Every kind of U-Net computes the same as diffusers' own network with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msdiff_dist.convert.conversion import convert
from msdiff_dist.convert.formats.diffusers_folder import read_diffusers
from msdiff_dist.convert.formats.diffusers_unet import model_of_stock, stock_config
from msdiff_dist.convert.options import ConvertOptions
from msdiff_dist.errors import CheckpointError
from msdiff_dist.models import build_model
from msdiff_dist.models.ldm.config import LDMConfig
from tests.unit.convert.convert_helpers import inputs, loaded, randomise, same_tensors

SMALL: dict[str, Any] = {
    "encoder_channels": 32, "decoder_channels": (32,), "channel_mult": (1, 2, 3), "num_res_blocks": 1,
    "attention_downsamples": (2, 4),
}  # fmt: skip
STOCK = {
    "self-attention": {"num_head_channels": 32},
    "one head": {"num_heads": 1, "legacy_attention_order": False},
    "scale-shift, resampling blocks, classes": {
        "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True, "num_classes": 5,
    },
    "text, heads by number": {"num_heads": 4, "context_dim": 24},
    "text, linear, deep": {
        "num_head_channels": 16, "context_dim": 24, "use_linear_in_transformer": True, "transformer_depth": 2,
        "num_classes": 4, "use_scale_shift_norm": True,
    },
    "no attention in the decoder": {"num_head_channels": 32, "decoder_attention": ((),)},
    "other attention in the decoder": {"num_head_channels": 32, "decoder_attention": ((1, 4),)},
    "one level": {"num_heads": 2, "channel_mult": (1,), "attention_downsamples": (1,)},
    "16 groups": {"num_head_channels": 16, "norm_groups": 16},
}  # fmt: skip


def diffusers_model(config: dict[str, Any]) -> Any:
    import diffusers

    return randomise(getattr(diffusers, config["_class_name"]).from_config(config))


def theirs(model: Any, x: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    names = {"label": "class_labels", "context": "encoder_hidden_states"}
    return model(x, t, **{names[k]: v for k, v in conditions.items()}).sample


@torch.no_grad()
@pytest.mark.parametrize("changes", STOCK.values(), ids=STOCK)
def test_stock_networks_compute_the_same(tmp_path: Any, changes: dict[str, Any]) -> None:
    config = LDMConfig(**{**SMALL, **changes})
    stock = stock_config(config)
    assert isinstance(stock, dict)
    original = diffusers_model(stock)
    original.save_pretrained(tmp_path / "unet")
    found = read_diffusers(tmp_path / "unet", ConvertOptions())
    x, t, conditions = inputs(config)
    expected = theirs(original, x, t, conditions)
    output = loaded(found)(x, t, torch.zeros(len(x), dtype=torch.int64), **conditions)
    assert torch.allclose(output, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, torch.zeros_like(expected), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("changes", STOCK.values(), ids=STOCK)
def test_stock_networks_are_written(tmp_path: Any, make_export: Any, changes: dict[str, Any]) -> None:
    import diffusers

    config = LDMConfig(**{**SMALL, **changes})
    convert(make_export(config), tmp_path / "theirs", "msdiff", "diffusers")
    kind = diffusers.UNet2DModel if config.context_dim is None else diffusers.UNet2DConditionModel
    written = kind.from_pretrained(tmp_path / "theirs", subfolder="unet").eval()
    x, t, conditions = inputs(config)
    expected = randomise(build_model(config))(x, t, torch.zeros(len(x), dtype=torch.int64), **conditions)
    assert torch.allclose(theirs(written, x, t, conditions), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_channels": (64,), "num_head_channels": 32}, "64 channels wide"),
        ({"decoder_channels": (32, 32), "num_head_channels": 32}, "several decoders"),
        ({"num_heads": 8}, "8 heads at every width"),
        ({"num_heads": 4, "context_dim": 8, "num_classes": 3, "class_conditioning": "context"}, "context tokens"),
        ({"num_heads": 4, "context_dim": 8, "resblock_updown": True}, "resamples inside"),
    ],
)
def test_networks_that_no_stock_class_holds(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(stock_config(LDMConfig(**{**SMALL, **changes})))


PLAIN = {"_class_name": "UNet2DModel", "block_out_channels": [32, 64], "down_block_types": ["DownBlock2D"] * 2}
PLAIN |= {"up_block_types": ["UpBlock2D"] * 2, "attention_head_dim": 32, "in_channels": 3, "layers_per_block": 1}
TEXT = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4], "cross_attention_dim": 8, "layers_per_block": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (PLAIN | {"freq_shift": 1}, "freq_shift"),
        (PLAIN | {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        (PLAIN | {"norm_eps": 1e-6}, "norm_eps"),
        (PLAIN | {"downsample_padding": 0}, "downsample_padding"),
        (PLAIN | {"time_embedding_type": "fourier"}, "time_embedding_type"),
        (PLAIN | {"center_input_sample": True}, "center_input_sample"),
        (PLAIN | {"add_attention": False}, "add_attention"),
        (PLAIN | {"block_out_channels": [32, 48]}, "block_out_channels"),
        (PLAIN | {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        (TEXT | {"addition_embed_type": "text_time"}, "addition_embed_type"),
        (TEXT | {"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        (TEXT | {"only_cross_attention": True}, "only_cross_attention"),
        (TEXT | {"attention_head_dim": [2, 8]}, "attention_head_dim"),
        (TEXT | {"transformer_layers_per_block": [1, 2]}, "config"),
        (TEXT | {"conv_in_kernel": 5}, "conv_in_kernel"),
    ],
)
def test_what_our_network_does_not_do_is_named(config: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        model_of_stock(config)


def test_heads_that_are_called_dimensions() -> None:
    assert model_of_stock(TEXT).num_head_channels == 16
    assert model_of_stock(TEXT | {"attention_head_dim": 8}).num_heads == 8
    assert model_of_stock(TEXT | {"attention_head_dim": 8, "num_attention_heads": 4}).num_heads == 4


def test_attention_under_its_old_names(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    config = LDMConfig(**SMALL, num_head_channels=32)
    stock = stock_config(config)
    assert isinstance(stock, dict)
    diffusers_model(stock).save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    new = read_diffusers(tmp_path / "unet", ConvertOptions())
    tensors = {k: new.tensors.read(k).clone() for k in new.tensors.names()}
    for name, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {k.replace(f".{name}.", f".{old}."): v for k, v in state.items()}
    save_file(state, path)
    found = read_diffusers(tmp_path / "unet", ConvertOptions())
    assert same_tensors({k: found.tensors.read(k) for k in found.tensors.names()}, tensors)
