"""Counts of parameters and multiply-adds, against published models and against real forward passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msdiff_dist.errors import ConfigError
from msdiff_dist.models import LDMConfig, build_model
from msdiff_dist.models.flops import costs

MILLION, GIGA = 1e6, 1e9
STAGES = LDMConfig(encoder_channels=224, decoder_channels=(256, 192, 128), num_head_channels=32)
UNIFIED = dataclasses.replace(STAGES, decoder_channels=(224,))
OFFICIAL = dataclasses.replace(STAGES, decoder_attention=((8, 4, 2), (), ()))
SHARES = [0.442, 0.189, 0.369]


def test_unified_model_of_the_paper() -> None:
    counted = costs(UNIFIED, (64, 64))
    assert counted.total_params / MILLION == pytest.approx(274.06, abs=0.005)
    assert counted.equivalent_macs([1.0]) / GIGA == pytest.approx(101.20, abs=0.005)


@pytest.mark.parametrize(
    ("config", "total", "decoders", "gmacs"),
    [
        (STAGES, 512.4, [208.06, 128.78, 67.68], [120.44, 84.15, 56.64]),
        (OFFICIAL, 493.84, [208.06, 115.92, 61.96], [120.44, 78.21, 53.41]),
    ],
    ids=["attention everywhere", "official"],
)
def test_multistage_model_of_the_paper(
    config: LDMConfig, total: float, decoders: list[float], gmacs: list[float]
) -> None:
    counted = costs(config, (64, 64))
    assert counted.total_params / MILLION == pytest.approx(total, abs=0.05)
    assert counted.encoder.params / MILLION == pytest.approx(107.91, abs=0.005)
    assert [d.params / MILLION for d in counted.decoders] == pytest.approx(decoders, abs=0.005)
    assert [(counted.encoder.macs + d.macs) / GIGA for d in counted.decoders] == pytest.approx(gmacs, abs=0.005)


def test_cost_ratio_of_the_paper() -> None:
    ratio = costs(OFFICIAL, (64, 64)).equivalent_macs(SHARES) / costs(UNIFIED, (64, 64)).equivalent_macs([1.0])
    assert ratio == pytest.approx(0.867, abs=0.0005)


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (
            LDMConfig(
                encoder_channels=192,
                decoder_channels=(192,),
                channel_mult=(1, 2, 3, 5),
                num_heads=1,
                context_dim=512,
                num_classes=1000,
                class_conditioning="context",
            ),
            400_920_579 + 1001 * 512,
        ),
        (
            LDMConfig(
                encoder_channels=320,
                decoder_channels=(320,),
                channel_mult=(1, 2, 4, 4),
                attention_downsamples=(4, 2, 1),
                in_channels=4,
                out_channels=4,
                num_heads=8,
                context_dim=768,
            ),
            859_520_964,
        ),
        (
            LDMConfig(
                encoder_channels=320,
                decoder_channels=(320,),
                channel_mult=(1, 2, 4, 4),
                attention_downsamples=(4, 2, 1),
                in_channels=4,
                out_channels=4,
                num_head_channels=64,
                context_dim=1024,
                use_linear_in_transformer=True,
            ),
            865_910_724,
        ),
        (
            LDMConfig(
                encoder_channels=192,
                decoder_channels=(192,),
                channel_mult=(1, 2, 2, 4, 4),
                attention_downsamples=(1, 2, 4, 8),
                in_channels=4,
                out_channels=4,
                num_heads=8,
                use_scale_shift_norm=True,
                resblock_updown=True,
            ),
            294_966_916,
        ),
    ],
    ids=["cin256", "stable diffusion 1", "stable diffusion 2", "lsun churches"],
)
def test_known_models_have_their_known_size(config: LDMConfig, params: int) -> None:
    assert costs(config, (64, 64)).total_params == params


SMALL = LDMConfig(
    encoder_channels=16,
    decoder_channels=(24, 8),
    channel_mult=(1, 2),
    attention_downsamples=(2,),
    num_head_channels=8,
    norm_groups=8,
    context_dim=12,
)


@pytest.mark.parametrize("share_encoder", [True, False])
def test_counts_equal_a_real_forward(share_encoder: bool) -> None:
    config = dataclasses.replace(SMALL, share_encoder=share_encoder, attention_backend="math")
    model, counted = build_model(config), costs(config, (8, 16), context_tokens=3)
    assert counted.total_params == sum(p.numel() for p in model.parameters())
    for k in range(2):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 8, 16), torch.tensor([5]), torch.tensor([k]), context=torch.randn(1, 3, 12))
        assert counter.get_total_flops() == 2 * (counted.encoder.macs + counted.decoders[k].macs)
    if not share_encoder:
        assert (counted.encoder.params, counted.encoder.macs) == (0, 0)


def test_attention_products_are_counted_whatever_the_backend() -> None:
    by_backend = {b: costs(dataclasses.replace(SMALL, attention_backend=b), (8, 8)) for b in ("auto", "sdpa", "math")}
    assert len(set(by_backend.values())) == 1
    # Self-attention of one block: T^2 for q k^T and for the weighted sum, each over all channels; T grows fourfold.
    plain = dataclasses.replace(SMALL, context_dim=None)
    blocks = 2 + 1  # encoder's second level, middle
    small, large = (costs(plain, (s, s)).encoder.macs for s in (8, 16))
    assert large - 4 * small == 2 * 32 * (64**2 - 4 * 16**2) * blocks - _time_embedding_macs() * 3


def _time_embedding_macs() -> int:
    """Products that do not grow with the image: the time embedding, and its projection in every residual block."""
    emb, blocks = 64, [16, 16, 32, 32, 32, 32]
    return 16 * emb + emb * emb + emb * sum(blocks)


def test_size_that_cannot_be_halved() -> None:
    with pytest.raises(ConfigError, match="cannot be halved"):
        costs(STAGES, (60, 64))
