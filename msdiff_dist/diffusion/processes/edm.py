"""The process of EDM (2206.00364), whose time is the noise level sigma."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from msdiff_dist.bounds import check_between
from msdiff_dist.diffusion.denoiser import EDMDenoiser, check_min_snr_gamma
from msdiff_dist.diffusion.process import Process, Spacing
from msdiff_dist.errors import ConfigError

_LEAST_SIGMA = 1e-15  # fp32 holds its square
_MOST_LOG_SIGMA = 80  # exp(80) is near the greatest number of fp32


@dataclass(frozen=True, kw_only=True)
class EDMConfig:
    """EDM (2206.00364): noise level sigma with ln(sigma) ~ N(p_mean, p_std^2), and its preconditioning."""

    p_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    p_std: float = 1.2
    """Standard deviation of ln(sigma) in training."""
    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    """Smallest noise level of the sampler (EDM's Eq. 5)."""
    sigma_max: float = 80.0
    """Largest noise level of the sampler (EDM's Eq. 5)."""
    rho: float = 7.0
    """The sampler's noise levels are evenly spaced in sigma^(1/rho) (EDM's Eq. 5)."""
    min_snr_gamma: float | None = None
    """Weigh the error of the denoised image by min(SNR, gamma) (2303.09556), where SNR = 1 / sigma^2. null: EDM's
    weight, SNR + 1 / sigma_data^2."""

    def __post_init__(self) -> None:
        for name in ("p_std", "sigma_data", "sigma_min", "rho"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be positive", "Give a number above 0.")
        if not self.sigma_max > self.sigma_min:
            problem = f"must be above sigma_min = {self.sigma_min}"
            raise ConfigError("sigma_max", self.sigma_max, problem, "EDM uses 0.002 and 80.")
        for name in ("sigma_data", "sigma_min", "sigma_max"):
            check_between(name, getattr(self, name), _LEAST_SIGMA, 1 / _LEAST_SIGMA)
        check_between("p_std", self.p_std, 1e-6, _MOST_LOG_SIGMA)
        check_min_snr_gamma(self.min_snr_gamma)
        farthest = abs(self.p_mean) + 10 * self.p_std  # standard normal numbers in fp64 reach 9
        if farthest > _MOST_LOG_SIGMA:
            name = "p_mean" if abs(self.p_mean) > 10 * self.p_std else "p_std"
            problem = f"gives noise levels up to exp({farthest:.3g})"
            raise ConfigError(name, getattr(self, name), problem, "EDM uses -1.2 and 1.2.")
        # Times are evenly spaced between these two.
        if not 1e-200 < self.sigma_min ** (1 / self.rho) * (1 + 1e-6) < self.sigma_max ** (1 / self.rho) < 1e200:
            raise ConfigError("rho", self.rho, "gives no noise levels between sigma_min and sigma_max", "EDM uses 7.")


class EDMProcess(Process):
    """x_t = x_0 + sigma eps, with ln(sigma) ~ N(p_mean, p_std^2) in training (2206.00364, Table 1)."""

    unit = "sigma"
    spacings = ("rho",)
    sampler = "heun"
    lo, hi = 0.0, math.inf

    def __init__(self, config: EDMConfig) -> None:
        super().__init__(EDMDenoiser(config.sigma_data, config.min_snr_gamma))
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
        # By the inverse of the normal distribution function, on the side where it is exact. With sign -1 times descend
        # with u, but follow the same distribution.
        sign, a, b = self._normal_interval(lo, hi)
        # u = 0 would be sigma = 0, whose logarithm the network cannot take.
        p = _normal_cdf(a) + np.maximum(u, 2.0**-54) * (_normal_cdf(b) - _normal_cdf(a))
        z = sign * torch.special.ndtri(torch.from_numpy(p)).numpy()
        # Rounding must not carry a time out of its stage.
        values: np.ndarray = np.clip(np.exp(self._config.p_mean + self._config.p_std * z), lo, np.nextafter(hi, lo))
        return values

    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        return np.asarray(t, np.float64)

    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        return np.asarray(sigma, np.float64)

    def spaced_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        config, end = self._config, self._config.sigma_min if end is None else end
        if not _LEAST_SIGMA < end < config.sigma_max:
            raise ConfigError("end", end, f"must lie between 0 and sigma_max = {config.sigma_max}", "EDM uses 0.002.")
        return np.linspace(config.sigma_max ** (1 / config.rho), end ** (1 / config.rho), steps) ** config.rho, 0.0

    def _normal_interval(self, lo: float, hi: float) -> tuple[int, float, float]:
        """(sign, a, b): [lo, hi) as the interval [a, b] of sign * z, where z is the standard normal variable.

        An interval above the mean is mirrored to below it: there the distribution function is small and keeps its
        relative precision, where near one it would lose it.
        """
        a, b = ((math.log(x) if x > 0 else -math.inf) for x in (lo, hi))
        a, b = ((x - self._config.p_mean) / self._config.p_std for x in (a, b))
        return (-1, -b, -a) if a > 0 else (1, a, b)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
