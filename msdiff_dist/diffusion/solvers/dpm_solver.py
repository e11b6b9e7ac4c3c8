"""DPM-Solver of order 3, singlestep (2206.00927).

It is written here because diffusers deprecates the form that predicts noise, and cannot place the inner times of a step
in log-SNR as the paper does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from msdiff_dist.diffusion.process import Process
from msdiff_dist.diffusion.solvers.solver import Denoise

if TYPE_CHECKING:
    from msdiff_dist.diffusion.solvers.sampler import SamplerConfig


def dpm_solver_singlestep(
    denoise: Denoise, process: Process, config: SamplerConfig, x: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """DPM-Solver-3 (2206.00927, Algorithm 2), with steps even in log-SNR.

    `config.steps` is the number of network evaluations. A step of order k takes k of them, so the last steps have lower
    orders where three does not divide the number (DPM-Solver-fast). `generators` is not used: no step is stochastic.
    """
    # The paper also ends a number that three divides in steps of orders 2 and 1.
    whole, rest = divmod(config.steps, 3)
    orders = {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[rest]
    ends, landing = process.sampling_times(len(orders), "log_snr", config.end)
    # lambda = log(s / n) = -log(sigma), half the log-SNR, at the ends of the steps.
    edges = -np.log(np.array([*process.sigma_of(ends), landing]))
    for order, start, end in zip(orders, edges[:-1], edges[1:], strict=True):
        x = _dpm_solver_step(denoise, process, x, order, start, end - start)
    return x


def _dpm_solver_step(denoise: Denoise, process: Process, x: Tensor, order: int, start: float, h: float) -> Tensor:
    """One step from lambda = log(s / n) = start to start + h (2206.00927, Algorithms 1 and 2).

    Inner points are at one half (order 2) or at thirds (order 3) of the step.
    """

    def scales(lam: float) -> tuple[float, float]:
        return (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5

    def noise_at(x: Tensor, lam: float) -> Tensor:
        s, n = scales(lam)
        return (x - s * denoise(x, float(process.time_of(np.exp(-lam))))) / n

    def move(r: float, correction: Tensor | float = 0.0) -> Tensor:
        """x at lambda = start + r h, from the noise at the start and a correction, a multiple of a noise difference."""
        s, n = scales(start + r * h)
        return s / scales(start)[0] * x - n * (math.expm1(r * h) * noise + correction)

    # Orders 2 and 3 correct the exponential Euler step of order 1 by differences of the noise at inner points:
    # Algorithm 1 with r_1 = 1/2, and Algorithm 2 with r_1 = 1/3 and r_2 = 2/3.
    noise = noise_at(x, start)
    if order == 1:
        return move(1)
    if order == 2:
        return move(1, math.expm1(h) * (noise_at(move(1 / 2), start + h / 2) - noise))
    first = noise_at(move(1 / 3), start + h / 3) - noise
    second = noise_at(move(2 / 3, 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * first), start + 2 * h / 3) - noise
    return move(1, 3 / 2 * (math.expm1(h) / h - 1) * second)
