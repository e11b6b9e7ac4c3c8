"""Diffusion processes: p(x_t | x_0) = N(s_t x_0, n_t^2 I), the times they train on, and the network's view of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.config import DiffusionConfig, DiscreteConfig, Unit
from msdiff_dist.diffusion.denoiser import Denoiser, build_denoiser
from msdiff_dist.diffusion.noise_schedule import alphas_cumprod, betas
from msdiff_dist.errors import ConfigError

Spacing = Literal["leading", "trailing", "log_snr"]


class Process(ABC):
    """A noising process in its own time variable, which ascends from data to noise over [lo, hi)."""

    unit: ClassVar[Unit]
    lo: float
    hi: float

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    # What a process must say of itself.

    @abstractmethod
    def scales(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scale (s_B, n_B), float32 on t_B's device, of x_t = s x_0 + n eps."""

    @abstractmethod
    def network_time(self, t_B: Tensor) -> Tensor:
        """The network's time input (c_noise), float32 [B]."""

    @abstractmethod
    def mass(self, lo: float, hi: float) -> float:
        """Probability of [lo, hi) under the training distribution of times."""

    @abstractmethod
    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        """Times inside [lo, hi), following the training distribution, from uniforms u in [0, 1)."""

    @abstractmethod
    def sigma_of(self, t: np.ndarray) -> np.ndarray:
        """Noise-to-signal ratio n/s at times t, float64; it ascends with t. log-SNR is -2 log(sigma)."""

    @abstractmethod
    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        """First time whose sigma is at least the given one: the inverse of `sigma_of`."""

    @abstractmethod
    def sampling_times(self, steps: int, spacing: Spacing) -> np.ndarray:
        """`steps` descending times at which a sampler calls the network, before it lands on clean data."""

    # What follows from it.

    def perturb(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t of shape [B, C, H, W] (Eq. 1)."""
        s, n = self._scales_like(x0_BCHW, t_B)
        return s * x0_BCHW + n * noise_BCHW

    def network_input(self, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in x_t, c_noise): what the network is called with."""
        return self.denoiser.scale_input(x_t, *self._scales_like(x_t, t_B)), self.network_time(t_B)

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the network's output is regressed on, [B, C, H, W]."""
        return self.denoiser.target(x0, noise, *self._scales_like(x0, t_B))

    def weight(self, t_B: Tensor) -> Tensor:
        """Loss weight of each sample, float32 [B]."""
        return self.denoiser.weight(*self.scales(t_B))

    def denoised(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """Estimate of x_0 from the network's output at x_t."""
        return self.denoiser.denoised(output, x_t, *self._scales_like(x_t, t_B))

    def noise_of(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """Estimate of the noise in x_t from the network's output."""
        s, n = self._scales_like(x_t, t_B)
        return (x_t - s * self.denoiser.denoised(output, x_t, s, n)) / n

    def _scales_like(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        s_B, n_B = self.scales(t_B)
        shape = (-1, *[1] * (x.ndim - 1))
        return s_B.view(shape), n_B.view(shape)


class DiscreteProcess(Process):
    """LDM's process: integer timesteps 0 .. T - 1, each equally likely in training."""

    unit = "timestep"

    def __init__(self, config: DiscreteConfig) -> None:
        super().__init__(build_denoiser(config.prediction_type, config.min_snr_gamma))
        self.lo, self.hi = 0, config.timesteps
        betas_T = betas(config.schedule, config.timesteps, config.beta_start, config.beta_end)
        self.alphas_cumprod = alphas_cumprod(betas_T)
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

    def sigma_of(self, t: np.ndarray) -> np.ndarray:
        a = self.alphas_cumprod[np.asarray(t, np.int64)]
        return np.sqrt((1 - a) / a)

    def time_of(self, sigma: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.sigma_of(np.arange(self.hi)), sigma, side="left")

    def sampling_times(self, steps: int, spacing: Spacing) -> np.ndarray:
        """Integer timesteps: `leading` is LDM's, i T / steps + 1; `trailing` starts at T - 1.

        `log_snr` is even in log-SNR, but consecutive near the data where the timesteps are too coarse for that.
        """
        if steps > self.hi:
            raise ConfigError(
                "steps", steps, f"is more than the process's {self.hi} timesteps", f"Use at most {self.hi}."
            )
        i = np.arange(steps)
        if spacing == "leading":
            times = i * self.hi // steps + (self.hi >= 2 * steps)
        elif spacing == "trailing":
            times = (i + 1) * self.hi // steps - 1
        else:
            log_sigmas = np.log(self.sigma_of(np.arange(self.hi)))
            even = np.interp(np.linspace(log_sigmas[-1], log_sigmas[0], steps)[::-1], log_sigmas, np.arange(self.hi))
            times = np.maximum.accumulate(np.rint(even).astype(np.int64) - i) + i
            times = np.minimum(times, self.hi - steps + i)
        return times[::-1]


def build_process(config: DiffusionConfig) -> Process:
    return DiscreteProcess(config.discrete)
