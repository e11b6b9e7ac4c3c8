"""The times that training draws and the weights of their losses: the process's own, or others, as SpeeD's (2405.17403).

The paper finds that near noise, from a time tau on, x_t hardly changes any more with t (its convergence area), and that
many timesteps lie there. Asymmetric sampling draws them k times less often: with T equally likely timesteps,
P(t) = k / (T + tau (k - 1)) below tau and 1 / (T + tau (k - 1)) from it on. Change-aware weighting multiplies the loss
by the rate at which the variance of the noise grows, d(n_t^2)/dt, scaled to [1 - lambda, lambda].

Importance weights, the density of the process's own times over that of those drawn, undo in the mean what the sampling
changes: the objective stays, and only the variance of its gradient is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.bounds import check_between
from msdiff_dist.diffusion.noise_schedule import alphas_cumprod, betas
from msdiff_dist.diffusion.process import Process
from msdiff_dist.errors import ConfigError

_GRID = 10_001  # times of a continuous process at which weights of change are computed; linear between them


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """Times drawn and weighted otherwise than by the process. The defaults are SpeeD (2405.17403): times near noise,
    where x_t hardly changes any more, are drawn less often, and a loss counts the more the faster the noise grows."""

    suppressed_from: float | None = None
    """First of the times that are drawn less often, in the process's unit: the paper's tau. null: where the
    signal-to-noise ratio is that of the paper's 700 of 1000 timesteps with linear betas from 0.0001 to 0.02."""
    suppression: float = 5.0
    """How many times less often than without this section they are drawn, relative to the others: the paper's k."""
    change_weight: float | None = 0.6
    """Weight of the loss where the variance of the noise grows fastest with time; where it grows slowest, the weight is
    1 - change_weight. The paper's lambda. null: the process's weights alone."""
    importance_weights: bool = False
    """Whether each loss is weighted by the density of the process's own times over that of those drawn. The expected
    gradient is then that without this section, but for `change_weight`, under `stages.sampling: uniform` or
    `stages.importance_weights`."""

    def __post_init__(self) -> None:
        check_between("suppression", self.suppression, 1, 1e6)
        check_between("change_weight", self.change_weight, 0.5, 1)


class TimeDistribution(Protocol):
    """A distribution of times: that of a `Process`, or `TrainingTimes`."""

    @property
    def discrete(self) -> bool:
        """Whether times are whole numbers."""

    def mass(self, lo: float, hi: float) -> float:
        """Probability of [lo, hi)."""

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        """Times in [lo, hi) that follow the distribution, restricted to it, from uniforms u in [0, 1)."""


class TrainingTimes:
    """The distribution of times in training, and the weights of their losses.

    Args:
        config: None: the process's own distribution and weights.

    Raises:
        ConfigError: naming the field of `diffusion.times` that does not fit the process.
    """

    def __init__(self, process: Process, config: TimesConfig | None = None) -> None:
        self._process, self.discrete = process, process.discrete
        self._k, self._tau, self._change_weights, self._importance = 1.0, process.hi, None, False
        if config is not None:
            self._importance = config.importance_weights
            self._k, self._tau = config.suppression, _suppressed_from(config, process)
            if config.change_weight is not None:
                self._change_weights = torch.from_numpy(change_weights(config.change_weight, process))
        self._total = self._scaled_mass(process.lo, process.hi)

    def mass(self, lo: float, hi: float) -> float:
        """Probability of [lo, hi)."""
        return self._scaled_mass(lo, hi) / self._total

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        """Times in [lo, hi) that follow the distribution, restricted to it, from uniforms u in [0, 1)."""
        tau = min(max(self._tau, lo), hi)
        if not lo < tau < hi:  # one density all over: the process's own
            return self._process.quantile(u, lo, hi)
        # The first `share` of the uniforms is for the times below tau; each part is stretched to [0, 1) again.
        share = self._k * self._process.mass(lo, tau) / self._scaled_mass(lo, hi)
        early = u < share
        t = np.empty(u.shape, np.int64 if self.discrete else np.float64)
        t[early] = self._process.quantile(u[early] / share, lo, tau)
        t[~early] = self._process.quantile((u[~early] - share) / (1 - share), tau, hi)
        return t

    def density_ratio(self, t: np.ndarray) -> np.ndarray:
        """Density at times t relative to that of the process's own distribution, float64 of t's shape."""
        return np.where(np.asarray(t) < self._tau, self._k, 1.0) / self._total

    def weight(self, t_B: Tensor) -> Tensor:
        """Weight of each sample's loss, float32 [B]: the process's, times those of importance and of change."""
        weight_B = self._process.weight(t_B)
        if self._importance:
            weight_B = weight_B * self._total / torch.where(t_B < self._tau, self._k, 1.0)
        if self._change_weights is None:
            return weight_B
        if self._change_weights.device != t_B.device:
            self._change_weights = self._change_weights.to(t_B.device)
        table, process = self._change_weights, self._process
        if self.discrete:
            return weight_B * table[t_B.long()]
        at_B = (t_B.double() - process.lo) / (process.hi - process.lo) * (len(table) - 1)
        below_B = at_B.long().clamp(0, len(table) - 2)
        return weight_B * torch.lerp(table[below_B], table[below_B + 1], (at_B - below_B).float())

    def _scaled_mass(self, lo: float, hi: float) -> float:
        tau = min(max(self._tau, lo), hi)
        before = self._k * self._process.mass(lo, tau) if lo < tau else 0.0
        return before + (self._process.mass(tau, hi) if tau < hi else 0.0)


def _suppressed_from(config: TimesConfig, process: Process) -> float:
    tau, field = config.suppressed_from, "diffusion.times.suppressed_from"
    if tau is None:
        a = float(alphas_cumprod(betas("linear", 1000, 1e-4, 0.02))[700])
        tau = float(process.time_of(np.sqrt((1 - a) / a)))
    if not process.lo < tau < process.hi:
        problem = f"lies outside the process, whose {process.unit} runs from {process.lo} to {process.hi}"
        raise ConfigError(field, config.suppressed_from, problem, "Choose a time between them.")
    if process.discrete and tau != int(tau):
        raise ConfigError(field, tau, "times of a discrete process are whole numbers", f"Write {round(tau)}.")
    return tau


def change_weights(most: float, process: Process) -> np.ndarray:
    """Weights of change-aware weighting at all timesteps, or evenly from first to last time; float32.

    They are linear in d(n^2)/dt, from 1 - `most` where it is least to `most`.

    Raises:
        ConfigError: the variance of x_t is not always one, or the noise grows at one rate at all times.
    """
    if not process.variance_preserving:
        problem = f"needs a process that keeps the variance of x_t at one, and this one, in {process.unit}, does not"
        raise ConfigError("diffusion.times.change_weight", most, problem, "Write null.")
    last, num = (process.hi - 1, int(process.hi)) if process.discrete else (process.hi, _GRID)
    grid = np.linspace(process.lo, last, num)
    rate = np.gradient(1 / (1 + process.sigma_of(grid) ** -2.0), edge_order=1 if process.discrete else 2)
    span = rate.max() - rate.min()
    if not span > 0:
        problem = "has no meaning where the noise grows at one rate at all times"
        raise ConfigError("diffusion.times.change_weight", most, problem, "Write null.")
    weights: np.ndarray = (1 - most + (2 * most - 1) * (rate - rate.min()) / span).astype(np.float32)
    return weights
