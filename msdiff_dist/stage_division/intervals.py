"""Clusters a grid of times into consecutive intervals of least total cost, exactly, by dynamic programming.

The methods differ only in the cost of an interval. The costs of all O(G^2) intervals come from cumulative sums, without
a loop over the points of each.
"""

from __future__ import annotations

import numpy as np

from msdiff_dist.diffusion.clock import clock_grid
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError


def timestep_boundaries(process: Process, stages: int) -> list[float]:
    """Boundaries [stages - 1] of stages of equal length on the clock.

    An interval costs sum |t_centre - t| over its grid points (2306.00354, timestep clustering).
    """
    grid = clock_grid(process)
    boundaries: list[float] = grid[best_intervals(centred_costs(np.arange(len(grid))), stages)].tolist()
    return boundaries


def snr_boundaries(process: Process, stages: int) -> list[float]:
    """Boundaries [stages - 1] of stages of similar signal-to-noise ratio.

    An interval costs sum |log SNR(t_centre) - log SNR(t)| over its grid points (2306.00354, SNR clustering).
    """
    grid = clock_grid(process)
    log_snr = -2 * np.log(process.sigma_of(grid))
    boundaries: list[float] = grid[best_intervals(centred_costs(log_snr), stages)].tolist()
    return boundaries


def affinity_boundaries(grid_G: np.ndarray, affinity_GG: np.ndarray, stages: int) -> list[float]:
    """Boundaries [stages - 1], among the times `grid_G`, of stages of similar gradients.

    An interval costs minus the sum of its grid points' affinities to its centre (2306.00354, gradient clustering).
    """
    G = len(affinity_GG)
    sums = np.concatenate([np.zeros((G, 1)), np.cumsum(affinity_GG, axis=1)], axis=1)
    i, j, centre = _intervals(G)
    cost = np.where(j > i, sums[centre, i] - sums[centre, j], np.inf)
    boundaries: list[float] = grid_G[best_intervals(cost, stages)].tolist()
    return boundaries


def similarity_intervals(similarity_GG: np.ndarray, stages: int) -> np.ndarray:
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
    return best_intervals(np.where(j > i, -block / np.maximum(j - i, 1), np.inf), stages)


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


def best_intervals(cost_GG: np.ndarray, stages: int) -> np.ndarray:
    """Cut the grid into `stages` intervals of least total cost.

    Args:
        cost_GG: at [i, e] the cost of the interval from grid point i to e, both included; infinite where e < i.

    Returns:
        First grid points of stages 1 to K - 1, int64.

    Raises:
        ConfigError: the grid has fewer points than stages.
    """
    G = len(cost_GG)
    if not 1 <= stages <= G:
        raise ConfigError("--stages", stages, f"a grid of {G} times has 1 to {G} stages", "Ask for fewer stages.")
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
