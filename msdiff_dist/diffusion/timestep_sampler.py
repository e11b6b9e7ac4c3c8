"""Which stage, time and micro batch each sample of a global batch gets.

All three are functions of the seed, the number of the global batch and the index in it, so they do not depend on ranks,
workers or placement.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msdiff_dist.diffusion.config import StageSampling, StagesConfig
from msdiff_dist.diffusion.stage_partition import StagePartition
from msdiff_dist.diffusion.training_times import TimeDistribution
from msdiff_dist.errors import ConfigError
from msdiff_dist.randomness import stage_order, time_uniforms


@dataclass(frozen=True)
class StepDraw:
    """Stages, times and micro batches of the samples of one optimizer step, by index in the global batch.

    Args:
        stage_B: int64, the stage of each sample.
        t_B: the time of each sample in the process's unit, int64 for a discrete process and float64 otherwise.
        micro_B: int64, the micro batch of each sample; only this field depends on the number of accumulation steps.
    """

    stage_B: np.ndarray
    t_B: np.ndarray
    micro_B: np.ndarray


class StageQuotas:
    """Draws stratified times: a global batch holds a given number of samples of each stage.

    Attributes:
        share_K: share of each stage in the samples (`stages.sampling`), before rounding.
        probability_K: probability of each stage in the objective: its share, or with importance weights that in the
            distribution of times. With `stages`, that of each given that the sample is in one of them.
        quotas_K: int64, samples of each stage in a global batch; each is at least one, and they sum to the batch. 0 for
            those that are not among `stages`.
        importance_K: probability_k / (quota_k / B), the constant loss weight of each stage. With it the mean over the
            global batch is an unbiased estimate of the objective although quotas are rounded to whole numbers.

    Args:
        times: the distribution of times in training.
        stages: the stages to draw; None: all.
        importance_weights: whether the objective is the distribution of times, whatever `sampling` is.

    Raises:
        ConfigError: the global batch is smaller than the number of stages.
    """

    def __init__(
        self,
        times: TimeDistribution,
        partition: StagePartition,
        sampling: StageSampling,
        global_batch_size: int,
        stages: Sequence[int] | None = None,
        *,
        importance_weights: bool = False,
    ) -> None:
        self._times, self._partition, self._weighted = times, partition, importance_weights
        self.share_K = _among(stages, stage_probabilities(times, partition, sampling))
        own = "uniform" if importance_weights else sampling
        self.probability_K = _among(stages, stage_probabilities(times, partition, own))
        self.quotas_K = _quotas(self.share_K, global_batch_size)
        self.importance_K = _importance(self.probability_K, self.quotas_K)

    def of_shares(self, share_K: np.ndarray) -> StageQuotas:
        """The same with other shares of the stages, none above zero of a stage that is not drawn."""
        changed = copy.copy(self)
        changed.share_K = share_K
        if not self._weighted:
            changed.probability_K = share_K
        changed.quotas_K = _quotas(share_K, int(self.quotas_K.sum()))
        changed.importance_K = _importance(changed.probability_K, changed.quotas_K)
        return changed

    def of_stage(self, stage: int) -> StageQuotas:
        """Global batches of one stage alone. If each batch's stage is drawn with probability `share_K`, the expected
        gradient is that of the objective."""
        changed = copy.copy(self)
        changed.quotas_K, changed.importance_K = np.zeros_like(self.quotas_K), np.zeros_like(self.importance_K)
        changed.quotas_K[stage] = self.quotas_K.sum()
        changed.importance_K[stage] = self.probability_K[stage] / self.share_K[stage]
        return changed

    def micro_quotas(self, accumulation_steps: int) -> np.ndarray:
        """Samples of each stage in each micro batch, int64 [A, K], none below one; 0 of stages that are not drawn.

        Raises:
            ConfigError: a stage has fewer samples than there are micro batches.
        """
        fewest = min(np.flatnonzero(self.quotas_K), key=self.quotas_K.__getitem__)
        if self.quotas_K[fewest] < accumulation_steps:
            problem = f"stage {fewest} has only {self.quotas_K[fewest]} samples in a global batch"
            remedy = f"Use at most {self.quotas_K[fewest]}, or a larger train.global_batch_size."
            raise ConfigError("train.gradient_accumulation_steps", accumulation_steps, problem, remedy)
        return np.diff(self._micro_bounds(accumulation_steps), axis=0)

    def draw(self, seed: int, batch: int, accumulation_steps: int = 1) -> StepDraw:
        """Stages, times and micro batches of the global batch with number `batch`, counted from 0."""
        quotas, B = self.quotas_K, int(self.quotas_K.sum())
        # Exactly quota_k samples are in stage k. Their indices are random, so that no lane and no rank always has the
        # same stages.
        stage_B = np.repeat(np.arange(len(quotas)), quotas)[stage_order(seed, batch, B)]
        u_B = time_uniforms(seed, batch, B)
        t_B = np.empty(B, np.int64 if self._times.discrete else np.float64)
        micro_B = np.empty(B, np.int64)
        first, by_stage = 0, np.argsort(stage_B, kind="stable")
        # Inside its stage a sample's time follows the distribution of times, by the inverse of the distribution
        # function. A stage's samples go to the micro batches in order of index, as evenly as whole numbers allow.
        for k, bounds in enumerate(self._micro_bounds(accumulation_steps).T):
            members = by_stage[first : first + quotas[k]]
            t_B[members] = self._times.quantile(u_B[members], *self._partition.interval(k))
            micro_B[members] = np.searchsorted(bounds[1:], np.arange(quotas[k]), side="right")
            first += quotas[k]
        return StepDraw(stage_B, t_B, micro_B)

    def _micro_bounds(self, accumulation_steps: int) -> np.ndarray:
        """Sample j of stage k, in index order, belongs to micro batch m when bounds[m, k] <= j < bounds[m + 1, k]."""
        return self.quotas_K * np.arange(accumulation_steps + 1)[:, None] // accumulation_steps


def _among(stages: Sequence[int] | None, probability_K: np.ndarray) -> np.ndarray:
    """Probabilities of the stages given that one of `stages` is drawn (None: any)."""
    if stages is None or len(stages) == len(probability_K):
        return probability_K
    drawn = np.isin(np.arange(len(probability_K)), stages)
    values: np.ndarray = np.where(drawn, probability_K, 0) / probability_K[drawn].sum()
    return values


def _quotas(share_K: np.ndarray, global_batch_size: int) -> np.ndarray:
    """`stage_quotas` of the stages that have a share, 0 of the others."""
    quotas_K = np.zeros(len(share_K), np.int64)
    quotas_K[share_K > 0] = stage_quotas(share_K[share_K > 0], global_batch_size)
    return quotas_K


def _importance(probability_K: np.ndarray, quotas_K: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0 of stages that are not drawn
        values: np.ndarray = np.nan_to_num(probability_K * quotas_K.sum() / quotas_K)
    return values


def objective_probabilities(times: TimeDistribution, partition: StagePartition, config: StagesConfig) -> np.ndarray:
    """Probability [K] of each stage in the objective of the recipe's section `stages`."""
    return stage_probabilities(times, partition, "uniform" if config.importance_weights else config.sampling)


def stage_probabilities(times: TimeDistribution, partition: StagePartition, sampling: StageSampling) -> np.ndarray:
    """Probability [K] of each stage under `stages.sampling`."""
    K = partition.num_stages
    if sampling == "equal":
        return np.full(K, 1 / K)
    if sampling == "uniform":
        weights = np.array([times.mass(*partition.interval(k)) for k in range(K)])
    else:
        weights = np.array(sampling)
    values: np.ndarray = weights / weights.sum()
    return values


def stage_quotas(probability_K: Sequence[float] | np.ndarray, global_batch_size: int) -> np.ndarray:
    """Samples of each stage in a global batch, int64 [K]: probability times batch, rounded by largest remainder.

    They sum to the batch, and none is below one.

    Raises:
        ConfigError: the global batch is smaller than the number of stages.
    """
    if global_batch_size < len(probability_K):
        problem = f"is smaller than the number of stages, {len(probability_K)}"
        raise ConfigError("train.global_batch_size", global_batch_size, problem, "Use a larger batch.")
    # Round down, and give the samples still missing to the stages that lost most by it. A stage without samples takes
    # one from the largest, because the ranks of every stage's group need work in every step.
    exact = np.asarray(probability_K) * global_batch_size
    quotas: np.ndarray = np.floor(exact).astype(np.int64)
    most_remaining = np.argsort(quotas - exact, kind="stable")
    quotas[most_remaining[: global_batch_size - quotas.sum()]] += 1
    for k in np.flatnonzero(quotas == 0):
        quotas[k] += 1
        quotas[np.argmax(quotas)] -= 1
    return quotas
