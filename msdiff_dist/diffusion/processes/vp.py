"""The variance-preserving SDE, in continuous time (2011.13456)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from msdiff_dist.diffusion.denoiser import PredictionType, build_denoiser, check_min_snr_gamma
from msdiff_dist.diffusion.process import Process, Spacing
from msdiff_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VPConfig:
    """Continuous variance-preserving SDE (2011.13456): beta(t) linear from beta_min to beta_max over t in [0, 1]."""

    beta_min: float = 0.1
    """beta at t = 0."""
    beta_max: float = 20.0
    """beta at t = 1."""
    t_min: float = 1e-3
    """Smallest time that is trained."""
    t_end: float | None = None
    """Time at which samplers stop unless they are told otherwise; null: `t_min`."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts: the noise, v = s eps - n x_0, or the clean sample."""
    min_snr_gamma: float | None = None
    """Weigh the loss by min(SNR, gamma) (2303.09556), expressed for the prediction type in use. null: weight 1."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            problem = f"must be positive and at most beta_max = {self.beta_max}"
            raise ConfigError("beta_min", self.beta_min, problem, "The paper uses 0.1 and 20.")
        if not 0 < self.t_min < 1:
            raise ConfigError("t_min", self.t_min, "must lie between 0 and 1", "Use 1e-3.")
        if self.t_end is not None and not self.t_min <= self.t_end < 1:
            problem = f"must lie between t_min = {self.t_min:g} and 1"
            raise ConfigError("t_end", self.t_end, problem, "DPM-Solver uses 1e-3 and, from 16 evaluations, 1e-4.")
        # Networks divide by s and n in fp32; see `VPProcess` for both.
        if self.beta_min + self.beta_max > 300:
            raise ConfigError("beta_max", self.beta_max, "leaves no signal at t = 1", "The paper uses 0.1 and 20.")
        if self.t_min * (self.beta_min + self.t_min * (self.beta_max - self.beta_min) / 2) < 1e-30:
            raise ConfigError("t_min", self.t_min, "there is no noise at this time", "Use 1e-3.")
        check_min_snr_gamma(self.min_snr_gamma)


class VPProcess(Process):
    """The VP-SDE with t in [t_min, 1), uniform in training (2011.13456, Eq. 33).

    s_t = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2), n_t = sqrt(1 - s_t^2).
    """

    unit = "t"
    variance_preserving = True
    spacings = ("log_snr", "uniform")
    sampler = "dpm_3s"

    def __init__(self, config: VPConfig) -> None:
        super().__init__(build_denoiser(config.prediction_type, config.min_snr_gamma))
        self.lo, self.hi = config.t_min, 1.0
        self._end = config.t_min if config.t_end is None else config.t_end
        self._slope, self._beta_min = config.beta_max - config.beta_min, config.beta_min

    def scales(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t_B = t_B.double()
        log_s_B = -(t_B**2) * self._slope / 4 - t_B * self._beta_min / 2
        # n^2 = 1 - s^2 by expm1, which does not cancel near t = 0.
        return torch.exp(log_s_B).float(), torch.sqrt(-torch.expm1(2 * log_s_B)).float()

    def network_time(self, t_B: Tensor) -> Tensor:
        return (999 * t_B).float()  # as the networks of 2011.13456 take it: the scale of 1000 timesteps

    def mass(self, lo: float, hi: float) -> float:
        return (hi - lo) / (self.hi - self.lo)

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        return np.minimum(lo + u * (hi - lo), np.nextafter(hi, lo))

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        t = np.asarray(t, np.float64)
        return np.sqrt(np.expm1(t**2 * self._slope / 2 + t * self._beta_min))

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        # log(1 + sigma^2) = slope t^2 / 2 + beta_min t; this form of the root does not cancel for small sigma.
        log_square = np.log1p(np.asarray(sigma, np.float64) ** 2)
        return 2 * log_square / (self._beta_min + np.sqrt(self._beta_min**2 + 2 * self._slope * log_square))

    def spaced_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        end = self._end if end is None else end
        if not self.lo <= end < self.hi:
            problem = f"training covers t from {self.lo} to {self.hi}"
            raise ConfigError("end", end, problem, "Stop inside it, or train with a smaller t_min.")
        if spacing == "uniform":
            grid = np.linspace(self.hi, end, steps + 1)
        else:
            grid = self.time_of(np.geomspace(self.sigma_of(self.hi), self.sigma_of(end), steps + 1))
        return grid[:-1], float(self.sigma_of(end))
