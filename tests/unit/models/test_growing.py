"""A model grown from a unified one, and the gradients that its parameters then have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msdiff_dist.errors import ConfigError
from msdiff_dist.models import group_norm
from msdiff_dist.models.families import FAMILIES
from msdiff_dist.models.growing import grown_from
from msdiff_dist.models.multistage_unet import MultistageUNet, build_model
from msdiff_dist.models.unet_config import UNetConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the factors are thirds in fp32


def config_of(family: str = "ldm", **changes: Any) -> UNetConfig:
    plain: dict[str, Any] = {
        "in_channels": 2, "out_channels": 2, "encoder_channels": 8, "decoder_channels": (8,), "channel_mult": (1, 2),
        "num_res_blocks": 1, "attention_downsamples": (2,), "norm_groups": 4,
    }  # fmt: skip
    heads = {"num_head_channels": 4} if family == "ldm" else {}
    return FAMILIES[family].config(**plain | heads | changes, family=family)


def drawn(config: UNetConfig) -> MultistageUNet:
    """A model in float64 without parameters that are zero as at initialisation."""
    model, draw = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model.double()


def output(model: nn.Module, stage: int, context: Tensor | None = None) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 8, 8, generator=draw, dtype=torch.float64)
    out: Tensor = model(x, torch.tensor([1.0, 5, 9]).double(), torch.full((3,), stage), context)
    return out


@pytest.mark.parametrize("changes", [
    {}, {"num_head_channels": None, "num_heads": 2}, {"legacy_attention_order": False},
    {"num_head_channels": None, "num_heads": 2, "legacy_attention_order": False}, {"use_scale_shift_norm": True},
])  # fmt: skip
def test_gradients_of_a_wider_decoder(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the statistics of norms a decoder of three times the width computes the same. So its gradients follow
    from the unified model's, and autograd gives them."""

    def affine(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float, silu: bool) -> Tensor:
        def along(v: Tensor) -> Tensor:
            return (v if v.ndim == 2 else v[None])[:, :, None, None]

        h = x * along(scale) + along(shift)
        return nn.functional.silu(h) if silu else h

    monkeypatch.setattr(group_norm, "_plain", affine)
    unified = drawn(config_of(**changes))
    config = config_of(**changes, decoder_channels=(24, 8))
    grown = build_model(config).double()
    rules = grown_from(config_of(**changes), config)
    old = dict(unified.named_parameters())
    assert rules.keys() == dict(grown.named_parameters()).keys()
    with torch.no_grad():
        for name, p in grown.named_parameters():
            how = rules[name]
            assert how is not None
            p.copy_(how.apply(old[how.name]))
    expected = output(unified, 0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected * weight).sum().backward()
    for stage in (0, 1):
        grown.zero_grad()
        found = output(grown, stage)
        torch.testing.assert_close(found, expected, **CLOSE)
        (found * weight).sum().backward()
        for name, p in grown.stages[stage].named_parameters():
            how = rules[f"stages.{stage}.{name}"]
            assert how is not None
            gradient = old[how.name].grad
            assert gradient is not None
            wanted = how.apply_to_gradient(gradient, 1)
            torch.testing.assert_close(p.grad, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(how.apply_to_gradient(gradient**2, 2), wanted**2, **CLOSE)
        assert all(rules[f"stages.1.{name}"].is_copy for name, _ in grown.stages[1].named_parameters())


def test_every_stage_gets_the_encoder_where_none_is_shared() -> None:
    unified = drawn(config_of())
    config = config_of(decoder_channels=(8, 8), share_encoder=False)
    grown, old = build_model(config).double(), dict(unified.named_parameters())
    rules = grown_from(config_of(), config)
    assert rules.keys() == dict(grown.named_parameters()).keys()
    with torch.no_grad():
        for name, p in grown.named_parameters():
            p.copy_(rules[name].apply(old[rules[name].name]))
    for stage in (0, 1):
        assert torch.equal(output(grown, stage), output(unified, 0))


def test_new_attention_is_marked_and_some_families_keep_their_width() -> None:
    unified = config_of()
    more = replace(config_of(decoder_channels=(8, 8)), decoder_attention=((2,), (2, 1)))
    new = [name for name, how in grown_from(unified, more).items() if how is None]
    assert new
    assert all(name.startswith("stages.1.") for name in new)
    song = config_of("ddpmpp")
    assert grown_from(song, replace(song, decoder_channels=(8, 8)))
    with pytest.raises(ConfigError, match="keep their width"):
        grown_from(song, replace(song, decoder_channels=(8, 4)))
