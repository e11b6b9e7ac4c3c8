"""Diffusion processes: p(x_t | x_0) = N(s_t x_0, n_t^2 I), the times they train on, and the network's view of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from msdiff_dist.diffusion.config import (
    DiffusionConfig,
    DiscreteConfig,
    EDMConfig,
    SamplerName,
    Spacing,
    Unit,
    VPConfig,
)
from msdiff_dist.diffusion.denoiser import Denoiser, EDMDenoiser, build_denoiser
from msdiff_dist.diffusion.noise_schedule import alphas_cumprod, betas
from msdiff_dist.errors import ConfigError


class Process(ABC):
    """A noising process in its own time variable, which ascends from data to noise over [lo, hi)."""

    unit: ClassVar[Unit]
    spacings: ClassVar[tuple[Spacing, ...]]
    """How its sampling times can be spaced; the first is the default."""
    samplers: ClassVar[tuple[SamplerName, ...]]
    """Solvers that fit it; the first is the default."""

    lo: float
    hi: float
    prior_std: float = 1.0
    """Standard deviation of the noise that sampling starts from."""

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
    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        """Noise-to-signal ratio n/s at times t, float64; it ascends with t. log-SNR is -2 log(sigma)."""

    @abstractmethod
    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        """First time whose sigma is at least the given one: the inverse of `sigma_of`."""

    @abstractmethod
    def _sampling_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]: ...

    # What follows from it.

    def sampling_times(
        self, steps: int, spacing: Spacing | None = None, end: float | None = None
    ) -> tuple[np.ndarray, float]:
        """Times [steps], descending, of a sampler's steps, and the sigma it lands on after the last (0: clean data).

        Args:
            spacing: one of `spacings`. `leading` and `trailing` are diffusers': i T / steps + 1 as LDM has it, or down
                from T - 1. `uniform` is even in time, `log_snr` in log-SNR, `rho` in sigma^(1/rho) (EDM).
            end: last time, in the process's unit, for processes that have a choice.

        Raises:
            ConfigError: the process has no such spacing, end or number of steps.
        """
        spacing = spacing or self.spacings[0]
        if spacing not in self.spacings:
            problem = f"a process in {self.unit} is not sampled that way"
            raise ConfigError("spacing", spacing, problem, f"Choose from: {', '.join(self.spacings)}.")
        return self._sampling_times(steps, spacing, end)

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

    def _scales_like(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        s_B, n_B = self.scales(t_B)
        shape = (-1, *[1] * (x.ndim - 1))
        return s_B.view(shape), n_B.view(shape)


class DiscreteProcess(Process):
    """LDM's process: integer timesteps 0 .. T - 1, each equally likely in training."""

    unit = "timestep"
    spacings = ("leading", "trailing", "log_snr")
    samplers = ("ddim", "ddpm", "dpmpp_2m")
    hi: int

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

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        a = self.alphas_cumprod[np.asarray(t, np.int64)]
        return np.sqrt((1 - a) / a)

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        return np.searchsorted(self.sigma_of(np.arange(self.hi)), sigma, side="left")

    def _sampling_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        if steps > self.hi:
            raise ConfigError("steps", steps, f"the process has {self.hi} timesteps", f"Use at most {self.hi}.")
        if end is not None:
            raise ConfigError("end", end, "a discrete process is always sampled to clean data", "Leave it out.")
        i = np.arange(steps)
        if spacing == "leading":
            times = i * self.hi // steps + (self.hi >= 2 * steps)
        elif spacing == "trailing":
            times = (i + 1) * self.hi // steps - 1
        else:  # even in log-SNR, but consecutive near the data where the timesteps are too coarse for that
            log_sigmas = np.log(self.sigma_of(np.arange(self.hi)))
            even = np.linspace(log_sigmas[-1], log_sigmas[0], steps)[::-1]
            nearest = np.rint(np.interp(even, log_sigmas, np.arange(self.hi))).astype(np.int64)
            times = np.minimum(np.maximum.accumulate(nearest - i) + i, self.hi - steps + i)
        return times[::-1], 0.0


class VPProcess(Process):
    """Continuous variance-preserving SDE, t in [t_min, 1), uniform in training (2011.13456, Eq. 33).

    s_t = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2), n_t = sqrt(1 - s_t^2).
    """

    unit = "t"
    spacings = ("log_snr", "uniform")
    samplers = ("dpm_3s", "dpmpp_2m", "ddim", "ddpm")

    def __init__(self, config: VPConfig) -> None:
        super().__init__(build_denoiser(config.prediction_type, config.min_snr_gamma))
        self.lo, self.hi = config.t_min, 1.0
        self._slope, self._beta_min = config.beta_max - config.beta_min, config.beta_min

    def scales(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t_B = t_B.double()
        log_s_B = -(t_B**2) * self._slope / 4 - t_B * self._beta_min / 2
        return torch.exp(log_s_B).float(), torch.sqrt(-torch.expm1(2 * log_s_B)).float()

    def network_time(self, t_B: Tensor) -> Tensor:
        return (999 * t_B).float()

    def mass(self, lo: float, hi: float) -> float:
        return (hi - lo) / (self.hi - self.lo)

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        return np.minimum(lo + u * (hi - lo), np.nextafter(hi, lo))

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        t = np.asarray(t, np.float64)
        return np.sqrt(np.expm1(t**2 * self._slope / 2 + t * self._beta_min))

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        log_square = np.log1p(np.asarray(sigma, np.float64) ** 2)
        return 2 * log_square / (self._beta_min + np.sqrt(self._beta_min**2 + 2 * self._slope * log_square))

    def _sampling_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        end = self.lo if end is None else end
        if not self.lo <= end < self.hi:
            problem = f"training covers t from {self.lo} to {self.hi}"
            raise ConfigError("end", end, problem, "Stop inside it, or train with a smaller t_min.")
        if spacing == "uniform":
            grid = np.linspace(self.hi, end, steps + 1)
        else:
            grid = self.time_of(np.geomspace(self.sigma_of(self.hi), self.sigma_of(end), steps + 1))
        return grid[:-1], float(self.sigma_of(end))


class EDMProcess(Process):
    """Noise of level sigma is added to the data, ln(sigma) ~ N(p_mean, p_std^2) in training (2206.00364)."""

    unit = "sigma"
    spacings = ("rho",)
    samplers = ("heun",)
    lo, hi = 0.0, math.inf

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(EDMDenoiser(config.sigma_data))
        self._config = config
        self.prior_std = config.sigma_max

    def scales(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        sigma_B = t_B.float()
        return torch.ones_like(sigma_B), sigma_B

    def network_time(self, t_B: Tensor) -> Tensor:
        return (torch.log(t_B) / 4).float()

    def mass(self, lo: float, hi: float) -> float:
        _, a, b = self._normal_interval(lo, hi)
        return _normal_cdf(b) - _normal_cdf(a)

    def quantile(self, u: np.ndarray, lo: float, hi: float) -> np.ndarray:
        sign, a, b = self._normal_interval(lo, hi)
        p = _normal_cdf(a) + np.maximum(u, 2.0**-54) * (_normal_cdf(b) - _normal_cdf(a))
        z = sign * torch.special.ndtri(torch.from_numpy(p)).numpy()
        return np.clip(np.exp(self._config.p_mean + self._config.p_std * z), lo, np.nextafter(hi, lo))

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        return np.asarray(t, np.float64)

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        return np.asarray(sigma, np.float64)

    def _sampling_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        config, end = self._config, self._config.sigma_min if end is None else end
        if not 0 < end < config.sigma_max:
            raise ConfigError("end", end, f"must lie between 0 and sigma_max = {config.sigma_max}", "EDM uses 0.002.")
        return np.linspace(config.sigma_max ** (1 / config.rho), end ** (1 / config.rho), steps) ** config.rho, 0.0

    def _normal_interval(self, lo: float, hi: float) -> tuple[int, float, float]:
        """(sign, a, b): the interval in sign x the standard normal variable, in the tail where the cdf is exact."""
        a, b = ((math.log(x) if x > 0 else -math.inf) for x in (lo, hi))
        a, b = ((x - self._config.p_mean) / self._config.p_std for x in (a, b))
        return (-1, -b, -a) if a > 0 else (1, a, b)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def convert_times(times: ArrayLike, source: Process, target: Process) -> np.ndarray:
    """Times of `target` as noisy, sigma for sigma, as `times` of `source`: how stage boundaries convert.

    For a discrete target, the first timestep that is at least as noisy.
    """
    return target.time_of(source.sigma_of(times))


def build_process(config: DiffusionConfig) -> Process:
    """The recipe's process, with its section's defaults where it has none."""
    if config.process == "vp":
        return VPProcess(config.vp or VPConfig())
    if config.process == "edm":
        return EDMProcess(config.edm or EDMConfig())
    return DiscreteProcess(config.discrete or DiscreteConfig())
