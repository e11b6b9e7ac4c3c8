"""Stages and times of a global batch: quotas, weights, and their distribution over many batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, stage_quotas
from msdiff_dist.errors import ConfigError

PROCESS = build_process(DiffusionConfig())
PARTITION = build_partition(StagesConfig(boundaries=(442, 631)), PROCESS)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=6), st.integers(6, 5000))
def test_quotas_are_the_nearest_whole_numbers_none_below_one(weights: list[float], B: int) -> None:
    probability = np.array(weights) / sum(weights)
    quotas = stage_quotas(probability, B)
    assert quotas.sum() == B
    assert quotas.min() >= 1
    if (probability * B >= 1).all():
        assert np.abs(quotas - probability * B).max() < 1


@pytest.mark.parametrize(
    ("sampling", "probability"),
    [("uniform", [0.442, 0.189, 0.369]), ("equal", [1 / 3] * 3), ((1.0, 1.0, 2.0), [0.25, 0.25, 0.5])],
)
def test_importance_keeps_the_objective_unbiased(sampling: object, probability: list[float]) -> None:
    quotas = StageQuotas(PROCESS, PARTITION, sampling, 50)
    np.testing.assert_allclose(quotas.probability_K, probability)
    np.testing.assert_allclose(quotas.importance_K * quotas.quotas_K / 50, probability)


@given(st.integers(4, 300), st.integers(0, 2**40), st.integers(1, 4))
def test_a_draw_fills_quotas_and_micro_batches(B: int, step: int, accumulation: int) -> None:
    quotas = StageQuotas(PROCESS, PARTITION, "equal", max(B, 3 * accumulation))
    draw = quotas.draw(7, step, accumulation)
    assert np.array_equal(np.bincount(draw.stage_B, minlength=3), quotas.quotas_K)
    assert np.array_equal(PARTITION.stage_of(draw.t_B), draw.stage_B)
    micro_AK = quotas.micro_quotas(accumulation)
    assert micro_AK.min() >= 1
    for k in range(3):
        micro = draw.micro_B[draw.stage_B == k]
        assert np.array_equal(np.bincount(micro, minlength=accumulation), micro_AK[:, k])
        assert np.all(np.diff(micro) >= 0)


def test_stages_and_times_do_not_depend_on_accumulation() -> None:
    quotas = StageQuotas(PROCESS, PARTITION, "uniform", 64)
    one, four = quotas.draw(0, 5), quotas.draw(0, 5, 4)
    assert np.array_equal(one.stage_B, four.stage_B)
    assert np.array_equal(one.t_B, four.t_B)
    assert not np.array_equal(one.t_B, quotas.draw(0, 6).t_B)
    assert not np.array_equal(one.t_B, quotas.draw(1, 5).t_B)


def test_weighted_draws_follow_the_process_whatever_the_sampling() -> None:
    """The importance-weighted histogram of t over many steps is flat, the discrete process's training distribution."""
    p = PROCESS.mass
    sampling = (1.0, 2.0, 3.0)
    quotas = StageQuotas(PROCESS, PARTITION, sampling, 6)
    draws = [quotas.draw(3, step) for step in range(20000)]
    t, stage = np.concatenate([d.t_B for d in draws]), np.concatenate([d.stage_B for d in draws])
    to_uniform = np.array([p(0, 442), p(442, 631), p(631, 1000)]) / quotas.probability_K
    mean, _ = np.histogram(t, bins=10, range=(0, 1000), weights=(quotas.importance_K * to_uniform)[stage])
    np.testing.assert_allclose(mean / mean.sum(), 0.1, rtol=0.03)


def test_every_index_meets_every_stage() -> None:
    quotas = StageQuotas(PROCESS, PARTITION, "equal", 3)
    seen = np.stack([quotas.draw(0, step).stage_B for step in range(3000)])
    for k in range(3):
        np.testing.assert_allclose((seen == k).mean(0), 1 / 3, atol=0.04)


def test_a_batch_too_small_for_stages_or_micro_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train\.global_batch_size = 2"):
        StageQuotas(PROCESS, PARTITION, "equal", 2)
    with pytest.raises(ConfigError, match=r"^train\.gradient_accumulation_steps = 3: stage 1 has only 2"):
        StageQuotas(PROCESS, PARTITION, (3.0, 2.0, 3.0), 8).micro_quotas(3)


def test_stages_that_are_not_drawn_leave_the_others_in_proportion() -> None:
    quotas = StageQuotas(PROCESS, PARTITION, (3.0, 2.0, 1.0), 10, stages=[0, 2])
    np.testing.assert_allclose(quotas.probability_K, [3 / 4, 0, 1 / 4])
    assert quotas.quotas_K[1] == 0
    assert quotas.quotas_K.sum() == 10
    np.testing.assert_allclose(quotas.importance_K * quotas.quotas_K / 10, [3 / 4, 0, 1 / 4])
    draw = quotas.draw(7, step := 3, 2)
    assert np.array_equal(np.bincount(draw.stage_B, minlength=3), quotas.quotas_K)
    assert np.array_equal(PARTITION.stage_of(draw.t_B), draw.stage_B)
    assert quotas.micro_quotas(2).min(axis=0)[[0, 2]].min() >= 1
    assert not quotas.micro_quotas(2)[:, 1].any()
    # A single stage has the whole batch, and the times of that batch are its own.
    alone = StageQuotas(PROCESS, PARTITION, "uniform", 4, stages=[1])
    assert alone.quotas_K.tolist() == [0, 4, 0]
    assert alone.importance_K.tolist() == [0, 1, 0]
    assert set(PARTITION.stage_of(alone.draw(7, step).t_B)) == {1}
