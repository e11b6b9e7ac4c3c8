from __future__ import annotations

import numpy as np
import pytest

from msdiff_dist.diffusion.config import AdaptiveSharesConfig, DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.errors import ConfigError
from msdiff_dist.training.adaptive_shares import DELAY, AdaptiveBatches, bounded

PROCESS = build_process(DiffusionConfig())
PARTITION = build_partition(StagesConfig(boundaries=(442, 631)), PROCESS)
NATURAL = np.array([0.442, 0.189, 0.369])
COST = [4.0, 2.0, 1.0]


def batches_of(config: AdaptiveSharesConfig, weighted: bool = True, batch: int = 1000) -> AdaptiveBatches:
    quotas = StageQuotas(PROCESS, PARTITION, "equal", batch, importance_weights=weighted)
    return AdaptiveBatches(config, quotas, NATURAL, ((0,), (1,), (2,)), COST, 1)


@pytest.mark.parametrize("weighted", [True, False])
def test_shares_of_least_variance(weighted: bool) -> None:
    """The shares minimise the sum of p^2 s^2 / n times the compute: no others near them are better."""
    deviation_K = np.array([1.0, 5.0, 2.0])
    batches = batches_of(AdaptiveSharesConfig(every=8, rate=1.0, min_share=0.01), weighted)
    for batch in range(8):
        quotas = batches.of(batch).quotas
        squares = (quotas.probability_K * deviation_K) ** 2 / quotas.quotas_K  # of the mean over the samples
        batches.observe(batch, [0.0] * 3, squares.tolist())
    assert batches.of(7 + DELAY) is batches.of(0)
    share_K = batches.of(8 + DELAY).quotas.quotas_K / 1000

    def variance_times_compute(share: np.ndarray) -> float:
        return float((NATURAL**2 * deviation_K**2 / share).sum() * (share @ COST))

    best = variance_times_compute(share_K)
    for k in range(3):
        for change in (-0.03, 0.03):
            other = share_K.copy()
            other[k] += change
            assert variance_times_compute(other / other.sum()) > best


def test_shares_follow_progress() -> None:
    batches = batches_of(AdaptiveSharesConfig(by="progress", every=8, rate=1.0, min_share=0.1))
    loss_K = np.array([3.0, 2.0, 1.0])
    for batch in range(16):
        if batch == 8:
            loss_K = loss_K - [0.4, 0.0, 0.2]
        quotas_K = batches.of(batch).quotas.quotas_K
        batches.observe(batch, (loss_K * quotas_K).tolist(), None)
    assert batches.of(15 + DELAY).quotas.quotas_K.tolist() == batches.of(0).quotas.quotas_K.tolist(), "two are needed"
    # Falls times probability over cost: 0.4 x 0.442 / 4 and 0.2 x 0.369 / 1, bounded from below.
    gain = np.array([0.4 * 0.442 / 4, 0.0, 0.2 * 0.369])
    expected = bounded(gain / gain.sum(), 0.1)
    np.testing.assert_allclose(batches.of(16 + DELAY).quotas.quotas_K / 1000, expected, atol=1e-3)


def test_bounds() -> None:
    share = bounded(np.array([0.9, 0.1, 0.0]), 0.2)
    assert share.sum() == pytest.approx(1)
    assert share.tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_state_is_kept() -> None:
    config = AdaptiveSharesConfig(every=8, min_share=0.01)
    batches, again = batches_of(config), batches_of(config)
    for batch in range(10):
        batches.observe(batch, [1.0, 2.0, 3.0], [1.0, 0.1, 5.0])
    again.restore(100, batches.fields(10))  # batches are counted from the checkpoint
    for later in (0, DELAY - 3, DELAY - 2, DELAY + 3):
        expected = batches.of(10 + later).quotas.quotas_K
        assert np.array_equal(again.of(100 + later).quotas.quotas_K, expected)
    assert again.fields(100) == batches.fields(10)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"adaptive.min_share = 0.4: 3 stages would have more than all samples"):
        StagesConfig(boundaries=(442, 631), adaptive=AdaptiveSharesConfig(min_share=0.4))
    with pytest.raises(ConfigError, match=r"batch = 'one_stage': has no shares to adapt"):
        StagesConfig(boundaries=(442,), batch="one_stage", adaptive=AdaptiveSharesConfig())
    with pytest.raises(ConfigError, match=r"adaptive = 'given': there is one stage"):
        StagesConfig(adaptive=AdaptiveSharesConfig())
    with pytest.raises(ConfigError, match=r"every = 7"):
        AdaptiveSharesConfig(every=7)
    with pytest.raises(ConfigError, match=r"rate = 0: must lie in"):
        AdaptiveSharesConfig(rate=0)
    with pytest.raises(ConfigError, match=r"stages.adaptive.min_share = 0.01: may leave stage 0 0 of 24 samples"):
        batches_of(AdaptiveSharesConfig(min_share=0.01), batch=24)
