"""The optimal denoiser of a finite data set, and the stages that its similarity across time suggests.

Algorithm 1 and the equations are those of 2312.09181. The data is passed over in blocks, twice whatever the number of
draws: once for the mean and the drawn samples, once for the posterior means of all noisy samples, by matrix products.
With torch.distributed initialised each rank may hold a share of the data, and sums are reduced over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.clock import clock_times
from msdiff_dist.diffusion.process import Process
from msdiff_dist.distributed.agree import maximum, summed
from msdiff_dist.errors import ConfigError, DataError
from msdiff_dist.randomness import generator
from msdiff_dist.stage_division.intervals import ANY_LENGTH, Lengths, similarity_intervals

Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Each call is one pass over the data. It yields (index of the block's first sample, block [b, d] in float64)."""

LastLimit = Literal["at-1", "at-t"]
"""Where the denoiser's limit at t = 1 is taken, see `limit_similarities`."""

_NEGLIGIBLE = 60.0  # weights below exp(-60) of the largest are lost in the rounding of float64
_ROUNDING_BOUND = 1e-5  # bound on float32's error of eps*; measured errors are about twenty times smaller
_FEWEST = 10  # samples of a data set


@dataclass(frozen=True)
class Draws:
    """M clean samples [M, d] of the data, the noise [M, d] of each, and the mean [d] of the data, all float64."""

    sample_Md: Tensor
    noise_Md: Tensor
    mean_d: Tensor


@dataclass(frozen=True)
class LimitSimilarities:
    """Similarities of M draws (Algorithm 1) to the limits of time, ascending by clock time.

    Attributes:
        clock_M: clock time of each draw.
        to_data_M: D(t, 0) of each draw, in [0, 1].
        to_noise_M: D(t, 1) of each draw, in [0, 1].
    """

    clock_M: np.ndarray
    to_data_M: np.ndarray
    to_noise_M: np.ndarray


def draw_samples(blocks: Blocks, count: int, draws: int, seed: int) -> Draws:
    """Draw `draws` of the `count` samples, with replacement, and a noise for each. All ranks get the same.

    Raises:
        DataError: there are too few samples for a meaningful denoiser.
    """
    if count < _FEWEST:
        raise DataError(
            "--data", count, f"the optimal denoiser needs at least {_FEWEST} samples", "Use a larger data set."
        )
    rng = generator(seed, "optimal denoiser")
    index_M = torch.from_numpy(rng.integers(count, size=draws))
    sample_Md, mean_d = torch.zeros(0), torch.zeros(0)
    for first, block in blocks():
        if len(mean_d) == 0:
            sample_Md, mean_d = block.new_zeros(draws, block.shape[1]), block.new_zeros(block.shape[1])
        mean_d += block.sum(0) / count
        # Rows whose sample another rank holds stay zero; the sum over ranks fills them.
        here = ((index_M >= first) & (index_M < first + len(block))).nonzero()[:, 0]
        sample_Md[here.to(block.device)] = block[(index_M[here] - first).to(block.device)]
    sample_Md, mean_d = summed(sample_Md), summed(mean_d)
    noise_Md = torch.from_numpy(rng.standard_normal(tuple(sample_Md.shape)))
    return Draws(sample_Md, noise_Md.to(sample_Md), mean_d)


def optimal_noise(blocks: Blocks, sample_Qd: Tensor, noise_Qd: Tensor, sigma_Q: Tensor) -> Tensor:
    """Optimal noise estimates eps* [Q, d], float64 (Eq. 4), at x = s (sample + sigma noise).

    With u = x / s and the data y_i, eps* = (u - sum_i w_i y_i) / sigma with w = softmax_i(-|u - y_i|^2 / (2 sigma^2)),
    so s cancels.

    Args:
        sample_Qd: must be samples of the data: sums are relative to their logits.
    """
    u_Qd = sample_Qd + sigma_Q[:, None] * noise_Qd
    # At small sigma the softmax needs float64, which is slow. By Cauchy-Schwarz float32 rounds a logit u y / sigma^2 by
    # up to eps |u| |y| / sigma^2, and eps* moves by that over sigma, for data whose entries differ by at most one. The
    # drawn samples stand for the data in |y|.
    rounding_Q = torch.finfo(torch.float32).eps * u_Qd.norm(dim=1) * sample_Qd.norm(dim=1).max() / sigma_Q**3
    coarse_Q = rounding_Q <= _ROUNDING_BOUND
    # Both precisions share one pass over the data.
    groups = [
        (rows, _Posterior(u_Qd[rows], sample_Qd[rows], sigma_Q[rows], dtype))
        for rows, dtype in ((~coarse_Q, torch.float64), (coarse_Q, torch.float32))
        if rows.any()
    ]
    for _, block in blocks():
        for _, posterior in groups:
            posterior.add(block)
    mean_Qd = torch.empty_like(u_Qd)
    for rows, posterior in groups:
        mean_Qd[rows] = posterior.mean()
    return (u_Qd - mean_Qd) / sigma_Q[:, None]


class _Posterior:
    """Posterior means sum_i w_i y_i of noisy samples u, block by block, as in a streaming softmax.

    Sums are relative to the largest logit so far, and are rescaled when it grows. Logits are relative to that of the
    sample that u was made from: so they are small where it dominates, and round little. Products and exponentials are
    in `dtype`, sums over blocks in float64.
    """

    def __init__(self, u_Qd: Tensor, sample_Qd: Tensor, sigma_Q: Tensor, dtype: torch.dtype) -> None:
        # The logit of y is -|u - y|^2 / (2 sigma^2); |u|^2 is common to all y and drops out. With |y|^2 / 2 appended to
        # y and -1 to u, the rest is one matrix product: (u y - |y|^2 / 2) / sigma^2.
        precision_Q1 = 1 / sigma_Q[:, None].square()
        own_Q1 = ((u_Qd - sample_Qd / 2) * sample_Qd).sum(1, keepdim=True)
        self._minus_own_Q1 = (-own_Q1 * precision_Q1).to(dtype)
        self._scaled_Qe = (torch.cat([u_Qd, -torch.ones_like(own_Q1)], 1) * precision_Q1).to(dtype)
        # The sample that u was made from is in the data, maybe on another rank, with logit zero: no maximum is less.
        self._largest_Q = torch.zeros_like(sigma_Q)
        self._weight_Q = torch.zeros_like(sigma_Q)
        self._sum_Qd = torch.zeros_like(u_Qd)

    def add(self, block_bd: Tensor) -> None:
        """Add the samples of a block [b, d] to the sums."""
        half_square_b1 = block_bd.square().sum(1, keepdim=True) / 2
        block_be = torch.cat([block_bd, half_square_b1], 1).to(self._scaled_Qe)
        logit_Qb = torch.addmm(self._minus_own_Q1, self._scaled_Qe, block_be.T)
        block_largest_Q = logit_Qb.max(1).values.double()
        # Most noisy samples are far from most blocks: skip those whose weights here would all be lost in rounding.
        rows = (block_largest_Q > self._largest_Q - _NEGLIGIBLE).nonzero()[:, 0]
        before_R, self._largest_Q = self._largest_Q[rows], torch.maximum(self._largest_Q, block_largest_Q)
        largest_R = self._largest_Q[rows]
        rescale_R = torch.exp(before_R - largest_R)
        weight_Rb = logit_Qb[rows].sub_(largest_R[:, None].to(logit_Qb)).exp_()
        self._weight_Q[rows] = self._weight_Q[rows] * rescale_R + weight_Rb.sum(1)
        self._sum_Qd[rows] = self._sum_Qd[rows] * rescale_R[:, None] + weight_Rb @ block_be[:, :-1]

    def mean(self) -> Tensor:
        """Posterior means [Q, d] over all ranks' data."""
        # Each rank's sums are relative to the largest logit of its own data: bring them to the largest of all first.
        common_Q = maximum(self._largest_Q.clone())
        rescale_Q = torch.exp(self._largest_Q - common_Q)
        self._weight_Q *= rescale_Q
        self._sum_Qd *= rescale_Q[:, None]
        return summed(self._sum_Qd) / summed(self._weight_Q)[:, None]


def limit_similarities(
    process: Process, blocks: Blocks, draws: Draws, eta: float, seed: int, last_limit: LastLimit = "at-t"
) -> LimitSimilarities:
    """D(t, 0) and D(t, 1) (Eq. 5) of each draw, at times drawn uniformly on the clock.

    In the limit t = 0, eps* is the noise itself; in the limit t = 1, the posterior mean is the mean of the data.

    Args:
        eta: two entries are alike if they differ by at most this.
        last_limit: where the limit t = 1 is taken: `at-t` at x_t, as the paper's published scripts compute it and its
            boundaries were found, or `at-1` at x_1 of the same sample and noise, as the paper's text has it (Eq. 5).
            The latter puts the last boundary later.
    """
    u_M = np.sort(generator(seed, "optimal denoiser times").random(len(draws.noise_Md)))
    sigma_M = torch.from_numpy(process.sigma_of(clock_times(process, u_M))).to(draws.mean_d)
    at_t = optimal_noise(blocks, draws.sample_Md, draws.noise_Md, sigma_M)
    if last_limit == "at-1":
        sigma_M = torch.full_like(sigma_M, float(process.sigma_of(clock_times(process, 1.0))))
    at_1 = draws.noise_Md + (draws.sample_Md - draws.mean_d) / sigma_M[:, None]
    similarities = (_fraction_alike(at_t, limit, eta).cpu().numpy() for limit in (draws.noise_Md, at_1))
    return LimitSimilarities(u_M, *similarities)


def limit_boundaries(process: Process, similarities: LimitSimilarities, alpha: float) -> list[float]:
    """Boundaries [t1, t2], in the process's unit, of the three stages of Algorithm 1.

    t1 is the largest tau for which the mean of D(t, 0) over [0, tau) is at least alpha (Eq. 6); t2 is the smallest for
    which the mean of D(t, 1) over [tau, 1] is (Eq. 7).

    Raises:
        ConfigError: no tau satisfies alpha, or the first and the last stage would meet.
    """
    u_M = similarities.clock_M
    data_means, noise_means = running_means(similarities)
    for stage, limit, means in (("first", "0", data_means), ("last", "1", noise_means)):
        if means.max() < alpha:
            problem = f"no boundary of the {stage} stage: mean similarity to t = {limit} is at most {means.max():.4f}"
            raise ConfigError("--alpha", alpha, problem, f"Use less than {means.max():.4f}, or a larger --eta.")
    # The first stage ends at the draw after its last one; the last stage begins at its first draw.
    in_first = int(np.flatnonzero(data_means >= alpha)[-1]) + 1
    before_last = int(np.flatnonzero(noise_means >= alpha)[0])
    if in_first >= before_last:
        problem = "the first and the last stage meet, so there is no stage between them"
        raise ConfigError("--alpha", alpha, problem, "Use a larger alpha, or a smaller --eta.")
    boundaries: list[float] = clock_times(process, [u_M[in_first], u_M[before_last]]).tolist()
    return boundaries


def running_means(similarities: LimitSimilarities) -> tuple[np.ndarray, np.ndarray]:
    """Mean D(t, 0) [M] of each draw and those before it, and mean D(t, 1) [M] of each draw and those after it."""
    counts = np.arange(1, len(similarities.clock_M) + 1)
    return similarities.to_data_M.cumsum() / counts, (similarities.to_noise_M[::-1].cumsum() / counts)[::-1]


def pairwise_similarity(blocks: Blocks, draws: Draws, sigma_G: np.ndarray, eta: float) -> np.ndarray:
    """S(t_a, t_b) [G, G] (Eq. 5) between all pairs of noise levels `sigma_G`, averaged over the draws."""
    M, G = len(draws.noise_Md), len(sigma_G)
    sigma_Q = torch.from_numpy(np.tile(sigma_G, M)).to(draws.mean_d)
    samples, noises = (x.repeat_interleave(G, 0) for x in (draws.sample_Md, draws.noise_Md))
    noise_MGd = optimal_noise(blocks, samples, noises, sigma_Q).view(M, G, -1)
    # Row by row: all pairs of one draw at once would be G times the memory.
    similarity = torch.zeros(G, G, dtype=torch.float64)
    for noise_Gd in noise_MGd:
        for a in range(G):
            similarity[a] += _fraction_alike(noise_Gd[a], noise_Gd, eta).cpu()
    return (similarity / M).numpy()


def pairwise_boundaries(
    process: Process, similarity_GG: np.ndarray, stages: int, lengths: Lengths = ANY_LENGTH
) -> list[float]:
    """Boundaries of the best cut of a similarity matrix over the clock times 0, 1/(G-1), ..., 1.

    They lie half-way on the clock between the last time of one stage and the first of the next.
    """
    between = (similarity_intervals(similarity_GG, stages, lengths) - 0.5) / (len(similarity_GG) - 1)
    boundaries: list[float] = clock_times(process, between).tolist()
    return boundaries


def _fraction_alike(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """D of Eq. 5: the fraction of entries along the last axis that differ by at most eta."""
    return ((a - b).abs() <= eta).double().mean(-1)
