"""Clusters a grid of times into consecutive intervals of least total cost, exactly, by dynamic programming.

The methods differ only in the cost of an interval. The costs of all O(G^2) intervals come from cumulative sums, without
a loop over the points of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from msdiff_dist.diffusion.clock import clock_grid
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Least and greatest length of a stage, as fractions of the clock.

    2306.00354 and the search of the paper's scripts give a stage 1 / (2 K) to 3 / (2 K) of the grid points, rounded
    outwards: that is min=1 / (2 * K), max=3 / (2 * K) here. (The scripts do not limit the first stage above.)
    """

    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min < 1:
            raise ConfigError("--min-length", self.min, "must lie in [0, 1)", "Give a fraction of the clock.")
        if not self.min <= self.max <= 1 or self.max == 0:
            problem = f"must lie between --min-length = {self.min:g} and 1"
            raise ConfigError("--max-length", self.max, problem, "Give a fraction of the clock.")

    @property
    def limited(self) -> bool:
        """Whether they exclude any division."""
        return (self.min, self.max) != (0, 1)

    def allowed(self, cost_GG: np.ndarray, stages: int) -> np.ndarray:
        """Costs as `best_intervals` takes them, infinite for intervals of other lengths.

        Raises:
            ConfigError: no division into so many stages has these lengths.
        """
        G = len(cost_GG)
        # The small term keeps 3 / (2 * 3) of 100 points at 50 where the product rounds to just above.
        least, most = max(1, math.floor(self.min * G + 1e-9)), math.ceil(self.max * G - 1e-9)
        if stages * least > G:
            problem = f"{stages} stages of this length are longer than the whole"
            raise ConfigError("--min-length", self.min, problem, f"Use at most {1 / stages:.4f}.")
        if stages * most < G:
            problem = f"{stages} stages of this length are shorter than the whole"
            raise ConfigError("--max-length", self.max, problem, f"Use at least {1 / stages:.4f}.")
        length_GG = np.arange(G)[None, :] - np.arange(G)[:, None] + 1
        return np.where((length_GG >= least) & (length_GG <= most), cost_GG, np.inf)


ANY_LENGTH = Lengths()
"""Stages of whatever length."""


def timestep_boundaries(process: Process, stages: int, lengths: Lengths = ANY_LENGTH) -> list[float]:
    """Boundaries [stages - 1] of stages of equal length on the clock.

    An interval costs sum |t_centre - t| over its grid points (2306.00354, timestep clustering).
    """
    grid = clock_grid(process)
    boundaries: list[float] = grid[best_intervals(centred_costs(np.arange(len(grid))), stages, lengths)].tolist()
    return boundaries


def snr_boundaries(process: Process, stages: int, lengths: Lengths = ANY_LENGTH) -> list[float]:
    """Boundaries [stages - 1] of stages of similar signal-to-noise ratio.

    An interval costs sum |log SNR(t_centre) - log SNR(t)| over its grid points (2306.00354, SNR clustering).
    """
    grid = clock_grid(process)
    log_snr = -2 * np.log(process.sigma_of(grid))
    boundaries: list[float] = grid[best_intervals(centred_costs(log_snr), stages, lengths)].tolist()
    return boundaries


def affinity_boundaries(
    grid_G: np.ndarray, affinity_GG: np.ndarray, stages: int, lengths: Lengths = ANY_LENGTH
) -> list[float]:
    """Boundaries [stages - 1], among the times `grid_G`, of stages of similar gradients.

    An interval costs minus the sum of its grid points' affinities to its centre (2306.00354, gradient clustering).
    """
    G = len(affinity_GG)
    sums = np.concatenate([np.zeros((G, 1)), np.cumsum(affinity_GG, axis=1)], axis=1)
    i, j, centre = _intervals(G)
    cost = np.where(j > i, sums[centre, i] - sums[centre, j], np.inf)
    boundaries: list[float] = grid_G[best_intervals(cost, stages, lengths)].tolist()
    return boundaries


def similarity_intervals(similarity_GG: np.ndarray, stages: int, lengths: Lengths = ANY_LENGTH) -> np.ndarray:
    """First grid points, int64, of stages 1 to K - 1: the cut with the greatest mean similarity inside stages.

    The mean is over grid points, of each one's mean similarity to its own stage. So long stages count for more.
    Otherwise stages of a single grid point would be the best, since it is perfectly similar to itself.
    """
    G = len(similarity_GG)
    # sums[i, j] is the sum over the first i rows and j columns, so four of them give the sum of any square block.
    sums = np.zeros((G + 1, G + 1))
    sums[1:, 1:] = similarity_GG.cumsum(0).cumsum(1)
    i, j, _ = _intervals(G)
    block = sums[j, j] - sums[i, j] - sums[j, i] + sums[i, i]
    return best_intervals(np.where(j > i, -block / np.maximum(j - i, 1), np.inf), stages, lengths)


def centred_costs(feature_G: np.ndarray) -> np.ndarray:
    """Cost [G, G] of all intervals, as `best_intervals` takes it: sum |f(centre) - f(t)| of a monotone feature f."""
    G = len(feature_G)
    sums = np.concatenate([[0.0], np.cumsum(feature_G)])
    i, j, centre = _intervals(G)
    # f is monotone, so all differences on one side of the centre have the same sign: the sum of their absolute values
    # is the absolute value of their sum.
    middle = feature_G[centre]
    before = np.abs(sums[centre] - sums[i] - (centre - i) * middle)
    after = np.abs(sums[j] - sums[centre] - (j - centre) * middle)
    return np.where(j > i, before + after, np.inf)


def best_intervals(cost_GG: np.ndarray, stages: int, lengths: Lengths = ANY_LENGTH) -> np.ndarray:
    """Cut the grid into `stages` intervals of least total cost.

    Args:
        cost_GG: at [i, e] the cost of the interval from grid point i to e, both included; infinite where e < i.
        lengths: those that intervals may have.

    Returns:
        First grid points of stages 1 to K - 1, int64.

    Raises:
        ConfigError: the grid has fewer points than stages, or there are no intervals of these lengths.
    """
    G = len(cost_GG)
    if not 1 <= stages <= G:
        raise ConfigError("--stages", stages, f"a grid of {G} times has 1 to {G} stages", "Ask for fewer stages.")
    cost_GG = lengths.allowed(cost_GG, stages)
    # best_G[e] is the least cost of the first k stages where the k-th ends at e. One more stage, from i to e, makes it
    # best_G[i - 1] + cost_GG[i, e]; `firsts` holds the best i for each e.
    best_G, firsts = cost_GG[0], []
    for _ in range(stages - 1):
        total = best_G[:-1, None] + cost_GG[1:]
        firsts.append(total.argmin(0) + 1)
        best_G = total.min(0)
    # Walk back from the last grid point, stage after stage.
    cuts, end = [], G - 1
    for first_G in reversed(firsts):
        cuts.append(first_G[end])
        end = cuts[-1] - 1
    return np.array(cuts[::-1], np.int64)


def _intervals(G: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First point i [G, 1], end j [1, G] (one past the last point) and centre [G, G] of all intervals."""
    i, j = np.arange(G)[:, None], np.arange(1, G + 1)[None, :]
    return i, j, np.clip(i + (j - i) // 2, 0, G - 1)
