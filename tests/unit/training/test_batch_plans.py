from __future__ import annotations

import numpy as np
import pytest

from msdiff_dist.diffusion.config import DiffusionConfig, StagesConfig, build_process
from msdiff_dist.diffusion.stage_partition import build_partition
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.distributed.placement import plan_on
from msdiff_dist.training.batch_plans import BatchPlan, OneStageBatches

PROCESS = build_process(DiffusionConfig())
PARTITION = build_partition(StagesConfig(boundaries=(442, 631)), PROCESS)
COST = [4.0, 2.0, 1.0]


def batches_on(stages_of_rank: tuple[tuple[int, ...], ...], weighted: bool = False) -> OneStageBatches:
    quotas = StageQuotas(PROCESS, PARTITION, (5.0, 3.0, 2.0), 24, importance_weights=weighted)
    plans = {
        k: BatchPlan(of_stage, plan_on(stages_of_rank, of_stage.micro_quotas(2), COST))
        for k, of_stage in ((k, quotas.of_stage(k)) for k in range(3))
    }
    return OneStageBatches(3, quotas.share_K, plans)


def test_batches_come_with_the_stages_shares() -> None:
    batches = batches_on(((0,), (1,), (2,)))
    drawn = np.array([batches.of(b).quotas.quotas_K for b in range(4000)])
    assert np.array_equal(np.unique(drawn, axis=0), [[0, 0, 24], [0, 24, 0], [24, 0, 0]])
    spread = np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(drawn.mean(axis=0) / 24, [0.5, 0.3, 0.2], atol=4 * spread)


def test_importance_weights_give_the_expected_loss_of_the_process() -> None:
    """The expectation over stages of weight times the stage's mean loss, for any losses of the stages."""
    mean_K = np.array([0.3, 7.0, 1.1])
    batches, natural_K = batches_on(((0, 1, 2),), weighted=True), np.array([442, 631 - 442, 369]) / 1000
    expected = sum(
        share * batches.plans[k].quotas.importance_K[k] * mean_K[k] for k, share in enumerate(batches.share_K)
    )
    assert expected == pytest.approx(natural_K @ mean_K)
    mixed = StageQuotas(PROCESS, PARTITION, (5.0, 3.0, 2.0), 24, importance_weights=True)
    assert (mixed.importance_K * mixed.quotas_K / 24) @ mean_K == pytest.approx(natural_K @ mean_K)
    assert mixed.quotas_K.tolist() == [12, 7, 5]


def test_ranks_without_the_stage_of_a_batch_have_no_samples() -> None:
    batches = batches_on(((0,), (0, 1), (1, 2)))
    samples_WK = batches.plans[1].placement.samples_WK
    assert samples_WK.tolist() == [[0, 0, 0], [0, 12, 0], [0, 12, 0]]
    assert batches.plans[1].placement.group(2) == (2,), "groups do not change"
    # Work 24 x cost: stages 0 and 1 on two ranks of three, stage 2 on one.
    busy, whole = 0.5 * 48 + 0.3 * 24 + 0.2 * 24, 0.5 * 32 + 0.3 * 16 + 0.2 * 8
    assert batches.balance(COST) == pytest.approx(whole / busy)
    assert batches_on(((0, 1, 2),) * 3).balance(COST) == pytest.approx(1)
