"""Learning rate and EMA decay against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from msdiff_dist.errors import ConfigError
from msdiff_dist.training.ema import EmaConfig
from msdiff_dist.training.optimizer import LrScheduleConfig, OptimizerConfig, optimizer_factory


def test_warm_up_then_cosine() -> None:
    schedule = LrScheduleConfig(kind="cosine", warmup_steps=10, final_fraction=0.1)
    assert [schedule.factor(s, 110) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.factor(11, 110) == pytest.approx(1.0)
    assert schedule.factor(61, 110) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(36, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(111, 110) == pytest.approx(0.1)
    assert LrScheduleConfig(warmup_steps=0).factor(6, 10) == 1.0


def test_warm_up_of_score_sde_and_edm() -> None:
    """Of update n, counted from 0: lr min(n / W, 1) in score_sde, lr min(images before it / 10 million, 1) in EDM."""
    score_sde = LrScheduleConfig(warmup_steps=5000, first_step=0)
    edm = LrScheduleConfig(warmup_steps=78125, first_step=0)
    for n in (0, 1, 77, 4999, 5000, 5001, 78124, 78125, 10**6):
        assert score_sde.factor(n + 1, 450_000) == pytest.approx(min(n / 5000, 1.0))
        assert edm.factor(n + 1, 570_000) == pytest.approx(min(n * 128 / 10e6, 1.0))
    assert LrScheduleConfig(first_step=0).factor(1, 10) == 1.0
    cosine = LrScheduleConfig(kind="cosine", warmup_steps=10, first_step=0)
    assert [cosine.factor(s, 110) for s in (1, 6, 11, 61)] == pytest.approx([0, 0.5, 1, 0.5])


def test_a_rate_for_each_sample_is_multiplied_by_the_global_batch() -> None:
    assert OptimizerConfig(lr=2e-6, lr_per="sample").rate(48) == pytest.approx(9.6e-5)
    assert OptimizerConfig(lr=2e-6).rate(48) == 2e-6


def test_ema_decay_warms_up_as_in_ldm() -> None:
    config = EmaConfig(decay=0.9999)
    assert [config.decay_at(n, 64) for n in (1, 2, 90)] == pytest.approx([2 / 11, 3 / 12, 91 / 100])
    assert config.decay_at(10**6, 64) == 0.9999
    assert EmaConfig(decay=0.5, warmup=False).decay_at(1, 64) == 0.5


def test_ema_halves_in_a_number_of_images() -> None:
    config = EmaConfig(halflife_images=500_000)
    steps = 500_000 // 500
    late = 10**6
    assert math.prod(config.decay_at(late + n, 500) for n in range(steps)) == pytest.approx(0.5)
    assert config.decay_at(late, 1000) == pytest.approx(config.decay_at(late, 500) ** 2)
    assert config.decay_at(1, 500) == 0, "at first the average is the weights"
    assert config.decay_at(101, 500) == pytest.approx(0.5 ** (1 / (0.05 * 100))), "a twentieth of the images seen"
    assert EmaConfig(halflife_images=1000, warmup=False).decay_at(1, 500) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_are_torchs(name: str) -> None:
    config = OptimizerConfig(lr=0.1, name=name, weight_decay=0.02, momentum=0.9)
    made = optimizer_factory(config, fused=False)([torch.nn.Parameter(torch.ones(2))])
    assert type(made) is {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    assert made.param_groups[0]["lr"] == 0.1
    assert made.param_groups[0]["weight_decay"] == 0.02


@pytest.mark.parametrize(
    ("change", "field"), [({"lr": 0.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"grad_clip": -1.0}, "grad_clip")]
)
def test_optimizer_refusals(change: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(**({"lr": 0.1} | change))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"decay": 1.0}, "decay"),
        ({"halflife_images": 0.0}, "halflife_images"),
        ({"halflife_images": 10.0, "warmup_ratio": 0.0}, "warmup_ratio"),
        ({"decay": 0.9, "halflife_images": 10.0}, "halflife_images"),
    ],
)
def test_ema_refusals(config: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EmaConfig(**config)
    assert caught.value.field == field
