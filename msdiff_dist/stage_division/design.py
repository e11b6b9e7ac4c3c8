"""Chooses stages, widths and shares of samples for a compute budget, given how each noise interval's loss falls.

A stage is an interval of bins with a decoder of some width, trained on n samples. Its predicted loss is a sum over its
bins, its cost n times the cost of a sample. For a price of compute, the best n of each possible stage and the best
sequence of stages follow exactly, by dynamic programming; the price is then chosen so that the budget is spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msdiff_dist.stage_division.loss_laws import LossLaws

Floats = NDArray[np.float64]
Structure = tuple[tuple[int, int, int], ...]
"""Of each stage its first bin, the bin after its last, and the number of its decoder among the choices."""

LEAST_SHARE = 0.05
"""Least share of the samples that a stage is given: with less, its decoder would learn from a few samples a step."""
_SAMPLES, _PRICES = 120, 80  # points of the searches over numbers of samples and prices of compute


@dataclass(frozen=True, kw_only=True)
class DecoderChoice:
    """A decoder that a stage may have: `width` and `depth` relative to the recipe's; `macs`: cost of one sample in
    training, encoder and decoder, as a third of the multiply-adds of its passes."""

    channels: int
    width: float
    depth: float
    macs: float


@dataclass(frozen=True, kw_only=True)
class DesignedStage:
    """The bins [first, last) of a stage, its decoder and its share of the samples."""

    first: int
    last: int
    decoder: DecoderChoice
    share: float


@dataclass(frozen=True, kw_only=True)
class StageDesign:
    """Stages from the data on, with the mean loss that the laws predict for the budget."""

    stages: tuple[DesignedStage, ...]
    predicted_loss: float
    samples: float


def design_stages(laws: LossLaws, choices: Sequence[DecoderChoice], budget_macs: float, num_stages: int) -> StageDesign:
    """The best division into `num_stages`, with all decoders from `choices`.

    Args:
        budget_macs: a third of the multiply-adds of the whole training.
    """
    B = len(laws.floor_B)
    grid = np.geomspace(budget_macs / 1e4, budget_macs, _SAMPLES) / min(c.macs for c in choices)
    intervals = [(first, last) for first in range(B) for last in range(first + 1, B + 1)]
    # Of every interval and decoder the loss after grid[g] samples, and what those samples cost.
    loss_SCG = np.array([[_stage_loss(laws, choice, *interval, grid) for choice in choices] for interval in intervals])
    macs_CG = np.array([choice.macs for choice in choices])[:, None] * grid
    found: dict[Structure, StageDesign] = {}
    reference = budget_macs / float(np.mean([c.macs for c in choices]))
    unit = (laws.loss(slice(0, B), width=1.0, depth=1.0, samples=np.array(reference / B), length=1.0)).mean()
    for price in np.geomspace(1e-6, 1e2, _PRICES) * unit / budget_macs:
        cost_SC = (loss_SCG + price * macs_CG).min(-1)
        structure = _cheapest(intervals, cost_SC, B, num_stages)
        if structure not in found:
            found[structure] = _spend(laws, choices, structure, budget_macs)
    return min(found.values(), key=lambda d: d.predicted_loss)


def predicted_loss(laws: LossLaws, stages: Sequence[DesignedStage], budget_macs: float) -> float:
    """Mean loss over all bins, if these stages with their shares are trained for this budget."""
    samples = budget_macs / sum(s.share * s.decoder.macs for s in stages)
    total = sum(float(_stage_loss(laws, s.decoder, s.first, s.last, np.array([samples * s.share]))[0]) for s in stages)
    return total / len(laws.floor_B)


def _stage_loss(laws: LossLaws, decoder: DecoderChoice, first: int, last: int, samples_G: Floats) -> Floats:
    """Sum of the losses of the bins of a stage, after these numbers of samples in the stage, [G]."""
    bins, length = slice(first, last), (last - first) / len(laws.floor_B)
    in_bin = samples_G / (last - first)
    summed: Floats = laws.loss(bins, width=decoder.width, depth=decoder.depth, samples=in_bin, length=length).sum(-1)
    return summed


def _cheapest(intervals: Sequence[tuple[int, int]], cost_SC: Floats, B: int, num_stages: int) -> Structure:
    """The stages of least cost, by dynamic programming over the last boundary.

    Args:
        cost_SC: loss and priced compute of each interval with each decoder.
    """
    single = {
        interval: (float(cost_C.min()), int(cost_C.argmin()))
        for interval, cost_C in zip(intervals, cost_SC, strict=True)
    }
    best: dict[tuple[int, int], tuple[float, Structure]] = {(0, 0): (0.0, ())}  # by number of stages and their end
    for count in range(1, num_stages + 1):
        for last in range(count, B - (num_stages - count) + 1):
            best[count, last] = min(
                (best[count - 1, first][0] + cost, (*best[count - 1, first][1], (first, last, choice)))
                for first in range(count - 1, last)
                if (count - 1, first) in best
                for cost, choice in [single[first, last]]
            )
    return best[num_stages, B][1]


def _spend(laws: LossLaws, choices: Sequence[DecoderChoice], structure: Structure, budget_macs: float) -> StageDesign:
    """The shares of samples with which these stages do best for the budget."""

    def stages_for(share_K: Floats) -> tuple[DesignedStage, ...]:
        return tuple(
            DesignedStage(first=f, last=last, decoder=choices[c], share=float(share))
            for (f, last, c), share in zip(structure, share_K, strict=True)
        )

    # One share at a time, by factors that fall towards 1: stages are few, and every trial is a division of the whole.
    share_K = np.array([last - f for f, last, _ in structure], dtype=float)
    share_K /= share_K.sum()
    value = predicted_loss(laws, stages_for(share_K), budget_macs)
    step = 2.0
    while step > 1.005:
        improved = False
        for k in range(len(structure)):
            for factor in (step, 1 / step):
                trial = share_K.copy()
                trial[k] *= factor
                trial = _floored(trial / trial.sum())
                trial_value = predicted_loss(laws, stages_for(trial), budget_macs)
                if trial_value < value - 1e-12:
                    share_K, value, improved = trial, trial_value, True
        if not improved:
            step = step**0.5
    stages = stages_for(share_K)
    samples = budget_macs / sum(s.share * s.decoder.macs for s in stages)
    return StageDesign(stages=stages, predicted_loss=value, samples=samples)


def _floored(share_K: Floats) -> Floats:
    """Shares of which none is below `LEAST_SHARE`, or 1 / K where that is less."""
    least = min(LEAST_SHARE, 1 / len(share_K))
    low = share_K < least
    if not low.any():
        return share_K
    rest = share_K[~low].sum()
    floored: Floats = np.where(low, least, share_K * (1 - least * low.sum()) / rest)
    return floored
