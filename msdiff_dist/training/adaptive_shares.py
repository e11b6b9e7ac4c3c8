"""Shares of the stages in the global batch that follow the training, decided from what all ranks know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msdiff_dist.diffusion.config import AdaptiveSharesConfig
from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.distributed.placement import StageSets, plan_on
from msdiff_dist.errors import ConfigError
from msdiff_dist.training.batch_plans import BatchPlan, BatchPlans

DELAY = 4
"""Batches between the one after which shares are decided and the first that has them: those between may have been drawn
already."""


class AdaptiveBatches(BatchPlans):
    """Batches of which the shares change every `config.every` batches.

    All decisions come from sums of the steps' reductions in float64 and end in whole numbers of samples, so every rank,
    and every number of ranks, decides the same. The stages of every rank stay, only their numbers of samples change.

    Args:
        quotas: of the first batches.
        natural_K: probability of each stage in the distribution of times.
        stages_of_rank: the placement.
        cost_K: cost of one sample of each stage, in any unit.
        accumulation: micro batches per global batch.

    Raises:
        ConfigError: with `min_share` a stage may have too few samples for its ranks.
    """

    def __init__(
        self,
        config: AdaptiveSharesConfig,
        quotas: StageQuotas,
        natural_K: np.ndarray,
        stages_of_rank: StageSets,
        cost_K: Sequence[float],
        accumulation: int,
    ) -> None:
        self._config, self._first, self._natural_K = config, quotas, natural_K
        self._stages_of_rank, self._cost_K, self._accumulation = stages_of_rank, np.asarray(cost_K, float), accumulation
        self._drawn = np.flatnonzero(quotas.quotas_K)
        self._batch_size = int(quotas.quotas_K.sum())
        self._check_least()
        # (first batch, its plan), ascending; replaced as a whole, because a thread reads it.
        self._plans: tuple[tuple[int, BatchPlan], ...] = ((0, self._plan(quotas)),)
        self._begin()
        self._last_loss_K: np.ndarray | None = None  # mean losses of the interval before

    @property
    def wants_squares(self) -> bool:
        return self._config.by == "gradient_variance"

    @property
    def every(self) -> list[BatchPlan]:
        return [plan for _, plan in self._plans]

    def of(self, batch: int) -> BatchPlan:
        return next((plan for first, plan in reversed(self._plans) if first <= batch), self._plans[0][1])

    def observe(self, batch: int, loss_sum_K: Sequence[float], square_K: Sequence[float] | None) -> None:
        quotas = self.of(batch).quotas
        self._batches += 1
        self._samples_K += quotas.quotas_K
        self._loss_K += np.asarray(loss_sum_K)
        if square_K is not None:
            # The gradient of a decoder is its probability times the mean over its samples; where noise dominates, its
            # square is that of one sample's gradient over their number.
            p_K = np.where(quotas.probability_K > 0, quotas.probability_K, 1)
            self._square_K += np.asarray(square_K) * quotas.quotas_K / p_K**2
        if self._batches < self._config.every:
            return
        target_K = self._by_variance() if self.wants_squares else self._by_progress()
        if target_K is not None:
            self._change(batch + 1 + DELAY, target_K)
        self._begin()

    def fields(self, batch: int) -> dict[str, Any]:
        """What a checkpoint keeps before global batch `batch`, which is counted from there."""
        current = max(i for i, (first, _) in enumerate(self._plans) if first <= batch)
        return {
            "quotas": [[max(0, first - batch), p.quotas.quotas_K.tolist()] for first, p in self._plans[current:]],
            "batches": self._batches,
            "samples": self._samples_K.tolist(),
            "losses": self._loss_K.tolist(),
            "squares": self._square_K.tolist(),
            "last_losses": None if self._last_loss_K is None else self._last_loss_K.tolist(),
        }

    def restore(self, batch: int, fields: Mapping[str, Any]) -> None:
        """Go on from what `fields` returned, before global batch `batch`."""
        self._plans = tuple(
            (batch + first, self._plan(self._of(np.array(quotas)))) for first, quotas in fields["quotas"]
        )
        self._batches, self._samples_K = int(fields["batches"]), np.array(fields["samples"], np.int64)
        self._loss_K, self._square_K = (np.array(fields[name], float) for name in ("losses", "squares"))
        last = fields["last_losses"]
        self._last_loss_K = None if last is None else np.array(last, float)

    def _begin(self) -> None:
        K = len(self._cost_K)
        self._batches, self._samples_K = 0, np.zeros(K, np.int64)
        self._loss_K, self._square_K = np.zeros(K), np.zeros(K)

    def _by_variance(self) -> np.ndarray | None:
        """The shares with the least variance of the gradient for its compute.

        With probability p_k, deviation s_k of one sample's gradient and cost c_k of a sample they are in proportion to
        p_k s_k / sqrt(c_k), which is Neyman's allocation for samples of different costs.
        """
        weight_K = self._natural_K * np.sqrt(self._square_K / self._batches / self._cost_K)
        return _normalised(weight_K[self._drawn])

    def _by_progress(self) -> np.ndarray | None:
        """Shares in proportion to how much the loss of a stage, times its probability, fell for its compute."""
        mean_K = self._loss_K / np.maximum(self._samples_K, 1)
        before, self._last_loss_K = self._last_loss_K, mean_K
        if before is None:
            return None
        fall_K = np.maximum(before - mean_K, 0) * self._natural_K
        return _normalised((fall_K / np.maximum(self._samples_K * self._cost_K, 1e-300))[self._drawn])

    def _change(self, first: int, target: np.ndarray) -> None:
        rate, now_K = self._config.rate, self._plans[-1][1].quotas.quotas_K / self._batch_size
        wanted = (1 - rate) * now_K[self._drawn] + rate * target
        share_K = np.zeros_like(now_K)
        share_K[self._drawn] = bounded(wanted, self._config.min_share)
        rounded = self._first.of_shares(share_K)
        # The next shares follow from whole numbers, which rounding of sums does not reach.
        self._plans = (*self._plans[-1:], (first, self._plan(self._of(rounded.quotas_K))))

    def _of(self, quotas_K: np.ndarray) -> StageQuotas:
        if np.array_equal(quotas_K, self._first.quotas_K):
            return self._first
        return self._first.of_shares(quotas_K / self._batch_size)

    def _plan(self, quotas: StageQuotas) -> BatchPlan:
        micro = quotas.micro_quotas(self._accumulation)
        return BatchPlan(quotas, plan_on(self._stages_of_rank, micro, self._cost_K.tolist()))

    def _check_least(self) -> None:
        least, share = int(self._config.min_share * self._batch_size), self._config.min_share
        for k in self._drawn.tolist():
            needed = self._accumulation * max(1, sum(k in held for held in self._stages_of_rank))
            if least < needed:
                raise ConfigError(
                    "stages.adaptive.min_share", share,
                    f"may leave stage {k} {least} of {self._batch_size} samples, and its ranks and micro batches need "
                    f"{needed}",
                    f"Use at least {needed / self._batch_size:.4g}, a larger batch, or fewer ranks for the stage.",
                )  # fmt: skip


def bounded(share_K: np.ndarray, least: float) -> np.ndarray:
    """Shares of at least `least` that sum to one; what is above that keeps its proportions."""
    above_K = np.maximum(share_K - least, 0)
    values: np.ndarray = least + above_K / above_K.sum() * (1 - len(share_K) * least)
    return values


def _normalised(weight_K: np.ndarray) -> np.ndarray | None:
    """Weights that sum to one; None if all are zero."""
    total = weight_K.sum()
    return weight_K / total if total > 0 else None
