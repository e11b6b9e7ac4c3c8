"""What a recipe costs: the mean evaluation of its network, for several shares of the stages, and its whole training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from msdiff_dist.apps.train.guide import GuideCosts, guide_costs, guide_fields
from msdiff_dist.apps.train.phases import Phase, phases
from msdiff_dist.apps.train.plan import RunPlan, recipe_costs
from msdiff_dist.diffusion.clock import clock_of
from msdiff_dist.diffusion.sampling import sampler_times
from msdiff_dist.diffusion.timestep_sampler import StageQuotas, stage_probabilities
from msdiff_dist.errors import ConfigError
from msdiff_dist.models.flops import ModelCosts, PartCost
from msdiff_dist.recipe import Recipe
from msdiff_dist.training.guide import GuideConfig
from msdiff_dist.training.phases import TrainedStagesConfig

GIGA, PETA = 1e9, 1e15


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What some steps of a run cost, between two at which its stages change.

    Attributes:
        first, last, about: as `Phase` has them.
        interval_macs: multiply-adds of the mean evaluation, its trained stages by their lengths on the paper's clock.
        training_macs: multiply-adds of the mean training sample.
        step_macs: a third of the multiply-adds of the passes of the mean training sample.
    """

    first: int
    last: int
    about: str
    interval_macs: float
    training_macs: float
    step_macs: float

    @property
    def steps(self) -> int:
        """Number of its steps."""
        return self.last - self.first + 1

    def petaflops(self, batch_size: int | None) -> float | None:
        """1e15 floating-point operations of its steps without the guide; None if the batch size is not known."""
        return None if batch_size is None else training_petaflops(self.step_macs * batch_size * self.steps)

    def fields(self, batch_size: int | None) -> dict[str, Any]:
        """As plain data."""
        return {
            "first": self.first,
            "last": self.last,
            "about": self.about,
            "equivalent_gmacs": self.interval_macs / GIGA,
            "equivalent_gmacs_training": self.training_macs / GIGA,
            "petaflops": self.petaflops(batch_size),
        }


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """Counts of a recipe's network, and the share of each stage among its evaluations.

    Attributes:
        costs: parameters and multiply-adds of the encoder and of each decoder.
        interval_K: shares by the stages' lengths on the paper's clock.
        training_K: shares among the samples of training; 0 for stages whose samples would train nothing.
        sampling_K: shares among the network calls of the recipe's preview sampler.
        evaluations: number of these calls for one image.
        unified_macs: multiply-adds of one evaluation of the same network with one decoder as wide as the encoder; None
            if there is no such network.
        steps: optimizer steps of the training.
        batch_size: samples per step; None if it depends on the number of ranks.
        phases: the costs of the training, which are others where its stages change; all else is that of the recipe's
            stages, of which none has ended by `stages.end`.
        guide: what the guide costs besides; None without one.
    """

    costs: ModelCosts
    interval_K: tuple[float, ...]
    training_K: tuple[float, ...]
    sampling_K: tuple[float, ...]
    evaluations: int
    unified_macs: int | None
    steps: int
    batch_size: int | None
    phases: tuple[PhaseCost, ...]
    guide: GuideCosts | None = None

    def gmacs(self, shares: Sequence[float]) -> float:
        """1e9 multiply-adds of the mean evaluation, if the stages have these shares."""
        return self.costs.equivalent_macs(shares) / GIGA

    def of_unified(self, shares: Sequence[float]) -> float | None:
        """`gmacs` relative to the unified model whose width is the encoder's; None if there is no such network."""
        return None if self.unified_macs is None else self.gmacs(shares) * GIGA / self.unified_macs

    @property
    def petaflops(self) -> float | None:
        """1e15 floating-point operations of the whole training; None if the batch size is not known."""
        if self.batch_size is None:
            return None
        of_model = training_petaflops(sum(phase.step_macs * phase.steps for phase in self.phases) * self.batch_size)
        return of_model + guide_petaflops(self.guide, self.batch_size, self.steps)

    @property
    def paper_petaflops(self) -> float:
        """The paper's measure of a training (Table 2): steps x GMACs by interval length, whatever the batch."""
        return sum(phase.interval_macs * phase.steps for phase in self.phases) / PETA

    def fields(self) -> dict[str, Any]:
        """The report as plain data, as `msdiff flops --json` prints it."""
        return {
            "total_params": self.costs.total_params,
            "trained_params": self.costs.trained_params,
            "encoder": _part_fields(self.costs.encoder),
            "decoders": [_part_fields(d) for d in self.costs.decoders],
            "equivalent_gmacs": self.gmacs(self.interval_K),
            "equivalent_gmacs_training": self.gmacs(self.training_K),
            "equivalent_gmacs_sampling": self.gmacs(self.sampling_K),
            "unified_gmacs": None if self.unified_macs is None else self.unified_macs / GIGA,
            "of_unified": {
                "interval": self.of_unified(self.interval_K),
                "training": self.of_unified(self.training_K),
                "sampling": self.of_unified(self.sampling_K),
            },
            "shares": {"interval": self.interval_K, "training": self.training_K, "sampling": self.sampling_K},
            "sampling_evaluations": self.evaluations,
            "training_petaflops": self.petaflops,
            "paper_petaflops": self.paper_petaflops,
            "guide": None if self.guide is None else guide_fields(self.guide),
            "phases": [phase.fields(self.batch_size) for phase in self.phases] if len(self.phases) > 1 else [],
        }


def cost_report(recipe: Recipe) -> CostReport:
    """Count the recipe's network and its evaluations. No weights are allocated.

    Raises:
        ConfigError: the preview sampler does not fit the process.
    """
    process, partition = recipe.process(), recipe.partition()
    K = partition.num_stages
    stages = [stage for _, stage in sampler_times(process, partition, recipe.preview.sampler)]
    return CostReport(
        costs=recipe_costs(recipe),
        interval_K=_interval_shares(recipe),
        training_K=_training_shares(recipe),
        sampling_K=tuple(stages.count(k) / len(stages) for k in range(K)),
        evaluations=len(stages),
        unified_macs=_unified_macs(recipe),
        steps=recipe.train.steps,
        batch_size=recipe.train.batch_size(1)
        if recipe.train.micro_batch_size is None
        else recipe.train.global_batch_size,
        phases=tuple(_phase_cost(phase) for phase in phases(recipe)),
        guide=guide_costs(recipe),
    )


def _phase_cost(phase: Phase) -> PhaseCost:
    recipe, counted = phase.recipe, recipe_costs(phase.recipe)
    training_K, interval_K = _training_shares(recipe), np.array(_interval_shares(recipe))
    interval_K[list(recipe.stages.ended)] = 0
    return PhaseCost(
        first=phase.first,
        last=phase.last,
        about=phase.about,
        interval_macs=counted.equivalent_macs((interval_K / interval_K.sum()).tolist()),
        training_macs=counted.equivalent_macs(training_K),
        step_macs=float(np.dot(training_K, counted.step_macs_K)),
    )


def _part_fields(part: PartCost) -> dict[str, Any]:
    return {"params": part.params, "trained_params": part.trained, "gmacs": part.macs / GIGA}


def _interval_shares(recipe: Recipe) -> tuple[float, ...]:
    edges = [0.0, *clock_of(recipe.process(), recipe.partition().boundaries).tolist(), 1.0]
    return tuple(np.diff(edges).tolist())


def _training_shares(recipe: Recipe) -> tuple[float, ...]:
    shares = stage_probabilities(recipe.times(), recipe.partition(), recipe.stages.sampling)
    drawn = np.isin(np.arange(len(shares)), recipe.freezing().stages)
    return tuple((np.where(drawn, shares, 0) / shares[drawn].sum()).tolist())


def step_petaflops(quotas: StageQuotas, cost_K: Sequence[int]) -> float:
    """1e15 floating-point operations of one optimizer step, forward and backward.

    Args:
        quotas: how many samples of each stage a batch has.
        cost_K: cost of one sample of each stage, as `RunPlan` has it.
    """
    return samples_petaflops(quotas.quotas_K.tolist(), cost_K)


def samples_petaflops(samples_K: Sequence[int], cost_K: Sequence[int]) -> float:
    """1e15 floating-point operations of training on so many samples of each stage, with costs as `RunPlan` has them."""
    return training_petaflops(float(sum(n * cost for n, cost in zip(samples_K, cost_K, strict=True))))


def guide_petaflops(guide: GuideCosts | None, batch_size: int, steps: int) -> float:
    """1e15 floating-point operations of the guide, if there is one, in the first `steps` steps."""
    return 0.0 if guide is None else training_petaflops(guide.step_macs * batch_size * min(steps, guide.last_step))


def steps_within(planned: Sequence[tuple[Phase, RunPlan]], guide: GuideConfig | None, budget: float) -> float:
    """Steps that take `budget` 1e15 floating-point operations, the guide's among them, of a run that ends there.

    Args:
        planned: the phases of a run of any length; the last of them goes on as long as the budget does.
    """
    plan = planned[0][1]
    of_guide = guide_petaflops(plan.guide, plan.batch_size, 1)
    stop = 1.0 if guide is None or guide.stop_at is None else guide.stop_at
    step, left = 0.0, budget
    for i, (phase, plan) in enumerate(planned):
        end, of_model = phase.last if i + 1 < len(planned) else math.inf, step_petaflops(plan.quotas, plan.cost_K)
        # Of a guide that stops after a fraction of the run, every step has that fraction.
        parts = [(end, stop * of_guide)] if stop <= 1 else [(min(end, stop), of_guide), (end, 0.0)]
        for last, beside in parts:
            steps = max(0.0, min(last - step, left / (of_model + beside)))
            step, left = step + steps, left - steps * (of_model + beside)
    return step


def petaflops_after(planned: Sequence[tuple[Phase, RunPlan]], step: int) -> float:
    """1e15 floating-point operations of the first `step` steps of a run, each counted in its phase."""
    _, plan = planned[0]
    return model_petaflops_after(planned, step) + guide_petaflops(plan.guide, plan.batch_size, step)


def model_petaflops_after(planned: Sequence[tuple[Phase, RunPlan]], step: int) -> float:
    """`petaflops_after` without the guide."""
    total = 0.0
    for phase, plan in planned:
        steps = min(step, phase.last) - phase.first + 1
        total += max(0, steps) * step_petaflops(plan.quotas, plan.cost_K)
    return total


def training_petaflops(step_macs: float) -> float:
    """1e15 floating-point operations of training, given a third of the multiply-adds of its passes.

    A multiply-add is two operations: 6 operations in all.
    """
    return 6 * step_macs / PETA


def _unified_macs(recipe: Recipe) -> int | None:
    model = recipe.model
    if not isinstance(model.encoder_channels, int):
        return None
    try:
        train = dataclasses.replace(recipe.train, freeze=())
        unified = dataclasses.replace(
            recipe, model=model.unified(), stages=TrainedStagesConfig(), train=train, grow=None
        )
    except ConfigError:  # GroupNorms that fit the decoders' widths but not this one
        return None
    costs = recipe_costs(unified)
    return costs.encoder.macs + costs.decoders[0].macs
