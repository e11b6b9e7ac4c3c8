"""EDM's sampler of Heun steps (2206.00364). It is written here because diffusers' has no stochastic churn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers.solver import Denoise
from msdiff_dist.errors import ConfigError

if TYPE_CHECKING:
    from msdiff_dist.diffusion.solvers.sampler import SamplerConfig


def heun(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """2206.00364, Algorithm 2, in float64: Heun steps in sigma, each after raising the noise level by `churn`."""
    from diffusers.utils.torch_utils import randn_tensor

    times, landing = process.sampling_times(config.steps, config.spacing, config.end)
    churn, x = config.churn, x.double()
    for sigma, sigma_next in zip(times.tolist(), [*times[1:].tolist(), landing], strict=True):
        if churn.amount and churn.sigma_min <= sigma <= churn.sigma_max:
            # The bound keeps the added noise below the noise that is there: raised^2 - sigma^2 <= sigma^2.
            raised = sigma * (1 + min(churn.amount / config.steps, math.sqrt(2) - 1))
            noise = randn_tensor(x.shape, generator=generators, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:  # at sigma = 0 there is no slope, so the last step stays Euler's
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def heun_steps(evaluations: int) -> int:
    """Number of steps that take exactly this number of network evaluations.

    Raises:
        ConfigError: the number is even.
    """
    if evaluations % 2 == 0:
        problem = "is even, but heun takes two evaluations for each step except the last"
        raise ConfigError("evaluations", evaluations, problem, f"Use {evaluations - 1} or {evaluations + 1}.")
    return (evaluations + 1) // 2
