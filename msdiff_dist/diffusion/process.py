"""Diffusion processes: p(x_t | x_0) = N(s_t x_0, n_t^2 I), the times they train on, and the network's inputs.

Eq. 1 is that of 2312.09181, whose sigma_t is n_t / s_t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from msdiff_dist.diffusion.denoiser import Denoiser, noise_error
from msdiff_dist.errors import ConfigError

Spacing = Literal["leading", "trailing", "uniform", "log_snr", "rho"]
Last = Literal["first_time", "clean"]
"""Where a sampler's last step ends: at the noise level of the process's first time, or at clean data."""


class Process(ABC):
    """A noising process in its own time variable, which ascends from data to noise over [lo, hi)."""

    unit: ClassVar[str]
    """What messages call a time: `timestep`, `t` or `sigma`."""
    discrete: ClassVar[bool] = False
    """Whether times are whole numbers from 0 on."""
    variance_preserving: ClassVar[bool] = False
    """Whether s^2 + n^2 = 1 at every time."""
    spacings: ClassVar[tuple[Spacing, ...]]
    """The spacings of sampling times that the process offers; the first is the default."""
    sampler: ClassVar[str]
    """Name in `SOLVERS` of the solver that samples the process by default."""

    lo: float
    """First time."""
    hi: float
    """End of the times, which is not one of them."""
    prior_std: float = 1.0
    """Standard deviation of the noise that sampling starts from."""

    _later: tuple[tuple[float, Denoiser], ...] = ()
    # (first time, denoiser) of the stages after the first, where they have denoisers of their own.

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def divide(self, boundaries: Sequence[float], denoisers: Sequence[Denoiser]) -> None:
        """Give each stage a denoiser of its own; a boundary belongs to the stage above it."""
        self.denoiser, *others = denoisers
        self._later = tuple(zip(boundaries, others, strict=True))

    # Each process defines these.

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
        """Times in [lo, hi) that follow the training distribution, restricted to it, from uniforms u in [0, 1)."""

    @abstractmethod
    def sigma_of(self, t: ArrayLike) -> np.ndarray:
        """Noise-to-signal ratio n/s at times t, float64; it ascends with t. log-SNR is -2 log(sigma)."""

    @abstractmethod
    def time_of(self, sigma: ArrayLike) -> np.ndarray:
        """First time whose sigma is at least the given one: the inverse of `sigma_of`."""

    @abstractmethod
    def spaced_times(self, steps: int, spacing: Spacing, end: float | None) -> tuple[np.ndarray, float]:
        """The result of `sampling_times`, for a spacing that is one of `spacings`."""

    # These follow from them.

    def sampling_times(
        self, steps: int, spacing: Spacing | None = None, end: float | None = None, last: Last | None = None
    ) -> tuple[np.ndarray, float]:
        """Times [steps], descending, of a sampler's steps, and the sigma that the last step ends at (0: clean data).

        Args:
            spacing: one of `spacings`, None for the first. `leading` is i T / steps + 1: LDM's times where steps
                divides T (elsewhere LDM takes more steps than were asked for); `trailing` goes down from T - 1 in steps
                of T / steps, as in diffusers; `uniform` is even in time, `log_snr` in log-SNR, `rho` in sigma^(1/rho)
                (2206.00364, Eq. 5).
            end: last time, in the process's unit, where the process lets it be chosen.
            last: `first_time`: the last step ends at the process's first time, or at `end`; where that time is itself
                one of the steps', at clean data. `clean`: at clean data, and the last time is `end` where the process
                has one. None: what `spaced_times` gives, clean data for all processes but `vp`.

        Raises:
            ConfigError: the process does not offer this spacing, end or number of steps.
        """
        spacing = spacing or self.spacings[0]
        if spacing not in self.spacings:
            problem = f"a process in {self.unit} does not offer this spacing"
            raise ConfigError("spacing", spacing, problem, f"Choose from: {', '.join(self.spacings)}.")
        times, landing = self.spaced_times(steps, spacing, end)
        if last == "first_time" and landing == 0 and times[-1] > self.lo:
            landing = float(self.sigma_of(self.lo))
        elif last == "clean" and landing > 0:
            # The steps that would end at the last time are one fewer, since the step from there is one too.
            if steps > 1:
                end_time = max(float(self.time_of(landing)), self.lo)
                times = np.append(self.spaced_times(steps - 1, spacing, end)[0], end_time)
            landing = 0.0
        return times, landing

    def perturb(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = s x_0 + n noise, [B, C, H, W] (Eq. 1)."""
        s, n = self._scales_like(x0_BCHW, t_B)
        return s * x0_BCHW + n * noise_BCHW

    def network_input(self, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """The network's image and time input, (c_in x_t [B, C, H, W], c_noise [B])."""
        scales = self._scales_like(x_t, t_B)
        return self._of_stages(t_B, lambda one: one.scale_input(x_t, *scales)), self.network_time(t_B)

    def target(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the network's output is regressed on, [B, C, H, W]."""
        scales = self._scales_like(x0, t_B)
        return self._of_stages(t_B, lambda one: one.target(x0, noise, *scales))

    def weight(self, t_B: Tensor) -> Tensor:
        """Weight of each sample's loss, float32 [B]."""
        scales = self.scales(t_B)
        return self._of_stages(t_B, lambda one: one.weight(*scales))

    def noise_error(self, t_B: Tensor) -> Tensor:
        """Factor of each sample's squared error of the output to that of the predicted noise, float32 [B]."""
        scales = self.scales(t_B)
        return self._of_stages(t_B, lambda one: noise_error(one, *scales))

    def denoised(self, output: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """Estimate of x_0 from the network's output at x_t, [B, C, H, W]."""
        scales = self._scales_like(x_t, t_B)
        return self._of_stages(t_B, lambda one: one.denoised(output, x_t, *scales))

    def _of_stages(self, t_B: Tensor, result: Callable[[Denoiser], Tensor]) -> Tensor:
        """What each sample's denoiser makes of it: all denoisers compute all samples, so that no device is asked how
        many there are of a stage."""
        found = result(self.denoiser)
        for first, denoiser in self._later:
            # float64, since float32 would round boundaries across nearby times.
            is_later = (t_B.double() >= first).view(-1, *[1] * (found.ndim - 1))
            found = torch.where(is_later, result(denoiser), found)
        return found

    def _scales_like(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """`scales`, shaped to broadcast over the entries of each sample of x."""
        s_B, n_B = self.scales(t_B)
        shape = (-1, *[1] * (x.ndim - 1))
        return s_B.view(shape), n_B.view(shape)


def convert_times(times: ArrayLike, source: Process, target: Process) -> np.ndarray:
    """Times of `target` with the same sigma as `times` of `source`. Stage boundaries convert this way.

    For a discrete target it is the first timestep that is at least as noisy.
    """
    return target.time_of(source.sigma_of(times))
