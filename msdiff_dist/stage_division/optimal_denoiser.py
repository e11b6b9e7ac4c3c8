"""The optimal denoiser of a finite data set, and the stages that its similarity across time suggests (Algorithm 1).

The data streams through in blocks of matrix products: two passes whatever the number of draws, one for the mean and the
drawn samples, one for the posterior means of all noisy samples at once. With torch.distributed initialised every rank
may hold a part of the data, and the sums are reduced over the ranks.
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
from msdiff_dist.stage_division.intervals import similarity_intervals

Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Each call passes once over the data: (index of the block's first sample, the block as float64 [b, d])."""

LastLimit = Literal["at-1", "at-t"]

_NEGLIGIBLE = 60.0  # a weight below exp(-60) of the largest does not show in float64
_ROUNDING_BOUND = 1e-5  # of eps* in float32, by Cauchy-Schwarz; the errors themselves are some twenty times smaller
_FEWEST = 10


@dataclass(frozen=True)
class Draws:
    """Clean samples [M, d] drawn from the data, their noises [M, d], and the mean [d] of the data, all float64."""

    sample_Md: Tensor
    noise_Md: Tensor
    mean_d: Tensor


@dataclass(frozen=True)
class LimitSimilarities:
    """Algorithm 1's draws, ascending in time on the paper's clock: D(t, 0) and D(t, 1) of each, in [0, 1]."""

    clock_M: np.ndarray
    to_data_M: np.ndarray
    to_noise_M: np.ndarray


def draw_samples(blocks: Blocks, count: int, draws: int, seed: int) -> Draws:
    """`draws` samples out of `count`, each with its noise.

    Raises:
        DataError: too few samples for a meaningful denoiser.
    """
    if count < _FEWEST:
        raise DataError(
            "--data", count, f"so few samples say nothing, there must be {_FEWEST}", "Use a larger data set."
        )
    rng = generator(seed, "optimal denoiser")
    index_M = torch.from_numpy(rng.integers(count, size=draws))
    sample_Md, mean_d = torch.zeros(0), torch.zeros(0)
    for first, block in blocks():
        if len(mean_d) == 0:
            sample_Md, mean_d = block.new_zeros(draws, block.shape[1]), block.new_zeros(block.shape[1])
        mean_d += block.sum(0) / count
        here = ((index_M >= first) & (index_M < first + len(block))).nonzero()[:, 0]
        sample_Md[here.to(block.device)] = block[(index_M[here] - first).to(block.device)]
    sample_Md, mean_d = summed(sample_Md), summed(mean_d)
    noise_Md = torch.from_numpy(rng.standard_normal(tuple(sample_Md.shape)))
    return Draws(sample_Md, noise_Md.to(sample_Md), mean_d)


def optimal_noise(blocks: Blocks, sample_Qd: Tensor, noise_Qd: Tensor, sigma_Q: Tensor) -> Tensor:
    """eps* [Q, d], float64, of the data's optimal denoiser (Eq. 4) at x = s (sample + sigma noise).

    With u = x / s it is (u - sum_i w_i y_i) / sigma, w = softmax_i(-|u - y_i|^2 / (2 sigma^2)), so s cancels. At small
    sigma the softmax needs float64; where float32 leaves eps* within 1e-6 it does the products.
    """
    u_Qd = sample_Qd + sigma_Q[:, None] * noise_Qd
    rounding_Q = torch.finfo(torch.float32).eps * u_Qd.norm(dim=1) * sample_Qd.norm(dim=1).max() / sigma_Q**3
    coarse_Q = rounding_Q <= _ROUNDING_BOUND
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
    """Posterior means of noisy samples u, summed up block by block under a running maximum of the logits.

    Logits are counted from that of the sample which u was made from, so that they stay small where it dominates.
    Products and exponentials are in `dtype`, the sums over blocks in float64.
    """

    def __init__(self, u_Qd: Tensor, sample_Qd: Tensor, sigma_Q: Tensor, dtype: torch.dtype) -> None:
        precision_Q1 = 1 / sigma_Q[:, None].square()
        own_Q1 = ((u_Qd - sample_Qd / 2) * sample_Qd).sum(1, keepdim=True)
        self._minus_own_Q1 = (-own_Q1 * precision_Q1).to(dtype)
        self._scaled_Qe = (torch.cat([u_Qd, -torch.ones_like(own_Q1)], 1) * precision_Q1).to(dtype)
        self._largest_Q = torch.zeros_like(sigma_Q)
        self._weight_Q = torch.zeros_like(sigma_Q)
        self._sum_Qd = torch.zeros_like(u_Qd)

    def add(self, block_bd: Tensor) -> None:
        """Weigh the samples of a block."""
        half_squares = block_bd.square().sum(1, keepdim=True) / 2
        block_be = torch.cat([block_bd, half_squares], 1).to(self._scaled_Qe)
        logit_Qb = torch.addmm(self._minus_own_Q1, self._scaled_Qe, block_be.T)
        block_largest_Q = logit_Qb.max(1).values.double()
        rows = (block_largest_Q > self._largest_Q - _NEGLIGIBLE).nonzero()[:, 0]
        before, self._largest_Q = self._largest_Q[rows], torch.maximum(self._largest_Q, block_largest_Q)
        largest = self._largest_Q[rows]
        rescale = torch.exp(before - largest)
        weights = logit_Qb[rows].sub_(largest[:, None].to(logit_Qb)).exp_()
        self._weight_Q[rows] = self._weight_Q[rows] * rescale + weights.sum(1)
        self._sum_Qd[rows] = self._sum_Qd[rows] * rescale[:, None] + weights @ block_be[:, :-1]

    def mean(self) -> Tensor:
        """Posterior means [Q, d], over all ranks."""
        # Every rank's sums are relative to the largest logit it has met: bring them to the common one first.
        common_Q = maximum(self._largest_Q.clone())
        rescale = torch.exp(self._largest_Q - common_Q)
        self._weight_Q *= rescale
        self._sum_Qd *= rescale[:, None]
        return summed(self._sum_Qd) / summed(self._weight_Q)[:, None]


def limit_similarities(
    process: Process, blocks: Blocks, draws: Draws, eta: float, seed: int, last_limit: LastLimit = "at-1"
) -> LimitSimilarities:
    """D(t, 0) and D(t, 1) (Eq. 5) of draws at times uniform on the clock.

    In the limits eps*_0 is the noise itself, and eps*_1 has the mean of the data for its posterior mean.

    Args:
        last_limit: where eps*_1 is taken: `at-1` at x_1 of the same sample and noise, as Eq. 5 defines D, or `at-t` at
            x_t itself, as the paper's published scripts compute it, which puts the last boundary earlier.
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
    """The three stages of Algorithm 1: boundaries [t1, t2] in the process's time.

    t1 is the largest tau with mean D(t, 0) over [0, tau) of at least alpha (Eq. 6), t2 the smallest with mean D(t, 1)
    over [tau, 1] of at least alpha (Eq. 7).

    Raises:
        ConfigError: no tau satisfies alpha, or the two stages would meet.
    """
    u_M = similarities.clock_M
    data_means, noise_means = running_means(similarities)
    for stage, limit, means in (("first", "0", data_means), ("last", "1", noise_means)):
        if means.max() < alpha:
            problem = f"no boundary of the {stage} stage: mean similarity to t = {limit} is at most {means.max():.4f}"
            raise ConfigError("--alpha", alpha, problem, f"Use less than {means.max():.4f}, or a larger --eta.")
    in_first = int(np.flatnonzero(data_means >= alpha)[-1]) + 1
    before_last = int(np.flatnonzero(noise_means >= alpha)[0])
    if in_first >= before_last:
        problem = "the first and the last stage meet and leave none between"
        raise ConfigError("--alpha", alpha, problem, "Use a larger alpha, or a smaller --eta.")
    boundaries: list[float] = clock_times(process, [u_M[in_first], u_M[before_last]]).tolist()
    return boundaries


def running_means(similarities: LimitSimilarities) -> tuple[np.ndarray, np.ndarray]:
    """Mean D(t, 0) of the draws up to and with each, and mean D(t, 1) of each and those after it."""
    counts = np.arange(1, len(similarities.clock_M) + 1)
    return similarities.to_data_M.cumsum() / counts, (similarities.to_noise_M[::-1].cumsum() / counts)[::-1]


def pairwise_similarity(blocks: Blocks, draws: Draws, sigma_G: np.ndarray, eta: float) -> np.ndarray:
    """S(t_a, t_b) [G, G] (Eq. 5) between all pairs of noise levels, averaged over the draws."""
    M, G = len(draws.noise_Md), len(sigma_G)
    sigma_Q = torch.from_numpy(np.tile(sigma_G, M)).to(draws.mean_d)
    samples, noises = (x.repeat_interleave(G, 0) for x in (draws.sample_Md, draws.noise_Md))
    noise_MGd = optimal_noise(blocks, samples, noises, sigma_Q).view(M, G, -1)
    similarity = torch.zeros(G, G, dtype=torch.float64)
    for noise_Gd in noise_MGd:
        for a in range(G):
            similarity[a] += _fraction_alike(noise_Gd[a], noise_Gd, eta).cpu()
    return (similarity / M).numpy()


def pairwise_boundaries(process: Process, similarity_GG: np.ndarray, stages: int) -> list[float]:
    """Boundaries half-way on the clock between the neighbouring points of the grid u = 0, 1/(G-1), ..., 1."""
    between = (similarity_intervals(similarity_GG, stages) - 0.5) / (len(similarity_GG) - 1)
    boundaries: list[float] = clock_times(process, between).tolist()
    return boundaries


def _fraction_alike(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """D of Eq. 5: fraction of entries, along the last dimension, that differ by at most eta."""
    return ((a - b).abs() <= eta).double().mean(-1)
