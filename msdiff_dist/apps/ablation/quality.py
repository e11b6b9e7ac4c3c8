"""How much compute a variant takes to the quality that the baseline has, with an interval over seeds.

A curve is the mean over seeds of the scores at some points of compute. Between two points it is a straight line in the
logarithm of compute. It reaches a score where it first falls to it. A level is a score of the baseline's curve, and the
ratio that is reported is the compute at which the variant's curve reaches it, over that at which the baseline's does.

The interval is an expanded percentile interval of a bootstrap: seeds are drawn with replacement, and both curves, the
level and the ratio are computed anew. Variant and baseline are drawn together, seed by seed, because runs of one seed
see the same samples in the same order. Percentile intervals of few seeds are too narrow, since a bootstrap's spread is
sqrt((n - 1) / n) of what it estimates and it takes the normal distribution for Student's. The expanded one takes
quantiles farther out, so that for a mean it is as wide as Student's interval (Hesterberg 2015, 1411.5279, section 5.3).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from msdiff_dist.apps.ablation.config import Level
from msdiff_dist.evaluation.scores import bootstrap_draw

RESAMPLES = 2000  # of more than _ALL_OF seeds
_ALL_OF = 7  # of so few seeds all resamples are taken: 7 ** 7 with 1,716 different ones
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The scores of one variant at its P points, for those S seeds that have all of them; lower is better."""

    seeds: tuple[int, ...]
    petaflops_SP: Floats
    score_SP: Floats

    def of(self, seeds: Sequence[int]) -> Curves:
        """The curves of these seeds, in this order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Curves(seeds=tuple(seeds), petaflops_SP=self.petaflops_SP[rows], score_SP=self.score_SP[rows])

    def mean(self, rows_S: Sequence[int] | NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Compute and score of the mean curve over these rows, each [P]."""
        return self.petaflops_SP[rows_S].mean(axis=0), self.score_SP[rows_S].mean(axis=0)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a variant takes to a level.

    Attributes:
        level: as the ablation file has it. score: that of the baseline's mean curve there; lower is better.
        baseline_petaflops, petaflops: compute at which the mean curves reach it; None where that is not known.
        ratio: of the two; None if it is not known, but above `above` (the variant does not reach the level) or below
            `below` (it is there at its first point already).
        low, high: ends of the 95 % interval; None where it is open. Both are None if there are no `resamples`.
        not_reached: share of the resamples in which the variant does not reach the level.
        seeds: those compared.
    """

    level: Level
    score: float
    baseline_petaflops: float | None
    petaflops: float | None
    ratio: float | None
    above: float | None
    below: float | None
    low: float | None
    high: float | None
    resamples: int
    not_reached: float
    seeds: tuple[int, ...]


def compare(baseline: Curves, variant: Curves, levels: Sequence[Level]) -> list[Reached]:
    """What a variant takes to each level of the baseline, over the seeds that both have; empty if there are none."""
    seeds = [seed for seed in baseline.seeds if seed in variant.seeds]
    if not seeds:
        return []
    a, b, count = baseline.of(seeds), variant.of(seeds), len(seeds)
    drawn_RS, times_R = _resamples(count)
    tail = expanded_tail(count) if count > 1 else 0.0
    found = []
    for level in levels:
        score, own, other = _crossings(a, b, list(range(count)), level)
        low, high = _ratio(own, other)
        drawn = [_crossings(a, b, rows_S, level)[1:] for rows_S in drawn_RS]
        ends_R2 = np.array([_ratio(*bounds) for bounds in drawn]).reshape(-1, 2)
        missed_R = np.array([bounds[1] == np.inf for _, bounds in drawn], bool)
        exact = low == high
        found.append(
            Reached(
                level=level,
                score=score,
                baseline_petaflops=_known(own),
                petaflops=_known(other),
                ratio=low if exact else None,
                above=low if not exact and high == np.inf and low > 0 else None,
                below=high if not exact and high < np.inf else None,
                low=_quantile(ends_R2[:, 0], times_R, tail),
                high=_quantile(ends_R2[:, 1], times_R, 1 - tail),
                resamples=int(times_R.sum()),
                not_reached=float(missed_R @ times_R / times_R.sum()) if len(missed_R) else float(other[1] == np.inf),
                seeds=tuple(seeds),
            )
        )
    return found


def level_score(level: Level, petaflops_P: Floats, score_P: Floats) -> float:
    """The score that a curve has after a fraction of its compute, or its best one."""
    if isinstance(level, str):
        return float(score_P.min())
    return float(np.interp(np.log(level * petaflops_P[-1]), np.log(petaflops_P), score_P))


def compute_to_reach(score: float, petaflops_P: Floats, score_P: Floats) -> tuple[float, float]:
    """Least and most compute at which a curve may first fall to `score`.

    The two are equal where it does so between its points. Below the first point nothing is known, so a curve that
    begins there has (0, its first compute). One that never falls so low has (its last compute, infinity).
    """
    for i, (at, now) in enumerate(zip(petaflops_P.tolist(), score_P.tolist(), strict=True)):
        if now > score:
            continue
        if i == 0:
            return (at, at) if now == score else (0.0, at)
        before, worse = float(petaflops_P[i - 1]), float(score_P[i - 1])
        share = (worse - score) / (worse - now)
        found = before * (at / before) ** share
        return found, found
    return float(petaflops_P[-1]), float("inf")


Bounds = tuple[float, float]


def _crossings(
    a: Curves, b: Curves, rows_S: Sequence[int] | NDArray[np.int64], level: Level
) -> tuple[float, Bounds, Bounds]:
    """A level of the mean curve of `a` over these seeds, and where that and the mean curve of `b` reach it."""
    own = a.mean(rows_S)
    score = level_score(level, *own)
    reached = compute_to_reach(score, *own)
    if reached[1] == np.inf:  # interpolated to the last point's score up to rounding
        reached = (float(own[0][-1]), float(own[0][-1]))
    return score, reached, compute_to_reach(score, *b.mean(rows_S))


def _ratio(own: Bounds, other: Bounds) -> Bounds:
    return other[0] / own[1], other[1] / own[0] if own[0] > 0 else np.inf


def _known(bounds: Bounds) -> float | None:
    return bounds[0] if bounds[0] == bounds[1] else None


def expanded_tail(count: int) -> float:
    """The share of resamples outside each end of a 95 % interval of `count` seeds, at least two."""
    return float(norm.cdf(math.sqrt(count / (count - 1)) * t.ppf(0.025, count - 1)))


def _resamples(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Different resamples of the seeds' rows [R, count], and how many times each is drawn [R]; none of one seed.

    The order in a resample does not matter. Of few seeds these are all there are, so that ends of intervals, which lie
    far out, do not depend on chance.
    """
    if count == 1:
        return np.empty((0, 1), np.int64), np.empty(0, np.int64)
    if count <= _ALL_OF:
        drawn = list(combinations_with_replacement(range(count), count))
        times = [
            math.factorial(count) // math.prod(math.factorial(n) for n in Counter(rows).values()) for rows in drawn
        ]
        return np.array(drawn, np.int64), np.array(times, np.int64)
    drawn_RS = np.sort([bootstrap_draw(0, draw, count, count) for draw in range(RESAMPLES)], axis=-1)
    return np.unique(drawn_RS, axis=0, return_counts=True)


def _quantile(values_R: Floats, times_R: NDArray[np.int64], share: float) -> float | None:
    """A value that was drawn, not one between two; None where it is 0 or infinite, so that the interval is open."""
    if not len(values_R):
        return None
    value = float(np.quantile(values_R, share, weights=times_R, method="inverted_cdf"))
    return value if 0 < value < np.inf else None
