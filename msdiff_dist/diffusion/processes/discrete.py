"""The process of DDPM and latent diffusion, in discrete time (2006.11239; 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from msdiff_dist.bounds import check_between
from msdiff_dist.diffusion.denoiser import PredictionType, build_denoiser, check_min_snr_gamma
from msdiff_dist.diffusion.noise_schedule import ScheduleName, alphas_cumprod, betas
from msdiff_dist.diffusion.process import Process, Spacing
from msdiff_dist.errors import ConfigError

_LEAST_SQUARE = 1e-30  # squares of scales: fp32 holds their roots, and the roots' squares


@dataclass(frozen=True, kw_only=True)
class DiscreteConfig:
    """The discrete process of LDM, with timesteps 0 to `timesteps` - 1."""

    timesteps: int = 1000
    """Number of timesteps T."""
    schedule: ScheduleName = "scaled_linear"
    """How beta runs from `beta_start` to `beta_end`: `linear`, `scaled_linear` (linear in sqrt(beta), as in LDM), or
    `cosine`, which uses neither of the two."""
    beta_start: float = 0.0015
    """beta at timestep 0."""
    beta_end: float = 0.0195
    """beta at timestep T - 1."""
    prediction_type: PredictionType = "epsilon"
    """What the network predicts: the noise, v = s eps - n x_0, or the clean sample."""
    min_snr_gamma: float | None = None
    """Weigh the loss by min(SNR, gamma) (2303.09556), expressed for the prediction type in use. null: weight 1."""

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ConfigError("timesteps", self.timesteps, "a process needs at least two timesteps", "Use 1000.")
        if not 0 < self.beta_start < 1:
            raise ConfigError("beta_start", self.beta_start, "must lie between 0 and 1", "LDM uses 0.0015.")
        if not self.beta_start <= self.beta_end < 1:
            problem = f"must lie between beta_start = {self.beta_start} and 1"
            raise ConfigError("beta_end", self.beta_end, problem, "LDM uses 0.0195.")
        check_between("timesteps", self.timesteps, 2, 10**6)
        check_min_snr_gamma(self.min_snr_gamma)
        self._check_scales()

    def betas(self) -> np.ndarray:
        """Variances of the steps, float64 [T]."""
        return betas(self.schedule, self.timesteps, self.beta_start, self.beta_end)

    def _check_scales(self) -> None:
        # Networks divide by the scales of signal and noise in fp32, and times are spaced by log(noise / signal).
        square_T = alphas_cumprod(self.betas())
        if square_T[-1] < _LEAST_SQUARE:
            problem = f"leaves no signal at timestep {self.timesteps - 1}"
            raise ConfigError("beta_end", self.beta_end, problem, "LDM uses 1000 timesteps up to 0.0195.")
        if 1 - square_T[0] < _LEAST_SQUARE:
            raise ConfigError("beta_start", self.beta_start, "adds no noise at timestep 0", "LDM uses 0.0015.")


class DiscreteProcess(Process):
    """Timesteps 0 to T - 1, each equally likely in training.

    Attributes:
        alphas_cumprod: float64 [T], products of 1 - beta: s_t^2.
    """

    unit = "timestep"
    discrete = True
    variance_preserving = True
    spacings = ("leading", "trailing", "log_snr")
    sampler = "ddim"
    hi: int

    def __init__(self, config: DiscreteConfig) -> None:
        super().__init__(build_denoiser(config.prediction_type, config.min_snr_gamma))
        self.lo, self.hi = 0, config.timesteps
        self.alphas_cumprod = alphas_cumprod(config.betas())
        table = np.stack([np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)])
        self._table = torch.from_numpy(table.astype(np.float32))

    def scales(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        if self._table.device != t_B.device:
            self._table = self._table.to(t_B.device)
        s_B, n_B = self._table[:, t_B.long()]
        return s_B, n_B

    def network_time(self, t_B: Tensor) -> Tensor:
        return t_B.float()

    def mass(self, lo: float, hi: float) -> float:
        return (hi - lo) / self.hi

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        return np.minimum(lo + np.floor(u * (hi - lo)), hi - 1).astype(np.int64)

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        a = self.alphas_cumprod[np.asarray(t, np.int64)]
        values: np.ndarray = np.sqrt((1 - a) / a)
        return values

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        return np.searchsorted(self.sigma_of(np.arange(self.hi)), sigma, side="left")

    def spaced_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        if steps > self.hi:
            raise ConfigError("steps", steps, f"the process has {self.hi} timesteps", f"Use at most {self.hi}.")
        if end is not None:
            problem = "a discrete process is always sampled to its first timestep"
            raise ConfigError("end", end, problem, "Omit it; `last` says where the last step ends.")
        i = np.arange(steps)
        if spacing == "leading":
            # LDM shifts its timesteps by one. With steps less than two timesteps apart that could pass the last one.
            times = i * self.hi // steps + (self.hi >= 2 * steps)
        elif spacing == "trailing":
            times = (i + 1) * self.hi // steps - 1
        else:
            # Near the data, even steps in log-SNR are finer than timesteps, and the nearest timesteps would repeat. So
            # times ascend by at least one, and leave room for those that follow.
            log_sigmas = np.log(self.sigma_of(np.arange(self.hi)))
            even = np.linspace(log_sigmas[-1], log_sigmas[0], steps)[::-1]
            nearest = np.rint(np.interp(even, log_sigmas, np.arange(self.hi))).astype(np.int64)
            times = np.minimum(np.maximum.accumulate(nearest - i) + i, self.hi - steps + i)
        return times[::-1], 0.0
