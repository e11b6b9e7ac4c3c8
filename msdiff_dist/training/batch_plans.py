"""What each global batch holds of each stage, and which ranks compute it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msdiff_dist.diffusion.timestep_sampler import StageQuotas
from msdiff_dist.distributed.placement import Placement
from msdiff_dist.randomness import stage_uniform


@dataclass(frozen=True)
class BatchPlan:
    """One global batch.

    Attributes:
        quotas: how many samples of each stage it has, and their importance weights.
        placement: how many samples of each stage each rank computes.
    """

    quotas: StageQuotas
    placement: Placement


class BatchPlans(ABC):
    """The plan of every global batch, the same on every rank."""

    changes = True
    """Whether batches differ in their numbers of samples."""

    @property
    def wants_squares(self) -> bool:
        """Whether `observe` needs the squared norms of the decoders' gradients."""
        return False

    def observe(self, batch: int, loss_sum_K: Sequence[float], square_K: Sequence[float] | None) -> None:
        """Take in what all ranks know after a batch: by stage, the sum of its losses and the squared norm of the
        gradient of its decoder."""
        return

    def fields(self, batch: int) -> dict[str, Any]:
        """What a checkpoint keeps before global batch `batch`."""
        return {}

    def restore(self, batch: int, fields: Mapping[str, Any]) -> None:
        """Go on from what `fields` returned, before global batch `batch`."""
        return

    @property
    @abstractmethod
    def every(self) -> list[BatchPlan]:
        """The different plans that batches may have."""

    @abstractmethod
    def of(self, batch: int) -> BatchPlan:
        """The plan of a global batch, by its number from 0. Any thread may ask."""


class EqualBatches(BatchPlans):
    """All batches hold the same numbers of samples."""

    changes = False

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan

    @property
    def every(self) -> list[BatchPlan]:
        return [self._plan]

    def of(self, batch: int) -> BatchPlan:
        return self._plan


class OneStageBatches(BatchPlans):
    """Every batch belongs to one stage, drawn with the stages' shares.

    Args:
        seed: the run's seed.
        share_K: probability of each stage.
        plans: of a batch of each stage that has a share.
    """

    def __init__(self, seed: int, share_K: np.ndarray, plans: Mapping[int, BatchPlan]) -> None:
        self._seed, self.share_K, self.plans = seed, share_K, dict(plans)
        self._stages = sorted(plans)
        self._ends = share_K[self._stages].cumsum()

    @property
    def every(self) -> list[BatchPlan]:
        return list(self.plans.values())

    @property
    def likeliest(self) -> BatchPlan:
        """Of the stage with the largest share."""
        return self.plans[max(self._stages, key=self.share_K.__getitem__)]

    def balance(self, cost_K: Sequence[float]) -> float:
        """Mean over maximum of the ranks' work in a batch, both expected."""
        work_KW = {k: plan.placement.samples_WK @ np.asarray(cost_K, float) for k, plan in self.plans.items()}
        mean, most = (sum(self.share_K[k] * of(work) for k, work in work_KW.items()) for of in (np.mean, np.max))
        return float(mean / most)

    def of(self, batch: int) -> BatchPlan:
        # The sum of the shares may be one only up to rounding.
        at = np.searchsorted(self._ends, stage_uniform(self._seed, batch) * self._ends[-1], side="right")
        return self.plans[self._stages[min(int(at), len(self._stages) - 1)]]
